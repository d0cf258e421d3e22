"""What figures are drawn on: our style, panels under a legend, and the files that a figure becomes."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_momentum.errors import UserError, require_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SETTINGS = {
    "svg.hashsalt": "hf_momentum",  # the same figure, the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.titlesize": 9,
}
PANEL_WIDTH, _PANEL_HEIGHT = 3.4, 2.3  # inches: two panels fill a page's width


def _context() -> AbstractContextManager:
    """Our settings while a figure is made or written; those of the user come back after it."""
    return require_extra("matplotlib.style", "report").context(["default", _SETTINGS])


def in_our_style(function: Callable) -> Callable:
    """Let a function draw in our style.

    Args:
        function: Makes or writes a figure.

    Returns:
        The function within our settings.
    """

    @wraps(function)
    def styled(*args: Any, **kwargs: Any) -> Any:
        with _context():
            return function(*args, **kwargs)

    return styled


@in_our_style
def save_figure(figure: "Figure", records: Iterable[dict[str, Any]], stem: Path) -> list[Path]:
    """Write a figure as PNG and SVG, and beside it the records that it shows.

    The same figure gives the same bytes.

    Args:
        figure: The figure.
        records: The records.
        stem: The path without a suffix; folders are made as needed.

    Returns:
        The three files.

    Raises:
        UserError: If they cannot be written.
    """
    files = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg", ".jsonl")]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(files[0], dpi=200)
        figure.savefig(files[1], metadata={"Date": None})
        files[2].write_text(lines, encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write {stem}: {error}") from error
    return files


def new_figure(width: float, height: float) -> "Figure":
    """Make a figure that needs no window.

    Args:
        width: In inches.
        height: In inches.

    Returns:
        The figure.
    """
    figure = require_extra("matplotlib.figure", "report").Figure(figsize=(width, height), layout="constrained")
    require_extra("matplotlib.backends.backend_agg", "report").FigureCanvasAgg(figure)
    return figure


def grid_of_panels(
    lines: int, columns: int, styles: Mapping[str, dict], title: str = "", **options: Any
) -> tuple["Figure", np.ndarray]:
    """Make panels under a legend that has as many columns as fit.

    Args:
        lines: Of panels.
        columns: Of panels.
        styles: Name in the legend → keywords of `Axes.plot`; none is no legend.
        title: Above all.
        **options: Keywords of `Figure.subplots`.

    Returns:
        The figure and its axes, `(lines, columns)`.
    """
    artists = require_extra("matplotlib.lines", "report")
    width = max(2, columns) * PANEL_WIDTH
    fitting = int(width / (0.6 + 0.075 * max(map(len, styles), default=1)))  # inches of a handle and a character
    across = min(max(fitting, 1), max(len(styles), 1))
    above = 0.18 * math.ceil(len(styles) / across) + 0.25 * bool(title)
    figure = new_figure(width, lines * _PANEL_HEIGHT + 0.2 + above)
    if styles:
        handles = [artists.Line2D([], [], label=name, **style) for name, style in styles.items()]
        figure.legend(
            handles=handles, loc="outside upper center", ncols=across, title=title or None, title_fontsize=10
        )
    elif title:
        figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(lines, columns, squeeze=False, **options)

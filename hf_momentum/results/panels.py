"""Figures and tables of rows: panels that a YAML file describes, readable in grey."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_momentum.errors import UserError, require_extra
from hf_momentum.results.canvas import grid_of_panels, in_our_style
from hf_momentum.results.drawing import MOST_STYLES, line_styles
from hf_momentum.results.export import Sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_MOST_MARKERS = 30  # on a line
_FEW_DECADES = 30
SPREADS = ("bars", "band")
SCALES = ("linear", "log", "log2", "symlog")


@dataclass(frozen=True)
class Panel:
    """One panel: what is measured as markers with intervals, what is predicted as lines of the same look.

    Attributes:
        x: The rows' field on the x axis.
        y: The field that is drawn as markers, with the interval from the rows' fields `low` to `high` where they have
            one; rows without it have no marker.
        line: The field that is drawn as a line; where no row has it, the markers are joined.
        series: The field that tells the lines apart; "" is one line.
        where: Field → the value, or a list of values, that the panel's rows have.
        title: Above the panel.
        xlabel: With units.
        ylabel: With units.
        xscale: One of `SCALES`.
        yscale: One of `SCALES`.
        xmarks: Label → place of a vertical line.
        ymarks: Label → place of a horizontal line.
        ylim: Lower and upper end of the y axis; empty chooses.
        spread: How `low` to `high` is drawn, one of `SPREADS`.
    """

    x: str
    y: str = "measured"
    line: str = "predicted"
    series: str = ""
    where: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    xlabel: str = ""
    ylabel: str = ""
    xscale: str = "linear"
    yscale: str = "linear"
    xmarks: dict[str, float] = field(default_factory=dict)
    ymarks: dict[str, float] = field(default_factory=dict)
    ylim: list[float] = field(default_factory=list)
    spread: str = "bars"

    def __post_init__(self) -> None:
        for name, allowed in (("xscale", SCALES), ("yscale", SCALES), ("spread", SPREADS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"A panel's {name} is {getattr(self, name)!r}. Allowed: {', '.join(allowed)}.")


@dataclass(frozen=True)
class TableSpec:
    """One table.

    Attributes:
        columns: Heading → the rows' field.
        where: As a panel's.
        title: What it shows.
        caption: How to read it.
        texts: How many leading columns are text.
    """

    columns: dict[str, str]
    where: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    caption: str = ""
    texts: int = 1


def read_specs(kind: type, values: Sequence[Mapping[str, Any]]) -> list:
    """Read panels or tables from a YAML file's mappings.

    Args:
        kind: `Panel` or `TableSpec`.
        values: The mappings.

    Returns:
        The specifications.

    Raises:
        UserError: If a mapping has an unknown key, or lacks one.
    """
    names = [entry.name for entry in dataclasses.fields(kind)]
    specs = []
    for value in values:
        if unknown := value.keys() - set(names):
            raise UserError(f"Unknown key {min(unknown)!r} of a {kind.__name__}. Allowed: {', '.join(names)}.")
        try:
            specs.append(kind(**value))
        except TypeError as error:
            raise UserError(f"A {kind.__name__} is incomplete: {error}.") from error
    return specs


def select(rows: Sequence[Row], where: Mapping[str, Any]) -> list[Row]:
    """Find the rows that a panel or a table shows.

    Args:
        rows: All rows.
        where: Field → the value, or a list of values, that they have.

    Returns:
        The rows, in order.

    Raises:
        UserError: If there are none.
    """
    allowed = {name: value if isinstance(value, list) else [value] for name, value in where.items()}
    chosen = [row for row in rows if all(row.get(name) in values for name, values in allowed.items())]
    if not chosen:
        raise UserError(f"No row has {', '.join(f'{name} = {value}' for name, value in where.items()) or 'anything'}.")
    return chosen


@in_our_style
def panels_figure(rows: Sequence[Row], panels: Sequence[Panel], title: str = "", reading: str = "") -> "Figure":
    """Draw panels under one legend.

    Args:
        rows: The rows of a study.
        panels: What to draw of them.
        title: Above all.
        reading: Below all, what the marks mean; empty says it of measurements and predictions.

    Returns:
        The figure.
    """
    parts = [select(rows, panel.where) for panel in panels]
    names = [
        tuple(dict.fromkeys(_series(row, panel) for row in part)) for panel, part in zip(panels, parts, strict=True)
    ]
    shared = any(set(every) >= {name for part in names for name in part} for every in names)
    styles = line_styles(name for part in names for name in part)
    columns, legend = min(2, len(panels)), styles if shared and any(styles) else {}
    figure, grid = grid_of_panels(math.ceil(len(panels) / columns), columns, legend, title=title)
    for panel, part, own, axes in zip(panels, parts, names, grid.flat, strict=False):
        looks = styles if len(styles) <= MOST_STYLES else line_styles(own)
        draw_panel(axes, part, panel, looks)
        if not shared and any(own):
            _legend(axes, {name: looks[name] for name in own})
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    reading = reading or _reading([(panel, row) for panel, part in zip(panels, parts, strict=True) for row in part])
    if reading:
        figure.supxlabel(reading, fontsize=8)
    return figure


def _legend(axes: "Axes", styles: Mapping[str, dict]) -> None:
    artists = require_extra("matplotlib.lines", "report")
    handles = [artists.Line2D([], [], label=name, markersize=3.5, **style) for name, style in styles.items()]
    axes.legend(handles=handles, fontsize=7, framealpha=0.7, handlelength=2.8, frameon=True, edgecolor="none")


def _reading(shown: Sequence[tuple[Panel, Row]]) -> str:
    """What the marks mean."""
    has_lines = any(row.get(panel.y) is not None and row.get(panel.line) is not None for panel, row in shown)
    has_intervals = any(row.get(panel.y) is not None and row.get("low") is not None for panel, row in shown)
    words = ["markers: measured"] * (has_lines or has_intervals) + ["bars: 95% intervals"] * has_intervals
    return ", ".join([*words, *["lines without markers: predicted"] * has_lines])


def _series(row: Row, panel: Panel) -> str:
    value = row.get(panel.series) if panel.series else ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def draw_panel(axes: "Axes", rows: Sequence[Row], panel: Panel, styles: Mapping[str, dict]) -> None:
    """Draw one panel.

    Args:
        axes: Where to draw.
        rows: Its rows.
        panel: Its description.
        styles: Name of a series → keywords of `Axes.plot`.
    """
    series: dict[str, list[Row]] = {}
    for row in rows:
        series.setdefault(_series(row, panel), []).append(row)
    for name, part in series.items():
        part = sorted((row for row in part if row.get(panel.x) is not None), key=lambda row: row[panel.x])
        lined = [(row[panel.x], row[panel.line]) for row in part if panel.line and row.get(panel.line) is not None]
        if lined:
            look = {key: styles[name][key] for key in ("color", "linestyle")}
            axes.plot(*zip(*lined, strict=True), **look, linewidth=1.2, zorder=2)
        _draw_measured(axes, part, panel, styles[name], joined=not lined)
    for label, place in panel.xmarks.items():
        axes.axvline(place, color="0.6", linewidth=0.8, zorder=1)
        axes.annotate(label, (place, 1), xycoords=("data", "axes fraction"), fontsize=7, ha="center", va="bottom")
    for label, place in panel.ymarks.items():
        axes.axhline(place, color="0.6", linewidth=0.8, zorder=1)
        axes.annotate(label, (1, place), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="bottom")
    if panel.ylim:
        axes.set_ylim(*panel.ylim)
    axes.set(xlabel=panel.xlabel or panel.x, ylabel=panel.ylabel or panel.y)
    for axis, scale in ((axes.xaxis, panel.xscale), (axes.yaxis, panel.yscale)):
        _scale(axis, scale)
    axes.set_title(panel.title, pad=12 if panel.xmarks else 4)


def _scale(axis: "Axis", scale: str) -> None:
    """Set a scale; a logarithmic one that spans little gets ticks at 1, 2 and 5 as plain numbers."""
    ticker, set_scale = require_extra("matplotlib.ticker", "report"), getattr(axis.axes, f"set_{axis.axis_name}scale")
    set_scale("log", base=2) if scale == "log2" else set_scale(scale)
    if scale == "log2":
        axis.set_major_formatter("{x:g}")
    elif scale == "log":
        low, high = axis.get_view_interval()
        if high < _FEW_DECADES * low:
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")


def _draw_measured(axes: "Axes", rows: Sequence[Row], panel: Panel, style: Mapping[str, Any], joined: bool) -> None:
    points = [row for row in rows if row.get(panel.y) is not None]
    if not points:
        return
    xs, ys = ([row[name] for row in points] for name in (panel.x, panel.y))
    line = style["linestyle"] if joined else ""
    look = {"color": style["color"], "marker": style["marker"], "markersize": 3.5, "linewidth": 1.0}
    axes.plot(xs, ys, **look, linestyle=line, markevery=math.ceil(len(xs) / _MOST_MARKERS), zorder=3)
    spread = [row for row in points if row.get("low") is not None and row.get("high") is not None]
    if spread:
        places, low, high = ([row[name] for row in spread] for name in (panel.x, "low", "high"))
        if panel.spread == "band":
            axes.fill_between(places, low, high, color=style["color"], alpha=0.2, linewidth=0, zorder=1)
        else:
            axes.vlines(places, low, high, color=style["color"], linewidth=0.9, zorder=3)


def rows_sheet(rows: Sequence[Row], table: TableSpec) -> Sheet:
    """Make a table of rows.

    Args:
        rows: The rows of a study.
        table: What to show of them.

    Returns:
        The table as text, numbers to four digits.
    """
    cells = [tuple(_text(row.get(name)) for name in table.columns.values()) for row in select(rows, table.where)]
    return Sheet(table.title, tuple(table.columns), cells, table.caption, table.texts)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)

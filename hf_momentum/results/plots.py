"""Figures from the records of runs, readable in grey: accuracy over lr, paired differences, learning curves."""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_momentum.errors import UserError, require_extra
from hf_momentum.results.comparisons import Pair, averaged_pairs, paired_values
from hf_momentum.results.rows import Row, cell_rows, comparison_pairs, row_names, setting_names, table_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Drawing = tuple["Figure", list[dict[str, Any]]]
_SETTINGS = {
    "svg.hashsalt": "hf_momentum",  # the same figure, the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.titlesize": 9,
}
# Lines are told apart by marker, dash and grey value; the colour only helps.
_COLORS = ("#14508c", "#e07b39", "#3f6b2a", "#b07cc6", "#8c1c2e", "#8a8a8a", "#0b8f8f", "#5a4632")
_MARKERS, _DASHES = "osD^vPX*", ("-", "--", "-.", ":")
_PANEL_WIDTH, _PANEL_HEIGHT = 3.4, 2.3  # inches: two panels fill a page's width


def _context() -> AbstractContextManager:
    """Our settings while a figure is made or written; those of the user come back after it."""
    return require_extra("matplotlib.style", "report").context(["default", _SETTINGS])


def _in_our_style(function: Callable) -> Callable:
    @wraps(function)
    def styled(*args: Any, **kwargs: Any) -> Any:
        with _context():
            return function(*args, **kwargs)

    return styled


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How to draw each line: distinct without colour too.

    Args:
        names: Names of lines; repeated ones count once.

    Returns:
        Name → keywords of `Axes.plot`.
    """
    styles = {}
    for number, name in enumerate(dict.fromkeys(names)):
        again, kind = divmod(number, len(_MARKERS))
        dash = _DASHES[(kind + again) % len(_DASHES)]
        styles[name] = {"color": _COLORS[kind], "marker": _MARKERS[kind], "linestyle": dash}
    return styles


def draw_accuracy_over_lr(
    axes: "Axes", series: Mapping[str, Mapping[float, Sequence[float]]], styles: Mapping[str, dict], join: bool = True
) -> None:
    """One line per name over the learning rate: the mean, and every seed as a small open marker.

    Args:
        axes: Where to draw.
        series: Name → learning rate → values over seeds, in percent.
        styles: Name → keywords of `Axes.plot`.
        join: Whether to join the means; not where each seed picked its own learning rate.
    """
    transforms = require_extra("matplotlib.transforms", "report")
    axes.set_xscale("log")
    rates = sorted({rate for values in series.values() for rate in values})
    step = min(7, 70 / len(rates) / len(series)) / 72  # inches: markers at the same rate stand beside each other
    for number, (name, values) in enumerate(series.items()):
        aside = transforms.ScaledTranslation((number - (len(series) - 1) / 2) * step, 0, axes.figure.dpi_scale_trans)
        shifted = axes.transData + aside
        color, marker = styles[name]["color"], styles[name]["marker"]
        points = [(rate, value) for rate, several in sorted(values.items()) for value in several]
        small = {"linestyle": "", "markersize": 4, "markerfacecolor": "none", "markeredgewidth": 0.7, "alpha": 0.8}
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, transform=shifted, **small)
        axes.update_datalim(points)  # matplotlib does not take it from a moved line
        if join:
            means = [(rate, np.mean(several)) for rate, several in sorted(values.items())]
            axes.plot(*zip(*means, strict=True), **styles[name], markersize=6, linewidth=1.2, transform=shifted)
    axes.autoscale_view()
    _tick_rates(axes, rates)


def _tick_rates(axes: "Axes", rates: Sequence[float]) -> None:
    """Ticks at the rates themselves, where they are few enough to be read."""
    ticker = require_extra("matplotlib.ticker", "report")
    low, high = math.log10(rates[0]), math.log10(rates[-1])
    margin = 0.12 * (high - low) or 0.3
    axes.set_xlim(10 ** (low - margin), 10 ** (high + margin))
    gaps = [math.log10(second / first) for first, second in itertools.pairwise(rates)]
    if len(rates) <= 6 and min(gaps, default=1) > 0.12 * (high - low):
        axes.xaxis.set_major_locator(ticker.FixedLocator(rates))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda rate, _: f"{rate:g}"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())


def draw_learning_curves(
    axes: "Axes", series: Mapping[str, Sequence[Sequence[tuple[float, float]]]], styles: Mapping[str, dict]
) -> None:
    """One bundle per name over the steps: every seed as a thin line, their mean as a thick one.

    Args:
        axes: Where to draw.
        series: Name → seed by seed → (step, accuracy in percent).
        styles: Name → keywords of `Axes.plot`.
    """
    for name, curves in series.items():
        color = styles[name]["color"]
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=color, linewidth=0.6, alpha=0.45)
        common = sorted(set.intersection(*({step for step, _ in curve} for curve in curves)))
        means = [np.mean([dict(curve)[step] for curve in curves]) for step in common]
        axes.plot(common, means, **styles[name], markersize=4, linewidth=1.6)
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_differences(axes: "Axes", pairs: Sequence[Pair], labels: Sequence[str], confidence: float = 0.95) -> None:
    """One line per pair: the mean difference with Student's interval, and each seed's difference as a grey tick.

    Args:
        axes: Where to draw.
        pairs: Top to bottom; an average over tasks gets a diamond.
        labels: One per pair.
        confidence: Level of the intervals.
    """
    axes.axvline(0, color="black", linewidth=0.8, zorder=1)
    for height, pair in enumerate(pairs):
        difference = pair.difference(confidence)
        each = [pair.second_values[seed] - pair.first_values[seed] for seed in difference.seeds]
        axes.plot(each, [height] * len(each), linestyle="", marker="|", color="0.55", markersize=9, zorder=2)
        half = 0 if math.isinf(difference.high) else difference.high - difference.mean
        marker = "D" if pair.setting[0] is None else "o"
        face = "white" if math.isinf(difference.high) else "black"
        shape = {"marker": marker, "markersize": 5, "markerfacecolor": face, "capsize": 3, "elinewidth": 1.3}
        axes.errorbar(difference.mean, height, xerr=half, color="black", zorder=3, **shape)
    axes.set_yticks(range(len(pairs)), labels)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


@_in_our_style
def lr_figure(records: Sequence[dict[str, Any]]) -> Drawing:
    """Accuracy over the learning rate: per task, dev for every cell of the grid, and test for the runs picked on dev.

    Args:
        records: Records of results files.

    Returns:
        The figure, a line of panels per task, and the records that it shows.

    Raises:
        UserError: If no record has a dev accuracy and a learning rate.
    """
    rows = [row for row in cell_rows(records) if row.is_trained and any(map(_rate, row.records))]
    if not rows:
        raise UserError("No trained run with a dev_accuracy and a learning rate in these results.")
    panels = _by_panel(rows)
    styles = line_styles(name for part in panels.values() for name in part)
    figure, grid = _panels(len(panels), 2, styles, sharex="row", sharey="row")
    for (label, part), (dev, test) in zip(panels.items(), grid, strict=True):
        for axes, metric in ((test, "test_accuracy"), (dev, "dev_accuracy")):  # dev last: it has all the rates
            series = {name: values for name, row in part.items() if (values := _over_lr(row, metric))}
            if series:
                draw_accuracy_over_lr(axes, series, styles, join=metric == "dev_accuracy")
            else:
                axes.text(0.5, 0.5, "not tested yet", transform=axes.transAxes, ha="center", color="0.4")
            axes.set_xlabel("η or lr (log scale)")
        dev.set(ylabel="accuracy (%)", title=f"{label}\ndev, every run")
        test.set(title=f"{label}\ntest, runs picked on dev")
    figure.supxlabel("open: single seeds; filled: mean over seeds", fontsize=8)
    return figure, _records(rows)


def _over_lr(row: Row, metric: str) -> dict[float, list[float]]:
    values: dict[float, list[float]] = {}
    for record in row.records:
        if _rate(record) and record.get(metric) is not None:
            values.setdefault(_rate(record), []).append(100 * record[metric])
    return values


def _rate(record: dict[str, Any]) -> float | None:
    return record.get("effective_lr") or record.get("learning_rate")


@_in_our_style
def curves_figure(records: Sequence[dict[str, Any]]) -> Drawing:
    """Learning curves: dev accuracy over the steps of the tested runs, a panel per task.

    Args:
        records: Records of results files, with the field `curve`: a list of `{"step": …, "dev_accuracy": …}`.

    Returns:
        The figure and the records that it shows.

    Raises:
        UserError: If no tested run has a curve.
    """
    rows = [row for row in table_rows(records) if any(map(_curve, row.records))]
    if not rows:
        raise UserError(
            "No tested run here has a learning curve (the field 'curve' of its record): it was made by a version that "
            "did not keep one. Run the recipe again into a new --output_dir."
        )
    panels = _by_panel(rows)
    styles = line_styles(name for part in panels.values() for name in part)
    columns = min(2, len(panels))
    one_task = len({row.setting for row in rows}) == 1
    figure, grid = _panels(math.ceil(len(panels) / columns), columns, styles, sharey=one_task)
    for (label, part), axes in zip(panels.items(), grid.flat, strict=False):
        curves = {name: list(filter(None, map(_curve, row.records))) for name, row in part.items()}
        draw_learning_curves(axes, curves, styles)
        axes.set(title=label, xlabel="step", ylabel="dev accuracy (%)")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    figure.supxlabel("thin: single seeds; thick: mean over seeds", fontsize=8)
    return figure, _records(rows)


def _curve(record: dict[str, Any]) -> list[tuple[float, float]]:
    curve = record.get("curve")
    if not isinstance(curve, list):
        return []
    points = ((point.get("step"), point.get("dev_accuracy")) for point in curve if isinstance(point, dict))
    return [(step, 100 * value) for step, value in points if step is not None and value is not None]


@_in_our_style
def difference_figure(
    records: Sequence[dict[str, Any]], margin: float | None = None, confidence: float = 0.95
) -> Drawing:
    """Paired differences of test accuracy with their intervals, a line per task and comparison.

    Args:
        records: Records of results files.
        margin: Drawn as a band, in percentage points; it says something only if it was chosen beforehand.
        confidence: Level of the intervals.

    Returns:
        The figure and the records that it shows.

    Raises:
        UserError: If no two methods can be compared, or the margin is not positive.
    """
    if margin is not None and not 0 < margin < math.inf:
        raise UserError(f"--margin must be positive, not {margin}.")
    rows = table_rows(records)
    pairs = paired_values(rows)
    if not pairs:
        raise UserError("Nothing to compare: see hf-momentum table for the runs that these results hold.")
    pairs += averaged_pairs(pairs)
    common = {pair.label for pair in pairs}, {pair.name for pair in pairs}
    told = [
        [text for text, texts in zip((pair.label, pair.name), common, strict=True) if len(texts) > 1] for pair in pairs
    ]
    height = 1.1 + len(pairs) * (0.32 if max(map(len, told)) < 2 else 0.45)
    figure = _new_figure(2 * _PANEL_WIDTH, height)
    axes = figure.subplots()
    if margin is not None:
        axes.axvspan(-margin, margin, color="0.9", zorder=0)
    draw_differences(axes, pairs, ["\n".join(texts) for texts in told], confidence)
    band = "" if margin is None else f"; grey band: ±{margin:g} points"
    reading = (
        f"{100 * confidence:g}% t intervals, paired over seeds; ticks: single seeds; open: one seed, no interval{band}"
    )
    axes.set_xlabel("difference in test accuracy (percentage points)")
    figure.supxlabel(reading, fontsize=8)
    figure.suptitle(", ".join(min(texts) for texts in common if len(texts) == 1) or "second − first", fontsize=10)
    return figure, _records(itertools.chain.from_iterable(comparison_pairs(rows)))


def write_figure(
    kind: str,
    records: Sequence[dict[str, Any]],
    folder: Path,
    margin: float | None = None,
    confidence: float = 0.95,
) -> list[Path]:
    """Draw one of the figures by its name and save it under that name.

    Args:
        kind: "lr", "difference" or "curves".
        records: Records of results files.
        folder: Where to.
        margin: Of the difference figure alone.
        confidence: Of the difference figure alone.

    Returns:
        The files.

    Raises:
        UserError: If there is no such figure, or nothing to draw.
    """
    kinds = {"lr": lr_figure, "difference": difference_figure, "curves": curves_figure}
    if kind not in kinds:
        raise UserError(f"Unknown figure: {kind!r}. Allowed: {', '.join(kinds)}.")
    if kind != "difference" and margin is not None:
        raise UserError(f"--margin belongs to --figure difference, not {kind}.")
    options = {"margin": margin, "confidence": confidence} if kind == "difference" else {}
    return save_figure(*kinds[kind](records, **options), folder / kind)


@_in_our_style
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


def _new_figure(width: float, height: float) -> "Figure":
    figure = require_extra("matplotlib.figure", "report").Figure(figsize=(width, height), layout="constrained")
    require_extra("matplotlib.backends.backend_agg", "report").FigureCanvasAgg(figure)
    return figure


def _by_panel(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Task and training conditions → method → row."""
    names, settings = row_names(rows), setting_names(rows)
    panels: dict[str, dict[str, Row]] = {}
    for row in rows:
        method, _, conditions = names[id(row)].partition(", ")
        label = ", ".join(filter(None, [settings[row.setting], conditions]))
        panels.setdefault(label, {})[method] = row
    return panels


def _panels(lines: int, columns: int, styles: Mapping[str, dict], **options: Any) -> tuple["Figure", np.ndarray]:
    """Panels under a legend that has as many columns as fit."""
    artists = require_extra("matplotlib.lines", "report")
    width = max(2, columns) * _PANEL_WIDTH
    fitting = int(width / (0.6 + 0.075 * max(map(len, styles))))  # inches of a handle and a character
    across = min(max(fitting, 1), len(styles))
    figure = _new_figure(width, lines * _PANEL_HEIGHT + 0.2 + 0.18 * math.ceil(len(styles) / across))
    handles = [artists.Line2D([], [], label=name, **style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=across)
    return figure, figure.subplots(lines, columns, squeeze=False, **options)


def _records(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [record for row in {id(row): row for row in rows}.values() for record in row.records]

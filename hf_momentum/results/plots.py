"""Figures from the records of runs: accuracy over lr, paired differences, learning curves."""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_momentum.errors import UserError
from hf_momentum.results.canvas import PANEL_WIDTH, grid_of_panels, in_our_style, new_figure, save_figure
from hf_momentum.results.comparisons import Pair, averaged_pairs, paired_values
from hf_momentum.results.drawing import draw_accuracy_over_lr, draw_differences, draw_learning_curves, line_styles
from hf_momentum.results.image_figures import rates_figure, svag_figure
from hf_momentum.results.rows import (
    Row,
    cell_rows,
    comparison_pairs,
    rate_of,
    row_names,
    setting_names,
    split_name,
    table_rows,
)
from hf_momentum.results.statistics import Equivalence, equivalence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawing = tuple["Figure", list[dict[str, Any]]]


@in_our_style
def lr_figure(records: Sequence[dict[str, Any]]) -> Drawing:
    """Accuracy over the learning rate: per task, dev for every run, and test for every run or those picked on dev.

    Args:
        records: Records of results files.

    Returns:
        The figure, a line of panels per task, and the records that it shows.

    Raises:
        UserError: If no record has a dev accuracy and a learning rate.
    """
    rows = [row for row in cell_rows(records) if row.is_trained and any(map(rate_of, row.records))]
    if not rows:
        raise UserError("No trained run with a dev_accuracy and a learning rate in these results.")
    panels = _by_panel(rows)
    styles = line_styles(name for part in panels.values() for name in part)
    figure, grid = grid_of_panels(len(panels), 2, styles, sharex="row", sharey="row")
    for (label, part), (dev, test) in zip(panels.items(), grid, strict=True):
        tested, all_tested = _tested(part.values())
        joined = {"dev_accuracy": True, "test_accuracy": all_tested}
        for axes, metric in ((test, "test_accuracy"), (dev, "dev_accuracy")):  # dev last: it has all the rates
            series = {name: values for name, row in part.items() if (values := _over_lr(row, metric))}
            if series:
                draw_accuracy_over_lr(axes, series, styles, join=joined[metric])
            else:
                axes.text(0.5, 0.5, "not tested yet", transform=axes.transAxes, ha="center", color="0.4")
            axes.set_xlabel("η or lr (log scale)")
        dev.set(ylabel="accuracy (%)", title=f"{label}\ndev, every run")
        test.set(title=f"{label}\n{tested}")
    figure.supxlabel("open: single seeds; filled: mean over seeds", fontsize=8)
    return figure, _records(rows)


def _tested(rows: Iterable[Row]) -> tuple[str, bool]:
    """Which runs were tested, in words, and whether all were."""
    records = [record for row in rows for record in row.records]
    if any((record.get("grid_size") or 1) > 1 for record in records):
        return "test, runs picked on dev", False
    if all(record.get("test_accuracy") is not None for record in records):
        return "test, every run", True
    return "test", False


def _over_lr(row: Row, metric: str) -> dict[float, list[float]]:
    values: dict[float, list[float]] = {}
    for record in row.records:
        if rate_of(record) and record.get(metric) is not None:
            values.setdefault(rate_of(record), []).append(100 * record[metric])
    return values


@in_our_style
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
    figure, grid = grid_of_panels(math.ceil(len(panels) / columns), columns, styles, sharey=one_task)
    for (label, part), axes in zip(panels.items(), grid.flat, strict=False):
        curves = {name: list(filter(None, map(_curve, row.records))) for name, row in part.items()}
        draw_learning_curves(axes, curves, styles)
        axes.set(title=label, xlabel="step", ylabel="dev accuracy (%)")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    figure.supxlabel("thin: single seeds; thick: mean over seeds", fontsize=8)
    return figure, _records(rows)


def _curve(record: dict[str, Any]) -> list[tuple[float, float]]:
    points = ((point["step"], point.get("dev_accuracy")) for point in record.get("curve") or [])
    return [(step, 100 * value) for step, value in points if value is not None]


@in_our_style
def difference_figure(
    records: Sequence[dict[str, Any]], margin: float | None = None, confidence: float = 0.95
) -> Drawing:
    """Paired differences of test accuracy with their intervals, a line per task and comparison.

    Args:
        records: Records of results files.
        margin: Drawn as a band, in percentage points, with the intervals that decide equivalence; it says something
            only if it was chosen beforehand.
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
    verdicts = [] if margin is None else [equivalence(p.first_values, p.second_values, margin) for p in pairs]
    reading = _reading(pairs, verdicts, confidence)
    height = 1 + 0.14 * len(reading) + len(pairs) * (0.32 if max(map(len, told)) < 2 else 0.45)
    figure = new_figure(2 * PANEL_WIDTH, height)
    axes = figure.subplots()
    if margin is not None:
        axes.axvspan(-margin, margin, color="0.9", zorder=0)
    draw_differences(axes, pairs, ["\n".join(texts) for texts in told], confidence, verdicts)
    axes.set_xlabel("difference in test accuracy (percentage points)")
    figure.supxlabel("\n".join(reading), fontsize=8)
    figure.suptitle(", ".join(min(texts) for texts in common if len(texts) == 1) or "second − first", fontsize=10)
    return figure, _records(itertools.chain.from_iterable(comparison_pairs(rows)))


def _reading(pairs: Sequence[Pair], verdicts: Sequence[Equivalence], confidence: float) -> list[str]:
    """What the difference figure's marks mean."""
    lines = [f"{100 * confidence:g}% t intervals, paired over seeds; ticks: single seeds"]
    if verdicts:
        level, margin = 100 * (1 - 2 * verdicts[0].alpha), verdicts[0].margin
        lines.append(f"thick: {level:g}% interval; equivalent where it lies within ±{margin:g} points (grey)")
    if any(math.isinf(pair.difference().high) for pair in pairs):
        lines.append("open: no spread over seeds (one seed, or all differ by the same), hence no interval")
    return lines


def write_figure(
    kind: str,
    records: Sequence[dict[str, Any]],
    folder: Path,
    margin: float | None = None,
    confidence: float = 0.95,
) -> list[Path]:
    """Draw one of the figures by its name and save it under that name.

    Args:
        kind: "lr", "difference", "curves", "svag" or "rates".
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
    kinds |= {"svag": svag_figure, "rates": rates_figure}
    if kind not in kinds:
        raise UserError(f"Unknown figure: {kind!r}. Allowed: {', '.join(kinds)}.")
    if kind != "difference" and margin is not None:
        raise UserError(f"--margin belongs to --figure difference, not {kind}.")
    options = {"margin": margin, "confidence": confidence} if kind == "difference" else {}
    return save_figure(*kinds[kind](records, **options), folder / kind)


def _by_panel(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Task and training conditions → method → row."""
    names, settings = row_names(rows), setting_names(rows)
    panels: dict[str, dict[str, Row]] = {}
    for row in rows:
        method, conditions = split_name(names[id(row)])
        label = ", ".join(filter(None, [settings[row.setting], conditions]))
        panels.setdefault(label, {})[method] = row
    return panels


def _records(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [record for row in {id(row): row for row in rows}.values() for record in row.records]

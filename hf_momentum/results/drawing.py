"""The marks of figures on an axes, readable in grey: accuracy over lr, learning curves, paired differences."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_momentum.errors import require_extra
from hf_momentum.results.comparisons import Pair
from hf_momentum.results.statistics import Equivalence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Lines are told apart by marker, dash and grey value; the colour only helps.
_COLORS = ("#14508c", "#e07b39", "#3f6b2a", "#b07cc6", "#8c1c2e", "#8a8a8a", "#0b8f8f", "#5a4632")
_MARKERS, _DASHES = "osD^vPX*", ("-", "--", "-.", ":")
MOST_STYLES = len(_COLORS)  # that differ in colour and marker


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


def draw_differences(
    axes: "Axes",
    pairs: Sequence[Pair],
    labels: Sequence[str],
    confidence: float = 0.95,
    verdicts: Sequence[Equivalence] = (),
) -> None:
    """One line per pair: the mean difference with Student's interval, and each seed's difference as a grey tick.

    Args:
        axes: Where to draw.
        pairs: Top to bottom; an average over tasks gets a diamond, one without spread an open marker and no interval.
        labels: One per pair.
        confidence: Level of the intervals.
        verdicts: One per pair, whose (1 − 2α) interval is drawn thick inside the other; or none.
    """
    axes.axvline(0, color="black", linewidth=0.8, zorder=1)
    for height, pair in enumerate(pairs):
        difference = pair.difference(confidence)
        each = [pair.second_values[seed] - pair.first_values[seed] for seed in difference.seeds]
        axes.plot(each, [height] * len(each), linestyle="", marker="|", color="0.55", markersize=9, zorder=2)
        half = difference.high - difference.mean if math.isfinite(difference.high) else None
        marker, face = "D" if pair.setting[0] is None else "o", "white" if half is None else "black"
        shape = {"marker": marker, "markersize": 5, "markerfacecolor": face, "capsize": 3, "elinewidth": 1}
        axes.errorbar(difference.mean, height, xerr=half, color="black", zorder=3, **shape)
    for height, verdict in enumerate(verdicts):
        if math.isfinite(verdict.low):
            axes.plot([verdict.low, verdict.high], [height] * 2, color="black", linewidth=3.5, solid_capstyle="butt")
    axes.set_yticks(range(len(pairs)), labels)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)

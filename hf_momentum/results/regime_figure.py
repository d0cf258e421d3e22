"""The figure of a verdict on momentum: the terms of one step, and the predicted difference, over the learning rate."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hf_momentum.errors import UserError, require_extra
from hf_momentum.results.canvas import grid_of_panels, in_our_style
from hf_momentum.results.drawing import line_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
Term = tuple[float, float, float]
_POWERS = {"descent": 1, "noise-induced": 2, "curvature-induced": 2}  # of the learning rate
_SGDM_STEP = "noise-induced, SGDM"
_MOST_RATIO = 1000.0  # on the axis: beyond it SGD is lost
_LEAST_LOW = 0.01  # where an interval that reaches 0 ends on the logarithmic axis, as a part of the estimate
_MARKS = {
    "half of SGD's limit": {"color": "0.8", "linestyle": "-", "linewidth": 2.5},
    "SGD's limit": {"color": "0.35", "linestyle": "--", "linewidth": 1.0},
    "SGDM's limit": {"color": "0.35", "linestyle": "-.", "linewidth": 1.0},
    "this run": {"color": "black", "linestyle": "-", "linewidth": 0.8},
}
_READING = "markers: this run, bars: 95% intervals; grey band: differences too small to count; limits: of stability"


@in_our_style
def regime_figure(
    lr: float,
    terms: Mapping[str, Term],
    momentum: float,
    limits: tuple[float, float],
    lrs: Sequence[float],
    ratios: Sequence[float],
    effect_floor: float,
    title: str = "",
) -> tuple["Figure", list[Row]]:
    """Draw the three terms of the descent lemma, and the predicted ratio of the losses, over the learning rate.

    The terms are `η|∇L|²`, `½η² tr(HΣ)/B` and `½η² ∇LᵀH∇L`. In one step SGDM's noise-induced term is `(1−β)/(1+β)` of
    SGD's, the same stationary fraction as its momentum's variance (Wang et al. 2024, arXiv 2307.15196, warm-up case).

    Args:
        lr: η of the run.
        terms: "descent", "noise-induced" and "curvature-induced" → estimate at η, lower and upper end.
        momentum: β.
        limits: The η below which SGD and SGDM are stable; an infinite one is not drawn.
        lrs: Rising learning rates, at least two, from below η to above it.
        ratios: `E L_SGD / E L_SGDM` predicted at each, positive; not drawn above SGDM's limit, where both are lost.
        effect_floor: |log ratio| that counts as a difference.
        title: Above all.

    Returns:
        The figure, and the rows that it shows.

    Raises:
        UserError: If terms are missing, a number is not finite, or a learning rate or a ratio is not positive.
    """
    _check(lr, terms, lrs, ratios)
    rows = [row for name, term in terms.items() for row in _term_rows(name, term, lr, lrs)]
    if momentum > 0:
        value = (1 - momentum) / (1 + momentum) * terms["noise-induced"][0]
        rows += _line(_SGDM_STEP, value, 2, lr, lrs)
    shown = [(at, ratio) for at, ratio in zip(lrs, ratios, strict=True) if at <= max(limits[1], lr)]
    rows += [{"panel": "ratio", "lr": at, "predicted": ratio} for at, ratio in shown]
    rows.append({"panel": "ratio", "lr": lr, "measured": _at(lr, lrs, ratios)})
    places = dict(zip(_MARKS, (limits[0] / 2, *limits, lr), strict=True))
    styles = line_styles(row["term"] for row in rows if "term" in row)
    if _SGDM_STEP in styles:
        styles[_SGDM_STEP]["marker"] = ""
    marks = {name: look for name, look in _MARKS.items() if lrs[0] <= places[name] <= lrs[-1]}
    figure, ((left, right),) = grid_of_panels(1, 2, styles | marks, title, sharex=True)
    _draw_terms(left, rows, styles)
    _draw_ratios(right, rows, effect_floor)
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="learning rate η", xlim=(lrs[0], lrs[-1]))
        for name, look in marks.items():
            axes.axvline(places[name], **look, zorder=1)
    figure.supxlabel(_READING, fontsize=8)
    return figure, rows


def _draw_terms(axes: "Axes", rows: Sequence[Row], styles: Mapping[str, dict]) -> None:
    transforms = require_extra("matplotlib.transforms", "report")
    for number, (name, style) in enumerate(styles.items()):
        part = [row for row in rows if row.get("term") == name]
        line = [(row["lr"], row["predicted"]) for row in part if "predicted" in row]
        axes.plot(*zip(*line, strict=True), color=style["color"], linestyle=style["linestyle"], linewidth=1.2)
        aside = transforms.ScaledTranslation((number - 1) * 4 / 72, 0, axes.figure.dpi_scale_trans)
        for row in (row for row in part if "measured" in row):
            look = {"color": style["color"], "marker": style["marker"], "markersize": 4.5, "capsize": 2}
            spread = [[row["measured"] - row["low"]], [row["high"] - row["measured"]]]
            axes.errorbar(row["lr"], row["measured"], spread, **look, transform=axes.transData + aside, zorder=3)
    axes.set_ylabel("size in one step")


def _draw_ratios(axes: "Axes", rows: Sequence[Row], effect_floor: float) -> None:
    line = [(row["lr"], row["predicted"]) for row in rows if row["panel"] == "ratio" and "predicted" in row]
    axes.axhspan(math.exp(-effect_floor), math.exp(effect_floor), color="0.85", linewidth=0, zorder=0)
    axes.plot(*zip(*line, strict=True), color="black", linewidth=1.2)
    run = next(row for row in rows if row["panel"] == "ratio" and "measured" in row)
    axes.plot(run["lr"], run["measured"], color="black", marker="o", markersize=5, zorder=3)
    values = [ratio for _, ratio in line]
    axes.set_ylim(min(0.5, *values) / 1.1, 1.1 * min(max(2.0, *values), max(_MOST_RATIO, run["measured"])))
    axes.set_ylabel("loss of SGD / of SGDM")


def _term_rows(name: str, term: Term, lr: float, lrs: Sequence[float]) -> list[Row]:
    """A term as a line, and the run's own as a marker; on a logarithmic axis a negative one is drawn by its size."""
    value, low, high = term
    if value < 0:
        name, value, low, high = f"{name}, below 0", -value, -high, -low
    rows = _line(name, value, _POWERS[name.removesuffix(", below 0")], lr, lrs)
    if value > 0:
        low = max(low, _LEAST_LOW * value)
        rows.append({"panel": "terms", "term": name, "lr": lr, "measured": value, "low": low, "high": high})
    return rows


def _line(name: str, value: float, power: int, lr: float, lrs: Sequence[float]) -> list[Row]:
    common = {"panel": "terms", "term": name}
    return [common | {"lr": at, "predicted": value * (at / lr) ** power} for at in lrs if value > 0]


def _at(lr: float, lrs: Sequence[float], ratios: Sequence[float]) -> float:
    """The ratio at η, on the straight line between its neighbours on logarithmic axes."""
    last = next((i for i, at in enumerate(lrs) if at >= lr), len(lrs) - 1) or 1
    weight = math.log(lr / lrs[last - 1]) / math.log(lrs[last] / lrs[last - 1])
    return ratios[last - 1] * (ratios[last] / ratios[last - 1]) ** weight


def _check(lr: float, terms: Mapping[str, Term], lrs: Sequence[float], ratios: Sequence[float]) -> None:
    if terms.keys() != _POWERS.keys():
        raise UserError(f"The figure shows the terms {', '.join(_POWERS)}, not {', '.join(terms) or 'none'}.")
    if not all(math.isfinite(number) for term in terms.values() for number in term):
        raise UserError("A term or an end of its interval is not finite: there is no place for it on the axes.")
    if len(lrs) < 2 or len(lrs) != len(ratios) or any(b <= a for a, b in pairwise(lrs)):
        raise UserError(f"Give rising learning rates and a ratio for each, not {len(lrs)} and {len(ratios)}.")
    if not all(0 < number < math.inf for number in (lr, *lrs, *ratios)):
        raise UserError("Learning rates and ratios must be finite and above 0 on logarithmic axes.")
    if not lrs[0] <= lr <= lrs[-1]:
        raise UserError(f"The run's learning rate {lr:g} is off the axis, which spans {lrs[0]:g} to {lrs[-1]:g}.")

"""The figure of a validation: differences predicted and found, and how well each predictor ranks the cells."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_momentum.results.canvas import grid_of_panels, in_our_style
from hf_momentum.results.drawing import line_styles
from hf_momentum.results.ranking import AucComparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 10.0  # |log ratio| on the axes: all that is larger is drawn there
_LINEAR = 0.1  # below it the axes are linear


@in_our_style
def validation_figure(
    cells: Sequence[Mapping[str, Any]], areas: Mapping[str, AucComparison], effect_floor: float, title: str = ""
) -> "Figure":
    """Draw the calibration beside the areas under the ROC curves.

    Args:
        cells: With `task`, the `predicted` log ratio, the `measured` one with the ends `low` and `high` of its
            interval, and whether the two algorithms `differ`: such cells are filled.
        areas: Predictor → its area as `first`, with interval; drawn in this order, from above.
        effect_floor: |log ratio| that counts as a difference, the grey band.
        title: Above all.

    Returns:
        The figure.
    """
    styles = {name: style | {"linestyle": ""} for name, style in line_styles(cell["task"] for cell in cells).items()}
    figure, ((left, right),) = grid_of_panels(1, 2, styles, title)
    _draw_calibration(left, cells, styles, effect_floor)
    _draw_areas(right, areas)
    return figure


def _draw_calibration(
    axes: "Axes", cells: Sequence[Mapping[str, Any]], styles: Mapping[str, dict], effect_floor: float
) -> None:
    axes.axhspan(-effect_floor, effect_floor, color="0.9", linewidth=0, zorder=0)
    axes.axvspan(-effect_floor, effect_floor, color="0.9", linewidth=0, zorder=0)
    axes.plot([-_MOST, _MOST], [-_MOST, _MOST], color="0.5", linewidth=0.8, linestyle="--", zorder=1)
    for cell in cells:
        x, y, low, high = (max(-_MOST, min(_MOST, cell[name])) for name in ("predicted", "measured", "low", "high"))
        style = styles[cell["task"]]
        axes.errorbar(
            x,
            y,
            [[y - low], [high - y]],
            color=style["color"],
            marker=style["marker"],
            markerfacecolor=style["color"] if cell["differ"] else "white",
            markersize=4.5,
            elinewidth=0.7,
            zorder=3,
        )
    for scale in (axes.set_xscale, axes.set_yscale):
        scale("symlog", linthresh=_LINEAR, linscale=0.4)
    limits, ticks = (-1.3 * _MOST, 1.3 * _MOST), (-_MOST, -1, 0, 1, _MOST)
    axes.set(
        xticks=ticks,
        yticks=ticks,
        xlim=limits,
        ylim=limits,
        xlabel="predicted log(loss of SGD / of SGDM)",
        ylabel="found (95% interval)",
        title="filled: they differ; grey: too little to count",
    )


def _draw_areas(axes: "Axes", areas: Mapping[str, AucComparison]) -> None:
    places = range(len(areas))
    for place, area in zip(places, areas.values(), strict=True):
        spread = [[area.first - area.first_low], [area.first_high - area.first]]
        axes.errorbar(area.first, place, xerr=spread, color="black", marker="o", markersize=4.5, capsize=2)
    axes.axvline(0.5, color="0.5", linewidth=0.8, linestyle="--")
    axes.set_yticks(list(places), list(areas))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.03), xlabel="area under ROC curve (95%)")

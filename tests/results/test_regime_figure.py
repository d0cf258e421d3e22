import math

import numpy as np
import pytest

from hf_momentum.errors import UserError
from hf_momentum.results.canvas import save_figure
from hf_momentum.results.regime_figure import regime_figure

pytest.importorskip("matplotlib")

LRS = np.geomspace(1e-3, 10, 41).tolist()
TERMS = {"descent": (0.3, 0.2, 0.4), "noise-induced": (0.02, -0.01, 0.05), "curvature-induced": (0.001, 0.0005, 0.002)}
GIVEN = {"lr": 0.1, "terms": TERMS, "momentum": 0.9, "limits": (2.0, 38.0), "lrs": LRS, "effect_floor": 0.1}


def draw(**changes):
    return regime_figure(**(GIVEN | {"ratios": [1 + lr for lr in LRS]} | changes))


def line(rows, term):
    return {row["lr"]: row["predicted"] for row in rows if row.get("term") == term and "predicted" in row}


def test_terms_are_powers_of_the_learning_rate_and_sgdms_noise_is_kappa_of_sgds():
    _, rows = draw()
    for term, power in (("descent", 1), ("noise-induced", 2), ("curvature-induced", 2)):
        for lr, value in line(rows, term).items():
            assert value == pytest.approx(TERMS[term][0] * (lr / 0.1) ** power)
    for lr, value in line(rows, "noise-induced, SGDM").items():
        assert value == pytest.approx(line(rows, "noise-induced")[lr] * 0.1 / 1.9)
    assert not line(draw(momentum=0.0)[1], "noise-induced, SGDM")


def test_the_run_is_marked_in_both_panels_with_its_intervals():
    figure, rows = draw()
    run = {row.get("term"): row for row in rows if "measured" in row}
    assert run["descent"] | {"measured": 0.3, "low": 0.2, "high": 0.4, "lr": 0.1} == run["descent"]
    assert run["noise-induced"]["low"] == pytest.approx(0.0002)  # an interval that reaches 0 ends on the axis
    assert run[None]["measured"] == pytest.approx(1.1, rel=0.01)
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert [0.1, 0.1] in [list(drawn.get_xdata()) for drawn in axes.lines]


def test_limits_are_vertical_lines_where_they_are_on_the_axis():
    def places(figure):
        return {drawn.get_xdata()[0] for drawn in figure.axes[0].lines if len(set(drawn.get_xdata())) == 1}

    assert places(draw()[0]) >= {1.0, 2.0, 0.1}
    assert 38.0 not in places(draw()[0])
    assert not places(draw(limits=(math.inf, math.inf))[0]) & {1.0, 2.0, math.inf}


def test_no_ratio_is_shown_where_both_are_lost():
    _, rows = draw(limits=(0.2, 0.5))
    assert max(row["lr"] for row in rows if row["panel"] == "ratio") <= 0.5


def test_a_negative_term_is_drawn_by_its_size_and_said():
    _, rows = draw(terms=TERMS | {"curvature-induced": (-0.001, -0.002, 0.001)})
    assert line(rows, "curvature-induced, below 0")[LRS[0]] == pytest.approx(0.001 * (LRS[0] / 0.1) ** 2)
    _, rows = draw(terms=TERMS | {"noise-induced": (-0.001, -0.002, 0.001)})
    assert not line(rows, "noise-induced, SGDM")
    _, rows = draw(terms=TERMS | {"descent": (0.0, 0.0, 0.0)})
    assert not line(rows, "descent")


def test_the_same_numbers_give_the_same_file(tmp_path):
    first, second = (save_figure(*draw(title="noise dominates"), tmp_path / name)[1] for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"terms": {"descent": (1, 1, 1)}}, "terms"),
        ({"terms": TERMS | {"descent": (1, 0, math.inf)}}, "not finite"),
        ({"lr": 0.0}, "above 0"),
        ({"lr": 11.0}, "off the axis"),
        ({"lrs": [1.0], "ratios": [1.0]}, "rising"),
        ({"lrs": [2.0, 1.0], "ratios": [1.0, 1.0]}, "rising"),
        ({"lrs": [1.0, 2.0], "ratios": [1.0]}, "rising"),
        ({"lrs": [1.0, 2.0], "ratios": [1.0, 0.0]}, "above 0"),
    ],
)
def test_bad_input(changes, words):
    with pytest.raises(UserError, match=words):
        draw(**changes)

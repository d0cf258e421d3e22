"""The study of the slow SDE: its predictions against closed forms, its measurements against the bound."""

import math

import pytest
import torch

from hf_momentum.dynamics.studies import plan
from hf_momentum.dynamics.studies.slow_sde import FIXTURES, drift_and_variance, predicted_moments, rows

LABEL, CONSTANT, LINEAR, PARABOLA = FIXTURES
TIMES = [0.0, 0.5, 1.0]


def test_moments_of_linear_drifts():
    for t, (mean, variance) in zip(TIMES, predicted_moments(FIXTURES[LABEL], TIMES), strict=True):
        assert mean == pytest.approx(1.5 * math.exp(-t / 2), abs=1e-8)
        assert variance == 0
    for t, (mean, variance) in zip(TIMES, predicted_moments(FIXTURES[LINEAR], TIMES), strict=True):
        assert mean == pytest.approx(math.exp(-t / 2), abs=1e-6)
        assert variance == pytest.approx(0.25 * (1 - math.exp(-t)), abs=1e-5)


@pytest.mark.parametrize(("name", "moments"), [(CONSTANT, (1.2957, 0.9720)), (PARABOLA, (0.41938, 0.14713))])
def test_moments_of_curved_drifts(name, moments):
    assert predicted_moments(FIXTURES[name], [1.0])[0] == pytest.approx(moments, abs=5e-5)


def test_drift_along_gamma():
    y = torch.linspace(-2, 2, 5).double()
    drift, variance = drift_and_variance(FIXTURES[CONSTANT], y)
    assert drift == pytest.approx((-0.5 * y / (1 + y**2)).numpy(), abs=1e-12)
    assert variance == pytest.approx(1.0)
    x = y + 0.3
    drift, variance = drift_and_variance(FIXTURES[PARABOLA], x)
    points, problem = torch.stack([x, x**2], -1), FIXTURES[PARABOLA].oracle.problem
    sigma = FIXTURES[PARABOLA].oracle.covariance(points)
    assert drift == pytest.approx(problem.slow_drift(points, sigma)[:, 0].numpy(), abs=1e-9)
    tangent = problem.tangent_projection(points)
    assert variance == pytest.approx((tangent @ sigma @ tangent)[:, 0, 0].numpy(), abs=1e-9)


def test_runs_keep_the_bound():
    cells = plan("slow_sde", {"lrs": [0.1], "paths": 400, "sde_paths": 4000, "sde_steps": 40, "automatic_paths": 200,
                              "automatic_steps": 10, "points": 4})  # fmt: skip
    assert len(cells) == 4 * 2 + 3 * 2
    for cell in cells:
        made = rows(**cell)
        ends = {row["quantity"]: row for row in made if row.get("last")}
        if cell["method"] in ("SGD", "SGDM"):
            assert [row["t"] for row in made if row["quantity"] == "mean"] == [0, 0.25, 0.5, 0.75, 1]
            for quantity in ("mean", "variance"):
                (error,) = (row for row in made if row["quantity"] == f"error of the {quantity}")
                assert error["holds"] == "yes"
                assert error["measured"] == abs(ends[quantity]["measured"] - ends[quantity]["predicted"])
                margin = (ends[quantity]["high"] - ends[quantity]["measured"]) / 1.96
                assert error["bound"] == pytest.approx(0.15 + 4 * margin)
        else:
            for row in ends.values():
                assert abs(row["measured"] - row["predicted"]) < 2.5 * (row["high"] - row["measured"]) + 0.02

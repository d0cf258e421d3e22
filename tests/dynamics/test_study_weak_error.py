"""The study of weak errors: its rates, its errors against closed forms, its orders against theory."""

import math

import numpy as np
import pytest

from hf_momentum.dynamics.studies import plan
from hf_momentum.dynamics.studies.weak_error import KINKED, PATHWISE, lag, pair_errors, rates_at, rows, sme_errors
from hf_momentum.errors import UserError

TINY = {"scales": [[0.0, 0.1], [0.5, 1.0]], "points": 5, "paths": 4000}


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, 0.1), (0.25, 0.3), (0.75, 3.0)])
def test_rates(alpha, scale):
    eta, momentum = rates_at(0.01, alpha, scale)
    assert 1 - momentum == pytest.approx(scale * eta**alpha)
    assert lag(eta, momentum) == pytest.approx(0.01)
    with pytest.raises(UserError, match="No η"):
        rates_at(100.0, alpha, scale)


def test_errors_against_a_loop():
    # x and its second moment step by step, σ² = 1/η.
    eta, beta, steps = 0.02, 0.8, 100
    sgd, sgdm = (1.0, 1.0), (1.0, 0.0, 1.0, 0.0, 0.0)  # (x, xx); (x, m, xx, xm, mm)
    worst = [0.0, 0.0]
    a, b, c, d = 1 - eta * (1 - beta), -eta * beta, 1 - beta, beta
    noise = (1 - beta) ** 2 / eta
    for _ in range(steps):
        sgd = ((1 - eta) * sgd[0], (1 - eta) ** 2 * sgd[1] + eta)
        x, m, xx, xm, mm = sgdm
        sgdm = (
            a * x + b * m,
            c * x + d * m,
            a * a * xx + 2 * a * b * xm + b * b * mm + eta**2 * noise,
            a * c * xx + (a * d + b * c) * xm + b * d * mm - eta * noise,
            c * c * xx + 2 * c * d * xm + d * d * mm + noise,
        )
        worst = [max(worst[0], abs(sgd[0] - sgdm[0])), max(worst[1], abs(sgd[1] - sgdm[2]))]
    errors = pair_errors(eta, beta, eta * steps)
    assert errors["x^1"] == pytest.approx(worst[0], rel=5e-3)  # the study reads some of the steps
    assert errors["x^2"] == pytest.approx(worst[1], rel=5e-3)
    means = [abs((1 - eta) ** k - math.exp(-eta * k)) for k in range(steps + 1)]
    assert sme_errors(eta, 0.0, eta * steps)["x^1"] == pytest.approx(max(means), rel=5e-3)


def test_orders_and_cells():
    table = {}
    for cell in plan("weak_error", TINY):
        if cell["grid"] != "paths":
            table[cell["grid"], cell["alpha"]] = {r["function"]: r for r in rows(**cell) if r["quantity"] == "order"}
    assert len(table) == 7
    for alpha in (0.0, 0.5):
        for name, row in table["fine", alpha].items():
            wanted, margin = (0.5, 0.08) if name in (PATHWISE, KINKED.name) else (1.0, 0.25)
            assert abs(row["measured"] - wanted) < margin
            assert row["low"] <= row["measured"] <= row["high"]
        assert table["coarse", alpha]["x^2"]["measured"] < 0.6 * (1 - alpha)
        assert table["coarse", alpha]["x^2"]["predicted"] == 1 - alpha
    assert all(row["measured"] >= 0.9 for row in table["SME", None].values())


def test_the_order_is_one_where_epsilon_is_small():
    (row,) = (
        r for r in rows("fine", 0.0, 0.1, np.geomspace(1e-5, 1e-3, 5), 2.0) if r.get("fit") and r["function"] == "x^1"
    )
    assert row["measured"] == pytest.approx(1, abs=0.01)


def test_simulation_holds_the_exact_errors():
    cell = plan("weak_error", TINY)[-1]
    made = rows(**cell)
    assert cell["grid"] == "paths"
    assert len(made) == 5
    for row in made:
        assert row["low"] <= row["predicted"] <= row["high"]
        assert row["saved"] > 3

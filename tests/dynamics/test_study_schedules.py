"""Schedules: exact distances against direct simulation, and what the averaged learning rate does and does not."""

import numpy as np
import pytest

from hf_momentum.dynamics.studies import schedules as study
from hf_momentum.optim.schedules import reference_averaged_lr

BETA = 0.9


def by_hand(lrs, sgd_lrs, curvature, scale, x0, noise):
    """All positions of SGD, SGDM and its shadow on ½λx², step by step from Eq. 3."""
    averaged = reference_averaged_lr(lrs, BETA)
    x = y = np.full(noise.shape[1], x0)
    m, history = np.zeros_like(x), []
    for k, v in enumerate(noise):
        y = y - sgd_lrs[k] * (curvature * y + scale * v)
        m = BETA * m + (1 - BETA) * (curvature * x + scale * v)
        x = x - lrs[k] * m
        left = averaged[k + 1] * BETA / (1 - BETA) if k + 1 < len(lrs) else 0.0
        history.append((y, x, x - left * m))
    return np.array(history)


@pytest.mark.parametrize("schedule", study.SCHEDULES)
def test_distances_are_those_of_paths(schedule):
    lr, curvature, paths = 0.25, 1.0, 20_000
    (row, *_) = study.quadratic_rows(schedule, BETA, 5.0, "η", [(lr, curvature)])
    rates = study.learning_rates(schedule, lr, 5.0, BETA)
    assert rates["η̄"] == pytest.approx(reference_averaged_lr(rates["η"], BETA))
    noise = np.random.default_rng(0).standard_normal((20, paths))
    start = study.START / (2 * curvature) ** 0.5
    for name in ("η", "η̄"):
        sgd, sgdm, shadow = by_hand(rates["η"], rates[name], curvature, lr**-0.5, start, noise).transpose(1, 0, 2)
        if name == "η":
            spread = sgd.std(1).max()
        else:
            assert np.sqrt(((sgd - shadow) ** 2).mean(1)).max() / spread == pytest.approx(row["shadow"], rel=0.04)
        assert np.sqrt(((sgd - sgdm) ** 2).mean(1)).max() / spread == pytest.approx(row[f"path {name}"], rel=0.04)
        assert np.abs(sgd.mean(1) - sgdm.mean(1)).max() / spread == pytest.approx(row[f"mean {name}"], rel=0.06)
        end = 100 * ((sgdm[-1] ** 2).mean() / (sgd[-1] ** 2).mean() - 1)
        assert end == pytest.approx(row[f"end {name}"], abs=5, rel=0.05)


@pytest.mark.parametrize("schedule", study.SCHEDULES)
def test_without_curvature_the_average_ends_where_sgdm_does(schedule):
    (row, *_) = study.quadratic_rows(schedule, BETA, 2.0, "η", [(0.05, 1e-7)])
    assert abs(row["end η̄"]) < 1e-4
    assert row["shadow"] < 1e-6
    assert row["path η"] > 0.1


def test_orders_and_the_decay():
    rows = study.rows("quadratic", "step", BETA, 2.0, over="η", points=[[lr, 1.0] for lr in (0.002, 0.005, 0.01)])
    orders = {row["distance"]: row["order"] for row in rows if row["over"] == "order"}
    assert orders["shadow"] == pytest.approx(1, abs=0.1)
    assert orders["path η"] == pytest.approx(0.5, abs=0.1)
    rows = study.rows("quadratic", "step", BETA, 10.0, over="λ", points=[[0.05, 1.0]])
    decay = {row["step"]: row for row in rows if row["over"] == "step"}
    assert decay[-20]["SGD at η"] == pytest.approx(decay[-20]["SGD at η̄"], rel=0.1)
    assert decay[0]["SGD at η̄"] < 0.9 * decay[0]["SGD at η"]  # η̄ decays ahead of η


def test_the_net_is_coupled_and_repeats():
    options = {"time": 2.0, "lrs": [0.2], "paths": 50, "seed": 3}
    rows = study.rows("net", "linear", 0.5, **options)
    assert rows == study.rows("net", "linear", 0.5, **options)
    assert [row["sgd at"] for row in rows] == ["η", "η̄"]
    assert all(row["low"] < row["measured"] < row["high"] for row in rows)
    same = study.rows("net", "linear", 0.0, **options)
    assert all(row["path"] == 0 and row["measured"] == pytest.approx(0, abs=1e-9) for row in same)


def test_cells():
    assert len(study.cells()) == 3 * len(study.SCHEDULES)

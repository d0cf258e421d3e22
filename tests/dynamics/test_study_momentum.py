"""β: exact distances against sums over noises, the share that a run delivers, schedules."""

import math

import numpy as np
import pytest

from hf_momentum.dynamics.studies import momentum as study


def gains(lrs, betas, curvature=1.0):
    """How the last position depends on the start, and on each gradient noise (up to the sign), by Eq. 3."""
    n = len(lrs)
    x, m = np.zeros(n + 1), np.zeros(n + 1)  # coefficients of (x₀, noises)
    x[0] = 1
    history = []
    for k in range(n):
        g = curvature * x
        g[k + 1] += 1
        m = betas[k] * m + (1 - betas[k]) * g
        x = x - lrs[k] * m
        history.append(x)
    return np.array(history)


def test_distances():
    lr, steps, beta = 0.1, 30, 0.8
    (zero, row) = study.distance_rows(lr, 3.0, [0.0, beta])
    assert zero["path"] == zero["loss"] == zero["stationary"] == 0
    sgd, sgdm = gains([lr] * steps, [0.0] * steps), gains([lr] * steps, [beta] * steps)
    variances = np.array([study.START**2 / 2, *[1 / lr] * steps])
    assert row["path"] == pytest.approx(math.sqrt(2 * ((sgd - sgdm) ** 2 @ variances).max()), rel=1e-9)
    assert row["mean"] == pytest.approx(study.START * np.abs(sgd - sgdm)[:, 0].max(), rel=1e-9)
    assert row["end"] == pytest.approx(100 * ((sgdm**2 @ variances)[-1] / (sgd**2 @ variances)[-1] - 1), rel=1e-9)
    assert row["epsilon"] == pytest.approx(0.4)
    kappa = (1 - beta) / (1 + beta)
    assert row["stationary"] == pytest.approx(100 * ((2 - lr) / (2 - kappa * lr) - 1))


@pytest.mark.parametrize("beta", [0.5, 0.99, 0.999])
def test_share(beta):
    steps = 60
    constant, linear = study.share_rows(steps, [beta])
    assert constant["predicted"] == pytest.approx(1 - beta * (1 - beta**steps) / (1 - beta) / steps)
    weights = [1 - k / steps for k in range(steps)]
    share = sum(w * (1 - beta ** (k + 1)) for k, w in enumerate(weights)) / sum(weights)
    assert linear["predicted"] == pytest.approx(share)
    for row in (constant, linear):
        assert row["measured"] == pytest.approx(row["predicted"], rel=1e-5)


def test_schedules_of_beta():
    lr, steps = 0.1, 40
    (row,) = study.schedule_rows("0.9→0", [lr], 4.0)
    betas = [0.9 * (1 - k / steps) for k in range(steps)]
    averaged = [
        sum(lr * math.prod(betas[k + 1 : s + 1]) * (1 - betas[k]) for s in range(k, steps)) for k in range(steps)
    ]
    variances = np.array([study.START**2 / 2, *[1 / lr] * steps])
    sgdm = gains([lr] * steps, betas)
    for name, lrs in (("η", [lr] * steps), ("η̄", averaged)):
        sgd = gains(lrs, [0.0] * steps)
        assert row[f"path {name}"] == pytest.approx(math.sqrt(2 * ((sgd - sgdm) ** 2 @ variances).max()), rel=1e-9)
    assert row["peak"] == pytest.approx(max(averaged) / lr)
    (rising,) = study.schedule_rows("0.5→0.99 in the first half", [lr], 4.0)
    assert rising["peak"] > 1.5  # early gradients stay in a memory that grows


def test_cells():
    parts = [cell["part"] for cell in study.cells(lrs=[0.1], horizons=[60])]
    assert parts == ["distance", "share"] + ["schedule"] * len(study.BETA_SCHEDULES)
    assert study.rows("share", steps=10, momenta=[0.5])[0]["part"] == "share"

"""The study of SVAG: distances and amplified gradients against independent recursions and formulas."""

import itertools

import numpy as np
import pytest
import torch

from hf_momentum.dynamics.oracle import MinibatchOracle
from hf_momentum.dynamics.problems import LinearRegression
from hf_momentum.dynamics.studies import plan
from hf_momentum.dynamics.studies.svag import DISJOINT, FIXED, INDEPENDENT, SCALED, disjoint_weights, rows

SEEN = {1: 3.36, 2: 2.11, 4: 1.59, 8: 1.19, 16: 0.85, 32: 0.58, 64: 0.39}


def largest(ell, beta):
    """The mean and the variance of the difference of SGD and SGDM at ηλ = 1.2/ℓ from x₀ = 3, by a plain loop."""
    h, eta = 1.2 / ell, 1 / ell
    step = np.array([[1 - h, 0, 0], [0, 1 - h * (1 - beta), -eta * beta], [0, 1.2 * (1 - beta), beta]])
    kick = np.array([-eta, -eta * (1 - beta), 1 - beta]) * ell**0.5
    mean, covariance, read, best = np.array([3.0, 3, 0]), np.zeros((3, 3)), np.array([1, -1, 0]), [0.0, 0.0]
    for _ in range(20 * ell):
        mean, covariance = step @ mean, step @ covariance @ step.T + np.outer(kick, kick)
        rms = np.sqrt(read @ covariance @ read + (read @ mean) ** 2)
        squares = mean**2 + np.diag(covariance)
        best = [max(best[0], rms), max(best[1], abs(squares[0] - squares[1]))]
    return best


def distances(ell, way):
    cell = next(c for c in plan("svag", {"ells": [ell], "paths": 2000}) if c["way"] == way)
    return {row["function"]: row for row in rows(**cell)}


@pytest.mark.parametrize("ell", SEEN)
def test_fixed_momentum(ell):
    made = distances(ell, FIXED)
    rms, squares = largest(ell, 0.9)
    assert made["pathwise RMS"]["predicted"] == pytest.approx(rms)
    assert round(made["pathwise RMS"]["predicted"], 2) == SEEN[ell]
    assert made["x^2"]["predicted"] == pytest.approx(squares)
    for row in made.values():
        assert abs(row["measured"] - row["predicted"]) < 2.2 * (row["high"] - row["measured"])


def test_scaled_momentum_goes_elsewhere():
    made = distances(16, SCALED)
    assert made["pathwise RMS"]["momentum"] == pytest.approx(1 - 0.1 / 16)
    assert made["pathwise RMS"]["predicted"] == pytest.approx(largest(16, 1 - 0.1 / 16)[0])
    assert made["pathwise RMS"]["predicted"] > 2 * distances(16, FIXED)["pathwise RMS"]["predicted"]


def test_weak_distance_is_not_monotone():
    one, two, four = (distances(ell, FIXED)["x^2"]["predicted"] for ell in (1, 2, 4))
    assert one < two > four


def test_disjoint_weights():
    x = torch.zeros(50, 2).double()
    first, second = disjoint_weights(x, 6, 3, torch.Generator().manual_seed(0))
    assert (first + second == 1 / 3).all()  # 2B = N
    assert ((first == 0) | (second == 0)).all()
    assert len({tuple(row) for row in first.tolist()}) > 10


def test_covariance_of_disjoint_halves_by_enumeration():
    # All pairs of disjoint batches of 2 among 5: the exact covariance is that which the study predicts.
    torch.manual_seed(0)
    problem = LinearRegression(torch.randn(5, 2).double(), torch.randn(5).double())
    x, ell = torch.tensor([[0.5, -1.0]]).double(), 8
    r1, r2 = (1 + (2 * ell - 1) ** 0.5) / 2, (1 - (2 * ell - 1) ** 0.5) / 2
    examples = problem.example_gradients(x)[0]
    made = []
    for a in itertools.combinations(range(5), 2):
        for b in itertools.combinations(sorted(set(range(5)) - set(a)), 2):
            made.append(r1 * examples[list(a)].mean(0) + r2 * examples[list(b)].mean(0))
    oracle = MinibatchOracle(problem, 2, replacement=False)
    spread = oracle.covariance(x)[0]
    predicted = ell * oracle.scale**2 * spread + (ell - 1) / 4 * spread
    torch.testing.assert_close(torch.stack(made).T.cov(correction=0), predicted)


@pytest.mark.parametrize("way", [INDEPENDENT, DISJOINT])
def test_amplified_gradients(way):
    (cell,) = (c for c in plan("svag", {"ells": [8], "draws": 20_000}) if c["way"] == way)
    made = rows(**cell)
    assert [row["quantity"] for row in made] == ["mean", "mean", "covariance"]
    assert made[-1]["predicted"] == pytest.approx(8 if way == INDEPENDENT else 8 + 7 / 15 * (4 * 15) / 12)
    for row in made:
        assert abs(row["measured"] - row["predicted"]) < 2.2 * (row["high"] - row["measured"])

"""The theory's numbers: exactly by recursion, and by simulation within four standard errors."""

import numpy as np
import pytest
import torch

from hf_momentum.dynamics.iterates import iterates
from hf_momentum.dynamics.moments import (
    LinearModel,
    joint_moments,
    rms_distance,
    sgdm_moments,
    stability_limit,
    stationary_covariance,
)
from hf_momentum.dynamics.oracle import NoisyGradientOracle
from hf_momentum.dynamics.problems import FunctionProblem, Quadratic
from hf_momentum.dynamics.stability import critical_lr, oscillation_range, stationary_variance
from hf_momentum.optim import svag_hyperparameters

PATHS = 20_000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def within(samples, target, errors=4.0):
    return abs(float(samples.mean()) - target) <= errors * float(samples.std()) / len(samples) ** 0.5


# Warm-up case: a constant gradient with noise of variance s² = 1, β = .9, η = .1, k = 50.
ETA, BETA, K = 0.1, 0.9, 50
STATIONARY = (1 - BETA) / (1 + BETA)
WARM_UP = {
    "stationary m₀": (BETA, STATIONARY, 0.40575, ETA**2 * (K - 2 * BETA * (1 - BETA**K) / (1 - BETA**2))),
    "m₀ = 0": (BETA, 0.0, 0.36356, ETA**2 * sum((1 - BETA**i) ** 2 for i in range(1, K + 1))),
    "SGD": (0.0, 0.0, 0.5, K * ETA**2),
}
SLOPE = NoisyGradientOracle(FunctionProblem(lambda x: 3 * x[:, 0], dim=1), 1.0)


@pytest.mark.parametrize("case", WARM_UP)
def test_warm_up_variance(case):
    beta, variance, printed, formula = WARM_UP[case]
    (moments,) = sgdm_moments(LinearModel.quadratic(0.0), 0.0, ETA, beta, at=[K], start=np.diag([0.0, variance]))
    assert moments.covariance[0, 0] == pytest.approx(formula, abs=1e-10)
    assert round(formula, 5) == printed
    m0 = 3 + variance**0.5 * torch.randn(PATHS, 1, generator=generator(1), dtype=torch.float64) if variance else None
    *_, last = iterates(
        SLOPE, torch.zeros(PATHS, 1).double(), ETA, beta, steps=K, generator=generator(), every=K, m0=m0
    )
    assert within((last.x - last.x.mean()).square(), printed)


def test_momentum_has_a_fraction_of_the_variance_and_remembers():
    (moments,) = sgdm_moments(LinearModel.quadratic(0.0), 0.0, ETA, BETA, at=[400])
    assert moments.covariance[1, 1] == pytest.approx(STATIONARY, abs=1e-10)
    m0 = 3 + STATIONARY**0.5 * torch.randn(PATHS, 1, generator=generator(1), dtype=torch.float64)
    for state in iterates(SLOPE, torch.zeros(PATHS, 1).double(), ETA, BETA, steps=20, generator=generator(), m0=m0):
        centred = state.m - 3
        assert within(centred.square(), STATIONARY)
        assert within(centred * (m0 - 3), STATIONARY * BETA**state.step)


@pytest.mark.parametrize(("h", "printed"), [(0.01, 1.005), (0.1, 1.050), (0.5, 1.32), (1.0, 1.95), (1.5, 3.84)])
def test_stationary_ratio(h, printed):
    sgd, sgdm = (stationary_variance(1.0, 1.0, h, beta) for beta in (0.0, BETA))
    assert sgd == pytest.approx(h / (2 - h), abs=1e-10)
    assert sgdm == pytest.approx(h / (2 - h * STATIONARY), abs=1e-10)
    assert round(sgd / sgdm, 3 if h < 0.5 else 2) == printed
    model = LinearModel.quadratic(1.0)
    for beta, closed in ((0.0, sgd), (BETA, sgdm)):
        assert stationary_covariance(model, h, beta)[0, 0] == pytest.approx(closed, abs=1e-10)
        (late,) = sgdm_moments(model, 0.0, h, beta, at=[100_000])
        assert late.covariance[0, 0] == pytest.approx(closed, abs=1e-10)


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("h", [0.5, 1.5])
def test_stationary_variance_by_simulation(h, beta):
    oracle = NoisyGradientOracle(Quadratic([1.0]), 1.0, "rademacher")
    start = torch.zeros(PATHS, 1).double()
    *_, last = iterates(oracle, start, h, beta, steps=250, generator=generator(), every=250)
    assert within(last.x.square(), stationary_variance(1.0, 1.0, h, beta))


def test_limits_of_stability_and_oscillation():
    for curvature in (0.5, 1.0, 4.0):
        model = LinearModel.quadratic(curvature)
        assert stability_limit(model) * curvature == pytest.approx(2, abs=1e-10)
        assert stability_limit(model, BETA) * curvature == pytest.approx(38, abs=1e-10)
    low, high = oscillation_range(BETA)
    assert round(low, 4) == 0.0263
    assert low * high == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize(("v", "gain"), [(0.0, 19.0), (10.0, 1.09)])
def test_gain_in_the_stable_range(v, gain):
    assert round(critical_lr(1.0, BETA, v) / critical_lr(1.0, 0.0, v), 2) == gain
    model = LinearModel.quadratic(1.0, curvature_variance=v)
    for beta in (0.0, BETA):
        assert stability_limit(model, beta) == pytest.approx(critical_lr(1.0, beta, v), abs=1e-10)


# η = 1, λ = 1.2, s = 1, from x₀ = 3; the largest distance over the run, whose length does not matter from 3η on.
SVAG_DISTANCES = {1: 3.36, 2: 2.11, 4: 1.59, 8: 1.19, 16: 0.85, 32: 0.58, 64: 0.39}


def test_svag_brings_sgd_and_sgdm_together():
    for ell, printed in SVAG_DISTANCES.items():
        lr, steps = svag_hyperparameters(1.0, 20, ell)
        model = LinearModel.of(NoisyGradientOracle(Quadratic([1.2])).svag(ell))
        distances = [rms_distance(joint) for joint in joint_moments(model, 3.0, lr, BETA, at=range(1, steps + 1))]
        assert round(max(distances), 2) == printed


@pytest.mark.parametrize("ell", [1, 8, 64])
def test_svag_distances_by_simulation(ell):
    lr, steps = svag_hyperparameters(1.0, 3, ell)
    oracle, start = NoisyGradientOracle(Quadratic([1.2])).svag(ell), torch.full((PATHS, 1), 3.0).double()
    exact = joint_moments(LinearModel.of(oracle), 3.0, lr, BETA, at=range(steps + 1))
    runs = [iterates(oracle, start, lr, beta, steps=steps, generator=generator()) for beta in (0.0, BETA)]
    for sgd, sgdm, joint in zip(*runs, exact, strict=True):
        samples = (sgd.x - sgdm.x).square()
        assert within(samples, rms_distance(joint) ** 2) or joint.step == 0


def test_fixed_momentum_is_what_svag_needs():
    # With 1−β scaled by 1/ℓ the distance goes to another limit instead of 0.
    largest = []
    for ell in (32, 64):
        model = LinearModel.quadratic(1.2, scale=ell**0.5)
        distances = joint_moments(model, 3.0, 1 / ell, 1 - (1 - BETA) / ell, at=range(1, 20 * ell))
        largest.append(max(map(rms_distance, distances)))
    assert largest[1] == pytest.approx(largest[0], rel=0.03)
    assert largest[1] > 2

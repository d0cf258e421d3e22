"""Test functions under normal laws, intervals from paths, fitted orders, and the orders of SGD against SGDM."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq

from hf_momentum.dynamics.iterates import iterates
from hf_momentum.dynamics.moments import LinearModel, Moments, joint_moments, rms_distance, sgdm_moments
from hf_momentum.dynamics.oracle import NoisyGradientOracle
from hf_momentum.dynamics.problems import Quadratic
from hf_momentum.dynamics.sde import sme
from hf_momentum.dynamics.weak_error import (
    WeakError,
    cosine,
    distance,
    exact_weak_errors,
    exponential,
    fitted_order,
    power,
    simulated_weak_errors,
    step_grid,
)
from hf_momentum.errors import UserError

SMOOTH = [power(1), power(2), power(3), power(4), exponential(0.5), exponential(-1.0), cosine(1.0), cosine(2.0)]
FUNCTIONS = [*SMOOTH, distance(1.0), distance(-0.3)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.name)
@pytest.mark.parametrize(("mean", "variance"), [(0.7, 0.4), (-2.0, 1.7), (1.0, 0.01)])
def test_expectations_are_the_integrals(function, mean, variance):
    def integrand(z):
        x = torch.tensor([[5.0, mean + math.sqrt(variance) * z]], dtype=torch.float64)
        return float(function.function(x[:, 1])) * math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)

    kinks = [(origin - mean) / math.sqrt(variance) for origin in (1.0, -0.3)]
    integral = quad(integrand, -12, 12, points=sorted(k for k in kinks if abs(k) < 12), epsabs=1e-11, limit=200)[0]
    assert function.expectation(mean, variance) == pytest.approx(integral, abs=1e-9)


def test_functions_read_their_coordinate():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    moments = Moments(0, np.array([1.0, 2.0]), np.diag([0.0, 9.0]))
    assert power(2, coordinate=1)(x).tolist() == [4.0, 16.0]
    assert power(2, coordinate=1).mean(moments) == 13.0
    assert distance(0.5).mean(moments) == 0.5


ORACLE = NoisyGradientOracle(Quadratic([1.0, 0.5]), 1.0, scale=2.0)
MODEL = LinearModel.of(ORACLE)


def runs(seeds, paths=20_000):
    x0 = torch.ones(paths, 2).double()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [
        iterates(ORACLE, x0, 0.1, beta, steps=30, generator=generator, every=10)
        for beta, generator in zip((0.0, 0.9), generators, strict=True)
    ]


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_intervals_hold_the_exact_error(seeds):
    at = [0, 10, 20, 30]
    exact = exact_weak_errors(
        sgdm_moments(MODEL, 1.0, 0.1, at=at), sgdm_moments(MODEL, 1.0, 0.1, 0.9, at=at), FUNCTIONS
    )
    for error, value in zip(simulated_weak_errors(*runs(seeds), FUNCTIONS), exact, strict=True):
        low, high = error.interval(0.999)
        assert error.steps.tolist() == at
        assert low <= value <= high, error.function.name
        assert low <= error.maximum <= high
        assert high - low < 0.2 * max(1, value)


def test_common_random_numbers_cut_the_variance():
    shared, apart = (simulated_weak_errors(*runs(seeds, 4000), SMOOTH[:2]) for seeds in ((0, 0), (0, 1)))
    for error in shared:
        assert error.variance_reduction > 2
    for error in apart:
        assert 0.9 < error.variance_reduction < 1.1
    np.testing.assert_allclose(apart[0].standard_error[1:], shared[0].unpaired_error[1:], rtol=0.1)


def test_interval_is_simultaneous():
    error = WeakError(power(1), np.arange(2), np.array([0.1, -0.5]), np.array([0.3, 0.1]), np.ones(2))
    z = 2.2414  # the normal's 1 − .05/4 quantile
    assert error.maximum == 0.5
    np.testing.assert_allclose(error.interval(), [0.5 - 0.1 * z, 0.1 + 0.3 * z], rtol=1e-4)
    assert error.variance_reduction == pytest.approx(100)


def test_streams_of_different_lengths_are_refused():
    long = sgdm_moments(MODEL, 1.0, 0.1, at=[1, 2])
    with pytest.raises(ValueError, match="longer"):
        exact_weak_errors(sgdm_moments(MODEL, 1.0, 0.1, at=[1]), long, SMOOTH)
    with pytest.raises(ValueError, match="longer"):
        simulated_weak_errors(runs((0, 0), 4)[0], list(runs((0, 0), 4)[1])[:1] * 9, SMOOTH)


def test_fitted_order():
    x = np.geomspace(1e-3, 1e-1, 7)
    fit = fitted_order(x, 3 * x**0.75)
    np.testing.assert_allclose(fit, [0.75, 0.75, 0.75, 3.0], rtol=1e-6)
    inside, random = 0, np.random.default_rng(0)
    few = x[::3]  # three points, where Student's t is far from the normal and from its neighbours
    for _ in range(400):
        low, high = fitted_order(few, few * np.exp(0.3 * random.standard_normal(3)), level=0.9)[1:3]
        inside += low < 1 < high
    assert 0.9 - 0.06 < inside / 400 < 0.9 + 0.06
    for bad in ([1, 2], [1, 1, 1], [1, 2, 0]):
        with pytest.raises(UserError, match="at least three"):
            fitted_order(bad, np.ones(len(bad)))
    with pytest.raises(UserError, match="at least three"):
        fitted_order([1, 2, 3], [1, 0, 1])


def test_step_grid():
    grid = step_grid(10**6, 50)
    assert (grid[0], grid[-1]) == (1, 10**6)
    assert all(a < b for a, b in pairwise(grid))
    assert sum(k <= 1000 for k in grid) > 20 < sum(k > 10**5 for k in grid)


def scaled_rates(epsilon, alpha, scale):
    # η and β with 1 − β = scale·η^α and ηβ/(1−β) = ε.
    excess = lambda log_eta: math.log(math.exp((1 - alpha) * log_eta) / scale - math.exp(log_eta)) - math.log(epsilon)  # noqa: E731
    eta = math.exp(brentq(excess, math.log(1e-13), math.log(0.05)))
    return eta, 1 - scale * eta**alpha


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, 0.1), (0.25, 0.3), (0.5, 1.0), (0.75, 3.0)])
def test_orders_of_sgd_against_sgdm(alpha, scale):
    epsilons, smooth, kinked, pathwise = np.geomspace(1e-3, 0.05, 7), [], [], []
    for epsilon in epsilons:
        eta, momentum = scaled_rates(epsilon, alpha, scale)
        assert eta * momentum / (1 - momentum) == pytest.approx(epsilon)
        model, at = LinearModel.quadratic(1.0, 1.0, scale=eta**-0.5), step_grid(round(2 / eta), 40)
        laws = sgdm_moments(model, 1.0, eta, at=at), sgdm_moments(model, 1.0, eta, momentum, at=at)
        *errors, kink = exact_weak_errors(*laws, [*SMOOTH, distance(1.0)])
        smooth.append(errors)
        kinked.append(kink)
        pathwise.append(max(rms_distance(joint) for joint in joint_moments(model, 1.0, eta, momentum, at=at)))
    for function, errors in zip(SMOOTH, np.transpose(smooth), strict=True):
        fit = fitted_order(epsilons, errors)
        assert 0.75 <= fit.low <= fit.high <= 1.25, function.name
    for errors in (kinked, pathwise):
        fit = fitted_order(epsilons, errors)
        assert 0.42 <= fit.low <= fit.high <= 0.58


def test_sgdm_and_its_sme_from_paths():
    x0 = torch.ones(20_000, 2).double()
    sgdm = iterates(ORACLE, x0, 0.05, 0.5, steps=40, generator=torch.Generator().manual_seed(0), every=20)
    sde = sme(ORACLE, x0, 0.05, 0.5, steps=40, generator=torch.Generator().manual_seed(0), every=20)
    for error in simulated_weak_errors(sgdm, sde, SMOOTH[:2]):
        assert error.interval()[0] <= 0.1
        assert error.variance_reduction > 5

"""Exact moments against enumeration, brute recursion and simulation; stationary values and limits."""

import itertools

import numpy as np
import pytest
import torch

from hf_momentum.dynamics.iterates import Rates, iterates
from hf_momentum.dynamics.moments import (
    LinearModel,
    coupled_moments,
    joint_moments,
    rms_distance,
    sgdm_map,
    sgdm_moments,
    stability_limit,
    stationary_covariance,
)
from hf_momentum.dynamics.oracle import LabelNoiseOracle, MinibatchOracle, NoisyGradientOracle
from hf_momentum.dynamics.problems import LinearRegression, Quadratic
from hf_momentum.dynamics.stability import critical_lr, oscillation_range, stationary_variance
from hf_momentum.errors import UserError
from hf_momentum.optim import averaged_lr

H = np.array([[1.5, 0.4], [0.4, 0.7]])
SIGMA = np.array([[1.0, -0.3], [-0.3, 0.5]])
MODEL = LinearModel.quadratic(H, SIGMA, scale=1.3)
LRS, MOMENTA = [0.1, 0.3, 0.2, 0.0, 0.25], [0.9, 0.0, 0.5, 0.8, 0.95]
REGRESSION = LinearRegression([[1.0, 0.5], [-0.3, 2.0], [0.8, -1.0]], [1.0, -1.0, 0.5])


def enumerate_moments(oracle, weights, x0, lrs, momenta, momentum0):
    # All sequences of equally likely draws, as paths.
    sequences = torch.tensor(list(itertools.product(range(len(weights)), repeat=len(lrs))))
    x = torch.tensor(x0, dtype=torch.float64).expand(len(sequences), -1).clone()
    m = torch.zeros_like(x) if momentum0 is None else momentum0
    for k, (lr, momentum) in enumerate(zip(lrs, momenta, strict=True)):
        m = momentum * m + (1 - momentum) * oracle(x, weights[sequences[:, k]])
        x = x - lr * m
    state = torch.cat([x, m], dim=1)
    return state.mean(0).numpy(), state.T.cov(correction=0).numpy()


@pytest.mark.parametrize(("batch_size", "replacement"), [(1, True), (2, True), (2, False)])
def test_mini_batches_of_a_regression_by_enumeration(batch_size, replacement):
    oracle = MinibatchOracle(REGRESSION, batch_size, replacement)
    batches = itertools.product(range(3), repeat=batch_size) if replacement else itertools.combinations(range(3), 2)
    weights = torch.stack([torch.bincount(torch.tensor(b), minlength=3) / batch_size for b in batches]).double()
    steps = 4
    mean, covariance = enumerate_moments(oracle, weights, [0.4, -1.0], LRS[:steps], MOMENTA[:steps], None)
    (moments,) = sgdm_moments(LinearModel.of(oracle), [0.4, -1.0], LRS, MOMENTA, at=[steps])
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.covariance, covariance, rtol=1e-12, atol=1e-12)


def test_additive_noise_by_enumeration():
    oracle = NoisyGradientOracle(Quadratic(H, minimiser=[1.0, -2.0]), torch.tensor(SIGMA), "rademacher", 1.3)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2))).double()
    mean, covariance = enumerate_moments(oracle, signs, [0.4, -1.0], LRS, MOMENTA, None)
    (moments,) = sgdm_moments(LinearModel.of(oracle), [0.4, -1.0], LRS, MOMENTA, at=[5])
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.covariance, covariance, rtol=1e-12, atol=1e-12)


def test_long_stretches_equal_single_steps():
    at = [0, 1, 5, 6, 1000]
    jumps = list(sgdm_moments(MODEL, [2.0, -1.0], 0.1, 0.9, at=at))
    single = list(sgdm_moments(MODEL, [2.0, -1.0], lambda k: 0.1, lambda k: 0.9, at=at))
    for jump, step in zip(jumps, single, strict=True):
        assert jump.step == step.step
        np.testing.assert_allclose(jump.mean, step.mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(jump.covariance, step.covariance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("lr", "momentum"), [(0.2, 0.9), (LRS, MOMENTA)])
def test_joint_moments_hold_both_processes(lr, momentum):
    (joint,) = joint_moments(MODEL, [2.0, -1.0], lr, momentum, at=[5])
    (sgdm,) = sgdm_moments(MODEL, [2.0, -1.0], lr, momentum, at=[5])
    np.testing.assert_allclose(joint.mean[2:], sgdm.mean, atol=1e-14)
    np.testing.assert_allclose(joint.covariance[2:, 2:], sgdm.covariance, atol=1e-14)
    averaged = lr if momentum == 0.9 else averaged_lr(lr, momentum)
    (sgd,) = sgdm_moments(MODEL, [2.0, -1.0], averaged, at=[5])
    np.testing.assert_allclose(joint.covariance[:2, :2], sgd.covariance[:2, :2], atol=1e-14)


def test_coupled_moments_take_any_two_rates():
    sgd_lrs = [0.3, 0.1, 0.0, 0.2, 0.4]
    (coupled,) = coupled_moments(MODEL, [2.0, -1.0], Rates(sgd_lrs, 0.0, 5), Rates(LRS, MOMENTA, 5), at=[5])
    (sgd,) = sgdm_moments(MODEL, [2.0, -1.0], sgd_lrs, at=[5])
    (sgdm,) = sgdm_moments(MODEL, [2.0, -1.0], LRS, MOMENTA, at=[5])
    np.testing.assert_allclose(coupled.mean, [*sgd.mean[:2], *sgdm.mean], atol=1e-14)
    np.testing.assert_allclose(coupled.covariance[:2, :2], sgd.covariance[:2, :2], atol=1e-14)
    np.testing.assert_allclose(coupled.covariance[2:, 2:], sgdm.covariance, atol=1e-14)
    (same,) = coupled_moments(MODEL, [2.0, -1.0], Rates(LRS, 0.0, 5), Rates(LRS, 0.0, 5), at=[5])
    assert rms_distance(same) < 1e-7  # one noise, one path
    (apart,) = coupled_moments(MODEL, 0.0, Rates(0.1, 0.0, 1), Rates(0.3, 0.5, 1), at=[1])
    noise = 0.1 - 0.15  # x = −0.1 v and −0.3 · ½ v
    assert rms_distance(apart) == pytest.approx(abs(noise) * np.sqrt(np.trace(MODEL.additive)))


def test_rms_distance_of_simulated_pairs():
    oracle = NoisyGradientOracle(Quadratic(H, minimiser=[1.0, -2.0]), torch.tensor(SIGMA), scale=1.3)
    x0 = torch.tensor([[2.0, 1.0]]).double().expand(20_000, 2)
    runs = [
        iterates(oracle, x0, 0.3, beta, steps=20, generator=torch.Generator().manual_seed(0)) for beta in (0.0, 0.9)
    ]
    exact = joint_moments(LinearModel.of(oracle), [2.0, 1.0], 0.3, 0.9, at=range(21))
    for sgd, sgdm, joint in zip(*runs, exact, strict=True):
        squares = (sgd.x - sgdm.x).square().sum(-1)
        assert abs(squares.mean() - rms_distance(joint) ** 2) <= 4 * squares.std() / 20_000**0.5 + 1e-12


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_stationary_covariance_is_kept(momentum):
    covariance = stationary_covariance(MODEL, 0.5, momentum)
    (after,) = sgdm_moments(MODEL, 0.0, 0.5, momentum, at=[100], start=covariance)
    np.testing.assert_allclose(after.covariance, covariance, rtol=1e-10)
    assert np.linalg.eigvalsh(covariance[:2, :2]).min() > 0


@pytest.mark.parametrize("oracle", [MinibatchOracle(REGRESSION, 1), MinibatchOracle(REGRESSION, 2, False).svag(1.5)])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_stationary_covariance_of_mini_batches_is_kept(oracle, momentum):
    model = LinearModel.of(oracle)
    lr = 0.5 * stability_limit(model, momentum)
    covariance = stationary_covariance(model, lr, momentum)
    (after,) = sgdm_moments(model, model.minimiser, lr, momentum, at=[100], start=covariance)
    np.testing.assert_allclose(after.covariance, covariance, rtol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("v", [0.0, 0.5, 10.0])
def test_closed_formulas_of_one_mode(momentum, v):
    model = LinearModel.quadratic(1.7, 0.6, curvature_variance=v)
    limit = critical_lr(1.7, momentum, v)
    assert stability_limit(model, momentum) == pytest.approx(limit, rel=1e-10)
    for lr in (0.01 * limit, 0.5 * limit, 0.99 * limit):
        exact = stationary_covariance(model, lr, momentum)[0, 0]
        assert stationary_variance(1.7, 0.6, lr, momentum, v) == pytest.approx(exact, rel=1e-9)
    silent = LinearModel.quadratic(1.7, 0.0, curvature_variance=v)
    for lr, grows in ((0.99 * limit, False), (1.01 * limit, True)):
        early, late = (
            np.trace(s.covariance) + s.mean @ s.mean for s in sgdm_moments(silent, 1.0, lr, momentum, at=[500, 900])
        )
        assert (late > early) == grows


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 20])
def test_stability_limit_of_a_regression(batch_size, momentum):
    features = torch.randn(40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = LinearRegression(features, torch.zeros(40))
    for replacement in (True, False):
        oracle = MinibatchOracle(problem, batch_size, replacement)
        curvatures = features[:, 0].square()
        v = float(curvatures.var(correction=0)) * oracle.scale**2
        limit = stability_limit(LinearModel.of(oracle), momentum)
        assert limit == pytest.approx(critical_lr(float(curvatures.mean()), momentum, v), rel=1e-10)


def test_small_batches_take_away_the_gain_of_momentum():
    features = torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem, gains = LinearRegression(features, torch.zeros(200)), []
    for batch_size in (1, 8, 64, 4096):
        model = LinearModel.of(MinibatchOracle(problem, batch_size))
        gains.append(stability_limit(model, 0.9) / stability_limit(model))
    assert gains == sorted(gains)
    assert gains[0] < 1.6
    assert gains[-1] > 18


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize(("fraction", "momentum"), [(0.5, 0.0), (1.5, 0.0), (0.5, 0.5), (1.5, 0.5)])
def test_second_moment_of_simulated_mini_batches(batch_size, fraction, momentum):
    problem = LinearRegression([[1.0, 0.5], [-0.3, 2.0], [0.8, -1.0]], [1.0, 0.0, 0.5])
    oracle = MinibatchOracle(problem, batch_size)
    model = LinearModel.of(oracle)
    lr, steps = fraction * stability_limit(model, momentum), 6
    exact = list(sgdm_moments(model, 3.0, lr, momentum, at=range(steps + 1)))
    generator = torch.Generator().manual_seed(1)
    runs = iterates(oracle, torch.full((40_000, 2), 3.0).double(), lr, momentum, steps=steps, generator=generator)
    for state, moments in zip(runs, exact, strict=True):
        squares = state.x.square()
        target = np.diag(moments.covariance)[:2] + moments.mean[:2] ** 2
        assert ((squares.mean(0) - torch.as_tensor(target)).abs() <= 4 * squares.std(0) / 200 + 1e-12).all()


@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.99])
def test_oscillation_range(momentum):
    for h, oscillates in zip(
        np.outer(oscillation_range(momentum), [0.999, 1.001]).ravel(), [False, True, True, False], strict=True
    ):
        step, _ = sgdm_map(LinearModel.quadratic(1.0), h, momentum)
        assert (np.abs(np.linalg.eigvals(step).imag).max() > 1e-6) == oscillates


def test_unstable_rates_have_no_stationary_moments():
    model = LinearModel.quadratic([1.0, 4.0])
    with pytest.raises(UserError, match=r"below 0.5 \(η·λ_max < 2\)"):
        stationary_covariance(model, 0.5)
    with pytest.raises(UserError, match=r"below 9.5 \(η·λ_max < 2\(1\+β\)/\(1−β\) = 38\)"):
        stationary_covariance(model, 9.51, 0.9)
    with pytest.raises(UserError, match="curvature noise lowers it"):
        stationary_variance(1.0, 1.0, 1.0, 0.0, curvature_variance=1.0)
    with pytest.raises(UserError, match="above 0"):
        stationary_variance(1.0, 1.0, 0.0)
    stationary_covariance(model, 9.49, 0.9)


BAD = [
    (lambda: stationary_covariance(LinearModel.quadratic([1.0, 0.0]), 0.1), "positive definite"),
    (lambda: critical_lr(-1.0), "Invalid curvature"),
    (lambda: LinearModel.quadratic(1.0, -1.0), "not positive semi-definite"),
    (lambda: LinearModel.of(LabelNoiseOracle(REGRESSION)), "Exact moments need"),
    (lambda: LinearModel.of(NoisyGradientOracle(Quadratic([1.0]), lambda x: x.square())), "Exact moments need"),
    (lambda: joint_moments(LinearModel.of(MinibatchOracle(REGRESSION, 1)), 1.0, 0.1, 0.9, at=[1]), "depend on x"),
    (lambda: list(sgdm_moments(MODEL, 0.0, 0.1, at=[3, 2])), "must rise"),
    (lambda: sgdm_moments(MODEL, 0.0, 0.1, 1.0, at=[3]), "Invalid momentum"),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_arguments(build, message):
    with pytest.raises(UserError, match=message):
        build()

"""The SME: exact Ornstein–Uhlenbeck steps, Euler–Maruyama coupled to SGD, its weak order."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec
from scipy.linalg import expm

from hf_momentum.dynamics.iterates import iterates
from hf_momentum.dynamics.moments import LinearModel, sgdm_moments
from hf_momentum.dynamics.oracle import MinibatchOracle, NoisyGradientOracle
from hf_momentum.dynamics.problems import LinearRegression, Quadratic
from hf_momentum.dynamics.sde import ou_paths, ou_transition, sme, sme_moments
from hf_momentum.dynamics.weak_error import (
    cosine,
    distance,
    exact_weak_errors,
    exponential,
    fitted_order,
    power,
    step_grid,
)
from hf_momentum.errors import UserError
from hf_momentum.optim import averaged_lr

H = np.array([[1.5, 0.4, 0.0], [0.4, 0.7, 0.1], [0.0, 0.1, 0.05]])
SIGMA = np.diag([1.0, 0.5, 2.0]) + 0.1
ORACLE = NoisyGradientOracle(
    Quadratic(torch.tensor(H), minimiser=[1.0, -2.0, 0.5]), torch.tensor(SIGMA), "rademacher", 1.3
)
MODEL = LinearModel.of(ORACLE)
LRS, MOMENTA = [0.3, 0.1, 0.2, 0.4, 0.05], [0.9, 0.5, 0.0, 0.8, 0.9]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(paths):
    return torch.tensor([[2.0, 1.0, -1.0]]).double().expand(paths, 3)


def test_ou_step_is_the_matrix_exponential():
    decay, covariance = ou_transition(MODEL, 0.3)
    np.testing.assert_allclose(decay, expm(-0.3 * H), atol=1e-14)
    integral = quad_vec(lambda s: expm(-0.3 * s * H) @ SIGMA @ expm(-0.3 * s * H), 0, 1, epsabs=1e-13)[0]
    np.testing.assert_allclose(covariance, (0.3 * 1.3) ** 2 * integral, atol=1e-12)
    flat = ou_transition(LinearModel.quadratic([0.0, 0.0], SIGMA[:2, :2]), 0.3)
    np.testing.assert_allclose(flat[1], 0.09 * SIGMA[:2, :2])


def test_moments_follow_the_averaged_learning_rate():
    (moments,) = sme_moments(MODEL, [2.0, 1.0, -1.0], LRS, MOMENTA, at=[5])
    decay = expm(-sum(averaged_lr(LRS, MOMENTA)) * H)
    np.testing.assert_allclose(
        moments.mean, MODEL.minimiser + decay @ ([2.0, 1.0, -1.0] - MODEL.minimiser), atol=1e-13
    )
    constant = list(sme_moments(MODEL, 1.0, 0.1, 0.9, at=[3, 40]))
    stepwise = list(sme_moments(MODEL, 1.0, lambda k: 0.1, at=[3, 40]))
    np.testing.assert_allclose(constant[1].covariance, stepwise[1].covariance, atol=1e-14)


def assert_moments(x, exact):
    paths = len(x)
    centred = x - torch.as_tensor(exact.mean)
    products = centred[:, :, None] * centred[:, None, :]
    assert ((centred.mean(0)).abs() <= 4 * x.std(0) / paths**0.5 + 1e-12).all()
    error = (products.mean(0) - torch.as_tensor(exact.covariance)).abs()
    assert (error <= 4 * products.std(0) / paths**0.5 + 1e-12).all()


def test_exact_paths_have_the_exact_moments():
    paths = ou_paths(MODEL, start(20_000), LRS, MOMENTA, steps=5, generator=generator())
    for state, exact in zip(paths, sme_moments(MODEL, [2.0, 1.0, -1.0], LRS, MOMENTA, at=range(6)), strict=True):
        assert_moments(state.x, exact)


def test_one_substep_is_gaussian_sgd():
    sde = sme(ORACLE, start(5), LRS, MOMENTA, steps=5, generator=generator())
    sgd = iterates(ORACLE.gaussian(), start(5), averaged_lr(LRS, MOMENTA), steps=5, generator=generator())
    for a, b in zip(sde, sgd, strict=True):
        torch.testing.assert_close(a.x, b.x)


def test_euler_converges_to_the_exact_moments():
    errors = []
    for substeps in (
        1,
        2,
        4,
        8,
    ):  # Euler–Maruyama on a quadratic is SGD at η/n with noise √n σ, whose moments are exact
        fine = LinearModel(MODEL.hessian, MODEL.minimiser, MODEL.additive * substeps)
        (euler,) = sgdm_moments(fine, 2.0, 0.2 / substeps, at=[10 * substeps])
        (exact,) = sme_moments(MODEL, 2.0, 0.2, at=[10])
        errors.append(np.abs(euler.covariance[:3, :3] - exact.covariance).max())
        run = sme(ORACLE, 2 * torch.ones(20_000, 3).double(), 0.2, steps=10, substeps=substeps, generator=generator(),
                  bridge=generator(1), every=10)  # fmt: skip
        *_, last = run
        assert_moments(last.x, euler._replace(mean=euler.mean[:3], covariance=euler.covariance[:3, :3]))
    assert fitted_order([1, 0.5, 0.25, 0.125], errors).order == pytest.approx(1, abs=0.1)


def test_substeps_keep_the_brownian_motion():
    # Without a drift the increments of a step add up to the same draw, however it is divided.
    oracle = NoisyGradientOracle(Quadratic([0.0, 0.0]), 1.0)
    ends = []
    for substeps in (1, 3, 8):
        *_, last = sme(oracle, torch.zeros(50, 2).double(), 0.1, steps=4, substeps=substeps, generator=generator(),
                       bridge=generator(1))  # fmt: skip
        ends.append(last.x)
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[2], ends[0])


def test_mini_batches_have_an_sme():
    problem = LinearRegression([[1.0, 0.5], [-0.3, 2.0], [0.8, -1.0]], [1.0, -1.0, 0.5])
    oracle, x0 = MinibatchOracle(problem, 2), torch.ones(5000, 2).double()
    *_, sde = sme(oracle, x0, 0.1, 0.9, steps=10, generator=generator())
    (exact,) = sgdm_moments(LinearModel.of(oracle), 1.0, 0.1, at=[10])  # SGD of the same mean and covariance
    assert_moments(sde.x, exact._replace(mean=exact.mean[:2], covariance=exact.covariance[:2, :2]))


FUNCTIONS = [power(1), power(2), power(3), exponential(0.5), cosine(1.0), cosine(2.0), distance(1.0), distance(0.3)]


def test_weak_order_of_sgd_against_its_sme():
    etas, errors = np.geomspace(1e-4, 0.1, 9), []
    for eta in etas:
        model = LinearModel.quadratic(1.0, 1.0, scale=eta**-0.5)
        at = step_grid(round(2 / eta), 40)
        pair = sgdm_moments(model, 1.0, eta, at=at), sme_moments(model, 1.0, eta, at=at)
        errors.append(exact_weak_errors(*pair, FUNCTIONS))
    for function, values in zip(FUNCTIONS[:6], np.transpose(errors), strict=False):
        fit = fitted_order(etas, values)
        assert fit.high <= 1.05, function.name
        assert fit.low >= 0.9, function.name


def test_bad_arguments():
    with pytest.raises(UserError, match="`bridge`"):
        sme(ORACLE, start(2), 0.1, steps=3, substeps=2)
    with pytest.raises(UserError, match="at least 1"):
        sme(ORACLE, start(2), 0.1, steps=3, substeps=0, bridge=generator())
    with pytest.raises(UserError, match="Invalid momentum"):
        sme(ORACLE, start(2), 0.1, 1.0, steps=3)
    regression = LinearModel.of(MinibatchOracle(LinearRegression([[1.0], [2.0]], [0.0, 1.0]), 1))
    with pytest.raises(UserError, match="does not depend on x"):
        list(sme_moments(regression, 1.0, 0.1, at=[1]))

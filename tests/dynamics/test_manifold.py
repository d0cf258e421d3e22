"""Γ and Φ: the gradient flow against closed forms, and the slow SDE's coefficients against differences of Φ."""

import math

import numpy as np
import pytest
import torch
from scipy.special import wrightomega

from hf_momentum.dynamics.manifold import (
    Manifold,
    gradient_flow_limit,
    label_noise_drift,
    label_noise_flow,
    manifold_of,
)
from hf_momentum.dynamics.overparametrised import MatrixFactorisation, TwoLayerNet
from hf_momentum.dynamics.problems import FunctionProblem, LinearRegression, Quadratic
from hf_momentum.dynamics.valleys import ExponentialValley, ParabolicValley, QuadraticValley
from hf_momentum.errors import UserError


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariances(paths, dim, seed=1):
    root = normal(paths, dim, dim, seed=seed)
    return root @ root.mT


VALLEYS = {"A": QuadraticValley(), "C": ExponentialValley(0.25), "parabola": ParabolicValley()}
NET = TwoLayerNet(normal(2, 3), normal(3 * 4, seed=2))
STIFF_NET = TwoLayerNet(normal(2, 2), normal(3 * 3, seed=2))  # its curvatures are .93 and .009
FACTORS = MatrixFactorisation([[1.0, -0.5], [2.0, -1.0], [0.6, -0.3]], rank=1)  # the target has rank 1
SURPLUS = {"net": NET, "factorisation": FACTORS}


def near_gamma(problem, paths=3):
    return Manifold(problem).project(problem.minimiser + 0.2 * normal(paths, problem.dim, seed=5))


@pytest.mark.parametrize("name", VALLEYS)
def test_flow_ends_where_the_closed_form_says(name):
    valley, x = VALLEYS[name], 1.3 * normal(60, 2)
    torch.testing.assert_close(gradient_flow_limit(valley, x), valley.project(x), rtol=0, atol=1e-9)


def test_flow_of_quadratics_is_the_affine_projection():
    x, singular = normal(4, 3, seed=2), normal(3, 2) @ normal(2, 3)
    curvature = singular.mT @ singular
    away = torch.linalg.pinv(curvature) @ curvature
    minimiser = normal(3, seed=3)
    expected = x - (x - minimiser) @ away
    torch.testing.assert_close(Manifold(Quadratic(curvature, minimiser)).project(x), expected, rtol=0, atol=1e-9)
    problem = LinearRegression(normal(2, 3), normal(2, seed=1))
    expected = x - problem.residuals(x) @ torch.linalg.pinv(problem.features).mT
    torch.testing.assert_close(Manifold(problem).project(x), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_scale_of_the_loss_does_not_matter(scale):
    valley, x = VALLEYS["A"], normal(5, 2)
    problem = FunctionProblem(lambda x: scale * valley.loss(x), 2)
    torch.testing.assert_close(gradient_flow_limit(problem, x), valley.project(x), rtol=0, atol=1e-9)


def test_flow_of_a_factorisation_keeps_the_imbalance():
    x = FACTORS.minimiser + 0.5 * normal(5, FACTORS.dim)
    end = Manifold(FACTORS).project(x)
    assert FACTORS.loss(end).max() < 1e-24

    def imbalance(x):
        return x[:, :3].square().sum(-1) - x[:, 3:].square().sum(-1)

    torch.testing.assert_close(imbalance(end), imbalance(x), rtol=0, atol=1e-8)


@pytest.mark.slow
def test_stiff_flows_end_on_gamma():
    end = Manifold(STIFF_NET).project(STIFF_NET.minimiser + 0.2 * normal(1, STIFF_NET.dim, seed=5))
    assert STIFF_NET.loss(end).item() < 1e-24


def test_a_given_projection_is_used():
    valley, x = VALLEYS["C"], normal(4, 2)
    assert torch.equal(Manifold(valley, valley.project).project(x), valley.project(x))
    assert manifold_of(valley) is valley
    assert isinstance(manifold_of(NET), Manifold)
    assert gradient_flow_limit(valley, x[:0]).shape == (0, 2)


@pytest.mark.parametrize("name", VALLEYS)
def test_coefficients_are_the_closed_ones(name):
    valley, manifold = VALLEYS[name], Manifold(VALLEYS[name])
    x, sigma = valley.project(normal(20, 2)), covariances(20, 2)
    torch.testing.assert_close(manifold.tangent_projection(x), valley.tangent_projection(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(manifold.slow_drift(x, sigma), valley.slow_drift(x, sigma), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SURPLUS)
def test_coefficients_are_derivatives_of_the_flow(name):
    manifold, step = Manifold(SURPLUS[name]), 3e-3
    x = near_gamma(SURPLUS[name])
    roots = normal(3, *x.shape, seed=6)  # Σ = Σ_j e_j e_jᵀ, another one for each path
    flowed = manifold.project(torch.cat([x + sign * step * e for sign in (1, -1) for e in roots]))
    ahead, behind = flowed.view(2, *roots.shape)
    first = torch.einsum("pab,jpb->jpa", manifold.tangent_projection(x), roots)
    torch.testing.assert_close(first, (ahead - behind) / (2 * step), rtol=0, atol=2e-3)
    second = (ahead + behind - 2 * x).sum(0) / step**2
    drift = manifold.slow_drift(x, torch.einsum("jpa,jpb->pab", roots, roots))
    assert drift.abs().max() > 0.3
    torch.testing.assert_close(drift, 0.5 * second, rtol=0, atol=2e-3)


def test_isolated_minima_do_not_move():
    manifold, x = Manifold(Quadratic([1.0, 2.0])), torch.zeros(1, 2).double()
    assert manifold.tangent_projection(x).abs().max() == 0
    assert manifold.slow_drift(x, covariances(1, 2)).abs().max() == 0


@pytest.mark.parametrize("name", [*SURPLUS, "A", "parabola"])
def test_label_noise_is_the_special_case(name):
    problem = {**SURPLUS, **VALLEYS}[name]
    manifold = Manifold(problem)
    x = manifold.project(normal(3, 2)) if name in VALLEYS else near_gamma(problem)
    drift = label_noise_drift(problem, x, 0.7)
    assert drift.abs().max() > 0.01
    torch.testing.assert_close(manifold.slow_drift(x, 0.7 * problem.hessian(x)), drift, rtol=0, atol=1e-9)


@pytest.mark.parametrize("closed", [True, False])
def test_label_noise_flows(closed):
    a, parabola = VALLEYS["A"], VALLEYS["parabola"]
    start, times = torch.tensor([[0.0, 1.5], [0.0, -0.5]]).double(), [0.5, 1.0]
    path = label_noise_flow(a, start, times, manifold=a if closed else Manifold(a))
    assert path.shape == (2, 2, 2)
    assert round(path[1, 0, 1].item(), 5) == 0.90980
    torch.testing.assert_close(path, start * torch.tensor([[[math.exp(-0.25)]], [[math.exp(-0.5)]]]).double())
    # On the parabola p' = −2cp/(1+4p²), so log p + 2p² falls by 2ct.
    start, c = torch.tensor([[0.7, 0.49]]).double(), 0.8
    path = label_noise_flow(parabola, start, times, c, manifold=parabola if closed else Manifold(parabola))[:, 0]
    expected = np.sqrt(wrightomega(math.log(4 * 0.49) + 4 * 0.49 - 4 * c * np.array(times))) / 2
    np.testing.assert_allclose(path[:, 0].numpy(), expected, atol=1e-8)
    torch.testing.assert_close(path[:, 1], path[:, 0].square())


@pytest.mark.slow
def test_label_noise_flattens_a_factorisation():
    # The trace of H is (2‖u‖² + 3‖v‖²) / 6 and ‖u‖ ‖v‖ is fixed, so that 2‖u‖² = 3‖v‖² at the end.
    start = FACTORS.minimiser[None] * torch.tensor([1.5, 1.5, 1.5, 1 / 1.5, 1 / 1.5]).double()
    end = label_noise_flow(FACTORS, start, [20.0])[0]
    assert FACTORS.loss(end).item() < 1e-24
    assert 2 * end[0, :3].square().sum().item() == pytest.approx(3 * end[0, 3:].square().sum().item(), rel=1e-3)


NOWHERE = [
    (lambda x: (-x).exp().sum(-1), [[0.0]], r"x = \(0\).*still moves"),
    (lambda x: -x.square().sum(-1), [[0.5]], r"x = \(0.5\).*still moves"),
    (lambda x: x.square().prod(-1) - x.square().sum(-1), [[0.0, 0.0]], "eigenvalue -2"),
    (lambda x: (x**4).sum(-1), [[1.0]], "degenerate"),
    (lambda x: x[:, 0] ** 2 - x[:, 0] ** 3, [[0.3], [0.9]], r"x = \(0.9\)"),  # the second one falls over the edge
]


@pytest.mark.parametrize("case", range(len(NOWHERE)))
def test_starts_that_flow_nowhere(case):
    loss, start, message = NOWHERE[case]
    start = torch.tensor(start).double()
    with pytest.raises(UserError, match=message):
        gradient_flow_limit(FunctionProblem(loss, start.shape[1]), start)


def test_bad_input():
    valley, x = VALLEYS["A"], normal(2, 2)
    with pytest.raises(UserError, match=r"torch.float32: .* need torch.float64"):
        gradient_flow_limit(valley, x.float())
    with pytest.raises(UserError, match="float64"):
        Manifold(valley).tangent_projection(x.float())
    for times in ([], [1.0, 0.5], [-1.0], 1.0):
        with pytest.raises(UserError, match="Invalid times"):
            label_noise_flow(valley, x, times)
    with pytest.raises(UserError, match="eigenvalue -2"):
        Manifold(Quadratic([-2.0, 1.0])).slow_drift(torch.zeros(1, 2).double(), covariances(1, 2))

"""Losses: closed forms against autograd, minimisers, and valleys against their gradient flow."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from hf_momentum.dynamics.overparametrised import MatrixFactorisation, TwoLayerNet
from hf_momentum.dynamics.problems import (
    FiniteSum,
    FunctionProblem,
    LeastSquares,
    LinearRegression,
    Problem,
    Quadratic,
)
from hf_momentum.dynamics.valleys import ExponentialValley, ParabolicValley, QuadraticValley
from hf_momentum.errors import UserError


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VALLEYS = {"A": QuadraticValley(), "C": ExponentialValley(0.3), "parabola": ParabolicValley()}
PROBLEMS = {
    "diagonal": Quadratic([0.5, 2.0, 0.0]),
    "full": Quadratic(normal(3, 3) @ normal(3, 3).T, minimiser=normal(3, seed=1)),
    "regression": LinearRegression(normal(7, 3), normal(7, seed=1)),
    "wide regression": LinearRegression(normal(2, 4), normal(2, seed=1)),
    "net": TwoLayerNet(normal(4, 3), normal(5 * 4, seed=2)),
    "factorisation": MatrixFactorisation(normal(3, 2), rank=2),
    "excess rank": MatrixFactorisation(normal(2, 3), rank=4),
    **VALLEYS,
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_derivatives_are_those_of_the_loss(name):
    problem, x = PROBLEMS[name], normal(5, PROBLEMS[name].dim, seed=4)
    assert problem(x).shape == (5,)
    gradient = torch.func.grad(lambda x: problem.loss(x).sum())(x)
    torch.testing.assert_close(problem.gradient(x), gradient)
    torch.testing.assert_close(problem.gradient(x, out=torch.empty_like(x)), gradient)
    torch.testing.assert_close(problem.hessian(x), Problem.hessian(problem, x))
    torch.testing.assert_close(FunctionProblem(problem.loss, problem.dim).gradient(x), gradient)


@pytest.mark.parametrize("name", [name for name, problem in PROBLEMS.items() if isinstance(problem, LeastSquares)])
def test_examples(name):
    problem, x = PROBLEMS[name], normal(5, PROBLEMS[name].dim, seed=4)
    weights = normal(5, problem.examples, seed=5)
    torch.testing.assert_close(problem.loss(x), problem.residuals(x).square().mean(-1) / 2)
    torch.testing.assert_close(problem.jacobian(x), LeastSquares.jacobian(problem, x))
    torch.testing.assert_close(problem.pull(x, weights), torch.einsum("pn,pnd->pd", weights, problem.jacobian(x)))
    torch.testing.assert_close(problem.weighted_gradient(x, weights), FiniteSum.weighted_gradient(problem, x, weights))
    torch.testing.assert_close(problem.example_gradients(x), FiniteSum.example_gradients(problem, x))
    torch.testing.assert_close(problem.example_gradients(x).mean(1), problem.gradient(x))


@pytest.mark.parametrize("name", ["full", "regression", "wide regression", "net", "factorisation", "excess rank"])
def test_minimisers(name):
    problem = PROBLEMS[name]
    least = problem.minimiser[None]
    torch.testing.assert_close(problem.gradient(least), torch.zeros_like(least), rtol=0, atol=1e-12)
    assert problem.loss(least) <= problem.loss(least + 0.01 * normal(50, problem.dim)).min()
    if name not in ("full", "regression"):
        assert problem.loss(least).item() < 1e-24


def test_truncated_factorisation_is_the_best_of_its_rank():
    target = normal(4, 3)
    problem = MatrixFactorisation(target, rank=1)
    rest = torch.linalg.svdvals(target)[1:].square().sum() / (2 * 12)
    torch.testing.assert_close(problem.loss(problem.minimiser[None])[0], rest)


def test_copies_move():
    for problem in PROBLEMS.values():
        copy = problem.to(torch.float32)
        x = normal(2, copy.dim).float()
        assert copy.gradient(x).dtype == torch.float32


BAD = [
    (lambda: Quadratic([[1.0, 1.0], [0.0, 1.0]]), "Invalid curvature"),
    (lambda: Quadratic(1.0), "Invalid curvature"),
    (lambda: LinearRegression(normal(3, 2), normal(2)), "do not fit"),
    (lambda: TwoLayerNet(normal(3, 2), normal(7)), "make no net"),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_problems(build, message):
    with pytest.raises(UserError, match=message):
        build()


STARTS = torch.tensor([[0.6, 1.5], [-1.1, 0.7], [0.4, -0.9], [1.3, 0.2]], dtype=torch.float64)


def flow(problem, start):
    velocity = lambda t, x: -problem.gradient(torch.as_tensor(x)[None])[0].numpy()  # noqa: E731
    return solve_ivp(velocity, (0, 200), start.numpy(), method="LSODA", rtol=1e-11, atol=1e-13).y[:, -1]


@pytest.mark.parametrize("name", VALLEYS)
def test_projection_is_the_end_of_the_flow(name):
    valley = VALLEYS[name]
    ends = np.stack([flow(valley, start) for start in STARTS])
    np.testing.assert_allclose(valley.project(STARTS).numpy(), ends, atol=1e-8)
    assert valley.loss(valley.project(STARTS)).max() < 1e-25
    torch.testing.assert_close(valley.project(valley.project(STARTS)), valley.project(STARTS))


@pytest.mark.parametrize("name", VALLEYS)
def test_slow_coefficients_are_derivatives_of_the_projection(name):
    valley, step, eye = VALLEYS[name], 1e-4, torch.eye(2, dtype=torch.float64)
    x = valley.project(STARTS)
    root = normal(2, 2)
    covariance = (root @ root.T).expand(len(x), 2, 2)
    first = [(valley.project(x + step * e) - valley.project(x - step * e)) / (2 * step) for e in eye]
    torch.testing.assert_close(valley.tangent_projection(x), torch.stack(first, -1), rtol=0, atol=1e-6)
    second = [valley.project(x + step * e) + valley.project(x - step * e) - 2 * x for e in root.T]  # Σ = Σ_j e_j e_jᵀ
    torch.testing.assert_close(valley.slow_drift(x, covariance), sum(second) / (2 * step**2), rtol=0, atol=1e-5)


def test_projections_far_away_do_not_overflow():
    far = torch.tensor([[30.0, 40.0], [60.0, 2.0], [0.0, 3.0], [0.5, 0.0]], dtype=torch.float64)
    for valley in VALLEYS.values():
        assert valley.project(far).isfinite().all()

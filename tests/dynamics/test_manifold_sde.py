"""The slow SDE on Γ: fixtures with known moments, and SGD and SGDM that follow it over T/η² steps."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from hf_momentum.dynamics.iterates import iterates
from hf_momentum.dynamics.manifold import Manifold, projected, slow_sde
from hf_momentum.dynamics.oracle import LabelNoiseOracle, NoisyGradientOracle
from hf_momentum.dynamics.valleys import ExponentialValley, ParabolicValley, QuadraticValley
from hf_momentum.errors import UserError

A, C, PARABOLA = QuadraticValley(), ExponentialValley(0.25), ParabolicValley()
SIGMA = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=torch.float64)
BETA = 0.9


@functools.cache
def parabola_moments(start):
    """Mean and variance of Φ_x at T = 1 by the backward Kolmogorov equation u_t = b u' + ½ s² u'' on a fine grid."""
    grid = np.linspace(-4, 4, 801) + 1e-3  # where the closed drift is 0/0 lies between two points
    x = torch.as_tensor(np.stack([grid, grid**2], -1))
    sigma = SIGMA.expand(len(x), 2, 2)
    drift = PARABOLA.slow_drift(x, sigma)[:, 0].numpy()
    tangent = PARABOLA.tangent_projection(x)
    variance = (tangent @ sigma @ tangent)[:, 0, 0].numpy()

    def slope(t, flat):
        u = flat.reshape(2, -1)
        first, second = np.zeros_like(u), np.zeros_like(u)
        width = grid[1] - grid[0]
        first[:, 1:-1] = (u[:, 2:] - u[:, :-2]) / (2 * width)
        second[:, 1:-1] = (u[:, 2:] - 2 * u[:, 1:-1] + u[:, :-2]) / width**2
        return (drift * first + 0.5 * variance * second).ravel()

    end = solve_ivp(slope, (0, 1), np.concatenate([grid, grid**2]), method="RK45", rtol=1e-7, atol=1e-9, t_eval=[1])
    mean, square = (np.interp(start, grid, u) for u in end.y[:, -1].reshape(2, -1))
    return mean, square - mean**2


# name: oracle, start on Γ, coordinate that is read, mean, variance at T = 1
FIXTURES = {
    "A, label noise": (LabelNoiseOracle(A), (0.0, 1.5), 1, 0.90980, None),
    "A": (NoisyGradientOracle(A, 1.0), (0.0, 1.5), 1, 1.2957, 0.9720),
    "C": (NoisyGradientOracle(C, torch.tensor([4.0, 0.25])), (0.0, 1.0), 1, 0.60653, 0.15803),
    "parabola": (NoisyGradientOracle(PARABOLA, SIGMA), (0.5, 0.25), 0, *parabola_moments(0.5)),
}


def paths(start, count):
    return torch.tensor([start], dtype=torch.float64).repeat(count, 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def excess(samples, mean, variance):
    """By how much the mean and the variance err beyond 4 standard errors."""
    squares = (samples - samples.mean()).square()
    pairs = [(samples, mean), (squares, variance)]
    return [
        abs(values.mean().item() - expected) - 4 * values.std().item() / math.sqrt(len(values))
        for values, expected in pairs
        if expected is not None
    ]


def slow(name, count, steps, manifold=None):
    oracle, start, coordinate, *_ = FIXTURES[name]
    run = slow_sde(
        oracle, paths(start, count), time=1.0, steps=steps, generator=generator(), every=steps, manifold=manifold
    )
    *_, last = run
    return last.x[:, coordinate]


@functools.cache
def run(name, count, lr, momentum):
    oracle, start, coordinate, *_ = FIXTURES[name]
    steps = round(1 / lr**2)
    states = iterates(oracle, paths(start, count), lr, momentum, steps=steps, generator=generator(), every=steps)
    *_, last = projected(states, oracle.problem)
    return last.x[:, coordinate]


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("name", ["A", "C", "parabola"])
def test_slow_sde(name, automatic):
    oracle, *_, mean, variance = FIXTURES[name]
    manifold = Manifold(oracle.problem, oracle.problem.project) if automatic else None
    y = slow(name, 2_000 if automatic else 20_000, 40, manifold)
    assert max(excess(y, mean, variance)) <= 0


def test_slow_sde_of_label_noise_does_not_diffuse():
    y = slow("A, label noise", 2, 1000)
    assert y[0].item() == pytest.approx(y[1].item(), abs=1e-12)
    assert y[0].item() == pytest.approx(0.90980, abs=2e-4)  # Euler's step is 1e-3


@pytest.mark.parametrize("name", FIXTURES)
def test_all_from_the_loss_alone_gives_the_same_paths(name):
    # Φ by the flow, ∂Φ and ∂²Φ by automatic differentiation, against closed forms for all three.
    manifold = Manifold(FIXTURES[name][0].problem)
    torch.testing.assert_close(slow(name, 20, 5, manifold), slow(name, 20, 5), rtol=0, atol=1e-7)


# |error| ≤ CONSTANT η + 4 standard errors, of the mean and of the variance; the largest seen is 1.2 η (A, variance).
CONSTANT = 1.5


@pytest.mark.parametrize("momentum", [0.0, BETA])
@pytest.mark.parametrize("lr", [0.1, 0.05, 0.025])
@pytest.mark.parametrize("name", FIXTURES)
def test_iterates_follow_the_slow_sde(name, lr, momentum):
    y = run(name, 3_000, lr, momentum)
    assert max(excess(y, *FIXTURES[name][3:])) <= CONSTANT * lr


@pytest.mark.parametrize("momentum", [0.0, BETA])
@pytest.mark.parametrize("name", ["A, label noise", "C"])
def test_seen_values(name, momentum):
    # Simulated before at η = .025, with standard errors where they were printed.
    seen, error = {
        ("A, label noise", 0.0): (0.8946, 5e-5),
        ("A, label noise", BETA): (0.9119, 5e-4),
        ("C", 0.0): (0.604, 0.001),
        ("C", BETA): (0.6105, 0.0012),
    }[name, momentum]
    y = run(name, 3_000, 0.025, momentum)
    assert abs(y.mean().item() - seen) <= 4 * math.hypot(error, y.std().item() / math.sqrt(len(y)))


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, BETA])
@pytest.mark.parametrize("lr", [0.1, 0.05, 0.025])
@pytest.mark.parametrize("name", FIXTURES)
def test_iterates_follow_the_slow_sde_closely(name, lr, momentum):
    y = run(name, 40_000, lr, momentum)
    assert max(excess(y, *FIXTURES[name][3:])) <= CONSTANT * lr


def test_states_that_are_yielded():
    oracle, start, *_ = FIXTURES["parabola"]
    x0 = paths(start, 3) + torch.tensor([0.0, 0.4])
    states = list(slow_sde(oracle, x0, time=0.5, steps=5, every=2, generator=generator()))
    assert [state.step for state in states] == [0, 2, 4, 5]
    torch.testing.assert_close(states[0].x, PARABOLA.project(x0))
    assert all(PARABOLA.loss(state.x).max() < 1e-20 for state in states)
    assert not torch.equal(states[1].x, states[2].x)


def test_scale_enters_through_the_time_alone():
    start = paths((0.0, 1.0), 5)
    ends = []
    for scale in (0.2, 3.0):
        oracle = NoisyGradientOracle(C, torch.tensor([4.0, 0.25]), scale=scale)
        *_, last = slow_sde(oracle, start, time=1.0, steps=4, generator=generator())
        ends.append(last.x)
    torch.testing.assert_close(*ends)


BAD = [
    ({"steps": 0}, "Invalid steps: 0"),
    ({"steps": 2.5}, "Invalid steps"),
    ({"time": -1.0}, "time"),
    ({"every": 0}, "Invalid every"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change, message):
    arguments = {"time": 1.0, "steps": 5, **change}
    with pytest.raises(UserError, match=message):
        slow_sde(FIXTURES["A"][0], paths((0.0, 1.5), 2), **arguments)


def test_an_oracle_without_noise():
    with pytest.raises(UserError, match="no noise"):
        slow_sde(NoisyGradientOracle(A, scale=0.0), paths((0.0, 1.5), 2), time=1.0, steps=5)

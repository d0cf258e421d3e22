"""The study of failures: each line by an independent formula, and what fails apart from what does not."""

import math

import pytest
import torch

from hf_momentum.dynamics.iterates import iterates
from hf_momentum.dynamics.oracle import NoisyGradientOracle
from hf_momentum.dynamics.problems import FunctionProblem, Quadratic
from hf_momentum.dynamics.studies import failures, plan


def test_large_learning_rates_by_a_plain_recursion():
    lr, beta = 0.5, 0.9
    found = failures.rows(failures.BIG, "SGDM", momentum=beta, lrs=[lr, 0.1, 0.2, 0.3])
    measured = next(row["measured"] for row in found if row["lr"] == lr and row["quantity"] == failures.BIG)
    sgd, xx, xm, mm, largest = 0.0, 0.0, 0.0, 0.0, 0.0
    weight = 1 - beta
    for _ in range(500):
        sgd = (1 - lr) ** 2 * sgd + lr
        after = weight * xx + beta * xm
        mm = weight**2 * xx + 2 * weight * beta * xm + beta**2 * mm + weight**2 / lr
        xx, xm = xx - 2 * lr * after + lr**2 * mm, after - lr * mm
        largest = max(largest, abs(sgd - xx))
    assert measured == pytest.approx(largest, rel=1e-3)


def test_alpha_one_has_another_limit_and_smaller_alphas_none():
    # X″ + X′ + X = 0 by small steps of its own
    x, velocity, step, largest = 1.0, 0.0, 1e-4, 0.0
    for i in range(int(failures.TIME / step)):
        velocity += step * (-velocity - x)
        x += step * velocity
        largest = max(largest, abs(x - math.exp(-(i + 1) * step)))
    assert failures.underdamped_distance() == pytest.approx(largest, abs=1e-3)
    distances = {}
    for alpha in (0.0, 0.5, 1.0):
        *_, summary = failures.rows(failures.ALPHA, "line", alpha=alpha, lrs=[1e-5, 1e-4, 1e-3, 1e-2])
        distances[alpha] = summary
    assert distances[1.0]["measured"] == pytest.approx(largest, rel=1e-2)
    assert distances[1.0]["order"] == pytest.approx(0, abs=0.01)
    assert distances[0.0]["measured"] == pytest.approx(distances[0.0]["predicted"], rel=0.01)
    assert distances[0.5]["measured"] == pytest.approx(distances[0.5]["predicted"], rel=0.1)


def test_kicks_have_variance_one_and_are_rare():
    oracle = failures.RareKicks(Quadratic([1.0]), 0.02, scale=3.0)
    draw = oracle.draw(torch.zeros(200_000, 1).double(), torch.Generator().manual_seed(0))
    rate = float((draw != 0).double().mean())
    assert rate == pytest.approx(0.02, abs=4 * (0.02 / 200_000) ** 0.5)
    assert torch.equal(draw.abs().unique(), torch.tensor([0.0, 0.02**-0.5], dtype=torch.float64))
    assert abs(float(draw.mean())) < 4 / 200_000**0.5


def test_ripples_part_sgd_and_sgdm_at_every_learning_rate():
    *_, ripples = failures.rows(
        failures.SHARED, "Σ(σx)", momentum=0.9, lrs=[0.005, 0.007, 0.01, 0.014], paths=4000, seed=0
    )
    # SGD by a loop of its own, in units of √η
    generator, u = torch.Generator().manual_seed(1), torch.zeros(4000).double()
    for _ in range(200):
        u -= (1 + 0.9 * torch.cos(u)).sqrt() * torch.randn(4000, generator=generator, dtype=torch.float64)
    assert float(u.square().mean()) / 200 == pytest.approx(0.533, abs=0.06)
    assert ripples["low"] > 0.05


def test_escapes_from_the_double_well():
    well = failures.DoubleWell()
    plain = FunctionProblem(lambda x: 0.25 * (x[:, 0].square() - 1).square(), 1)
    x = torch.linspace(-2, 2, 9).double()[:, None]
    assert torch.allclose(well.gradient(x), plain.gradient(x))
    assert torch.allclose(well.loss(x), plain.loss(x))
    times = failures.escape_times(NoisyGradientOracle(well), 0.8, 0.5, 20, seed=0)
    *_, last = iterates(
        NoisyGradientOracle(well), torch.full((20, 1), -1.0).double(), 0.8, 0.5,
        steps=int(times[3]), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert float(last.x[3]) > 0.5


def test_every_cell_of_a_plan_can_be_computed():
    few = {"big": [0.1, 0.2, 0.4, 1.5], "small": [0.01, 0.02, 0.05, 0.1], "noisy": [0.02, 0.03, 0.04, 0.05]}
    cells = plan("failures", few | {"alphas": [1.0], "paths": 100, "wells": [0.6], "escapes": 10})
    quantities = {row["quantity"] for cell in cells for row in failures.rows(**cell)}
    assert quantities == {failures.BIG, failures.ALPHA, failures.SHARED, failures.ESCAPE, "summary"}

"""The study of the threshold: limits by independent formulas, and what counts as parting."""

import math

import numpy as np
import pytest
import torch

from hf_momentum.dynamics.moments import LinearModel, sgdm_moments
from hf_momentum.dynamics.oracle import MinibatchOracle
from hf_momentum.dynamics.problems import LinearRegression
from hf_momentum.dynamics.studies import plan, threshold


def test_a_quadratic_parts_where_two_stationary_losses_do():
    cell = {"problem": "one mode", "momentum": 0.5, "per_octave": 1, "steps": 300, "paths": 400, "seed": 0}
    found = threshold.rows("problem", **cell)
    summary = found[-1]
    kappa = 1 / 3
    assert summary["parts predicted"] == pytest.approx(2 / (2 - kappa), abs=1e-9)  # (2−κh)/(2−h) = 2
    assert summary["parts"] == 2  # on the grid …, 1, 2, 4
    assert summary["SGD"] == pytest.approx(2, rel=0.03)
    assert summary["SGDM"] == pytest.approx(6, rel=0.03)
    (middle,) = [row for row in found if row["quantity"] == "loss ratio" and row["h"] == 1]
    assert middle["predicted"] == pytest.approx(2 - kappa)
    assert abs(math.log(middle["measured"] / (2 - kappa))) < 4 * math.log(middle["high"] / middle["low"]) / 3.92


@pytest.mark.parametrize("name", threshold.PROBLEMS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_predicted_loss_by_the_moments_around_the_minimiser(name, momentum):
    case = threshold.Case(threshold.PROBLEMS[name](), steps=1, paths=1, seed=0)
    problem, x = case.oracle.problem, case.start[:1]
    hessian, covariance = problem.hessian(x)[0], case.oracle.covariance(x)[0] * case.oracle.scale**2
    model = LinearModel.quadratic(hessian.numpy(), covariance.numpy())
    (late,) = sgdm_moments(model, 0.0, 1.2 / case.sharpness, momentum, at=[10**8])
    second = late.covariance[: problem.dim, : problem.dim]
    assert case.predicted_loss(1.2, momentum) == pytest.approx(np.trace(hessian.numpy() @ second) / 2, rel=1e-3)


def test_the_factorisation_keeps_its_place_below_two_and_leaves_above():
    case = threshold.Case(threshold.PROBLEMS["factorisation"](), steps=150, paths=20, seed=0)
    for h, momentum, lost in ((1.7, 0.0, False), (2.4, 0.0, True), (2.4, 0.9, False), (30.0, 0.9, False)):
        assert case.lost(case.run(h, momentum), h) is lost


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_second_moment_limit_in_one_dimension(momentum, monkeypatch):
    monkeypatch.setattr(threshold, "POPULATION", 2000)
    features = torch.linspace(0.5, 2, 8).double()[:, None]
    oracle = MinibatchOracle(LinearRegression(features, torch.zeros(8).double()), 2)
    squares = features[:, 0].square()
    mean, v = float(squares.mean()), float(squares.var(correction=0)) / 2
    limit = 2 * mean / (v + (1 - momentum) / (1 + momentum) * mean**2)
    highest = 2 * (1 + momentum) / (1 - momentum) / mean
    measured = [threshold.second_moment_limit(oracle, momentum, seed, highest) for seed in range(2)]
    assert np.mean(measured) == pytest.approx(limit, rel=0.05)


def test_every_cell_of_a_plan_can_be_computed(monkeypatch):
    monkeypatch.setattr(threshold, "POPULATION", 100)
    few = {"problems": ["full Hessian", "factorisation"], "momenta": [0.5], "nonlinear_momenta": [0.2], "steps": 5}
    few |= {"per_octave": 1, "paths": 4, "nonlinear_steps": 2, "nonlinear_paths": 3, "batch_sizes": [8]}
    cells = plan("threshold", few | {"populations": 2})
    quantities = {row["quantity"] for cell in cells for row in threshold.rows(**cell)}
    assert quantities == {"loss ratio", "sharpness", "parting", "limit"}

"""σ: the parts of the distance, oracles of one covariance, the terms of the descent."""

import math

import numpy as np
import pytest
import torch

from hf_momentum.dynamics.moments import sgdm_moments
from hf_momentum.dynamics.studies import noise_scale as study

BETA = 0.9


def test_the_squares_of_the_parts_add_up_where_one_rules():
    options = {"lr": 0.05, "momentum": BETA, "time": 2.0, "paths": 4000, "seed": 0}
    parts = {}
    for scale in (1e-3, 1.0, 1e3):
        rows = study.split_rows(scale=scale, **options)
        parts[scale] = {row["source"]: row["predicted"] for row in rows}
        assert rows[-1]["measured"] == pytest.approx(rows[-1]["predicted"], rel=0.06)
    assert parts[1e-3]["start and curvature"] == parts[1e3]["start and curvature"]
    assert parts[1e3]["noise"] == pytest.approx(1e3 * parts[1.0]["noise"])
    assert parts[1e-3]["both"] == pytest.approx(parts[1e-3]["start and curvature"], rel=1e-4)
    assert parts[1e3]["both"] == pytest.approx(parts[1e3]["noise"], rel=1e-4)
    apart = {name: value**2 for name, value in parts[1.0].items()}
    assert apart["both"] <= apart["start and curvature"] + apart["noise"]


@pytest.mark.parametrize("law", study.LAWS)
@pytest.mark.parametrize("batch_size", study.WITHOUT)
def test_laws_have_one_covariance(law, batch_size):
    problem = study.regression(0)
    oracle = study.law_oracle(problem, law, batch_size)
    assert oracle.scale**2 == pytest.approx(1 / batch_size)
    hessian = problem.features.mT @ problem.features / study.EXAMPLES
    origin = torch.zeros(1, study.DIM).double()
    torch.testing.assert_close(oracle.covariance(origin)[0], hessian)
    x = torch.full((40_000, study.DIM), 1.5).double()
    noise = oracle.sample(x, torch.Generator().manual_seed(1)) - problem.gradient(x)
    constant = law in ("Gaussian, Σ(x*)", "label noise")
    examples = problem.features * (x[:1] @ problem.features.mT - problem.targets).mT
    target = hessian if constant else torch.cov(examples.mT, correction=0)
    assert float((noise.mT @ noise / len(x) * batch_size - target).abs().max()) < 0.06 * float(target.abs().max())


def test_law_rows():
    options = {"lr": 0.1, "momentum": BETA, "time": 2.0, "paths": 5000, "seed": 0}
    for law in ("mini-batch", "mini-batch without replacement", "label noise"):
        (row,) = study.law_rows(law=law, batch_size=7, **options)
        assert abs(row["measured"] - row["predicted"]) < 2.1 * (row["high"] - row["low"])


def test_terms():
    problem = study.regression(0)
    assert float(problem.minimiser.abs().max()) < 1e-12
    features, targets = problem.features.numpy(), problem.targets.numpy()
    x = np.full(study.DIM, study.START)
    hessian = features.T @ features / len(features)
    gradients = features * (features @ x - targets)[:, None]
    gradient = gradients.mean(0)
    expected = np.trace(hessian @ np.cov(gradients.T, bias=True)) / (gradient @ hessian @ gradient)
    *rows, start = study.terms_rows([4, 64], [0.1, 30.0], 0.1, BETA, 0)
    assert start["B_noise"] == pytest.approx(expected)
    late = [row["ratio"] for row in rows if row["time"] == "kη = 30"]
    assert late[0] == pytest.approx(late[1], rel=1e-3)  # near the minimum σ drops out
    assert rows[0]["measured"] != pytest.approx(rows[0]["predicted"])


def test_svag_brings_the_losses_together():
    one, four = study.svag_rows([1, 4], 0.1, BETA, 10.0, 0)
    assert abs(four["measured"]) < abs(one["measured"])
    model = study.LinearModel.of(study.law_oracle(study.regression(0), "mini-batch", 16))
    losses = []
    for beta in (0.0, BETA):
        (at,) = sgdm_moments(model, study.START, 0.1, beta, at=[100])
        d = study.DIM
        losses.append(np.trace(model.hessian @ (at.covariance[:d, :d] + np.outer(at.mean[:d], at.mean[:d]))))
    assert one["measured"] == pytest.approx(100 * (losses[1] / losses[0] - 1))
    assert math.isclose(four["lr"], 0.025)


def test_cells():
    cells = study.cells(scales=[1.0], paths=10)
    assert len(cells) == 1 + len(study.LAWS) * len(study.WITHOUT) + 2
    assert {row["part"] for row in study.rows(**cells[-1])} == {"SVAG"}

"""The study of noise against stability: its formulas by independent recursions, its simulations by its formulas."""

import pytest
import torch

from hf_momentum.dynamics.iterates import iterates
from hf_momentum.dynamics.moments import LinearModel, stationary_covariance
from hf_momentum.dynamics.oracle import NoisyGradientOracle
from hf_momentum.dynamics.problems import Quadratic
from hf_momentum.dynamics.studies import plan, tradeoff


def test_simulated_ratio_agrees_with_the_lyapunov_equation():
    (row,) = tradeoff.rows("simulated", 0.9, h=1.0, lines=[0.9], columns=[], paths=4000, seed=0)
    sgd, sgdm = (stationary_covariance(LinearModel.quadratic(1.0), 1.0, beta)[0, 0] for beta in (0.0, 0.9))
    assert row["predicted"] == pytest.approx(sgd / sgdm, abs=1e-10)
    assert row["low"] < row["measured"] < row["high"]
    assert abs(row["measured"] - sgd / sgdm) < 4 * (row["high"] - row["low"]) / 3.92


@pytest.mark.parametrize(("momentum", "h"), [(0.9, 0.01), (0.9, 1.3), (0.5, 5.0), (0.0, 1.7)])
def test_speed_is_what_a_run_without_noise_shows(momentum, h):
    oracle, k = NoisyGradientOracle(Quadratic([1.0]), 0.0), 200
    sizes = {}
    for state in iterates(oracle, torch.ones(1, 1).double(), h, momentum, steps=2 * k):
        sizes[state.step] = float(torch.cat([state.x, state.m]).norm())
    peaks = [max(sizes[i] for i in range(end - 60, end)) for end in (k, 2 * k)]
    tolerance = 0.01 if momentum else 1e-9
    assert (peaks[1] / peaks[0]) ** (1 / k) == pytest.approx(tradeoff.spectral_radius(momentum, h), rel=tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_terms_of_a_step_are_those_of_a_simulation(momentum):
    h, paths, steps = 0.5, 20_000, 150
    oracle, averaged = NoisyGradientOracle(Quadratic([1.0])), torch.zeros(paths, 1).double()
    generator = torch.Generator().manual_seed(0)
    stream = iterates(oracle, averaged.clone(), h, momentum, steps=steps, generator=generator)
    x = next(stream).x.clone()
    for state in stream:
        averaged, before = momentum * averaged + (1 - momentum) * x, x
        x = state.x.clone()
    noise, unit = state.m - averaged, 0.5 * h**2
    terms = {
        "descent": -h * before * averaged / unit,
        "noise": noise.square(),
        "memory": -h * before * noise / unit,
        "curvature": averaged.square() + 2 * averaged * noise,
    }
    exact = tradeoff.descent_terms(momentum, h)
    assert sum(exact.values()) == pytest.approx(0, abs=1e-12)
    for name, values in terms.items():
        assert abs(float(values.mean()) - exact[name]) < 4 * float(values.std()) / paths**0.5 + 1e-12


def test_exact_rows_agree_with_the_predictions():
    checked = set()
    for momentum in (0.0, 0.9):
        for row in tradeoff.rows("exact", momentum, columns=[1.0]):
            if row["quantity"] in ("gain", "speed", "threshold"):
                checked.add(row["quantity"])
                assert row["measured"] == pytest.approx(row["predicted"], abs=1e-6)
            if row["quantity"] == "terms":
                assert row["noise"] == pytest.approx(row["noise predicted"], abs=1e-10)
                assert row["memory"] == pytest.approx(row["memory predicted"], abs=1e-10)
    assert checked == {"gain", "speed", "threshold"}


def test_every_cell_of_a_plan_can_be_computed():
    cells = plan("tradeoff", {"momenta": [0.5], "h": [1.0], "more_momenta": [0.8], "more_h": [1.5], "paths": 50})
    quantities = {row["quantity"] for cell in cells for row in tradeoff.rows(**cell)}
    assert quantities == {"ratio over h", "ratio over β", "gain", "speed", "terms", "threshold"}

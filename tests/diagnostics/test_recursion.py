import math
import time

import numpy as np
import pytest

from hf_momentum.diagnostics.recursion import (
    LOST,
    Modes,
    Piece,
    expected_loss,
    log_loss_ratio,
    pieces_of,
    reference_second_moment,
    stability_limits,
)
from hf_momentum.dynamics.moments import LinearModel, sgdm_moments
from hf_momentum.dynamics.stability import critical_lr, stationary_variance

BETAS = (0.0, 0.5, 0.9)
SCHEDULES = {
    "constant": [1.0] * 120,
    "steps": [1.0] * 60 + [0.1] * 40 + [0.01] * 20,
    "linear": [1 - k / 120 for k in range(120)],
}


def modes(curvature, gradient, noise, variance=0.0):
    shape = np.shape(curvature) or (1,)
    return Modes(*(np.broadcast_to(np.asarray(each, float), shape) for each in (curvature, gradient, noise, variance)))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("schedule", ["constant", "steps"])
def test_one_mode_is_the_step_by_step_recursion(beta, schedule):
    curvature, distance, s2, v, lr, factors = 1.3, 2.0, 0.4, 0.5, 0.6, SCHEDULES[schedule]
    noise = s2 + v * distance  # what is measured at the start
    found = expected_loss(modes(curvature, curvature**2 * distance, noise, v), 0.0, lr, beta, pieces_of(factors))
    moment = reference_second_moment(curvature, distance, s2, v, [lr * factor for factor in factors], beta)
    assert found == pytest.approx(0.5 * curvature * moment, rel=1e-10)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("schedule", ["constant", "steps"])
def test_several_modes_are_the_exact_moments_of_the_dynamics(beta, schedule):
    curvature, x0, s2, v = np.array([0.3, 1.0, 2.0]), np.array([1.0, -2.0, 0.5]), np.array([0.1, 0.5, 0.0]), 0.2
    factors, lr = SCHEDULES[schedule], 0.5
    model = LinearModel.quadratic(curvature, s2, curvature_variance=v)
    (last,) = sgdm_moments(model, x0, [lr * factor for factor in factors], beta, at=[len(factors)])
    second = np.diag(last.covariance)[:3] + last.mean[:3] ** 2
    given = modes(curvature, (curvature * x0) ** 2, s2 + v * x0**2, v)
    assert expected_loss(given, 0.0, lr, beta, pieces_of(factors)) == pytest.approx(0.5 * curvature @ second, rel=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_long_runs_reach_the_stationary_loss(beta):
    found = expected_loss(modes(1.0, 4.0, 0.3 + 0.2 * 4.0, 0.2), 0.0, 0.7, beta, [Piece(1.0, 100_000)])
    assert found == pytest.approx(0.5 * stationary_variance(1.0, 0.3, 0.7, beta, 0.2), rel=1e-9)


def test_stationary_ratio_of_the_paper():
    for h, ratio in ((0.01, 1.005), (0.1, 1.050), (0.5, 1.32), (1.0, 1.95), (1.5, 3.84)):
        found = log_loss_ratio(modes(1.0, 1e-9, 1.0), 0.0, h, 0.9, [Piece(1.0, 20_000)])
        assert math.exp(found) == pytest.approx(ratio, rel=0.005)


@pytest.mark.parametrize("beta", BETAS)
def test_a_smooth_schedule_in_pieces_is_near_the_exact_one(beta):
    steps = 2000
    factors = [1 - k / steps for k in range(steps)]
    pieces = pieces_of(factors)
    moment = reference_second_moment(1.0, 1.0, 0.5, 0.0, [0.5 * factor for factor in factors], beta)
    assert len(pieces) <= 50
    assert sum(piece.steps for piece in pieces) == steps
    assert sum(piece.steps * piece.factor for piece in pieces) == pytest.approx(sum(factors))
    assert expected_loss(modes(1.0, 1.0, 0.5), 0.0, 0.5, beta, pieces) == pytest.approx(0.5 * moment, rel=0.05)


def test_pieces_of_steps_are_exact_and_a_warmup_from_0_is_cut():
    assert pieces_of(SCHEDULES["steps"]) == [
        Piece(1.0, 60),
        Piece(pytest.approx(0.1), 40),
        Piece(pytest.approx(0.01), 20),
    ]
    warm = pieces_of([k / 100 for k in range(100)] + [1.0] * 900)
    assert sum(piece.steps for piece in warm) == 1000
    assert warm[-1].factor == 1.0
    assert pieces_of([0.0, 0.0, 0.0]) == [Piece(0.0, 3)]


@pytest.mark.parametrize("curvature", [0.0, -0.5, 1e-6])
def test_flat_modes_descend_linearly_as_in_the_warm_up_case(curvature):
    gradient, lr, steps, beta = 0.3, 0.1, 40, 0.9
    given = modes(curvature, gradient, 7.0)
    sgd = expected_loss(given, 2.0, lr, 0.0, [Piece(1.0, steps)])
    sgdm = expected_loss(given, 2.0, lr, beta, [Piece(0.5, 15), Piece(0.5, 25)])
    assert sgd == pytest.approx(2.0 - lr * steps * gradient)
    way = sum(0.5 * (1 - beta**k) for k in range(1, steps + 1))
    assert sgdm == pytest.approx(2.0 - lr * way * gradient)
    assert expected_loss(given, 0.5, lr, 0.0, [Piece(1.0, steps)]) == 0


def test_a_slow_mode_is_continuous_where_it_becomes_flat():
    gradient, lr, steps = 0.3, 0.1, 100
    below, above = (
        expected_loss(modes(c, gradient, 0.0), 1e4, lr, 0.9, [Piece(1.0, steps)]) for c in (0.00099, 0.00101)
    )
    assert 1e4 - below == pytest.approx(1e4 - above, rel=0.01)


def test_what_the_modes_leave_of_the_loss_stays_and_dilutes_the_ratio():
    given, pieces = modes(1.0, 1.0, 1.0), [Piece(1.0, 1000)]
    alone = log_loss_ratio(given, 0.5, 1.5, 0.9, pieces)
    among = log_loss_ratio(given, 50.5, 1.5, 0.9, pieces)
    assert alone == pytest.approx(math.log(3.84), rel=0.01)
    kept = 50 + stationary_variance(1.0, 1.0, 1.5) / 2, 50 + stationary_variance(1.0, 1.0, 1.5, 0.9) / 2
    assert among == pytest.approx(math.log(kept[0] / kept[1]), rel=1e-6)


def test_limits_are_those_of_the_dynamics():
    given = modes([2.0, 0.5, -1.0, 0.0], 1.0, 1.0, 0.3)
    for beta in BETAS:
        found = stability_limits(given, beta)
        assert found[:2] == pytest.approx([critical_lr(2.0, beta, 0.3), critical_lr(0.5, beta, 0.3)])
        assert np.isinf(found[2:]).all()


def test_lost_runs_count_alike_and_nothing_counts_as_nothing():
    given, pieces = modes(1.0, 1.0, 1.0), [Piece(1.0, 100_000)]
    assert log_loss_ratio(given, 0.5, 50.0, 0.9, pieces) == 0  # above both limits
    sgdm = expected_loss(given, 0.5, 3.0, 0.9, pieces)
    assert log_loss_ratio(given, 0.5, 3.0, 0.9, pieces) == pytest.approx(math.log(LOST * 1.5 / sgdm))
    assert np.isinf(expected_loss(given, 0.5, 3.0, 0.0, pieces))
    assert log_loss_ratio(modes(1.0, 0.0, 0.0), 0.0, 3.0, 0.9, pieces) == 0
    assert expected_loss(modes(1.0, 0.0, 0.0), 0.0, 3.0, 0.0, pieces) == 0
    assert abs(log_loss_ratio(given._replace(noise=np.zeros(1)), 0.5, 0.5, 0.9, pieces)) < 1e-6


def test_many_settings_at_once_are_each_of_them():
    given, pieces, lrs = modes([1.0, 0.2], 0.3, 0.5, 0.1), [Piece(1.0, 50)], np.array([0.1, 1.0, 1.9])
    together = log_loss_ratio(given, 1.0, lrs, 0.9, pieces)
    assert together == pytest.approx([float(log_loss_ratio(given, 1.0, lr, 0.9, pieces)) for lr in lrs], abs=1e-14)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_hundred_thousand_steps_take_little_time(schedule):
    steps, rng = 100_000, np.random.default_rng(0)
    factors = np.ones(steps) if schedule == "constant" else 1 - np.arange(steps) / steps
    given, pieces = Modes(*rng.uniform(0.1, 1, (4, 20))), pieces_of(factors)
    start = time.process_time()
    log_loss_ratio(given, 1.0, 0.01, 0.9, pieces)
    assert time.process_time() - start < (0.02 if schedule == "constant" else 0.2)

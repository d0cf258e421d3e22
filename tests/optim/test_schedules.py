"""Learning rate conversions, the averaged learning rate and the momentum schedules."""

import copy
import math
import pickle
import random
import time

import numpy as np
import pytest
import torch

from hf_momentum.errors import UserError
from hf_momentum.optim import (
    MOMENTUM_SCHEDULES,
    SGDM,
    averaged_lr,
    effective_lr,
    heavy_ball_lr,
    momentum_schedule,
)
from hf_momentum.optim.schedules import reference_averaged_lr

EXAMPLES = {
    "constant": {"momentum": 0.8},
    "linear": {"start": 0.0, "end": 0.9, "over": 0.5},
    "cosine": {"start": 0.95, "end": 0.5},
    "step": {"values": [0.9, 0.5, 0.0], "milestones": [0.5, 0.75]},
    "scaling": {"scale": 0.5, "alpha": 0.5},
}


def random_run(seed, n=60):
    rng = random.Random(seed)
    betas = [0.0 if rng.random() < 0.2 else rng.random() * 0.99 for _ in range(n)]
    return [rng.random() for _ in range(n)], betas


def test_conversions_are_each_others_inverse():
    assert effective_lr(0.1, 0.9) == pytest.approx(1.0)
    assert heavy_ball_lr(1.0, 0.9) == pytest.approx(0.1)
    assert effective_lr(0.3, 0) == heavy_ball_lr(0.3, 0) == 0.3
    assert effective_lr(heavy_ball_lr(0.37, 0.83), 0.83) == pytest.approx(0.37, rel=1e-15)
    assert torch.equal(effective_lr(torch.tensor(0.5), 0.5), torch.tensor(1.0))


@pytest.mark.parametrize("convert", [effective_lr, heavy_ball_lr])
def test_conversions_refuse_what_is_out_of_range(convert):
    with pytest.raises(UserError, match="Invalid momentum value: 1"):
        convert(0.1, 1.0)
    with pytest.raises(UserError, match="Invalid learning rate: -1"):
        convert(-1, 0.9)


@pytest.mark.parametrize("seed", range(5))
def test_averaged_lr_is_the_double_sum(seed):
    lrs, betas = random_run(seed)
    np.testing.assert_allclose(averaged_lr(lrs, betas), reference_averaged_lr(lrs, betas), rtol=1e-13, atol=0)


def test_averaged_lr_is_the_weight_of_each_gradient_in_the_endpoint():
    lrs, betas = random_run(9, n=30)
    x = torch.nn.Parameter(torch.zeros(30, dtype=torch.float64))
    optimizer = SGDM([x], lr=1.0, momentum=0.5)
    for k in range(30):
        optimizer.param_groups[0].update(lr=lrs[k], momentum=betas[k])
        x.grad = torch.eye(30, dtype=torch.float64)[k]
        optimizer.step()
    np.testing.assert_allclose(-x.detach().numpy(), averaged_lr(lrs, betas), rtol=1e-12)


def test_averaged_lr_of_constant_rates_is_the_rate_until_the_end_cuts_it():
    averaged = averaged_lr([0.1] * 300, 0.9)
    assert averaged[0] == pytest.approx(0.1, rel=1e-12)
    assert averaged[-1] == pytest.approx(0.1 * 0.1)
    assert averaged[-3] == pytest.approx(0.1 * (1 - 0.9**3))
    assert averaged_lr(torch.full((3,), 0.5), torch.zeros(3)) == averaged_lr(np.full(3, 0.5), 0) == [0.5] * 3
    assert averaged_lr([], []) == []


def test_averaged_lr_is_linear_in_time():
    start = time.perf_counter()
    averaged_lr([0.1] * 200_000, 0.9)
    assert time.perf_counter() - start < 5  # the double sum would take hours


def test_averaged_lr_refuses_bad_runs():
    with pytest.raises(UserError, match="2 learning rates and 3 momenta"):
        averaged_lr([0.1, 0.2], [0.9] * 3)
    with pytest.raises(UserError, match=r"Invalid momentum value: 1\.0"):
        averaged_lr([0.1], [1.0])
    with pytest.raises(UserError, match=r"Invalid learning rate: -0\.1"):
        averaged_lr([-0.1], 0.9)


@pytest.mark.parametrize("name", EXAMPLES)
def test_schedules_are_pure_values_in_range(name):
    schedule = momentum_schedule(name, **EXAMPLES[name])
    betas = [schedule(k, 40, 0.3) for k in range(45)]
    assert all(0 <= beta < 1 for beta in betas)
    assert betas == [schedule(k, 40, 0.3) for k in range(45)]
    for other in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert other == schedule
    with pytest.raises(AttributeError):
        schedule.momentum = 0.1
    with pytest.raises(UserError, match="Invalid total_steps: 0"):
        schedule(0, 0, 0.1)
    with pytest.raises(UserError, match="Invalid step: -1"):
        schedule(-1, 10, 0.1)


def test_every_schedule_has_an_example():
    assert set(EXAMPLES) == set(MOMENTUM_SCHEDULES)


def test_values_of_schedules():
    assert momentum_schedule("constant")(7, 10, 0.1) == 0.9
    linear = momentum_schedule("linear", **EXAMPLES["linear"])
    assert [linear(k, 8, 0.1) for k in (0, 1, 2, 4, 8, 99)] == pytest.approx([0, 0.225, 0.45, 0.9, 0.9, 0.9])
    cosine = momentum_schedule("cosine", start=0.0, end=0.8)
    expected = [0.4 * (1 - math.cos(math.pi * k / 6)) for k in range(7)]
    assert [cosine(k, 6, 0.1) for k in range(7)] == pytest.approx(expected)
    assert (cosine(0, 6, 0.1), cosine(6, 6, 0.1)) == (0.0, 0.8)
    step = momentum_schedule("step", **EXAMPLES["step"])
    assert [step(k, 8, 0.1) for k in (0, 3, 4, 5, 6, 7, 9)] == [0.9, 0.9, 0.5, 0.5, 0.0, 0.0, 0.0]


def test_step_and_ramp_stretch_with_the_steps():
    for name in ("linear", "cosine", "step"):
        schedule = momentum_schedule(name, **EXAMPLES[name])
        assert [schedule(k, 40, 0.1) for k in range(40)] == [schedule(3 * k, 120, 0.1) for k in range(40)]


def test_the_scaling_regime_follows_the_learning_rate():
    scaling = momentum_schedule("scaling", scale=0.5, alpha=0.5, max_momentum=0.99)
    for lr in (1.0, 0.25, 0.01):
        assert 1 - scaling(0, 10, lr) == pytest.approx(0.5 * lr**0.5)
    assert scaling(0, 10, 0.0) == scaling(0, 10, 1e-9) == 0.99
    assert momentum_schedule("scaling", scale=0.1, alpha=0)(0, 10, 0.0) == pytest.approx(0.9)
    with pytest.raises(UserError, match=r"λ at most 0\.5"):
        momentum_schedule("scaling", scale=0.6, alpha=0.5)(0, 10, 4.0)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("cosin", {}, r"Unknown momentum schedule 'cosin'\. Did you mean 'cosine'\? Allowed: constant, cosine"),
        ("linear", {"start": 0, "stop": 0.9}, "'stop'.*Allowed: end, over, start"),
        ("linear", {"start": 0}, "needs end"),
        ("linear", {"start": 0, "end": 1.0}, r"Invalid momentum value: 1\.0"),
        ("linear", {"start": 0, "end": 0.9, "over": 0}, "Invalid over: 0"),
        ("constant", {"momentum": -0.1}, r"Invalid momentum value: -0\.1"),
        ("step", {"values": [0.9], "milestones": [0.5]}, "1 milestones need 2 values, not 1"),
        ("step", {"values": [0.9, 0.5], "milestones": [80]}, "fractions of the run"),
        ("step", {"values": [0.9, 0.5, 0.1], "milestones": [0.5, 0.5]}, "rising"),
        ("scaling", {"scale": 0, "alpha": 0.5}, "Invalid scale: 0"),
        ("scaling", {"scale": 1, "alpha": 1}, "Invalid alpha: 1"),
    ],
)
def test_bad_schedules_are_refused(name, kwargs, message):
    with pytest.raises(UserError, match=message):
        momentum_schedule(name, **kwargs)

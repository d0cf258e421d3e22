"""SGD and SGDM on paths: the optimizer's own steps, schedules, streams."""

import copy
import tracemalloc

import numpy as np
import pytest
import torch

from hf_momentum import SGDM
from hf_momentum.dynamics import iterates as iterates_module
from hf_momentum.dynamics.iterates import Rates, iterates, last_iterate
from hf_momentum.dynamics.oracle import MinibatchOracle, NoisyGradientOracle
from hf_momentum.dynamics.overparametrised import TwoLayerNet
from hf_momentum.dynamics.problems import LinearRegression, Quadratic
from hf_momentum.dynamics.sde import sme
from hf_momentum.errors import UserError
from hf_momentum.optim import averaged_lr
from hf_momentum.optim.sgdm import reference_sgdm_step


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


NET = TwoLayerNet(normal(4, 2), normal(9, seed=1))
ORACLES = {
    "quadratic": NoisyGradientOracle(Quadratic(normal(3, 3) @ normal(3, 3).T), torch.tensor([1.0, 0.5, 2.0]).double()),
    "net": NoisyGradientOracle(NET, lambda x: x.square()),
    "mini-batches": MinibatchOracle(LinearRegression(normal(6, 2), normal(6)), 2, replacement=False),
    "svag": MinibatchOracle(NET, 2).svag(4.0),
}
MOMENTA = [0.0, 0.9, lambda k: (0.0, 0.5, 0.9, 0.0, 0.99)[k % 5]]


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("name", ORACLES)
def test_equals_the_optimizer_path_by_path(name, momentum):
    oracle, steps = ORACLES[name], 40
    x0, lr = normal(7, oracle.problem.dim, seed=2), lambda k: 0.1 / (1 + k)
    parameter = torch.nn.Parameter(x0.clone())
    beta = momentum if callable(momentum) else lambda k: momentum
    optimizer = SGDM([parameter], lr=lr(0), momentum=0.9 if callable(momentum) else momentum)
    draws = generator(5)
    stream = iterates(oracle, x0, lr, momentum, steps=steps, generator=generator(5))
    assert torch.equal(next(stream).x, x0)
    for k, state in enumerate(stream):
        parameter.grad = oracle.sample(parameter.detach(), draws)
        optimizer.param_groups[0].update(lr=lr(k), momentum=beta(k))
        optimizer.step()
        assert state.step == k + 1
        torch.testing.assert_close(state.x, parameter.detach(), rtol=1e-12, atol=1e-12)
        if momentum != 0:
            buffer = optimizer.state[parameter]["momentum_buffer"]
            torch.testing.assert_close(state.m, buffer, rtol=1e-12, atol=1e-12)
    assert (state.x - x0).abs().max() > 1e-2


def test_schedules_can_be_numbers_sequences_or_functions():
    oracle, x0 = ORACLES["quadratic"], normal(4, 3)
    ends = []
    for lr, momentum in ((0.1, 0.8), ([0.1] * 9, (0.8,) * 9), (lambda k: 0.1, np.full(9, 0.8))):
        *_, last = iterates(oracle, x0, lr, momentum, steps=9, generator=generator())
        ends.append(last.x)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_states_are_yielded_every_so_many_steps():
    run = lambda every, steps: [  # noqa: E731
        (state.step, state.x.clone())
        for state in iterates(
            ORACLES["quadratic"], normal(4, 3), 0.1, 0.9, steps=steps, generator=generator(), every=every
        )
    ]
    dense = dict(run(1, 10))
    assert [step for step, _ in run(4, 10)] == [0, 4, 8, 10]
    assert all(torch.equal(x, dense[step]) for step, x in run(4, 10))
    assert [step for step, _ in run(5, 10)] == [0, 5, 10]
    assert [step for step, _ in run(3, 0)] == [0]


def test_start_points_stay_and_momenta_can_be_given():
    oracle, x0, m0 = ORACLES["quadratic"], normal(4, 3), normal(4, 3, seed=3)
    kept, kept_m = x0.clone(), m0.clone()
    *_, last = iterates(oracle, x0, 0.1, 0.5, steps=1, generator=generator(), m0=m0)
    expected = 0.5 * m0 + 0.5 * oracle.sample(x0, generator())
    torch.testing.assert_close(last.m, expected)
    torch.testing.assert_close(last.x, x0 - 0.1 * expected)
    assert torch.equal(x0, kept)
    assert torch.equal(m0, kept_m)


@pytest.mark.parametrize("name", ORACLES)
def test_blocks_of_paths_change_nothing_but_the_noise(name, monkeypatch):
    oracle, x0, seen = ORACLES[name], normal(7, ORACLES[name].problem.dim), []
    monkeypatch.setattr(iterates_module, "_CPU_BLOCK", 3 * oracle.problem.dim)  # blocks of 3, 3 and 1 paths
    draw = type(oracle).draw

    def spy(*args):
        drawn = draw(*args)
        seen.append(copy.deepcopy(drawn))  # the next step uses the memory of `drawn` again
        return drawn

    monkeypatch.setattr(type(oracle), "draw", spy)
    *_, last = iterates(oracle, x0, 0.1, MOMENTA[2], steps=6, generator=generator())
    x, m = list(x0.split(3)), [torch.zeros_like(block) for block in x0.split(3)]
    for k in range(6):
        for i in range(3):
            x[i], m[i] = reference_sgdm_step(x[i], m[i], oracle(x[i], seen[3 * k + i]), 0.1, MOMENTA[2](k))
    torch.testing.assert_close(last.x, torch.cat(x))
    torch.testing.assert_close(last.m, torch.cat(m))
    sde = sme(oracle, x0, 0.1, steps=1, generator=generator())
    sgd = iterates(oracle.gaussian(), x0, 0.1, steps=1, generator=generator())
    torch.testing.assert_close(list(sde)[-1].x, list(sgd)[-1].x)


def test_memory_does_not_grow_with_the_steps():
    oracle, x0 = ORACLES["quadratic"], normal(4, 3)

    def peak(steps):
        pointers = set()
        tracemalloc.start()
        for state in iterates(oracle, x0, lambda k: 0.01, 0.9, steps=steps, generator=generator()):
            pointers.add((state.x.data_ptr(), state.m.data_ptr()))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size, pointers

    peak(100)
    short, long = peak(200), peak(2000)
    assert long[0] < short[0] + 5_000  # bytes; one float per step would be 48,000 more
    assert len(long[1]) == 1


def test_averaged_rates():
    lrs, momenta = [0.1, 0.2, 0.05, 0.3], [0.9, 0.0, 0.5, 0.8]
    averaged = Rates(lrs, momenta, 4).averaged()
    assert [averaged[k] for k in range(4)] == [(lr, 0.0) for lr in averaged_lr(lrs, momenta)]
    assert Rates(0.1, 0.9, 4).averaged()[3] == (0.1, 0.0)  # a constant run has no end


BAD = [
    ({"lr": -0.1}, "Invalid learning rate"),
    ({"momentum": 1.0}, "Invalid momentum"),
    ({"momentum": -0.1}, "Invalid momentum"),
    ({"momentum": [0.5, 1.0, 0.5]}, "Invalid momentum"),
    ({"lr": [0.1, 0.1]}, "2 values of the learning rate for 3 steps"),
    ({"steps": 2.5}, "Invalid steps"),
    ({"every": 0}, "Invalid every"),
    ({"x0": torch.zeros(3)}, "do not fit"),
    ({"x0": torch.zeros(4, 2)}, "do not fit"),
    ({"x0": torch.zeros(4, 3, dtype=torch.long)}, "do not fit"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_refused_at_once(change, message):
    arguments = {"x0": normal(4, 3), "lr": 0.1, "momentum": 0.9, "steps": 3, **change}
    with pytest.raises(UserError, match=message):
        iterates(ORACLES["quadratic"], **arguments)


def test_bad_values_of_functions_are_refused_when_they_come():
    stream = iterates(ORACLES["quadratic"], normal(4, 3), 0.1, lambda k: 0.5 + 0.5 * k, steps=3)
    next(stream), next(stream)
    with pytest.raises(UserError, match="Invalid momentum value"):
        next(stream)


def test_the_last_iterate_is_that_of_the_stream():
    options = {"steps": 7, "m0": normal(5, 3, seed=2)}
    *_, streamed = iterates(ORACLES["quadratic"], normal(5, 3), 0.1, 0.9, generator=generator(4), **options)
    last = last_iterate(ORACLES["quadratic"], normal(5, 3), 0.1, 0.9, generator=generator(4), **options)
    assert last.step == streamed.step == 7
    assert torch.equal(last.x, streamed.x)
    assert torch.equal(last.m, streamed.m)
    assert torch.equal(last_iterate(ORACLES["quadratic"], normal(5, 3), 0.1, steps=0).x, normal(5, 3))

"""SGD and SGDM (Eq. 3) on many paths at once, as streams: memory does not grow with the steps."""

from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from hf_momentum.dynamics.oracle import Oracle
from hf_momentum.errors import UserError
from hf_momentum.optim import averaged_lr
from hf_momentum.optim.schedules import check_momentum, check_nonnegative, is_real

_CPU_BLOCK = 2**17  # numbers in a block of paths

Schedule = float | Sequence[float] | Callable[[int], float]


class Iterate(NamedTuple):
    """The state after some steps; the tensors are live, and the next step overwrites them.

    Attributes:
        step: k, the number of steps made.
        x: Positions x_k, `(paths, dim)`.
        m: Momenta m_k, `(paths, dim)`; without momentum the last gradient.
    """

    step: int
    x: Tensor
    m: Tensor


def iterates(
    oracle: Oracle,
    x0: Tensor,
    lr: Schedule,
    momentum: Schedule = 0.0,
    *,
    steps: int,
    generator: Generator | None = None,
    every: int = 1,
    m0: Tensor | None = None,
) -> Iterator[Iterate]:
    """Run SGDM, `m⁺ = β_k m + (1−β_k) g`, `x⁺ = x − η_k m⁺` (Eq. 3); momentum 0 is SGD.

    Args:
        oracle: Source of the noisy gradients.
        x0: Start points, `(paths, dim)`; they are not changed.
        lr: Effective learning rates η_k: a number, a sequence of at least `steps` numbers, or a function of k.
        momentum: Momenta β_k in [0, 1), likewise.
        steps: Number of steps.
        generator: Source of the draws, on x0's device. Runs on oracles of one kind whose generators were seeded alike
            get the same noise.
        every: States are yielded after 0, `every`, `2·every`, … and after all steps.
        m0: Momenta to start from; None is 0 (Eq. 3).

    Returns:
        The stream of states.
    """
    rates = Rates(lr, momentum, steps)
    check_stream(oracle, x0, every)
    return _run(oracle, x0, rates, generator, every, m0)


def _run(
    oracle: Oracle, x0: Tensor, rates: "Rates", generator: Generator | None, every: int, m0: Tensor | None
) -> Iterator[Iterate]:
    x, m = x0.clone(), torch.zeros_like(x0) if m0 is None else m0.clone()
    size = block_size(x)
    blocks, buffer, draws = list(zip(x.split(size), m.split(size), strict=True)), torch.empty_like(x[:size]), {}
    yield Iterate(0, x, m)
    for k in range(rates.steps):
        lr, momentum = rates[k]
        for x_block, m_block in blocks:
            paths = len(x_block)
            draws[paths] = draw = oracle.draw(x_block, generator, draws.get(paths))
            if momentum == 0:
                gradient = oracle(x_block, draw, m_block)
                if gradient is not m_block:
                    m_block.copy_(gradient)
            else:
                m_block.lerp_(oracle(x_block, draw, buffer[:paths]), 1 - momentum)
            x_block.add_(m_block, alpha=-lr)
        if (k + 1) % every == 0 or k + 1 == rates.steps:
            yield Iterate(k + 1, x, m)


def last_iterate(
    oracle: Oracle,
    x0: Tensor,
    lr: Schedule,
    momentum: Schedule = 0.0,
    *,
    steps: int,
    generator: Generator | None = None,
    m0: Tensor | None = None,
) -> Iterate:
    """Run as `iterates` does, and give the state after the last step alone.

    Args:
        oracle: Source of the noisy gradients.
        x0: Start points, `(paths, dim)`.
        lr: Effective learning rates η_k.
        momentum: Momenta β_k.
        steps: Number of steps.
        generator: Source of randomness.
        m0: Start momenta, `(paths, dim)`; None is 0.

    Returns:
        The state.
    """
    *_, last = iterates(oracle, x0, lr, momentum, steps=steps, generator=generator, every=max(1, steps), m0=m0)
    return last


def block_size(x: Tensor) -> int:
    """Choose how many paths to step at once: on the CPU as many as stay in its cache, elsewhere all.

    All simulations use it, so that seeded alike they share their noise.

    Args:
        x: Positions, `(paths, dim)`.

    Returns:
        The number of paths.
    """
    return max(1, _CPU_BLOCK // x.shape[1] if x.device.type == "cpu" else len(x))


class Rates:
    """The learning rate and the momentum of every step, checked as they are read.

    Args:
        lr: η_k.
        momentum: β_k.
        steps: Number of steps.

    Raises:
        UserError: If a rate is out of range, or a sequence too short.
    """

    def __init__(self, lr: Schedule, momentum: Schedule, steps: int) -> None:
        if not isinstance(steps, Integral) or steps < 0:
            raise UserError(f"Invalid steps: {steps!r}. It must be an integer of at least 0.")
        self.steps = int(steps)
        self.constant = is_real(lr) and is_real(momentum)
        self._lr = self._schedule("learning rate", lr, lambda value: check_nonnegative("learning rate", value))
        self._momentum = self._schedule("momentum", momentum, check_momentum)

    def _schedule(self, label: str, values: Schedule, check: Callable[[float], float]) -> Callable[[int], float]:
        if callable(values):
            return lambda k: check(values(k))
        if hasattr(values, "__len__"):
            if len(values) < self.steps:
                raise UserError(f"There are {len(values)} values of the {label} for {self.steps} steps.")
            values = [check(float(value)) for value in values]
            return values.__getitem__
        value = check(values)
        return lambda k: value

    def __getitem__(self, k: int) -> tuple[float, float]:
        """Give η_k and β_k."""
        return self._lr(k), self._momentum(k)

    def averaged(self) -> "Rates":
        """Give the rates of the SGD that matches: η̄_k and no momentum.

        Constant rates stay (η̄ = η; the end of the run is not truncated). Schedules are expanded, O(steps) numbers.

        Returns:
            The rates.
        """
        if self.constant:
            return Rates(self[0][0], 0.0, self.steps)
        lrs, momenta = zip(*(self[k] for k in range(self.steps)), strict=True)
        return Rates(averaged_lr(lrs, momenta), 0.0, self.steps)


def check_stream(oracle: Oracle, x0: Tensor, every: int) -> None:
    """Check what all simulations take.

    Args:
        oracle: Source of the noisy gradients.
        x0: Start points.
        every: Steps between states.

    Raises:
        UserError: If shapes do not fit or a number is out of range.
    """
    if x0.ndim != 2 or x0.shape[1] != oracle.problem.dim or not x0.is_floating_point():
        raise UserError(
            f"Start points of shape {tuple(x0.shape)} and type {x0.dtype} do not fit: "
            f"give floating-point (paths, {oracle.problem.dim})."
        )
    if not isinstance(every, Integral) or every < 1:
        raise UserError(f"Invalid every: {every!r}. It must be an integer of at least 1.")

"""The stochastic modified equation (SME) of SGD and of SGDM, and its integrators.

Over `t = kη` it is `dX = −λ_t ∇L dt + λ_t σ √η Σ^{1/2} dW` with `λ_t = η̄/η`. Here time is counted in steps, `s = t/η`,
so that step k is the unit interval with the learning rate η̄_k and the base η drops out:

    dX = −η̄_k ∇L(X) ds + η̄_k σ Σ(X)^{1/2} dW_s      for k ≤ s < k + 1

Wang et al. (arXiv 2307.15196); Li, Tai, E (arXiv 1511.06251) for SGD.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Generator, Tensor

from hf_momentum.dynamics.iterates import Iterate, Rates, Schedule, block_size, check_stream
from hf_momentum.dynamics.moments import LinearModel, Moments, evolve
from hf_momentum.dynamics.oracle import Oracle
from hf_momentum.errors import UserError


def sme(
    oracle: Oracle,
    x0: Tensor,
    lr: Schedule,
    momentum: Schedule = 0.0,
    *,
    steps: int,
    substeps: int = 1,
    generator: Generator | None = None,
    bridge: Generator | None = None,
    every: int = 1,
) -> Iterator[Iterate]:
    """Integrate the SME by Euler–Maruyama with `substeps` equal substeps per step of the algorithm.

    The Brownian increment of a step is exactly the draw of Gaussian SGD; `bridge` only says how it is distributed over
    the substeps. So seed `generator` as that of `iterates` to couple both, and refine without breaking the coupling.
    With one substep this is SGD at η̄ with Gaussian noise.

    Args:
        oracle: Its L, Σ and σ; the law of its noise does not matter.
        x0: Start points, `(paths, dim)`.
        lr: Effective learning rates η_k.
        momentum: Momenta β_k of the algorithm; they enter through η̄ alone.
        steps: Steps of the algorithm.
        substeps: Substeps per step.
        generator: Source of the increments, on x0's device.
        bridge: Source of the bridges between them; needed for more than one substep.
        every: States are yielded after 0, `every`, `2·every`, … and after all steps.

    Returns:
        The stream of states; `m` is the last slope.

    Raises:
        UserError: If an argument is out of range, or `bridge` is missing.
    """
    check_stream(oracle, x0, every)
    if substeps < 1 or (substeps > 1 and bridge is None):
        raise UserError(
            f"{substeps} substeps: give at least 1, and for more than one a generator of their own in `bridge`."
        )
    return _euler(oracle.gaussian(), x0, Rates(lr, momentum, steps).averaged(), substeps, generator, bridge, every)


def _euler(
    oracle: Oracle,
    x0: Tensor,
    rates: Rates,
    substeps: int,
    generator: Generator | None,
    bridge: Generator | None,
    every: int,
) -> Iterator[Iterate]:
    x, slope, draws = x0.clone(), torch.zeros_like(x0), {}
    size = block_size(x)
    blocks = list(zip(x.split(size), slope.split(size), strict=True))
    yield Iterate(0, x, slope)
    for k in range(rates.steps):
        lr, _ = rates[k]
        for x_block, slope_block in blocks:
            paths = len(x_block)
            draws[paths] = draw = oracle.draw(x_block, generator, draws.get(paths))
            for increment in _increments(draw, substeps, bridge):
                gradient = oracle(x_block, increment, slope_block)
                if gradient is not slope_block:
                    slope_block.copy_(gradient)
                x_block.add_(slope_block, alpha=-lr / substeps)
        if (k + 1) % every == 0 or k + 1 == rates.steps:
            yield Iterate(k + 1, x, slope)


def _increments(total: Tensor, substeps: int, bridge: Generator | None) -> Iterator[Tensor]:
    # Splits W(1) = total into n increments w, each yielded as n·w: given what remains of W over r substeps, the next
    # w is N(rest / r, (1 − 1/r) / n).
    if substeps == 1:
        yield total
        return
    rest, noise = total.clone(), torch.empty_like(total)
    for r in range(substeps, 0, -1):
        increment = noise.normal_(generator=bridge).mul_(((1 - 1 / r) / substeps) ** 0.5).add_(rest, alpha=1 / r)
        rest.sub_(increment)
        yield increment * substeps


def sme_moments(
    model: LinearModel, x0: ArrayLike, lr: Schedule, momentum: Schedule = 0.0, *, at: Iterable[int]
) -> Iterator[Moments]:
    """Give the SME's exact mean and covariance on a quadratic: the Ornstein–Uhlenbeck law, by matrix exponentials.

    Args:
        model: The quadratic, with additive noise.
        x0: Start point, `(dim,)` or a number.
        lr: Effective learning rates η_k.
        momentum: Momenta β_k of the algorithm.
        at: Rising numbers of steps after which to give the law.

    Returns:
        The stream of moments of x.
    """
    at = list(at)
    rates = Rates(lr, momentum, max(at, default=0)).averaged()
    mean, zero = np.broadcast_to(np.asarray(x0, float), (model.dim,)), np.zeros_like(model.hessian)
    transition = lambda k, mean, covariance: ou_transition(model, rates[k][0])  # noqa: E731
    return evolve(mean, zero, model.minimiser, at, transition, rates.constant)


def ou_transition(model: LinearModel, lr: float) -> tuple[np.ndarray, np.ndarray]:
    """Give the exact step of the SME on a quadratic with additive noise.

    Args:
        model: The quadratic.
        lr: η̄_k.

    Returns:
        `e^{−ηH}` and the covariance `η² σ² ∫₀¹ e^{−ηHs} Σ e^{−ηHs} ds`, both `(dim, dim)`.
    """
    values, vectors = np.linalg.eigh(model.hessian)
    rates = lr * (values[:, None] + values[None, :])
    with np.errstate(divide="ignore", invalid="ignore"):
        integral = np.where(rates == 0, 1.0, -np.expm1(-rates) / rates)
    noise = lr**2 * integral * (vectors.T @ model.additive_noise() @ vectors)
    return vectors @ np.diag(np.exp(-lr * values)) @ vectors.T, vectors @ noise @ vectors.T


def ou_paths(
    model: LinearModel,
    x0: Tensor,
    lr: Schedule,
    momentum: Schedule = 0.0,
    *,
    steps: int,
    generator: Generator | None = None,
    every: int = 1,
) -> Iterator[Iterate]:
    """Sample the SME on a quadratic without discretisation error, by the exact Ornstein–Uhlenbeck step.

    Args:
        model: The quadratic, with additive noise.
        x0: Start points, `(paths, dim)`.
        lr: Effective learning rates η_k.
        momentum: Momenta β_k of the algorithm.
        steps: Steps of the algorithm.
        generator: Source of the normals, on x0's device.
        every: States are yielded after 0, `every`, `2·every`, … and after all steps.

    Yields:
        The states; `m` is 0.
    """
    rates, minimiser = Rates(lr, momentum, steps).averaged(), torch.as_tensor(model.minimiser).to(x0)
    x, normals, zero = x0 - minimiser, torch.empty_like(x0), torch.zeros_like(x0)
    yield Iterate(0, x + minimiser, zero)
    last = None
    for k in range(rates.steps):
        if rates[k][0] != last:
            last = rates[k][0]
            decay, covariance = ou_transition(model, last)
            values, vectors = np.linalg.eigh(covariance)
            root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
            decay, root = (torch.as_tensor(matrix).to(x0) for matrix in (decay, root))
        x = torch.addmm(x @ decay, normals.normal_(generator=generator), root)
        if (k + 1) % every == 0 or k + 1 == rates.steps:
            yield Iterate(k + 1, x + minimiser, zero)

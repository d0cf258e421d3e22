"""How large the gradient is and how noisy: unbiased estimates with intervals, from the gradients of micro-batches."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hf_momentum.diagnostics.estimates import Estimate, Jackknifed, fieller, pair_statistics
from hf_momentum.diagnostics.probe import Probe, Vector, inner_products
from hf_momentum.errors import UserError


@dataclass(frozen=True)
class GradientNoise:
    """The gradient and its noise at the present weights.

    Attributes:
        gradient_squared_norm: `|∇L|²`.
        noise_trace: trΣ, the trace of the covariance of one example's gradient; a batch of B has `trΣ/B`.
        noise_scale: `trΣ/|∇L|²`, in examples: the simple gradient noise scale (McCandlish et al., arXiv 1812.06162).
            In a batch of that size, noise and gradient are equally large.
        batch_size: b, examples in each micro-batch measured.
    """

    gradient_squared_norm: Estimate
    noise_trace: Estimate
    noise_scale: Estimate
    batch_size: int


def noise_from_products(
    squares: np.ndarray, rows: np.ndarray, batch_size: int, population: int | None = None
) -> GradientNoise:
    """Estimate from two numbers a micro-batch.

    Without replacement from N examples the batches' gradients are correlated by `−S/N`, with `S = Σ N/(N−1)`: pairs
    then give `|∇L|² − trS/N` and `trS/b`, which is undone here. The standard error of `|∇L|²` is multiplied by
    `√(1 − Mb/N)` (Cochran, Sampling Techniques, 1977): exact for its part from single batches, too cautious for the
    rest.

    Args:
        squares: `(M,)`, the `|g_i|²`, for at least 3 micro-batches.
        rows: `(M,)`, the `g_i·S`.
        batch_size: b, examples in each micro-batch.
        population: N, if the batches were drawn from N examples without replacement. ∇L and Σ are then those of the N
            examples.

    Returns:
        The estimates.

    Raises:
        UserError: If there are too few micro-batches or not that many examples, or a number is not finite.
    """
    check_batch_size(batch_size)
    gradient, noise = pair_statistics(squares, rows)
    trace = noise.scaled(batch_size)
    if population is not None:
        seen = len(squares) * batch_size
        if not seen <= population:
            raise UserError(f"{seen} examples cannot be drawn without replacement from {population}.")
        shrink = math.sqrt(1 - seen / population)
        mean = gradient.value + trace.value / population
        left_out = gradient.left_out + trace.left_out / population
        gradient = Jackknifed(mean, mean + shrink * (left_out - mean))
        trace = trace.scaled((population - 1) / population)
    ratio = fieller(trace, gradient, nonnegative=True)
    return GradientNoise(gradient.estimate(), trace.estimate(nonnegative=True), ratio, batch_size)


def measure_noise(
    probe: Probe, batches: Iterable[Any], batch_size: int, population: int | None = None
) -> GradientNoise:
    """Estimate `|∇L|²`, trΣ and the simple gradient noise scale in two passes over micro-batches.

    Two gradients are in memory at a time. Under `torch.distributed` every rank calls this with batches of its own,
    and all get the estimates from all batches.

    Args:
        probe: The model and its loss, the mean over a batch's examples.
        batches: Micro-batches of `batch_size` different examples each (drop an incomplete last one), at least 3 over
            all ranks.
        batch_size: b.
        population: As in `noise_from_products`.

    Returns:
        The estimates.
    """
    batches = checked_batches(batches)
    total, squares = gradient_sum(probe, batches)
    rows = project_gradients(probe, batches, [total])
    return noise_from_products(squares, rows[:, 0], batch_size, population)


def gradient_sum(probe: Probe, batches: Sequence[Any]) -> tuple[Vector, np.ndarray]:
    """Sum the gradients of micro-batches over all ranks.

    Args:
        probe: The model and its loss.
        batches: This rank's micro-batches.

    Returns:
        The sum S, and the `(M,)` squared norms of the gradients of all ranks.
    """
    total: Vector = []
    squares = torch.zeros(len(batches), dtype=torch.float64)
    for index, batch in enumerate(batches):
        gradient = probe.gradient(batch)
        squares[index] = inner_products([gradient], [gradient])
        total = total or [torch.zeros_like(g) for g in gradient]
        for accumulated, addend in zip(total, gradient, strict=True):
            accumulated += addend
    return sum_over_ranks(total), gather_over_ranks(squares)


def project_gradients(probe: Probe, batches: Sequence[Any], directions: Sequence[Vector]) -> np.ndarray:
    """Give the inner products of each micro-batch's gradient with fixed vectors.

    Args:
        probe: The model and its loss.
        batches: This rank's micro-batches.
        directions: k vectors, the same on all ranks.

    Returns:
        `(M, k)`, rank after rank.
    """
    rows = [inner_products([probe.gradient(batch)], directions) for batch in batches]
    return gather_over_ranks(torch.cat(rows))


def sum_over_ranks(vector: Vector) -> Vector:
    """Sum a vector over the ranks of `torch.distributed`, in place.

    Args:
        vector: This rank's.

    Returns:
        The same tensors, with the sum.
    """
    if _is_distributed():
        for tensor in vector:
            dist.all_reduce(tensor)
    return vector


def gather_over_ranks(rows: Tensor) -> np.ndarray:
    """Join the rows of all ranks, of which each may have another number.

    Args:
        rows: This rank's, on the CPU.

    Returns:
        All rows, rank after rank.
    """
    if not _is_distributed():
        return rows.numpy()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows.numpy())
    return np.concatenate(parts)


def checked_batches(batches: Iterable[Any]) -> list[Any]:
    """Hold the batches, which are gone through more than once.

    Args:
        batches: This rank's.

    Returns:
        Them.

    Raises:
        UserError: If there are none.
    """
    batches = list(batches)
    if not batches:
        raise UserError("There are no batches to measure on. Every process needs at least one micro-batch.")
    return batches


def check_batch_size(batch_size: int) -> None:
    """Refuse what is no number of examples.

    Args:
        batch_size: b.

    Raises:
        UserError: If it is not an integer of at least 1.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(
            f"Invalid batch_size: {batch_size!r}. It is the number of examples in a micro-batch, 1 or more."
        )


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

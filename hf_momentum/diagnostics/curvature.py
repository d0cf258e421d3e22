"""How curved the loss is: sharpness and its eigenvectors, curvature under gradient and noise, and by mini-batch.

Sources: the one-step descent `E ΔL = −η|∇L|² + ½η² ∇LᵀH∇L + ½η² tr(HΣ)/B` (Wang et al., arXiv 2307.15196;
McCandlish et al., arXiv 1812.06162); Lanczos on Hessians of networks (Ghorbani, Krishnan, Xiao, arXiv 1901.10159).
SciPy's `eigsh` looks for convergence only after a whole basis of products, and keeps that on the CPU; so the iteration
is written out here.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from hf_momentum.diagnostics.estimates import Estimate, fieller, mean_of, pair_statistics
from hf_momentum.diagnostics.noise import (
    check_batch_size,
    checked_batches,
    gather_over_ranks,
    gradient_sum,
    project_gradients,
    sum_over_ranks,
)
from hf_momentum.diagnostics.probe import Probe, Vector, inner_products
from hf_momentum.errors import UserError


@dataclass(frozen=True)
class RitzPairs:
    """The largest eigenvalues of a Hessian, approximated from below in a Krylov space.

    Attributes:
        values: Ritz values, the largest first. The first one is the sharpness λ_max.
        vectors: Their unit vectors, each one tensor per parameter.
        errors: Residuals `|Hu − θu|`, which bound the distance of each value from *an* eigenvalue (Parlett, The
            Symmetric Eigenvalue Problem, 1998); mostly far above it.
        products: Hessian–vector products that it took.
        is_converged: Whether all errors are within the tolerance.
    """

    values: tuple[float, ...]
    vectors: tuple[Vector, ...]
    errors: tuple[float, ...]
    products: int
    is_converged: bool


def top_eigenpairs(
    probe: Probe,
    batches: Iterable[Any],
    count: int = 1,
    tolerance: float = 0.01,
    max_products: int = 60,
    seed: int = 0,
) -> RitzPairs:
    """Find the algebraically largest eigenvalues of the Hessian of the mean loss over batches.

    They belong to these batches: the λ_max of few examples is larger than that of the full loss. `measure_modes` on
    other batches estimates the curvature of the full loss along the vectors, which is at most its λ_max. The iteration
    starts from the gradient, much of which lies along the top eigenvectors (Gur-Ari, Roberts, Dyer, arXiv 1812.04754),
    plus a random vector as long, since an eigenvector may be orthogonal to the gradient. One vector per product is
    kept in memory.

    Args:
        probe: The model and its loss.
        batches: Of equal size. With a single one its graph is kept in memory and each product costs one backward
            pass; with more, all passes are run for each product. Under `torch.distributed`, each rank's own.
        count: Eigenvalues wanted.
        tolerance: Error allowed, relative to the largest one.
        max_products: Products allowed; the result tells whether they sufficed.
        seed: Of the random part of the start.

    Returns:
        The pairs.
    """
    batches = checked_batches(batches)
    generator = torch.Generator(probe.device).manual_seed(seed)
    start = probe.flatten(gradient_sum(probe, batches)[0])
    start /= start.norm().clamp_min(torch.finfo(start.dtype).tiny)
    chance = _random_like(start, generator)
    start += chance / chance.norm()
    with _mean_hessian(probe, batches) as multiply:
        values, coefficients, errors, basis = lanczos(multiply, start, generator, count, tolerance, max_products)
    vectors = []
    for column in coefficients.T:
        vector = torch.zeros_like(basis[0])
        for weight, direction in zip(column, basis, strict=True):
            vector.add_(direction, alpha=float(weight))
        vectors.append(probe.unflatten(vector))
    is_converged = bool(max(errors) <= tolerance * abs(values[0]))
    return RitzPairs(tuple(map(float, values)), tuple(vectors), tuple(map(float, errors)), len(basis), is_converged)


@contextmanager
def _mean_hessian(probe: Probe, batches: Sequence[Any]) -> Iterator[Callable[[Tensor], Tensor]]:
    count = sum_over_ranks([torch.tensor(float(len(batches)), device=probe.device)])[0]

    def over_ranks(product: Tensor) -> Tensor:
        return sum_over_ranks([product])[0] / count

    if len(batches) == 1:
        with probe.hessian(batches[0]) as multiply:
            yield lambda flat: over_ranks(probe.flatten(multiply(probe.unflatten(flat))))
    else:

        def product(flat: Tensor) -> Tensor:
            total = torch.zeros_like(flat)
            for batch in batches:
                total += probe.flatten(probe.hvp(batch, [probe.unflatten(flat)])[0])
            return over_ranks(total)

        yield product


def lanczos(
    multiply: Callable[[Tensor], Tensor],
    start: Tensor,
    generator: torch.Generator | None = None,
    count: int = 1,
    tolerance: float = 0.01,
    max_products: int = 60,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Tensor]]:
    """Lanczos iteration with full reorthogonalisation, until the largest Ritz values have converged.

    They have once their residuals are within the tolerance after two products in a row: the first values to settle
    need not be the largest. Still, of two close eigenvalues the smaller may be taken for the largest (of 9 and 8.5
    above a random bulk, in 4% of simulated runs); a smaller tolerance tells them apart.

    Args:
        multiply: The symmetric operator on vectors `(n,)`.
        start: A vector `(n,)` other than 0.
        generator: Source of a new direction where the Krylov space is exhausted.
        count: Eigenvalues wanted, at most n.
        tolerance: Error allowed, relative to the largest Ritz value.
        max_products: Products allowed, at least `count`.

    Returns:
        The Ritz values, the largest first, their coefficients `(m, count)` in the basis, their residuals, and the
        basis of m vectors.

    Raises:
        UserError: If an argument is out of range, or a product is not finite.
    """
    most = min(len(start), max_products)
    if not 1 <= count <= most or not tolerance > 0:
        raise UserError(
            f"Cannot find {count} of {len(start)} eigenvalues to the tolerance {tolerance:g} with {max_products} "
            "products: count must be at least 1 and at most both others, and the tolerance positive."
        )
    basis = [start / start.norm()]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    settled = 0
    while True:
        product = multiply(basis[-1])
        diagonal.append(float(product @ basis[-1]))
        if not math.isfinite(diagonal[-1]):
            raise UserError("A Hessian–vector product is not finite. Measure in float32 or float64.")
        rest = _orthogonalise(product, basis)
        norm = float(rest.norm())
        found = _ritz(diagonal, off_diagonal, norm, min(count, len(basis)))
        within = len(basis) >= count and found[2].max() <= tolerance * abs(found[0][0])
        settled = settled + 1 if within else 0
        if settled == 2 or len(basis) == most:
            return *found, basis
        if norm <= 10 * torch.finfo(rest.dtype).eps * max(map(abs, diagonal)):  # the Krylov space is exhausted
            rest, norm = _orthogonalise(_random_like(start, generator), basis), 0.0
        basis.append(rest / rest.norm())
        off_diagonal.append(norm)


def _random_like(vector: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(vector.shape, generator=generator, device=vector.device, dtype=vector.dtype)


def _orthogonalise(vector: Tensor, basis: list[Tensor]) -> Tensor:
    # The newest direction first: the largest part of a product lies there and before it.
    rest = vector.clone()
    for direction in reversed(basis):
        rest.sub_(direction, alpha=float(direction @ rest))
    return rest


def _ritz(
    diagonal: list[float], off_diagonal: list[float], norm: float, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest `count` eigenpairs of the tridiagonal matrix, and the residuals of the Ritz pairs."""
    values, coefficients = eigh_tridiagonal(diagonal, off_diagonal)
    values, coefficients = values[::-1][:count], coefficients[:, ::-1][:, :count]
    return values, coefficients, norm * np.abs(coefficients[-1])


@dataclass(frozen=True)
class CurvatureTerms:
    """What the Hessian makes of the gradient and of its noise.

    Attributes:
        gradient_curvature: `∇LᵀH∇L`, of the curvature-induced term.
        noise_curvature: `tr(HΣ)`, of the noise-induced term; a batch of B has `tr(HΣ)/B`.
        noise_scale: `B_noise = tr(HΣ)/∇LᵀH∇L`, in examples: in a batch of that size both terms are equally large. It
            may be negative far from minima.
        batch_sharpness: `E[g_bᵀH_b g_b]/E|g_b|²` at the measured batch size (Andreyev, Beneventano, arXiv 2412.20553).
        batch_size: b, examples in each micro-batch measured.
    """

    gradient_curvature: Estimate
    noise_curvature: Estimate
    noise_scale: Estimate
    batch_sharpness: Estimate
    batch_size: int


def curvature_from_products(squares: np.ndarray, forms: np.ndarray, batch_size: int) -> CurvatureTerms:
    """Estimate from blocks of three micro-batches, each of which gives the Hessian once.

    For independent batches 1, 2, 3 let `d = g₁ − g₂` and `s = g₁ + g₂`. Then `½ dᵀH₃d = tr(HΣ)/b` and
    `¼ (sᵀH₃s − dᵀH₃d) = g₁ᵀH₃g₂ = ∇LᵀH∇L` in expectation. The three rotations of a block are averaged, and blocks are
    independent.

    Args:
        squares: `(K, 3)`, the `|g_i|²` of K blocks.
        forms: `(K, 3, 3, 3)`, the `g_iᵀ H_h g_j` of each block, in the order h, i, j.
        batch_size: b.

    Returns:
        The estimates.
    """
    check_batch_size(batch_size)
    noise, gradient = np.zeros(len(forms)), np.zeros(len(forms))
    for h, i, j in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        noise += (forms[:, h, i, i] + forms[:, h, j, j] - 2 * forms[:, h, i, j]) / 6
        gradient += forms[:, h, i, j] / 3
    trace, curvature = mean_of(noise).scaled(batch_size), mean_of(gradient)
    own = mean_of(np.stack([forms[:, i, i, i] for i in range(3)], axis=1).reshape(-1))
    return CurvatureTerms(
        gradient_curvature=curvature.estimate(),
        noise_curvature=trace.estimate(),
        noise_scale=fieller(trace, curvature),
        batch_sharpness=fieller(own, mean_of(squares.reshape(-1))),
        batch_size=batch_size,
    )


def measure_curvature(probe: Probe, batches: Iterable[Any], batch_size: int) -> CurvatureTerms:
    """Estimate `∇LᵀH∇L`, `tr(HΣ)`, their ratio and the batch sharpness.

    A micro-batch costs two gradients and three Hessian–vector products; three gradients are in memory at a time.

    Args:
        probe: The model and its loss, the mean over a batch's examples.
        batches: Micro-batches of `batch_size` different examples each. Whole threes are used, at least two of them
            over all ranks; the intervals need about eight.
        batch_size: b.

    Returns:
        The estimates.

    Raises:
        UserError: If a rank has fewer than three micro-batches.
    """
    batches = list(batches)
    blocks = [batches[start : start + 3] for start in range(0, len(batches) - 2, 3)]
    if not blocks:
        raise UserError(f"{len(batches)} micro-batches are too few: curvature terms are measured on blocks of three.")
    squares, forms = [], []
    for block in blocks:
        gradients = [probe.gradient(batch) for batch in block]
        squares.append(torch.stack([inner_products([g], [g])[0, 0] for g in gradients]))
        forms.append(torch.stack([probe.quadratic_forms(batch, gradients) for batch in block]))
    gathered = gather_over_ranks(torch.stack(squares)), gather_over_ranks(torch.stack(forms))
    return curvature_from_products(*gathered, batch_size)


@dataclass(frozen=True)
class Mode:
    """One direction u of the weights, on batches that had no part in finding it.

    Attributes:
        eigenvalue: The Ritz value.
        gradient_squared: `(uᵀ∇L)²`, unbiased.
        noise: `uᵀΣu`, of one example; a batch of B has `uᵀΣu/B`.
        curvature: `uᵀHu`; None where it was not asked for.
        curvature_variance: `v = Var(uᵀH_b u)` over micro-batches of b examples; proportional to 1/b. None likewise.
    """

    eigenvalue: float
    gradient_squared: Estimate
    noise: Estimate
    curvature: Estimate | None
    curvature_variance: Estimate | None


def measure_modes(
    probe: Probe, batches: Iterable[Any], pairs: RitzPairs, batch_size: int, with_curvature: int = 1
) -> tuple[Mode, ...]:
    """Estimate gradient and noise along Ritz vectors, and how the curvature along the first ones differs by batch.

    Args:
        probe: The model and its loss, the mean over a batch's examples.
        batches: Micro-batches of `batch_size` different examples each, at least 3 over all ranks. Take others than
            those that the vectors were found on, which are more curved along them.
        pairs: The Ritz pairs.
        batch_size: b.
        with_curvature: For how many of the first vectors the batches' curvature is measured: one product each and
            batch.

    Returns:
        One mode per pair.
    """
    check_batch_size(batch_size)
    batches = checked_batches(batches)
    gradients = project_gradients(probe, batches, pairs.vectors)
    curved = pairs.vectors[:with_curvature]
    curvatures = curvatures_along(probe, batches, curved) if curved else np.empty((0, 0))
    modes = []
    for index, eigenvalue in enumerate(pairs.values):
        squared, noise = _moments(gradients[:, index])
        curvature = variance = None
        if index < len(curved):
            curvature = mean_of(curvatures[:, index]).estimate()
            variance = _moments(curvatures[:, index])[1].estimate(nonnegative=True)
        trace = noise.scaled(batch_size).estimate(nonnegative=True)
        modes.append(Mode(eigenvalue, squared.estimate(), trace, curvature, variance))
    return tuple(modes)


def directional_sharpness(probe: Probe, batches: Iterable[Any], direction: Vector) -> Estimate:
    """Estimate `pᵀHp/|p|²` along an update direction p (Pan, Li, arXiv 2306.00204).

    Args:
        probe: The model and its loss.
        batches: At least 2 over all ranks, independent of p.
        direction: p, one tensor per parameter, the same on all ranks: an optimizer's update, or a gradient.

    Returns:
        The estimate.
    """
    return mean_of(curvatures_along(probe, checked_batches(batches), [direction])[:, 0]).estimate()


def curvatures_along(probe: Probe, batches: Sequence[Any], directions: Sequence[Vector]) -> np.ndarray:
    """Give the curvature of each micro-batch's loss along directions, `uᵀH_b u/|u|²`.

    Args:
        probe: The model and its loss.
        batches: This rank's micro-batches.
        directions: k vectors other than 0, the same on all ranks.

    Returns:
        `(M, k)`, rank after rank.

    Raises:
        UserError: If a direction is 0 or not finite.
    """
    squares = torch.stack([inner_products([u], [u])[0, 0] for u in directions])
    if not (squares.isfinite() & (squares > 0)).all():
        raise UserError("Curvature needs a direction that is finite and not 0.")
    rows = [probe.quadratic_forms(batch, directions).diagonal() / squares for batch in batches]
    return gather_over_ranks(torch.stack(rows))


def _moments(samples: np.ndarray) -> tuple:
    # Squared mean and variance of numbers: the U-statistics in one dimension.
    return pair_statistics(samples**2, samples * samples.sum())

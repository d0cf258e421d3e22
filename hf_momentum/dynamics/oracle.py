"""NGOS, noisy gradient oracles with a scale parameter: `g = ∇L(x) + σ v`, `E v = 0`, `Cov v = Σ(x)`.

Wang et al. (arXiv 2307.15196), definition of the NGOS; SVAG after Li, Malladi, Arora (arXiv 2102.12470).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Generator, Tensor

from hf_momentum.dynamics.problems import FiniteSum, FunctionProblem, LeastSquares, Loss, Problem, as_tensor
from hf_momentum.errors import UserError
from hf_momentum.optim import svag_coefficients
from hf_momentum.optim.schedules import check_nonnegative, unknown_name

# Eigenvalues that are less negative than this part of the largest one are taken for rounding.
_ROUNDING = 1e-6

Draw = Any  # one step's random numbers: a tensor, or a pair of draws for SVAG
Covariance = float | Tensor | Callable[[Tensor], Tensor]


def _normals(out: Tensor, generator: Generator | None) -> Tensor:
    if out.dtype == torch.float64 and out.device.type == "cpu":  # inversion: normal_ takes about twice as long there
        return out.uniform_(-1, 1, generator=generator).erfinv_().mul_(math.sqrt(2))
    return out.normal_(generator=generator)


def _signs(out: Tensor, generator: Generator | None) -> Tensor:
    return out.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


_LAWS = {"gaussian": _normals, "rademacher": _signs}


class Oracle(ABC):
    """A source of noisy gradients for many paths at once.

    Attributes:
        problem: The loss L.
        scale: σ.
    """

    problem: Problem
    scale: float

    @abstractmethod
    def draw(self, x: Tensor, generator: Generator | None = None, out: Draw | None = None) -> Draw:
        """Draw the random numbers of one step; their law does not depend on the positions.

        Args:
            x: Positions, `(paths, dim)`, of which only shape, dtype and device are used.
            generator: Source of randomness on x's device; None is torch's global one.
            out: An earlier draw, whose memory may be used again.

        Returns:
            What a call of the oracle takes.
        """

    @abstractmethod
    def __call__(self, x: Tensor, draw: Draw, out: Tensor | None = None) -> Tensor:
        """Give each path its noisy gradient.

        Args:
            x: Positions, `(paths, dim)`.
            draw: What `draw` gave; it is not changed.
            out: A buffer like `x` that may be written to, and then is what is returned.

        Returns:
            `∇L(x) + σ v`, `(paths, dim)`.
        """

    @abstractmethod
    def covariance(self, x: Tensor) -> Tensor:
        """Give the covariance of v.

        Args:
            x: Positions, `(paths, dim)`.

        Returns:
            Σ(x), `(paths, dim, dim)`.
        """

    def sample(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw and evaluate at once.

        Args:
            x: Positions, `(paths, dim)`.
            generator: Source of randomness on x's device.

        Returns:
            `∇L(x) + σ v`, `(paths, dim)`.
        """
        return self(x, self.draw(x, generator))

    def gaussian(self) -> "Oracle":
        """Give the oracle with the same L, Σ and σ whose v is Gaussian and made from `(paths, …)` standard normals.

        Returns:
            The oracle that the SDEs integrate.
        """
        return NoisyGradientOracle(self.problem, self.covariance, scale=self.scale)

    def svag(self, ell: float) -> "SvagOracle":
        """Give the oracle of SVAG.

        Args:
            ell: ℓ of at least 1.

        Returns:
            The oracle with the same mean and ℓ times the noise covariance.
        """
        return SvagOracle(self, ell)


class NoisyGradientOracle(Oracle):
    """An oracle whose noise is `v = Σ(x)^{1/2} ξ` with independent standardised ξ of a given law.

    Args:
        loss: A `Problem`, or a differentiable function from `(paths, dim)` to `(paths,)` (give `dim` with it).
        covariance: Σ. A number is a multiple of the identity, a tensor `(dim,)` the diagonal, `(dim, dim)` the matrix;
            a function of x gives `(paths, dim)` for diagonals or `(paths, dim, dim)`.
        noise: `"gaussian"`, or `"rademacher"` for signs.
        scale: σ ≥ 0.
        dim: Number of parameters, for a bare function only.

    Raises:
        UserError: If Σ is not symmetric positive semi-definite (a function's values are checked when they are used),
            or another argument is out of range.
    """

    def __init__(
        self,
        loss: Problem | Loss,
        covariance: Covariance = 1.0,
        noise: str = "gaussian",
        scale: float = 1.0,
        *,
        dim: int | None = None,
    ) -> None:
        if not isinstance(loss, Problem):
            if dim is None:
                raise UserError("A loss given as a bare function needs dim, its number of parameters.")
            loss = FunctionProblem(loss, dim)
        if noise not in _LAWS:
            raise UserError(unknown_name("noise", noise, _LAWS))
        self.problem, self.noise, self.scale = loss, noise, check_nonnegative("scale", scale)
        self._covariance, self._root = covariance, None
        if not callable(covariance):
            self._covariance = as_tensor(covariance)
            if self._covariance.shape not in ((), (loss.dim,), (loss.dim, loss.dim)):
                raise UserError(
                    f"A covariance of shape {tuple(self._covariance.shape)} does not fit {loss.dim} parameters: give "
                    f"a number, ({loss.dim},) or ({loss.dim}, {loss.dim})."
                )
            self._root = covariance_root(self._covariance, diagonal=self._covariance.ndim < 2) * self.scale
            self._multiple = float(self._root) if self._root.ndim == 0 else None

    @property
    def constant_covariance(self) -> Tensor | None:
        """Σ, `(dim, dim)`, or None if it depends on x."""
        if self._root is None:
            return None
        sigma, dim = self._covariance, self.problem.dim
        return sigma if sigma.ndim == 2 else sigma.expand(dim).diag()

    def draw(self, x: Tensor, generator: Generator | None = None, out: Tensor | None = None) -> Tensor:
        """See `Oracle.draw`; ξ, `(paths, dim)`."""
        return _LAWS[self.noise](torch.empty_like(x) if out is None else out, generator)

    def __call__(self, x: Tensor, draw: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Oracle.__call__`."""
        gradient = self.problem.gradient(x, out=out)
        if self._root is None:
            sigma = self._covariance(x)
            root, scale = covariance_root(sigma, diagonal=sigma.ndim == 2), self.scale
            if root.ndim == 2:
                return gradient.addcmul_(draw, root, value=scale)
            return gradient.add_((root @ draw[..., None])[..., 0], alpha=scale)
        if self._multiple is not None:
            return gradient.add_(draw, alpha=self._multiple)
        root = self._root.to(x)
        return gradient.addcmul_(draw, root) if root.ndim == 1 else gradient.addmm_(draw, root)

    def covariance(self, x: Tensor) -> Tensor:
        """See `Oracle.covariance`."""
        if self._root is not None:
            return self.constant_covariance.to(x).expand(*x.shape, self.problem.dim)
        sigma = self._covariance(x)
        return sigma.diag_embed() if sigma.ndim == 2 else sigma

    def gaussian(self) -> "NoisyGradientOracle":
        """See `Oracle.gaussian`."""
        return NoisyGradientOracle(self.problem, self._covariance, "gaussian", self.scale)


class LabelNoiseOracle(Oracle):
    """Fresh noise on the labels of a least-squares loss: `v = √(c/N) Jᵀ ε`, `Σ = (c/N) JᵀJ`, which on Γ is c times H.

    Args:
        problem: The loss, with residuals whose targets are perturbed.
        variance: c ≥ 0, the variance of the label noise.
        noise: Law of ε: `"rademacher"` or `"gaussian"`.
        scale: σ ≥ 0.

    Raises:
        UserError: If the loss has no residuals, or another argument is out of range.
    """

    def __init__(
        self, problem: LeastSquares, variance: float = 1.0, noise: str = "rademacher", scale: float = 1.0
    ) -> None:
        if not isinstance(problem, LeastSquares):
            raise UserError(f"Label noise needs a LeastSquares problem, not {type(problem).__name__}.")
        if noise not in _LAWS:
            raise UserError(unknown_name("noise", noise, _LAWS))
        self.problem, self.noise = problem, noise
        self.variance, self.scale = check_nonnegative("variance", variance), check_nonnegative("scale", scale)

    def draw(self, x: Tensor, generator: Generator | None = None, out: Tensor | None = None) -> Tensor:
        """See `Oracle.draw`; ε, `(paths, N)`."""
        out = x.new_empty(len(x), self.problem.examples) if out is None else out
        return _LAWS[self.noise](out, generator)

    def __call__(self, x: Tensor, draw: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Oracle.__call__`."""
        n = self.problem.examples
        weights = self.problem.residuals(x) / n + draw * (self.scale * math.sqrt(self.variance / n))
        return self.problem.pull(x, weights)

    def covariance(self, x: Tensor) -> Tensor:
        """See `Oracle.covariance`."""
        jacobian = self.problem.jacobian(x)
        return jacobian.mT @ jacobian * (self.variance / self.problem.examples)

    def gaussian(self) -> "LabelNoiseOracle":
        """See `Oracle.gaussian`."""
        return LabelNoiseOracle(self.problem, self.variance, "gaussian", self.scale)


class MinibatchOracle(Oracle):
    """Gradients of random mini-batches; Σ is the per-example gradient covariance.

    Args:
        problem: The examples' losses.
        batch_size: B.
        replacement: Draw with replacement, `σ² = 1/B`, or without, `σ² = (N−B) / (B(N−1))`.

    Raises:
        UserError: If the loss is no sum over examples, or the batch size is out of range.
    """

    def __init__(self, problem: FiniteSum, batch_size: int, replacement: bool = True) -> None:
        if not isinstance(problem, FiniteSum):
            raise UserError(f"Mini-batches need a FiniteSum problem, not {type(problem).__name__}.")
        n = problem.examples
        if not isinstance(batch_size, Integral) or batch_size < 1 or (batch_size > n and not replacement):
            allowed = "at least 1" if replacement else f"in 1 … {n}, the number of examples"
            raise UserError(f"Invalid batch_size: {batch_size!r}. It must be an integer {allowed}.")
        self.problem, self.batch_size, self.replacement = problem, int(batch_size), replacement
        variance = 1 / batch_size if replacement or n == 1 else (n - batch_size) / (batch_size * (n - 1))
        self.scale = math.sqrt(variance)

    def draw(self, x: Tensor, generator: Generator | None = None, out: Tensor | None = None) -> Tensor:
        """See `Oracle.draw`; the examples' weights, `(paths, N)`, of sum 1."""
        shape, n, options = (len(x), self.batch_size), self.problem.examples, {"device": x.device}
        if self.replacement:
            chosen = torch.randint(n, shape, generator=generator, **options)
        else:
            chosen = torch.rand(len(x), n, generator=generator, **options).topk(self.batch_size).indices
        out = x.new_zeros(len(x), n) if out is None else out.zero_()
        return out.scatter_add_(1, chosen, x.new_full((1, 1), 1 / self.batch_size).expand(shape))

    def __call__(self, x: Tensor, draw: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Oracle.__call__`."""
        return self.problem.weighted_gradient(x, draw)

    def covariance(self, x: Tensor) -> Tensor:
        """See `Oracle.covariance`."""
        gradients = self.problem.example_gradients(x)
        centred = gradients - gradients.mean(1, keepdim=True)
        return centred.mT @ centred / self.problem.examples


class SvagOracle(Oracle):
    """Two independent draws a step, added as `r₁ g₁ + r₂ g₂`: the mean stays, σ² is multiplied by ℓ.

    Run it with `svag_hyperparameters`: learning rate η/ℓ, ℓ times the steps, β as it was.

    Args:
        base: The oracle to amplify.
        ell: ℓ ≥ 1; at 1 the coefficients are (1, 0).
    """

    def __init__(self, base: Oracle, ell: float) -> None:
        self.base, self.ell, self.coefficients = base, ell, svag_coefficients(ell)
        self.problem, self.scale = base.problem, base.scale * math.sqrt(ell)

    def draw(self, x: Tensor, generator: Generator | None = None, out: Draw | None = None) -> Draw:
        """See `Oracle.draw`; a pair of the base's draws."""
        first, second = out or (None, None)
        return self.base.draw(x, generator, first), self.base.draw(x, generator, second)

    def __call__(self, x: Tensor, draw: Draw, out: Tensor | None = None) -> Tensor:
        """See `Oracle.__call__`."""
        r1, r2 = self.coefficients
        return self.base(x, draw[0], out).mul_(r1).add_(self.base(x, draw[1]), alpha=r2)

    def covariance(self, x: Tensor) -> Tensor:
        """See `Oracle.covariance`; Σ is the base's, the factor ℓ is in σ."""
        return self.base.covariance(x)


def covariance_root(covariance: Tensor, diagonal: bool) -> Tensor:
    """Take the symmetric square root of covariances.

    Args:
        covariance: Σ, `(…, dim, dim)`, or anything if `diagonal`.
        diagonal: Whether these are variances, to be treated element by element.

    Returns:
        `Σ^{1/2}`, of the same shape.

    Raises:
        UserError: If a Σ is not symmetric positive semi-definite.
    """
    if diagonal:
        values, vectors = covariance, None
    else:
        if covariance.ndim < 2 or not torch.allclose(covariance, covariance.mT):
            raise UserError(f"A covariance of shape {tuple(covariance.shape)} is not symmetric.")
        values, vectors = torch.linalg.eigh(covariance)
    least, largest = values.min(), values.max()
    if not (least >= -_ROUNDING * largest.clamp(min=0) and largest.isfinite()):
        raise UserError(
            f"The covariance is not positive semi-definite: its {'variances' if diagonal else 'eigenvalues'} run from "
            f"{float(least):g} to {float(largest):g}. None may be negative."
        )
    root = values.clamp(min=0).sqrt()
    return root if diagonal else (vectors * root[..., None, :]) @ vectors.mT


__all__ = [
    "Covariance",
    "Draw",
    "LabelNoiseOracle",
    "MinibatchOracle",
    "NoisyGradientOracle",
    "Oracle",
    "SvagOracle",
    "covariance_root",
]

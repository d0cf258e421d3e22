"""Losses over many paths at once: what a problem is, quadratics and linear regression."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from hf_momentum.errors import UserError

Loss = Callable[[Tensor], Tensor]


class Problem(ABC):
    """A loss on `dim` parameters, evaluated on `(paths, dim)`; by default autograd gives the derivatives.

    Attributes:
        dim: Number of parameters.
    """

    dim: int

    @abstractmethod
    def loss(self, x: Tensor) -> Tensor:
        """Give the loss of each path.

        Args:
            x: Positions, `(paths, dim)`.

        Returns:
            L, `(paths,)`.
        """

    def __call__(self, x: Tensor) -> Tensor:
        """See `loss`."""
        return self.loss(x)

    def gradient(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Give the gradient of each path.

        Args:
            x: Positions, `(paths, dim)`.
            out: A buffer like `x` that may be written to, and then is what is returned.

        Returns:
            ∇L, `(paths, dim)`, never x itself.
        """
        return torch.func.grad(lambda x: self.loss(x).sum())(x)

    def hessian(self, x: Tensor) -> Tensor:
        """Give the Hessian of each path.

        Args:
            x: Positions, `(paths, dim)`.

        Returns:
            ∇²L, `(paths, dim, dim)`.
        """
        return torch.func.vmap(torch.func.jacrev(torch.func.grad(lambda point: self.loss(point[None])[0])))(x)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Copy the problem to another device or dtype.

        Args:
            *args: As for `torch.Tensor.to`.
            **kwargs: As for `torch.Tensor.to`.

        Returns:
            The copy.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v.to(*args, **kwargs) for k, v in values.items() if isinstance(v, Tensor)})


@dataclass(frozen=True, eq=False)
class FunctionProblem(Problem):
    """A loss given as a bare function.

    Attributes:
        function: Maps `(paths, dim)` to `(paths,)`, each path by itself, differentiably.
        dim: Number of parameters.
    """

    function: Loss
    dim: int

    def loss(self, x: Tensor) -> Tensor:
        """See `Problem.loss`."""
        return self.function(x)


@dataclass(frozen=True, eq=False)
class Quadratic(Problem):
    """`L = ½ (x−x*)ᵀ H (x−x*)`.

    Attributes:
        curvature: H as `(dim, dim)`, symmetric, or its diagonal as `(dim,)`.
        minimiser: x*, `(dim,)`; None is the origin.
    """

    curvature: Tensor
    minimiser: Tensor | None = None

    def __post_init__(self) -> None:
        curvature = as_tensor(self.curvature)
        object.__setattr__(self, "curvature", curvature)
        if curvature.ndim not in (1, 2) or (curvature.ndim == 2 and not torch.allclose(curvature, curvature.mT)):
            raise UserError(
                f"Invalid curvature of shape {tuple(curvature.shape)}. It must be a symmetric matrix (dim, dim), "
                "or the diagonal of one (dim,)."
            )
        if self.minimiser is not None:
            object.__setattr__(self, "minimiser", as_tensor(self.minimiser).to(curvature))

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return len(self.curvature)

    @property
    def matrix(self) -> Tensor:
        """H, `(dim, dim)`."""
        return self.curvature if self.curvature.ndim == 2 else self.curvature.diag()

    def loss(self, x: Tensor) -> Tensor:
        """See `Problem.loss`."""
        offset = x if self.minimiser is None else x - self.minimiser
        return 0.5 * (offset * self.gradient(x)).sum(-1)

    def gradient(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Problem.gradient`."""
        offset = x if self.minimiser is None else torch.sub(x, self.minimiser)
        if self.curvature.ndim == 1:
            return torch.mul(offset, self.curvature, out=out)
        return torch.matmul(offset, self.curvature, out=out)

    def hessian(self, x: Tensor) -> Tensor:
        """See `Problem.hessian`."""
        return self.matrix.expand(*x.shape, self.dim)


class FiniteSum(Problem):
    """The mean of N examples' losses, from which mini-batches are drawn.

    Attributes:
        examples: N.
    """

    examples: int

    @abstractmethod
    def example_losses(self, x: Tensor) -> Tensor:
        """Give the loss of each example.

        Args:
            x: Positions, `(paths, dim)`.

        Returns:
            Losses ℓ_i, `(paths, N)`.
        """

    def loss(self, x: Tensor) -> Tensor:
        """See `Problem.loss`."""
        return self.example_losses(x).mean(-1)

    def gradient(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Problem.gradient`."""
        return self.weighted_gradient(x, x.new_full((1, 1), 1 / self.examples).expand(len(x), self.examples))

    def weighted_gradient(self, x: Tensor, weights: Tensor) -> Tensor:
        """Give a weighted sum of the examples' gradients.

        Args:
            x: Positions, `(paths, dim)`.
            weights: w, `(paths, N)`; a mini-batch of B has 1/B on its examples.

        Returns:
            `Σ_i w_i ∇ℓ_i`, `(paths, dim)`.
        """
        return torch.func.grad(lambda x: (weights * self.example_losses(x)).sum())(x)

    def example_gradients(self, x: Tensor) -> Tensor:
        """Give the gradient of each example.

        Args:
            x: Positions, `(paths, dim)`.

        Returns:
            ∇ℓ_i, `(paths, N, dim)`.
        """
        return torch.func.vmap(torch.func.jacrev(lambda point: self.example_losses(point[None])[0]))(x)


class LeastSquares(FiniteSum):
    """`L = (1/2N) Σ r_i(x)²`; where all residuals vanish the Hessian is `JᵀJ / N`."""

    @abstractmethod
    def residuals(self, x: Tensor) -> Tensor:
        """Give the residuals.

        Args:
            x: Positions, `(paths, dim)`.

        Returns:
            r_i, `(paths, N)`.
        """

    def pull(self, x: Tensor, weights: Tensor) -> Tensor:
        """Multiply by the residuals' Jacobian from the left.

        Args:
            x: Positions, `(paths, dim)`.
            weights: w, `(paths, N)`.

        Returns:
            `Jᵀ w = Σ_i w_i ∇r_i`, `(paths, dim)`.
        """
        return torch.func.grad(lambda x: (weights * self.residuals(x)).sum())(x)

    def jacobian(self, x: Tensor) -> Tensor:
        """Give the residuals' Jacobian.

        Args:
            x: Positions, `(paths, dim)`.

        Returns:
            J, `(paths, N, dim)`.
        """
        return torch.func.vmap(torch.func.jacrev(lambda point: self.residuals(point[None])[0]))(x)

    def example_losses(self, x: Tensor) -> Tensor:
        """See `FiniteSum.example_losses`."""
        return 0.5 * self.residuals(x).square()

    def weighted_gradient(self, x: Tensor, weights: Tensor) -> Tensor:
        """See `FiniteSum.weighted_gradient`."""
        return self.pull(x, weights * self.residuals(x))

    def example_gradients(self, x: Tensor) -> Tensor:
        """See `FiniteSum.example_gradients`."""
        return self.residuals(x)[..., None] * self.jacobian(x)


@dataclass(frozen=True, eq=False)
class LinearRegression(LeastSquares):
    """Residuals `A x − y`.

    Attributes:
        features: A, `(N, dim)`.
        targets: y, `(N,)`.
    """

    features: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", as_tensor(self.features))
        object.__setattr__(self, "targets", as_tensor(self.targets).to(self.features))
        if self.features.ndim != 2 or self.targets.shape != self.features.shape[:1]:
            raise UserError(
                f"Features of shape {tuple(self.features.shape)} do not fit targets of shape "
                f"{tuple(self.targets.shape)}: give (N, dim) and (N,)."
            )

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return self.features.shape[1]

    @property
    def examples(self) -> int:
        """N."""
        return len(self.features)

    @property
    def matrix(self) -> Tensor:
        """The Hessian `AᵀA / N`, `(dim, dim)`."""
        return self.features.mT @ self.features / self.examples

    @property
    def minimiser(self) -> Tensor:
        """The minimiser of least norm, `(dim,)`."""
        return torch.linalg.pinv(self.features) @ self.targets

    def residuals(self, x: Tensor) -> Tensor:
        """See `LeastSquares.residuals`."""
        return x @ self.features.mT - self.targets

    def pull(self, x: Tensor, weights: Tensor) -> Tensor:
        """See `LeastSquares.pull`."""
        return weights @ self.features

    def jacobian(self, x: Tensor) -> Tensor:
        """See `LeastSquares.jacobian`."""
        return self.features.expand(len(x), *self.features.shape)

    def hessian(self, x: Tensor) -> Tensor:
        """See `Problem.hessian`."""
        return self.matrix.expand(*x.shape, self.dim)


def as_tensor(values: Any) -> Tensor:
    """Take tensors as they are and make float64 tensors of all else.

    Args:
        values: A tensor, array, number or nested sequence.

    Returns:
        The tensor.
    """
    return values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)

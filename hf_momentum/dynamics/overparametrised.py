"""Small least-squares models with more parameters than examples, whose minimisers form a manifold."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_momentum.dynamics.problems import LeastSquares, as_tensor
from hf_momentum.errors import UserError


@dataclass(frozen=True, eq=False)
class TwoLayerNet(LeastSquares):
    """A net `f(z) = Σ_j a_j tanh(w_j·z) / √width`, taught by a net of its own shape, which is therefore a minimiser.

    A path's parameters are all w_j, row by row, then all a_j. Overparametrised if `dim > N`.

    Attributes:
        inputs: z_i, `(N, features)`.
        minimiser: The teacher's parameters, `(width·(features + 1),)`.
    """

    inputs: Tensor
    minimiser: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", as_tensor(self.inputs))
        object.__setattr__(self, "minimiser", as_tensor(self.minimiser).to(self.inputs))
        if self.dim % (self.inputs.shape[1] + 1):
            raise UserError(
                f"{self.dim} parameters make no net on {self.inputs.shape[1]} features: "
                f"give a multiple of {self.inputs.shape[1] + 1}."
            )

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return len(self.minimiser)

    @property
    def examples(self) -> int:
        """N."""
        return len(self.inputs)

    def outputs(self, x: Tensor) -> Tensor:
        """Give the net's outputs.

        Args:
            x: Parameters, `(paths, dim)`.

        Returns:
            f(z_i), `(paths, N)`.
        """
        features = self.inputs.shape[1]
        width = self.dim // (features + 1)
        hidden = torch.tanh(x[:, : width * features].reshape(-1, width, features) @ self.inputs.mT)
        return torch.einsum("pw,pwn->pn", x[:, width * features :], hidden) / width**0.5

    def residuals(self, x: Tensor) -> Tensor:
        """See `LeastSquares.residuals`."""
        return self.outputs(x) - self.outputs(self.minimiser[None])


@dataclass(frozen=True, eq=False)
class MatrixFactorisation(LeastSquares):
    """Residuals are the entries of `U Vᵀ − M`. A path's parameters are U, row by row, then V.

    Attributes:
        target: M, `(rows, columns)`.
        rank: Columns of U `(rows, rank)` and of V `(columns, rank)`.
    """

    target: Tensor
    rank: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", as_tensor(self.target))

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return self.rank * sum(self.target.shape)

    @property
    def examples(self) -> int:
        """Number of entries of M."""
        return self.target.numel()

    @property
    def minimiser(self) -> Tensor:
        """The balanced minimiser `U = P √S`, `V = Q √S` of the truncated singular values, `(dim,)`."""
        left, values, right = torch.linalg.svd(self.target, full_matrices=False)
        missing = max(0, self.rank - len(values))
        factors = [
            torch.nn.functional.pad(f[:, : self.rank] * values[: self.rank].sqrt(), (0, missing))
            for f in (left, right.mT)
        ]
        return torch.cat([factor.flatten() for factor in factors])

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = self.target.shape
        u, v = x.split([rows * self.rank, columns * self.rank], dim=-1)
        return u.reshape(-1, rows, self.rank), v.reshape(-1, columns, self.rank)

    def residuals(self, x: Tensor) -> Tensor:
        """See `LeastSquares.residuals`."""
        u, v = self._factors(x)
        return (u @ v.mT - self.target).flatten(1)

    def pull(self, x: Tensor, weights: Tensor) -> Tensor:
        """See `LeastSquares.pull`."""
        u, v = self._factors(x)
        weights = weights.reshape(-1, *self.target.shape)
        return torch.cat([(weights @ v).flatten(1), (weights.mT @ u).flatten(1)], dim=-1)

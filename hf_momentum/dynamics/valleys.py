"""Losses of two parameters (x, y) whose minimisers form a curve Γ, with the slow SDE on it in closed form.

Φ(x) is the limit of the gradient flow from x, ∂Φ on Γ the projection on the tangent space, and with σ = O(1) the slow
SDE over `t = k η² σ²` is `dX = ∂Φ Σ^{1/2} dW + ½ ∂²Φ[Σ] dt`.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from scipy.special import wrightomega
from torch import Tensor

from hf_momentum.dynamics.problems import LeastSquares


class Valley(LeastSquares):
    """A least-squares loss of two parameters and one residual, whose gradient flow is known in closed form."""

    dim = 2
    examples = 1

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """Give the end of the gradient flow.

        Args:
            x: Positions, `(paths, 2)`.

        Returns:
            Φ(x) on Γ, `(paths, 2)`.
        """

    @abstractmethod
    def tangent_projection(self, x: Tensor) -> Tensor:
        """Give the projection on the tangent of Γ.

        Args:
            x: Positions on Γ, `(paths, 2)`.

        Returns:
            ∂Φ(x), `(paths, 2, 2)`.
        """

    @abstractmethod
    def slow_drift(self, x: Tensor, covariance: Tensor) -> Tensor:
        """Give the drift of the slow SDE.

        Args:
            x: Positions on Γ, `(paths, 2)`.
            covariance: Σ(x), `(paths, 2, 2)`.

        Returns:
            `½ ∂²Φ[Σ]`, `(paths, 2)`.
        """

    def pull(self, x: Tensor, weights: Tensor) -> Tensor:
        """See `LeastSquares.pull`."""
        return weights * self.jacobian(x)[:, 0]


class StraightValley(Valley):
    """`L = ½ a(y) x²` with a > 0: Γ is the line x = 0, along which the sharpness a(y) varies.

    On Γ only `∂²Φ_y/∂x² = −a'/(2a)` does not vanish, so the slow drift is `−Σ_xx a'/(4a)`.
    """

    @abstractmethod
    def sharpness(self, y: Tensor) -> Tensor:
        """Give a(y), of y's shape.

        Args:
            y: Second parameter.

        Returns:
            The only eigenvalue of the Hessian on Γ that is not 0.
        """

    @abstractmethod
    def relative_slope(self, y: Tensor) -> Tensor:
        """Give `a'(y)/a(y)`, of y's shape.

        Args:
            y: Second parameter.

        Returns:
            The slope of log a.
        """

    def residuals(self, x: Tensor) -> Tensor:
        """See `LeastSquares.residuals`."""
        return self.sharpness(x[:, 1:]).sqrt() * x[:, :1]

    def jacobian(self, x: Tensor) -> Tensor:
        """See `LeastSquares.jacobian`."""
        root = self.sharpness(x[:, 1]).sqrt()
        return torch.stack([root, 0.5 * root * self.relative_slope(x[:, 1]) * x[:, 0]], dim=-1)[:, None]

    def tangent_projection(self, x: Tensor) -> Tensor:
        """See `Valley.tangent_projection`."""
        return x.new_tensor([[0.0, 0.0], [0.0, 1.0]]).expand(len(x), 2, 2)

    def slow_drift(self, x: Tensor, covariance: Tensor) -> Tensor:
        """See `Valley.slow_drift`."""
        drift = -0.25 * covariance[:, 0, 0] * self.relative_slope(x[:, 1])
        return torch.stack([torch.zeros_like(drift), drift], dim=-1)


@dataclass(frozen=True, eq=False)
class QuadraticValley(StraightValley):
    """`L = ½ (1+y²) x²`; the flow keeps `y² e^{y²−x²}`."""

    def sharpness(self, y: Tensor) -> Tensor:
        """See `StraightValley.sharpness`."""
        return 1 + y.square()

    def relative_slope(self, y: Tensor) -> Tensor:
        """See `StraightValley.relative_slope`."""
        return 2 * y / (1 + y.square())

    def project(self, x: Tensor) -> Tensor:
        """See `Valley.project`; with the Lambert function W, `Φ_y = sgn(y) √W(y² e^{y²−x²})`."""
        squared = x.square()
        y = x[:, 1].sign() * _lambert_of_exp(squared[:, 1].log() + squared[:, 1] - squared[:, 0]).sqrt()
        return torch.stack([torch.zeros_like(y), y], dim=-1)


@dataclass(frozen=True, eq=False)
class ExponentialValley(StraightValley):
    """`L = ½ e^{ky²} x²`; the flow keeps `y e^{−kx²/2}`.

    Attributes:
        k: Growth of the sharpness.
    """

    k: float = 0.25

    def sharpness(self, y: Tensor) -> Tensor:
        """See `StraightValley.sharpness`."""
        return (self.k * y.square()).exp()

    def relative_slope(self, y: Tensor) -> Tensor:
        """See `StraightValley.relative_slope`."""
        return 2 * self.k * y

    def project(self, x: Tensor) -> Tensor:
        """See `Valley.project`; `Φ_y = y e^{−kx²/2}`."""
        y = x[:, 1] * (-0.5 * self.k * x[:, 0].square()).exp()
        return torch.stack([torch.zeros_like(y), y], dim=-1)


@dataclass(frozen=True, eq=False)
class ParabolicValley(Valley):
    """`L = ½ (y−x²)²`: Γ is the parabola `y = x²`; the flow keeps `y + ½ log|x|`."""

    def residuals(self, x: Tensor) -> Tensor:
        """See `LeastSquares.residuals`."""
        return x[:, 1:] - x[:, :1].square()

    def jacobian(self, x: Tensor) -> Tensor:
        """See `LeastSquares.jacobian`."""
        return torch.stack([-2 * x[:, 0], torch.ones_like(x[:, 1])], dim=-1)[:, None]

    def project(self, x: Tensor) -> Tensor:
        """See `Valley.project`; `Φ_x = ½ sgn(x) √W(4 x² e^{4y})`, `Φ_y = Φ_x²`."""
        squared = 0.25 * _lambert_of_exp((4 * x[:, 0].square()).log() + 4 * x[:, 1])
        return torch.stack([x[:, 0].sign() * squared.sqrt(), squared], dim=-1)

    def tangent_projection(self, x: Tensor) -> Tensor:
        """See `Valley.tangent_projection`."""
        tangent = torch.stack([torch.ones_like(x[:, 0]), 2 * x[:, 0]], dim=-1)
        return tangent[:, :, None] * tangent[:, None, :] / tangent.square().sum(-1)[:, None, None]

    def slow_drift(self, x: Tensor, covariance: Tensor) -> Tensor:
        """See `Valley.slow_drift`."""
        # p = Φ_x solves F(p) = y + ½ log x with F(p) = p² + ½ log p. Differentiated twice, with q = 1 + 4p²:
        # p_x = 1/q, p_y = 2p/q, and q p_ab = −2p F'' p_a p_b − [a=b=x]/p, where 2p F'' = (4p²−1)/p.
        p = x[:, 0]
        q = 1 + 4 * p.square()
        first = torch.stack([torch.ones_like(p), 2 * p], dim=-1) / q[:, None]
        along = torch.einsum("pa,pab,pb->p", first, covariance, first)
        drift = -0.5 * ((q - 2) * along + covariance[:, 0, 0]) / (p * q)
        return torch.stack([drift, 2 * p * drift + along], dim=-1)


def _lambert_of_exp(z: Tensor) -> Tensor:
    # W(e^z) without overflow; e^z may be 0. SciPy computes on the CPU.
    return torch.as_tensor(wrightomega(z.double().cpu().numpy())).to(z)

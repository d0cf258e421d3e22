"""SVAG, stochastic variance amplified gradient: SGD's mean step with its noise covariance multiplied by ℓ.

Every step adds two independent mini-batch gradients as `g = r₁ g₁ + r₂ g₂`, at the learning rate η/ℓ, for ℓ times the
steps. As ℓ grows SGD and SGDM approach their common continuous limit, so a gap that stays is no effect of the noise.
Momentum β, weight decay and everything set as a fraction of the run stay as they are.

Li, Malladi, Arora, "On the Validity of Modeling SGD with Stochastic Differential Equations (SDEs)" (NeurIPS 2021,
arXiv 2102.12470). Not the SVAG of Balles and Hennig (arXiv 1705.07774), stochastic variance *adapted* gradient, which
shares only the name.
"""

import math

from torch import Tensor

from hf_momentum.errors import UserError
from hf_momentum.optim.schedules import Rate, check_nonnegative, is_real


def svag_coefficients(ell: float) -> tuple[float, float]:
    """Give the weights of SVAG's two gradients: `r₁,₂ = (1 ± √(2ℓ−1)) / 2`.

    They solve `r₁ + r₂ = 1` (same mean) and `r₁² + r₂² = ℓ` (noise covariance of independent batches times ℓ). The sum
    is exactly 1 in float64, the sum of squares ℓ to rounding.

    Args:
        ell: ℓ, any real number of at least 1. At 1 the weights are (1, 0): plain SGD on the first batch.

    Returns:
        `(r₁, r₂)`, with r₁ ≥ 1 and r₂ ≤ 0.
    """
    ell = _check_ell(ell)
    r1 = 0.5 * (1.0 + math.sqrt(2.0 * ell - 1.0))
    return r1, 1.0 - r1


def svag_hyperparameters(lr: Rate, steps: int, ell: float) -> tuple[Rate, int]:
    """Rescale a run for SVAG: `(η/ℓ, ℓ·steps)`, the same training time η·steps in ℓ times the steps.

    Args:
        lr: Learning rate of the run with ℓ = 1.
        steps: Optimizer steps of the run with ℓ = 1, at least 1.
        ell: ℓ, any real number of at least 1 for which ℓ·steps is an integer.

    Returns:
        The learning rate and the number of steps to train with.

    Raises:
        UserError: If an argument is out of range, or ℓ·steps is no integer (to a relative 1e-12).
    """
    lr, ell = check_nonnegative("learning rate", lr), _check_ell(ell)
    if not is_real(steps) or steps % 1 != 0 or steps < 1:
        raise UserError(f"Invalid steps: {steps!r}. It must be an integer of at least 1.")
    product = ell * int(steps)
    if not math.isclose(product, round(product), rel_tol=1e-12):
        raise UserError(
            f"SVAG with ℓ = {ell:g} stretches {steps} steps to {product:g}, which is no integer. "
            "Choose ℓ or the steps so that ℓ·steps is one."
        )
    return lr / ell, round(product)


def reference_svag_gradient(g1: Tensor, g2: Tensor, ell: float) -> Tensor:
    """State SVAG's gradient as the paper does.

    Args:
        g1: Gradient of the first mini-batch, any shape.
        g2: Gradient of the second, independent mini-batch, of the same shape.
        ell: ℓ, at least 1.

    Returns:
        `½ (1 + √(2ℓ−1)) g₁ + ½ (1 − √(2ℓ−1)) g₂`.
    """
    return (1 + math.sqrt(2 * ell - 1)) / 2 * g1 + (1 - math.sqrt(2 * ell - 1)) / 2 * g2


def _check_ell(ell: float) -> float:
    # Up to 2**100 the weights still add up to 1 exactly: r₁ < 2**53, so 1 − r₁ is a float64.
    if not (is_real(ell) and 1 <= ell <= 2**100):
        raise UserError(f"Invalid ell: {ell!r}. SVAG's ℓ must be a finite real number of at least 1.")
    return float(ell)

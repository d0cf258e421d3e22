"""Closed formulas for one mode of a quadratic: stationary variances, limits of stability, thresholds of oscillation.

λ is the curvature, `h = ηλ`, `κ = (1−β)/(1+β)`, s² the variance σ²Σ of the additive noise, and v the variance of the
curvature that a mini-batch sees (0 for additive noise alone, else proportional to 1/B).
"""

from hf_momentum.errors import UserError
from hf_momentum.optim.schedules import check_momentum, check_nonnegative


def variance_fraction(momentum: float) -> float:
    """Give `κ = (1−β)/(1+β)`, the stationary variance of the momentum as a fraction of the gradient noise's.

    Args:
        momentum: β.

    Returns:
        κ.
    """
    return (1 - check_momentum(momentum)) / (1 + momentum)


def critical_lr(curvature: float, momentum: float = 0.0, curvature_variance: float = 0.0) -> float:
    """Give the learning rate below which the second moments stay bounded: `η < 2λ / (v + κλ²)`.

    With additive noise this is `ηλ < 2` for SGD and `ηλ < 2(1+β)/(1−β)` for SGDM.

    Args:
        curvature: λ > 0.
        momentum: β; 0 is SGD.
        curvature_variance: v.

    Returns:
        The limit of η.

    Raises:
        UserError: If the curvature is not positive.
    """
    if not curvature > 0:
        raise UserError(f"Invalid curvature: {curvature!r}. Only a mode with a positive curvature has a limit.")
    v = check_nonnegative("curvature_variance", curvature_variance)
    return 2 * curvature / (v + variance_fraction(momentum) * curvature**2)


def stationary_variance(
    curvature: float, variance: float, lr: float, momentum: float = 0.0, curvature_variance: float = 0.0
) -> float:
    """Give the stationary variance of x: `η s² / (2λ − η (v + κλ²))`.

    With additive noise this is `η s² / (λ(2−h))` for SGD and `η s² / (λ(2−κh))` for SGDM.

    Args:
        curvature: λ > 0.
        variance: s².
        lr: η.
        momentum: β; 0 is SGD.
        curvature_variance: v.

    Returns:
        The variance.

    Raises:
        UserError: If η is not below the limit of stability.
    """
    check_stable(lr, critical_lr(curvature, momentum, curvature_variance), momentum, curvature_variance > 0)
    rate = curvature_variance + variance_fraction(momentum) * curvature**2
    return lr * variance / (2 * curvature - lr * rate)


def oscillation_range(momentum: float) -> tuple[float, float]:
    """Give the h = ηλ between which SGDM's mean oscillates: `(1−√β)/(1+√β)` and its inverse.

    Args:
        momentum: β.

    Returns:
        Both thresholds; for β = 0 they are both 1, above which each step of SGD changes the sign.
    """
    root = check_momentum(momentum) ** 0.5
    return (1 - root) / (1 + root), (1 + root) / (1 - root)


def check_stable(lr: float, limit: float, momentum: float, curvature_noise: bool = False) -> None:
    """Refuse a learning rate that has no stationary moments.

    Args:
        lr: η.
        limit: The limit of stability for it.
        momentum: β.
        curvature_noise: Whether the limit is that of mini-batch curvature noise.

    Raises:
        UserError: If η is not positive and below the limit.
    """
    if not 0 < lr < limit:
        bound = "2" if momentum == 0 else f"2(1+β)/(1−β) = {2 / variance_fraction(momentum):g}"
        rule = "the mini-batches' curvature noise lowers it" if curvature_noise else f"η·λ_max < {bound}"
        raise UserError(
            f"No stationary moments at learning rate {lr:g} with momentum {momentum:g}: it must be above 0 and below "
            f"{limit:g} ({rule})."
        )

"""Expected losses of SGD and SGDM over the steps to come, from what is measured where a run stands.

Along one eigenvector u of the Hessian, with curvature λ, the loss is taken for the quadratic `½ λ x²`, whose minimiser
is `x₀ = uᵀ∇L/λ` away. A mini-batch's gradient along u is `g = λx + ξ` with `Var ξ = s² + v x²`: gradient noise and
curvature noise (v = v₁/B), taken for independent. Eq. 3 (`m⁺ = β m + (1−β) g`, `x⁺ = x − η m⁺`, m₀ = 0) then carries
the second moments `(X, C, M) = (E x², E xm, E m²)` by a linear map, and so does any number of equal steps, whose map
repeated squaring finds:

- `M⁺ = (1−β)² ((λ²+v) X + s²) + 2β(1−β)λ C + β² M`
- `C⁺ = (1−β)λ X + β C − η M⁺`
- `X⁺ = X − 2η ((1−β)λ X + β C) + η² M⁺`

β = 0 is SGD: `X⁺ = ((1−ηλ)² + η²v) X + η² s²`. Bounded for `η < 2λ/(v + κλ²)`, `κ = (1−β)/(1+β)`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_momentum.dynamics.stability import variance_fraction

Array = NDArray[np.float64]
LOST = 1e6  # a run is lost once its expected loss is so many times what it was; how many more makes no difference
_FLAT = 0.01  # a mode is flat if λ Ση_k is below this: then its gradient stays what it is to 1% at most
_MOST_PIECES = 48
_NOTHING = 1e-12  # of the loss at the start: what cannot be told from 0
_LEAST_FACTOR = 1e-6  # of a schedule, where its logarithm is taken


class Modes(NamedTuple):
    """Directions along which the loss is taken for separate quadratics; arrays that broadcast to `(…, modes)`.

    Attributes:
        curvature: λ.
        squared_gradient: `(uᵀ∇L)²`.
        noise: `uᵀΣu/B`, the variance of a mini-batch's gradient along u, at the present point.
        curvature_variance: v = v₁/B, the variance of a mini-batch's curvature along u.
    """

    curvature: Array
    squared_gradient: Array
    noise: Array
    curvature_variance: Array


class Piece(NamedTuple):
    """Equal steps of a schedule.

    Attributes:
        factor: By which the learning rate is multiplied.
        steps: How many.
    """

    factor: float
    steps: int


def pieces_of(factors: Sequence[float], most: int = _MOST_PIECES) -> list[Piece]:
    """Cut a schedule into pieces of constant learning rate.

    Constant and step-wise schedules of at most `most` values are kept exactly. Others are cut where equal parts of the
    schedule's relative change and of the run have passed, and each piece gets its mean.

    Args:
        factors: `η_k/η` of the steps to come.
        most: Number of pieces wanted.

    Returns:
        The pieces; a few more than `most` where jumps fall between.
    """
    factors = np.asarray(factors, float)
    jumps = np.flatnonzero(np.diff(factors)) + 1
    if len(jumps) < most:
        cuts = jumps
    else:
        logs = np.log(np.maximum(factors, _LEAST_FACTOR * factors.max()))
        change = np.abs(np.diff(logs))
        passed = np.cumsum(0.5 * change / change.sum() + 0.5 / len(change))
        cuts = np.flatnonzero(np.diff(np.floor(passed * most * (1 - 1e-12)))) + 1
    return [Piece(float(part.mean()), len(part)) for part in np.split(factors, cuts)]


def stability_limits(modes: Modes, momentum: float) -> Array:
    """Give the learning rate below which each mode's second moments stay bounded: `2λ/(v + κλ²)`.

    It is `dynamics.stability.critical_lr` for arrays.

    Args:
        modes: The modes.
        momentum: β; 0 is SGD.

    Returns:
        The limits of η, `(…, modes)`; infinite where λ ≤ 0, since nothing returns along such a mode.
    """
    curvature = modes.curvature
    rate = modes.curvature_variance + variance_fraction(momentum) * curvature**2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(curvature > 0, 2 * curvature / rate, np.inf)


def log_loss_ratio(modes: Modes, loss: Array, lr: Array, momentum: float, pieces: Sequence[Piece]) -> Array:
    """Predict `log(E L_SGD / E L_SGDM)` after the steps to come, at the same effective learning rates.

    Args:
        modes: The modes, `(…, modes)`.
        loss: The loss where the run stands, `(…)`, above the lowest that it can reach.
        lr: η, `(…)`, which the pieces' factors multiply.
        momentum: β of SGDM.
        pieces: The schedule.

    Returns:
        The logarithm, `(…)`: above 0 where SGDM ends lower, and 0 where both are lost.
    """
    least, most = _range_of_losses(modes, loss, lr, pieces)
    with np.errstate(divide="ignore"):
        sgd, sgdm = (
            np.log(np.clip(expected_loss(modes, loss, lr, beta, pieces), least, most)) for beta in (0.0, momentum)
        )
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(sgd - sgdm, nan=0.0)  # nothing to descend and no noise: both stay at 0


def expected_loss(modes: Modes, loss: Array, lr: Array, momentum: float, pieces: Sequence[Piece]) -> Array:
    """Predict the expected loss after the steps to come.

    A mode that curves adds `½ λ E x²`. What these modes leave of the present loss is descended by the flat ones
    (λ ≤ 0, or too small to bend the path within the run) at their constant gradient, by
    `(uᵀ∇L)² Σ_k η_k (1−β^k)`, and not below 0. Noise along flat modes makes them diffuse, at no cost to the loss.

    Args:
        modes: The modes, `(…, modes)`.
        loss: The loss where the run stands, `(…)`, above the lowest that it can reach; 0 if only the modes count.
        lr: η, `(…)`, which the pieces' factors multiply.
        momentum: β; 0 is SGD.
        pieces: The schedule.

    Returns:
        E L, `(…)`; infinite where a second moment overflows.
    """
    lr = np.asarray(lr, float)[..., None]
    curved, distance = _curved(modes, lr, pieces)
    second = _second_moments(modes, distance, lr, momentum, pieces)
    with np.errstate(over="ignore"):
        left = np.where(curved & (second > 0), 0.5 * modes.curvature * second, 0).sum(-1)
    rest = np.maximum(loss - np.where(curved, 0.5 * modes.curvature * distance, 0).sum(-1), 0)
    descended = np.where(curved, 0, modes.squared_gradient * lr * _time(momentum, pieces)).sum(-1)
    return left + np.maximum(rest - descended, 0)


def _curved(modes: Modes, lr: Array, pieces: Sequence[Piece]) -> tuple[Array, Array]:
    """Which modes curve, and their squared distances from the minimiser, 0 for the flat ones."""
    curved = modes.curvature * lr * _time(0.0, pieces) > _FLAT
    with np.errstate(divide="ignore", invalid="ignore"):
        return curved, np.where(curved, modes.squared_gradient / modes.curvature**2, 0)


def _time(momentum: float, pieces: Sequence[Piece]) -> float:
    """`Σ_k f_k (1−β^k)`: the way along a constant gradient of 1 at η = 1, with m₀ = 0 (the paper's warm-up case)."""
    total, done = 0.0, 0
    for factor, steps in pieces:
        lag = momentum ** (done + 1) * (1 - momentum**steps) / (1 - momentum)
        total, done = total + factor * (steps - lag), done + steps
    return total


def _range_of_losses(modes: Modes, loss: Array, lr: Array, pieces: Sequence[Piece]) -> tuple[Array, Array]:
    """Between a loss that is nothing and a lost run's, from the present loss or what noise keeps at h = 1."""
    lr = np.asarray(lr, float)[..., None]
    curved, distance = _curved(modes, lr, pieces)
    start = np.where(curved, 0.5 * modes.curvature * distance, 0).sum(-1)
    scale = np.maximum(np.maximum(start, loss), np.where(curved, 0.5 * lr * modes.noise, 0).sum(-1))
    return _NOTHING * scale, LOST * scale


def _second_moments(modes: Modes, distance: Array, lr: Array, momentum: float, pieces: Sequence[Piece]) -> Array:
    """E x² after the pieces, from x₀² = distance and m = 0; infinite where it overflows."""
    curvature, variance = modes.curvature, modes.curvature_variance
    # The noise was measured where the run stands and holds v x₀² already, which is taken off to give s².
    additive = np.maximum(modes.noise - variance * distance, 0)
    shape = np.broadcast_shapes(*(np.shape(each) for each in (curvature, variance, distance, additive, lr)))
    state = np.zeros((3, *shape))
    state[0] = distance
    with np.errstate(over="ignore", invalid="ignore"):
        for factor, steps in pieces:
            step, kick = _step(curvature, variance, lr * factor, momentum, shape)
            state = _repeat(step, kick * additive, steps, state)
    second = np.nan_to_num(state[0], nan=np.inf, posinf=np.inf, neginf=np.inf)
    return np.where((distance == 0) & (additive == 0), 0, np.maximum(second, 0))


def _step(
    curvature: Array, variance: Array, lr: Array, momentum: float, shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """One step's map of (E x², E xm, E m²), `(3, 3, …)`, and what noise of variance 1 adds, `(3, …)`."""
    weight, lr = 1 - momentum, np.broadcast_to(lr, shape)
    cross, square = np.zeros((3, *shape)), np.zeros((3, *shape))  # E x m⁺ and E m⁺² in terms of the moments before
    cross[0], cross[1] = weight * curvature, momentum
    square[0], square[1] = weight**2 * (curvature**2 + variance), 2 * momentum * weight * curvature
    square[2] = momentum**2
    position = -2 * lr * cross + lr**2 * square
    position[0] += 1
    step = np.stack([position, cross - lr * square, square])
    return step, weight**2 * np.stack([lr**2, -lr, np.ones(shape)])


def _repeat(step: Array, kick: Array, times: int, state: Array) -> Array:
    """Many equal affine steps, by repeated squaring."""
    while times:
        if times & 1:
            state = _apply(step, state) + kick
        times >>= 1
        if times:
            kick = _apply(step, kick) + kick
            step = np.einsum("ij...,jk...->ik...", step, step)
    return state


def _apply(step: Array, state: Array) -> Array:
    return np.einsum("ij...,j...->i...", step, state)


def reference_second_moment(
    curvature: float,
    distance: float,
    variance: float,
    curvature_variance: float,
    lrs: Sequence[float],
    momentum: float,
) -> float:
    """State the recursion of one mode's second moments step by step, to hold the fast one to.

    Args:
        curvature: λ.
        distance: x₀², the squared distance from the minimiser.
        variance: s², of the noise that does not depend on x.
        curvature_variance: v.
        lrs: η_k.
        momentum: β.

    Returns:
        E x² after all steps.
    """
    xx, xm, mm = distance, 0.0, 0.0
    for lr in lrs:
        cross = (1 - momentum) * curvature * xx + momentum * xm
        mm = (
            (1 - momentum) ** 2 * ((curvature**2 + curvature_variance) * xx + variance)
            + 2 * momentum * (1 - momentum) * curvature * xm
            + momentum**2 * mm
        )
        xm, xx = cross - lr * mm, xx - 2 * lr * cross + lr**2 * mm
    return xx

"""Exact means and covariances of SGD and SGDM on quadratics, by recursion, and their stationary values.

In coordinates around the minimiser Eq. 3 is linear: `(x, m)⁺ = A (x, m) + B v`. Where the noise is additive, n equal
steps are one affine map, found by repeated squaring.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_discrete_lyapunov
from scipy.optimize import brentq

from hf_momentum.dynamics.iterates import Rates, Schedule
from hf_momentum.dynamics.oracle import MinibatchOracle, NoisyGradientOracle, Oracle, SvagOracle, covariance_root
from hf_momentum.dynamics.problems import LinearRegression, Quadratic, as_tensor
from hf_momentum.dynamics.stability import check_stable, critical_lr
from hf_momentum.errors import UserError

Array = NDArray[np.float64]
# From the step and the moments before it to the map A and the covariance that the step adds.
Transition = Callable[[int, Array, Array], tuple[Array, Array]]


class Moments(NamedTuple):
    """Mean and covariance of the state after some steps; the state's first `dim` entries are x.

    Attributes:
        step: Number of steps made.
        mean: `(n,)`.
        covariance: `(n, n)`.
    """

    step: int
    mean: Array
    covariance: Array


@dataclass(frozen=True, eq=False)
class LinearModel:
    """A quadratic loss with its gradient noise.

    Attributes:
        hessian: H, `(dim, dim)`.
        minimiser: x*, `(dim,)`.
        additive: σ²Σ(x*), `(dim, dim)`.
        multiplicative: From the first and second moments of x − x*, `(dim,)` and `(dim, dim)`, to what they add to
            E σ²Σ(x); None if Σ is constant.
    """

    hessian: Array
    minimiser: Array
    additive: Array
    multiplicative: Callable[[Array, Array], Array] | None = None

    @classmethod
    def quadratic(
        cls, hessian: ArrayLike, covariance: ArrayLike = 1.0, scale: float = 1.0, curvature_variance: ArrayLike = 0.0
    ) -> "LinearModel":
        """Make a model with its minimiser at 0.

        Args:
            hessian: H, `(dim, dim)`, its diagonal `(dim,)`, or λ.
            covariance: Σ, likewise; a number is a multiple of the identity.
            scale: σ.
            curvature_variance: v_i of each coordinate, `(dim,)` or a number: mini-batch curvature noise that is
                independent between coordinates.

        Returns:
            The model.
        """
        hessian = _matrix(hessian, 1)
        dim = len(hessian)
        additive = scale**2 * _matrix(covariance, dim)
        covariance_root(as_tensor(additive), diagonal=False)
        v = np.broadcast_to(np.asarray(curvature_variance, float), (dim,))
        multiplicative = (lambda first, second: np.diag(v * np.diag(second))) if v.any() else None
        return cls(hessian, np.zeros(dim), additive, multiplicative)

    @classmethod
    def of(cls, oracle: Oracle) -> "LinearModel":
        """Take a model from an oracle.

        Args:
            oracle: One on a `Quadratic` with constant Σ, or mini-batches of a `LinearRegression`; or SVAG of one.

        Returns:
            The model, of the oracle's σ.

        Raises:
            UserError: If the oracle is of another kind.
        """
        base = oracle
        while isinstance(base, SvagOracle):
            base = base.base
        problem, variance = base.problem, oracle.scale**2
        if isinstance(base, NoisyGradientOracle) and isinstance(problem, Quadratic | LinearRegression):
            sigma = base.constant_covariance
            if sigma is not None:
                minimiser = np.zeros(problem.dim) if problem.minimiser is None else _array(problem.minimiser)
                return cls(_array(problem.matrix), minimiser, variance * _array(sigma))
        if isinstance(base, MinibatchOracle) and isinstance(problem, LinearRegression):
            return _regression(problem, variance)
        raise UserError(
            "Exact moments need a Quadratic or a LinearRegression with a constant covariance, or mini-batches of a "
            f"LinearRegression, not {type(base).__name__} on {type(problem).__name__}."
        )

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return len(self.hessian)

    def noise(self, mean: Array, covariance: Array) -> Array:
        """Give the mean covariance of the gradient noise.

        Args:
            mean: Of `x − x*`, `(dim,)`.
            covariance: Of x, `(dim, dim)`.

        Returns:
            E σ²Σ(x), `(dim, dim)`.
        """
        if self.multiplicative is None:
            return self.additive
        return self.additive + self.multiplicative(mean, covariance + np.outer(mean, mean))

    def additive_noise(self) -> Array:
        """Give σ²Σ where it is constant.

        Returns:
            σ²Σ, `(dim, dim)`.

        Raises:
            UserError: If it depends on x.
        """
        if self.multiplicative is not None:
            raise UserError("This needs a noise covariance that does not depend on x; mini-batch noise does.")
        return self.additive


def _regression(problem: LinearRegression, variance: float) -> LinearModel:
    # Example i has the gradient a_i (a_i·e − r_i) at x* + e, with the residual r_i = y_i − a_i·x* and Σ_i a_i r_i = 0.
    features, minimiser = _array(problem.features), _array(problem.minimiser)
    residuals = _array(problem.targets) - features @ minimiser
    hessian = features.T @ features / len(features)

    def weighted(weights: Array) -> Array:
        return (features.T * weights) @ features * (variance / len(features))

    def multiplicative(first: Array, second: Array) -> Array:
        squares = np.einsum("ni,ij,nj->n", features, second, features) - 2 * residuals * (features @ first)
        return weighted(squares) - variance * hessian @ second @ hessian

    return LinearModel(hessian, minimiser, weighted(residuals**2), multiplicative)


def sgdm_moments(
    model: LinearModel,
    x0: ArrayLike,
    lr: Schedule,
    momentum: Schedule = 0.0,
    *,
    at: Iterable[int],
    start: Array | None = None,
) -> Iterator[Moments]:
    """Give the exact mean and covariance of `(x, m)` under Eq. 3; momentum 0 is SGD.

    Args:
        model: The quadratic.
        x0: Mean of the start point, `(dim,)` or a number; m starts at mean 0.
        lr: Effective learning rates η_k.
        momentum: Momenta β_k.
        at: Rising numbers of steps after which to give the moments.
        start: Covariance of `(x₀, m₀)`, `(2·dim, 2·dim)`; None is 0.

    Returns:
        The stream of moments of the `2·dim` entries of `(x, m)`.
    """
    at, d = list(at), model.dim
    rates = Rates(lr, momentum, max(at, default=0))

    def transition(k: int, mean: Array, covariance: Array) -> tuple[Array, Array]:
        step, kick = sgdm_map(model, *rates[k])
        return step, kick @ model.noise(mean[:d], covariance[:d, :d]) @ kick.T

    centre = np.concatenate([model.minimiser, np.zeros(d)])
    mean = np.concatenate([np.broadcast_to(np.asarray(x0, float), (d,)), np.zeros(d)])
    start = np.zeros((2 * d, 2 * d)) if start is None else np.asarray(start, float)
    return evolve(mean, start, centre, at, transition, rates.constant and model.multiplicative is None)


def joint_moments(
    model: LinearModel, x0: ArrayLike, lr: Schedule, momentum: Schedule, *, at: Iterable[int]
) -> Iterator[Moments]:
    """Give the exact moments of `(x_SGD, x_SGDM, m)` under common noise; SGD runs at η̄_k.

    Args:
        model: The quadratic, with additive noise.
        x0: Common start point, `(dim,)` or a number.
        lr: Effective learning rates η_k.
        momentum: Momenta β_k.
        at: Rising numbers of steps after which to give the moments.

    Returns:
        The stream of moments, `(3·dim,)` and `(3·dim, 3·dim)`.
    """
    at = list(at)
    rates = Rates(lr, momentum, max(at, default=0))
    return coupled_moments(model, x0, rates.averaged(), rates, at=at)


def coupled_moments(
    model: LinearModel, x0: ArrayLike, sgd: Rates, sgdm: Rates, *, at: Iterable[int]
) -> Iterator[Moments]:
    """Give what `joint_moments` does, for SGD at learning rates of its own.

    Args:
        model: The quadratic, with additive noise.
        x0: Common start point, `(dim,)` or a number.
        sgd: Rates of SGD; the learning rates alone are read.
        sgdm: Rates of SGDM.
        at: Rising numbers of steps after which to give the moments.

    Returns:
        The stream of moments.
    """
    d, noise, zero = model.dim, model.additive_noise(), np.zeros((model.dim, 2 * model.dim))

    def transition(k: int, mean: Array, covariance: Array) -> tuple[Array, Array]:
        (lr, _), (step, kick) = sgd[k], sgdm_map(model, *sgdm[k])
        step = np.block([[np.eye(d) - lr * model.hessian, zero], [zero.T, step]])
        kick = np.concatenate([-lr * np.eye(d), kick])
        return step, kick @ noise @ kick.T

    x0 = np.broadcast_to(np.asarray(x0, float), (d,))
    centre = np.concatenate([model.minimiser, model.minimiser, np.zeros(d)])
    mean = np.concatenate([x0, x0, np.zeros(d)])
    return evolve(mean, np.zeros((3 * d, 3 * d)), centre, at, transition, sgd.constant and sgdm.constant)


def rms_distance(joint: Moments) -> float:
    """Read the root mean square of `x_SGD − x_SGDM` off joint moments.

    Args:
        joint: What `joint_moments` yields.

    Returns:
        `√E|x_SGD − x_SGDM|²`.
    """
    d = len(joint.mean) // 3
    difference = np.eye(d, 3 * d) - np.eye(d, 3 * d, d)
    variance = np.trace(difference @ joint.covariance @ difference.T)
    return float(np.sqrt(max(variance, 0.0) + np.sum((difference @ joint.mean) ** 2)))


def sgdm_map(model: LinearModel, lr: float, momentum: float) -> tuple[Array, Array]:
    """Write one step of Eq. 3 around the minimiser as `(x, m)⁺ = A (x, m) + B v`.

    Args:
        model: The quadratic.
        lr: η_k.
        momentum: β_k.

    Returns:
        A, `(2·dim, 2·dim)`, and B, `(2·dim, dim)`.
    """
    eye, weight = np.eye(model.dim), 1 - momentum
    position = [eye - lr * weight * model.hessian, -lr * momentum * eye]
    buffer = [weight * model.hessian, momentum * eye]
    return np.block([position, buffer]), np.concatenate([-lr * weight * eye, weight * eye])


def evolve(
    mean: Array, covariance: Array, centre: Array, at: Iterable[int], transition: Transition, constant: bool
) -> Iterator[Moments]:
    """Carry moments along linear steps.

    Args:
        mean: Of the state before the first step, `(n,)`.
        covariance: Likewise, `(n, n)`.
        centre: The state that the maps leave fixed, `(n,)`.
        at: Rising numbers of steps after which to yield.
        transition: The steps, around the centre.
        constant: Whether all are equal; stretches of them are then one map.

    Yields:
        The moments.

    Raises:
        UserError: If `at` does not rise.
    """
    mean, done = mean - centre, 0
    for target in at:
        if target < done:
            raise UserError(f"The steps in `at` must rise and be at least 0: {target} comes after {done}.")
        if constant:
            step, noise = _repeat(*transition(0, mean, covariance), target - done)
            mean, covariance = step @ mean, step @ covariance @ step.T + noise
        else:
            for k in range(done, target):
                step, noise = transition(k, mean, covariance)
                mean, covariance = step @ mean, step @ covariance @ step.T + noise
        done = target
        yield Moments(target, mean + centre, covariance)


def _repeat(step: Array, noise: Array, times: int) -> tuple[Array, Array]:
    # The affine map of many equal steps, by repeated squaring.
    total, added = np.eye(len(step)), np.zeros_like(noise)
    while times:
        if times & 1:
            total, added = step @ total, step @ added @ step.T + noise
        step, noise, times = step @ step, step @ noise @ step.T + noise, times >> 1
    return total, added


def stationary_covariance(model: LinearModel, lr: float, momentum: float = 0.0) -> Array:
    """Give the covariance of `(x, m)` that Eq. 3 keeps, by the discrete Lyapunov equation.

    With noise that depends on x the equation has one more linear term, and is solved as a linear system.

    Args:
        model: The quadratic; H positive definite.
        lr: η.
        momentum: β.

    Returns:
        The covariance, `(2·dim, 2·dim)`.
    """
    check_stable(lr, stability_limit(model, momentum), momentum, model.multiplicative is not None)
    step, kick = sgdm_map(model, lr, momentum)
    noise = kick @ model.additive @ kick.T
    if model.multiplicative is None:
        return solve_discrete_lyapunov(step, noise)
    operator = _second_moment_operator(model, lr, momentum)
    return np.linalg.solve(np.eye(len(operator)) - operator, noise.ravel()).reshape(noise.shape)


def stability_limit(model: LinearModel, momentum: float = 0.0) -> float:
    """Give the learning rate below which the second moments of Eq. 3 stay bounded.

    With additive noise it is `2(1+β) / ((1−β) λ_max)`; else where the spectral radius of the second moments' recursion
    reaches 1. That recursion has `(2·dim)²` entries: keep dim below about 20.

    Args:
        model: The quadratic; H positive definite.
        momentum: β.

    Returns:
        The limit of η.

    Raises:
        UserError: If H has an eigenvalue that is not positive: there is nothing to return to along it.
    """
    values = np.linalg.eigvalsh(model.hessian)
    if not values[0] > 1e-12 * values[-1] or values[-1] <= 0:
        raise UserError(
            f"Stationary moments need a positive definite Hessian; its least eigenvalue is {values[0]:g}. "
            "Reduce the problem to the directions that curve."
        )
    upper = critical_lr(values[-1], momentum)
    if model.multiplicative is None:
        return upper

    def excess(lr: float) -> float:
        return np.abs(np.linalg.eigvals(_second_moment_operator(model, lr, momentum))).max() - 1

    lower = upper
    while excess(lower) >= 0:
        upper, lower = lower, lower / 2
    return brentq(excess, lower, upper, xtol=1e-15, rtol=1e-14) if lower < upper else upper


def _second_moment_operator(model: LinearModel, lr: float, momentum: float) -> Array:
    # The linear part of the recursion of E (x, m)(x, m)ᵀ around the minimiser, on flattened matrices.
    step, kick = sgdm_map(model, lr, momentum)
    d, n = model.dim, len(step)
    columns = []
    for index in range(n * n):
        second = np.zeros((n, n))
        second.flat[index] = 1
        symmetric = (second[:d, :d] + second[:d, :d].T) / 2
        noise = model.multiplicative(np.zeros(d), symmetric)
        columns.append((step @ second @ step.T + kick @ noise @ kick.T).ravel())
    return np.stack(columns, axis=1)


def _matrix(values: ArrayLike, dim: int) -> Array:
    values = np.asarray(values, float)
    if values.ndim == 0:
        values = np.full(dim, values)
    return np.diag(values) if values.ndim == 1 else values


def _array(tensor: object) -> Array:
    return tensor.detach().double().cpu().numpy()

"""The manifold Γ of minimisers and the slow SDE on it, which SGD and SGDM both follow over O(1/η²) steps.

Φ(x) is the limit of the gradient flow `ẋ = −∇L` from x. Over `t = k η² σ²` with σ = O(1), and read as `Φ(x_k)`,

    dX = ∂Φ Σ^{1/2} dW + ½ ∂²Φ[Σ] dt

(Wang et al., arXiv 2307.15196; Katzenberger 1991; Li, Wang, Arora, arXiv 2110.06914). Both coefficients follow on Γ
from the Hessian H and the third derivative `T[M] = ∇ tr(H M)`. Three identities hold near Γ: the flow moves along
itself, `∂Φ ∇L = 0`; it ends in minimisers, `∇L(Φ) = 0`; and there it stays, `Φ(Φ) = Φ`. Differentiated once on Γ they
say that `∂Φ = P`, the orthogonal projection on the null space of H; differentiated twice, in directions a and b,

    ∂²Φ[Ha, b] + ∂²Φ[a, Hb] = −P T[a, b],    H ∂²Φ[a, b] = −T[Pa, Pb],    ∂²Φ[Pa, Pb] = (1 − P) ∂²Φ[a, b].

So for eigenvectors of H with the eigenvalues λ_a and λ_b, `∂²Φ[a, b] = −P T[a, b] / (λ_a + λ_b)` where a or b is
normal to Γ, and `−H⁺ T[a, b]` where both are tangent. Summed over Σ, with the S that solves
`H S + S H = Σ − P Σ P` and has no part that is tangent on both sides:

    ∂²Φ[Σ] = −H⁺ T[P Σ P] − P T[S].

Label noise, `Σ = c H`, has `P Σ = 0` and `S = ½ c (1 − P)`: no diffusion, and since `P T[P] = 0` the drift
`−(c/4) ∂Φ ∇tr(H)`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.integrate import DOP853, LSODA, solve_ivp
from torch import Generator, Tensor

from hf_momentum.dynamics.iterates import Iterate, check_stream
from hf_momentum.dynamics.oracle import Oracle
from hf_momentum.dynamics.problems import Problem
from hf_momentum.dynamics.valleys import Valley
from hf_momentum.errors import UserError
from hf_momentum.optim.schedules import check_nonnegative

_ACCURACY = 1e-11  # of the flow, relative and absolute
_NEAR = 1e-6  # where speed · time is less, the flow is left to Newton's method
_ON_GAMMA = 1e-9  # what speed · time must be after it
_NEWTON_STEPS = 2
_BATCH_STEPS = 300  # explicit ones, for all paths at once
_MOST_STEPS = 3_000  # implicit ones, for a stiff path
_FAR = 1e12  # flows that take longer, or go further, lead nowhere
_FLAT = 1e-5  # eigenvalues of H below this part of the largest are taken for 0


class SlowManifold(Protocol):
    """What the slow SDE needs of Γ: the valleys give it in closed form, `Manifold` for any loss."""

    def project(self, x: Tensor) -> Tensor:
        """Map positions `(paths, dim)` to Φ(x) on Γ."""

    def tangent_projection(self, x: Tensor) -> Tensor:
        """Map points of Γ, `(paths, dim)`, to ∂Φ, `(paths, dim, dim)`."""

    def slow_drift(self, x: Tensor, covariance: Tensor) -> Tensor:
        """Map points of Γ, `(paths, dim)`, and Σ, `(paths, dim, dim)`, to `½ ∂²Φ[Σ]`, `(paths, dim)`."""


@dataclass(frozen=True, eq=False)
class Manifold:
    """The minimisers of any three times differentiable loss whose Hessian has the same rank all over Γ.

    Φ comes from the gradient flow, its derivatives from automatic differentiation, in float64.

    Attributes:
        problem: The loss L; minimisers need not have the loss 0.
        projection: Φ in closed form, `(paths, dim)` to `(paths, dim)`; None integrates the flow.
    """

    problem: Problem
    projection: Callable[[Tensor], Tensor] | None = None

    def project(self, x: Tensor) -> Tensor:
        """Give the end of the gradient flow.

        Args:
            x: Positions, `(paths, dim)`.

        Returns:
            Φ(x) on Γ, `(paths, dim)`.
        """
        return gradient_flow_limit(self.problem, x) if self.projection is None else self.projection(x)

    def tangent_projection(self, x: Tensor) -> Tensor:
        """Give the projection on the tangent space of Γ, which is the null space of H.

        Args:
            x: Positions on Γ, `(paths, dim)`.

        Returns:
            ∂Φ(x), `(paths, dim, dim)`.
        """
        return _spectrum(self.problem.hessian(x), x).tangent

    def slow_drift(self, x: Tensor, covariance: Tensor) -> Tensor:
        """Give the drift of the slow SDE, `−½ (H⁺ T[P Σ P] + P T[S])`.

        Args:
            x: Positions on Γ, `(paths, dim)`.
            covariance: Σ(x), `(paths, dim, dim)`.

        Returns:
            `½ ∂²Φ[Σ]`, `(paths, dim)`.
        """
        hessian, third = torch.func.vjp(self.problem.hessian, x)  # third(M) is T[M]
        spectrum = _spectrum(hessian, x)
        vectors, sums = spectrum.vectors, spectrum.values[:, :, None] + spectrum.values[:, None, :]
        rotated = vectors.mT @ covariance @ vectors
        tangent = torch.where(sums == 0, rotated, 0.0)
        rest = torch.where(sums == 0, 0.0, rotated / sums)
        (bend,), (slide,) = third(vectors @ tangent @ vectors.mT), third(vectors @ rest @ vectors.mT)
        return -0.5 * (_apply(spectrum.inverse, bend) + _apply(spectrum.tangent, slide))


def manifold_of(problem: Problem) -> SlowManifold:
    """Choose how to treat a loss: closed forms where the problem has them, else a `Manifold`.

    Args:
        problem: The loss.

    Returns:
        Γ, Φ and its derivatives.
    """
    return problem if isinstance(problem, Valley) else Manifold(problem)


def gradient_flow_limit(problem: Problem, x: Tensor) -> Tensor:
    """Integrate `ẋ = −∇L` from all points at once, by SciPy's adaptive Runge–Kutta method of order 8.

    Paths too stiff for it go on one by one by LSODA, with H as the Jacobian: right, but far slower.
    Each path has a clock of its own, in units of 1/λ_max where it starts, so that none waits for the sharpest. A path
    has arrived where its speed would carry it nowhere in as much time again as it has run (at least 1): one that
    creeps to infinity, as on `e^{−x}`, never has. The last stretch, of size ε, is Newton's step along the curved
    eigenvectors of H; that changes Φ by O(ε²).

    Args:
        problem: The loss L.
        x: Start points, `(paths, dim)`, float64.

    Returns:
        Φ(x), `(paths, dim)`.

    Raises:
        UserError: If the flow from a point reaches no minimiser with a Hessian that is positive along all normals.
    """
    _check_double(x)
    if x.numel() == 0:
        return x.clone()
    sharpness = torch.linalg.eigvalsh(problem.hessian(x)).abs().amax(-1, keepdim=True)
    units = torch.where(sharpness > 0, 1 / sharpness, 1.0)
    end, time = _flow(problem, x, units)
    for _ in range(_NEWTON_STEPS):
        end = end - _apply(_spectrum(problem.hessian(end), x).inverse, problem.gradient(end))
    unsettled = ~(time * (units * problem.gradient(end)).norm(dim=-1) <= _ON_GAMMA)
    if unsettled.any():
        _refuse(x[unsettled][0], "where the flow slows down the Hessian is degenerate")
    return end


def _flow(problem: Problem, x: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    # Gives where the paths are when they are near Γ, and how long they took. Those that the batch's explicit steps do
    # not bring there are stiff, and go on one by one by an implicit method.
    end, time, arrived = _run_flow(DOP853, _BATCH_STEPS, problem, x, units)
    for i in (~arrived).nonzero()[:, 0].tolist():
        one, jacobian = slice(i, i + 1), lambda t, y, unit=units[i]: _stiffness(problem, x.new_tensor(y), unit)
        end[one], time[one], done = _run_flow(LSODA, _MOST_STEPS, problem, x[one], units[one], jac=jacobian)
        if not done:
            _refuse(x[i], f"it still moves after {time[i]:.3g} units of time, 1/λ_max of the start each")
    return end, time


def _stiffness(problem: Problem, y: Tensor, unit: Tensor) -> np.ndarray:
    return -(unit * problem.hessian(y[None])[0]).cpu().numpy()


def _run_flow(
    method: type, steps: int, problem: Problem, x: Tensor, units: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    # Gives positions, times and which paths arrived; those are stopped while the others go on.
    moving, time = np.ones((len(x), 1)), np.ones(len(x))

    def velocity(t: float, flat: np.ndarray) -> np.ndarray:
        gradient = units * problem.gradient(torch.as_tensor(flat).to(x).view_as(x))
        return -(moving * gradient.cpu().numpy()).ravel()

    with np.errstate(all="ignore"):
        start = x.flatten().cpu().numpy()
        solver = method(velocity, 0.0, start, _FAR, rtol=_ACCURACY, atol=_ACCURACY, **options)
        for _ in range(steps):
            time[moving[:, 0] > 0] = max(solver.t, 1.0)
            stretch = time * np.linalg.norm(velocity(solver.t, solver.y).reshape(x.shape), axis=1)
            moving[stretch <= _NEAR] = 0
            if not moving.any() or solver.status != "running" or not (stretch <= _FAR).all():
                break
            solver.step()
    return torch.as_tensor(solver.y).to(x).view_as(x), torch.as_tensor(time).to(x), torch.as_tensor(moving[:, 0] == 0)


def _refuse(start: Tensor, reason: str) -> NoReturn:
    values = ", ".join(f"{value:.6g}" for value in start[:8].tolist()) + (", …" if len(start) > 8 else "")
    raise UserError(
        f"The gradient flow from x = ({values}) reaches no minimiser: {reason}. Start where the loss falls to a "
        "minimum whose Hessian is positive in all directions that leave the manifold of minimisers."
    )


class _Spectrum(NamedTuple):
    values: Tensor  # eigenvalues of H, `(paths, dim)`; those of tangents are 0 exactly
    vectors: Tensor  # eigenvectors as columns, `(paths, dim, dim)`

    @property
    def tangent(self) -> Tensor:
        """P, `(paths, dim, dim)`."""
        return (self.vectors * (self.values == 0)[:, None, :]) @ self.vectors.mT

    @property
    def inverse(self) -> Tensor:
        """H⁺, `(paths, dim, dim)`."""
        inverse = torch.where(self.values == 0, 0.0, 1 / self.values)
        return (self.vectors * inverse[:, None, :]) @ self.vectors.mT


def _spectrum(hessian: Tensor, x: Tensor) -> _Spectrum:
    # x: where the paths started or are, for the message.
    _check_double(x)
    values, vectors = torch.linalg.eigh(hessian)
    cut = _FLAT * values.abs().amax(-1, keepdim=True)
    unstable = (values < -cut).any(-1)
    if unstable.any():
        _refuse(x[unstable][0], f"the Hessian has the eigenvalue {float(values[unstable][0, 0]):.3g}")
    return _Spectrum(torch.where(values <= cut, 0.0, values), vectors)


def _check_double(x: Tensor) -> None:
    if x.dtype != torch.float64:
        raise UserError(f"Positions of type {x.dtype}: the flow and the null space of H need torch.float64.")


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors[..., None])[..., 0]


def slow_sde(
    oracle: Oracle,
    x0: Tensor,
    *,
    time: float,
    steps: int,
    generator: Generator | None = None,
    every: int = 1,
    manifold: SlowManifold | None = None,
) -> Iterator[Iterate]:
    """Integrate the slow SDE: an Euler–Maruyama step, then back to Γ by Φ.

    Φ replaces the normal part of the drift by its own bend, `½ ∂²Φ[P Σ P]`, which has the same mean: weak order 1.

    Args:
        oracle: Its L and Σ; the law of the noise does not matter, and σ enters through the time alone.
        x0: Start points, `(paths, dim)`; the SDE starts from Φ(x0).
        time: T = k η² σ², for k steps of SGD or SGDM at the learning rate η.
        steps: Number of steps of T/steps each.
        generator: Source of the increments, on x0's device.
        every: States are yielded after 0, `every`, `2·every`, … and after all steps.
        manifold: Γ and Φ; None is `manifold_of(oracle.problem)`.

    Returns:
        The stream of states; `m` is the last increment before Φ.

    Raises:
        UserError: If an argument is out of range, or a path reaches no minimiser.
    """
    check_stream(oracle, x0, every)
    if not isinstance(steps, Integral) or steps < 1:
        raise UserError(f"Invalid steps: {steps!r}. It must be an integer of at least 1.")
    if oracle.scale == 0:
        raise UserError("The oracle has no noise (σ = 0), so nothing moves along Γ. Give it a scale above 0.")
    manifold = manifold_of(oracle.problem) if manifold is None else manifold
    length = check_nonnegative("time", time) / steps
    return _euler(oracle.gaussian(), x0, length, int(steps), generator, every, manifold)


def _euler(
    oracle: Oracle,
    x0: Tensor,
    length: float,
    steps: int,
    generator: Generator | None,
    every: int,
    manifold: SlowManifold,
) -> Iterator[Iterate]:
    x, increment, draw = manifold.project(x0), torch.zeros_like(x0), None
    yield Iterate(0, x, increment)
    for k in range(1, steps + 1):
        draw = oracle.draw(x, generator, draw)
        noise = (oracle(x, draw) - oracle.problem.gradient(x)) / oracle.scale  # Σ^{1/2} ξ
        increment = _apply(manifold.tangent_projection(x), noise).mul_(math.sqrt(length))
        increment.add_(manifold.slow_drift(x, oracle.covariance(x)), alpha=length)
        x = manifold.project(x + increment)
        if k % every == 0 or k == steps:
            yield Iterate(k, x, increment)


def projected(states: Iterable[Iterate], manifold: SlowManifold) -> Iterator[Iterate]:
    """Read the positions of SGD or SGDM as Φ(x_k), to be compared with the slow SDE.

    Args:
        states: A stream of states.
        manifold: Γ and Φ.

    Yields:
        The same states with Φ(x_k) for x_k.
    """
    for state in states:
        yield state._replace(x=manifold.project(state.x))


def label_noise_drift(
    problem: Problem, x: Tensor, variance: float = 1.0, manifold: SlowManifold | None = None
) -> Tensor:
    """Give the slow drift under label noise, `−(c/4) ∂Φ ∇tr(H)`: down the trace of the Hessian, along Γ.

    Args:
        problem: The loss L.
        x: Positions on Γ, `(paths, dim)`.
        variance: c of `Σ = c H`.
        manifold: Γ and Φ; None is `manifold_of(problem)`.

    Returns:
        The drift over `t = k η² σ²`, `(paths, dim)`.
    """
    manifold = manifold_of(problem) if manifold is None else manifold
    slope = torch.func.grad(lambda x: problem.hessian(x).diagonal(dim1=-2, dim2=-1).sum())(x)
    return _apply(manifold.tangent_projection(x), slope).mul_(-0.25 * variance)


def label_noise_flow(
    problem: Problem,
    x0: Tensor,
    times: ArrayLike,
    variance: float = 1.0,
    manifold: SlowManifold | None = None,
) -> Tensor:
    """Integrate the slow SDE under label noise, which has no diffusion, by an adaptive solver of ODEs.

    Args:
        problem: The loss L.
        x0: Start points, `(paths, dim)`; the flow starts from Φ(x0).
        times: Rising times t = k η² σ² of at least 0.
        variance: c of `Σ = c H`.
        manifold: Γ and Φ; None is `manifold_of(problem)`.

    Returns:
        The positions, `(times, paths, dim)`.

    Raises:
        UserError: If the times do not rise, a point reaches no minimiser, or the solver fails.
    """
    manifold, times = manifold_of(problem) if manifold is None else manifold, np.asarray(times, float)
    if times.ndim != 1 or not len(times) or times[0] < 0 or (np.diff(times) <= 0).any():
        raise UserError(f"Invalid times: {times.tolist()}. Give rising numbers of at least 0.")
    start = manifold.project(x0)

    def velocity(t: float, flat: np.ndarray) -> np.ndarray:
        x = manifold.project(torch.as_tensor(flat).to(start).view_as(start))
        return label_noise_drift(problem, x, variance, manifold).flatten().cpu().numpy()

    flat = start.flatten().cpu().numpy()
    solution = solve_ivp(velocity, (0, times[-1]), flat, t_eval=times, method="DOP853", rtol=1e-9, atol=1e-10)
    if not solution.success:
        raise UserError(f"The flow along Γ stops at time {solution.t[-1:]}: {solution.message}")
    states = torch.as_tensor(solution.y.T).to(start).view(len(times), *start.shape)
    return manifold.project(states.flatten(0, 1)).view_as(states)

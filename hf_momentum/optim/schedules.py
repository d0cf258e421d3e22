"""Learning rate and momentum over the steps of a run: γ ↔ η, the averaged learning rate η̄, momentum schedules.

η is the effective learning rate of Eq. 3 (`m⁺ = β m + (1−β) g`, `x⁺ = x − η m⁺`), γ the one of the heavy-ball form,
Eq. 1 (`m⁺ = β m + g`, `x⁺ = x − γ m⁺`). Equations are those of Wang et al., "The Marginal Value of Momentum for Small
Learning Rate SGD" (ICLR 2024, arXiv 2307.15196).
"""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from numbers import Integral, Real
from typing import Protocol, TypeVar

from torch import Tensor

from hf_momentum.errors import UserError

Rate = TypeVar("Rate", float, Tensor)


def is_real(value: object) -> bool:
    """Say whether a value is a real number; bools, strings and tensors are not.

    Args:
        value: Anything.

    Returns:
        True for Python's and NumPy's integers and floats, and for fractions.
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def check_momentum(value: float) -> float:
    """Check a momentum β.

    Args:
        value: The momentum.

    Returns:
        The momentum as a Python float.

    Raises:
        UserError: If it is not a number in [0, 1).
    """
    if not (is_real(value) and 0.0 <= value < 1.0):
        raise UserError(f"Invalid momentum value: {value}. Momentum must be a number in [0, 1).")
    return float(value)


def check_nonnegative(label: str, value: Rate) -> Rate:
    """Check a learning rate or a weight decay.

    Args:
        label: What the message calls it, such as `"learning rate"`.
        value: A number, or a tensor of one element.

    Returns:
        A tensor as it came, any other number as a Python float.

    Raises:
        UserError: If it is not a finite number of at least 0, or a tensor of more than one element.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            name = "lr" if label == "learning rate" else label
            raise UserError(
                f"Invalid {label}: Tensor {name} must be 1-element, this one has {value.numel()} elements."
            )
    elif not is_real(value):
        raise UserError(f"Invalid {label}: {value!r}. It must be a number, not {type(value).__name__}.")
    number = float(value.detach() if isinstance(value, Tensor) else value)
    if not (0.0 <= number < math.inf):
        raise UserError(f"Invalid {label}: {number:g}. It must be finite and at least 0.")
    return value if isinstance(value, Tensor) else number


def unknown_name(kind: str, name: object, allowed: Iterable[str]) -> str:
    """Word the error for a name that is not on a list.

    Args:
        kind: What the name stands for, such as `"optimizer"`.
        name: The name as it was given.
        allowed: The names that exist.

    Returns:
        The message; it names the closest match and lists what is allowed.
    """
    allowed = sorted(allowed)
    close = difflib.get_close_matches(str(name), allowed, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {name!r}.{hint} Allowed: {', '.join(allowed)}."


def effective_lr(gamma: Rate, beta: float) -> Rate:
    """Convert Eq. 1's learning rate to Eq. 3's: `η = γ / (1−β)`.

    For constant β both forms make the same iterates, and plain SGD at η is the run to compare them with.

    Args:
        gamma: γ, a number or a tensor of one element.
        beta: The momentum β.

    Returns:
        η, of the type of `gamma`.
    """
    return check_nonnegative("learning rate", gamma) / (1.0 - check_momentum(beta))


def heavy_ball_lr(eta: Rate, beta: float) -> Rate:
    """Convert Eq. 3's learning rate to Eq. 1's: `γ = η (1−β)`, the inverse of `effective_lr`.

    Args:
        eta: η, a number or a tensor of one element.
        beta: The momentum β.

    Returns:
        γ, of the type of `eta`.
    """
    return check_nonnegative("learning rate", eta) * (1.0 - check_momentum(beta))


def averaged_lr(lrs: Iterable[float], betas: float | Iterable[float]) -> list[float]:
    """Give the learning rates at which plain SGD matches SGDM under schedules of η and β.

    `η̄_k = Σ_{s≥k} η_s (∏_{τ=k+1..s} β_τ) (1−β_k)` is the whole weight with which the k-th gradient moves the
    parameters, now and through the momentum of later steps. The sum ends with the run. Computed backwards in O(n) by
    `A_k = η_k + β_{k+1} A_{k+1}`, `η̄_k = (1−β_k) A_k`.

    Args:
        lrs: Effective learning rates η_1 … η_n, one per step.
        betas: Momenta β_1 … β_n, or one number for all steps.

    Returns:
        η̄_1 … η̄_n.
    """
    lrs, betas = _trajectory(lrs, betas)
    averaged, tail, next_beta = [0.0] * len(lrs), 0.0, 0.0
    for k in reversed(range(len(lrs))):
        tail = lrs[k] + next_beta * tail
        averaged[k] = (1.0 - betas[k]) * tail
        next_beta = betas[k]
    return averaged


def reference_averaged_lr(lrs: Iterable[float], betas: float | Iterable[float]) -> list[float]:
    """State `averaged_lr` as its defining double sum, in O(n²) and more.

    Args:
        lrs: Effective learning rates η_1 … η_n, one per step.
        betas: Momenta β_1 … β_n, or one number for all steps.

    Returns:
        η̄_1 … η̄_n.
    """
    lrs, betas = _trajectory(lrs, betas)
    n = len(lrs)
    return [sum(lrs[s] * math.prod(betas[k + 1 : s + 1]) * (1 - betas[k]) for s in range(k, n)) for k in range(n)]


def _trajectory(lrs: Iterable[float], betas: float | Iterable[float]) -> tuple[list[float], list[float]]:
    lrs = [float(check_nonnegative("learning rate", lr)) for lr in lrs]
    betas = [betas] * len(lrs) if is_real(betas) else [float(beta) for beta in betas]
    if len(betas) != len(lrs):
        raise UserError(f"There are {len(lrs)} learning rates and {len(betas)} momenta; give one of each per step.")
    return lrs, [check_momentum(beta) for beta in betas]


class MomentumSchedule(Protocol):
    """A pure function from the step, the length of the run and the learning rate to the momentum."""

    def __call__(self, step: int, total_steps: int, lr: float) -> float:
        """Give the momentum β_k of one step.

        Args:
            step: The optimizer step that is about to be made, counted from 0.
            total_steps: Steps of the whole run, at least 1.
            lr: The effective learning rate η_k of this step.

        Returns:
            β_k, in [0, 1).
        """


def _progress(step: int, total_steps: int) -> float:
    # The fraction of the run that is done: 0 before the first step, 1 at its end and beyond.
    for label, value, least in (("step", step, 0), ("total_steps", total_steps, 1)):
        if not isinstance(value, Integral) or value < least:
            raise UserError(f"Invalid {label}: {value!r}. It must be an integer of at least {least}.")
    return min(step / total_steps, 1.0)


@dataclass(frozen=True)
class ConstantMomentum:
    """The same momentum at every step.

    Attributes:
        momentum: β.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_momentum(self.momentum)

    def __call__(self, step: int, total_steps: int, lr: float) -> float:
        """See `MomentumSchedule`."""
        _progress(step, total_steps)
        return float(self.momentum)


@dataclass(frozen=True)
class LinearMomentum:
    """A straight line from `start` to `end`, then `end`.

    Attributes:
        start: β at step 0.
        end: β once the fraction `over` of the run is done.
        over: Length of the ramp as a fraction of the run, in (0, 1].
    """

    start: float
    end: float
    over: float = 1.0

    def __post_init__(self) -> None:
        check_momentum(self.start)
        check_momentum(self.end)
        if not (is_real(self.over) and 0.0 < self.over <= 1.0):
            raise UserError(f"Invalid over: {self.over!r}. It is a fraction of the run, in (0, 1].")

    def __call__(self, step: int, total_steps: int, lr: float) -> float:
        """See `MomentumSchedule`."""
        weight = self._weight(min(_progress(step, total_steps) / self.over, 1.0))
        return (1.0 - weight) * self.start + weight * self.end

    def _weight(self, progress: float) -> float:
        return progress


@dataclass(frozen=True)
class CosineMomentum(LinearMomentum):
    """Half a cosine from `start` to `end`, then `end`; attributes as `LinearMomentum`."""

    def _weight(self, progress: float) -> float:
        return 0.5 * (1.0 - math.cos(math.pi * progress))


@dataclass(frozen=True)
class StepMomentum:
    """Piecewise constant momentum: `values[i]` from `milestones[i-1]` until before `milestones[i]`.

    Attributes:
        values: The momenta, one more than milestones.
        milestones: Rising fractions of the run in (0, 1), so that they stretch with its steps.
    """

    values: Sequence[float]
    milestones: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(check_momentum(value) for value in self.values))
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if len(self.values) != len(self.milestones) + 1:
            raise UserError(
                f"{len(self.milestones)} milestones need {len(self.milestones) + 1} values, not {len(self.values)}."
            )
        bounds = (0.0, *self.milestones, 1.0)
        if not all(is_real(bound) for bound in bounds) or any(b <= a for a, b in pairwise(bounds)):
            raise UserError(f"Invalid milestones: {self.milestones}. They are rising fractions of the run in (0, 1).")

    def __call__(self, step: int, total_steps: int, lr: float) -> float:
        """See `MomentumSchedule`."""
        progress = _progress(step, total_steps)
        return self.values[sum(progress >= milestone for milestone in self.milestones)]


@dataclass(frozen=True)
class ScalingMomentum:
    """The scaling regime of the theory, `1 − β_k = λ η_k^α`: the momentum follows the learning rate.

    Attributes:
        scale: λ > 0, in units of η^−α.
        alpha: α in [0, 1), the range for which the theory holds.
        max_momentum: Upper bound of β, reached as η goes to 0 (warm-up starts there, decay ends there).
    """

    scale: float
    alpha: float
    max_momentum: float = 0.999

    def __post_init__(self) -> None:
        if not (is_real(self.scale) and 0.0 < self.scale < math.inf):
            raise UserError(f"Invalid scale: {self.scale!r}. λ must be finite and above 0.")
        if not (is_real(self.alpha) and 0.0 <= self.alpha < 1.0):
            raise UserError(f"Invalid alpha: {self.alpha!r}. The theory holds for α in [0, 1).")
        check_momentum(self.max_momentum)

    def __call__(self, step: int, total_steps: int, lr: float) -> float:
        """See `MomentumSchedule`."""
        _progress(step, total_steps)
        lr = float(check_nonnegative("learning rate", lr))
        beta = 1.0 - self.scale * lr**self.alpha
        if beta < 0.0:
            raise UserError(
                f"Momentum 1 − λ η^α is {beta:g} at λ = {self.scale:g}, α = {self.alpha:g}, learning rate {lr:g}. "
                f"Take λ at most {lr**-self.alpha:g}, or a smaller learning rate."
            )
        return min(beta, float(self.max_momentum))


MOMENTUM_SCHEDULES: dict[str, type] = {
    "constant": ConstantMomentum,
    "linear": LinearMomentum,
    "cosine": CosineMomentum,
    "step": StepMomentum,
    "scaling": ScalingMomentum,
}


def momentum_schedule(name: str, **kwargs: float | Sequence[float]) -> MomentumSchedule:
    """Make a momentum schedule by name.

    Args:
        name: A key of `MOMENTUM_SCHEDULES`.
        **kwargs: The attributes of its class.

    Returns:
        The schedule, a frozen dataclass to call with `(step, total_steps, lr)`.

    Raises:
        UserError: If the name or a keyword is unknown, one is missing, or a value is out of range.
    """
    if name not in MOMENTUM_SCHEDULES:
        raise UserError(unknown_name("momentum schedule", name, MOMENTUM_SCHEDULES))
    cls = MOMENTUM_SCHEDULES[name]
    allowed = {field.name: field for field in fields(cls)}
    for keyword in kwargs:
        if keyword not in allowed:
            raise UserError(unknown_name(f"keyword of momentum schedule {name!r}:", keyword, allowed))
    missing = [key for key, field in allowed.items() if field.default is MISSING and key not in kwargs]
    if missing:
        raise UserError(f"Momentum schedule {name!r} needs {' and '.join(missing)}. Allowed: {', '.join(allowed)}.")
    return cls(**kwargs)

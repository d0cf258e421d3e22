"""What a verdict is made from: measured numbers with their intervals, and how the run goes on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

import numpy as np

from hf_momentum.diagnostics.recursion import Modes, Piece, pieces_of
from hf_momentum.errors import UserError
from hf_momentum.optim.schedules import check_momentum, check_nonnegative

_NORMAL = 1.959963984540054  # half a 95% interval in standard deviations
_OF_A_MODE = ("curvature", "squared_gradient", "noise", "curvature_variance")
_TOTALS = ("squared_gradient", "noise_trace", "hessian_noise")


class Estimated(Protocol):
    """A measured number with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Interval:
    """A number with its 95% interval.

    Attributes:
        value: The estimate.
        low: Lower end; the value itself if it is exact.
        high: Upper end, likewise.
    """

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> "Interval":
        """Make one without uncertainty.

        Args:
            value: The number.

        Returns:
            The interval of width 0.
        """
        return cls(value, value, value)


@dataclass(frozen=True)
class Mode:
    """What is measured along one (approximate) eigenvector u of the Hessian, per example.

    Attributes:
        curvature: λ, the Ritz value `uᵀHu`.
        squared_gradient: `(uᵀ∇L)²`, from an unbiased estimator; its interval may reach below 0.
        noise: `uᵀΣu`, the variance of an example's gradient along u.
        curvature_variance: v₁, the variance of an example's curvature `uᵀH_j u`; a mini-batch has `v = v₁/B`.
    """

    curvature: Estimated
    squared_gradient: Estimated
    noise: Estimated
    curvature_variance: Estimated


@dataclass(frozen=True)
class Measurements:
    """What is measured on a model where a run stands.

    Attributes:
        loss: L, the mean training loss; 0 takes the modes' own losses for all there is.
        squared_gradient: `|∇L|²`.
        noise_trace: tr Σ.
        hessian_noise: tr(HΣ).
        hessian_gradient: `∇LᵀH∇L`.
        noise_batch: `B_noise = tr(HΣ) / ∇LᵀH∇L` (McCandlish et al., arXiv 1812.06162); its ends may be infinite.
        modes: The leading modes, the one of λ_max among them. All others are pooled into one, from the totals.
    """

    loss: float
    squared_gradient: Estimated
    noise_trace: Estimated
    hessian_noise: Estimated
    hessian_gradient: Estimated
    noise_batch: Estimated
    modes: Sequence[Mode]

    def __post_init__(self) -> None:
        check_nonnegative("loss", self.loss)
        if not self.modes:
            raise UserError("A verdict needs at least one mode, that of the largest curvature. Measure it by Lanczos.")
        for name in (*_TOTALS, "hessian_gradient"):
            _check_interval(name, getattr(self, name))
        _check_interval("noise_batch", self.noise_batch, finite=False)
        for number, mode in enumerate(self.modes):
            for name in _OF_A_MODE:
                _check_interval(f"{name} of mode {number}", getattr(mode, name))

    def draw(self, batch_size: int, count: int, generator: np.random.Generator) -> Modes:
        """Draw the modes' values, independent and normal with the intervals' widths, below and above the estimate.

        Args:
            batch_size: B.
            count: Number of draws.
            generator: Source of the draws.

        Returns:
            Arrays `(count + 1, modes + 1)`. The first row holds the estimates. The last mode pools what the totals
            leave of the others, at the curvature `tr(HΣ)/tr Σ` of the rest.
        """
        normals = generator.standard_normal((count + 1, 4 * len(self.modes) + 3))
        normals[0] = 0
        columns = [getattr(mode, name) for name in _OF_A_MODE for mode in self.modes]
        columns += [getattr(self, name) for name in _TOTALS]
        value, low, high = (np.array([getattr(each, end) for each in columns]) for end in ("value", "low", "high"))
        drawn = value + normals / _NORMAL * np.where(normals < 0, value - low, high - value)
        curvature, gradient, noise, variance = np.split(drawn[:, :-3], 4, axis=1)
        gradient, noise, variance = (np.maximum(each, 0) for each in (gradient, noise, variance))
        rest_gradient = np.maximum(drawn[:, -3] - gradient.sum(-1), 0)
        rest_noise = np.maximum(drawn[:, -2] - noise.sum(-1), 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            pooled = np.where(rest_noise > 0, (drawn[:, -1] - (curvature * noise).sum(-1)) / rest_noise, 0)
        pooled = np.clip(pooled, 0, np.maximum(curvature.max(-1), 0))
        noise, variance = np.column_stack([noise, rest_noise]), np.column_stack([variance, np.zeros(count + 1)])
        gradient = np.column_stack([gradient, rest_gradient])
        return Modes(np.column_stack([curvature, pooled]), gradient, noise / batch_size, variance / batch_size)


@dataclass(frozen=True)
class Setting:
    """How the run goes on.

    Attributes:
        lr: η, the effective learning rate.
        batch_size: B, examples per optimizer step over all devices.
        momentum: β of the SGDM to judge.
        steps: Steps that remain.
        factors: `η_k/η` of these steps, from the schedule; empty is constant.
        momentum_bytes: Memory that the momentum takes.
    """

    lr: float
    batch_size: int
    momentum: float
    steps: int
    factors: Sequence[float] = ()
    momentum_bytes: int = 0

    def __post_init__(self) -> None:
        check_momentum(self.momentum)
        if not check_nonnegative("lr", self.lr):
            raise UserError("Invalid lr: 0. The learning rate must be above 0 for a run to judge.")
        for name, least in (("batch_size", 1), ("steps", 1), ("momentum_bytes", 0)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise UserError(f"Invalid {name}: {value!r}. It must be an integer of at least {least}.")
        if len(self.factors) not in (0, self.steps):
            raise UserError(f"{len(self.factors)} factors do not fit {self.steps} remaining steps: give one per step.")
        for factor in self.factors:
            check_nonnegative("factor of the schedule", factor)

    @property
    def pieces(self) -> list[Piece]:
        """The schedule, cut into pieces of constant learning rate."""
        return pieces_of(self.factors) if len(self.factors) else [Piece(1.0, self.steps)]


def _check_interval(name: str, estimate: Estimated, finite: bool = True) -> None:
    ends = (estimate.low, estimate.value, estimate.high)
    if any(map(math.isnan, ends)) or not ends[0] <= ends[1] <= ends[2]:
        raise UserError(
            f"Invalid {name}: {ends[1]} in [{ends[0]}, {ends[2]}]. It must lie in its interval, and be no NaN."
        )
    if finite and not all(map(math.isfinite, ends)):
        raise UserError(
            f"Invalid {name}: {ends[1]} in [{ends[0]}, {ends[2]}]. It must be finite; measure more micro-batches, "
            "or at a point where the loss is finite."
        )

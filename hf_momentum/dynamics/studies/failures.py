"""Where and how the agreement of SGD and SGDM fails, and where it only seems to.

The theory has η → 0 at fixed `α < 1` (`1−β = Θ(η^α)`), with noise whose Σ does not depend on σ. One condition at a
time is broken, in the regime `σ = η^{−1/2}` where noise stays visible in the limit:

- η up to SGD's limit of stability: on a quadratic the distance leaves its first order and grows without bound.
- α = 1, `1−β = η`: the momentum remembers a time of 1 however small η is. The mean then follows `X″ + X′ + X = 0`
  instead of `X′ + X = 0`. For α < 1 it lags by `ε = ηβ/(1−β)`, what the first steps have not used of their gradients.
- Σ that depends on σ, `Σ(x) = 1 + a cos(σx)`: it varies on the scale √η, which is the length of a step. There is no
  common SDE, and the diffusion differs between SGD and SGDM at every η.
- A law of v that depends on σ while Σ does not: kicks of the rate η and the variance 1. Both algorithms have the same
  limit, but it jumps: only the SME fails.
- Escape from an isolated minimum, at fixed σ. It takes a time that grows exponentially in 1/η, longer than the theory
  speaks of.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from hf_momentum.dynamics.estimates import mean_estimate
from hf_momentum.dynamics.iterates import iterates
from hf_momentum.dynamics.moments import LinearModel, sgdm_moments
from hf_momentum.dynamics.oracle import NoisyGradientOracle
from hf_momentum.dynamics.problems import LeastSquares, Quadratic
from hf_momentum.dynamics.sde import sme_moments
from hf_momentum.dynamics.studies import Row
from hf_momentum.dynamics.weak_error import exact_weak_errors, fitted_order, power, simulated_weak_errors, step_grid

TIME = 5.0  # kη at the end of a run, but for the escapes
_POINTS = 200  # at which moments are compared
_RIPPLE = 0.9  # a
_AGAINST = "SGDM"
_FIRST = 0.1  # where all exponents have β = .9

BIG, SHARED, ALPHA, ESCAPE = "η is not small", "noise that depends on σ", "1 − β = 0.1 (η/0.1)^α", "escape"


class RareKicks(NoisyGradientOracle):
    """Noise of variance 1 that is 0 but with the probability p, and then `±1/√p`.

    Args:
        loss: L.
        probability: p.
        scale: σ.
    """

    def __init__(self, loss: Quadratic, probability: float, scale: float) -> None:
        super().__init__(loss, scale=scale)
        self.probability = probability

    def draw(self, x: Tensor, generator: Generator | None = None, out: Tensor | None = None) -> Tensor:
        """See `Oracle.draw`."""
        uniform = torch.rand_like(x, generator=generator)
        kicks = (uniform < self.probability / 2).to(x) - (uniform > 1 - self.probability / 2).to(x)
        return kicks.div_(math.sqrt(self.probability))


class DoubleWell(LeastSquares):
    """`L = ¼ (x²−1)²`, with minima at ±1 and a barrier of ¼ at 0."""

    dim = examples = 1

    def residuals(self, x: Tensor) -> Tensor:
        """See `LeastSquares.residuals`."""
        return (x.square() - 1) / math.sqrt(2)

    def pull(self, x: Tensor, weights: Tensor) -> Tensor:
        """See `LeastSquares.pull`."""
        return math.sqrt(2) * x * weights


def cells(
    momentum: float = 0.9,
    big: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 1.3, 1.6, 1.8, 1.9, 1.95),
    alphas: tuple[float, ...] = (0.0, 0.5, 1.0),
    small: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    noisy: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1),
    paths: int = 40_000,
    wells: tuple[float, ...] = (0.12, 0.15, 0.2, 0.25, 0.3, 0.4),
    escapes: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Make one cell for each line, and one for each η of the escapes.

    Args:
        momentum: β of SGDM.
        big: η for "η is not small", below 2.
        alphas: Exponents α.
        small: η for them, at most 0.1.
        noisy: η for the noise that depends on σ.
        paths: Number of paths for it.
        wells: η of the escapes.
        escapes: Number of paths that escape.
        seed: Of the noise.

    Returns:
        The cells.
    """
    found = [{"part": BIG, "line": name, "momentum": momentum, "lrs": list(big)} for name in (_AGAINST, "SME")]
    found += [{"part": ALPHA, "line": f"α = {alpha:g}", "alpha": alpha, "lrs": list(small)} for alpha in alphas]
    noise = {"part": SHARED, "momentum": momentum, "lrs": list(noisy), "paths": paths, "seed": seed}
    found += [noise | {"line": line} for line in NOISES]
    wells_ = {"part": ESCAPE, "momentum": momentum, "paths": escapes, "seed": seed}
    return found + [wells_ | {"lr": lr, "line": "SGDM / SGD"} for lr in wells]


def rows(part: str, line: str, **options: Any) -> list[Row]:
    """Compute one cell.

    Args:
        part: The condition that is broken.
        line: What is compared.
        **options: The cell's other values.

    Returns:
        Rows over `lr` with the `quantity` of that name, and one row "summary".
    """
    label = {"quantity": part, "line": line}
    make = {BIG: partial(_big, line), ALPHA: _alpha, SHARED: partial(_noises, line), ESCAPE: _escape}[part]
    found = [label | row for row in make(**options)]
    return found if part == ESCAPE else [*found, _summary(found)]


def _summary(found: list[Row]) -> Row:
    least = found[:4]
    order = fitted_order([row["lr"] for row in least], [row["measured"] for row in least])
    fit = {"order": order.order, "order low": order.low, "order high": order.high}
    return least[0] | fit | {"quantity": "summary", "broken": least[0]["quantity"]}


def _big(line: str, momentum: float, lrs: list[float]) -> list[Row]:
    def row(lr: float) -> Row:
        model, at = LinearModel.quadratic(1.0, scale=lr**-0.5), step_grid(math.ceil(TIME / lr) + 500, _POINTS)
        sgd = sgdm_moments(model, 0.0, lr, at=at)
        other = (
            sgdm_moments(model, 0.0, lr, momentum, at=at) if line == _AGAINST else sme_moments(model, 0.0, lr, at=at)
        )
        predicted = {"predicted": 1 / (2 - lr) - 0.5} if line == "SME" else {}  # of the stationary variances
        return {"lr": lr, "measured": float(exact_weak_errors(sgd, other, [power(2)])[0])} | predicted

    return [row(lr) for lr in sorted(lrs)]


def _alpha(alpha: float, lrs: list[float]) -> list[Row]:
    def row(lr: float) -> Row:
        model, at = LinearModel.quadratic(1.0, 0.0), step_grid(math.ceil(TIME / lr), _POINTS)
        weight = 0.1 * (lr / _FIRST) ** alpha
        sgd, sgdm = (sgdm_moments(model, 1.0, lr, beta, at=at) for beta in (0.0, 1 - weight))
        predicted = lr * (1 - weight) / weight if alpha < 1 else underdamped_distance()
        return {"lr": lr, "measured": float(exact_weak_errors(sgd, sgdm, [power(1)])[0]), "predicted": predicted}

    return [row(lr) for lr in sorted(lrs)]


def underdamped_distance() -> float:
    """Give the largest `|X − e^{−t}|` of `X″ + X′ + X = 0` from `X = 1, X′ = 0`.

    Returns:
        The distance of the limits for `1 − β = η`.
    """
    t, w = np.linspace(0, TIME, 100_001), math.sqrt(3) / 2
    return float(np.abs(np.exp(-t / 2) * (np.cos(w * t) + np.sin(w * t) / (2 * w)) - np.exp(-t)).max())


def _ripples(rate: float, lr: float) -> NoisyGradientOracle:
    flat = Quadratic(torch.zeros(1).double())
    return NoisyGradientOracle(flat, lambda x: 1 + _RIPPLE * torch.cos(rate * x), scale=lr**-0.5)


def _kicks(lr: float) -> NoisyGradientOracle:
    return RareKicks(Quadratic([1.0]), lr, lr**-0.5)


# Line → the oracle, the degree n of h = x^n, and whether SGD is compared with the SME instead of SGDM.
NOISES: dict[str, tuple[Callable[[float], NoisyGradientOracle], int, bool]] = {
    "Σ(x)": (lambda lr: _ripples(1.0, lr), 2, False),
    "Σ(σx)": (lambda lr: _ripples(lr**-0.5, lr), 2, False),
    "kicks": (_kicks, 4, False),
    "kicks, SME": (_kicks, 4, True),
}


def _noises(line: str, momentum: float, lrs: list[float], paths: int, seed: int) -> list[Row]:
    make, degree, limit = NOISES[line]

    def row(lr: float) -> Row:
        oracle, steps, start = make(lr), math.ceil(1 / lr), torch.zeros(paths, 1).double()
        runs = [
            iterates(oracle, start, lr, beta, steps=steps, generator=torch.Generator().manual_seed(seed), every=steps)
            for beta in (0.0, momentum)
        ]
        if not limit:
            (error,) = simulated_weak_errors(*runs, [power(degree)])
            low, high = error.interval()
            return {"lr": lr, "measured": error.maximum, "low": low, "high": high}
        *_, last = runs[0]
        (law,) = sme_moments(LinearModel.quadratic(1.0, scale=lr**-0.5), 0.0, lr, at=[steps])
        size = mean_estimate(power(degree)(last.x) - power(degree).mean(law)).size()
        return {"lr": lr} | size._asdict()

    return [row(lr) for lr in sorted(lrs)]


def _escape(lr: float, momentum: float, paths: int, seed: int) -> list[Row]:
    # From x = −1 to x = ½ in the double well ¼(x²−1)², with noise of variance 1.
    oracle = NoisyGradientOracle(DoubleWell())
    times = [escape_times(oracle, lr, beta, paths, seed + i) for i, beta in enumerate((0.0, momentum))]
    means = [float(each.mean()) * lr for each in times]
    errors = [float(each.std() / each.mean()) / math.sqrt(paths) for each in times]
    ratio, half = means[1] / means[0], 1.96 * math.hypot(*errors)
    row = {"lr": lr, "measured": ratio, "low": ratio * math.exp(-half), "high": ratio * math.exp(half)}
    logs = {"log ratio / η": math.log(ratio) / lr, "log low": (math.log(ratio) - half) / lr}
    logs["log high"] = (math.log(ratio) + half) / lr
    return [row | logs | {"SGD": means[0], "SGDM": means[1]}]


def escape_times(oracle: NoisyGradientOracle, lr: float, momentum: float, paths: int, seed: int) -> Tensor:
    """Count steps until each path from −1 is beyond ½.

    Args:
        oracle: Of one parameter.
        lr: η.
        momentum: β.
        paths: Number of paths.
        seed: Of the noise.

    Returns:
        Steps, `(paths,)`.
    """
    times = torch.zeros(paths).double()
    start, generator = torch.full((paths, 1), -1.0).double(), torch.Generator().manual_seed(seed)
    for state in iterates(oracle, start, lr, momentum, steps=10**9, generator=generator):
        times[(times == 0) & (state.x[:, 0] > 0.5)] = state.step
        if state.step % 100 == 0 and bool((times > 0).all()):
            break
    return times

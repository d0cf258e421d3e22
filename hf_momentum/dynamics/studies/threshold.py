"""The learning rate at which SGD and SGDM part, and those at which each loses its stability.

With additive noise SGD is stable for `ηλ_max < 2` and SGDM for `ηλ_max < 2(1+β)/(1−β)`. Near a minimiser with the
curvatures λ_i and the noise s_i² along them the stationary loss is `Σ_i ½ η s_i² / (2 − κηλ_i)`, `κ = (1−β)/(1+β)`;
SGD has κ = 1. Mini-batches see curvatures that vary by v, and `η < 2λ/(v + κλ²)` in one dimension: small batches leave
momentum little to stabilise.

Runs start at a minimiser, whose λ_max gives `h = ηλ_max`, and are read after a fixed number of steps. What counts is
set beforehand: both part at the least h of the grid where the mean final losses differ by more than `FACTOR` and by
more than 4 standard errors; a run has lost its stability once its mean loss exceeds `LOST` h times SGD's stationary
loss at h = 1, since the noise's share of the loss grows with η. Where that begins is found by bisection.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from scipy.optimize import brentq
from torch import Tensor

from hf_momentum.dynamics.estimates import mean_estimate, mean_ratio
from hf_momentum.dynamics.iterates import iterates, last_iterate
from hf_momentum.dynamics.moments import LinearModel, stability_limit
from hf_momentum.dynamics.oracle import LabelNoiseOracle, MinibatchOracle, NoisyGradientOracle, Oracle
from hf_momentum.dynamics.overparametrised import MatrixFactorisation, TwoLayerNet
from hf_momentum.dynamics.problems import LinearRegression, Quadratic
from hf_momentum.dynamics.stability import critical_lr, stationary_variance
from hf_momentum.dynamics.studies import Row

FACTOR, LOST = 2.0, 1e3
HALVINGS = 8
POPULATION, ROUNDS = 8000, 30  # of `second_moment_limit`
METHODS = ("SGD", "SGDM")
_NOISE = 1e-8  # variance of the noise: small beside the distances on which the curvature changes
_FLAT = 1e-5  # eigenvalues below this part of the largest belong to Γ


def quadratic_oracle(curvature: Tensor) -> Oracle:
    """Make a quadratic with independent noise.

    Args:
        curvature: H, or its diagonal.

    Returns:
        The oracle.
    """
    return NoisyGradientOracle(Quadratic(curvature), _NOISE)


def rotated(curvatures: Tensor) -> Tensor:
    """Make a full Hessian.

    Args:
        curvatures: Its eigenvalues, `(dim,)`.

    Returns:
        H, `(dim, dim)`.
    """
    vectors, _ = torch.linalg.qr(_normals(len(curvatures), len(curvatures)))
    return (vectors * curvatures) @ vectors.mT


PROBLEMS: dict[str, Callable[[], Oracle]] = {
    "one mode": lambda: quadratic_oracle(torch.ones(1).double()),
    "ill-conditioned": lambda: quadratic_oracle(torch.logspace(-2, 0, 5).double()),
    "full Hessian": lambda: quadratic_oracle(rotated(torch.linspace(0.5, 1, 4).double())),
    "two-layer net": lambda: LabelNoiseOracle(TwoLayerNet(_normals(8, 2), _normals(15)), _NOISE),
    "factorisation": lambda: LabelNoiseOracle(MatrixFactorisation(_normals(4, 2) @ _normals(2, 3), 2), _NOISE),
}


def regression(batch_size: int, examples: int = 32, dim: int = 3) -> MinibatchOracle:
    """Make mini-batches of a linear regression without residuals, whose minimiser is 0.

    Args:
        batch_size: B.
        examples: N.
        dim: Number of parameters.

    Returns:
        The oracle; all its noise is curvature noise.
    """
    features = _normals(examples, dim)
    return MinibatchOracle(LinearRegression(features, torch.zeros(examples).double()), batch_size)


def cells(
    momenta: tuple[float, ...] = (0.5, 0.9, 0.99),
    problems: tuple[str, ...] = tuple(PROBLEMS),
    nonlinear_momenta: tuple[float, ...] = (0.9,),
    per_octave: int = 2,
    steps: int = 1000,
    paths: int = 500,
    nonlinear_steps: int = 300,
    nonlinear_paths: int = 50,
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64),
    regression_momentum: float = 0.9,
    populations: int = 6,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Make one cell for each problem and β, and one for each batch size and method.

    Args:
        momenta: β of SGDM on the quadratics.
        problems: Names of `PROBLEMS`.
        nonlinear_momenta: β of SGDM on the net and the factorisation.
        per_octave: Learning rates for each doubling.
        steps: Number of steps on quadratics.
        paths: Number of paths on quadratics.
        nonlinear_steps: Those on the net and the factorisation.
        nonlinear_paths: Likewise.
        batch_sizes: B of the regressions.
        regression_momentum: β of SGDM on them.
        populations: Independent estimates of each of their limits.
        seed: Of the noise.

    Returns:
        The cells.
    """
    found = []
    for name in problems:
        curved = isinstance(PROBLEMS[name](), LabelNoiseOracle)
        size = (nonlinear_steps, nonlinear_paths) if curved else (steps, paths)
        for beta in nonlinear_momenta if curved else momenta:
            cell = {"part": "problem", "problem": name, "momentum": beta, "per_octave": per_octave}
            found.append(cell | {"steps": size[0], "paths": size[1], "seed": seed})
    limits = {"part": "regression", "populations": populations, "seed": seed}
    pairs = [(batch, beta) for batch in batch_sizes for beta in (0.0, regression_momentum)]
    return found + [limits | {"batch_size": batch, "momentum": beta} for batch, beta in pairs]


def rows(part: str, **options: Any) -> list[Row]:
    """Compute one cell.

    Args:
        part: "problem" or "regression".
        **options: The cell's other values.

    Returns:
        Rows with the `quantity` "loss ratio" or "sharpness" over `h`, "parting" or "limit".
    """
    return _problem(**options) if part == "problem" else [_regression(**options)]


class Ended(NamedTuple):
    """A run: the paths' final losses, the highest mean loss on the way, and where the paths end."""

    losses: Tensor
    peak: float
    x: Tensor


class Case:
    """A problem at its minimiser, run with the same noise each time.

    Args:
        oracle: Its noise covariance at the minimiser is diagonal where the Hessian is.
        steps: Number of steps.
        paths: Number of paths.
        seed: Of the noise.
    """

    def __init__(self, oracle: Oracle, steps: int, paths: int, seed: int) -> None:
        self.oracle, self.steps, self.seed = oracle, steps, seed
        problem = oracle.problem
        minimiser = getattr(problem, "minimiser", None)
        start = torch.zeros(problem.dim).double() if minimiser is None else minimiser
        self.start = start.expand(paths, -1)
        values, vectors = torch.linalg.eigh(problem.hessian(start[None])[0])
        noise = (vectors.mT @ oracle.covariance(start[None])[0] @ vectors).diagonal() * oracle.scale**2
        curved = values > _FLAT * values[-1]
        self.modes = list(zip(values[curved].tolist(), noise[curved].tolist(), strict=True))
        self.sharpness = float(values[-1])

    def run(self, h: float, momentum: float) -> Ended:
        """Run from the minimiser at `η = h/λ_max`."""
        generator, peak = torch.Generator().manual_seed(self.seed), 0.0
        every = max(1, self.steps // 20)
        lr = h / self.sharpness
        options = {"steps": self.steps, "generator": generator, "every": every}
        for state in iterates(self.oracle, self.start, lr, momentum, **options):
            losses = self.oracle.problem.loss(state.x)
            mean = float(losses.mean())
            peak = max(peak, mean) if math.isfinite(mean) else math.inf
        return Ended(losses, peak, state.x)

    def predicted_loss(self, h: float, momentum: float) -> float:
        """Give `Σ_i ½ η s_i² / (2 − κηλ_i)`, infinite where it is not stable."""
        lr = h / self.sharpness
        if lr >= critical_lr(self.sharpness, momentum):
            return math.inf
        return sum(0.5 * value * stationary_variance(value, noise, lr, momentum) for value, noise in self.modes)

    def lost(self, ended: Ended, h: float) -> bool:
        """Whether a run at h has lost its stability."""
        return ended.peak > LOST * h * self.predicted_loss(1.0, 0.0)

    def limit(self, momentum: float, low: float, high: float) -> float:
        """Find by bisection where stability is lost, to the ratio of the ends to the power `2^−HALVINGS`."""
        for _ in range(HALVINGS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.lost(self.run(middle, momentum), middle) else (middle, high)
        return math.sqrt(low * high)


def _problem(problem: str, momentum: float, per_octave: int, steps: int, paths: int, seed: int) -> list[Row]:
    case, line = Case(PROBLEMS[problem](), steps, paths, seed), {"problem": problem, "momentum": momentum}
    ends = [critical_lr(1.0, beta) for beta in (0.0, momentum)]  # in units of h
    first, last = math.floor(-3 * per_octave), math.ceil(per_octave * math.log2(ends[1]))
    found, parted = [], None
    for h in [2 ** (i / per_octave) for i in range(first, last + 1)]:
        sgd, sgdm = (case.run(h, beta) for beta in (0.0, momentum))
        row, differs = _ratio(case, h, momentum, sgd.losses, sgdm.losses)
        parted = h if parted is None and differs else parted
        found.append({"quantity": "loss ratio"} | line | {"h": h} | row)
        if isinstance(case.oracle, LabelNoiseOracle):
            found += [{"quantity": "sharpness"} | line | {"h": h} | row for row in _sharpness(case, h, (sgd, sgdm))]
    limits = [case.limit(beta, end / 2, end * 2) for beta, end in zip((0.0, momentum), ends, strict=True)]
    predicted = brentq(lambda h: case.predicted_loss(h, 0) / case.predicted_loss(h, momentum) - FACTOR, 1e-3, 2 - 1e-9)
    summary = {"quantity": "parting", "λ_max": case.sharpness, "parts": parted, "parts predicted": predicted}
    summary |= {"SGD": limits[0], "SGD predicted": ends[0], "SGDM": limits[1], "SGDM predicted": ends[1]}
    return [*found, line | summary]


def _ratio(case: Case, h: float, momentum: float, sgd: Tensor, sgdm: Tensor) -> tuple[Row, bool]:
    # Of the mean losses; a lost run has no loss to compare, and parts from one that is not.
    predicted = case.predicted_loss(h, 0.0) / case.predicted_loss(h, momentum) if h < 2 else None
    row = {"line": f"β = {momentum:g}", "predicted": predicted}
    if not sgd.isfinite().all() or not sgdm.isfinite().all():
        return row, bool(sgdm.isfinite().all())
    ratio = mean_ratio(sgd, sgdm)
    difference, spread = abs(float((sgd - sgdm).mean())), float((sgd - sgdm).std()) / math.sqrt(len(sgd))
    return row | ratio._asdict(), max(ratio.measured, 1 / ratio.measured) > FACTOR and difference > 4 * spread


def _sharpness(case: Case, h: float, ended: tuple[Ended, Ended]) -> list[Row]:
    found = []
    for method, run in zip(METHODS, ended, strict=True):
        if run.x.isfinite().all():
            values = torch.linalg.eigvalsh(case.oracle.problem.hessian(run.x))[:, -1] * (h / case.sharpness)
            found.append({"method": method} | mean_estimate(values)._asdict())
    return found


def _regression(batch_size: int, momentum: float, populations: int, seed: int) -> Row:
    oracle = regression(batch_size)
    model, problem = LinearModel.of(oracle), oracle.problem
    sharpness = float(np.linalg.eigvalsh(model.hessian)[-1])
    values, vectors = torch.linalg.eigh(problem.matrix)
    v = (problem.features @ vectors).square().var(0, correction=0) * oracle.scale**2
    modes = [critical_lr(float(value), momentum, float(each)) for value, each in zip(values, v, strict=True)]
    seeds = range(seed, seed + populations)
    limits = [second_moment_limit(oracle, momentum, each, critical_lr(sharpness, momentum)) for each in seeds]
    mean, half = np.mean(limits), stats.t.ppf(0.975, populations - 1) * np.std(limits, ddof=1) / math.sqrt(populations)
    row = {"quantity": "limit", "batch size": batch_size, "momentum": momentum, "method": METHODS[momentum > 0]}
    row |= {"measured": mean, "low": mean - half, "high": mean + half, "predicted": stability_limit(model, momentum)}
    row["per mode"] = min(modes)
    return row | {name: float(row[name] * sharpness) for name in ("measured", "low", "high", "predicted", "per mode")}


def second_moment_limit(oracle: Oracle, momentum: float, seed: int, highest: float) -> float:
    """Find the learning rate at which `E |(x, m)|²` stops shrinking, by simulation.

    Near the limit rare paths carry the second moment, and no sample has them. But it obeys a linear recursion of its
    own: so every few steps the paths are replaced by normal ones of the same second moment.

    Args:
        oracle: One with linear gradients that vanish at 0.
        momentum: β.
        seed: Of all random numbers.
        highest: A learning rate that is not stable.

    Returns:
        The limit of η.
    """
    dim, steps = oracle.problem.dim, 4

    def growth(log_lr: float) -> float:
        generator, second, rates = torch.Generator().manual_seed(seed), torch.eye(2 * dim).double(), []
        for _ in range(ROUNDS):
            normals = torch.randn(POPULATION, 2 * dim, generator=generator, dtype=torch.float64)
            x, m = (normals @ torch.linalg.cholesky(second).mT).split(dim, dim=1)
            lr, m0 = math.exp(log_lr), m.contiguous()
            last = last_iterate(oracle, x, lr, momentum, steps=steps, generator=generator, m0=m0)
            state = torch.cat([last.x, last.m], dim=1)
            second = state.mT @ state / POPULATION
            rates.append(float(second.trace().log()))
            second = second / second.trace()
        return sum(rates[ROUNDS // 2 :])

    return math.exp(brentq(growth, math.log(highest) - 6, math.log(1.2 * highest), xtol=1e-5))


def _normals(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)

"""SVAG: amplified noise at a smaller learning rate brings SGD and SGDM together, if β stays as it is.

SVAG runs at η/ℓ for ℓ times the steps, with ℓ times the noise covariance (Li, Malladi, Arora, arXiv 2102.12470). Then
descent and noise per unit of time stay, the curvature term falls as 1/ℓ, and so does `ε = ηβ/(ℓ(1−β))`. With `1 − β`
scaled by 1/ℓ instead, ε stays, and SGD and SGDM have two limits. Distances on a quadratic are exact and simulated.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_momentum.dynamics.estimates import Estimate, mean_estimate
from hf_momentum.dynamics.iterates import iterates
from hf_momentum.dynamics.moments import LinearModel, Moments, joint_moments, rms_distance
from hf_momentum.dynamics.oracle import MinibatchOracle, NoisyGradientOracle
from hf_momentum.dynamics.problems import LinearRegression, Quadratic
from hf_momentum.dynamics.studies import Row
from hf_momentum.dynamics.weak_error import TestFunction, cosine, power
from hf_momentum.optim import svag_coefficients, svag_hyperparameters

PATHWISE = "pathwise RMS"
FUNCTIONS = (power(1), power(2), cosine(1.0))
FIXED, SCALED = "β fixed", "1−β by 1/ℓ"
INDEPENDENT, DISJOINT = "independent batches", "disjoint halves"


def cells(
    ells: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    lr: float = 1.0,
    curvature: float = 1.2,
    momentum: float = 0.9,
    x0: float = 3.0,
    steps: int = 20,
    paths: int = 20_000,
    examples: int = 16,
    batch_size: int = 4,
    draws: int = 200_000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Make one cell for each ℓ and each way to go with it.

    Args:
        ells: ℓ.
        lr: η at ℓ = 1.
        curvature: λ.
        momentum: β at ℓ = 1.
        x0: Start point.
        steps: Steps at ℓ = 1.
        paths: Pairs of paths with common random numbers.
        examples: N of the linear regression whose batches are amplified.
        batch_size: B.
        draws: Number of amplified gradients.
        seed: Of all noise.

    Returns:
        The cells.
    """
    run = {"lr": lr, "curvature": curvature, "momentum": momentum, "x0": x0, "steps": steps, "paths": paths}
    batch = {"examples": examples, "batch_size": batch_size, "draws": draws}
    made = [{"way": way, "ell": ell, "seed": seed} | run for ell in ells for way in (FIXED, SCALED)]
    return made + [{"way": way, "ell": ell, "seed": seed} | batch for ell in ells for way in (INDEPENDENT, DISJOINT)]


def rows(way: str, ell: int, seed: int, **setting: Any) -> list[Row]:
    """Measure the distances of SGD and SGDM at one ℓ, or the moments of the amplified gradient.

    Args:
        way: `FIXED` or `SCALED` for distances, `INDEPENDENT` or `DISJOINT` for gradients.
        ell: ℓ.
        seed: Of the noise.
        **setting: The rest of the cell.

    Returns:
        Rows with the `quantity` "distance", the largest over the run, of each `function`: `measured` by simulation at
        the `step` where the exact one, `predicted`, is largest; or "mean" (of each coordinate) and "covariance" (its
        trace, in units of one batch's).
    """
    measure = distances if way in (FIXED, SCALED) else gradients
    return [{"way": way, "ell": ell} | row for row in measure(way, ell, seed=seed, **setting)]


def distances(
    way: str, ell: int, lr: float, curvature: float, momentum: float, x0: float, steps: int, paths: int, seed: int
) -> list[Row]:
    """Give the largest distances over a run, exactly and by simulation; see `cells` and `rows`."""
    rate, count = svag_hyperparameters(lr, steps, ell)
    beta = momentum if way == FIXED else 1 - (1 - momentum) / ell
    oracle = NoisyGradientOracle(Quadratic([curvature])).svag(ell)
    exact = list(joint_moments(LinearModel.of(oracle), x0, rate, beta, at=range(1, count + 1)))
    largest = {
        name: max(exact, key=lambda joint, name=name: exact_distance(joint, name)) for name in (PATHWISE, *FUNCTIONS)
    }
    wanted, last = {joint.step for joint in largest.values()}, max(joint.step for joint in largest.values())
    start = torch.full((paths, 1), float(x0), dtype=torch.float64)
    runs = (
        iterates(oracle, start, rate, each, steps=last, generator=torch.Generator().manual_seed(seed))
        for each in (0.0, beta)
    )
    pairs = {a.step: (a.x.clone(), b.x.clone()) for a, b in zip(*runs, strict=True) if a.step in wanted}
    made = []
    for name, joint in largest.items():
        measured = simulated_distance(*pairs[joint.step], name)
        label = name if name == PATHWISE else name.name
        place = {"step": joint.step, "time": joint.step * rate, "momentum": beta}
        row = {"quantity": "distance", "function": label, "series": f"{label}, {way}"} | place
        made.append(row | measured._asdict() | {"predicted": exact_distance(joint, name)})
    return made


def exact_distance(joint: Moments, function: TestFunction | str) -> float:
    """Read a distance off the joint moments of SGD and SGDM in one dimension.

    Args:
        joint: What `joint_moments` yields.
        function: h, or `PATHWISE`.

    Returns:
        `|E h(x_SGD) − E h(x_SGDM)|`, or the RMS distance.
    """
    if function == PATHWISE:
        return rms_distance(joint)
    mean, variance = joint.mean, np.diag(joint.covariance)
    return abs(function.expectation(mean[0], variance[0]) - function.expectation(mean[1], variance[1]))


def simulated_distance(sgd: Tensor, sgdm: Tensor, function: TestFunction | str) -> Estimate:
    """Estimate a distance from pairs of paths.

    Args:
        sgd: Positions, `(paths, 1)`.
        sgdm: Positions that belong to them.
        function: h, or `PATHWISE`.

    Returns:
        The estimate.
    """
    if function == PATHWISE:
        return mean_estimate((sgd - sgdm).square()[:, 0]).root()
    return mean_estimate(function(sgd) - function(sgdm)).size()


def gradients(way: str, ell: int, examples: int, batch_size: int, draws: int, seed: int) -> list[Row]:
    """Give mean and covariance of amplified gradients of a linear regression; see `cells` and `rows`.

    Independent batches are drawn with replacement. Disjoint halves are drawn without, 2B of N examples: then the
    covariance is `ℓV + (ℓ−1)S/(N−1)`, with V a batch's and S the examples' own.

    Returns:
        The rows.
    """
    random = torch.Generator().manual_seed(seed)
    features, targets = (torch.randn(examples, k, generator=random, dtype=torch.float64) for k in (2, 1))
    problem, x = LinearRegression(features, targets[:, 0]), torch.tensor([[0.5, -1.0]]).double()
    oracle = MinibatchOracle(problem, batch_size, replacement=way == INDEPENDENT)
    centre, spread = problem.gradient(x)[0], oracle.covariance(x)[0].trace().item()
    points = x.expand(draws, 2)
    if way == INDEPENDENT:
        sample, extra = oracle.svag(ell).sample(points, random), 0.0
    else:
        first, second = disjoint_weights(points, examples, batch_size, random)
        r1, r2 = svag_coefficients(ell)
        sample, extra = r1 * oracle(points, first) + r2 * oracle(points, second), (ell - 1) / (examples - 1)
    one = oracle.scale**2 * spread  # tr V
    made = [_estimate("mean", sample[:, i], centre[i].item()) | {"coordinate": i} for i in range(2)]
    squares = (sample - centre).square().sum(1) / one
    return [*made, _estimate("covariance", squares, ell + extra * spread / one)]


def disjoint_weights(x: Tensor, examples: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw two batches of B without replacement that have no example in common.

    Args:
        x: Positions, `(paths, dim)`.
        examples: N of at least 2B.
        batch_size: B.
        generator: Source of randomness.

    Returns:
        The examples' weights in either batch, `(paths, N)`.
    """
    order = torch.rand(len(x), examples, generator=generator).argsort(1)[:, : 2 * batch_size]
    share = x.new_full((1, 1), 1 / batch_size).expand(len(x), batch_size)
    return tuple(x.new_zeros(len(x), examples).scatter_(1, part, share) for part in order.split(batch_size, dim=1))


def _estimate(quantity: str, values: Tensor, predicted: float) -> Row:
    return {"quantity": quantity, "predicted": predicted} | mean_estimate(values)._asdict()

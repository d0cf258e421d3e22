"""Weak error: how far apart are SGD, SGDM and their SME after O(1/η) steps, and of what order?

One mode of a quadratic, with the noise scale `σ = η^{−1/2}` that keeps noise visible as η falls, and `1 − β = c η^α`.
All laws are Gaussian with moments by recursion, so the errors are exact. The paper keeps SGD and SGDM within
`O(√(η/(1−β)))` of each other over steps that end at `kη = T`: the order ½ in `ε = ηβ/(1−β)`. Derived here: it is that
of the pathwise distance and of functions with a kink, while smooth test functions have the order 1. In η these are
(1−α)/2 and 1−α; against the SME, SGD has the order 1 in η.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq

from hf_momentum.dynamics.iterates import iterates
from hf_momentum.dynamics.moments import LinearModel, joint_moments, rms_distance, sgdm_moments
from hf_momentum.dynamics.oracle import NoisyGradientOracle
from hf_momentum.dynamics.problems import Quadratic
from hf_momentum.dynamics.sde import sme_moments
from hf_momentum.dynamics.studies import Row
from hf_momentum.dynamics.weak_error import (
    TestFunction,
    cosine,
    distance,
    exact_weak_errors,
    exponential,
    fitted_order,
    power,
    simulated_weak_errors,
    step_grid,
)
from hf_momentum.errors import UserError

START = 1.0
SMOOTH = [power(1), power(2), exponential(1.0), cosine(1.0)]
KINKED = distance(START)
PATHWISE = "pathwise RMS"
_LEAST_LR = 1e-13  # below it the recursion's rounding shows
_ASIDE = dict(zip([*(h.name for h in SMOOTH), PATHWISE, KINKED.name], (-3, -1, 1, 3, -1, 1), strict=True))


def cells(
    scales: Sequence[Sequence[float]] = ((0.0, 0.1), (0.25, 0.3), (0.5, 1.0), (0.75, 3.0)),
    fine: Sequence[float] = (1e-3, 0.05),
    coarse: Sequence[float] = (0.025, 0.2),
    sme: Sequence[float] = (1e-4, 0.1),
    points: int = 9,
    time: float = 2.0,
    simulated: Sequence[float] = (0.05,),
    paths: int = 100_000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Make one cell for each grid and α, and one for each simulation.

    Args:
        scales: Pairs of α and c.
        fine: Least and largest ε of the fine grid.
        coarse: Least and largest η of the coarse grid.
        sme: Least and largest η where SGD and SGDM are compared with their SME.
        points: Of each grid, in geometric progression.
        time: T = kη.
        simulated: ε at which the errors of the first α are checked by simulation.
        paths: Of the simulations.
        seed: Of their noise.

    Returns:
        The cells.
    """
    grids = {"fine": fine, "coarse": coarse, "SME": sme}
    values = {name: np.geomspace(*ends, points).tolist() for name, ends in grids.items()}
    common = {"time": time}
    made = [common | {"grid": "SME", "alpha": None, "scale": None, "values": values["SME"]}]
    for alpha, scale in scales:
        cell = common | {"alpha": alpha, "scale": scale}
        made += [cell | {"grid": name, "values": points} for name, points in values.items()]
    alpha, scale = scales[0]
    check = {"grid": "paths", "alpha": alpha, "scale": scale, "values": list(simulated), "paths": paths, "seed": seed}
    return [*made, common | check]


def rows(
    grid: str,
    alpha: float | None,
    scale: float | None,
    values: Sequence[float],
    time: float,
    paths: int = 0,
    seed: int = 0,
) -> list[Row]:
    """Compute errors over a grid, and their fitted orders.

    Args:
        grid: `"fine"` over ε and `"coarse"` over η compare SGD with SGDM, `"SME"` over η SGDM with its SME, `"paths"`
            over ε is SGD against SGDM once more, by simulation.
        alpha: α; None is SGD, against its SME.
        scale: c.
        values: Of ε or η.
        time: T.
        paths: Of the simulation.
        seed: Of its noise.

    Returns:
        Rows with the `quantity` "error" over `eta` and `epsilon`, and "order"; `predicted` is the order that theory
        has in the grid's variable, or the power law of that order through the smallest value. `place` is α, aside
        of it by function, and `fit` what is fitted.
    """
    if alpha is None:
        rates = [(eta, 0.0) for eta in values]
    elif grid in ("fine", "paths"):
        rates = [rates_at(epsilon, alpha, scale) for epsilon in values]
    else:
        rates = [(eta, 1 - scale * eta**alpha) for eta in values]
    about = {"grid": grid, "series": "SGD" if alpha is None else f"α = {alpha:g}"}
    if grid == "paths":
        return [about | row for pair in rates for row in _simulated(*pair, time, paths, seed)]
    compare = sme_errors if grid == "SME" else pair_errors
    errors = [compare(*pair, time) for pair in rates]
    made = []
    for function in errors[0]:
        measured, common = [error[function] for error in errors], about | {"function": function, "alpha": alpha}
        order = _order_row(grid, alpha, function, values, measured)
        made.append(common | order)
        for value, error, (eta, momentum) in zip(values, measured, rates, strict=True):
            row = {"quantity": "error", "eta": eta, "epsilon": lag(eta, momentum), "measured": error}
            made.append(common | row | {"predicted": measured[0] * (value / values[0]) ** order["predicted"]})
    return made


def _order_row(
    grid: str, alpha: float | None, function: str, values: Sequence[float], measured: Sequence[float]
) -> Row:
    smooth, fit = function not in (PATHWISE, KINKED.name), fitted_order(values, measured)
    in_epsilon = 1.0 if smooth else 0.5
    predicted = in_epsilon if grid == "fine" or alpha is None else in_epsilon * (1 - alpha)
    report = {"quantity": "order", "measured": fit.order, "low": fit.low, "high": fit.high, "predicted": predicted}
    kind = function if grid != "fine" else "smooth" if smooth else "paths and kink"
    return report | {"fit": f"{kind}, {grid}", "place": (alpha or 0.0) + 0.012 * _ASIDE[function]}


def lag(eta: float, momentum: float) -> float:
    """Give `ε = ηβ/(1−β)`, the time kη by which momentum delays each gradient on average."""
    return eta * momentum / (1 - momentum)


def rates_at(epsilon: float, alpha: float, scale: float) -> tuple[float, float]:
    """Find the least η, and β, with `1 − β = c η^α` and `ηβ/(1−β) = ε`.

    Returns:
        η and β.

    Raises:
        UserError: If none does.
    """

    def excess(log_eta: float) -> float:
        return math.exp((1 - alpha) * log_eta) / scale - math.exp(log_eta) - epsilon

    largest = 0.0 if alpha == 0 else math.log((1 - alpha) / scale) / alpha  # where ε over η turns
    if not excess(math.log(_LEAST_LR)) <= 0 <= excess(largest):
        raise UserError(f"No η of at least {_LEAST_LR:g} gives ε = {epsilon:g} with 1 − β = {scale:g} η^{alpha:g}.")
    eta = math.exp(brentq(excess, math.log(_LEAST_LR), largest, xtol=1e-14, rtol=1e-14))
    return eta, 1 - scale * eta**alpha


def pair_errors(eta: float, momentum: float, time: float) -> dict[str, float]:
    """Give the exact weak errors and the RMS distance of SGD and SGDM, each the largest up to kη = T, by name."""
    model, at = _setting(eta, time)
    laws = (sgdm_moments(model, START, eta, beta, at=at) for beta in (0.0, momentum))
    errors = _named([*SMOOTH, KINKED], lambda functions: exact_weak_errors(*laws, functions))
    return errors | {PATHWISE: max(map(rms_distance, joint_moments(model, START, eta, momentum, at=at)))}


def sme_errors(eta: float, momentum: float, time: float) -> dict[str, float]:
    """Give the exact weak errors of SGDM (β = 0: SGD) against its SME; see `pair_errors`."""
    model, at = _setting(eta, time)
    laws = sgdm_moments(model, START, eta, momentum, at=at), sme_moments(model, START, eta, momentum, at=at)
    return _named(SMOOTH, lambda functions: exact_weak_errors(*laws, functions))


def _setting(eta: float, time: float) -> tuple[LinearModel, list[int]]:
    return LinearModel.quadratic(1.0, 1.0, scale=eta**-0.5), step_grid(round(time / eta), 40)


def _named(functions: list[TestFunction], errors: Callable[[list[TestFunction]], Sequence[float]]) -> dict[str, float]:
    return {h.name: float(error) for h, error in zip(functions, errors(functions), strict=True)}


def _simulated(eta: float, momentum: float, time: float, paths: int, seed: int) -> Iterator[Row]:
    # Both sides are read at the same few steps; common random numbers keep the interval short.
    steps = round(time / eta)
    every = max(1, steps // 10)
    model, at = LinearModel.quadratic(1.0, 1.0, scale=eta**-0.5), [*range(0, steps, every), steps]
    laws = (sgdm_moments(model, START, eta, beta, at=at) for beta in (0.0, momentum))
    functions = [*SMOOTH, KINKED]
    exact = exact_weak_errors(*laws, functions)
    oracle = NoisyGradientOracle(Quadratic([1.0]), 1.0, scale=eta**-0.5)
    x0 = torch.full((paths, 1), START, dtype=torch.float64)
    runs = (
        iterates(oracle, x0, eta, beta, steps=steps, generator=torch.Generator().manual_seed(seed), every=every)
        for beta in (0.0, momentum)
    )
    for error, predicted in zip(simulated_weak_errors(*runs, functions), exact, strict=True):
        low, high = error.interval()
        row = {"function": error.function.name, "eta": eta, "epsilon": lag(eta, momentum), "predicted": predicted}
        yield row | {"measured": error.maximum, "low": low, "high": high, "saved": error.variance_reduction}

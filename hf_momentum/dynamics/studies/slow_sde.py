"""Slow SDE: over O(1/η²) steps SGD and SGDM both move along the manifold Γ of minimisers, by one and the same law.

The law is that of `hf_momentum.dynamics.manifold`: `dX = ∂Φ Σ^{1/2} dW + ½ ∂²Φ[Σ] dt`, and `−¼ ∂Φ ∇tr(H)` where Σ = H.
Positions are read as Φ(x_k), the end of the gradient flow, over `t = kη²`. What is predicted needs the loss and Σ
alone: drift and diffusion along Γ by automatic differentiation, then the moments of the resulting law, by the backward
Kolmogorov equation along Γ, or by an ODE where label noise leaves no diffusion.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import diags_array
from scipy.sparse.linalg import expm_multiply
from torch import Tensor

from hf_momentum.dynamics.iterates import iterates
from hf_momentum.dynamics.manifold import Manifold, label_noise_flow, projected, slow_sde
from hf_momentum.dynamics.oracle import LabelNoiseOracle, NoisyGradientOracle, Oracle
from hf_momentum.dynamics.studies import Row
from hf_momentum.dynamics.valleys import ExponentialValley, ParabolicValley, QuadraticValley

_WIDTH = 1 / 49  # of the grid along Γ; its second-order error is 2e-5
_REACH = 5.0
_CHUNK = 20_000  # paths of the slow SDE at once


@dataclass(frozen=True)
class Fixture:
    """A loss with a curve of minimisers, its noise, and where on it the run starts."""

    oracle: Oracle  # of σ = 1
    curve: Callable[[Tensor], Tensor]  # from values of the coordinate, `(points,)`, to Γ, `(points, 2)`
    coordinate: int  # which of the two is read
    start: float

    def starts(self, paths: int) -> Tensor:
        """Give start points, `(paths, 2)`."""
        return self.curve(torch.full((paths,), self.start, dtype=torch.float64))


_LINE, _PARABOLA = (lambda y: torch.stack([0 * y, y], dim=-1)), (lambda x: torch.stack([x, x.square()], dim=-1))
_TILTED = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=torch.float64)
FIXTURES = {
    "½(1+y²)x², label noise": Fixture(LabelNoiseOracle(QuadraticValley()), _LINE, 1, 1.5),
    "½(1+y²)x², Σ = 1": Fixture(NoisyGradientOracle(QuadraticValley()), _LINE, 1, 1.5),
    "½exp(y²/4)x², Σ = (4, ¼)": Fixture(
        NoisyGradientOracle(ExponentialValley(0.25), torch.tensor([4.0, 0.25])), _LINE, 1, 1.0
    ),
    "½(y−x²)²": Fixture(NoisyGradientOracle(ParabolicValley(), _TILTED), _PARABOLA, 0, 0.5),
}


def cells(
    lrs: Sequence[float] = (0.1, 0.05, 0.025, 0.0125),
    momentum: float = 0.9,
    time: float = 1.0,
    paths: int = 12_000,
    sde_paths: int = 100_000,
    sde_steps: int = 160,
    automatic_paths: int = 10_000,
    automatic_steps: int = 40,
    constant: float = 1.5,
    points: int = 20,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Make one cell for each fixture, algorithm and η, and two for each slow SDE.

    Args:
        lrs: η.
        momentum: β of SGDM.
        time: T = kη².
        paths: Of SGD and SGDM.
        sde_paths: Of the slow SDE with drift and diffusion in closed form, of `sde_steps` steps.
        sde_steps: See there.
        automatic_paths: Of the slow SDE with both by automatic differentiation, of `automatic_steps` steps.
        automatic_steps: See there.
        constant: C of the bound C η + 4 standard errors.
        points: Times at which the moments are read.
        seed: Of the noise.

    Returns:
        The cells, those that take longest first.
    """
    common = {"time": time, "seed": seed, "points": points}
    made = []
    for lr in sorted(lrs):
        for name in FIXTURES:
            for method, beta in (("SGD", 0.0), ("SGDM", momentum)):
                run = {"fixture": name, "method": method, "momentum": beta, "lr": lr, "paths": paths}
                made.append(common | run | {"steps": round(time / lr**2), "constant": constant})
    for name, fixture in FIXTURES.items():
        if not isinstance(fixture.oracle, LabelNoiseOracle):
            for method, count, steps in (
                ("closed form", sde_paths, sde_steps),
                ("automatic", automatic_paths, automatic_steps),
            ):
                made.append(common | {"fixture": name, "method": method, "paths": count, "steps": steps})
    return made


def rows(
    fixture: str,
    method: str,
    time: float,
    paths: int,
    steps: int,
    points: int,
    seed: int,
    lr: float = 0.0,
    momentum: float = 0.0,
    constant: float = 0.0,
) -> list[Row]:
    """Measure the mean and the variance along Γ over time, and their errors at T.

    Args:
        fixture: One of `FIXTURES`.
        method: `"SGD"` or `"SGDM"`; `"closed form"` or `"automatic"` integrates the slow SDE instead.
        time: T.
        paths: Number of paths.
        steps: Steps to T.
        points: Times at which the moments are read.
        seed: Of the noise.
        lr: η.
        momentum: β.
        constant: C.

    Returns:
        Rows with the `quantity` "mean" or "variance" over the time `t`, and for SGD and SGDM "error" at T over `lr`,
        `place` aside of it by fixture, with the `bound` C η + 4 standard errors.
    """
    case, generator = FIXTURES[fixture], torch.Generator().manual_seed(seed)
    every = max(1, steps // points)
    if method in ("SGD", "SGDM"):
        states = iterates(case.oracle, case.starts(paths), lr, momentum, steps=steps, generator=generator, every=every)
        table = {state.step: _moments(state.x[:, case.coordinate]) for state in projected(states, case.oracle.problem)}
    else:
        table = _slow_moments(case, method, paths, steps, time, generator)
    expected = predicted_moments(case, [time * k / steps for k in table])
    made = []
    for (k, measured), predicted in zip(table.items(), expected, strict=True):
        for quantity, (value, error), exact in zip(("mean", "variance"), measured, predicted, strict=True):
            row = {"fixture": fixture, "method": method, "quantity": quantity, "lr": lr, "steps": steps}
            interval = {"low": value - 1.96 * error, "high": value + 1.96 * error}
            end = {"t": time * k / steps, "last": k == steps, "measured": value, "predicted": exact}
            made.append(row | interval | end)
            if lr and k == steps:
                made.append(row | _error(row, value - exact, error, constant))
    return made


def _error(row: Row, difference: float, error: float, constant: float) -> Row:
    # Fixtures and algorithms stand side by side around their η.
    aside = 1.7 * list(FIXTURES).index(row["fixture"]) - 2.95 + 0.7 * (row["method"] == "SGDM")
    size, place = abs(difference), row["lr"] * 1.06**aside
    ends = {"measured": size, "low": max(size - 1.96 * error, 1e-9), "high": size + 1.96 * error}
    bound = constant * row["lr"] + 4 * error
    lines = {"place": place, "predicted": constant * place, "bound": bound, "holds": "yes" if size <= bound else "no"}
    return ends | lines | {"quantity": f"error of the {row['quantity']}", "signed": difference}


def _moments(values: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    # Mean and variance, each with its standard error.
    squares, root = (values - values.mean()).square(), math.sqrt(len(values))
    return tuple((part.mean().item(), part.std().item() / root) for part in (values, squares))


def _slow_moments(
    case: Fixture, method: str, paths: int, steps: int, time: float, generator: torch.Generator
) -> dict[int, tuple]:
    problem = case.oracle.problem
    manifold = Manifold(problem, problem.project) if method == "automatic" else None
    ends = []
    for start in case.starts(paths).split(_CHUNK):
        options = {"generator": generator, "every": steps, "manifold": manifold}
        *_, last = slow_sde(case.oracle, start, time=time, steps=steps, **options)
        ends.append(last.x[:, case.coordinate])
    return {steps: _moments(torch.cat(ends))}


def predicted_moments(case: Fixture, times: Sequence[float]) -> list[tuple[float, float]]:
    """Give the slow SDE's mean and variance along Γ, from the loss and Σ alone.

    For `dz = b dt + s dW` along Γ, `u(t, z) = E h(z_t)` solves `u_t = b u' + ½ s² u''` with `u(0, z) = h(z)`; b and s²
    come from automatic differentiation, and u from second-order differences on a fine grid.

    Returns:
        Mean and variance at each of the rising times.
    """
    problem = case.oracle.problem
    if isinstance(case.oracle, LabelNoiseOracle):
        path = label_noise_flow(problem, case.starts(1), times, manifold=Manifold(problem, problem.project))
        return [(value, 0.0) for value in path[:, 0, case.coordinate].tolist()]
    half = round(_REACH / _WIDTH)
    grid = case.start + _WIDTH * np.arange(-half, half + 1)
    forward, spread = drift_and_variance(case, torch.as_tensor(grid))
    down, up = (0.5 * spread / _WIDTH**2 + sign * 0.5 * forward / _WIDTH for sign in (-1, 1))
    for side in (down, up):
        side[[0, -1]] = 0  # the ends are far from where the paths go
    operator = diags_array([down[1:], -down - up, up[:-1]], offsets=[-1, 0, 1], format="csr")
    moments, now, values = [], 0.0, np.stack([grid, grid**2], axis=1)
    for t in times:
        values, now = expm_multiply(operator * (t - now), values), t
        mean, square = values[half]
        moments.append((float(mean), float(square - mean**2)))
    return moments


def drift_and_variance(case: Fixture, values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Give b and s² along Γ at values of the coordinate, `(points,)` each, by automatic differentiation."""
    x, i = case.curve(values), case.coordinate
    manifold, sigma = Manifold(case.oracle.problem), case.oracle.covariance(x)
    tangent = manifold.tangent_projection(x)
    return manifold.slow_drift(x, sigma)[:, i].numpy(), (tangent @ sigma @ tangent)[:, i, i].numpy()

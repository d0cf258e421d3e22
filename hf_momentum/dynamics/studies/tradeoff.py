"""What momentum trades: less noise in each step, none over many, and stability at large curvature.

On a mode of curvature λ, with `h = ηλ`, `κ = (1−β)/(1+β)` and noise of variance s²:

- x ends with the variance `η s² / (λ(2−h))` under SGD and `η s² / (λ(2−κh))` under SGDM; their ratio is 1 at small h.
- A step changes the loss by `−η λ E[x m⁺] + ½ η² λ E[m⁺²]` on average. Split `m⁺ = ḡ⁺ + n⁺` into averaged gradients
  and averaged noise. The noise-induced term `½ η² λ E[n⁺²]` is κ times that of SGD, `½ η² λ s²`. But x has already
  moved along the noise that n⁺ remembers, and `−η λ E[x n⁺]` gives back `2β/(1+β+ε)` of it, `ε = hβ/(1−β)`: where ε
  is small this makes 1 in all.
- With mini-batches whose curvature has the variance v, SGDM is stable up to `(v + λ²) / (v + κλ²)` times SGD's η.
- The mean shrinks by the factor `|1−h|` per step under SGD. Under SGDM by the larger root of
  `z² − (1 + β − (1−β)h) z + β`, which is √β where it oscillates.
"""

import math
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_discrete_lyapunov

from hf_momentum.dynamics.estimates import mean_ratio
from hf_momentum.dynamics.iterates import last_iterate
from hf_momentum.dynamics.moments import LinearModel, sgdm_map, stability_limit
from hf_momentum.dynamics.oracle import NoisyGradientOracle
from hf_momentum.dynamics.problems import Quadratic
from hf_momentum.dynamics.stability import critical_lr, oscillation_range, stationary_variance, variance_fraction
from hf_momentum.dynamics.studies import Row

TERMS_AT = (0.001, 0.1, 1.0)
_UNIT = LinearModel.quadratic(1.0)  # λ = s = 1, so that η is h
_BIAS = 1e-6  # what is left of the start where a variance is called stationary
_LINE = 60  # points of a predicted line


def cells(
    momenta: tuple[float, ...] = (0.5, 0.9, 0.99),
    h: tuple[float, ...] = (0.01, 0.1, 0.5, 1.0, 1.5, 1.9),
    more_momenta: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.95),
    more_h: tuple[float, ...] = (0.1, 0.5, 1.0, 1.5),
    paths: int = 30_000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Make one cell for each simulated pair (β, h), and one for each β whose exact values are wanted.

    Args:
        momenta: β of the lines over h and over the curvature noise.
        h: Where those lines are simulated.
        more_momenta: β at which the lines over β are simulated besides.
        more_h: h of the lines over β.
        paths: Number of paths.
        seed: Of the noise.

    Returns:
        The cells.
    """
    pairs = [(beta, value) for beta in momenta for value in sorted({*h, *more_h})]
    pairs += [(beta, value) for beta in more_momenta for value in more_h]
    common = {"part": "simulated", "lines": list(momenta), "columns": list(more_h), "paths": paths, "seed": seed}
    simulated = [common | {"momentum": beta, "h": value} for beta, value in pairs]
    exact = [{"part": "exact", "momentum": beta, "columns": list(more_h)} for beta in (0.0, *momenta)]
    return [*exact, *simulated]


def rows(part: str, momentum: float, **options: Any) -> list[Row]:
    """Compute one cell.

    Args:
        part: "simulated" or "exact".
        momentum: β.
        **options: The cell's other values.

    Returns:
        Rows with the `quantity` "ratio over h", "ratio over β", "gain", "speed", "terms" or "threshold"; those with a
        `name` are for tables.
    """
    if part == "simulated":
        return _simulated(momentum, **options)
    drawn = _speeds(momentum) + [_terms(momentum, h) for h in TERMS_AT]
    if momentum > 0:
        return drawn + _ratio_lines(momentum) + _gains(momentum) + _thresholds(momentum)
    return drawn + [row for h in options["columns"] for row in _columns(h)]


def variance_ratio(momentum: float, h: float) -> float:
    """Give SGD's stationary variance over SGDM's: `(2−κh) / (2−h)`.

    Args:
        momentum: β.
        h: ηλ below 2.

    Returns:
        The ratio.
    """
    return stationary_variance(1.0, 1.0, h) / stationary_variance(1.0, 1.0, h, momentum)


def spectral_radius(momentum: float, h: float) -> float:
    """Give the factor by which the mean of the state shrinks per step in the end.

    Args:
        momentum: β; 0 is SGD.
        h: ηλ.

    Returns:
        `|1−h|` for SGD, else the modulus of the larger root of `z² − (1 + β − (1−β)h) z + β`.
    """
    if momentum == 0:
        return abs(1 - h)
    half = (1 + momentum - (1 - momentum) * h) / 2
    root = half**2 - momentum
    return math.sqrt(momentum) if root < 0 else abs(half) + math.sqrt(root)


def descent_terms(momentum: float, h: float) -> dict[str, float]:
    """Give the terms of a step's mean change of the loss at the stationary law, in units of `½ η² λ s²`.

    Args:
        momentum: β.
        h: ηλ below 2.

    Returns:
        "descent", "noise", "memory" and "curvature", of sum 0.
    """
    weight = 1 - momentum
    # (x, ḡ, n) before a step and (x, ḡ⁺, n⁺) within it, driven by v; then x⁺ = x − η(ḡ⁺ + n⁺), with η = h, λ = s = 1.
    within = np.array([[1, 0, 0], [weight, momentum, 0], [0, 0, momentum]], float)
    kick, move = np.array([[0.0], [0.0], [weight]]), np.array([[1, -h, -h], [0, 1, 0], [0, 0, 1]])
    stationary = solve_discrete_lyapunov(move @ within, move @ kick @ kick.T @ move.T)
    moments = within @ stationary @ within.T + kick @ kick.T
    unit = 0.5 * h**2
    return {
        "descent": float(-h * moments[0, 1] / unit),
        "noise": float(moments[2, 2]),
        "memory": float(-h * moments[0, 2] / unit),
        "curvature": float(moments[1, 1] + 2 * moments[1, 2]),
    }


def _simulated(
    momentum: float, h: float, lines: list[float], columns: list[float], paths: int, seed: int
) -> list[Row]:
    # Common noise: at small h the two variances move together, and their ratio is far better known than they are.
    slowest = max(spectral_radius(beta, h) for beta in (0.0, momentum))
    steps = math.ceil(math.log(_BIAS) / (2 * math.log(slowest)))
    oracle, start = NoisyGradientOracle(Quadratic([1.0])), torch.zeros(paths, 1, dtype=torch.float64)
    squares = []
    for beta in (0.0, momentum):
        generator = torch.Generator().manual_seed(seed)
        last = last_iterate(oracle, start, h, beta, steps=steps, generator=generator)
        squares.append(last.x[:, 0].square())
    row = {"h": h, "momentum": momentum, "predicted": variance_ratio(momentum, h), "steps": steps}
    row |= mean_ratio(*squares)._asdict()
    found = []
    if momentum in lines:
        found.append({"quantity": "ratio over h", "line": f"β = {momentum:g}", "name": f"ratio at h = {h:g}"} | row)
    if h in columns:
        found.append({"quantity": "ratio over β", "line": f"h = {h:g}"} | row)
    return found


def _ratio_lines(momentum: float) -> list[Row]:
    line = {"quantity": "ratio over h", "line": f"β = {momentum:g}"}
    return [
        line | {"h": h, "predicted": variance_ratio(momentum, h)}
        for h in (2 - np.geomspace(1.99, 0.05, _LINE)).tolist()
    ]


def _columns(h: float) -> list[Row]:
    line = {"quantity": "ratio over β", "line": f"h = {h:g}"}
    betas = np.linspace(0, 0.99, _LINE).tolist()
    return [line | {"momentum": beta, "predicted": variance_ratio(beta, h)} for beta in betas]


def _gains(momentum: float) -> list[Row]:
    line = {"quantity": "gain", "line": f"β = {momentum:g}"}
    return [line | _gain(momentum, v) for v in np.logspace(-3, 2, 11).tolist()]


def _gain(momentum: float, v: float) -> Row:
    model = LinearModel.quadratic(1.0, curvature_variance=v)
    measured = stability_limit(model, momentum) / stability_limit(model)
    predicted = critical_lr(1.0, momentum, v) / critical_lr(1.0, 0.0, v)
    return {"v": v, "momentum": momentum, "measured": float(measured), "predicted": predicted}


def _speeds(momentum: float) -> list[Row]:
    def row(h: float) -> Row:
        step, _ = sgdm_map(_UNIT, h, momentum)
        measured = float(np.abs(np.linalg.eigvals(step)).max())
        line = "SGD" if momentum == 0 else f"β = {momentum:g}"
        about = {"quantity": "speed", "line": line, "h": h, "momentum": momentum}
        return about | {"measured": measured, "predicted": spectral_radius(momentum, h)}

    limit = critical_lr(1.0, momentum)
    ends = oscillation_range(momentum) if momentum else (1.0, 1.0)
    grid = np.unique(np.concatenate([np.geomspace(3e-3, limit, _LINE), ends])).tolist()
    return [row(h) for h in grid]


def _terms(momentum: float, h: float) -> Row:
    terms = descent_terms(momentum, h)
    epsilon = h * momentum / (1 - momentum)
    predicted = {
        "noise predicted": variance_fraction(momentum),
        "memory predicted": 2 * momentum / (1 + momentum + epsilon),
    }
    about = {"quantity": "terms", "name": f"{momentum:g}", "h": h, "ε": epsilon}
    return about | terms | predicted | {"both": terms["noise"] + terms["memory"]}


def _thresholds(momentum: float) -> list[Row]:
    # Where the eigenvalues become complex, and real again, by bisection; and the gain at both ends of the noise.
    def oscillates(h: float) -> bool:
        return bool(np.abs(np.linalg.eigvals(sgdm_map(_UNIT, h, momentum)[0]).imag).max() > 0)

    found = []
    ends = zip(("from", "to"), (0.0, critical_lr(1.0, momentum)), oscillation_range(momentum), strict=True)
    for word, quiet, predicted in ends:
        loud = 1.0
        for _ in range(60):
            middle = (quiet + loud) / 2
            quiet, loud = (quiet, middle) if oscillates(middle) else (middle, loud)
        found.append({"name": f"oscillates {word} h =", "measured": loud, "predicted": predicted})
    found += [_gain(momentum, v) | {"name": f"gain in the stable range, v = {v:g} λ²"} for v in (0.0, 10.0)]
    return [{"quantity": "threshold", "momentum": momentum} | row for row in found]

"""Warm-up case: without curvature momentum smooths each step, and hardly changes where the steps lead.

A constant gradient moves SGD and SGDM alike, so it is 0 here. With noise of variance s², `x_k` has the variance
`k η² s²` under SGD. Under SGDM it is `η² s² Σ_{i≤k} (1−β^i)²` from `m₀ = 0`, and `η² s² [k − 2β(1−β^k)/(1−β²)]` where
m₀ is drawn from its stationary law, of variance `s² (1−β)/(1+β)` and autocorrelation `β^lag`.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from scipy import stats

from hf_momentum.dynamics.iterates import Iterate, iterates
from hf_momentum.dynamics.oracle import NoisyGradientOracle
from hf_momentum.dynamics.problems import Quadratic
from hf_momentum.dynamics.stability import variance_fraction
from hf_momentum.dynamics.studies import Row

STARTS = {"SGD": 0.0, "SGDM, m₀ = 0": 0.0, "SGDM, stationary m₀": 1.0}


def cells(
    lr: float = 0.1, momentum: float = 0.9, s: float = 1.0, steps: int = 50, paths: int = 1_000_000, seed: int = 0
) -> list[dict[str, Any]]:
    """Make one cell for each way to run.

    Args:
        lr: η.
        momentum: β of SGDM.
        s: Standard deviation of the noise.
        steps: Number of steps.
        paths: Number of paths.
        seed: Of the noise.

    Returns:
        The cells.
    """
    common = {"lr": lr, "s": s, "steps": steps, "paths": paths, "seed": seed}
    return [common | {"method": name, "momentum": 0.0 if name == "SGD" else momentum} for name in STARTS]


def rows(method: str, lr: float, momentum: float, s: float, steps: int, paths: int, seed: int) -> list[Row]:
    """Measure variances over the steps, and the autocorrelation of the momentum at the last one.

    Args:
        method: One of `STARTS`.
        lr: η.
        momentum: β.
        s: Standard deviation of the noise.
        steps: Number of steps.
        paths: Number of paths.
        seed: Of the noise.

    Returns:
        Rows with the `quantity` "variance of x" or "variance of m" over `step`, or "autocorrelation" over `lag`.
    """
    generator = torch.Generator().manual_seed(seed)
    start = STARTS[method] * variance_fraction(momentum)  # Var m₀ / s²
    m0 = s * math.sqrt(start) * torch.randn(paths, 1, generator=generator, dtype=torch.float64)
    oracle = NoisyGradientOracle(Quadratic(torch.zeros(1).double()), s**2)
    x0 = torch.zeros(paths, 1, dtype=torch.float64)
    stream = iterates(oracle, x0, lr, momentum, steps=steps, generator=generator, m0=m0)
    return [{"method": method} | row for row in _measure(stream, lr, momentum, s**2, start, steps)]


def _measure(
    stream: Iterator[Iterate], lr: float, momentum: float, noise: float, start: float, steps: int
) -> list[Row]:
    measured, buffers = [], {}
    for state in stream:
        k = state.step
        if k:
            for name, values, predicted in (
                ("variance of x", state.x, lr**2 * position_variance(k, momentum, start)),
                ("variance of m", state.m, momentum_variance(k, momentum, start)),
            ):
                low, high = _variance_factors(len(values))
                value = float(values.var())
                row = {"quantity": name, "step": k, "measured": value, "predicted": noise * predicted}
                measured.append(row | {"low": low * value, "high": high * value})
        buffers[k] = state.m[:, 0].clone()
    last = buffers[steps]
    for lag in range(min(steps, 30)):
        value = float(torch.corrcoef(torch.stack([last, buffers[steps - lag]]))[0, 1])
        low, high = _correlation_interval(value, len(last))
        row = {"quantity": "autocorrelation", "lag": lag, "measured": value, "low": low, "high": high}
        spread = math.sqrt(momentum_variance(steps - lag, momentum, start) / momentum_variance(steps, momentum, start))
        measured.append(row | {"predicted": momentum**lag * spread})
    return measured


def position_variance(k: int, momentum: float, start: float) -> float:
    """Give `Var x_k` in units of `η² s²`.

    Noise i of k weighs `1 − β^{k−i+1}`, and m₀ weighs `β(1−β^k)/(1−β)`.

    Args:
        k: Steps.
        momentum: β.
        start: `Var m₀` in units of s².

    Returns:
        The variance.
    """
    if momentum == 0:
        return float(k)
    weight = momentum * (1 - momentum**k) / (1 - momentum)
    return sum((1 - momentum**i) ** 2 for i in range(1, k + 1)) + weight**2 * start


def momentum_variance(k: int, momentum: float, start: float) -> float:
    """Give `Var m_k` in units of `s²`: `κ (1 − β^{2k}) + β^{2k} Var m₀`, with `κ = (1−β)/(1+β)`.

    Args:
        k: Steps.
        momentum: β.
        start: `Var m₀` in units of s².

    Returns:
        The variance.
    """
    faded = momentum ** (2 * k)
    return variance_fraction(momentum) * (1 - faded) + faded * start


def _variance_factors(paths: int) -> tuple[float, float]:
    # A normal sample's variance over the true one is χ²/(n−1).
    return tuple((paths - 1) / stats.chi2.ppf(q, paths - 1) for q in (0.975, 0.025))


def _correlation_interval(value: float, paths: int) -> tuple[float, float]:
    # Fisher's transformation; a value against itself has no error.
    if abs(value) >= 1 - 1e-12:
        return value, value
    half = stats.norm.ppf(0.975) / math.sqrt(paths - 3)
    return math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half)

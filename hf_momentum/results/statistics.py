"""Means, standard deviations and paired differences over seeds, as the protocol states them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and population standard deviation (ddof 0), as few-shot tables report them.

    Args:
        values: One value per seed.

    Returns:
        Mean and standard deviation, in the unit of the values.
    """
    return float(np.mean(values)), float(np.std(values))


def format_score(values: Sequence[float]) -> str:
    """Fractions as percent, `94.0 (0.4)`: mean and standard deviation over seeds.

    Args:
        values: Fractions in [0, 1], one per seed.

    Returns:
        The text; for a single value the mean alone, since it has no spread to report.
    """
    mean, std = mean_std(values)
    return f"{100 * mean:.1f} ({100 * std:.1f})" if len(values) > 1 else f"{100 * mean:.1f}"


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference between two methods over the seeds that both ran.

    Attributes:
        mean: Mean of second minus first, in the unit of the values.
        low: Lower end of the confidence interval.
        high: Upper end of the confidence interval.
        seeds: The seeds that entered, sorted.
        confidence: The interval's level.
    """

    mean: float
    low: float
    high: float
    seeds: tuple[int, ...]
    confidence: float


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], confidence: float = 0.95
) -> PairedDifference:
    """Second minus first over the common seeds, with Student's t interval for the mean of paired differences.

    Args:
        first: Seed → value of the first method.
        second: Seed → value of the second method.
        confidence: Level of the two-sided interval.

    Returns:
        The difference; with fewer than two common seeds the interval is infinite.

    Raises:
        ValueError: If no seed is common to both.
    """
    seeds = tuple(sorted(first.keys() & second.keys()))
    if not seeds:
        raise ValueError("No seed is common to both methods.")
    differences = np.array([second[seed] - first[seed] for seed in seeds])
    mean, half = float(differences.mean()), math.inf
    if len(seeds) > 1:
        standard_error = differences.std(ddof=1) / math.sqrt(len(seeds))
        half = float(stats.t.ppf((1 + confidence) / 2, len(seeds) - 1) * standard_error)
    return PairedDifference(mean, mean - half, mean + half, seeds, confidence)

"""Means, paired differences over seeds, equivalence within a margin, and how many seeds that takes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # loads its slow modules when they are first used

EQUIVALENT, DIFFERENT, UNDECIDED = "equivalent", "different", "undecided"
_WITHIN, _NEITHER = "within the margin", "neither within the margin nor away from 0"
_MOST_SEEDS = 2**20


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
        low: Lower end of the confidence interval; −∞ where the seeds have no spread to take one from.
        high: Upper end of the confidence interval; ∞ in that case.
        seeds: The seeds that entered, sorted.
        confidence: The interval's level.
        std: Sample standard deviation (ddof 1) of the differences; NaN for a single seed.
    """

    mean: float
    low: float
    high: float
    seeds: tuple[int, ...]
    confidence: float
    std: float


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], confidence: float = 0.95
) -> PairedDifference:
    """Second minus first over the common seeds, with Student's t interval for the mean of paired differences.

    Args:
        first: Seed → value of the first method.
        second: Seed → value of the second method.
        confidence: Level of the two-sided interval.

    Returns:
        The difference; with fewer than two common seeds, or differences that are all the same, the interval is
        infinite: nothing bounds the mean.

    Raises:
        ValueError: If no seed is common to both, or the level is not between 0 and 1.
    """
    _check_open_unit(confidence=confidence)
    seeds, differences = _differences(first, second)
    mean, half, std = float(differences.mean()), math.inf, math.nan
    if len(seeds) > 1:
        std = float(differences.std(ddof=1))
        if std > 0:
            half = float(scipy.stats.t.ppf((1 + confidence) / 2, len(seeds) - 1)) * std / math.sqrt(len(seeds))
    return PairedDifference(mean, mean - half, mean + half, seeds, confidence, std)


def bootstrap_interval(
    first: Mapping[int, float],
    second: Mapping[int, float],
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 9999,
) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval (BCa, Efron 1987) of the mean paired difference.

    It assumes no normal distribution, but below about six seeds it covers the true mean less often than it says
    (about 80% instead of 95% at five normal differences): there it stands beside Student's interval, not in its place.

    Args:
        first: Seed → value of the first method.
        second: Seed → value of the second method.
        confidence: Level of the two-sided interval.
        seed: Of the resampling: the same data and seed give the same interval.
        resamples: Number of resamples.

    Returns:
        Lower and upper end; infinite where fewer than two seeds, or no spread, leave nothing to resample.

    Raises:
        ValueError: If no seed is common to both, or the level is not between 0 and 1.
    """
    _check_open_unit(confidence=confidence)
    _, differences = _differences(first, second)
    if len(differences) < 2 or differences.std() == 0:
        return -math.inf, math.inf
    options = {"n_resamples": resamples, "confidence_level": confidence, "method": "BCa"}
    interval = scipy.stats.bootstrap(
        (differences,), np.mean, **options, rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Equivalence:
    """What the seeds say about two methods, given a margin stated in advance.

    Attributes:
        mean: Mean of second minus first, in the unit of the values.
        low: Lower end of the (1 − 2α) interval that belongs to the two one-sided tests.
        high: Its upper end.
        p_lower: p-value against "the difference is at or below −margin"; NaN where nothing can be tested.
        p_upper: p-value against "the difference is at or above +margin"; NaN where nothing can be tested.
        margin: The margin.
        alpha: Level of the tests.
        seeds: The seeds that entered, sorted.
        verdict: "equivalent", "different" or "undecided".
        reason: The verdict in a few words.
    """

    mean: float
    low: float
    high: float
    p_lower: float
    p_upper: float
    margin: float
    alpha: float
    seeds: tuple[int, ...]
    verdict: str
    reason: str

    @property
    def p_value(self) -> float:
        """The p-value of the two one-sided tests: the larger of both."""
        return max(self.p_lower, self.p_upper)

    @property
    def is_plain(self) -> bool:
        """Whether the reason adds nothing to the verdict."""
        return self.reason in {_WITHIN, _NEITHER}


def equivalence(
    first: Mapping[int, float], second: Mapping[int, float], margin: float, alpha: float = 0.05
) -> Equivalence:
    """Two one-sided paired t-tests (Schuirmann 1987) of equivalence within a margin.

    - "equivalent": both tests reject at α, which is to say that the (1 − 2α) interval lies inside (−margin, margin).
      It holds also where the difference is clearly not 0, but small; the reason then says so.
    - "different": not equivalent, and the two-sided (1 − α) interval excludes 0. The difference is real; it exceeds
      the margin only if that interval lies beyond it, and the reason says whether it does.
    - "undecided": neither. The seeds leave both open, which is no evidence of equality.

    Args:
        first: Seed → value of the first method.
        second: Seed → value of the second method.
        margin: The largest difference that counts as none, in the unit of the values; to be chosen before the results
            are seen.
        alpha: Level of each test.

    Returns:
        The p-values, interval and verdict. One seed, or differences that are all the same, have no spread to judge by:
        undecided.

    Raises:
        ValueError: If no seed is common to both, the margin is not positive, or α not between 0 and ½.
    """
    _check_margin(margin, alpha)
    seeds, differences = _differences(first, second)
    mean, count = float(differences.mean()), len(seeds)
    error = float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    if error == 0:
        reason = "one seed has no spread" if count == 1 else f"all {count} differences are the same: no spread"
        nothing = (-math.inf, math.inf, math.nan, math.nan)
        return Equivalence(mean, *nothing, margin, alpha, seeds, UNDECIDED, reason)
    law = scipy.stats.t(count - 1)
    p_lower, p_upper = float(law.sf((mean + margin) / error)), float(law.cdf((mean - margin) / error))
    verdict, reason = _judge(mean, law.ppf(1 - alpha / 2) * error, margin, max(p_lower, p_upper) < alpha)
    half = float(law.ppf(1 - alpha)) * error
    return Equivalence(mean, mean - half, mean + half, p_lower, p_upper, margin, alpha, seeds, verdict, reason)


def _judge(mean: float, half: float, margin: float, equivalent: bool) -> tuple[str, str]:
    """Verdict and reason; `half` is half the width of the two-sided (1 − α) interval."""
    nearest = abs(mean) - half  # the end of the interval nearest to 0, negative if it contains 0
    if equivalent:
        return EQUIVALENT, f"{_WITHIN}, though not 0" if nearest > 0 else _WITHIN
    if nearest <= 0:
        return UNDECIDED, _NEITHER
    return DIFFERENT, "by more than the margin" if nearest > margin else "not 0; perhaps within the margin"


def equivalence_power(
    seeds: int, std_of_differences: float, margin: float, alpha: float = 0.05, difference: float = 0.0
) -> float:
    """The probability that `equivalence` finds two methods equivalent, for normal differences.

    Exact: given the sample deviation S, the tests pass if `|D̄| < margin − t S/√n` (t the 1 − α quantile, n − 1 degrees
    of freedom), a normal probability, integrated over the law of S (Owen 1965; Phillips 1990).

    Args:
        seeds: Number of paired seeds n, at least 2.
        std_of_differences: True standard deviation σ of the paired differences, positive.
        margin: The margin, in the same unit.
        alpha: Level of each test.
        difference: The true mean difference.

    Returns:
        A probability.
    """
    degrees, error = seeds - 1, std_of_differences / math.sqrt(seeds)
    quantile = float(scipy.stats.t.ppf(1 - alpha, degrees))

    def integrand(chi: float) -> float:
        room = margin - quantile * error * chi / math.sqrt(degrees)
        inside = scipy.stats.norm.cdf((room - difference) / error) - scipy.stats.norm.cdf((-room - difference) / error)
        return float(inside * scipy.stats.chi.pdf(chi, degrees))

    low, high = scipy.stats.chi.ppf((1e-12, 1 - 1e-12), degrees)
    high = min(high, margin * math.sqrt(degrees) / (quantile * error))
    return scipy.integrate.quad(integrand, low, high, limit=200)[0] if high > low else 0.0


def seeds_needed(
    std_of_differences: float, margin: float, power: float = 0.8, alpha: float = 0.05, difference: float = 0.0
) -> int:
    """The smallest number of paired seeds at which `equivalence` succeeds with the given probability.

    Args:
        std_of_differences: Standard deviation (ddof 1) of the paired differences. From few seeds it is itself
            uncertain, and so is the answer.
        margin: The margin, in the same unit.
        power: The probability wanted.
        alpha: Level of each test.
        difference: The true mean difference to allow for; at 0 the answer is the most hopeful one.

    Returns:
        At least 2.

    Raises:
        ValueError: If the margin is not above the difference, an argument is out of range, or a million (2²⁰)
            seeds would not do.
    """
    _check_margin(margin, alpha)
    _check_open_unit(power=power)
    if not 0 <= std_of_differences < math.inf:
        raise ValueError(f"The standard deviation must be finite and not negative, not {std_of_differences}.")
    if abs(difference) >= margin:
        raise ValueError(f"No number of seeds shows a difference of {difference:g} to be within ±{margin:g}.")
    if std_of_differences == 0:
        return 2

    def suffices(seeds: int) -> bool:
        return equivalence_power(seeds, std_of_differences, margin, alpha, difference) >= power

    high = 2
    while not suffices(high):
        high *= 2
        if high > _MOST_SEEDS:
            raise ValueError(f"More than {_MOST_SEEDS:,} seeds would be needed.")
    low = max(2, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle + 1, high)
    return high


def reference_equivalence(differences: Sequence[float], margin: float, alpha: float = 0.05) -> tuple[float, bool]:
    """Two one-sided tests in their textbook form, to hold `equivalence` to.

    Args:
        differences: Paired differences.
        margin: The margin.
        alpha: Level of each test.

    Returns:
        The larger p-value, and whether both tests reject.
    """
    lower = scipy.stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    upper = scipy.stats.ttest_1samp(differences, margin, alternative="less").pvalue
    return float(max(lower, upper)), bool(lower < alpha and upper < alpha)


def _differences(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[tuple[int, ...], np.ndarray]:
    """The common seeds and second minus first; what only rounding tells apart is made equal."""
    seeds = tuple(sorted(first.keys() & second.keys()))
    if not seeds:
        raise ValueError("No seed is common to both methods.")
    differences = np.array([second[seed] - first[seed] for seed in seeds], dtype=float)
    size = max(max(abs(first[seed]), abs(second[seed])) for seed in seeds)
    if np.ptp(differences) <= 1e-12 * size:
        differences[:] = differences[0]
    return seeds, differences


def _check_margin(margin: float, alpha: float) -> None:
    if not 0 < margin < math.inf:
        raise ValueError(f"The margin must be positive and finite, not {margin}.")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must be between 0 and 0.5, not {alpha}.")


def _check_open_unit(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, not {value}.")

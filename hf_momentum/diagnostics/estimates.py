"""Estimates with 95% intervals from independent pieces of data: U-statistics, the jackknife, Fieller's ratios.

The squared norm of the mean of M vectors is `|E x|² + tr Cov(x)/M` in expectation: the noise makes it too large. Sums
over pairs of *different* vectors have no such bias (U-statistics, Hoeffding 1948), and all of them follow from two
numbers a vector, `|x_i|²` and `x_i·S` with the sum S of all:

- `|E x|² = (|S|² − Σ|x_i|²) / (M(M−1))`,
- `tr Cov(x) = (Σ|x_i|² − |S|²/M) / (M−1)`.

Those two numbers also give every leave-one-out value, hence the jackknife variance (Efron, Stein, Annals of Statistics
1981). It is nearly unbiased where `|E x|²` clearly differs from 0, and too large by up to 2 where it does not. A
bootstrap would draw a vector twice and bring the bias back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # loads its slow modules when they are first used

from hf_momentum.errors import UserError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A measured number with its 95% confidence interval.

    Attributes:
        value: The estimate.
        low: Lower end of the interval; −∞ where nothing bounds it.
        high: Upper end; ∞ where nothing bounds it.
        standard_error: In the unit of the value.
        n: Number of independent pieces of data (micro-batches, or blocks of them) that entered.
    """

    value: float
    low: float
    high: float
    standard_error: float
    n: int

    @property
    def is_decided(self) -> bool:
        """Whether the interval is bounded. A ratio's is not where its denominator may be 0."""
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Jackknifed:
    """A statistic of n independent pieces of data, and its values with one of them left out.

    Attributes:
        value: From all the data.
        left_out: `(n,)`, from all but the i-th piece.
    """

    value: float
    left_out: np.ndarray

    @property
    def quantile(self) -> float:
        """Student's t for the intervals, with n − 1 degrees of freedom."""
        return float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(self.left_out) - 1))

    def covariance(self, other: "Jackknifed") -> float:
        """Give the jackknife covariance with a statistic of the same data: `(n−1)/n Σ (θ₋ᵢ − θ̄)(φ₋ᵢ − φ̄)`.

        Args:
            other: The other statistic, or this one for its variance.

        Returns:
            The covariance.
        """
        mine, others = self.left_out - self.left_out.mean(), other.left_out - other.left_out.mean()
        return float(mine @ others) * (len(mine) - 1) / len(mine)

    def scaled(self, factor: float) -> "Jackknifed":
        """Multiply the statistic.

        Args:
            factor: By this.

        Returns:
            The product.
        """
        return Jackknifed(factor * self.value, factor * self.left_out)

    def estimate(self, *, nonnegative: bool = False) -> Estimate:
        """Give the value with Student's interval, corrected for skewness (Hall, J. R. Stat. Soc. B 1992).

        Squares and variances are skewed, and so are their estimates from few pieces: the symmetric interval misses
        large truths. With the skewness γ of the pieces' influences, Hall's monotone transformation of the studentised
        error, `x + γx²/3 + γ²x³/27 + γ/(6n)` for `x = error/(s√n)`, has none, and is inverted.

        Args:
            nonnegative: Whether the truth is known not to be negative, which bounds the interval.

        Returns:
            The estimate.
        """
        count = len(self.left_out)
        error = math.sqrt(self.covariance(self))
        influences = self.left_out.mean() - self.left_out
        skewness = float((influences**3).mean() / (influences**2).mean() ** 1.5) if error > 0 else 0.0

        def untransformed(x: float) -> float:
            if abs(skewness) < 1e-6:
                return x
            return 3 / skewness * (math.cbrt(1 + skewness * (x - skewness / (6 * count))) - 1)

        reach, spread = self.quantile / math.sqrt(count), error * math.sqrt(count)
        low = self.value - spread * untransformed(reach)
        high = self.value - spread * untransformed(-reach)
        return Estimate(self.value, max(low, 0.0) if nonnegative else low, high, error, count)


def mean_of(samples: Sequence[float] | np.ndarray) -> Jackknifed:
    """The mean of independent samples, whose jackknife variance is the usual `s²/n`.

    Args:
        samples: At least 2 finite numbers.

    Returns:
        The statistic.

    Raises:
        UserError: If there are fewer, or one is not finite.
    """
    samples = _checked(samples, at_least=2)
    return Jackknifed(float(samples.mean()), (samples.sum() - samples) / (len(samples) - 1))


def pair_statistics(squares: np.ndarray, rows: np.ndarray) -> tuple[Jackknifed, Jackknifed]:
    """The U-statistics of the module's docstring for vectors x_1 … x_M with the sum S.

    Args:
        squares: `(M,)`, the `|x_i|²`.
        rows: `(M,)`, the `x_i·S`.

    Returns:
        `|E x|²` and the trace of the covariance of x.

    Raises:
        UserError: If there are fewer than 3, or a number is not finite.
    """
    squares, rows = _checked(squares, at_least=3), _checked(rows, at_least=3)
    count, square_sum, total = len(squares), squares.sum(), rows.sum()

    def both(count: int, square_sum: Any, total: Any) -> tuple[Any, Any]:
        return (total - square_sum) / (count * (count - 1)), (square_sum - total / count) / (count - 1)

    left_out = both(count - 1, square_sum - squares, total - 2 * rows + squares)
    values = both(count, square_sum, total)
    return Jackknifed(float(values[0]), left_out[0]), Jackknifed(float(values[1]), left_out[1])


def fieller(numerator: Jackknifed, denominator: Jackknifed, *, nonnegative: bool = False) -> Estimate:
    """The ratio of two statistics of the same data, with Fieller's interval (Fieller, J. R. Stat. Soc. B 1954).

    The interval holds the r at which `N − rD` is within t standard errors of 0. Where D itself is within t of its
    standard errors of 0 that set is unbounded, and the ratio is undecided.

    Args:
        numerator: N.
        denominator: D.
        nonnegative: Whether the true N and D are known not to be negative. An undecided ratio then keeps its lower
            bound, and is ∞ where D came out negative.

    Returns:
        The ratio, with the standard error of the delta method. Undecided: infinite ends.
    """
    n, d, t2 = numerator.value, denominator.value, numerator.quantile**2
    nn, dd = numerator.covariance(numerator), denominator.covariance(denominator)
    nd = numerator.covariance(denominator)
    ratio = n / d if d > 0 or (d < 0 and not nonnegative) else math.inf if nonnegative else math.nan
    error = math.sqrt(max(nn - 2 * ratio * nd + ratio**2 * dd, 0)) / abs(d) if math.isfinite(ratio) else math.inf
    # N − rD is within t standard errors of 0 where a r² − 2 b r + c ≤ 0.
    a, b, c = d**2 - t2 * dd, n * d - t2 * nd, n**2 - t2 * nn
    root = math.sqrt(max(b**2 - a * c, 0))
    low, high = -math.inf, math.inf
    if a > 0:
        low, high = (b - root) / a, (b + root) / a
    elif nonnegative:
        # Outside of two roots of different sign; a positive N bounds the ratio from below.
        low = (b - root) / a if a < 0 < c and n > 0 else 0.0
    return Estimate(ratio, low, high, error, len(numerator.left_out))


def _checked(samples: Sequence[float] | np.ndarray, at_least: int) -> np.ndarray:
    samples = np.asarray(samples, dtype=float)
    if len(samples) < at_least:
        raise UserError(
            f"{len(samples)} pieces of data are too few to estimate from: at least {at_least} are needed, and for a "
            "useful interval about 10. Measure on more micro-batches, or split the batch into smaller ones."
        )
    if not np.isfinite(samples).all():
        raise UserError(
            f"{int((~np.isfinite(samples)).sum())} of {len(samples)} measured products are not finite: gradients "
            "overflow. Measure in float32 or float64, or earlier in the run."
        )
    return samples

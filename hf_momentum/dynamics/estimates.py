"""Means over independent paths, and ratios of means over pairs of paths, with their 95% intervals.

The intervals take the estimate, or its logarithm, for normal: they need hundreds of paths, more where tails are heavy.
"""

import math
from typing import NamedTuple

from torch import Tensor

_NORMAL = 1.96  # the normal law's 97.5% point


class Estimate(NamedTuple):
    """An estimate with its interval; `_asdict()` is what a study's row holds.

    Attributes:
        measured: The estimate.
        low: Lower end of its 95% interval.
        high: Upper end.
    """

    measured: float
    low: float
    high: float

    def size(self) -> "Estimate":
        """Give the estimate of the absolute value; its interval starts at 0 at the least."""
        size, half = abs(self.measured), (self.high - self.low) / 2
        return Estimate(size, max(size - half, 0.0), size + half)

    def root(self) -> "Estimate":
        """Give the estimate of the square root, of what is not negative."""
        return Estimate(*(math.sqrt(max(value, 0.0)) for value in self))


def mean_estimate(values: Tensor) -> Estimate:
    """Estimate a mean.

    Args:
        values: One of each path, `(paths,)`.

    Returns:
        `mean ± 1.96 std/√paths`.
    """
    mean, half = float(values.mean()), _NORMAL * float(values.std()) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def mean_ratio(first: Tensor, second: Tensor) -> Estimate:
    """Estimate `r = E first / E second` of positive values, with the interval of its logarithm.

    Args:
        first: One value of each path, `(paths,)`.
        second: Those of the paths that share their noise.

    Returns:
        `r e^{±1.96 δ}`, with δ of `log_ratio_error`.
    """
    ratio, half = float(first.mean() / second.mean()), _NORMAL * log_ratio_error(first, second)
    return Estimate(ratio, ratio * math.exp(-half), ratio * math.exp(half))


def relative_difference(first: Tensor, second: Tensor) -> Estimate:
    """Estimate how far E first is from E second, in percent of E second.

    Args:
        first: One value of each path, `(paths,)`.
        second: Those of the paths that share their noise.

    Returns:
        `100 (r − 1 ± 1.96 r δ)`, with `r = E first / E second` and δ of `log_ratio_error`.
    """
    ratio = float(first.mean() / second.mean())
    half = _NORMAL * ratio * log_ratio_error(first, second)
    return Estimate(100 * (ratio - 1), 100 * (ratio - 1 - half), 100 * (ratio - 1 + half))


def log_ratio_error(first: Tensor, second: Tensor) -> float:
    """Give the standard error of `log(mean first / mean second)` by the delta method on the pairs.

    Args:
        first: `(paths,)`.
        second: Its partners.

    Returns:
        `δ = std(first/mean first − second/mean second) / √paths`.
    """
    return float((first / first.mean() - second / second.mean()).std()) / math.sqrt(len(first))

"""Weak errors `max_k |E h(x_k) − E h(z_k)|`: exact for Gaussian laws, with intervals from paths, and their orders."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from hf_momentum.dynamics.iterates import Iterate
from hf_momentum.dynamics.moments import Moments
from hf_momentum.errors import UserError


@dataclass(frozen=True)
class TestFunction:
    """A test function of one coordinate, with its expectation under a normal law.

    Attributes:
        name: As it is written.
        function: Maps values of the coordinate to h, of the same shape.
        expectation: Maps the mean and the variance of a normal law to E h.
        coordinate: Which coordinate of x it reads.
    """

    __test__ = False  # not a test case for pytest

    name: str
    function: Callable[[Tensor], Tensor]
    expectation: Callable[[float, float], float]
    coordinate: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate on paths `(paths, dim)`; gives `(paths,)`."""
        return self.function(x[:, self.coordinate])

    def mean(self, moments: Moments) -> float:
        """Give the exact expectation where x is Gaussian; a polynomial of degree 2 needs no Gaussian.

        Args:
            moments: Moments whose first entries are x's.

        Returns:
            E h(x).
        """
        i = self.coordinate
        return self.expectation(float(moments.mean[i]), float(moments.covariance[i, i]))


def power(degree: int, coordinate: int = 0) -> TestFunction:
    """Make `h(x) = x^n`.

    Args:
        degree: n of at least 1.
        coordinate: Which one.

    Returns:
        The test function.
    """

    def expectation(mean: float, variance: float) -> float:
        # E x^n = Σ_j C(n, 2j) (2j−1)!! V^j μ^{n−2j}
        return sum(
            math.comb(degree, 2 * j) * math.prod(range(1, 2 * j, 2)) * variance**j * mean ** (degree - 2 * j)
            for j in range(degree // 2 + 1)
        )

    return TestFunction(f"x^{degree}", lambda x: x**degree, expectation, coordinate)


def exponential(rate: float = 1.0, coordinate: int = 0) -> TestFunction:
    """Make `h(x) = e^{ax}`, `E h = e^{aμ + a²V/2}`.

    Args:
        rate: a.
        coordinate: Which one.

    Returns:
        The test function.
    """
    return TestFunction(
        f"exp({rate:g}x)",
        lambda x: (rate * x).exp(),
        lambda mean, variance: math.exp(rate * mean + 0.5 * rate**2 * variance),
        coordinate,
    )


def cosine(rate: float = 1.0, coordinate: int = 0) -> TestFunction:
    """Make `h(x) = cos ax`, `E h = e^{−a²V/2} cos aμ`.

    Args:
        rate: a.
        coordinate: Which one.

    Returns:
        The test function.
    """
    return TestFunction(
        f"cos({rate:g}x)",
        lambda x: (rate * x).cos(),
        lambda mean, variance: math.cos(rate * mean) * math.exp(-0.5 * rate**2 * variance),
        coordinate,
    )


def distance(origin: float = 0.0, coordinate: int = 0) -> TestFunction:
    """Make `h(x) = |x − x₀|`, which has a kink; with `d = μ − x₀`, `E h = √(2V/π) e^{−d²/2V} + d erf(d/√(2V))`.

    Args:
        origin: x₀.
        coordinate: Which one.

    Returns:
        The test function.
    """

    def expectation(mean: float, variance: float) -> float:
        d = mean - origin
        if variance <= 0:
            return abs(d)
        return math.sqrt(2 * variance / math.pi) * math.exp(-(d**2) / (2 * variance)) + d * math.erf(
            d / math.sqrt(2 * variance)
        )

    return TestFunction(f"|x − {origin:g}|", lambda x: (x - origin).abs(), expectation, coordinate)


def exact_weak_errors(
    first: Iterable[Moments], second: Iterable[Moments], functions: Sequence[TestFunction]
) -> NDArray[np.float64]:
    """Give weak errors without sampling.

    Args:
        first: Moments of one Gaussian process over the steps.
        second: Those of the other, at the same times.
        functions: The test functions h.

    Returns:
        `max_k |E h(x_k) − E h(z_k)|`, one for each function.
    """
    differences = [[abs(h.mean(a) - h.mean(b)) for h in functions] for a, b in zip(first, second, strict=True)]
    return np.max(differences, axis=0)


@dataclass(frozen=True, eq=False)
class WeakError:
    """A weak error from paths.

    Attributes:
        function: h.
        steps: k at which both were compared, `(K,)`.
        difference: `mean h(x_k) − mean h(z_k)`, `(K,)`.
        standard_error: Of the differences, from the pairs of paths, `(K,)`.
        unpaired_error: What it would be if the paths had independent noise, `(K,)`.
    """

    function: TestFunction
    steps: NDArray[np.int64]
    difference: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    unpaired_error: NDArray[np.float64]

    @property
    def maximum(self) -> float:
        """`max_k |E h(x_k) − E h(z_k)|` as estimated; its noise biases it upwards."""
        return float(np.abs(self.difference).max())

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Give a confidence interval of the maximum, from intervals of all steps at once (Bonferroni).

        Args:
            level: At least this is the probability that the interval holds the maximum.

        Returns:
            Its ends; the lower one is at least 0.
        """
        margin = stats.norm.ppf(1 - (1 - level) / (2 * len(self.steps))) * self.standard_error
        sizes = np.abs(self.difference)
        return float(max((sizes - margin).max(), 0.0)), float((sizes + margin).max())

    @property
    def variance_reduction(self) -> float:
        """By what factor common random numbers cut the variance, at the step of the maximum."""
        worst = np.abs(self.difference).argmax()
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.square(self.unpaired_error[worst] / self.standard_error[worst]))


def simulated_weak_errors(
    first: Iterable[Iterate], second: Iterable[Iterate], functions: Sequence[TestFunction]
) -> list[WeakError]:
    """Estimate weak errors from two streams of paths, path i of one beside path i of the other.

    Streams whose generators were seeded alike share their noise, which makes the differences far less noisy; streams
    with independent noise are just as right.

    Args:
        first: States of one process.
        second: States of the other, of as many paths and at the same times; their steps may be longer or shorter.
        functions: The test functions h.

    Returns:
        One weak error for each function, over the steps of `first`.
    """
    steps, rows = [], []
    for a, b in zip(first, second, strict=True):
        steps.append(a.step)
        values = torch.stack([torch.stack([h(a.x), h(b.x)]) for h in functions])  # (functions, 2, paths)
        difference = values[:, 0] - values[:, 1]
        unpaired = values.var(-1).sum(-1).sqrt()
        root = math.sqrt(len(a.x))
        rows.append(torch.stack([difference.mean(-1), difference.std(-1) / root, unpaired / root]))
    table = torch.stack(rows).double().cpu().numpy()  # (K, 3, functions)
    return [WeakError(h, np.array(steps), *table[:, :, i].T) for i, h in enumerate(functions)]


class FittedOrder(NamedTuple):
    """A power law `error ≈ C x^order`.

    Attributes:
        order: The slope on log-log axes.
        low: Lower end of its confidence interval.
        high: Upper end.
        constant: C.
    """

    order: float
    low: float
    high: float
    constant: float


def fitted_order(x: ArrayLike, errors: ArrayLike, level: float = 0.95) -> FittedOrder:
    """Fit the order of an error by least squares on log-log axes, with Student's t interval.

    Args:
        x: Positive values, at least three different ones.
        errors: Positive errors, as many.
        level: Confidence level of the interval.

    Returns:
        The fit.

    Raises:
        UserError: If there are too few values, or one is not positive.
    """
    x, errors = np.asarray(x, float), np.asarray(errors, float)
    if x.shape != errors.shape or len(np.unique(x)) < 3 or not (x > 0).all() or not (errors > 0).all():
        raise UserError("A fitted order needs at least three different positive x, and a positive error for each.")
    fit = stats.linregress(np.log(x), np.log(errors))
    margin = stats.t.ppf(0.5 + level / 2, len(x) - 2) * fit.stderr
    return FittedOrder(float(fit.slope), float(fit.slope - margin), float(fit.slope + margin), math.exp(fit.intercept))


def step_grid(steps: int, points: int) -> list[int]:
    """Choose numbers of steps at which to compare: evenly spaced ones, and geometric ones that see the first steps.

    Where the momentum fills, over the first `1/(1−β)` steps, SGD and SGDM differ in ways that a coarse grid misses.

    Args:
        steps: The last of them.
        points: How many of each kind, about.

    Returns:
        Rising numbers from 1 to `steps`.
    """
    even, geometric = np.linspace(1, steps, points), np.geomspace(1, steps, points)
    return np.unique(np.concatenate([even, geometric]).round().astype(int)).tolist()

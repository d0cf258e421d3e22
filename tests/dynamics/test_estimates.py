"""Means and ratios of means: values by hand, and intervals that hold the truth as often as they say."""

import math

import pytest
import torch

from hf_momentum.dynamics.estimates import Estimate, mean_estimate, mean_ratio, relative_difference

VALUES = torch.tensor([1.0, 3.0, 2.0]).double()
HALF = 1.96 / math.sqrt(3)  # their standard deviation is 1


def test_mean_size_and_root():
    assert mean_estimate(VALUES) == pytest.approx((2.0, 2 - HALF, 2 + HALF))
    assert mean_estimate(-VALUES).size() == pytest.approx((2.0, 2 - HALF, 2 + HALF))
    assert mean_estimate(VALUES - 1.5).size() == pytest.approx((0.5, 0.0, 0.5 + HALF))
    assert Estimate(4.0, -1.0, 9.0).root() == (2.0, 0.0, 3.0)
    assert mean_estimate(VALUES)._asdict().keys() == {"measured", "low", "high"}


def test_one_multiple_of_the_other_has_no_error():
    assert mean_ratio(1.5 * VALUES, VALUES) == pytest.approx((1.5, 1.5, 1.5))
    assert relative_difference(1.5 * VALUES, VALUES) == pytest.approx((50, 50, 50))


def test_both_ratios_have_the_error_of_the_delta_method():
    other = torch.tensor([2.0, 1.0, 6.0]).double()
    error = float((other - 1.5 * VALUES).std()) / 2 / math.sqrt(3)  # of the ratio
    linear, log = relative_difference(other, VALUES), mean_ratio(other, VALUES)
    assert linear == pytest.approx((50, 50 - 196 * error, 50 + 196 * error))
    assert log.measured == pytest.approx(1.5)
    assert math.log(log.high / log.low) == pytest.approx(2 * 1.96 * error / 1.5)


@pytest.mark.parametrize("estimate", [mean_ratio, relative_difference])
def test_intervals_hold_the_truth_in_95_of_100(estimate):
    generator = torch.Generator().manual_seed(0)
    squares = torch.randn(2000, 2, 400, generator=generator, dtype=torch.float64)
    squares[:, 1] = (0.8 * squares[:, 0] + 0.6 * squares[:, 1]) * math.sqrt(2)  # correlated, of twice the variance
    truth = 2.0 if estimate is mean_ratio else 100.0
    intervals = [estimate(second.square(), first.square()) for first, second in squares]
    held = sum(low < truth < high for _, low, high in intervals) / len(intervals)
    assert 0.93 < held < 0.97

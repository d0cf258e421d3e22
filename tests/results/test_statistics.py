import math

import numpy as np
import pytest
from scipy import stats

from hf_momentum.results.statistics import format_score, mean_std, paired_difference


def test_population_standard_deviation():
    assert mean_std([0.9, 1.0]) == pytest.approx((0.95, 0.05))


@pytest.mark.parametrize(
    ("values", "text"), [([0.936, 0.944], "94.0 (0.4)"), ([0.5], "50.0"), ([1.0, 1.0], "100.0 (0.0)")]
)
def test_format_as_the_protocol_prints_it(values, text):
    assert format_score(values) == text


def test_paired_difference_matches_the_paired_t_test():
    rng = np.random.default_rng(0)
    first = dict(enumerate(rng.normal(size=8)))
    second = {seed: value + rng.normal(0.5) for seed, value in first.items()}
    difference = paired_difference(first, second)
    test = stats.ttest_rel(list(second.values()), list(first.values()))
    interval = test.confidence_interval(0.95)
    assert difference.mean == pytest.approx(np.mean(list(second.values())) - np.mean(list(first.values())))
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))


def test_only_common_seeds_are_paired():
    difference = paired_difference({1: 0.1, 2: 0.2, 3: 9.0}, {1: 0.3, 2: 0.4, 4: 7.0})
    assert difference.seeds == (1, 2)
    assert difference.mean == pytest.approx(0.2)


def test_one_seed_has_no_interval_and_none_is_an_error():
    difference = paired_difference({1: 0.1}, {1: 0.3})
    assert (difference.low, difference.high) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="No seed is common"):
        paired_difference({1: 0.1}, {2: 0.3})

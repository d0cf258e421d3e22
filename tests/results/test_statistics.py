import math

import numpy as np
import pytest
from scipy import stats

from hf_momentum.results.statistics import (
    bootstrap_interval,
    equivalence,
    equivalence_power,
    format_score,
    mean_std,
    paired_difference,
    reference_equivalence,
    seeds_needed,
)


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


def pair(differences):
    """Two methods with these differences over seeds."""
    first = dict(enumerate(np.linspace(50, 60, len(differences))))
    return first, {seed: value + differences[seed] for seed, value in first.items()}


@pytest.mark.parametrize("seed", range(20))
def test_equivalence_matches_the_textbook_tests(seed):
    rng = np.random.default_rng(seed)
    differences = rng.normal(rng.uniform(-2, 2), rng.uniform(0.2, 2), size=rng.integers(2, 9))
    found, (p_value, rejects) = equivalence(*pair(differences), margin=1.5), reference_equivalence(differences, 1.5)
    assert found.p_value == pytest.approx(p_value)
    assert (found.verdict == "equivalent") == rejects
    assert (found.low > -1.5 and found.high < 1.5) == rejects
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.90)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize(
    ("differences", "verdict", "reason"),
    [
        ([0.1, -0.2, 0.3, 0.0, -0.1], "equivalent", "within the margin"),
        ([1.0, 1.1, 0.9, 1.0, 1.05], "equivalent", "within the margin, though not 0"),
        ([-1.0, -1.1, -0.9, -1.0, -1.05], "equivalent", "within the margin, though not 0"),
        ([2.0, 1.5, 1.0, 2.5, 1.8], "different", "not 0; perhaps within the margin"),
        ([-9.0, -8.0, -7.0, -8.5, -8.0], "different", "by more than the margin"),
        ([9.0, -9.0, 3.0, -4.0, 2.0], "undecided", "neither within the margin nor away from 0"),
        ([0.1], "undecided", "one seed has no spread"),
        ([0.1, 0.1, 0.1], "undecided", "all 3 differences are the same: no spread"),
    ],
)
def test_verdicts(differences, verdict, reason):
    found = equivalence(*pair(differences), margin=2.0)
    assert (found.verdict, found.reason) == (verdict, reason)


def test_without_spread_nothing_is_claimed():
    for differences in ([0.0], [0.0, 0.0]):
        found = equivalence(*pair(differences), margin=2.0)
        assert math.isnan(found.p_value)
        assert (found.low, found.high) == (-math.inf, math.inf)
        assert bootstrap_interval(*pair(differences)) == (-math.inf, math.inf)


def test_equal_differences_have_no_interval():
    difference = paired_difference(*pair([1.0, 1.0, 1.0]))
    assert (difference.mean, difference.std) == pytest.approx((1.0, 0.0))
    assert (difference.low, difference.high) == (-math.inf, math.inf)


def test_a_spread_of_rounding_errors_is_none():
    first, second = {1: 0.1, 2: 0.2, 3: 0.7}, {1: 0.3, 2: 0.4, 3: 0.9}
    assert len({second[seed] - first[seed] for seed in first}) > 1
    assert paired_difference(first, second).std == 0
    assert equivalence(first, second, 0.5).verdict == "undecided"


@pytest.mark.parametrize(("true", "margin", "verdict"), [(1.0, 1.0, "equivalent"), (0.0, 0.01, "different")])
def test_wrong_verdicts_are_as_frequent_as_alpha_says(true, margin, verdict):
    """At the margin's edge "equivalent" is wrong, at 0 "different" is: each in a share α of all experiments."""
    rng = np.random.default_rng(1)
    wrong = [equivalence(*pair(rng.normal(true, 0.3, 5)), margin).verdict == verdict for _ in range(2000)]
    assert np.mean(wrong) == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / 2000))


@pytest.mark.parametrize("arguments", [{"margin": 0.0}, {"margin": math.nan}, {"margin": 1.0, "alpha": 0.5}])
def test_senseless_margins_and_levels_are_refused(arguments):
    with pytest.raises(ValueError, match=r"margin must be|alpha must be"):
        equivalence({1: 0.1, 2: 0.2}, {1: 0.2, 2: 0.1}, **arguments)


def test_bootstrap_is_repeatable_and_close_to_the_t_interval_for_many_seeds():
    data = pair(np.random.default_rng(3).normal(1, 2, size=200))
    low, high = bootstrap_interval(*data)
    assert bootstrap_interval(*data) == (low, high)
    assert bootstrap_interval(*data, seed=1) != (low, high)
    difference = paired_difference(*data)
    assert (low, high) == pytest.approx((difference.low, difference.high), abs=0.03)


@pytest.mark.parametrize(
    ("seeds", "std", "margin", "true"), [(2, 1, 3, 0), (5, 1, 1, 0), (10, 1, 1, 0.3), (30, 2, 1, 0)]
)
def test_power_matches_simulation(seeds, std, margin, true):
    sample = np.random.default_rng(4).normal(true, std, size=(40_000, seeds))
    half = stats.t.ppf(0.95, seeds - 1) * sample.std(axis=1, ddof=1) / math.sqrt(seeds)
    simulated = np.mean(np.abs(sample.mean(axis=1)) + half < margin)
    assert equivalence_power(seeds, std, margin, difference=true) == pytest.approx(simulated, abs=0.01)


def test_power_matches_the_noncentral_t_where_one_side_decides():
    """With the true difference near one edge and many seeds, the other test nearly always passes."""
    seeds, std, margin, true = 40, 1.0, 2.0, 1.6
    law = stats.nct(seeds - 1, math.sqrt(seeds) * (margin - true) / std)
    one_sided = law.sf(stats.t.ppf(0.95, seeds - 1))
    assert equivalence_power(seeds, std, margin, difference=true) == pytest.approx(one_sided, abs=1e-6)


@pytest.mark.parametrize(("std", "margin", "power", "true"), [(1, 2, 0.8, 0), (3, 2, 0.9, 0.5), (0.1, 2, 0.8, 0)])
def test_seeds_needed_is_the_smallest_number_that_suffices(std, margin, power, true):
    brute = next(n for n in range(2, 1000) if equivalence_power(n, std, margin, difference=true) >= power)
    assert seeds_needed(std, margin, power, difference=true) == brute


def test_seeds_needed_approaches_the_normal_formula():
    """n = (z(1−α) + z(1−(1−power)/2))² σ²/margin² at a true difference of 0 (Julious 2004)."""
    formula = (stats.norm.ppf(0.95) + stats.norm.ppf(0.9)) ** 2 * (50 / 2) ** 2
    assert seeds_needed(50, 2) == pytest.approx(formula, rel=2e-3)


def test_seeds_needed_at_its_limits():
    assert seeds_needed(0.0, 2) == 2
    with pytest.raises(ValueError, match=r"No number of seeds shows a difference of 2 to be within ±2"):
        seeds_needed(1, 2, difference=2)
    with pytest.raises(ValueError, match="1,048,576 seeds"):
        seeds_needed(1000, 1)

import math

import numpy as np
import pytest

from hf_momentum.errors import UserError
from hf_momentum.results.ranking import paired_auc_interval, roc_auc


def cells(count=60, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random(count) < 0.4
    good, poor = labels + rng.normal(0, 0.5, count), labels + rng.normal(0, 3.0, count)
    return good, poor, labels


@pytest.mark.parametrize("seed", range(5))
def test_area_is_that_of_scikit_learn_with_ties(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    good, _, labels = cells(seed=seed)
    for scores in (good, good.round(), -good, np.zeros_like(good)):
        assert roc_auc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)


def test_area_by_hand():
    assert roc_auc([1, 2, 3, 4], [False, False, True, True]) == 1
    assert roc_auc([1, 2, 2, 4], [0, 1, 0, 1]) == 0.875  # one tie of four pairs


def test_paired_interval_sees_a_better_score_and_no_difference_of_a_score_from_itself():
    good, poor, labels = cells()
    found = paired_auc_interval(good, poor, labels)
    assert (found.first, found.second) == (roc_auc(good, labels), roc_auc(poor, labels))
    assert found.difference == found.first - found.second
    assert 0 < found.low < found.difference < found.high
    assert found.first_low < found.first < found.first_high
    assert found == paired_auc_interval(good, poor, labels)
    same = paired_auc_interval(good, 2 * good + 1, labels)
    assert (same.low, same.high) == (0, 0)


def test_pairing_narrows_the_difference_of_two_alike_scores():
    good, _, labels = cells()
    alike = good + np.random.default_rng(1).normal(0, 0.05, len(good))
    found = paired_auc_interval(good, alike, labels)
    apart = math.hypot(found.first_high - found.first_low, found.second_high - found.second_low)
    assert found.high - found.low < 0.5 * apart


@pytest.mark.slow
def test_paired_interval_covers_the_difference_of_the_population():
    # Normal scores, unit variance: AUC = Φ(shift/√2).
    from scipy import stats

    truth, rng, hits = stats.norm.cdf(1.5 / 2**0.5) - stats.norm.cdf(0.5 / 2**0.5), np.random.default_rng(3), 0
    labels = np.arange(100) < 50
    for _ in range(300):
        common = rng.normal(0, 0.5**0.5, 100)
        first, second = (common + rng.normal(0, 0.5**0.5, 100) + shift * labels for shift in (1.5, 0.5))
        found = paired_auc_interval(first, second, labels, resamples=500)
        hits += found.low <= truth <= found.high
    assert 0.90 <= hits / 300 <= 0.985


@pytest.mark.parametrize(
    ("scores", "labels", "words"),
    [
        ([1, 2, 3], [True, False], "one score"),
        ([1, 2], [0.5, 1], "true or false"),
        ([1, math.inf], [True, False], "not finite"),
        ([1, math.nan], [True, False], "not finite"),
        ([1, 2], [True, True], "same outcome"),
        ([1, 2, 3], [True, False, False], "two cells of each"),
    ],
)
def test_bad_input(scores, labels, words):
    with pytest.raises(UserError, match=words):
        paired_auc_interval(scores, scores, labels)


def test_bad_confidence():
    with pytest.raises(UserError, match="confidence"):
        paired_auc_interval([1, 2], [1, 2], [True, False], confidence=1.0)

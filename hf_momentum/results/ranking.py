"""How well a score ranks cells by a yes-or-no outcome: the area under the ROC curve, and which score is better."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy  # loads its slow modules when they are first used

from hf_momentum.errors import UserError


class AucComparison(NamedTuple):
    """Two scores of the same cells, with 95% intervals of the bootstrap over cells unless another level was asked for.

    Attributes:
        first: AUC of the first score.
        first_low: Lower end of its interval.
        first_high: Upper end.
        second: AUC of the second score.
        second_low: Lower end of its interval.
        second_high: Upper end.
        difference: First minus second.
        low: Lower end of the difference's interval, from the same resamples.
        high: Upper end.
    """

    first: float
    first_low: float
    first_high: float
    second: float
    second_low: float
    second_high: float
    difference: float
    low: float
    high: float


def roc_auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Area under the ROC curve: the probability that a positive cell scores above a negative one, ties counting half.

    By mid-ranks, the Mann–Whitney statistic over the number of pairs (Hanley and McNeil 1982).

    Args:
        scores: One finite number per cell; higher means that the outcome is more expected.
        labels: The outcomes, both of which occur.

    Returns:
        The area, ½ for a score that tells nothing.
    """
    scores, labels = _checked(scores, labels)
    return float(_areas(scores[None], labels[None])[0])


def paired_auc_interval(
    first: Sequence[float],
    second: Sequence[float],
    labels: Sequence[bool],
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 5000,
) -> AucComparison:
    """Compare two scores of the same cells by the percentile bootstrap over cells (Efron 1979).

    A resample takes each cell with both its scores and its outcome, so that what both scores find hard cancels in the
    difference. Positive and negative cells are drawn apart, each in their number: an AUC needs both.

    Args:
        first: A score, one finite number per cell.
        second: Another score of the same cells.
        labels: The outcomes; at least two cells have each.
        confidence: Level of the two-sided intervals.
        seed: Of the resampling.
        resamples: Number of resamples.

    Returns:
        Both areas and their difference, with intervals.

    Raises:
        UserError: If the input is not as described.
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be between 0 and 1, not {confidence}.")
    (first, labels), (second, _) = _checked(first, labels), _checked(second, labels)
    positive, negative = np.flatnonzero(labels), np.flatnonzero(~labels)
    if min(len(positive), len(negative)) < 2:
        raise UserError(f"A bootstrap needs two cells of each outcome; there are {len(positive)} and {len(negative)}.")
    generator = np.random.default_rng(seed)
    chosen = np.concatenate([generator.choice(part, (resamples, len(part))) for part in (positive, negative)], axis=1)
    areas = np.stack([_areas(scores[chosen], labels[chosen]) for scores in (first, second)])
    quantiles = ((1 - confidence) / 2, (1 + confidence) / 2)
    ends = [np.quantile(values, quantiles).tolist() for values in (*areas, areas[0] - areas[1])]
    points = [float(_areas(scores[None], labels[None])[0]) for scores in (first, second)]
    return AucComparison(points[0], *ends[0], points[1], *ends[1], points[0] - points[1], *ends[2])


def _areas(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AUC of each row, `(rows, cells)` → `(rows,)`."""
    ranks = scipy.stats.rankdata(scores, axis=1)
    positives = labels.sum(1)
    surplus = (ranks * labels).sum(1) - positives * (positives + 1) / 2
    return surplus / (positives * (labels.shape[1] - positives))


def _checked(scores: Sequence[float], labels: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    scores, given = np.asarray(scores, float), np.asarray(labels)
    labels = given.astype(bool)
    if scores.ndim != 1 or scores.shape != labels.shape or not (given == labels).all():
        raise UserError(f"Give one score and one outcome, true or false, per cell, not {scores.shape} {labels.shape}.")
    if not all(map(math.isfinite, scores)):
        raise UserError("A score is not finite; give an unbounded one a large finite value, so that it has a rank.")
    if labels.all() or not labels.any():
        raise UserError("All cells have the same outcome: there is nothing to rank. Add cells of the other one.")
    return scores, labels

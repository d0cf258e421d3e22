"""Accuracy and macro-F1: computed at once for the Trainer, and as an `evaluate` metric that needs no network.

`evaluate.load("accuracy")` fetches a script from the Hub; this metric is a class of the package. It keeps its inputs
in memory, so any number of instances and processes can run at once without sharing a cache file. `evaluate` takes
seconds to import, and a run is scored many times: for the Trainer the two are worked out directly.
"""

import functools
from typing import TYPE_CHECKING

import numpy as np

from hf_momentum.errors import require_extra

if TYPE_CHECKING:
    import evaluate
    from transformers import EvalPrediction


@functools.cache
def _metric_class() -> type["evaluate.Metric"]:
    evaluate = require_extra("evaluate", "text")
    datasets = require_extra("datasets", "text")
    sklearn_metrics = require_extra("sklearn.metrics", "text")

    class AccuracyAndMacroF1(evaluate.Metric):
        def _info(self) -> "evaluate.MetricInfo":
            class_index = datasets.Value("int64")
            return evaluate.MetricInfo(
                description="Accuracy, and the mean of the classes' F1 scores.",
                citation="",
                inputs_description="predictions, references: class indices",
                features=datasets.Features({"predictions": class_index, "references": class_index}),
            )

        def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
            return {
                "accuracy": float(sklearn_metrics.accuracy_score(references, predictions)),
                "f1": float(sklearn_metrics.f1_score(references, predictions, average="macro", zero_division=0.0)),
            }

    return AccuracyAndMacroF1


def load_metric() -> "evaluate.Metric":
    """Make a metric of accuracy and macro-F1.

    F1 is averaged over the classes that occur in the predictions or the references, as scikit-learn does.

    Returns:
        A metric whose `compute(predictions=…, references=…)` takes class indices (N) and returns
            `{"accuracy": …, "f1": …}`, both between 0 and 1.
    """
    return _metric_class()(keep_in_memory=True)


def accuracy_and_f1(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The values of `load_metric`, without `evaluate` and scikit-learn.

    Args:
        predictions: Class indices (N).
        references: Class indices (N).

    Returns:
        `{"accuracy": …, "f1": …}`; F1 is the mean over the classes that occur in either.
    """
    right = predictions == references
    scores = [
        2 * (right & (references == index)).sum() / ((predictions == index).sum() + (references == index).sum())
        for index in np.union1d(predictions, references)
    ]
    return {"accuracy": float(right.mean()), "f1": float(np.mean(scores))}


def compute_metrics(eval_prediction: "EvalPrediction") -> dict[str, float]:
    """Score a Trainer's predictions; pass it as `Trainer(compute_metrics=compute_metrics)`.

    Args:
        eval_prediction: `predictions` are scores (N × classes), or a tuple that starts with them; `label_ids` are
            class indices (N).

    Returns:
        `{"accuracy": …, "f1": …}` of the highest-scored class.
    """
    scores, references = eval_prediction.predictions, eval_prediction.label_ids
    if isinstance(scores, tuple):
        scores = scores[0]
    return accuracy_and_f1(np.argmax(scores, axis=-1), references)

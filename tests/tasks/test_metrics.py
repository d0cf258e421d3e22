"""Accuracy and macro-F1 against values worked out by hand, and instances that share nothing."""

import subprocess
import sys

import numpy as np
import pytest
from transformers import EvalPrediction

from hf_momentum.tasks.metrics import accuracy_and_f1, compute_metrics, load_metric

SCORES = np.eye(3)[[0, 0, 1, 2, 1]]
LABELS = np.array([0, 1, 1, 2, 2])
# F1: class 0 has precision 1/2, recall 1; class 1 1/2, 1/2; class 2 1, 1/2.
EXPECTED = {"accuracy": 3 / 5, "f1": (2 / 3 + 1 / 2 + 2 / 3) / 3}


def test_values_by_hand():
    assert compute_metrics(EvalPrediction(SCORES, LABELS)) == pytest.approx(EXPECTED)


def test_scores_may_come_first_in_a_tuple():
    assert compute_metrics(EvalPrediction((SCORES, np.zeros((5, 7))), LABELS)) == pytest.approx(EXPECTED)


def test_f1_is_over_the_classes_that_occur():
    assert compute_metrics(EvalPrediction(np.eye(3)[[0, 0]], np.array([0, 0]))) == {"accuracy": 1.0, "f1": 1.0}


def test_values_are_plain_floats():
    assert {type(value) for value in compute_metrics(EvalPrediction(SCORES, LABELS)).values()} == {float}


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_the_direct_values_are_those_of_the_metric(classes):
    generator = np.random.default_rng(classes)
    for count in (1, 4, 60):
        predictions, references = generator.integers(classes, size=(2, count))
        expected = load_metric().compute(predictions=predictions, references=references)
        direct = accuracy_and_f1(predictions, references)
        assert direct["accuracy"] == expected["accuracy"]
        assert direct["f1"] == pytest.approx(expected["f1"], abs=1e-15)


def test_it_is_an_evaluate_metric():
    import evaluate

    metric = load_metric()
    assert isinstance(metric, evaluate.Metric)
    assert metric.compute(predictions=[0, 1], references=[0, 1]) == {"accuracy": 1.0, "f1": 1.0}


def test_instances_share_no_file():
    first, second = load_metric(), load_metric()
    first.add_batch(predictions=[0, 1], references=[0, 1])
    second.add_batch(predictions=[0, 1], references=[1, 0])
    assert first.cache_file_name is None and second.cache_file_name is None
    assert second.compute()["accuracy"] == 0.0
    assert first.compute()["accuracy"] == 1.0


def test_scoring_does_not_import_evaluate():
    code = "import sys, numpy; from hf_momentum.tasks.metrics import accuracy_and_f1; ones = numpy.ones(3, int)\n"
    code += "accuracy_and_f1(ones, ones); sys.exit(any(m in sys.modules for m in ('evaluate', 'sklearn')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

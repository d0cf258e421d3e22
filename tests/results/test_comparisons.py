import math

import pytest
from sample_runs import run, runs

from hf_momentum.errors import UserError
from hf_momentum.results.comparisons import averaged_pairs, comparison_report, difference_lines, paired_values
from hf_momentum.results.rows import table_rows
from hf_momentum.results.tables import version_notes


def two(first, second, **changes):
    return runs("sgd", first, **changes) + runs("sgdm", second, **changes)


def test_values_are_points_for_accuracies_and_plain_for_others():
    rows = table_rows([record | {"train_loss": 0.25} for record in two([0.5, 0.6], [0.6, 0.6])])
    (accuracy,), (loss,) = paired_values(rows), paired_values(rows, "train_loss")
    assert accuracy.difference().mean == pytest.approx(5.0)
    assert loss.first_values == {13: 0.25, 21: 0.25}


def test_average_over_tasks_is_taken_per_seed_over_common_seeds():
    records = two([0.5, 0.6, 0.7], [0.6, 0.6, 0.9]) + two([0.4, 0.5], [0.4, 0.7], task="trec")
    (averaged,) = averaged_pairs(paired_values(table_rows(records)))
    assert averaged.label == "mean of 2 tasks"
    assert averaged.first_values == pytest.approx({13: 45, 21: 55})
    assert averaged.second_values == pytest.approx({13: 50, 21: 65})
    assert averaged_pairs(paired_values(table_rows(two([0.5, 0.6], [0.6, 0.6])))) == []


def test_averages_of_two_settings_are_kept_apart_and_named():
    records = [
        record for k in (16, 64) for task in ("a", "b") for record in two([0.5, 0.6], [0.6, 0.8], task=task, k=k)
    ]
    averaged = averaged_pairs(paired_values(table_rows(records)))
    assert [pair.label for pair in averaged] == ["mean of 2 tasks, k=16", "mean of 2 tasks, k=64"]


def test_rows_that_nothing_can_be_compared_with_are_named():
    lines = difference_lines(table_rows([run("sgd", 13, 0.6), run("sgdm", 13, 0.6, batch_size=4)]))
    assert lines == [
        "Compared with nothing, as no other method has the same data, seeds, batch size, steps, schedule and "
        "clipping: sst-2: sgdm β=0.9, batch 4; sst-2: sgd, batch 8."
    ]
    assert difference_lines(table_rows([run("sgd", 13, 0.6)])) == []


def test_versions_that_differ_within_a_setting_are_said_once():
    old, new = {"torch": "2.14.1", "deepspeed": None}, {"torch": "2.15.0", "deepspeed": None}
    records = [run("sgd", seed, 0.6, task=task, packages=p) for task in "ab" for seed, p in ((1, old), (2, new))]
    records += runs("sgd", [0.6, 0.6], task="c", packages=new)
    assert version_notes(table_rows(records)) == ["Runs made under different versions, torch 2.14.1 and 2.15.0: a; b."]


def test_report_without_spread_claims_nothing():
    values = comparison_report(two([0.5, 0.6], [0.5, 0.6]), margin=2).values[0]
    assert (values["verdict"], values["seeds_needed"]) == ("undecided", None)
    assert math.isnan(values["p_value"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 0}, "margin must be positive"),
        ({"margin": 2, "alpha": 0.7}, "alpha must be between"),
        ({"margin": 2, "confidence": 1.0}, "--confidence must be between 0 and 1"),
        ({"margin": 2, "metric": "f1"}, "Nothing to compare: .* 'f1'"),
    ],
)
def test_mistakes_are_explained(options, message):
    with pytest.raises(UserError, match=message):
        comparison_report(two([0.5, 0.6], [0.5, 0.7]), **options)

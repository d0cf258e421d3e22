import math

import pytest
from sample_runs import five_tasks, run, runs, sweeps

from hf_momentum.errors import UserError
from hf_momentum.results.comparisons import averaged_pairs, comparison_report, difference_lines, paired_values
from hf_momentum.results.export import to_csv, to_terminal
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
        "Compared with nothing, as no other method has the same task, data, draw, seeds, batch size, steps, schedule, "
        "clipping, weight decay and further arguments (without a grid: learning rate too): sst-2: sgdm β=0.9, batch 4"
        "; sst-2: sgd, batch 8."
    ]
    assert difference_lines(table_rows([run("sgd", 13, 0.6)])) == []


def test_versions_that_differ_within_a_setting_are_said_once():
    old, new = {"torch": "2.14.1", "deepspeed": None}, {"torch": "2.15.0", "deepspeed": None}
    records = [run("sgd", seed, 0.6, task=task, packages=p) for task in "ab" for seed, p in ((1, old), (2, new))]
    records += runs("sgd", [0.6, 0.6], task="c", packages=new)
    assert version_notes(table_rows(records)) == ["Runs made under different versions, torch 2.14.1 and 2.15.0: a; b."]


def test_report_without_spread_claims_nothing():
    values = comparison_report(two([0.5, 0.6], [0.5, 0.6]), margin=2).values[0]
    assert (values["verdict"], values["seeds_needed_if_equal"]) == ("undecided", None)
    assert math.isnan(values["p_value"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 0}, "margin must be positive"),
        ({"margin": 2, "alpha": 0.7}, "alpha must be between"),
        ({"margin": 2, "confidence": 1.0}, "--confidence must be between 0 and 1"),
        ({"margin": 2, "metric": "f1"}, "Nothing to compare: .* 'f1'"),
        ({"margin": 2, "metric": "task"}, "--metric task is no number .* Numeric here: .*dev_accuracy, test_accuracy"),
        ({"margin": 2, "metric": "packages"}, "--metric packages is no number"),
    ],
)
def test_mistakes_are_explained(options, message):
    with pytest.raises(UserError, match=message):
        comparison_report(two([0.5, 0.6], [0.5, 0.7]), **options)


def test_seeds_of_different_draws_are_left_out_and_told():
    records = two([0.5, 0.6, 0.7], [0.6, 0.7, 0.9])
    records = [r | {"draw": f"{r['seed']}{r['optim'] if r['seed'] == 42 else ''}"} for r in records]
    (pair,) = paired_values(table_rows(records))
    assert pair.difference().seeds == (13, 21)
    line = "sst-2: sgdm β=0.9 − sgd leaves out seed 42: the two trained on different draws of examples."
    assert line in difference_lines(table_rows(records))
    assert line in comparison_report(records, margin=2).notes


def test_a_method_found_different_needs_no_seeds_to_be_found_equal():
    values = comparison_report(five_tasks(), margin=2).values
    assert all((row["seeds_needed_if_equal"] is None) == (row["verdict"] == "different") for row in values[2:])


@pytest.mark.parametrize("margin", [0.002, 0.5, 1.1, 2.0, 30.0])
def test_the_deciding_interval_is_seen_inside_the_margin_where_it_lies_inside(margin):
    report = comparison_report(five_tasks(), margin)
    (sheet,) = report.sheets
    verdict, interval = sheet.columns.index("verdict"), sheet.columns.index("90% TOST")
    for cells, values in zip(sheet.rows, report.values, strict=True):
        ends = "-inf, inf" if cells[interval] == "none" else cells[interval].strip("[]")
        low, high = map(float, ends.split(","))
        assert (max(-low, high) < margin) == (cells[verdict] == "equivalent")
        assert (max(-values["tost_low"], values["tost_high"]) < margin) == (cells[verdict] == "equivalent")
    assert "tost_low,tost_high" in to_csv(report)


def test_what_all_rows_share_stands_in_the_title():
    sheet = comparison_report(two([0.5, 0.6], [0.6, 0.8]) + two([0.5, 0.6], [0.6, 0.8], task="b"), margin=2).sheets[0]
    assert sheet.title == "Paired comparison: sgdm β=0.9 − sgd, 2 seeds, test_accuracy, margin ±2 points"
    assert sheet.columns[:2] == ("task", "points")
    assert comparison_report(two([0.5, 0.6], [0.6, 0.8]), margin=2).sheets[0].columns[0] == "task"


@pytest.mark.parametrize("records", [five_tasks(), sweeps()])
def test_a_narrow_terminal_shows_whole_verdicts_and_says_what_is_left_out(records):
    report = comparison_report(records, margin=2)
    lines = to_terminal(report, width=80).split("second − first", 1)
    assert max(map(len, lines[0].splitlines())) <= 80
    assert "…" not in lines[0]
    for values in report.values:
        assert f"{values['difference']:+.1f}" in lines[0]
        assert values["verdict"] in lines[0]
    words = " ".join(lines[1].split())
    assert "not shown at this width: 95% bootstrap, needed if equal, TOST p" in words
    assert "not shown" not in to_terminal(report, width=200)


@pytest.mark.parametrize(
    ("margin", "verdict", "heading", "interval"),
    [
        (1.0, "different", "95% t", "[+0.02, +1.98]"),
        (1.7, "equivalent", "90% TOST", "[+0.34, +1.67]"),
        (1.9, "equivalent", "90% TOST", "[+0.3, +1.7]"),
    ],
)
def test_rounding_does_not_hide_what_decided(margin, verdict, heading, interval):
    (sheet,) = comparison_report(two([0.5, 0.5, 0.5], [0.51, 0.514, 0.5061]), margin).sheets
    row = dict(zip(sheet.columns, sheet.rows[0], strict=True))
    assert (row["verdict"], row[heading]) == (verdict, interval)

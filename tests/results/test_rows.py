import random

import pytest
from sample_runs import run, runs, sweeps

from hf_momentum.results.rows import cell_rows, comparison_pairs, row_names, setting_names, table_rows


def pairs(records):
    rows = table_rows(records)
    names = row_names(rows)
    return [f"{names[id(second)]} − {names[id(first)]}" for first, second in comparison_pairs(rows)]


def names(records):
    rows = table_rows(records)
    return list(row_names(rows).values())


def test_order_of_rows_does_not_depend_on_the_order_of_records():
    records = sweeps()
    expected = names(records)
    random.Random(0).shuffle(records)
    assert names(records) == expected


def test_names_tell_several_settings_apart_at_once():
    records = [
        run("sgd", 13, 0.6),
        run("sgd", 13, 0.6, batch_size=4),
        run("sgdm", 13, 0.6, lr_schedule="cosine"),
        run("sgdm", 13, 0.6, lr_schedule=None, max_grad_norm=0.0),
    ]
    assert names(records) == [
        "sgdm β=0.9, lr unknown, batch 8, clip 0",
        "sgdm β=0.9, lr cosine, batch 8, clip 1",
        "sgd, lr linear, batch 4, clip 1",
        "sgd, lr linear, batch 8, clip 1",
    ]


def test_marks_that_do_not_tell_are_left_out_and_the_rest_is_numbered():
    assert names([run("sgd", 13, 0.6), run("sgdm", 13, 0.6, steps=90)]) == ["sgd", "sgdm β=0.9"]
    assert names([run("sgd", 13, 0.6, group="a"), run("sgd", 13, 0.6, group="b")]) == ["sgd, #1", "sgd, #2"]
    several = [run("sgd", 13, 0.6, group="a"), run("sgd", 13, 0.6, group="b", grid_size=6)]
    assert names(several) == ["sgd, 2 cells", "sgd, 6 cells"]


def test_records_without_a_group_are_told_apart_by_how_they_were_trained():
    records = [run("sgd", 13, 0.6), run("sgd", 13, 0.6, lr_schedule="cosine")]
    assert names([record | {"group": None} for record in records]) == ["sgd, lr cosine", "sgd, lr linear"]


def test_setting_names_say_no_more_than_needed():
    rows = table_rows([run("sgd", 13, 0.6), run("sgd", 13, 0.6, k=64), run("sgd", 13, 0.6, task="trec")])
    assert list(setting_names(rows).values()) == ["sst-2, k=16", "sst-2, k=64", "trec, k=16"]
    assert setting_names([]) == {}


def test_each_condition_has_its_own_baseline():
    assert pairs(sweeps()) == [
        "sgdm β=0.9, lr cosine, batch 8 − sgd, lr cosine, batch 8",
        "sgdm β=0.9, lr linear, batch 4 − sgd, lr linear, batch 4",
        "sgdm β=0.9, lr linear, batch 8 − sgd, lr linear, batch 8",
        "sgdm β=0.99, lr linear, batch 8 − sgd, lr linear, batch 8",
    ]


def test_a_sweep_of_beta_is_compared_with_plain_sgd_or_the_smallest_beta():
    sweep = [run("sgdm", 13, 0.6, momentum=momentum) for momentum in (0.99, 0.5, 0.9)]
    assert pairs(sweep) == ["sgdm β=0.9 − sgdm β=0.5", "sgdm β=0.99 − sgdm β=0.5"]
    assert pairs([*sweep, run("sgd", 13, 0.6)]) == ["sgdm β=0.5 − sgd", "sgdm β=0.9 − sgd", "sgdm β=0.99 − sgd"]


def test_svag_with_momentum_is_compared_with_svag_without_at_the_same_ell():
    records = [run("sgd", 13, 0.6), run("sgdm", 13, 0.6), run("adamw_torch", 13, 0.6)]
    for ell in (2.0, 4.0):
        records += [run("svag", 13, 0.6, ell=ell, momentum=momentum, steps=60 * ell // 1) for momentum in (0.0, 0.9)]
    records = [record | {"steps": int(record["steps"])} for record in records]
    assert pairs(records) == [
        "sgdm β=0.9 − sgd",
        "svag ℓ=2 − sgd",
        "svag β=0.9 ℓ=2 − svag ℓ=2",
        "svag ℓ=4 − sgd",
        "svag β=0.9 ℓ=4 − svag ℓ=4",
        "adamw_torch − sgd",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "trec"},
        {"batch_size": 4},
        {"lr_schedule": "cosine"},
        {"lr_schedule": None},
        {"steps": 90},
        {"max_grad_norm": 0.0},
        {"test_data": "other"},
        {"peft": "lora"},
        {"seed": 21},
    ],
)
def test_what_was_trained_differently_is_not_compared(changes):
    assert len(pairs([run("sgd", 13, 0.6), run("sgdm", 13, 0.6)])) == 1
    assert pairs([run("sgd", 13, 0.6), run("sgdm", 13, 0.6) | changes]) == []


def test_a_searched_batch_size_may_differ():
    searched = [run("sgdm", seed, 0.6, batch_size=size) | {"group": "g"} for seed, size in ((13, 2), (21, 4))]
    assert pairs([*runs("sgd", [0.6, 0.6], batch_size=4), *searched]) == ["sgdm β=0.9, batch 2/4 − sgd, batch 4"]


def test_of_two_baselines_the_one_with_the_same_grid_is_taken():
    records = [run("sgd", 13, 0.6), run("sgd", 13, 0.6, group="wide", grid_size=6), run("sgdm", 13, 0.6, grid_size=6)]
    assert pairs(records) == ["sgdm β=0.9 − sgd, 6 cells"]


def test_cells_hold_each_run_once_as_last_recorded():
    dev = [run("sgd", seed, None, learning_rate=rate) for seed in (13, 21) for rate in (0.1, 0.3)]
    tested = dev[0] | {"stage": "test", "test_accuracy": 0.6, "group": "g"}
    (row,) = cell_rows([*dev, tested])
    assert len(row.records) == 4
    assert [record["test_accuracy"] for record in row.records] == [0.6, None, None, None]

import json
import random

import pytest
from sample_runs import run, runs, sweeps

from hf_momentum.results.rows import (
    cell_rows,
    comparison_pairs,
    paired_seeds,
    rate_of,
    repeated_tests,
    row_names,
    setting_names,
    split_name,
    table_rows,
)


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
    assert names([run("sgd", 13, 0.6, group="a"), run("sgd", 13, 0.6, group="b")]) == ["sgd #1", "sgd #2"]
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
        {"draw": "other"},
        {"weight_decay": 0.1},
        {"arguments": {"label_smoothing_factor": 0.1}},
        {"arguments": {"eval_steps": 0.2}},
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


def sweep_of_rates(**changes):
    rates = [{"learning_rate": rate, "effective_lr": rate, "group": f"{rate}"} | changes for rate in (0.03, 0.1)]
    return [run(optim, 13, 0.6, **rate) | {"group": f"{optim}{rate}"} for optim in ("sgd", "sgdm") for rate in rates]


def test_single_cells_are_compared_at_equal_learning_rate():
    assert pairs(sweep_of_rates(grid_size=1)) == [
        "sgdm β=0.9, η=0.03 − sgd, η=0.03",
        "sgdm β=0.9, η=0.1 − sgd, η=0.1",
    ]
    heavy_ball = [run("sgd", 13, 0.6, grid_size=1), run("sgdm", 13, 0.6, grid_size=1, effective_lr=0.01 / (1 - 0.9))]
    assert len(pairs(heavy_ball)) == 1
    other = [run("sgd", 13, 0.6, grid_size=1), run("adamw_torch", 13, 0.6, grid_size=1, learning_rate=1e-3)]
    assert pairs(other) == []


def test_searched_learning_rates_may_differ():
    records = [run("sgd", 13, 0.6), run("sgdm", 13, 0.6, effective_lr=0.3)]
    assert pairs(records) == ["sgdm β=0.9 − sgd"]


def test_arguments_that_stand_elsewhere_or_that_svag_stretches_may_differ():
    plain = {"max_steps": 60, "gradient_accumulation_steps": 1, "warmup_steps": 5, "label_smoothing_factor": 0.1}
    stretched = plain | {"max_steps": 120, "gradient_accumulation_steps": 2, "warmup_steps": 10}
    records = [run("sgd", 13, 0.6, arguments=plain), run("svag", 13, 0.6, ell=2.0, steps=120, arguments=stretched)]
    assert pairs(records) == ["svag ℓ=2 − sgd"]
    records[1]["arguments"] = stretched | {"label_smoothing_factor": 0.0}
    assert pairs(records) == []
    assert pairs([run("sgd", 13, 0.6, arguments=plain), run("sgdm", 13, 0.6, arguments=stretched)]) == []


def test_seeds_are_paired_where_they_drew_the_same():
    first = table_rows(run("sgd", seed, 0.6, draw=f"draw {seed}") for seed in (13, 21, 42))
    second = table_rows(run("sgdm", seed, 0.6, draw=f"draw {max(seed, 21)}") for seed in (13, 21, 87))
    assert paired_seeds(*first, *second) == {21}


@pytest.mark.parametrize("form", [dict, json.dumps])
@pytest.mark.parametrize(
    ("schedule", "keywords", "name"),
    [
        ("linear", {"start": 0, "end": 0.9}, "sgdm β linear 0→0.9"),
        ("cosine", {"start": 0.9, "end": 0.0, "over": 0.5}, "sgdm β cosine 0.9→0 over=0.5"),
        ("step", {"values": [0.9, 0.5], "milestones": [0.5]}, "sgdm β step values=0.9/0.5 milestones=0.5"),
        ("constant", {}, "sgdm β constant"),
    ],
)
def test_schedules_of_beta_are_named_with_their_keywords(form, schedule, keywords, name):
    record = run("sgdm", 13, 0.6, momentum=None, momentum_schedule=schedule)
    assert names([record | {"arguments": {"momentum_schedule_kwargs": form(keywords)}}]) == [name]


def test_two_schedules_of_beta_are_two_methods_even_without_a_group():
    records = [
        run("sgdm", 13, 0.6, momentum=None, momentum_schedule="linear", group=None)
        | {"arguments": {"momentum_schedule_kwargs": keywords}}
        for keywords in ({"start": 0, "end": 0.9}, {"start": 0.9, "end": 0})
    ]
    assert names(records) == ["sgdm β linear 0→0.9", "sgdm β linear 0.9→0"]
    assert pairs([run("sgd", 13, 0.6), *records]) == ["sgdm β linear 0→0.9 − sgd", "sgdm β linear 0.9→0 − sgd"]


def test_a_number_belongs_to_the_method_and_is_no_condition():
    records = [run("sgd", 13, 0.6, batch_size=size, group=f"{size}{part}") for size in (4, 8) for part in "ab"]
    assert [split_name(name) for name in names(records)] == [
        ("sgd #1", "batch 4"),
        ("sgd #2", "batch 4"),
        ("sgd #1", "batch 8"),
        ("sgd #2", "batch 8"),
    ]
    assert split_name("sgdm β=0.9") == ("sgdm β=0.9", "")


def test_a_second_test_of_one_row_and_seed_is_told():
    first, second = run("sgd", 13, 0.5, run_id="a"), run("sgd", 13, 0.7, run_id="b")
    assert repeated_tests([first, second, run("sgd", 21, 0.6), run("sgd", 13, None)]) == [
        "sst-2, sgd, seed 13: run a was tested, then run b; the later test stands."
    ]
    assert repeated_tests([first, first, second | {"batch_size": 4, "group": "g"}]) == []


def test_the_rate_is_eta_where_there_is_one():
    assert rate_of({"effective_lr": 0.0, "learning_rate": 0.1}) == 0.0
    assert rate_of({"effective_lr": None, "learning_rate": 0.1}) == 0.1
    assert rate_of({}) is None

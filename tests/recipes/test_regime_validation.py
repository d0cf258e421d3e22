import json
import logging

import pytest
import torch
from in_process import PoolInThisProcess
from recipe_tools import load_recipe
from tiny_models import TokenRows, tiny_classifier
from torch.utils.data import default_collate

from hf_momentum.diagnostics.regime import CURVATURE, EFFECT_FLOOR, NOISE, UNDECIDED
from hf_momentum.errors import UserError
from hf_momentum.results.record import read_records


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("regime_validation")


@pytest.fixture
def data_dir(tmp_path):
    (tmp_path / "data" / "fewshot").mkdir(parents=True)
    (tmp_path / "data" / "cifar10").mkdir()
    return tmp_path / "data"


@pytest.fixture
def pool(recipe, monkeypatch):
    """The tasks replaced by a tiny one, and runs trained in this process."""
    rows, pool, threads = TokenRows(), PoolInThisProcess(), torch.get_num_threads()
    work = recipe.Workload(rows, rows, default_collate, tiny_classifier, 2)
    monkeypatch.setattr(recipe, "load_workload", lambda task, data_dir: work)
    monkeypatch.setattr(recipe, "sizes", lambda task: {"batch_sizes": (2, 8), "steps": 10, "micro_batch": 4})
    monkeypatch.setattr("hf_momentum.results.jobs.ProcessPoolExecutor", pool)
    yield pool
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)  # a run of its own process is silent


def run(optim, seed, loss, regime=None, lr=1.0):
    cell = {"task": "trec", "lr": lr, "batch_size": 4}
    return {"cell": cell, "optim": optim, "seed": seed, "loss": loss, "chance": 1.0, "regime": regime}


def regime(score, verdict=CURVATURE, **changes):
    names = ("log_ratio", "score", "h", "limit_fraction", "noise", "curvature", "difference")
    return {"verdict": verdict, **{name: {"value": score, "low": score, "high": score} for name in names}} | changes


def cell_of(recipe, sgd, sgdm, found=None, lr=1.0):
    runs = [run("sgd", seed, loss, lr=lr) for seed, loss in enumerate(sgd)]
    runs += [run("sgdm", seed, loss, None if seed else found or regime(1.0), lr) for seed, loss in enumerate(sgdm)]
    (cell,) = recipe.compare(runs)
    return cell


def test_a_difference_must_exceed_the_floor_and_its_interval(recipe):
    e = 2.718281828459045
    found = cell_of(recipe, [e**1.0, e**1.1, e**1.2], [1.0, 1.0, 1.0])
    assert found["measured"] == pytest.approx(1.1)
    assert found["high"] - found["measured"] == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)  # t(.975, 2)
    assert found["differ"]
    assert not cell_of(recipe, [e**0.04, e**0.05, e**0.06], [1.0, 1.0, 1.0])["differ"]  # clear, but small
    assert not cell_of(recipe, [e**1.0, e**-1.0, e**2.0], [1.0, 1.0, 1.0])["differ"]  # large, but noise
    assert EFFECT_FLOOR == 0.1


def test_a_lost_run_counts_as_a_multiple_of_chance_and_two_lost_ones_do_not_differ(recipe):
    lost = cell_of(recipe, [None, 3e9, None], [0.9, 1.0, 1.1])
    assert lost["differ"] and lost["measured"] == pytest.approx(2.3059, abs=1e-3)  # log 10, less mean log .9 1. 1.1
    both = cell_of(recipe, [None, None, None], [1e8, None, None])
    assert (both["measured"], both["low"], both["high"], both["differ"]) == (0, 0, 0, False)


def test_predictors_rank_every_cell(recipe):
    flat = cell_of(recipe, [1, 1.01, 0.99], [1, 1, 1], regime(0.5, NOISE, curvature={"value": -1.0}))
    scores = recipe.predictors(flat)
    assert scores[recipe.PREDICTED] == 0.5 and scores["learning rate η"] == 1.0
    assert scores["B_noise/B, inverted"] == -1e12  # no curvature-induced term: noise dominates entirely
    assert recipe.predictors(cell_of(recipe, [1, 2, 3], [1, 1, 1]))["B_noise/B, inverted"] == -1.0


def test_sheets_count_verdicts_and_name_the_failures(recipe):
    apart, alike = ([5.0, 5.1, 5.2], [1.0, 1.0, 1.0]), ([1.0, 1.01, 0.99], [1.0, 1.0, 1.0])
    cells = [
        cell_of(recipe, *apart, regime(2.0, CURVATURE), 3.0),
        cell_of(recipe, *apart, regime(1.5, NOISE), 1.0),
        cell_of(recipe, *alike, regime(0.3, UNDECIDED), 0.3),
        cell_of(recipe, *alike, regime(1.8, CURVATURE), 0.1),
    ]
    verdicts = {row[0]: row[1:] for row in recipe.verdict_sheet(cells).rows}
    assert verdicts == {NOISE: ("1", "0"), UNDECIDED: ("0", "1"), CURVATURE: ("1", "1")}
    assert [row[1] for row in recipe.failures_sheet(cells).rows] == ["1", "0.1"]
    ranking = {row[0]: row[1] for row in recipe.ranking_sheet(recipe.areas_under_curves(cells), cells).rows}
    assert ranking["predicted difference"].startswith("0.750")  # one of the four pairs is the wrong way round
    assert ranking["learning rate η"].startswith("1.000")


def test_it_runs_predicts_compares_and_resumes(recipe, pool, data_dir, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--data_dir", str(data_dir), "--output_dir", str(out), "--tasks", "sst-2", "--workers", "2"]
    command += ["--seeds", "1", "2", "--learning_rates", "0.01", "1000"]
    with pytest.raises(UserError, match="differ in 0 of 4 cells"):
        recipe.main([*command[:-1], "0.02"])
    records = read_records(out / "results.jsonl").records
    assert len(records) == 16 and sum(record["regime"] is not None for record in records) == 4
    for record in records:
        assert record["loss"] < 5 and record["chance"] == pytest.approx(0.6931, abs=1e-4)
        if record["regime"]:
            assert record["optim"] == "sgdm" and record["seed"] == 1
            assert record["regime"]["verdict"] == NOISE
    for record in records:  # make two of the cells differ
        if record["cell"]["lr"] == 0.02 and record["optim"] == "sgd":
            record["loss"] = 9.0 + record["seed"]
    (out / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe.main([*command[:-1], "0.02"])
    assert len(pool.submitted) == 16
    files = {path.name for path in out.iterdir()}
    assert files == {"results.jsonl", "validation.png", "validation.svg", "validation.jsonl", "validation.md"}
    assert "Where the verdict fails" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert sorted(row["differ"] for row in rows) == [False, False, True, True]


def test_the_same_seed_gives_the_same_run(recipe, pool, data_dir):
    job = {"task": "trec", "lr": 0.1, "batch_size": 8, "optim": "sgdm", "seed": 3, "data_dir": data_dir}
    measured, plain = (recipe.train(**job, measured=measured) for measured in (True, False))
    assert measured["loss"] == plain["loss"]
    assert measured["regime"]["verdict"] and plain["regime"] is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "sst2"], "Unknown task: 'sst2'. Allowed: sst-2"),
        (["--seeds", "1", "1"], "two different ones"),
        (["--learning_rates", "0"], "above 0"),
        (["--workers", "0"], "at least 1"),
    ],
)
def test_mistakes_are_told(recipe, data_dir, argv, message):
    with pytest.raises(UserError, match=message):
        recipe.parse(["--data_dir", str(data_dir), *argv])


def test_missing_data_is_told(recipe, tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        recipe.parse(["--data_dir", str(tmp_path)])

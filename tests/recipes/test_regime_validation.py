import json
import logging

import pytest
import torch
from in_process import PoolInThisProcess
from recipe_tools import load_recipe
from tiny_models import TokenRows, tiny_classifier
from torch.utils.data import default_collate
from transformers import TrainerCallback

from hf_momentum.diagnostics.regime import CURVATURE, NOISE, UNDECIDED
from hf_momentum.diagnostics.validation import PREDICTED, areas_under_curves
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


def cell(verdict, differ, lr=1.0, score=1.0):
    """What the sheets read."""
    names = ("log_ratio", "limit_fraction")
    found = {"task": "trec", "lr": lr, "batch_size": 4, "verdict": verdict, "differ": differ}
    found |= {"measured": 0.5, "low": 0.4, "high": 0.6, "predictors": {PREDICTED: score, "learning rate η": lr}}
    return found | {name: {"value": score} for name in names}


def test_sheets_count_verdicts_and_name_the_failures(recipe):
    cells = [
        cell(CURVATURE, True, 3.0, 2.0),
        cell(NOISE, True, 1.0, 1.5),
        cell(UNDECIDED, False, 0.3, 0.3),
        cell(CURVATURE, False, 0.1, 1.8),
    ]
    verdicts = {row[0]: row[1:] for row in recipe.verdict_sheet(cells).rows}
    assert verdicts == {NOISE: ("1", "0"), UNDECIDED: ("0", "1"), CURVATURE: ("1", "1")}
    assert [row[1] for row in recipe.failures_sheet(cells).rows] == ["1", "0.1"]
    ranking = {row[0]: row[1] for row in recipe.ranking_sheet(areas_under_curves(cells), cells).rows}
    assert ranking[PREDICTED].startswith("0.750")  # one of the four pairs is the wrong way round
    assert ranking["learning rate η"].startswith("1.000")


def test_it_runs_predicts_compares_and_resumes(recipe, pool, data_dir, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--data_dir", str(data_dir), "--output_dir", str(out), "--tasks", "sst-2", "--workers", "2"]
    command += ["--seeds", "1", "2", "--learning_rates", "0.01", "1000"]
    with pytest.raises(UserError, match="differ in 0 of 4 cells"):
        recipe.main([*command[:-1], "0.02"])
    records = read_records(out / "results.jsonl").records
    runs, measured = ([record for record in records if key in record] for key in ("loss", "measured"))
    assert len(records) == 20 and len(runs) == 16
    for record in runs:
        assert record["loss"] < 5 and record["chance"] == pytest.approx(0.6931, abs=1e-4)
    for record in measured:
        assert record["optim"] == "sgdm" and record["seed"] == 1
        assert record["setting"]["steps"] == 9  # of 10
    for record in runs:  # make two of the cells differ
        if record["cell"]["lr"] == 0.02 and record["optim"] == "sgd":
            record["loss"] = 9.0 + record["seed"]
    (out / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe.main([*command[:-1], "0.02"])
    assert len(pool.submitted) == 20
    files = {path.name for path in out.iterdir()}
    assert files == {"results.jsonl", "validation.png", "validation.svg", "validation.jsonl", "validation.md"}
    assert "Where the verdict fails" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert sorted(row["differ"] for row in rows) == [False, False, True, True]
    assert {row["verdict"] for row in rows} == {NOISE}


def test_a_measurement_is_of_the_run_that_goes_on(recipe, pool, data_dir):
    job = {"task": "trec", "lr": 0.1, "batch_size": 8, "optim": "sgdm", "seed": 3, "data_dir": data_dir}
    first, again = (recipe.run(**job, measured=True) for _ in range(2))
    assert first == again and "measured" in first and "loss" not in first
    weights = {}

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.setdefault(state.global_step, []).append(model.state_dict()["classifier.out_proj.weight"].clone())

    work = recipe.load_workload("trec", data_dir)
    whole = [Remember()]
    measuring = [recipe.measuring(work, recipe.sizes("trec"), 3), Remember()]
    for callbacks in (whole, measuring):
        recipe.make_trainer(work, 0.1, 8, "sgdm", 3, data_dir, 10, callbacks).train()
    assert [len(seen) for seen in weights.values()] == [2] + 9 * [1]  # stopped where it was measured
    assert torch.equal(*weights[1])


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

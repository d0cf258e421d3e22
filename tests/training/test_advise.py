"""`hf-momentum advise`: what it trains and measures, what it writes, and what it refuses."""

import json

import pytest
from rich.console import Console
from tiny_models import save_tiny_roberta
from typer.testing import CliRunner

from hf_momentum.cli import app, main
from hf_momentum.diagnostics import measure
from hf_momentum.diagnostics.measure import Budget
from hf_momentum.errors import UserError
from hf_momentum.training import advise
from hf_momentum.training.advise import AdviseArguments, build_trainer
from hf_momentum.training.callbacks import RegimeCallback

LAST = ("--learning_rate", "0.1", "--per_device_train_batch_size", "4")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_roberta(tmp_path_factory.mktemp("tiny-roberta"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    (folder / "sst-2").mkdir()
    for split in ("train", "test"):
        rows = [{"sentence1": f"a {split} film number {i} .", "label": str(i % 2)} for i in range(24)]
        (folder / "sst-2" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(autouse=True)
def small_budget(monkeypatch):
    monkeypatch.setitem(measure.BUDGETS, "full", Budget(search=1, products=3, blocks=2, modes=1))


def command(model, data, output, *more) -> list[str]:
    named = ("--model", model, "--task", "sst-2", "--data_dir", data, "--k", "4", "--output", str(output))
    return ["advise", *named, *LAST, *more]


def test_it_prints_and_writes_what_it_found(model, data, tmp_path):
    result = CliRunner().invoke(app, command(model, data, tmp_path / "out", "--max_steps", "20"))
    assert result.exception is None, result.output
    (line,) = (tmp_path / "out" / "advice.jsonl").read_text().splitlines()
    record = json.loads(line)
    printed = " ".join(result.stdout.split())
    assert record["sentences"][0] in printed
    assert f"{record['h']['value']:.3g}" in printed
    assert "Linear decay has brought the learning rate from 0.1 to 0.09 by then." in printed
    assert "2 steps of SGD, then a measurement on 7 batches of 4 (full)" in printed
    assert (record["stage"], record["task"], record["tuning"]) == ("advice", "sst-2", "prompt")
    assert (record["warm_steps"], record["max_steps"], record["steps_left"]) == (2, 20, 18)
    assert record["verdict"] in ("noise dominates", "curvature dominates", "undecided")
    assert record["limit_fraction"]["low"] <= record["limit_fraction"]["value"] <= record["limit_fraction"]["high"]
    # η is that of the steps to come: linear decay has passed two of twenty.
    sharpness = max(mode["curvature"]["value"] for mode in record["measured"]["modes"])
    assert record["h"]["value"] == pytest.approx(0.09 * sharpness)
    (picture,) = (tmp_path / "out").glob("*.png")
    assert picture.name.endswith("_sst-2_lr0.1_batch4.png")
    assert str(picture) in result.stdout.replace("\n", "")


def test_the_run_is_plain_sgd_that_stops_after_the_measurement(model, data, tmp_path):
    asked = AdviseArguments(
        model=model, task="sst-2", data_dir=data, k=4, learning_rate=0.1, per_device_train_batch_size=4,
        max_steps=30, warm_steps=5, momentum=0.8, output=tmp_path,
    )  # fmt: skip
    trainer, source = build_trainer(asked)
    trainer.train()
    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, RegimeCallback))
    assert list(callback.reports) == [5]
    assert trainer.state.global_step == 5
    assert trainer.optimizer.param_groups[0]["momentum"] == 0
    assert callback.report.setting.momentum == 0.8
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert callback.report.setting.momentum_bytes == 4 * trainable
    assert source


def test_what_could_not_be_measured_is_an_error(model, data, tmp_path, monkeypatch):
    def impossible(*given, **named):
        raise UserError("The loss is nan, at which nothing can be measured.")

    monkeypatch.setattr("hf_momentum.training.callbacks.regime.measure", impossible)
    asked = AdviseArguments(
        model=model, task="sst-2", data_dir=data, k=4, learning_rate=0.1, max_steps=4, output=tmp_path / "out"
    )
    with pytest.raises(UserError, match="The loss is nan"):
        advise.advise(asked, Console(quiet=True))
    assert not (tmp_path / "out" / "advice.jsonl").exists()


def test_the_demo_brings_its_own():
    asked = AdviseArguments()
    assert (asked.model, asked.task, asked.tuning) == ("demo", "movie-snippets-2", "prompt")
    assert (asked.learning_rate, asked.max_steps, asked.warm_steps) == (0.1, 100, 10)
    assert asked.budget == "economy"
    asked = AdviseArguments(model="x/y", task="sst-2", learning_rate=0.01)
    assert (asked.tuning, asked.max_steps, asked.warm_steps) == ("prompt", 1000, 100)
    assert asked.budget == "full"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "demo"}, "Name both --model"),
        ({"model": "x/y", "task": "sst-2"}, "Give --learning_rate"),
        ({"learning_rate": 0.0}, "--learning_rate must be above 0"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"momentum": 0.0}, "--momentum must be above 0"),
        ({"momentum": 1.0}, "momentum"),
        ({"budget": "lavish"}, "Unknown budget"),
        ({"tuning": "head"}, "Allowed: prompt, classifier"),
        ({"warm_steps": 0}, "must lie between 1 and --max_steps 100 - 1"),
        ({"warm_steps": 100}, "must lie between"),
        ({"per_device_train_batch_size": 0}, "at least 1, not 0"),
        ({"k": 0}, "--k must be at least 1"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        _ = AdviseArguments(**given).few


def test_a_mistake_ends_with_a_message_and_no_traceback(capsys, monkeypatch, data, tmp_path):
    monkeypatch.setattr("sys.argv", ["hf-momentum", *command(str(tmp_path / "none"), data, tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: Cannot load --model")

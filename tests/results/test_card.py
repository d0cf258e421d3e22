"""Model cards as whole files.

The expected files are in `expected_cards/`. After a change that is meant, write them anew and read the difference:
`HF_MOMENTUM_WRITE_EXPECTED=1 pytest tests/results/test_card.py`, then `git diff tests/results/expected_cards`.
"""

import json
import os
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from typer.testing import CliRunner

from hf_momentum.cli import app
from hf_momentum.errors import UserError
from hf_momentum.results.card import results_card, write_card

EXPECTED = Path(__file__).parent / "expected_cards"
HUB = {"source": "hub", "id": "SetFit/sst2", "config": None, "split": "validation", "test_examples": 872}
MNLI = {"source": "hub", "id": "nyu-mll/glue", "config": "mnli", "split": "validation_matched"}
PACKAGES = {"hf_momentum": "0.1.0", "torch": "2.14.1", "transformers": "5.23.0", "accelerate": None}
H200 = {"devices": ["NVIDIA H200", "NVIDIA H200"], "cpu": "AMD EPYC 9654", "cores": 16}


def run(optim: str, seed: int, test: float, **changes) -> dict:
    """A tested record as the few-shot recipe writes it."""
    record = {
        "format": 1,
        "stage": "test",
        "run_id": f"{optim}-{seed}-{changes.get('task', 'sst-2')}",
        "task": "sst-2",
        "model": "FacebookAI/roberta-large",
        "base_model": "FacebookAI/roberta-large",
        "tuning": "prompt",
        "k": 512,
        "seed": seed,
        "optim": optim,
        "learning_rate": 0.01,
        "effective_lr": 0.01,
        "lr_form": "effective",
        "momentum": {"sgd": 0.0, "sgdm": 0.9}.get(optim),
        "batch_size": 8,
        "steps": 512,
        "dev_accuracy": test + 0.01,
        "test_accuracy": test,
        "optimizer_state_bytes": {"sgd": 0}.get(optim, 2**30),
        "lr_schedule": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "processes": 2,
        "packages": PACKAGES,
        "hardware": H200,
        "command": "accelerate launch recipes/roberta_fewshot.py --task sst-2 --optim sgd sgdm",
        "data": HUB,
        "group": optim,
        "grid_size": 3,
    }
    return record | changes


def comparison() -> list[dict]:
    """Two optimizers on the Hub's data, one with γ as its rate, a verdict on the regime, and what is not tested."""
    records = []
    for optim, accuracies in {"sgd": (0.936, 0.941, 0.938), "sgdm": (0.939, 0.9435, 0.937)}.items():
        records += [run(optim, seed, value) for seed, value in zip((13, 21, 42), accuracies, strict=True)]
    for record in records:
        record["regime"] = "noise-dominated at batch 8: momentum is of marginal value"
        if record["optim"] == "sgdm":
            record |= {"lr_form": "heavy_ball", "learning_rate": 0.001, "packages": PACKAGES | {"torch": "2.14.0"}}
    zero_shot = dict.fromkeys(records[0]) | {"format": 1, "stage": "test", "run_id": "zero", "optim": "zero-shot"}
    zero_shot |= {key: records[0][key] for key in ("task", "model", "tuning", "k", "packages")}
    zero_shot |= {"test_accuracy": 0.794, "steps": 0}
    return [run("sgd", 13, 0.9) | {"stage": "dev", "test_accuracy": None, "run_id": "a"}, zero_shot, *records]


def bare() -> list[dict]:
    """Little more than what a table needs, as another recipe or an older version may have written it."""
    shared = {"format": 1, "stage": "test", "task": "my|task", "model": "out/local", "tuning": "classifier", "k": None}
    return [shared | {"run_id": "a", "seed": 0, "optim": "adamw_torch", "learning_rate": 2e-5, "test_accuracy": 0.5}]


def several() -> list[dict]:
    """A stand-in, a local folder and a configuration of a data set, with SVAG on SGDM and a scheduled momentum."""
    demo = {"task": "movie-snippets-2", "model": "demo", "base_model": None, "tuning": "classifier", "k": 16}
    demo |= {"data": {"source": "demo", "test_examples": 500}, "hardware": {"devices": [], "cpu": "CPU", "cores": 2}}
    svag = {"ell": 4.0, "momentum": 0.9, "max_grad_norm": 0.0, "lr_schedule": "constant"}
    scheduled = {"momentum": None, "momentum_schedule": "linear"}
    scheduled |= {"arguments": {"momentum_schedule_kwargs": {"start": 0.5, "end": 0.9}}, "weight_decay": 0.01}
    folder = {"task": "sst-5", "data": {"source": "folder", "test_examples": 1000}, "base_model": None}
    return [
        *(run("svag", seed, 0.6 + seed / 1000, **demo, **svag, processes=1) for seed in (13, 21)),
        run("sgdm", 13, 0.45, **folder, **scheduled),
        run("sgd", 13, 0.7, task="mnli", data=MNLI, peft="lora"),
    ]


def cards() -> dict:
    alone = [run("sgdm", seed, value) for seed, value in ((13, 0.93), (21, 0.94))]
    alone = [record | {"task": "mnli", "data": MNLI} for record in alone]
    return {
        "comparison": results_card(comparison(), "roberta-large-sst-2", EXPECTED / "comparison" / "figure.png"),
        "bare": results_card(bare(), "bare"),
        "several": results_card(several(), "several"),
        "model": results_card(alone, "model", model=alone[1]),
    }


NAMES = ("comparison", "bare", "several", "model")


def files(folder: Path) -> dict[str, str]:
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"]
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in found}


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_card(name, tmp_path):
    write_card(cards()[name], tmp_path)
    if os.environ.get("HF_MOMENTUM_WRITE_EXPECTED"):
        write_card(cards()[name], EXPECTED / name)
    assert files(tmp_path) == files(EXPECTED / name)


@pytest.mark.parametrize("name", NAMES)
def test_the_hubs_own_classes_read_it_back(name, tmp_path):
    card = cards()[name]
    loaded = ModelCard.load(write_card(card, tmp_path))
    assert loaded.data.to_dict() == card.content.data.to_dict()
    # In the order of the model-index, which puts results on one data set together.
    key = lambda result: (result.dataset_type, result.metric_name)  # noqa: E731
    assert sorted(loaded.data.eval_results, key=key) == sorted(card.content.data.eval_results, key=key)
    for result in loaded.data.eval_results:
        assert (result.task_type, result.metric_type) == ("text-classification", "accuracy")
        assert 0 <= result.metric_value <= 1
    file = tmp_path / ".eval_results" / "hf_momentum.yaml"
    assert file.exists() == bool(card.entries)
    if card.entries:
        assert parse_eval_result_entries(yaml.safe_load(file.read_text(encoding="utf-8"))) == card.entries


def test_values_are_those_of_the_records(tmp_path):
    data = ModelCard.load(write_card(cards()["comparison"], tmp_path)).data
    assert [result.metric_value for result in data.eval_results] == [0.9383, 0.9398]
    assert {result.dataset_type for result in data.eval_results} == {"SetFit/sst2"}
    assert (data.base_model, data.datasets) == ("FacebookAI/roberta-large", ["SetFit/sst2"])
    assert cards()["comparison"].entries == []  # whose weights would these be?


def test_the_weights_own_value_comes_first_and_alone_stands_for_the_hub():
    card = cards()["model"]
    values = [(result.metric_value, "this model" in result.metric_name) for result in card.content.data.eval_results]
    assert values == [(0.94, True), (0.935, False)]
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in card.entries] == [
        ("nyu-mll/glue", "mnli", 0.94)
    ]


def test_a_data_set_whose_task_is_not_named_gets_no_entry():
    record = run("sgd", 13, 0.9)
    assert results_card([record], "x", model=record).entries == []
    assert results_card([record], "x").content.data.datasets == ["SetFit/sst2"]


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (3, ("the best dev accuracy is picked, and tested once", "One run per seed, picked on dev")),
        (1, ("Every run is tested.", "Every run")),
        (None, ("as many for choosing.", "One run per seed")),
    ],
)
def test_a_pick_is_claimed_only_where_there_was_a_choice(size, said):
    text = results_card([run("sgd", seed, 0.9, grid_size=size) for seed in (13, 21)], "x").content.text
    summary, title = said
    assert f"{summary}\n" in text.replace("once.", "once")
    assert f"**{title}**" in text


def test_many_commands_are_cut_short_and_a_sweep_states_its_own():
    trials = [run("sgd", seed, 0.9, command=f"python recipe.py --seeds={seed}") for seed in range(7)]
    text = results_card(trials, "x").content.text
    assert text.count("python recipe.py") == 5
    assert text.endswith("```\n\nand 2 more of the same kind.\n")
    text = results_card([trial | {"sweep_command": "python sweep.py grid.yaml"} for trial in trials], "x").content.text
    assert text.endswith("## Command\n\n```bash\npython sweep.py grid.yaml\n```\n")


@pytest.mark.parametrize("data", [{"source": "folder"}, {"source": "demo"}, None])
def test_data_that_did_not_come_from_the_hub_claim_no_data_set_of_it(data):
    card = results_card([run("sgd", 13, 0.9, data=data)], "x")
    (result,) = card.content.data.eval_results
    assert ":" in result.dataset_type  # which no id on the Hub holds
    assert card.content.data.datasets is None
    assert card.entries == []
    assert "datasets/" not in str(card.content)


def test_what_an_earlier_card_left_is_removed(tmp_path):
    write_card(cards()["model"], tmp_path)
    write_card(cards()["bare"], tmp_path)
    assert not (tmp_path / ".eval_results" / "hf_momentum.yaml").exists()


def test_the_figure_lies_beside_the_card(tmp_path):
    write_card(cards()["comparison"], tmp_path)
    figure = EXPECTED / "comparison" / "figure.png"
    assert (tmp_path / "figure.png").read_bytes() == figure.read_bytes()


def test_a_readme_that_is_no_card_is_not_overwritten(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(UserError, match="is no model card and would be overwritten"):
        write_card(cards()["bare"], tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_the_command_line_makes_one_from_results_alone(tmp_path):
    file, out = tmp_path / "roberta-large-sst-2" / "results.jsonl", tmp_path / "card"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(record) + "\n" for record in comparison()) + '{"broken\n')
    figure = EXPECTED / "comparison" / "figure.png"
    done = CliRunner().invoke(app, ["card", str(file), "--output", str(out), "--figure", str(figure)])
    assert done.exit_code == 0, done.output
    assert "results.jsonl:9" in done.output
    assert files(out) == files(EXPECTED / "comparison")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.jsonl"], "No such file"),
        (["empty.jsonl"], "No tested run"),
        (["good.jsonl", "--figure", "none.png"], "No such figure"),
        (["good.jsonl", "--output", "good.jsonl/x"], "Cannot write the card"),
    ],
)
def test_mistakes_are_named(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("good.jsonl").write_text(json.dumps(run("sgd", 13, 0.9)) + "\n")
    error = CliRunner().invoke(app, ["card", *words]).exception
    assert isinstance(error, UserError)
    assert message in str(error)

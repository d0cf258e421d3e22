import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from recipe_tools import command_words, load_recipe
from safetensors.torch import load_file
from tiny_models import save_tiny_roberta
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_momentum.errors import UserError
from hf_momentum.tasks.prompts import get_task
from hf_momentum.training import FewShotArguments
from hf_momentum.training.fewshot_model import build_model

RECIPE = Path(__file__).parents[2] / "recipes" / "roberta_fewshot.py"
VOLATILE = ("train_seconds", "dev_seconds", "eval_seconds", "peak_memory_bytes", "command")


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("roberta_fewshot")


@pytest.fixture(scope="module")
def main(recipe):
    return recipe.main


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_roberta(tmp_path_factory.mktemp("tiny-roberta"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, rows in (("train", 12), ("test", 6)):
        for task in ("sst-2", "snli"):
            write_task(folder / task / f"{split}.jsonl", task, split, rows)
    return folder


def write_task(file: Path, task: str, split: str, rows: int) -> None:
    file.parent.mkdir(exist_ok=True)
    labels = {"sst-2": ["0", "1"], "snli": ["entailment", "neutral", "contradiction"]}[task]
    lines = []
    for index in range(rows):
        line = {"sentence1": f"a {split} film number {index} .", "label": labels[index % len(labels)]}
        lines.append(line | ({"sentence2": f"It has a number {index}"} if task == "snli" else {}))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def command(model, data, tmp_path):
    """The recipe's command line on the tiny model; `changes` overrides options, None leaves one out."""

    def build(**changes) -> list[str]:
        options = {
            "model": model,
            "task": "sst-2",
            "data_dir": data,
            "k": 2,
            "seeds": "13",
            "optim": "sgdm",
            "learning_rate": 0.1,
            "max_steps": 4,
            "output_dir": tmp_path / "out",
            "use_cpu": "True",
        }
        return command_words(options | changes)

    return build


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in lines]


def grid(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    return file


def test_the_whole_protocol_and_its_resumption(main, command, tmp_path, capsys):
    file = grid(tmp_path, "learning_rate: [0.01, 1.0]\nper_device_train_batch_size: [2]\n")
    argv = command(grid=file, learning_rate=None, optim="sgd sgdm", seeds="13 21")
    main(argv)
    output = capsys.readouterr().out
    lines = records(tmp_path / "out")
    assert [line["stage"] for line in lines].count("dev") == 8
    tested = [line for line in lines if line["stage"] == "test"]
    assert [(t["optim"], t["seed"]) for t in tested] == [
        ("zero-shot", None), ("sgd", 13), ("sgdm", 13), ("sgd", 21), ("sgdm", 21)
    ]  # fmt: skip
    for pick in tested[1:]:
        cells = [x for x in lines if x["stage"] == "dev" and (x["optim"], x["seed"]) == (pick["optim"], pick["seed"])]
        assert pick["dev_accuracy"] == max(cell["dev_accuracy"] for cell in cells)
        assert all(cell["test_accuracy"] is None for cell in cells)
        assert pick["steps"] == 4
        assert pick["optimizer_state_bytes"] == (0 if pick["optim"] == "sgd" else cells[0]["optimizer_state_bytes"])
    assert {line["optimizer_state_bytes"] > 0 for line in lines if line["optim"] == "sgdm"} == {True}
    assert "sgdm β=0.9 − sgd" in output
    assert "2 seeds" in output
    assert list((tmp_path / "out" / "picks").iterdir()) == []

    written = (tmp_path / "out" / "results.jsonl").read_bytes()
    main(argv)
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == written
    again = capsys.readouterr().out
    assert again[again.index("Test accuracy") :] == output[output.index("Test accuracy") :]


@pytest.mark.parametrize(
    ("seeds", "changes"), [((13, 21), {"tuning": "prompt"}), ((13,), {"tuning": "classifier", "peft": "lora"})]
)
def test_a_grid_in_one_process_gives_the_records_of_single_commands(main, command, tmp_path, seeds, changes):
    file = grid(tmp_path, "learning_rate: [0.3, 0.1]\n")
    main(
        command(
            output_dir=tmp_path / "grid", grid=file, learning_rate=None, seeds=" ".join(map(str, seeds)), **changes
        )
    )
    together = {line["run_id"]: line for line in records(tmp_path / "grid") if line["stage"] == "dev"}
    for seed in seeds:
        for rate in (0.3, 0.1):
            main(command(output_dir=tmp_path / "single", learning_rate=rate, seeds=seed, **changes))
    alone = {line["run_id"]: line for line in records(tmp_path / "single") if line["optim"] == "sgdm"}
    assert len(together) == 2 * len(seeds)
    for name, line in together.items():
        fields = ("dev_accuracy", "train_loss", "curve", "steps", "optimizer_state_bytes")
        assert [line[field] for field in fields] == [alone[name][field] for field in fields]


def test_killed_and_started_again_it_ends_with_the_same_records(main, command, tmp_path):
    file = grid(tmp_path, "learning_rate: [0.3, 0.1, 0.01]\n")
    changes = {"grid": file, "learning_rate": None, "max_steps": 30}
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    main(command(output_dir=whole, **changes))
    argv = command(output_dir=torn, **changes)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(RECIPE), *argv], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (torn / "results.jsonl").exists() and '"dev"' in (torn / "results.jsonl").read_text():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    finished = len(records(torn))
    assert finished < len(records(whole))
    main(argv)
    assert records(torn) == records(whole)


def test_svag_beside_sgd_stretches_the_steps_and_clips_nothing(main, command, tmp_path, capsys):
    main(command(optim="sgd svag", ell="2", zero_shot="False"))
    sgd, svag = records(tmp_path / "out")
    assert (sgd["steps"], svag["steps"]) == (4, 8)
    assert (sgd["batch_size"], svag["batch_size"]) == (8, 8)
    assert (svag["ell"], svag["momentum"], svag["effective_lr"]) == (2.0, 0.0, 0.1)
    assert (sgd["max_grad_norm"], svag["max_grad_norm"]) == (0.0, 0.0)
    assert "Beside svag no gradient is clipped" in capsys.readouterr().out


def test_single_runs_are_one_line_each_and_settings_show(main, command, tmp_path):
    main(command(optim="sgd adamw_torch_fused", seeds="13", tuning="classifier", learning_rate=0.02))
    sgd, adam = records(tmp_path / "out")
    assert (sgd["optim"], sgd["effective_lr"], sgd["lr_form"], sgd["momentum"]) == ("sgd", 0.02, "effective", 0.0)
    assert (adam["optim"], adam["learning_rate"], adam["effective_lr"]) == ("adamw_torch_fused", 0.02, None)
    for record in (sgd, adam):
        assert record["stage"] == "test"
        assert 0 <= record["test_accuracy"] <= 1
        assert record["batch_size"] == 8
        assert record["packages"]["torch"]


@pytest.mark.parametrize("tuning", ["prompt", "classifier"])
def test_lora_trains_the_adapters_alone(main, command, tmp_path, tuning):
    main(command(peft="lora", tuning=tuning, task="snli", optim="sgdm", zero_shot="False"))
    (record,) = records(tmp_path / "out")
    assert record["peft"] == "lora"
    main(command(tuning=tuning, task="snli", optim="sgdm", zero_shot="False"))
    assert record["optimizer_state_bytes"] < records(tmp_path / "out")[1]["optimizer_state_bytes"] / 2


def test_a_users_own_task_and_config_file(main, command, tmp_path, data):
    task = tmp_path / "mine.yaml"
    task.write_text('name: sst-2\ntemplate: "Verdict: <mask>. {sentence1}"\nlabel_words: {"0": bad, "1": good}\n')
    config = tmp_path / "config.yaml"
    config.write_text("optim: [sgd]\nlearning_rate: 1e-1\nmax_steps: 2\n")
    main(command(task=task, config=config, learning_rate=None, optim=None, max_steps=3))
    zero_shot, record = records(tmp_path / "out")
    assert zero_shot["optim"] == "zero-shot"
    assert (record["optim"], record["learning_rate"], record["steps"]) == ("sgd", 0.1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sst2"}, "Unknown task 'sst2'.*did you mean 'sst-2'"),
        ({"optim": "sgdn"}, "Unknown optimizer: 'sgdn'. Ours: sgd, sgdm, svag"),
        ({"optim": "svag", "ell": "0.5"}, "(?i)invalid ell"),
        ({"learning_rate": "-1"}, "Invalid learning rate: -1"),
        ({"learning_rate": None}, "sgdm needs a learning rate.*recipes/grids/smoke.yaml"),
        ({"momentum": "1.0"}, "Invalid momentum value: 1"),
        ({"k": "0"}, "--k must be at least 1"),
        ({"seed": "13"}, "--seed has no place here: the seeds are those of --seeds"),
        ({"load_best_model_at_end": "True"}, "--load_best_model_at_end has no place here"),
        ({"eval_strategy": "no"}, "the protocol picks on dev"),
        ({"per_device_train_batch_size": "0"}, "per_device_train_batch_size must be at least 1"),
        ({"optim": "sgd svag", "ell": "2", "max_grad_norm": "1.0"}, "max_grad_norm=1 beside svag"),
        ({"output_dir": __file__}, "as --output_dir"),
        ({"model": None}, "Name both --model"),
        ({"model": "no/such-model"}, "Cannot load --model no/such-model"),
        ({"task": None}, "Name both --model"),
        ({"grid": "recipes/grids/smoke.yaml"}, "--learning_rate is given and also listed"),
    ],
)
def test_bad_input_says_what_is_wrong(main, command, changes, message):
    with pytest.raises(UserError, match=message):
        main(command(**changes))


def test_bad_data_says_where(main, command, tmp_path, data):
    with pytest.raises(UserError, match="trec"):
        main(command(task="trec"))
    folder = tmp_path / "bad"
    (folder / "sst-2").mkdir(parents=True)
    write_task(folder / "sst-2" / "train.jsonl", "sst-2", "train", 4)
    (folder / "sst-2" / "test.jsonl").write_text('{"sentence1": "a", "label": "0"}\n{"sentence1": \n')
    with pytest.raises(UserError, match=r"test\.jsonl, line 2: not JSON"):
        main(command(data_dir=folder))
    (folder / "sst-2" / "test.jsonl").write_text("")
    with pytest.raises(UserError, match=r"test\.jsonl.*(empty|no example)"):
        main(command(data_dir=folder))


def test_a_label_word_of_two_tokens_is_refused_before_any_run(main, command, tmp_path):
    task = tmp_path / "mine.yaml"
    task.write_text('name: sst-2\ntemplate: "{sentence1} <mask>"\nlabel_words: {"0": excruciatingly, "1": good}\n')
    with pytest.raises(UserError, match="'excruciatingly' of task 'sst-2' is not one token"):
        main(command(task=task))
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_an_unknown_option_ends_the_command(main, command):
    with pytest.raises(UserError, match=r"Unknown argument '--learning_rte' .did you mean --learning_rate"):
        main([*command(), "--learning_rte", "0.1"])


def test_the_command_line_shows_a_message_without_traceback(command):
    result = subprocess.run([sys.executable, str(RECIPE), *command(k=0)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: --k must be at least 1, not 0."
    assert "Traceback" not in result.stderr


def test_ctrl_c_says_how_to_go_on(command):
    process = subprocess.Popen(
        [sys.executable, str(RECIPE), *command(max_steps=100000)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("sst-2: "):
            break
    errors = None
    while errors is None:  # an interrupt that falls into a library's callback is swallowed there: once more, then
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, errors = process.communicate(timeout=15)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "Stopped. The same command goes on where this one ended."
    assert "Traceback" not in errors


def test_another_prompt_is_another_run(main, command, tmp_path):
    task = tmp_path / "mine.yaml"
    for word in ("bad", "poor"):
        task.write_text(f'name: sst-2\ntemplate: "{{sentence1}} <mask>"\nlabel_words: {{"0": {word}, "1": good}}\n')
        main(command(task=task, zero_shot="False"))
    assert len({record["run_id"] for record in records(tmp_path / "out")}) == 2


def test_two_tasks_of_one_name_are_refused(main, command, tmp_path):
    task = tmp_path / "mine.yaml"
    task.write_text('name: sst-2\ntemplate: "{sentence1} <mask>"\nlabel_words: {"0": bad, "1": good}\n')
    with pytest.raises(UserError, match="Two tasks share a name: sst-2, sst-2"):
        main(command(task=f"sst-2 {task}"))


def test_files_are_checked_like_the_command_line(main, command, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("tuning: clasifier\n")
    with pytest.raises(SystemExit):  # argparse names the choices
        main(command(config=config))
    config.write_text("learnin_rate: 0.1\n")
    with pytest.raises(UserError, match=r"Unknown argument '--learnin_rate=0.1' .did you mean --learning_rate"):
        main(command(config=config))
    config.write_text(f"grid: {grid(tmp_path, 'learning_rate: [0.1]')}\n")
    with pytest.raises(UserError, match="--learning_rate is given and also listed"):
        main(command(config=config))


def test_a_half_precision_checkpoint_is_trained_in_float32(model, tmp_path):
    folder = tmp_path / "bf16"
    AutoModelForMaskedLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(folder)
    for tuning in ("prompt", "classifier"):
        few = FewShotArguments(model=str(folder), tuning=tuning)
        assert build_model(few, get_task("sst-2"), tokenizer, 13).dtype == torch.float32


def test_the_demo_brings_a_rate_for_our_optimizers_only(recipe):
    few, training, grid = recipe.parse(["--optim", "sgd", "adamw_torch"])
    assert (few.model, few.task, few.tuning) == ("demo", ["movie-snippets-2"], "prompt")
    assert grid.learning_rate == {"sgd": [0.1], "adamw_torch": [5e-5]}
    assert training.max_steps == 100
    _, training, grid = recipe.parse(["--lr_form", "heavy_ball", "--num_train_epochs", "2"])
    assert (grid.learning_rate, training.max_steps) == (None, -1)


def test_the_card_is_that_of_the_commands_own_runs(main, command, tmp_path, capsys):
    main(command(optim="adamw_torch", learning_rate=0.001))  # in the same folder, and not in the card
    main([*command(optim="sgd sgdm", seeds="13 21"), "--model_card"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    lines = [
        line for line in records(tmp_path / "out") if line["stage"] == "test" and line["optim"] in ("sgd", "sgdm")
    ]
    means = {
        optim: sum(line["test_accuracy"] for line in lines if line["optim"] == optim) / 2 for optim in ("sgd", "sgdm")
    }
    assert [result.metric_value for result in card.data.eval_results] == [
        pytest.approx(means[optim], abs=1e-4) for optim in ("sgd", "sgdm")
    ]
    assert {result.dataset_type for result in card.data.eval_results} == {"local-folder:sst-2"}
    assert "adamw" not in str(card)
    assert "2 seeds" in str(card)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert f"Model card: {tmp_path / 'out' / 'README.md'}" in capsys.readouterr().out


def test_what_a_record_says_besides_does_not_name_the_run(main, command, tmp_path):
    main(command(seeds="13", max_steps=4, logging_steps=2))
    written = (tmp_path / "out" / "results.jsonl").read_bytes()
    main([*command(seeds="13", max_steps=4, logging_steps=1), "--model_card"])
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == written
    record = json.loads(written.splitlines()[-1])
    assert record["data"] == {"source": "folder", "test_examples": 6}
    assert record["hardware"]["cores"] >= 1
    assert record["base_model"] is None
    assert record["weight_decay"] == 0.0
    assert [point["step"] for point in record["curve"]] == [1, 2, 3, 4]
    assert max(point["dev_accuracy"] for point in record["curve"]) == record["dev_accuracy"]
    assert [point["step"] for point in record["curve"] if "train_loss" in point] == [2, 4]


class Hub:
    """Takes the place of the Hub."""

    def create_repo(self, name, **kwargs):
        self.name = name
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, folder_path, **kwargs):
        folder = Path(folder_path)
        self.files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        self.readme = (folder / "README.md").read_text(encoding="utf-8")
        self.weights = load_file(folder / "model.safetensors")
        return SimpleNamespace(repo_url=f"https://hub/me/{self.name}")


def test_push_takes_the_best_on_dev_over_the_seeds_as_it_was_tested(
    main, recipe, command, tmp_path, monkeypatch, capsys
):
    hub, tested = Hub(), {}
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    test = recipe.TaskRuns.test

    def noted(self, trainer, group):
        tested[trainer.args.seed] = {name: t.clone() for name, t in trainer.model.state_dict().items()}
        return test(self, trainer, group)

    monkeypatch.setattr(recipe.TaskRuns, "test", noted)
    file = grid(tmp_path, "learning_rate: [0.01, 1.0]\n")
    changes = {"grid": file, "learning_rate": None, "seeds": "13 21", "task": "snli", "max_steps": 6}
    argv = [*command(**changes, hub_token="hf_secret"), "--push_to_hub", "--hub_model_id", "me/mine"]
    main(argv)
    picks = [line for line in records(tmp_path / "out") if line["stage"] == "test" and line["seed"]]
    best = max(picks, key=lambda line: line["dev_accuracy"])
    assert hub.name == "me/mine"
    assert f"The weights here are those of seed {best['seed']}" in hub.readme
    assert "\n# mine\n" in hub.readme
    assert "hf_secret" not in hub.readme
    assert {"README.md", "results.jsonl", "model.safetensors", "tokenizer.json"} <= hub.files
    assert not any(name.startswith("picks") for name in hub.files)
    for name, tensor in hub.weights.items():
        torch.testing.assert_close(tensor, tested[best["seed"]][name], rtol=0, atol=0)
    assert "Pushed: https://hub/me/me/mine" in capsys.readouterr().out


def test_a_push_that_cannot_be_made_leaves_card_and_model(main, command, tmp_path, capsys):
    main([*command(), "--push_to_hub"])  # the tests are offline
    output = capsys.readouterr().out
    assert "Not pushed (Cannot reach" in output
    assert f"The model and its finished card are in {tmp_path / 'out'}" in output
    assert "The weights here are those of seed 13" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("changes", [{"optim": "sgd sgdm"}, {"task": "sst-2 snli"}])
def test_a_push_of_several_models_is_refused_before_any_run(main, command, changes, tmp_path):
    with pytest.raises(UserError, match="pushes one model"):
        main([*command(**changes), "--push_to_hub"])
    assert not (tmp_path / "out").exists()

"""The launch configurations of recipes/accelerate, with few processes of a CPU, and the few-shot recipe under them."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from backend_launch import accelerate, finish, free_port, start
from backend_run import full_weights
from stock_trainer import arguments
from tiny_models import TokenRows, save_tiny_roberta, tiny_classifier
from transformers import Trainer

from hf_momentum import trainer_kwargs

CONFIGS = Path("recipes/accelerate")
SCRIPT, RECIPE = "tests/training/backend_launched.py", "recipes/roberta_fewshot.py"
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed; it comes with: pip install 'hf_momentum[deepspeed]'",
)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> torch.Tensor:
    """The weights after what backend_launched.py trains, in one process."""
    args = arguments(tmp_path_factory.mktemp("one"), max_steps=4, lr_scheduler_type="constant")
    model = tiny_classifier()
    kwargs = trainer_kwargs(model, args, optim="sgdm", lr=0.1)
    Trainer(model=model, args=args, train_dataset=TokenRows(), **kwargs).train()
    return full_weights(model).double()


def launched(config: str, output: Path, *words: object) -> dict:
    """What the script says that was started with a configuration."""
    port = ["--main_process_port", free_port()]
    status, printed = accelerate("--config_file", CONFIGS / f"{config}.yaml", *port, *words, SCRIPT, output)
    assert status == 0, printed[-6000:]
    return json.loads(output.read_text())


def check(facts: dict, expected: torch.Tensor, **wanted: object) -> None:
    torch.testing.assert_close(torch.tensor(facts.pop("weights"), dtype=torch.double), expected, atol=1e-6, rtol=0)
    assert facts == {"zero": None} | wanted


def test_every_configuration_is_tested():
    tested = {"cpu", "multi_gpu", "multi_node", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"}
    folder = Path(__file__).parents[2] / CONFIGS
    assert {file.stem for file in folder.iterdir()} == tested


@needs_deepspeed
def test_deepspeed_on_a_cpu(tmp_path, expected):
    facts = launched("deepspeed_zero2", tmp_path / "facts.json", "--num_processes", 2)
    check(facts, expected, world_size=2, type="DEEPSPEED", zero=2)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu", "multi_gpu"])
def test_ddp(tmp_path, expected, config):
    check(launched(config, tmp_path / "facts.json", "--num_processes", 2), expected, world_size=2, type="MULTI_CPU")


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(("stage", "processes"), [(2, 1), (3, 1), (3, 2)])
def test_deepspeed(tmp_path, expected, stage, processes):
    facts = launched(f"deepspeed_zero{stage}", tmp_path / "facts.json", "--num_processes", processes)
    check(facts, expected, world_size=processes, type="DEEPSPEED", zero=stage)


@pytest.mark.slow
def test_fsdp(tmp_path, expected):
    facts = launched("fsdp2", tmp_path / "facts.json", "--num_processes", 2)
    check(facts, expected, world_size=2, type="FSDP")


@pytest.mark.slow
def test_two_machines(tmp_path, expected):
    """Two launchers of one process each, as on two machines."""
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port(), "--num_processes", 2]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / "multi_node.yaml"]
    words = [*launcher, *address, "--machine_rank"]
    processes = [start([*words, rank, SCRIPT, tmp_path / "facts.json"]) for rank in range(2)]
    results = [finish(process, timeout=120) for process in processes]
    assert [status for status, _ in results] == [0, 0], results
    check(json.loads((tmp_path / "facts.json").read_text()), expected, world_size=2, type="MULTI_CPU")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe's command line for a grid of two cells, four rows a step over all processes."""
    root = tmp_path_factory.mktemp("recipe")
    model = save_tiny_roberta(root / "model")
    (root / "data" / "sst-2").mkdir(parents=True)
    for split, rows in (("train", 12), ("test", 6)):
        lines = [{"sentence1": f"a {split} film number {i} .", "label": str(i % 2)} for i in range(rows)]
        file = root / "data" / "sst-2" / f"{split}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def build(output: Path, processes: int, **changes: object) -> list:
        grid = output.with_suffix(".yaml")
        grid.write_text(f"learning_rate: [0.01, 1.0]\nper_device_train_batch_size: [{4 // processes}]\n")
        options = {
            "model": model,
            "task": "sst-2",
            "data_dir": root / "data",
            "k": 4,
            "seeds": 13,
            "optim": "sgdm",
            "grid": grid,
            "max_steps": 4,
            "output_dir": output,
            "use_cpu": True,
            "zero_shot": False,
            "train_sampling_strategy": "sequential",
        }
        return [word for name, value in (options | changes).items() for word in (f"--{name}", value)]

    return build


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def in_one_process(recipe, output: Path, **changes: object) -> list[dict]:
    words = [str(word) for word in recipe(output, 1, **changes)]
    runpy.run_path(str(Path(__file__).parents[2] / RECIPE))["main"](words)
    return records(output)


@pytest.fixture(scope="module")
def recipe_in_one_process(recipe, tmp_path_factory) -> list[dict]:
    return in_one_process(recipe, tmp_path_factory.mktemp("recipe") / "one")


def check_recipe(found: list[dict], one: list[dict]) -> None:
    """Every run is there once, with two processes, and as one process has it."""
    same = ("stage", "optim", "learning_rate", "seed", "batch_size", "steps", "dev_accuracy", "test_accuracy")
    assert [[record[key] for key in same] for record in found] == [[record[key] for key in same] for record in one]
    assert [record["stage"] for record in found] == ["dev", "dev", "test"]
    assert {record["processes"] for record in found} == {2}
    assert [record["train_loss"] for record in found] == pytest.approx([r["train_loss"] for r in one], abs=1e-5)


def test_the_recipe_in_two_processes(recipe, recipe_in_one_process, tmp_path):
    words = ["--config_file", CONFIGS / "cpu.yaml", "--main_process_port", free_port()]
    status, printed = accelerate(*words, RECIPE, *recipe(tmp_path / "two", 2))
    assert status == 0, printed[-6000:]
    check_recipe(records(tmp_path / "two"), recipe_in_one_process)


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_the_recipe_under_deepspeed(recipe, recipe_in_one_process, tmp_path, stage):
    words = ["--config_file", CONFIGS / f"deepspeed_zero{stage}.yaml", "--num_processes", 2]
    words += ["--main_process_port", free_port()]
    status, printed = accelerate(*words, RECIPE, *recipe(tmp_path / "two", 2), timeout=500)
    assert status == 0, printed[-6000:]
    found = records(tmp_path / "two")
    check_recipe(found, recipe_in_one_process)
    assert found[0]["optimizer_state_bytes"] < 0.51 * recipe_in_one_process[0]["optimizer_state_bytes"]


@pytest.mark.slow
def test_the_recipe_under_fsdp(recipe, tmp_path):
    """A new head, because accelerate 1.15 cannot shard RoBERTa's masked-LM head, whose bias has two names."""
    words = ["--config_file", CONFIGS / "fsdp2.yaml", "--num_processes", 2, "--main_process_port", free_port()]
    changes = {"tuning": "classifier"}
    command = recipe(tmp_path / "two", 2, **changes)
    status, printed = accelerate(*words, "tests/training/backend_recipe.py", *command, timeout=120)
    assert status == 0, printed[-6000:]
    found, one = records(tmp_path / "two"), in_one_process(recipe, tmp_path / "one", **changes)
    check_recipe(found, one)
    assert found[0]["optimizer_state_bytes"] < 0.51 * one[0]["optimizer_state_bytes"]

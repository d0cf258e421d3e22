"""The ImageNet recipe on tiny generated images: its protocol, resumption, streams, and several processes."""

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from backend_launch import accelerate, free_port
from recipe_tools import command_words, load_recipe
from safetensors.torch import load_file

from hf_momentum.errors import UserError
from hf_momentum.tasks.image_streams import ImageStreams
from hf_momentum.training.callbacks.lr_milestones import LRMilestonesCallback

for module in ("timm", "torchvision", "datasets"):
    pytest.importorskip(module, reason="needs the vision extra")
Image = pytest.importorskip("PIL.Image", reason="needs the vision extra")

RECIPE = Path(__file__).parents[2] / "recipes" / "imagenet_resnet.py"
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed; it comes with: pip install 'hf_momentum[deepspeed]'",
)


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("imagenet_resnet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An ImageFolder of 2 × 24 images to train on and 2 × 4 to evaluate on, of several sizes."""
    return write_images(tmp_path_factory.mktemp("data") / "tiny", 24)


def write_images(root: Path, per_class: int) -> Path:
    draw = np.random.default_rng(0)
    for split, count in (("train", per_class), ("val", 4)):
        for label in range(2):
            (root / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                size = (*draw.integers(12, 20, size=2), 3)
                pixels = draw.integers(0, 150, size=size) + 100 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / f"class{label}" / f"{i:04d}.png")
    return root


@pytest.fixture
def command(folder, tmp_path):
    """The recipe's command line for the smallest model; `changes` overrides options, None leaves one out."""

    def build(**changes) -> list[str]:
        options = {
            "preset": "cpu",
            "data_dir": folder,
            "model": "cifar_resnet8",
            "norm": "group",
            "image_size": 8,
            "optim": "sgdm",
            "global_batch_size": 8,
            "micro_batch": 4,
            "max_steps": 6,
            "output_dir": tmp_path / "out",
            "use_cpu": "True",
        }
        return command_words(options | changes)

    return build


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_grid_and_its_resumption(recipe, command, tmp_path, capsys):
    argv = command(optim="sgd sgdm", global_batch_size="8 16", max_steps=3, save_strategy="no")
    recipe.main(argv)
    found = records(tmp_path / "out")
    assert [(r["optim"], r["batch_size"], r["steps"]) for r in found] == [
        ("sgd", 8, 3), ("sgd", 16, 3), ("sgdm", 8, 3), ("sgdm", 16, 3)
    ]  # fmt: skip
    assert [r["effective_lr"] for r in found] == pytest.approx([0.1] * 4)
    assert [r["learning_rate"] for r in found] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    assert {(r["task"], r["image_size"], r["model"]) for r in found} == {("tiny", 8, "cifar_resnet8 group norm")}
    assert {r["arguments"]["per_device_train_batch_size"] for r in found} == {4}
    assert [r["arguments"].get("gradient_accumulation_steps", 1) for r in found] == [2, 4, 2, 4]
    assert "sgdm β=0.9 − sgd" in capsys.readouterr().out
    written = (tmp_path / "out" / "results.jsonl").read_bytes()
    recipe.main(argv)
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == written


def test_the_usual_protocol(recipe, command, tmp_path, monkeypatch):
    """Warm-up over 5 of 90 epochs, ×0.1 at 30, 60 and 80: γ at every step of 540, six to an epoch."""
    rates = []
    monkeypatch.setattr(
        LRMilestonesCallback,
        "on_step_begin",
        lambda self, args, state, control, optimizer=None, **kwargs: rates.append(optimizer.param_groups[0]["lr"]),
    )
    changes = {"preset": None, "max_steps": None, "micro_batch": None, "save_strategy": "no", "learning_rate": 0.4}
    monkeypatch.setattr(recipe.ImageRuns, "train", lambda runs, run, progress: trained.append(run))
    trained = []
    recipe.main(command(**changes, dataloader_num_workers=0))
    arguments = trained[0].arguments
    assert (arguments.max_steps, arguments.warmup_steps, arguments.weight_decay) == (540, 30, 1e-4)
    assert (arguments.lr_form, arguments.momentum, arguments.max_grad_norm) == ("heavy_ball", None, 0.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / arguments.warmup_steps))
    callback = LRMilestonesCallback(arguments.lr_milestones, arguments.lr_decay)
    callback.on_train_begin(arguments, type("State", (), {"max_steps": 540}), None, lr_scheduler=schedule)
    for _ in range(540):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for step, rate in enumerate(rates):
        epoch = step / 6
        expected = 0.4 * min(1, epoch / 5) * 0.1 ** sum(epoch >= milestone for milestone in (30, 60, 80))
        assert rate == pytest.approx(expected, rel=1e-9), step


def test_killed_and_started_again_it_ends_in_the_same_state(recipe, command, tmp_path, monkeypatch):
    """Killed in the second epoch, after a checkpoint: weights, momentum and learning rate are the same."""
    changes = {"max_steps": 16, "save_steps": 4, "warmup_steps": 6, "save_total_limit": 9}
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    monkeypatch.setattr(recipe.ImageRuns, "clean_up", lambda *_: None)  # keeps the last checkpoint
    recipe.main(command(output_dir=whole, **changes))

    argv = command(output_dir=torn, **changes)
    process = subprocess.Popen(
        [sys.executable, str(RECIPE), *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPE.parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if list(torn.glob("checkpoints/*/checkpoint-8/trainer_state.json")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (torn / "results.jsonl").exists()
    keep_until(torn, 8)
    recipe.main(argv)

    one, two = (next(root.glob("checkpoints/*/checkpoint-16")) for root in (whole, torn))
    assert one.parent.name == two.parent.name  # the same run
    weights, again = (load_file(checkpoint / "model.safetensors") for checkpoint in (one, two))
    assert weights.keys() == again.keys()
    for name in weights:
        torch.testing.assert_close(again[name], weights[name], atol=1e-6, rtol=0)
    states = [torch.load(checkpoint / "optimizer.pt", weights_only=True) for checkpoint in (one, two)]
    for key, state in states[0]["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(states[1]["state"][key][name], value, atol=1e-6, rtol=0)
    assert states[0]["state"]  # SGDM has one
    schedulers = [torch.load(checkpoint / "scheduler.pt", weights_only=True) for checkpoint in (one, two)]
    assert schedulers[0]["_last_lr"] == schedulers[1]["_last_lr"]
    assert schedulers[0]["last_epoch"] == schedulers[1]["last_epoch"] == 16
    done, resumed = records(whole)[0], records(torn)[0]
    assert resumed["test_loss"] == pytest.approx(done["test_loss"], abs=1e-6)
    assert resumed["run_id"] == done["run_id"]


def keep_until(root: Path, step: int) -> None:
    """Remove what a run wrote after a checkpoint before it could be stopped."""
    for checkpoint in root.glob("checkpoints/*/checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)


def write_parquet(folder: Path, root: Path) -> Path:
    import datasets

    root.mkdir()
    for split in ("train", "val"):
        files = sorted((folder / split).rglob("*.png"), key=lambda file: file.name)
        rows = {"image": [{"bytes": f.read_bytes(), "path": f.name} for f in files]}
        rows["label"] = [int(f.parent.name[-1]) for f in files]
        data = datasets.Dataset.from_dict(rows)
        for part in range(4 if split == "train" else 1):
            data.shard(4 if split == "train" else 1, part).to_parquet(root / f"{split}-{part}.parquet")
    return root


@pytest.fixture
def fast_datasets(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # else 5 s for each pass over a stream


def test_a_streamed_run_and_its_resumption(recipe, command, folder, tmp_path, monkeypatch, fast_datasets):
    """Stopped in the second epoch and started again: the same end as a run without a stop."""
    parquet = write_parquet(folder, tmp_path / "parquet")
    changes = {"data_dir": parquet, "streaming": "True", "train_size": 48, "max_steps": 10, "save_steps": 4}
    recipe.main(command(output_dir=tmp_path / "whole", **changes))
    train = recipe.ImageRuns.train

    def stopped(runs, run, progress):
        trainer = runs.build_trainer(run, progress)
        runs.build_trainer = None
        monkeypatch.setattr(trainer, "_maybe_log_save_evaluate", stop_after(trainer, 8))
        trainer.train()

    def stop_after(trainer, step):
        usual = trainer._maybe_log_save_evaluate

        def checked(*args, **kwargs):
            usual(*args, **kwargs)
            if trainer.state.global_step == step:
                raise KeyboardInterrupt

        return checked

    monkeypatch.setattr(recipe.ImageRuns, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(command(output_dir=tmp_path / "torn", **changes))
    monkeypatch.setattr(recipe.ImageRuns, "train", train)
    recipe.main(command(output_dir=tmp_path / "torn", **changes))
    whole, torn = records(tmp_path / "whole")[0], records(tmp_path / "torn")[0]
    assert whole["streaming"] is True
    assert whole["steps"] == torn["steps"] == 10
    assert torn["test_loss"] == pytest.approx(whole["test_loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "paper"}, "Unknown preset: 'paper'. Allowed: usual, cpu"),
        ({"model": "resnet5000"}, "timm knows no model 'resnet5000'"),
        ({"per_device_train_batch_size": 4}, "give --global_batch_size"),
        ({"resume_from_checkpoint": "x"}, "goes on by itself"),
        ({"auto_augment": "turn"}, "no augmentation policy 'turn'"),
        ({"image_size": 0}, "Invalid image_size: 0"),
        ({"global_batch_size": 64}, "is more than the 48 training images"),
        ({"streaming": "True"}, "streaming is for parquet files and the Hub"),
        ({"preset": "usual", "max_steps": None}, "needs a learning rate"),
    ],
)
def test_mistakes(recipe, command, changes, message):
    with pytest.raises(UserError) as caught:
        recipe.main(command(**changes))
    assert message in str(caught.value)


def test_a_corrupt_image_is_named(recipe, command, tmp_path):
    broken = write_images(tmp_path / "broken", 8)
    (broken / "train" / "class1" / "0003.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"class1/0003\.png: the image is corrupt"):
        recipe.main(command(data_dir=broken))


def test_a_corrupt_image_is_named_without_a_traceback_where_a_worker_reads_it(command, tmp_path):
    broken = write_images(tmp_path / "broken", 8)
    (broken / "train" / "class1" / "0003.png").write_bytes(b"\x89PNG")
    words = [sys.executable, str(RECIPE), *command(data_dir=broken, dataloader_num_workers=1)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPE.parents[1])}
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "error: " + str(broken / "train/class1/0003.png: the image is corrupt") in ended.stderr


def test_what_the_records_say_of_the_data(recipe):
    """The Hub's id alone, so that a card can link it; and nothing of a folder's place."""
    table = type("Table", (list,), {})()
    for argv, expected in (
        ([], {"source": "hub", "id": "ILSVRC/imagenet-1k", "config": None}),
        (["--hub_id", "me/birds:small"], {"source": "hub", "id": "me/birds", "config": "small"}),
        (["--data_dir", "here"], {"source": "folder"}),
    ):
        data = ImageStreams("birds", "Hub data set …", ("a", "b"), table, table, 48)
        found = recipe.describe(recipe.parse(argv)[0], data)["data"]
        assert found == expected | {"test_examples": 0}


def test_the_grid_and_the_help(recipe, command, capsys):
    grid = Path(__file__).parents[2] / "recipes" / "grids" / "imagenet.yaml"
    images, training, grid = recipe.parse(command(preset="usual", grid=grid, global_batch_size="1024 8192"))
    assert grid.learning_rate == pytest.approx([0.1 * 2**k for k in range(7)])
    assert (images.global_batch_size, training.lr_form) == ([1024, 8192], "heavy_ball")
    with pytest.raises(SystemExit):
        recipe.parse(["--help"])
    shown = capsys.readouterr().out
    assert "cpu: --image_size=64" in shown
    assert "{presets}" not in shown


def launched(command, output: Path, launcher: list, **changes) -> dict:
    words = [*launcher, "--num_processes", 2, "--main_process_port", free_port(), RECIPE]
    status, printed = accelerate(*words, *command(output_dir=output, **changes), timeout=500)
    assert status == 0, printed[-6000:]
    return records(output)


LARGE = {"global_batch_size": 1024, "max_steps": 2, "save_strategy": "no", "learning_rate": 0.05}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Enough images for a batch of 1,024, and another."""
    return write_images(tmp_path_factory.mktemp("large") / "tiny", 1024)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.timeout(600)
def test_deepspeed_with_a_batch_of_1024_in_two_processes(recipe, command, large, tmp_path):
    """GroupNorm: the split does not matter. 1 process × 64 × 16 against 2 × 32 × 16."""
    changes = LARGE | {"data_dir": large, "optim": "sgd sgdm"}
    recipe.main(command(output_dir=tmp_path / "one", **changes | {"micro_batch": 64}))
    launcher = ["--use_deepspeed", "--deepspeed_config_file", "recipes/deepspeed/zero2.json", "--num_machines", 1]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", 1]
    found = launched(command, tmp_path / "two", launcher, **changes | {"micro_batch": 32})
    for name, one, two in zip(("sgd", "sgdm"), records(tmp_path / "one"), found, strict=True):
        assert one["optim"] == two["optim"] == name
        assert (one["processes"], two["processes"]) == (1, 2)
        assert one["batch_size"] == two["batch_size"] == 1024
        assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-4)
        assert two["test_loss"] == pytest.approx(one["test_loss"], abs=1e-4)
        assert two["optimizer_state_bytes"] <= 0.51 * one["optimizer_state_bytes"]  # ZeRO-2 shards it


def test_batch_norm_depends_on_the_micro_batch(recipe, command, large, tmp_path):
    """So runs are compared at one micro-batch, and the split over processes then does not matter in training."""
    losses = {}
    for micro_batch in (32, 64):
        changes = {
            "data_dir": large,
            "norm": "batch",
            "global_batch_size": 64,
            "max_steps": 1,
            "micro_batch": micro_batch,
        }
        recipe.main(command(output_dir=tmp_path / str(micro_batch), **changes))
        losses[micro_batch] = records(tmp_path / str(micro_batch))[0]["train_loss"]
    assert 1e-4 < abs(losses[32] - losses[64]) < 0.1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_batch_norm_in_two_processes_trains_as_in_one(recipe, command, large, tmp_path):
    """Of one micro-batch size: the same micro-batches are normalised, only the running averages see half of them."""
    changes = LARGE | {"data_dir": large, "norm": "batch", "micro_batch": 32}
    recipe.main(command(output_dir=tmp_path / "one", **changes))
    (two,) = launched(command, tmp_path / "two", ["--config_file", "recipes/accelerate/cpu.yaml"], **changes)
    one = records(tmp_path / "one")[0]
    assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)
    assert two["test_loss"] != pytest.approx(one["test_loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_streams_in_two_processes(recipe, command, folder, tmp_path):
    parquet = write_parquet(folder, tmp_path / "parquet")
    changes = {"data_dir": parquet, "streaming": "True", "train_size": 48, "max_steps": 8, "dataloader_num_workers": 2}
    (two,) = launched(command, tmp_path / "two", ["--config_file", "recipes/accelerate/cpu.yaml"], **changes)
    assert (two["steps"], two["processes"]) == (8, 2)
    assert math.isfinite(two["train_loss"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_resnet50_at_64_pixels(recipe, command, folder, tmp_path):
    recipe.main(command(model="resnet50", norm=None, image_size=64, max_steps=20, save_steps=10))
    record = records(tmp_path / "out")[0]
    assert (record["steps"], record["model"]) == (20, "resnet50")
    assert record["train_loss"] < math.log(2)

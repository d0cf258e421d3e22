import json

import pytest
import torch
from huggingface_hub import ModelCard
from recipe_tools import load_recipe

from hf_momentum.errors import UserError
from hf_momentum.results.record import read_results
from hf_momentum.tasks.images import ImageData, ImageSet, subset
from hf_momentum.training.image_runs import last_checkpoint

SMALL = ["--preset", "demo", "--seeds", "0", "--num_train_epochs", "2", "--model", "cifar_resnet8", "--use_cpu"]


@pytest.fixture(scope="module")
def recipe():
    pytest.importorskip("timm")
    return load_recipe("cifar_resnet")


@pytest.fixture
def few(recipe, monkeypatch):
    """40 images that a step can tell apart, 8 × 8."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    pixels = (torch.randint(128, (40, 1, 8, 8), generator=random) + 40 * labels.view(-1, 1, 1, 1) // 2).byte()
    images = ImageSet(pixels, labels)

    def load(*_, train_size=None, test_size=None, **__):
        parts = (images if size is None else subset(images, size, 0) for size in (train_size, test_size))
        return ImageData("few", "made here", tuple("abcd"), *parts)

    monkeypatch.setattr(recipe, "load_images", load)


def results(folder):
    return read_results([folder]).records


def test_every_combination_is_a_run_and_is_tested(recipe, few, tmp_path, capsys):
    command = [*SMALL, "--global_batch_size", "10", "--ells", "1", "2", "--output_dir", str(tmp_path)]
    recipe.main(command)
    records = results(tmp_path)
    found = [(r["optim"], r["momentum"], r["ell"], r["steps"], r["effective_lr"]) for r in records]
    assert found == [
        ("sgd", 0.0, None, 8, 1.0),
        ("svag", 0.0, 2.0, 16, 1.0),
        ("sgdm", 0.9, None, 8, 1.0),
        ("svag", 0.9, 2.0, 16, 1.0),
    ]
    for record in records:
        assert record["task"] == "few" and record["batch_size"] == 10 and record["weight_decay"] == 5e-4
        assert record["lr_schedule"] == "constant ×0.1 at 0.5, 0.75"
        assert [point["step"] for point in record["curve"]] == [record["steps"] // 2, record["steps"]]
        assert record["curve"][-1]["test_accuracy"] == record["test_accuracy"]
    assert records[0]["optimizer_state_bytes"] == 0 and records[2]["optimizer_state_bytes"] > 4 * 70_000
    output = capsys.readouterr().out
    assert "sgdm ℓ=2 lr 1 batch 10 seed 0" in output and "svag β=0.9 ℓ=2 − svag ℓ=2" in output
    recipe.main(command)
    assert results(tmp_path) == records  # nothing was trained again


def test_one_seed_gives_one_result(recipe, few, tmp_path):
    curves = []
    for name in "ab":
        recipe.main([*SMALL, "--optim", "sgdm", "--global_batch_size", "15", "--output_dir", str(tmp_path / name)])
        curves.append(results(tmp_path / name)[0]["curve"])
    assert curves[0] == curves[1]


def test_accumulation_leaves_the_run_as_it_is_with_group_norm(recipe, few, tmp_path):
    curves = []
    for micro in ("20", "5"):
        options = ["--optim", "sgdm", "--norm", "group", "--global_batch_size", "20", "--micro_batch", micro]
        recipe.main([*SMALL, *options, "--output_dir", str(tmp_path / micro)])
        curves.append([point["test_loss"] for point in results(tmp_path / micro)[0]["curve"]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_an_interrupted_run_goes_on_from_its_checkpoint(recipe, few, tmp_path, monkeypatch):
    options = [*SMALL, "--optim", "sgdm", "--global_batch_size", "10", "--save_strategy", "steps", "--save_steps", "3"]
    recipe.main([*options, "--output_dir", str(tmp_path / "whole")])

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        from hf_momentum.training.callbacks.epoch import EpochCallback

        patch.setattr(EpochCallback, "on_step_end", interrupted)
        recipe.main([*options, "--output_dir", str(tmp_path / "parts")])
    assert not results_file(tmp_path / "parts")
    recipe.main([*options, "--output_dir", str(tmp_path / "parts")])
    (whole,), (parts,) = results(tmp_path / "whole"), results(tmp_path / "parts")
    assert parts["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-5)
    assert parts["curve"][-1] == pytest.approx(whole["curve"][-1], rel=1e-5)
    assert not list((tmp_path / "parts" / "checkpoints").iterdir())


def results_file(folder):
    return (folder / "results.jsonl").exists() and (folder / "results.jsonl").read_text()


def test_both_readings_of_the_learning_rate(recipe):
    for form, expected in (("effective", 0.2), ("heavy_ball", 2.0)):
        images, training, grid = recipe.parse(["--ells", "1", "2", "--lr_form", form, "--seeds", "0"])
        groups = recipe.plan_image_runs(images, training, grid, {"task": "cifar10"}, 50_000)
        rates = [group.runs[0].settings["effective_lr"] for group in groups]
        assert rates == pytest.approx([expected] * 4)


@pytest.mark.parametrize("optim", ["sgd", "sgdm"])
def test_an_optimizer_by_itself_has_the_rate_that_it_has_beside_the_other(recipe, optim):
    argv = ["--ells", "1", "2", "--lr_form", "heavy_ball", "--seeds", "0", "--optim", optim]
    images, training, grid = recipe.parse(argv)
    groups = recipe.plan_image_runs(images, training, grid, {"task": "cifar10"}, 50_000)
    assert [group.runs[0].settings["effective_lr"] for group in groups] == pytest.approx([2.0, 2.0])


def test_svag_has_two_whole_batches_in_every_step(recipe, few, tmp_path, caplog):
    """Of 40 images, 3 batches of 12 fill an epoch of SGD; SVAG leaves the third out instead of taking it alone."""
    options = ["--optim", "sgd", "--global_batch_size", "12", "--ells", "2", "--output_dir", str(tmp_path)]
    recipe.main([*SMALL, *options])
    assert results(tmp_path)[0]["steps"] == 2 * 2 * 3
    assert "plain SGD" not in caplog.text


def test_the_card_of_image_runs(recipe, few, tmp_path):
    options = ["--max_steps", "2", "--global_batch_size", "10", "--model_card", "True", "--output_dir", str(tmp_path)]
    recipe.main([*SMALL, *options])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.tags == ["hf_momentum", "sgd", "sgdm", "arxiv:2307.15196"]
    assert [result.task_type for result in card.data.eval_results] == ["image-classification"] * 2
    assert "- few: the digits that come with scikit-learn, 40 examples to test on." in card.text
    assert "text" not in card.data.to_yaml()


def test_what_the_records_say_of_the_data(recipe):
    known = ["--data_dir", "here"], ["--hub_id", "me/birds:small"], [], ["--preset", "demo"]
    images = [recipe.parse(argv)[0] for argv in known]
    assert [recipe.source(one) for one in images] == [
        {"source": "folder"},
        {"source": "hub", "id": "me/birds", "config": "small"},
        {"source": "hub", "id": "uoft-cs/cifar10", "config": None},
        {"source": "demo", "id": "the digits that come with scikit-learn"},
    ]


def test_several_gpus_of_one_process_are_refused(recipe, monkeypatch):
    images, training, grid = recipe.parse(["--seeds", "0"])
    monkeypatch.setattr(type(training), "n_gpu", 2)
    with pytest.raises(UserError, match="each of this process's 2 GPUs a batch of its own"):
        recipe.plan_image_runs(images, training, grid, {}, 50_000)


def test_a_checkpoint_whose_writing_was_interrupted_is_passed_over(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None
    for step in (8, 16, 24):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 24:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-16")


def test_the_papers_schedule(recipe):
    images, training, grid = recipe.parse(["--optim", "sgdm", "--seeds", "0", "--ells", "1", "4"])
    plain, svag = (group.runs[0].arguments for group in recipe.plan_image_runs(images, training, grid, {}, 50_000))
    assert (plain.max_steps, plain.per_device_train_batch_size, plain.gradient_accumulation_steps) == (
        160 * 97,
        512,
        1,
    )
    assert [fraction * 160 for fraction in plain.lr_milestones] == [80, 120]
    assert (svag.max_steps, svag.gradient_accumulation_steps, svag.eval_steps) == (4 * 160 * 97, 2, 4 * 97)


def test_a_part_of_the_images_has_a_name_of_its_own(recipe, few):
    images, _, _ = recipe.parse(["--preset", "cpu", "--train_images", "20", "--test_images", "8"])
    data = recipe.load(images)
    assert data.name == "few-20-4px" and data.train.pixels.shape == (20, 1, 4, 4) and len(data.test.labels) == 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "gpu"], "Unknown preset: 'gpu'. Allowed: paper, cpu, demo"),
        (["--ell", "2"], "the values of ℓ are those of --ells"),
        (["--ells", "0.5"], "at least 1, not 0.5"),
        (["--seeds", "1", "1"], "--seeds needs values, each once"),
        (["--per_device_train_batch_size", "8"], "give --global_batch_size"),
        (["--norm", "layer"], "invalid choice: 'layer'"),
        (["--momentun", "0.5"], "did you mean --momentum"),
    ],
)
def test_mistakes_are_told(recipe, argv, message, capsys):
    with pytest.raises((UserError, SystemExit)) as error:
        recipe.parse(argv)
    assert message in str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "cifar_resnet9", "--global_batch_size", "8"], "cifar_resnet9"),
        (["--global_batch_size", "64"], "64 is more than the 40 training images"),
        (["--global_batch_size", "24", "--ells", "2"], "SVAG takes two batches a step, 48 images, and there are 40"),
        (["--global_batch_size", "20", "--optim", "adamw_torch", "--ells", "2"], "SVAG has sgd and sgdm"),
        (["--train_images", "50"], "50"),
    ],
)
def test_mistakes_show_before_anything_is_trained(recipe, few, tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        recipe.main(["--preset", "demo", "--output_dir", str(tmp_path), *argv])
    assert not results_file(tmp_path)


@pytest.mark.data
def test_the_cpu_preset_on_real_images(recipe, data_dir, tmp_path):
    argv = ["--preset", "cpu", "--data_dir", str(data_dir.parent / "cifar10"), "--seeds", "0"]
    argv += ["--num_train_epochs", "1", "--train_images", "512", "--test_images", "200", "--global_batch_size", "128"]
    recipe.main([*argv, "--output_dir", str(tmp_path)])
    records = results(tmp_path)
    assert [record["task"] for record in records] == ["cifar10-512-16px"] * 2
    assert json.dumps(records[0]["data"]) == '{"source": "folder", "test_examples": 200}'

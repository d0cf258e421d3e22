r"""CIFAR ResNets with SGD and SGDM, and with both under SVAG: does momentum help, and does it still with finer steps?

Every combination of seed, optimizer, learning rate, batch size and ℓ is one run on the stock Trainer, tested after
each epoch. SVAG with ℓ takes ℓ times the steps at η/ℓ with the noise covariance × ℓ: where SGDM leads at ℓ = 1 by its
curvature, the lead goes as ℓ grows. Every finished run is a line of OUTPUT_DIR/results.jsonl; started again, the
command skips what is finished and goes on from checkpoints.

  a look, no download      python recipes/cifar_resnet.py --preset demo
  on two cores             python recipes/cifar_resnet.py --preset cpu --ells 1 2 4 8 --data_dir DATA
  the paper's experiment   accelerate launch recipes/cifar_resnet.py --preset paper --ells 1 2 4 8 16
  its learning rates       accelerate launch recipes/cifar_resnet.py --preset paper \
                             --grid recipes/grids/cifar_paper.yaml
  lr × batch size          python scripts/sweep.py recipes/grids/cifar_rates.yaml --workers 2 --data_dir DATA

Figures: hf-momentum plot OUTPUT_DIR --figure svag (curves for each ℓ and the gap), --figure rates (accuracy over lr).

Presets:
{presets}
In the paper's experiment "η = 0.2" does not say which form it is. --lr_form effective (η of Eq. 3, the default) and
--lr_form heavy_ball (γ of Eq. 1, so that η = 2 at β = 0.9) train both; SGD always runs at SGDM's η.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers.utils import logging

from hf_momentum.command import command_line, run_command
from hf_momentum.results.record import identifier
from hf_momentum.tasks.augmentation import AugmentedImages, collate, normalisation
from hf_momentum.tasks.image_models import build_image_model
from hf_momentum.tasks.images import DIGITS, ImageData, load_images, shrink
from hf_momentum.training.arguments import RecipeTrainingArguments
from hf_momentum.training.environment import data_source, hardware
from hf_momentum.training.grid import Grid
from hf_momentum.training.image_arguments import ImageArguments, parse_image_command
from hf_momentum.training.image_runs import ImageRuns, plan_image_runs
from hf_momentum.training.protocol import Run
from hf_momentum.training.publish import Publisher
from hf_momentum.training.run_store import RunStore

DEFAULTS = {
    "output_dir": "runs/cifar_resnet",
    "lr_scheduler_type": "constant",
    "lr_milestones": [0.5, 0.75],
    "weight_decay": 5e-4,
    "save_strategy": "no",
    "per_device_eval_batch_size": 500,
}
PAPER = {"model": "cifar_resnet32", "norm": "batch", "learning_rate": 0.2, "global_batch_size": [512]}
PAPER |= {"num_train_epochs": 160.0}
CPU = {"model": "cifar_resnet8", "norm": "batch", "learning_rate": 3.0, "global_batch_size": [512]}
CPU |= {"num_train_epochs": 8.0, "train_images": 4096, "test_images": 2000, "shrink": 2, "augment": False}
DEMO = CPU | {"data": "digits", "train_images": None, "test_images": None, "shrink": 1, "global_batch_size": [128]}
DEMO |= {"num_train_epochs": 5.0, "learning_rate": 1.0}
PRESETS = {"paper": PAPER, "cpu": CPU, "demo": DEMO}


@dataclass
class CifarArguments(ImageArguments):
    """The images of this recipe.

    Attributes:
        data: `cifar10` or `digits`, scikit-learn's.
        train_images: Size of a fixed, class-balanced subset to train on; None is all.
        test_images: Size of one to test on.
        shrink: Factor by which the images' sides are averaged down.
        augment: Whether images are cropped and flipped.
    """

    data: str = field(default="cifar10", metadata={"help": "cifar10, or digits (8 × 8, from scikit-learn)."})
    train_images: int | None = field(default=None, metadata={"help": "Train on a fixed subset of this size."})
    test_images: int | None = field(default=None, metadata={"help": "Test on a fixed subset of this size."})
    shrink: int = field(default=1, metadata={"help": "Average the images down by this factor: 2 makes 32 pixels 16."})
    augment: bool = field(default=True, metadata={"help": "Crop with a padding of 4 and flip, as is usual."})


def parse(argv: Sequence[str]) -> tuple[CifarArguments, RecipeTrainingArguments, Grid]:
    """Read the command line."""
    return parse_image_command(CifarArguments, argv, DEFAULTS, PRESETS, __doc__)


def load(images: CifarArguments) -> ImageData:
    """The images that are trained on; a part of them, or smaller ones, carry a name of their own."""
    data = load_images(
        images.data,
        data_dir=images.data_dir,
        hub_id=images.hub_id,
        train_size=images.train_images,
        test_size=images.test_images,
    )
    parts = {"train": data.train, "test": data.test}
    if images.shrink > 1:
        parts = {name: shrink(part, images.shrink) for name, part in parts.items()}
    name = "-".join(filter(None, [
        data.name,
        images.train_images and str(images.train_images),
        images.shrink > 1 and f"{parts['train'].pixels.shape[-1]}px",
    ]))  # fmt: skip
    return dataclasses.replace(data, name=name, **parts)


def source(images: CifarArguments) -> dict[str, Any]:
    """Where the images come from, as the records state it."""
    if images.data == DIGITS:
        return {"source": "demo", "id": "the digits that come with scikit-learn"}
    return data_source(images.data, images.data_dir, images.hub_id or "uoft-cs/cifar10")


def build_runs(images: CifarArguments, data: ImageData, store: RunStore, publisher: Publisher) -> ImageRuns:
    """What all runs share: the images, the model, and what their records say."""
    statistics = normalisation(data)
    channels, size = data.train.pixels.shape[1], data.train.pixels.shape[-1]
    augment = {"padding": 4 * size // 32 or 1, "flip": True} if images.augment else {"padding": 0, "flip": False}
    about = {
        "data": source(images) | {"test_examples": len(data.test.labels)},
        "hardware": hardware(PartialState().device),
        "command": command_line(),
    }

    def train_set(run: Run) -> AugmentedImages:
        seed, svag = run.settings["seed"], run.settings["optim"] == "svag"
        batch_size = run.settings["batch_size"] * (2 if svag else 1)  # SVAG takes two batches a step
        return AugmentedImages(data.train, *statistics, seed=seed, batch_size=batch_size, **augment)

    def make_model() -> torch.nn.Module:
        return build_image_model(
            images.model,
            len(data.classes),
            norm=images.norm,
            in_chans=channels,
            pretrained=images.pretrained,
            image_size=size,
        )

    return ImageRuns(train_set, AugmentedImages(data.test, *statistics), collate, make_model, store, publisher, about)


def settings(images: CifarArguments, data: ImageData) -> dict[str, Any]:
    """What all runs have in common, as their records state it."""
    norm = f" {images.norm} norm" if images.norm else ""
    common = {"task": data.name, "model": f"{images.model}{norm}", "tuning": None, "k": None}
    common |= {"pretrained": images.pretrained, "augment": images.augment}
    parts = {"draw": data.train, "test_data": data.test}
    return common | {
        name: identifier({"pixels": int(part.pixels.sum()), "labels": part.labels.tolist()})
        for name, part in parts.items()
    }


def main(argv: Sequence[str]) -> None:
    """Parse, load, plan, train what is not finished, print the table."""
    images, training, grid = parse(argv)
    first = PartialState().is_main_process
    console = Console(quiet=not first)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    store = RunStore(training.output_dir)
    publisher = Publisher(store, push=False)
    with PartialState().main_process_first():
        data = load(images)
    console.print(f"{data.name}: {data.source}", markup=False)
    runs = build_runs(images, data, store, publisher)
    groups = plan_image_runs(images, training, grid, settings(images, data), len(data.train.labels))
    runs.make_model()  # so that a mistake shows before the first run starts
    runs.run(groups, training.output_dir, images.model_card, console)


if __name__ == "__main__":
    run_command(main)

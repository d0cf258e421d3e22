r"""ImageNet with ResNet-50, SGD and SGDM, from batch 1,024 to 8,192: at which batch size does momentum begin to help?

Every combination of seed, optimizer, batch size, learning rate and ℓ is one run on the stock Trainer. The global batch
is split by itself into processes × micro-batch × accumulation steps; --micro_batch is the most that a device takes.
Checkpoints are written as --save_strategy and --save_steps say; the same command started again skips what is finished
and goes on from the last checkpoint. Every finished run is a line of OUTPUT_DIR/results.jsonl.

  one run       accelerate launch recipes/imagenet_resnet.py --data_dir IMAGENET --learning_rate 0.4 --micro_batch 128
  the grid      accelerate launch recipes/imagenet_resnet.py --data_dir IMAGENET --micro_batch 128 \
                  --global_batch_size 1024 2048 4096 8192 --grid recipes/grids/imagenet.yaml
  DeepSpeed     accelerate launch --config_file recipes/accelerate/deepspeed_zero2.yaml --num_processes 8 \
                  recipes/imagenet_resnet.py ...
  two machines  accelerate launch --config_file recipes/accelerate/multi_node.yaml --machine_rank 0 \
                  --main_process_ip HOST recipes/imagenet_resnet.py ...       (and --machine_rank 1 on the other)
  on two cores  python recipes/imagenet_resnet.py --preset cpu --data_dir SMALL_IMAGE_FOLDER

Data: an ImageFolder (train/CLASS/… and val/CLASS/…) or parquet files in --data_dir; else from the Hub, by default
ILSVRC/imagenet-1k, whose terms have to be accepted there. --streaming keeps the training images off the disk.

The learning rate is Eq. 1's γ (--lr_form heavy_ball); SGD runs at the matching η = γ/(1−β). The protocol is the usual
90-epoch recipe: 5 epochs of linear warm-up, ×0.1 at epochs 30, 60 and 80, weight decay 1e-4, random resized crop and
flip. What is known of the paper's own: ResNet-50, these batch sizes, Eq. 1's form, and SGD rescaled to match.

With BatchNorm the statistics are those of a micro-batch: compare runs with one --micro_batch.
Figures: hf-momentum plot OUTPUT_DIR --figure rates (accuracy over the learning rate, per batch size).

Presets:
{presets}
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import default_data_collator
from transformers.utils import logging

from hf_momentum.command import command_line, run_command
from hf_momentum.results.record import identifier
from hf_momentum.tasks.image_models import build_image_model
from hf_momentum.tasks.image_streams import IMAGENET, ImageStreams, StreamRows, load_image_stream
from hf_momentum.tasks.lazy_images import MappedImages, StreamedImages, image_transforms, model_statistics
from hf_momentum.training.arguments import RecipeTrainingArguments
from hf_momentum.training.environment import data_source, hardware
from hf_momentum.training.grid import Grid
from hf_momentum.training.image_arguments import ImageArguments, parse_image_command
from hf_momentum.training.image_runs import ImageRuns, plan_image_runs
from hf_momentum.training.protocol import Run
from hf_momentum.training.publish import Publisher
from hf_momentum.training.run_store import RunStore

DEFAULTS = {
    "output_dir": "runs/imagenet_resnet",
    "model": "resnet50",
    "lr_form": "heavy_ball",
    "lr_scheduler_type": "constant_with_warmup",
    "lr_milestones": [30 / 90, 60 / 90, 80 / 90],
    "weight_decay": 1e-4,
    "save_total_limit": 1,
    "per_device_eval_batch_size": 64,
}
USUAL = {"global_batch_size": [1024], "num_train_epochs": 90.0, "warmup_epochs": 5.0, "seeds": [0]}
USUAL |= {"save_strategy": "epoch", "dataloader_num_workers": 8}
CPU = {"image_size": 64, "global_batch_size": [64], "micro_batch": 32, "max_steps": 20, "warmup_epochs": 0.0}
CPU |= {"learning_rate": 0.01, "seeds": [0], "save_strategy": "steps", "save_steps": 10}
PRESETS = {"usual": USUAL, "cpu": CPU}


@dataclass
class ImageNetArguments(ImageArguments):
    """The images of this recipe.

    Attributes:
        image_size: Height and width that the model sees, in pixels.
        auto_augment: One of timm's augmentation policies besides the crop and the flip.
        warmup_epochs: Epochs in which the learning rate rises from 0.
        streaming: Whether the training images are streamed.
        train_size: Number of training images of a stream.
    """

    image_size: int = field(default=224, metadata={"help": "Height and width that the model sees, in pixels."})
    auto_augment: str | None = field(
        default=None, metadata={"help": "A policy in timm's notation besides crop and flip, such as rand-m9-mstd0.5."}
    )
    warmup_epochs: float = field(default=0.0, metadata={"help": "Epochs of a linear warm-up from 0."})
    streaming: bool = field(default=False, metadata={"help": "Stream the training images, from the Hub or parquet."})
    train_size: int | None = field(
        default=None, metadata={"help": "Number of training images, for a stream other than ImageNet's."}
    )


def parse(argv: Sequence[str]) -> tuple[ImageNetArguments, RecipeTrainingArguments, Grid]:
    """Read the command line."""
    images, training, grid = parse_image_command(ImageNetArguments, argv, DEFAULTS, PRESETS, __doc__)
    training.accelerator_config.dispatch_batches = False  # each process reads its own part of a stream
    return images, training, grid


def settings(images: ImageNetArguments, data: ImageStreams) -> dict[str, Any]:
    """What all runs have in common, as their records state it."""
    norm = f" {images.norm} norm" if images.norm else ""
    about = {"source": data.source, "classes": data.classes}
    return {
        "task": data.name,
        "model": f"{images.model}{norm}",
        "tuning": None,
        "k": None,
        "pretrained": images.pretrained,
        "image_size": images.image_size,
        "auto_augment": images.auto_augment,
        "streaming": images.streaming,
        "draw": identifier(about | {"images": data.train_size}),
        "test_data": identifier(about | {"images": len(data.test)}),
    }


def describe(images: ImageNetArguments, data: ImageStreams) -> dict[str, Any]:
    """What the records say besides: the data's source, the hardware, the command."""
    source = data_source(data.name, images.data_dir, images.hub_id or IMAGENET)
    return {
        "data": source | {"test_examples": len(data.test)},
        "hardware": hardware(PartialState().device),
        "command": command_line(),
    }


def build_runs(images: ImageNetArguments, data: ImageStreams, store: RunStore, publisher: Publisher) -> ImageRuns:
    """What all runs share: the images, the model, and what their records say."""
    size, classes = images.image_size, len(data.classes)

    def make_model() -> torch.nn.Module:
        return build_image_model(
            images.model, classes, norm=images.norm, pretrained=images.pretrained, image_size=size
        )

    statistics = model_statistics(make_model())  # and a mistake shows before the first run starts
    train, test = image_transforms(size, *statistics, images.auto_augment)

    def train_set(run: Run) -> MappedImages | StreamedImages:
        arguments = run.arguments
        if not isinstance(data.train, StreamRows):
            return MappedImages(data.train, classes, train, seed=arguments.seed)
        return StreamedImages(
            data.train,
            classes,
            train,
            size=data.train_size,
            batch_size=arguments.per_device_train_batch_size,
            seed=arguments.seed,
            processes=arguments.world_size,
            process=arguments.process_index,
            workers=arguments.dataloader_num_workers,
        )

    test_set = MappedImages(data.test, classes, test)
    about = describe(images, data)
    return ImageRuns(train_set, test_set, default_data_collator, make_model, store, publisher, about)


def main(argv: Sequence[str]) -> None:
    """Parse, find the images, plan, train what is not finished, print the table."""
    images, training, grid = parse(argv)
    first = PartialState().is_main_process
    console = Console(quiet=not first)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    store = RunStore(training.output_dir)
    publisher = Publisher(store, push=False)
    with PartialState().main_process_first():
        data = load_image_stream(
            images.data_dir, images.hub_id, streaming=images.streaming, train_size=images.train_size
        )
    console.print(f"{data.name}: {data.source}, {data.train_size} + {len(data.test)} images", markup=False)
    runs = build_runs(images, data, store, publisher)
    epochs = {"warmup_epochs": images.warmup_epochs, "whole_batches": images.streaming}
    groups = plan_image_runs(images, training, grid, settings(images, data), data.train_size, **epochs)
    runs.run(groups, training.output_dir, images.model_card, console)


if __name__ == "__main__":
    run_command(main)

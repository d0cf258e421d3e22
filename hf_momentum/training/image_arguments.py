"""What an image recipe adds to the Trainer's arguments, and how its command line is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from hf_momentum.command import read_yaml
from hf_momentum.errors import UserError
from hf_momentum.training.arguments import RecipeTrainingArguments
from hf_momentum.training.command_line import as_options, given_options, option, parse_arguments
from hf_momentum.training.grid import Grid, read_grid

Images = TypeVar("Images", bound="ImageArguments")

NORMS = ("batch", "group")
DEFAULTS = {
    "optim": ["sgd", "sgdm"],
    "max_grad_norm": 0.0,
    "eval_strategy": "steps",
    "remove_unused_columns": False,  # the images come in batches, or have no columns
    "logging_nan_inf_filter": False,  # a diverged run has to show
    "disable_tqdm": True,  # one progress display for all runs instead
    "report_to": "none",
    "dataloader_pin_memory": torch.accelerator.is_available(),
}
NOT_HERE = {
    "seed": "the seeds are those of --seeds, one run each",
    "ell": "the values of ℓ are those of --ells",
    "per_device_train_batch_size": "give --global_batch_size, and --micro_batch if a device takes less",
    "gradient_accumulation_steps": "it follows from --global_batch_size and --micro_batch",
    "resume_from_checkpoint": "the same command started again goes on by itself",
    "push_to_hub": "there is no dev split to pick a run on; use --model_card",
}


@dataclass
class ImageArguments:
    """The model, the images and the runs of an image recipe.

    Attributes:
        preset: A named set of defaults; everything else on the command line wins over it.
        model: A timm model's name.
        norm: `batch` or `group` replaces the normalisation of a model that lets one choose; None is its own.
        pretrained: Whether to start from timm's weights.
        data_dir: A folder with the images, instead of the Hub.
        hub_id: A data set on the Hub.
        seeds: One initialisation, one data order and one augmentation per seed.
        ells: ℓ of SVAG; 1 is the plain optimizer.
        global_batch_size: Images per gradient, over all processes and accumulation steps; under SVAG of each half.
        micro_batch: The most images that a device takes at once.
        grid: YAML file of learning rates (× optimizers).
        config: YAML file of any of these arguments.
        model_card: Whether the results are written as a Hub model card.
    """

    _argument_group_name = "images"

    preset: str | None = field(default=None, metadata={"help": "A named set of defaults, see above."})
    model: str | None = field(default=None, metadata={"help": "A timm model's name."})
    norm: str | None = field(
        default=None,
        metadata={"help": "Normalisation, where the model lets one choose; its own unless given.", "choices": NORMS},
    )
    pretrained: bool = field(default=False, metadata={"help": "Start from timm's pretrained weights."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with {train,test}.parquet, or an ImageFolder's train/ and test/."}
    )
    hub_id: str | None = field(default=None, metadata={"help": "Hub data set, owner/name."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Each initialises, orders and augments anew."}
    )
    ells: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "ℓ of SVAG, several values for the figure of ℓ; 1 is the plain optimizer."},
    )
    global_batch_size: list[int] = field(
        default_factory=lambda: [512],
        metadata={"help": "Images per gradient over all processes and accumulation steps; several for a grid."},
    )
    micro_batch: int | None = field(
        default=None, metadata={"help": "The most images that a device takes at once; the rest is accumulated."}
    )
    grid: str | None = field(default=None, metadata={"help": "YAML file of learning rates (× optimizers)."})
    config: str | None = field(default=None, metadata={"help": "YAML file of arguments; the command line wins."})
    model_card: bool = field(
        default=False, metadata={"help": "Write the results as a Hub model card into --output_dir."}
    )

    def __post_init__(self):
        for name in ("seeds", "ells", "global_batch_size"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"--{name} needs values, each once, not {values}.")
        if min(self.ells) < 1:
            raise UserError(f"--ells must be at least 1, not {min(self.ells):g}; 1 is the plain optimizer.")


def parse_image_command(
    kind: type[Images],
    argv: Sequence[str],
    defaults: Mapping[str, Any],
    presets: Mapping[str, Mapping[str, Any]],
    description: str,
) -> tuple[Images, RecipeTrainingArguments, Grid]:
    """Read an image recipe's command line; the preset, then files come before it, so that it wins.

    Args:
        kind: The recipe's arguments.
        argv: The command line without the program's name.
        defaults: The recipe's own, over `DEFAULTS`.
        presets: Name → defaults over these; the first is taken if none is named.
        description: The recipe's text for `--help`, with `{presets}` where they are listed.

    Returns:
        The recipe's arguments, the Trainer's, and the grid.

    Raises:
        UserError: If a name or a value is not allowed, or an argument has no place in such a recipe.
    """
    if path := option(argv, "config"):
        argv = [*as_options(read_yaml(path)), *argv]
    path, preset = option(argv, "grid"), option(argv, "preset") or next(iter(presets))
    if preset not in presets:
        raise UserError(f"Unknown preset: {preset!r}. Allowed: {', '.join(presets)}.")
    grid, given = read_grid(path) if path else Grid(), given_options(argv)
    if grid.per_device_train_batch_size:
        raise UserError(f"{path}: give batch sizes with --global_batch_size, several if you like.")
    if both := given & grid.swept:
        raise UserError(f"--{min(both)} is given and also listed in {path}. Give it in one place.")
    if misplaced := given & NOT_HERE.keys():
        raise UserError(f"--{min(misplaced)} has no place here: {NOT_HERE[min(misplaced)]}.")
    argv = [*as_options(grid.defaults | {"optim": grid.optim}), *argv]
    shown = "".join(f"  {name}: {' '.join(as_options(values))}\n" for name, values in presets.items())
    merged = {**DEFAULTS, **defaults, **presets[preset]}
    text = description.replace("{presets}", shown.rstrip())
    return (*parse_arguments([kind, RecipeTrainingArguments], argv, merged, text), grid)

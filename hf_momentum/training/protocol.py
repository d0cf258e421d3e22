"""The protocol of few-shot tables: a grid per seed, dev accuracy picks a run, test is evaluated once for the pick."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hf_momentum.errors import UserError
from hf_momentum.optim import effective_lr, get_optimizer_info
from hf_momentum.results.record import identifier
from hf_momentum.training.arguments import (
    MomentumTrainingArguments,
    RecipeTrainingArguments,
    is_our_optimizer,
)
from hf_momentum.training.command_line import read_yaml

SWEPT = ("optim", "learning_rate", "per_device_train_batch_size")

# Arguments that change where things are written or how they are shown, and not what is trained.
_WITHOUT_EFFECT = (
    "output_dir", "run_name", "disable_tqdm", "report_to", "project", "trackio_space_id", "log_level",
    "log_level_replica", "log_on_each_node", "logging_dir", "logging_strategy", "logging_steps", "logging_first_step",
    "logging_nan_inf_filter", "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_strategy",
    "hub_revision", "hub_always_push", "use_cpu", "dataloader_num_workers", "dataloader_pin_memory", "ddp_timeout",
    "save_total_limit", "save_only_model", "do_train", "do_eval", "do_predict", "per_device_eval_batch_size",
)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """A grid file: what is swept, and defaults for other arguments.

    Attributes:
        learning_rate: Learning rates, for all optimizers or per optimizer's name; None if not swept.
        per_device_train_batch_size: Batch sizes; None if not swept.
        optim: Optimizers; None if the command line names them.
        defaults: Other arguments, which the command line may override.
    """

    learning_rate: list[float] | dict[str, list[float]] | None = None
    per_device_train_batch_size: list[int] | None = None
    optim: list[str] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def swept(self) -> set[str]:
        """The names that the grid sweeps."""
        return {name for name in SWEPT if getattr(self, name) is not None}


def read_grid(path: str) -> Grid:
    """Read a grid file.

    Args:
        path: A YAML file with any of `learning_rate` (a list, or a list per optimizer), `per_device_train_batch_size`,
            `optim` and `defaults`.

    Returns:
        The grid.

    Raises:
        UserError: If the file is missing or holds anything else.
    """
    content = read_yaml(path)
    if unknown := content.keys() - {*SWEPT, "defaults"}:
        raise UserError(f"{path}: unknown key {min(unknown)!r}. Allowed: {', '.join(SWEPT)}, defaults.")
    if not isinstance(content.get("defaults", {}), dict):
        raise UserError(f"{path}: defaults must hold lines 'argument: value'.")
    numbers = functools.partial(_list_of, path)
    rates, sizes, names = (content.get(name) for name in ("learning_rate", SWEPT[2], "optim"))
    if isinstance(rates, dict):
        rates = {name: numbers(f"learning_rate of {name}", values, float) for name, values in rates.items()}
    elif rates is not None:
        rates = numbers("learning_rate", rates, float)
    sizes = None if sizes is None else numbers(SWEPT[2], sizes, int)
    names = None if names is None else numbers("optim", names, str)
    return Grid(rates, sizes, names, content.get("defaults", {}))


def _list_of(path: str, name: str, values: Any, kind: type) -> list:
    try:
        if not isinstance(values, list) or not values:
            raise ValueError
        return [kind(value) for value in values]
    except (TypeError, ValueError):
        raise UserError(f"{path}: {name} must be a list such as [1, 2] of {kind.__name__}, not {values!r}.") from None


@dataclass(frozen=True)
class Run:
    """One training run of the plan.

    Attributes:
        arguments: The Trainer's arguments.
        settings: Everything that determines the outcome, as JSON can hold it.
    """

    arguments: MomentumTrainingArguments
    settings: dict[str, Any]

    @property
    def run_id(self) -> str:
        """The run's name: equal settings, equal name."""
        return identifier(self.settings)

    @property
    def label(self) -> str:
        """The run in a few words, for a progress line."""
        arguments = self.arguments
        return f"{arguments.optim} lr {arguments.learning_rate:g} batch {self.settings['batch_size']}"


def _without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    arguments = {name: value for name, value in settings["arguments"].items() if name != "seed"}
    return {name: value for name, value in settings.items() if name not in {"seed", "data"}} | {"arguments": arguments}


@dataclass(frozen=True)
class Group:
    """The runs among which one is picked: one task, optimizer and seed, over the grid."""

    runs: tuple[Run, ...]

    @property
    def group_id(self) -> str:
        """The group's name: the same runs, the same name."""
        return identifier({"runs": sorted(run.run_id for run in self.runs)})

    @property
    def row_id(self) -> str:
        """The name of the table's row: the same for groups that differ in the seed and its draw alone."""
        return identifier({"runs": sorted(identifier(_without_seed(run.settings)) for run in self.runs)})

    def pick(self, records: Iterable[dict[str, Any]]) -> Run:
        """The run with the best dev accuracy; of equals, the first in the grid.

        Args:
            records: Finished runs, the group's own among them.

        Returns:
            The run to test.
        """
        accuracy = {record["run_id"]: record.get("dev_accuracy") for record in records}
        return max(self.runs, key=lambda run: accuracy[run.run_id])


def plan_groups(training: RecipeTrainingArguments, grid: Grid, common: dict[str, Any], seed: int) -> list[Group]:
    """One group per optimizer, each with a run per cell of the grid.

    Under `lr_form="heavy_ball"` beside SGDM, SGD's rows get the matching η = γ/(1−β): the comparison is always at
    equal effective learning rate.

    Args:
        training: The command's arguments.
        grid: What is swept.
        common: Settings that all runs share (task, model, data, …).
        seed: Of the draw, the initialisation and the data order.

    Returns:
        The groups, in the order of the optimizers.

    Raises:
        UserError: If the grid has no learning rate for an optimizer, or a run's arguments are not allowed.
    """
    groups = []
    for optim in grid.optim or training.optim:
        rates = grid.learning_rate or [training.learning_rate]
        if isinstance(rates, dict):
            if optim not in rates:
                raise UserError(
                    f"The grid lists learning rates for {', '.join(rates)}, but not for {optim}. Add them."
                )
            rates = rates[optim]
        sizes = grid.per_device_train_batch_size or [training.per_device_train_batch_size]
        runs = [_plan_run(training, common, optim, rate, size, seed) for rate in rates for size in sizes]
        groups.append(Group(tuple(runs)))
    return groups


def _plan_run(
    training: RecipeTrainingArguments, common: dict[str, Any], optim: str, rate: float | None, size: int, seed: int
) -> Run:
    changes = {"learning_rate": rate, "per_device_train_batch_size": size, "seed": seed}
    if optim == "sgd" and training.lr_form == "heavy_ball" and "sgdm" in training.optim and rate is not None:
        default = get_optimizer_info("sgdm").defaults["momentum"]
        momentum = default if training.momentum is None else training.momentum
        changes |= {"learning_rate": effective_lr(rate, momentum), "lr_form": None}
    if is_sharded(training):
        changes |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "save_strategy": "best"}
    arguments = training.for_run(optim, **changes)
    batch_size = size * arguments.gradient_accumulation_steps * arguments.world_size
    settings = common | {"seed": seed, "batch_size": batch_size, "arguments": chosen_arguments(arguments)}
    return Run(arguments, settings)


def is_sharded(arguments: MomentumTrainingArguments) -> bool:
    """Whether DeepSpeed or FSDP holds the weights, so that a callback cannot copy them.

    Args:
        arguments: The Trainer's arguments.

    Returns:
        True under DeepSpeed or FSDP.
    """
    return bool(arguments.deepspeed or arguments.deepspeed_plugin or arguments.fsdp)


def chosen_arguments(arguments: MomentumTrainingArguments) -> dict[str, Any]:
    """The arguments that differ from their defaults and bear on the outcome.

    Args:
        arguments: One run's arguments.

    Returns:
        Name → value as JSON holds it.
    """
    values, defaults = arguments.to_dict(), _default_arguments()
    return {
        name: value
        for name, value in values.items()
        if name not in _WITHOUT_EFFECT and (name == "optim" or value != defaults.get(name))
    }


@functools.cache
def _default_arguments() -> dict[str, Any]:
    return MomentumTrainingArguments(learning_rate=0.0).to_dict()


def optimizer_fields(arguments: MomentumTrainingArguments) -> dict[str, Any]:
    """The optimizer as a record states it.

    Args:
        arguments: One run's arguments.

    Returns:
        `optim`, `learning_rate`, `effective_lr`, `lr_form`, `momentum` and `ell`; None where a value has no meaning.
    """
    record = {"optim": arguments.optim, "learning_rate": arguments.learning_rate, "ell": arguments.ell}
    if not is_our_optimizer(arguments.optim):
        return record | {"effective_lr": None, "lr_form": None, "momentum": None}
    form, momentum = arguments.lr_form or "effective", arguments.momentum
    if momentum is None:
        momentum = get_optimizer_info(arguments.optim).defaults["momentum"]
    rate = effective_lr(arguments.learning_rate, momentum) if form == "heavy_ball" else arguments.learning_rate
    return record | {"effective_lr": rate, "lr_form": form, "momentum": momentum}

"""The protocol of few-shot tables: a grid per seed, dev accuracy picks a run, test is evaluated once for the pick."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_momentum.errors import UserError
from hf_momentum.optim import effective_lr, get_optimizer_info
from hf_momentum.results.record import identifier
from hf_momentum.training.arguments import MomentumTrainingArguments, RecipeTrainingArguments, is_our_optimizer
from hf_momentum.training.callbacks.guard import fsdp_is_asked_for
from hf_momentum.training.grid import Grid
from hf_momentum.training.svag_arguments import svag_arguments

# Arguments that change where things are written or how they are shown, and not what is trained.
_WITHOUT_EFFECT = (
    "output_dir", "run_name", "disable_tqdm", "report_to", "project", "trackio_space_id", "log_level",
    "log_level_replica", "log_on_each_node", "logging_dir", "logging_strategy", "logging_steps", "logging_first_step",
    "logging_nan_inf_filter", "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_strategy",
    "hub_revision", "hub_always_push", "use_cpu", "dataloader_num_workers", "dataloader_pin_memory", "ddp_timeout",
    "save_total_limit", "save_only_model", "save_strategy", "save_steps", "do_train", "do_eval", "do_predict",
    "per_device_eval_batch_size",
)  # fmt: skip
_OPTIMIZER = ("optim", "learning_rate", "effective_lr", "lr_form", "momentum", "momentum_schedule", "ell")


@dataclass(frozen=True)
class Run:
    """One training run of the plan.

    Attributes:
        arguments: The Trainer's arguments.
        settings: Everything that determines the outcome, as JSON can hold it.
    """

    arguments: MomentumTrainingArguments
    settings: dict[str, Any]

    @functools.cached_property
    def run_id(self) -> str:
        """The run's name: equal settings, equal name."""
        return identifier(self.settings)

    @property
    def label(self) -> str:
        """The run in a few words, for a progress line."""
        return f"{self.settings['optim']} lr {self.settings['learning_rate']:g} batch {self.settings['batch_size']}"


@dataclass(frozen=True)
class Group:
    """The runs among which one is picked: one task, optimizer and seed, over the grid."""

    runs: tuple[Run, ...]

    @functools.cached_property
    def group_id(self) -> str:
        """The group's name: the same runs, the same name."""
        return identifier({"runs": sorted(run.run_id for run in self.runs)})

    @functools.cached_property
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


def _without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in {"seed", "draw"}}


def plan_groups(
    training: RecipeTrainingArguments, grid: Grid, common: dict[str, Any], seed: int, draw: str
) -> list[Group]:
    """One group per optimizer, each with a run per cell of the grid.

    Under `lr_form="heavy_ball"` beside SGDM, SGD's rows get the matching η = γ/(1−β): the comparison is always at
    equal effective learning rate.

    Args:
        training: The command's arguments.
        grid: What is swept.
        common: Settings that all runs and seeds share (task, prompt, model, test data, …).
        seed: Of the draw, the initialisation and the data order.
        draw: Identifier of the examples that the seed drew.

    Returns:
        The groups, in the order of the optimizers.
    """
    groups, best = [], {}
    if under_deepspeed(training):  # where a callback cannot keep the best weights
        best = {"metric_for_best_model": "accuracy", "greater_is_better": True, "save_total_limit": 1}
        best |= {"load_best_model_at_end": True, "save_strategy": "best"}
    sizes = grid.per_device_train_batch_size or [training.per_device_train_batch_size]
    for optim in training.optim:
        changes = [
            {"learning_rate": rate, "per_device_train_batch_size": size, "seed": seed, **best}
            for rate in grid.rates(optim, training.learning_rate)
            for size in sizes
        ]
        shared = common | {"seed": seed, "draw": draw}
        groups.append(Group(tuple(plan_run(training, optim, cell, shared) for cell in changes)))
    return groups


def plan_run(training: RecipeTrainingArguments, optim: str, changes: dict[str, Any], shared: dict[str, Any]) -> Run:
    """Settle everything about one run.

    Args:
        training: The command's arguments.
        optim: The run's optimizer.
        changes: Arguments of this run alone: `learning_rate`, `per_device_train_batch_size` and others.
        shared: Settings that other runs share.

    Returns:
        The run; one with SVAG has its arguments stretched.

    Raises:
        UserError: If an argument is not allowed.
    """
    size, rate = changes["per_device_train_batch_size"], changes["learning_rate"]
    if size < 1:
        raise UserError(f"per_device_train_batch_size must be at least 1, not {size}.")
    form = changes.get("lr_form", training.lr_form)
    if optim == "sgd" and form == "heavy_ball" and "sgdm" in training.optim and rate is not None:
        default = get_optimizer_info("sgdm").defaults["momentum"]
        momentum = default if training.momentum is None else training.momentum
        changes |= {"learning_rate": effective_lr(rate, momentum), "lr_form": None}
    arguments = training.for_run(optim, **changes)
    batch_size = size * arguments.gradient_accumulation_steps * arguments.world_size  # under SVAG: of each half
    if optim == "svag":
        arguments = svag_arguments(arguments, arguments.ell)
    others = {name: value for name, value in chosen_arguments(arguments).items() if name not in {"seed", *_OPTIMIZER}}
    settings = shared | optimizer_fields(arguments) | {"batch_size": batch_size, "arguments": others}
    return Run(arguments, settings)


def without_clipping_beside_svag(training: RecipeTrainingArguments, explicit: bool) -> None:
    """Turn gradient clipping off for all rows alike where one of them is SVAG: clipping cuts the noise it amplifies.

    Args:
        training: The command's arguments; its `max_grad_norm` is set to 0.
        explicit: Whether the user gave `max_grad_norm`.

    Raises:
        UserError: If the user asked for clipping beside SVAG.
    """
    if "svag" not in training.optim:
        return
    if explicit and training.max_grad_norm:
        raise UserError(
            f"max_grad_norm={training.max_grad_norm:g} beside svag: clipping cuts the noise that SVAG amplifies, and "
            "the rows compared with it must be trained alike. Leave it out, or set it to 0."
        )
    training.max_grad_norm = 0.0


def under_deepspeed(arguments: MomentumTrainingArguments) -> bool:
    """Whether DeepSpeed holds the weights, so that a callback cannot copy them.

    Args:
        arguments: The Trainer's arguments.

    Returns:
        True if DeepSpeed was asked for, in the arguments or by `accelerate launch`.
    """
    return bool(arguments.deepspeed or arguments.deepspeed_plugin)


def is_sharded(arguments: MomentumTrainingArguments) -> bool:
    """Whether the weights may be spread over processes, so that none can write them all by itself.

    Args:
        arguments: The Trainer's arguments.

    Returns:
        True under DeepSpeed or FSDP, asked for in the arguments or by `accelerate launch`.
    """
    return under_deepspeed(arguments) or fsdp_is_asked_for(arguments)


def refuse_prompts_under_fsdp(arguments: MomentumTrainingArguments, tuning: str) -> None:
    """Raise for masked-LM heads under FSDP2, which cannot shard the bias that they share with their decoder.

    Args:
        arguments: The Trainer's arguments.
        tuning: `prompt` or `classifier`.

    Raises:
        UserError: If prompts are to be tuned under FSDP.
    """
    if tuning == "prompt" and fsdp_is_asked_for(arguments) and not under_deepspeed(arguments):
        raise UserError(
            "FSDP cannot shard a masked-LM head, whose decoder shares its bias. Use DeepSpeed ZeRO "
            "(recipes/accelerate/deepspeed_zero3.yaml), or --tuning classifier."
        )


def chosen_arguments(arguments: MomentumTrainingArguments) -> dict[str, Any]:
    """The arguments that differ from their defaults and bear on the outcome.

    Args:
        arguments: One run's arguments.

    Returns:
        Name → value as JSON holds it.
    """
    values, defaults = arguments.to_dict(), _default_arguments(arguments.use_cpu)
    return {n: v for n, v in values.items() if n not in _WITHOUT_EFFECT and v != defaults.get(n)}


@functools.cache
def _default_arguments(use_cpu: bool) -> dict[str, Any]:
    # With another use_cpu than the command's, processes on a CPU would forget each other.
    return MomentumTrainingArguments(learning_rate=0.0, use_cpu=use_cpu).to_dict()


def optimizer_fields(arguments: MomentumTrainingArguments) -> dict[str, Any]:
    """The optimizer as a record states it, defaults filled in.

    Args:
        arguments: One run's arguments.

    Returns:
        `optim`, `learning_rate`, `effective_lr`, `lr_form`, `momentum`, `momentum_schedule` and `ell`; None where a
        value has no meaning.
    """
    record = {name: getattr(arguments, name) for name in ("optim", "learning_rate", "ell", "momentum_schedule")}
    if not is_our_optimizer(arguments.optim):
        return record | {"effective_lr": None, "lr_form": None, "momentum": None}
    form, momentum = arguments.lr_form or "effective", arguments.momentum
    if momentum is None and arguments.momentum_schedule is None:
        momentum = get_optimizer_info(arguments.optim).defaults["momentum"]
    rate = effective_lr(arguments.learning_rate, momentum) if form == "heavy_ball" else arguments.learning_rate
    return record | {"effective_lr": rate, "lr_form": form, "momentum": momentum}

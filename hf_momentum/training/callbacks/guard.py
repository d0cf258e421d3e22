"""Check when training begins that what runs is what was asked for; every mismatch is an error, not a warning."""

import logging
import os
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_momentum.errors import UserError
from hf_momentum.optim import remove_fused_backward
from hf_momentum.training.loss_scaling import trainer_misreads_loss
from hf_momentum.training.optimizers import (
    hyperparameters_of,
    innermost_optimizer,
    request_hyperparameters,
    requested_hyperparameters,
)

logger = logging.getLogger(__name__)

_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_loss_scaling(args: TrainingArguments, misread: bool) -> None:
    """Raise if the Trainer takes a mean for a loss that is normalised over the accumulated batch, and it matters.

    Args:
        args: The Trainer's arguments.
        misread: Whether it does so, from `trainer_misreads_loss`.

    Raises:
        UserError: If the gradient is then multiplied by the accumulation steps or the number of processes.
    """
    processes = args.world_size if args.average_tokens_across_devices else 1
    factor = args.gradient_accumulation_steps * processes
    if misread and factor > 1:
        raise UserError(
            f"The Trainer would multiply this model's gradient by {factor} ({args.gradient_accumulation_steps} "
            f"accumulation steps × {processes} processes): it takes the model's loss, a plain mean, for one that is "
            "divided by num_items_in_batch. Before the Trainer is built call trainer_kwargs(model, ...) or "
            "normalise_loss_per_micro_batch(model). If the loss does honour num_items_in_batch, set "
            "model.accepts_loss_kwargs = True; with a compute_loss_func, which must return sum / num_items_in_batch, "
            "set it to False."
        )


def check_processes(args: TrainingArguments) -> None:
    """Raise if `accelerate launch` was asked for several processes and started one.

    Its launcher for a single process then leaves MASTER_PORT in the environment, but no world size.

    Args:
        args: The Trainer's arguments.

    Raises:
        UserError: If so.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if launched and args.world_size == 1 and not any(name in os.environ for name in _WORLD_SIZES):
        raise UserError(
            "accelerate launch was asked for several processes, but this is the only one: on a CPU it starts one "
            "whatever --num_processes says. Use torchrun --nproc_per_node N, or accelerate launch --multi_gpu "
            "--num_processes N without --cpu, with use_cpu=True in the training arguments. If one process is what you "
            "want, use --num_processes 1 and unset MASTER_PORT."
        )


def fsdp_is_asked_for(args: TrainingArguments) -> bool:
    """Whether the training arguments or `accelerate launch` ask for FSDP.

    Args:
        args: The Trainer's arguments.

    Returns:
        True if so, whether or not FSDP is in use.
    """
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in {"1", "true"}


def check_fsdp(args: TrainingArguments, model: nn.Module) -> None:
    """Raise if FSDP was asked for in several processes and the model is not sharded.

    accelerate reads `fsdp=True` for processes of an accelerator only; on a CPU it trains with DDP and says nothing.

    Args:
        args: The Trainer's arguments.
        model: The model in use.

    Raises:
        UserError: If so.
    """
    xla = bool(args.fsdp_config and args.fsdp_config.get("xla"))  # shards by other means
    if args.world_size == 1 or xla or not fsdp_is_asked_for(args):
        return
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    wrapped = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    if not wrapped and not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UserError(
            "FSDP was asked for, but no parameter is sharded: the Trainer's FSDP needs an accelerator, and on a CPU "
            "the processes train with DDP. Leave fsdp out, or use DeepSpeed, which runs on a CPU too."
        )


def check_stretched(args: TrainingArguments, ell: float | None) -> None:
    """Hold SVAG's ℓ to the training arguments; warn if `svag_arguments` did not make them.

    Args:
        args: The Trainer's arguments.
        ell: ℓ of the optimizer; None without SVAG.

    Raises:
        UserError: If the arguments were stretched for another ℓ.
    """
    stretched = getattr(args, "svag_ell", None)
    if stretched not in {None, ell}:
        raise UserError(
            f"The training arguments were stretched by svag_arguments for ell={stretched:g}, but the optimizer has "
            f"{'no ell' if ell is None else f'ell={ell:g}'}. Use the same ℓ, or the arguments as they were."
        )
    if stretched is None and ell not in {None, 1}:
        logger.warning(
            "SVAG at ell=%g steps at η/ℓ, and the training arguments do not come from svag_arguments(args, ell): see "
            "to it that they make ℓ times the steps, with two halves each.",
            ell,
        )


class MomentumGuard(TrainerCallback, ExportableState):
    """Raises at the beginning of training where a stock Trainer would silently train with something else.

    - The optimizer in use is the one that was given, or that `trainer_kwargs` builds: under DeepSpeed the Trainer
      drops `optimizers=(opt, ...)` and builds AdamW.
    - A model whose loss is a mean is treated as such under gradient accumulation and several processes.
    - After a resume the optimizer and its scheduler hold what was asked for now (learning rate, momentum, weight
      decay, ℓ, …): loading a checkpoint overwrites it.
    - The optimizer is new, unless it was loaded from a checkpoint: a second `train()` of one Trainer would go on with
      the momentum of the first.
    - `accelerate launch` started the processes that it was asked for, and FSDP shards the model if it was asked for.

    What the run is trained with is exported to `state.stateful_callbacks["MomentumGuard"]`, and so to every
    checkpoint's `trainer_state.json`. Nothing is kept that a resume would need.

    Args:
        optimizer: The optimizer that was given to `Trainer(optimizers=...)`; None with `trainer_kwargs`.
        override: After a resume go on with what is asked for now, instead of raising.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None, override: bool = False):
        self.optimizer, self.override = optimizer, override
        self.hyperparameters: list[dict[str, Any]] | None = None  # of the run, per parameter group
        self.description: str | None = None  # the same in a line, such as "sgdm: lr 0.1, momentum 0.9, ..."
        self._misread: bool | None = None  # whether the Trainer misread the loss when it was built
        self._inner: torch.optim.Optimizer | None = None
        if optimizer is not None:
            request_hyperparameters(innermost_optimizer(optimizer))

    def state(self) -> dict[str, Any]:
        """The state that the Trainer writes into its own.

        Returns:
            The arguments of the guard, and what the run is trained with.
        """
        return {
            "args": {"override": self.override},
            "attributes": {"hyperparameters": self.hyperparameters, "description": self.description},
        }

    def on_init_end(self, args, state, control, model=None, **kwargs):
        """See the model, and an optimizer that was given, as the Trainer's constructor saw them."""
        self._misread = trainer_misreads_loss(model)
        if self.optimizer is not None:  # once more, with what a scheduler or another callback has added
            request_hyperparameters(innermost_optimizer(self.optimizer))

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        """Make all checks."""
        remove_fused_backward(model.parameters())  # of a training that was interrupted
        inner = self._inner = self._identify(optimizer)
        self._check_new(inner, state)
        check_loss_scaling(args, trainer_misreads_loss(model) if self._misread is None else self._misread)
        check_processes(args)
        check_fsdp(args, model)
        check_stretched(args, inner.param_groups[0].get("ell"))
        check_loaded(args, state, lr_scheduler)
        differences = find_differences(inner, lr_scheduler, state)
        if differences and not self.override:
            raise UserError(_differ(differences, state.global_step))
        if differences:
            override_hyperparameters(inner, lr_scheduler)
        self.hyperparameters = requested_hyperparameters(inner)
        self.description = describe_optimizer(inner)
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_step_end(self, args, state, control, **kwargs):
        """Remember that the optimizer has trained."""
        self._inner.has_trained = True

    def _identify(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        inner = innermost_optimizer(optimizer)
        if self.optimizer is not None and inner is not innermost_optimizer(self.optimizer):
            raise UserError(
                f"The Trainer trains with {type(inner).__name__}, not with the {type(self.optimizer).__name__} that "
                "was given. DeepSpeed drops Trainer(optimizers=...) and FSDP refuses it: use trainer_kwargs instead."
            )
        if requested_hyperparameters(inner) is None:
            raise UserError(
                f"The Trainer trains with {type(inner).__name__}, which trainer_kwargs did not build. Pass all of "
                "Trainer(..., **trainer_kwargs(...)), or the optimizer itself: MomentumGuard(optimizer)."
            )
        return inner

    @staticmethod
    def _check_new(inner: torch.optim.Optimizer, state: TrainerState) -> None:
        if state.global_step == 0 and getattr(inner, "has_trained", False):
            raise UserError(
                "This optimizer has trained before: a second train() of one Trainer keeps the momentum of the first. "
                "Build a new Trainer for every run, or go on with train(resume_from_checkpoint=True)."
            )


def check_loaded(args: TrainingArguments, state: TrainerState, lr_scheduler: Any) -> None:
    """Raise if training resumes without the optimizer and the scheduler of the checkpoint.

    Args:
        args: The Trainer's arguments.
        state: The Trainer's state.
        lr_scheduler: The Trainer's scheduler.

    Raises:
        UserError: If steps were made, but not by this scheduler (steps that fp16 skips count for the Trainer only).
    """
    counts_steps = hasattr(lr_scheduler, "base_lrs") and getattr(lr_scheduler, "last_epoch", None) == 0
    if state.global_step > 0 and counts_steps and not args.fp16:
        raise UserError(
            f"Training resumes at step {state.global_step}, but the learning rate schedule starts anew: the "
            "checkpoint holds no optimizer (save_only_model=True leaves it out). Start a new run from its "
            "weights instead."
        )


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Say in a line what an optimizer trains with.

    Args:
        optimizer: The innermost optimizer, with its request noted.

    Returns:
        Its name and the hyperparameters of its first group.
    """
    values = {key: value for key, value in requested_hyperparameters(optimizer)[0].items() if value is not None}
    name = values.pop("optim", type(optimizer).__name__)
    return f"{name}: " + ", ".join(f"{key} {value}" for key, value in values.items())


def find_differences(
    optimizer: torch.optim.Optimizer, lr_scheduler: Any, state: TrainerState
) -> list[tuple[str, Any, Any]]:
    """Compare what was asked for with what is in force, and with what a checkpoint's run said of itself.

    The latter counts too because not every sharded optimizer loads its groups.

    Args:
        optimizer: The innermost optimizer.
        lr_scheduler: The Trainer's scheduler.
        state: The Trainer's state.

    Returns:
        Name, value asked for, other value; once each.
    """
    requested, found = requested_hyperparameters(optimizer), []
    for asked, group in zip(requested, matching_groups(optimizer, len(requested)), strict=True):
        other = hyperparameters_of(group)
        if "initial_lr" not in group and state.global_step > 0:
            other.pop("lr")  # ReduceLROnPlateau and the like move it and keep no record of its start
        found += _unequal(asked, other)
    for asked, rate in zip(requested, _base_lrs(optimizer, lr_scheduler, len(requested)), strict=False):
        found += _unequal({"lr": asked["lr"]}, {"lr": float(rate)})
    for asked, other in zip(requested, _exported(state), strict=False):
        found += _unequal(asked, other)
    return list(dict.fromkeys(found))


def override_hyperparameters(optimizer: torch.optim.Optimizer, lr_scheduler: Any) -> None:
    """Put what was asked for in the place of what a checkpoint brought.

    The learning rate in force is scaled, so that it stays where its schedule is.

    Args:
        optimizer: The innermost optimizer.
        lr_scheduler: The Trainer's scheduler.
    """
    requested = requested_hyperparameters(optimizer)
    groups = matching_groups(optimizer, len(requested))
    for asked, group in zip(requested, groups, strict=True):
        start = group.get("initial_lr", group["lr"])
        group["lr"] = group["lr"] * (asked["lr"] / start) if start else asked["lr"]
        if "initial_lr" in group:
            group["initial_lr"] = asked["lr"]
        group.update({key: value for key, value in asked.items() if key != "lr"})
        if "keep_buffer" in group:
            needs_buffer = asked["momentum_schedule"] is not None or asked.get("momentum", 0) > 0
            group["keep_buffer"] = needs_buffer  # a buffer that is missing starts at zero
    if hasattr(lr_scheduler, "base_lrs"):
        groups = optimizer.param_groups
        lr_scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in groups]
        lr_scheduler._last_lr = [group["lr"] for group in groups]


def matching_groups(optimizer: torch.optim.Optimizer, count: int) -> list[dict[str, Any]]:
    """The parameter groups that had parameters when the optimizer was built.

    DeepSpeed drops empty groups, and ZeRO 3 keeps all groups empty between the steps.

    Args:
        optimizer: The innermost optimizer.
        count: The number of groups that had parameters.

    Returns:
        As many groups.
    """
    groups = optimizer.param_groups
    return groups if len(groups) == count else [group for group in groups if group["params"]]


def _base_lrs(optimizer: torch.optim.Optimizer, lr_scheduler: Any, count: int) -> list[float]:
    rates, groups = getattr(lr_scheduler, "base_lrs", []), optimizer.param_groups
    if len(rates) == count or len(rates) != len(groups):
        return rates
    return [rate for rate, group in zip(rates, groups, strict=True) if group["params"]]


def _unequal(asked: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, asked[key], other[key]) for key in asked if key in other and asked[key] != other[key]]


def _exported(state: TrainerState) -> list[dict[str, Any]]:
    saved = state.stateful_callbacks.get(MomentumGuard.__name__)
    return saved["attributes"]["hyperparameters"] or [] if saved and state.global_step > 0 else []


def _differ(differences: list[tuple[str, Any, Any]], step: int) -> str:
    where = "the checkpoint has" if step else "the optimizer has"
    listed = "; ".join(f"{key}: asked for {asked}, {where} {other}" for key, asked, other in differences)
    if not step:
        return f"{listed}. A scheduler or another callback has changed it after the optimizer was built."
    return (
        f"{listed}. Loading a checkpoint overwrites what was asked for. Ask for the checkpoint's values, or pass "
        "override=True to go on with yours."
    )

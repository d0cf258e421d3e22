"""What to splat into a stock Trainer: the optimizer factory, and the callbacks that make it do what was asked."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_momentum.errors import UserError
from hf_momentum.optim import MomentumSchedule, list_optimizers
from hf_momentum.training.arguments import (
    TRAINER_DEFAULT_LR,
    MomentumTrainingArguments,
    check_optimizer_name,
    is_our_optimizer,
)
from hf_momentum.training.callbacks.fused_backward import (
    FusedBackwardCallback,
    check_fused_backward,
    check_takes_fused_backward,
)
from hf_momentum.training.callbacks.guard import MomentumGuard
from hf_momentum.training.callbacks.lr_milestones import LRMilestonesCallback
from hf_momentum.training.callbacks.momentum_schedule import MomentumScheduleCallback, get_schedule
from hf_momentum.training.callbacks.trackers import HyperparameterLogCallback, LogFirstCallbacks
from hf_momentum.training.loss_scaling import normalise_loss_per_micro_batch
from hf_momentum.training.optimizers import build_optimizer

_SHARED = {  # keyword of trainer_kwargs → field of the training arguments
    "optim": "optim",
    "lr": "learning_rate",
    "lr_form": "lr_form",
    "momentum": "momentum",
    "ell": "ell",
    "weight_decay": "weight_decay",
    "momentum_schedule": "momentum_schedule",
    "momentum_schedule_kwargs": "momentum_schedule_kwargs",
    "fused_backward": "fused_backward",
}


class OptimizerFactory:
    """Builds one of our optimizers for the Trainer, which calls `OptimizerFactory()(model, **kwargs)`.

    A factory, and not an optimizer instance, because this is the one form that the Trainer honours under DeepSpeed and
    FSDP as well (an instance in `optimizers=` is dropped under DeepSpeed, trap 2).
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        args: TrainingArguments | None = None,
        svag: TrainerCallback | None = None,
        **given: Any,
    ) -> torch.optim.Optimizer:
        """Build the optimizer over the model's trainable parameters.

        Args:
            model: The model as the Trainer prepared it.
            args: Training arguments, read now and not earlier, so that a hyperparameter search takes effect.
            svag: The run's `SVAGCallback`, which gets the same ℓ as the learning rate.
            **given: The settings given to `trainer_kwargs`.

        Returns:
            The optimizer, its two groups (with and without weight decay) always in the same order.

        Raises:
            UserError: If the settings are not allowed, or the arguments have changed between SVAG and another
                optimizer since the callbacks were made.
        """
        settings = merge_settings(args, given)
        settings.pop("fused_backward", None)  # the callback's
        if (svag is not None) != (settings["optim"] == "svag"):
            raise UserError(
                f"optim is {settings['optim']!r} now, but the callbacks were made for another optimizer. "
                "Call trainer_kwargs once more and build a new Trainer."
            )
        if svag is not None:
            svag.ell = settings["ell"]
        return build_optimizer(model, **settings)


def trainer_kwargs(
    model: nn.Module | None = None,
    args: TrainingArguments | None = None,
    *,
    model_init: Callable[..., nn.Module] | None = None,
    optim: str | None = None,
    lr: float | None = None,
    lr_form: str | None = None,
    momentum: float | None = None,
    ell: float | None = None,
    weight_decay: float | None = None,
    momentum_schedule: str | MomentumSchedule | None = None,
    momentum_schedule_kwargs: dict[str, Any] | None = None,
    fused_backward: bool | None = None,
    override: bool = False,
    allow_clipping: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Keyword arguments for a stock `transformers.Trainer` that trains with SGD, SGDM or SVAG.

    `Trainer(model=model, args=args, ..., **trainer_kwargs(model, optim="sgdm", lr=1e-2, momentum=0.9))`

    Also sets `accepts_loss_kwargs = False` on a model whose loss is a plain mean, so that the Trainer divides it by
    the accumulation steps (see `hf_momentum.training.loss_scaling`): call it before the Trainer is built. A
    `compute_loss_func` of your own must return `sum / num_items_in_batch`, not a mean: the Trainer multiplies what it
    returns by the number of processes and divides it by nothing. It cannot be combined with SVAG.

    Make a new Trainer, with new keyword arguments, for every run.

    Args:
        model: The model to be trained; a PEFT model too. None with `model_init`.
        args: The Trainer's arguments. What is not given here is read from them when the optimizer is built, from
            `MomentumTrainingArguments` all of it, from plain `TrainingArguments` the learning rate and weight decay.
        model_init: The Trainer's `model_init`, where it makes the models itself; it is part of the result.
        optim: `sgd`, `sgdm` or `svag`. With `args` whose `optim` is one of the Trainer's own names, only the loss is
            mended.
        lr: η, or γ under `lr_form="heavy_ball"`. SVAG trains at η/ℓ; give η.
        lr_form: `effective` (default) or `heavy_ball`.
        momentum: β in [0, 1); 0.9 for `sgdm` and 0 for `svag` unless given, none for `sgd`.
        ell: ℓ ≥ 1 of `svag`, which needs it. For the steps × ℓ see `svag_arguments`.
        weight_decay: L2 coefficient, on weights only; 0 unless given.
        momentum_schedule: β over the steps, for `sgdm`, in place of `momentum`: a name of `MOMENTUM_SCHEDULES`, or a
            function of step, total steps and learning rate.
        momentum_schedule_kwargs: Keywords of a schedule that is named, such as `{"start": 0.5, "end": 0.9}`.
        fused_backward: Make the steps of `sgd` during the backward pass, each parameter as soon as its gradient is
            there, which is then freed; see `FusedBackwardCallback`. Needs one process, one backward pass per step and
            `max_grad_norm=0`.
        override: After a resume go on with these hyperparameters where the checkpoint has others, instead of raising.
        allow_clipping: Let SVAG run with `max_grad_norm > 0`.
        callbacks: Your own, which go after ours. Give them here: only the list that comes back, given to the Trainer
            as it is, puts what extends the logs in front of the trackers of `report_to`.

    Returns:
        A dictionary with `callbacks`, `optimizer_cls_and_kwargs` and, where given, `model_init`; under SVAG also
        `compute_loss_func=None`, which makes a second one beside it an error; for an optimizer of the Trainer's own
        with your callbacks alone.

    Raises:
        UserError: If a setting is missing, not allowed or contradicts the training arguments.
    """
    if (model is None) == (model_init is None) or not isinstance(model, nn.Module | None):
        raise UserError("Give trainer_kwargs what the Trainer gets: either the model, loaded, or model_init=.")
    given = {
        "optim": optim,
        "lr": lr,
        "lr_form": lr_form,
        "momentum": momentum,
        "ell": ell,
        "weight_decay": weight_decay,
        "momentum_schedule": momentum_schedule,
        "momentum_schedule_kwargs": momentum_schedule_kwargs,
        "fused_backward": fused_backward,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if getattr(args, "lr_milestones", None):
        callbacks = [LRMilestonesCallback(args.lr_milestones, args.lr_decay), *callbacks]
    own = isinstance(args, TrainingArguments) and optim is None and not is_our_optimizer(str(args.optim))
    if own and given:
        name = check_optimizer_name(args.optim)
        raise UserError(f"{min(given)} is of no use to the Trainer's own {name}. Name the optimizer: optim=.")
    ours = {} if own else _our_kwargs(args, given, override, allow_clipping)
    kwargs = ours | {"callbacks": LogFirstCallbacks([*ours.get("callbacks", ()), *callbacks])}
    if model_init is not None:
        kwargs["model_init"] = _with_mended_loss(model_init)
    if model is not None:
        normalise_loss_per_micro_batch(model)
    return kwargs


def _our_kwargs(
    args: TrainingArguments | None, given: dict[str, Any], override: bool, allow_clipping: bool
) -> dict[str, Any]:
    settings = merge_settings(args, given)
    fused = settings.pop("fused_backward", False)
    if fused and args is not None:
        check_fused_backward(args)
    build_optimizer([nn.Parameter(torch.zeros(1))], **settings)  # a mistake shows now, not in train()
    algorithm = _callbacks(settings, allow_clipping, fused)
    svag = algorithm[0] if settings["optim"] == "svag" else None
    kwargs = {
        "optimizer_cls_and_kwargs": (OptimizerFactory, {"args": args, "svag": svag, **given}),
        "callbacks": [MomentumGuard(override=override), *algorithm, HyperparameterLogCallback()],
    }
    if svag is not None:
        kwargs["compute_loss_func"] = None  # so that one beside it is an error of Python's own
    return kwargs


def _callbacks(settings: dict[str, Any], allow_clipping: bool, fused: bool) -> list[TrainerCallback]:
    if fused:
        return [FusedBackwardCallback()]
    if settings["optim"] == "svag":
        from hf_momentum.training.callbacks.svag import SVAGCallback

        return [SVAGCallback(settings["ell"], allow_clipping=allow_clipping)]
    schedule = settings.get("momentum_schedule")
    return [] if schedule is None else [MomentumScheduleCallback(schedule)]


def _with_mended_loss(model_init: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(model_init)  # the Trainer counts its arguments
    def mended(*args: Any) -> nn.Module:
        model = model_init(*args)
        normalise_loss_per_micro_batch(model)
        return model

    return mended


def merge_settings(args: TrainingArguments | None, given: dict[str, Any]) -> dict[str, Any]:
    """Join the training arguments with explicit settings for `build_optimizer`.

    Args:
        args: Training arguments or None. The Trainer's own defaults of `optim`, `learning_rate` and
            `weight_decay` count as not set.
        given: Explicit settings under the keywords of `trainer_kwargs`.

    Returns:
        The settings, `optim` and `lr` among them, without the unset ones; a momentum schedule as an object.

    Raises:
        UserError: If the two contradict each other, or the optimizer or the learning rate is missing.
    """
    settings = dict(given)
    for key, field in _SHARED.items():
        value = _chosen(args, field)
        if value is None:
            continue
        if given.get(key, value) != value:
            raise UserError(
                f"{key}={given[key]!r} contradicts the training arguments' {field}={value!r}. Give it in one place."
            )
        settings[key] = value
    if settings.get("optim") not in list_optimizers():
        raise UserError(f"Name the optimizer: optim= one of {', '.join(list_optimizers())}.")
    if settings.get("lr") is None:
        raise UserError("Give a learning rate: lr=, or learning_rate in the training arguments.")
    if settings.get("fused_backward"):
        check_takes_fused_backward(settings["optim"])
    schedule, kwargs = settings.get("momentum_schedule"), settings.pop("momentum_schedule_kwargs", None)
    if schedule is not None:
        settings["momentum_schedule"] = get_schedule(schedule, kwargs)
    elif kwargs:
        raise UserError(f"momentum_schedule_kwargs={kwargs} without a momentum_schedule. Name the schedule too.")
    return settings


def _chosen(args: TrainingArguments | None, field: str) -> Any:
    """A field of the training arguments, or None where it holds a default of the Trainer's, not chosen for SGD."""
    value = getattr(args, field, None)
    unset = {
        "optim": value is not None and not is_our_optimizer(str(value)),
        "learning_rate": value == TRAINER_DEFAULT_LR and not isinstance(args, MomentumTrainingArguments),
        "weight_decay": value == 0.0,
        "fused_backward": value is False,
    }
    return None if unset.get(field) else value

"""What to splat into a stock Trainer: the optimizer factory, and the loss scaled as SGD needs it."""

from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from hf_momentum.errors import UserError
from hf_momentum.optim import create_optimizer, list_optimizers
from hf_momentum.training.arguments import TRAINER_DEFAULT_LR, MomentumTrainingArguments, is_our_optimizer
from hf_momentum.training.loss_scaling import normalise_loss_per_micro_batch

_SHARED = {  # keyword of trainer_kwargs → field of the training arguments
    "optim": "optim",
    "lr": "learning_rate",
    "lr_form": "lr_form",
    "momentum": "momentum",
    "weight_decay": "weight_decay",
}


class OptimizerFactory:
    """Builds one of our optimizers for the Trainer, which calls `OptimizerFactory()(model, **kwargs)`.

    A factory, and not an optimizer instance, because this is the one form that the Trainer honours under DeepSpeed and
    FSDP as well (an instance in `optimizers=` is dropped under DeepSpeed, trap 2).
    """

    def __call__(self, model: nn.Module, *, args: TrainingArguments | None = None, **given) -> torch.optim.Optimizer:
        """Build the optimizer over the model's trainable parameters.

        Args:
            model: The model as the Trainer prepared it.
            args: Training arguments, read now and not earlier, so that a hyperparameter search takes effect.
            **given: `optim`, `lr`, `lr_form`, `momentum`, `weight_decay` as given to `trainer_kwargs`.

        Returns:
            The optimizer, its two groups (with and without weight decay) always in the same order.
        """
        settings = merge_settings(args, given)
        return create_optimizer(settings.pop("optim"), model, **settings)


def trainer_kwargs(
    model: nn.Module,
    args: TrainingArguments | None = None,
    *,
    optim: str | None = None,
    lr: float | None = None,
    lr_form: str | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
) -> dict[str, Any]:
    """Keyword arguments for a stock `transformers.Trainer` that trains `model` with SGD or SGDM.

    `Trainer(model=model, args=args, ..., **trainer_kwargs(model, optim="sgdm", lr=1e-2, momentum=0.9))`

    Also sets `accepts_loss_kwargs = False` on a model whose loss is a plain mean, so that the Trainer divides it by
    the accumulation steps (see `hf_momentum.training.loss_scaling`): call it before the Trainer is built.

    Args:
        model: The model to be trained; a PEFT model too.
        args: The Trainer's arguments. What is not given here is read from them when the optimizer is built, from
            `MomentumTrainingArguments` all of it, from plain `TrainingArguments` the learning rate and weight decay.
        optim: `sgd` or `sgdm`. With `args` whose `optim` is one of the Trainer's own names, only the loss is mended.
        lr: η, or γ under `lr_form="heavy_ball"`.
        lr_form: `effective` (default) or `heavy_ball`.
        momentum: β in [0, 1), for `sgdm`; 0.9 unless given.
        weight_decay: L2 coefficient, on weights only; 0 unless given.

    Returns:
        A dictionary with `optimizer_cls_and_kwargs`, or an empty one for an optimizer of the Trainer's own.
    """
    given = {"optim": optim, "lr": lr, "lr_form": lr_form, "momentum": momentum, "weight_decay": weight_decay}
    given = {key: value for key, value in given.items() if value is not None}
    own = isinstance(args, TrainingArguments) and optim is None and not is_our_optimizer(str(args.optim))
    if not own:
        settings = merge_settings(args, given)
        probe = [nn.Parameter(torch.zeros(1))]
        create_optimizer(settings.pop("optim"), probe, **settings)  # a mistake shows now, not in train()
    normalise_loss_per_micro_batch(model)
    return {} if own else {"optimizer_cls_and_kwargs": (OptimizerFactory, {"args": args, **given})}


def merge_settings(args: TrainingArguments | None, given: dict[str, Any]) -> dict[str, Any]:
    """Join the training arguments with explicit settings for `create_optimizer`.

    Args:
        args: Training arguments or None. The Trainer's own defaults of `optim`, `learning_rate` and
            `weight_decay` count as not set.
        given: Explicit settings under the keywords of `trainer_kwargs`.

    Returns:
        The settings, `optim` and `lr` among them, without the unset ones.

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
    return settings


def _chosen(args: TrainingArguments | None, field: str) -> Any:
    """A field of the training arguments, or None where it holds a default of the Trainer's, not chosen for SGD."""
    value = getattr(args, field, None)
    unset = {
        "optim": value is not None and not is_our_optimizer(str(value)),
        "learning_rate": value == TRAINER_DEFAULT_LR and not isinstance(args, MomentumTrainingArguments),
        "weight_decay": value == 0.0,
    }
    return None if unset.get(field) else value

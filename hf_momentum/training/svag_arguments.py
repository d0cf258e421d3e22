"""TrainingArguments stretched for SVAG: ℓ times the optimizer steps, each on twice the micro-batches."""

import dataclasses
import math
from typing import TypeVar

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_momentum.errors import UserError
from hf_momentum.optim import svag_coefficients

Arguments = TypeVar("Arguments", bound=TrainingArguments)

_STEPS_OF_SCHEDULES = ("num_stable_steps", "num_decay_steps", "timescale")
_RATES_OF_SCHEDULES = ("min_lr", "lr_end")


def svag_arguments(args: Arguments, ell: float) -> Arguments:
    """Stretch the arguments of a run with SGD to those of the SVAG run that it is compared with.

    Both cover the same training time η·steps, since SVAG steps at η/ℓ. Of the result:

    - `gradient_accumulation_steps` is 2n instead of n: two halves, each as large as the whole batch was.
    - `max_steps`, `warmup_steps`, `eval_steps`, `save_steps`, `logging_steps`, an `eval_delay` in steps and the step
      counts in `lr_scheduler_kwargs` are multiplied by ℓ. Ratios below 1 stay, and so do step counts whose strategy is
      not "steps".
    - `num_train_epochs` and an `eval_delay` in epochs are multiplied by 2ℓ: ℓ times the steps at twice the data. What
      is done once an epoch is therefore done 2ℓ times as often per unit of training time: prefer steps or ratios.
    - `min_lr` and `lr_end` in `lr_scheduler_kwargs` are divided by ℓ. The learning rate is **not**: it stays the η of
      the SGD run, and the optimizer factory divides it by ℓ, once.

    Epochs give exactly ℓ times the steps if an epoch of the SGD run has an even number of steps, ⌈L/n⌉ with L
    micro-batches; if it is odd, each of them gives ℓ steps too many (L = 3 and n = 1: 4ℓ instead of 3ℓ), since twice
    as many epochs then end in a short group. `max_steps` is exact always.

    Args:
        args: The arguments of the run with plain SGD, of any subclass. They are not changed.
        ell: ℓ, any real number of at least 1 that gives whole numbers of steps.

    Returns:
        New arguments of the same class, with ℓ in the attribute `svag_ell`, which `MomentumGuard` compares with the
        optimizer's.

    Raises:
        UserError: If ℓ is out of range or not the `ell` that the arguments hold, the arguments are stretched already,
            or a stretched number of steps is no integer.
    """
    svag_coefficients(ell)
    if hasattr(args, "svag_ell"):
        raise UserError(f"These arguments are stretched for ell={args.svag_ell:g} already. Give those of the SGD run.")
    if getattr(args, "ell", None) not in {None, ell}:
        raise UserError(f"ell={ell} contradicts the arguments' ell={args.ell}. Give the same ℓ in both places.")
    changes = {
        "gradient_accumulation_steps": 2 * args.gradient_accumulation_steps,
        "num_train_epochs": _without_rounding(2 * ell * args.num_train_epochs),
        "warmup_steps": _stretched("warmup_steps", args.warmup_steps, ell),
        "lr_scheduler_kwargs": _stretched_schedule(args.lr_scheduler_kwargs, ell),
    }
    if args.max_steps > 0:
        changes["max_steps"] = _stretched("max_steps", args.max_steps, ell)
    for kind in ("eval", "save", "logging"):
        if getattr(args, f"{kind}_strategy") == IntervalStrategy.STEPS:
            changes[f"{kind}_steps"] = _stretched(f"{kind}_steps", getattr(args, f"{kind}_steps"), ell)
    if args.eval_strategy == IntervalStrategy.STEPS:
        changes["eval_delay"] = _without_rounding(ell * args.eval_delay)
    elif args.eval_strategy == IntervalStrategy.EPOCH:
        changes["eval_delay"] = _without_rounding(2 * ell * args.eval_delay)
    stretched = dataclasses.replace(args, **changes)
    stretched.svag_ell = ell
    return stretched


def _stretched(name: str, value: float, ell: float) -> float:
    """ℓ times a number of steps; a ratio below 1 stays.

    Args:
        name: The argument's name, for the error.
        value: A number of steps, or a ratio of them.
        ell: ℓ.

    Returns:
        An integer, or the ratio.

    Raises:
        UserError: If the product is no integer.
    """
    if value < 1:
        return value
    product = ell * value
    if not math.isclose(product, round(product), rel_tol=1e-12):
        raise UserError(
            f"SVAG with ell={ell:g} stretches {name}={value:g} to {product:g}, which is no integer. "
            f"Choose ell or {name} so that their product is one."
        )
    return round(product)


def _stretched_schedule(settings: dict | None, ell: float) -> dict | None:
    if not settings:
        return settings
    steps = {key: _stretched(key, settings[key], ell) for key in _STEPS_OF_SCHEDULES if settings.get(key)}
    rates = {key: settings[key] / ell for key in _RATES_OF_SCHEDULES if settings.get(key)}
    return settings | steps | rates


def _without_rounding(value: float) -> float:
    # 2 · 1.1 · 3 is 6.6000000000000005 in float64, and the Trainer would round the number of steps up.
    return float(f"{value:.12g}")

"""Build the optimizer of a run, and tell what was asked of it: every parameter group says so itself."""

from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from hf_momentum.errors import UserError
from hf_momentum.optim import SGDM, MomentumSchedule, create_optimizer, get_optimizer_info, svag_coefficients

_REQUEST = "requested_hyperparameters"
_COMPARED = ("optim", "lr", "lr_form", "momentum", "weight_decay", "ell", "momentum_schedule")


def build_optimizer(
    model_or_params: nn.Module | ParamsT,
    *,
    optim: str,
    lr: float,
    lr_form: str = "effective",
    momentum: float | None = None,
    ell: float | None = None,
    weight_decay: float = 0.0,
    momentum_schedule: MomentumSchedule | None = None,
) -> torch.optim.Optimizer:
    """Build `sgd`, `sgdm`, or the optimizer under `svag`, whose learning rate is η/ℓ.

    Every group holds `optim`, `lr_form`, `requested_lr` (as given), `ell` and `momentum_schedule`, so that a
    checkpoint says how it was made.

    Args:
        model_or_params: As for `create_optimizer`.
        optim: One of `list_optimizers()`.
        lr: η, or γ under `lr_form="heavy_ball"`.
        lr_form: `effective` or `heavy_ball`.
        momentum: β; None takes the optimizer's default.
        ell: ℓ of `svag`, which needs it.
        weight_decay: L2 penalty; of a model it spares biases and norms.
        momentum_schedule: β over the steps, for `sgdm`; in place of `momentum`.

    Returns:
        The optimizer.

    Raises:
        UserError: If a value is not allowed, or a hyperparameter is given to an optimizer that has none.
    """
    info = get_optimizer_info(optim)
    if (ell is not None) != (optim == "svag"):
        needs = "svag needs ell, its ℓ: a real number of at least 1."
        raise UserError(needs if ell is None else f"ell={ell:g}: {optim} has none. ℓ belongs to svag.")
    if momentum_schedule is not None:
        _check_schedule(optim, momentum, lr_form)
    momentum = info.defaults["momentum"] if momentum is None else momentum
    settings = {"weight_decay": weight_decay, "momentum": momentum, "lr_form": lr_form}
    if ell is not None:
        svag_coefficients(ell)
    optimizer = create_optimizer(
        "sgdm" if optim == "svag" else optim, model_or_params, lr=lr / (1 if ell is None else ell), **settings
    )
    for group in optimizer.param_groups:
        group |= {"optim": optim, "lr_form": lr_form, "requested_lr": lr, "ell": ell, "momentum_schedule": None}
    if momentum_schedule is not None:
        note_schedule(optimizer, momentum_schedule)
    request_hyperparameters(optimizer)
    return optimizer


def _check_schedule(optim: str, momentum: float | None, lr_form: str) -> None:
    if optim != "sgdm":
        why = "SVAG keeps β fixed" if optim == "svag" else f"{optim} has no momentum"
        raise UserError(f"momentum_schedule: {why}. A schedule belongs to sgdm.")
    if momentum is not None:
        raise UserError(f"momentum={momentum:g} and momentum_schedule both say what β is. Give one of them.")
    if lr_form != "effective":
        raise UserError(
            "lr_form='heavy_ball' has no meaning under a momentum schedule: η = γ/(1−β) would change with β. "
            "Give the effective learning rate η."
        )


def describe_schedule(schedule: MomentumSchedule) -> str:
    """Name a momentum schedule, the same in every process.

    Args:
        schedule: One of ours, or any function of step, total steps and learning rate.

    Returns:
        The schedule with its attributes, or the name of the function.
    """
    if is_dataclass(schedule):
        return repr(schedule)
    named = schedule if hasattr(schedule, "__qualname__") else type(schedule)
    return f"{named.__module__}.{named.__qualname__}"


def note_schedule(optimizer: torch.optim.Optimizer, schedule: MomentumSchedule) -> None:
    """Prepare an optimizer for a momentum schedule: its groups name it, and keep their buffer where β starts at 0.

    Args:
        optimizer: An `SGDM` without wrappers.
        schedule: The schedule that will drive it.

    Raises:
        UserError: If the optimizer is no `SGDM`, whose steps stay Eq. 3 while β changes.
    """
    if not isinstance(optimizer, SGDM):
        raise UserError(
            f"A momentum schedule needs SGDM, and this is {type(optimizer).__name__}: torch's own SGD leaves its "
            "buffer stale at momentum 0 and keeps its dampening."
        )
    for group in optimizer.param_groups:
        group["momentum_schedule"] = describe_schedule(schedule)
        if group["keep_buffer"] is None:
            group["keep_buffer"] = True


def innermost_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside the wrappers of accelerate and DeepSpeed.

    Args:
        optimizer: An optimizer, or a wrapper that holds one in `.optimizer`.

    Returns:
        The optimizer whose groups the steps are made with.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def hyperparameters_of(group: dict[str, Any]) -> dict[str, Any]:
    """What a parameter group is trained with, apart from what schedules change from step to step.

    Args:
        group: A group of any optimizer with a learning rate.

    Returns:
        Plain values: `lr` is the one that a scheduler starts from; `momentum` is missing where a schedule drives it.
    """
    found = {key: group[key] for key in _COMPARED if key in group}
    found["lr"] = group.get("initial_lr", group["lr"])
    found.setdefault("momentum_schedule", None)
    if found["momentum_schedule"] is not None or "max_momentum" in group:  # the latter: OneCycleLR and CyclicLR
        found.pop("momentum", None)
    return {key: float(value) if torch.is_tensor(value) else value for key, value in found.items()}


def request_hyperparameters(optimizer: torch.optim.Optimizer) -> None:
    """Note on the optimizer what its groups hold now, where loading a checkpoint cannot overwrite it.

    Args:
        optimizer: An optimizer without wrappers.
    """
    setattr(optimizer, _REQUEST, [hyperparameters_of(group) for group in optimizer.param_groups if group["params"]])


def requested_hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]] | None:
    """What `request_hyperparameters` noted.

    Args:
        optimizer: An optimizer without wrappers.

    Returns:
        One entry per group that had parameters, or None if nothing was noted.
    """
    return getattr(optimizer, _REQUEST, None)

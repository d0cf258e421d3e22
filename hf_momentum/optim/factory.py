"""A small registry of the optimizers, and the parameter groups that the Trainer would make for them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from hf_momentum.errors import UserError
from hf_momentum.optim.schedules import unknown_name
from hf_momentum.optim.sgdm import SGDM

LR_FORMS = ("effective", "heavy_ball")
_KERNEL_KEYWORDS = ("maximize", "foreach", "fused", "differentiable")
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


@dataclass(frozen=True)
class OptimizerInfo:
    """What the registry knows of an optimizer.

    Attributes:
        name: The name that `create_optimizer` takes.
        description: One line.
        defaults: Read-only defaults of its hyperparameters; the learning rate has none.
        hyperparameters: Those of its own that a user may set, beside learning rate and weight decay.
        optimizer_class: The class that is built; None if the optimizer needs the training loop.
        keywords: Further keywords that `create_optimizer` passes to the class.
    """

    name: str
    description: str
    defaults: Mapping[str, float] = field(hash=False)
    hyperparameters: tuple[str, ...] = ("momentum",)
    optimizer_class: type[torch.optim.Optimizer] | None = SGDM
    keywords: tuple[str, ...] = _KERNEL_KEYWORDS


def _info(name: str, description: str, momentum: float, **kwargs: Any) -> OptimizerInfo:
    return OptimizerInfo(name, description, MappingProxyType({"momentum": momentum, "weight_decay": 0.0}), **kwargs)


_REGISTRY = {
    info.name: info
    for info in (
        _info("sgd", "Plain SGD, without any optimizer state", 0.0, hyperparameters=()),
        _info("sgdm", "SGD with momentum as an average of gradients (Eq. 3); one extra copy of the weights", 0.9),
        _info(
            "svag",
            "SGD's mean step with its gradient noise amplified by ℓ, from two mini-batches per step",
            0.0,
            hyperparameters=("momentum", "ell"),
            optimizer_class=None,
            keywords=(),
        ),
    )
}


def list_optimizers() -> list[str]:
    """List the names that `create_optimizer` knows.

    Returns:
        The names in alphabetical order.
    """
    return sorted(_REGISTRY)


def get_optimizer_info(name: str) -> OptimizerInfo:
    """Look an optimizer up.

    Args:
        name: One of `list_optimizers()`.

    Returns:
        Its description and defaults.

    Raises:
        UserError: If there is none of this name.
    """
    if name not in _REGISTRY:
        raise UserError(unknown_name("optimizer", name, _REGISTRY))
    return _REGISTRY[name]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group a model's trainable parameters as the Transformers Trainer does: biases and norms get no weight decay.

    Exempt are the parameters of `nn.LayerNorm` modules and those whose name holds `bias`, `layernorm`, `rmsnorm`, or a
    part that is `norm` or ends in `_norm`. Other norms are known by name only: BatchNorm weights called `bn1.weight`
    decay, as they do in the Trainer. The groups are the same two in the same order whatever they hold (one may be
    empty), so that checkpoints fit.

    Args:
        model: The model. A parameter that is tied is listed once, under its first name.
        weight_decay: Weight decay of the first group.

    Returns:
        The group that decays, then the one that does not; each with `params` and `weight_decay`.

    Raises:
        UserError: If no parameter requires a gradient.
    """
    exempt = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = _NO_DECAY.search(name.lower()) or name.startswith(tuple(exempt))
            (no_decay if is_exempt else decay).append(parameter)
    if not decay and not no_decay:
        raise UserError(f"{type(model).__name__} has no trainable parameters: none of them requires a gradient.")
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def create_optimizer(
    name: str,
    model_or_params: nn.Module | ParamsT,
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    momentum: float | None = None,
    lr_form: str = "effective",
    **kwargs: bool | None,
) -> torch.optim.Optimizer:
    """Make an optimizer by name.

    Args:
        name: One of `list_optimizers()`. `"svag"` needs the training loop and cannot be made here.
        model_or_params: A model, grouped by `parameter_groups`, or anything that `SGDM` takes, used as it is.
        lr: Learning rate, in the form that `lr_form` names.
        weight_decay: L2 penalty; of a model it spares biases and norms.
        momentum: β; None takes the optimizer's default, .9 for `"sgdm"`. `"sgd"` has none.
        lr_form: `"effective"` for η (Eq. 3) or `"heavy_ball"` for γ (Eq. 1), which is converted by `η = γ / (1−β)`.
            For `"sgd"` β is 0 and both mean the same: the SGD that matches a heavy-ball run with γ and β needs
            `effective_lr(γ, β)`.
        **kwargs: `maximize`, `foreach`, `fused` or `differentiable`.

    Returns:
        The optimizer, with `lr` in the effective form.

    Raises:
        UserError: If a name, keyword or value is not allowed.
    """
    info = get_optimizer_info(name)
    if info.optimizer_class is None:
        raise UserError(
            f"{name!r} is no optimizer alone: each of its steps needs two mini-batches from the training loop. "
            f"Use trainer_kwargs(model, optim={name!r}, ...) and pass the result to the Trainer."
        )
    for keyword in kwargs:
        if keyword not in info.keywords:
            allowed = ("lr", "weight_decay", "momentum", "lr_form", *info.keywords)
            raise UserError(unknown_name(f"keyword of optimizer {name!r}:", keyword, allowed))
    if lr_form not in LR_FORMS:
        raise UserError(unknown_name("lr_form", lr_form, LR_FORMS))
    if momentum is None:
        momentum = info.defaults["momentum"]
    elif name == "sgd" and momentum != 0:
        raise UserError(f"Invalid momentum value: {momentum}. 'sgd' has no momentum: leave it out, or use 'sgdm'.")
    if isinstance(model_or_params, nn.Module):
        model_or_params = parameter_groups(model_or_params, weight_decay)
    build = SGDM if lr_form == "effective" else SGDM.from_heavy_ball
    return build(model_or_params, lr=lr, momentum=momentum, weight_decay=weight_decay, **kwargs)

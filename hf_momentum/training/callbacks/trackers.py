"""Log the hyperparameters in force at each step, in time for the Trainer's trackers."""

import logging
from typing import Any

import torch
from transformers import TrainerCallback

from hf_momentum.optim import SGDM, effective_lr
from hf_momentum.training.optimizers import innermost_optimizer

logger = logging.getLogger(__name__)


class LogFirstCallbacks(list):
    """Callbacks for `Trainer(callbacks=...)`, of which those that extend the logs get each log before the trackers.

    The Trainer builds its list as `[its own, those of report_to] + callbacks`, and hands a log from one to the next:
    what a callback at the end adds to it comes too late for TensorBoard and the others. This list, when it is added to
    another, puts its members with a true attribute `extends_logs` in front. All else stays in order.
    """

    def __radd__(self, others: list[TrainerCallback]) -> list[TrainerCallback]:
        """Join the two lists; Python calls this in place of `others + self`.

        Args:
            others: The Trainer's own callbacks.

        Returns:
            A plain list.
        """
        first = [callback for callback in self if getattr(callback, "extends_logs", False)]
        for callback in first:
            callback.logs_first = True
        return [*first, *others, *(callback for callback in self if callback not in first)]


def logged_hyperparameters(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What a step of an optimizer is made with, under the names of the log.

    Args:
        optimizer: An optimizer without wrappers, at a step.

    Returns:
        `momentum`: β, of `SGDM` and `torch.optim.SGD`. `effective_lr`: η of Eq. 3, where it is exactly known: the
        learning rate of `SGDM` (η/ℓ under SVAG, the rate of its steps), and γ/(1−β) of `torch.optim.SGD` with neither
        dampening nor Nesterov's step nor a β that cycles. `ell`: ℓ under SVAG. A value on which the parameter groups
        differ is left out; an optimizer of another kind has none of them.
    """
    found = [group_hyperparameters(group, type(optimizer)) for group in optimizer.param_groups]
    return {key: value for key, value in found[0].items() if all(other.get(key) == value for other in found)}


def group_hyperparameters(group: dict[str, Any], kind: type[torch.optim.Optimizer]) -> dict[str, float]:
    """The same of one parameter group.

    Args:
        group: The group.
        kind: The optimizer's class.

    Returns:
        As `logged_hyperparameters`.
    """
    is_ours = issubclass(kind, SGDM)
    if not is_ours and kind is not torch.optim.SGD:
        return {}
    momentum, rate = group["momentum"], group["lr"]
    found = {"momentum": momentum}
    cycles = "max_momentum" in group  # OneCycleLR and CyclicLR
    if is_ours or not momentum:
        found["effective_lr"] = rate
    elif 0 < momentum < 1 and not (group["dampening"] or group["nesterov"] or cycles):
        found["effective_lr"] = effective_lr(rate, momentum)
    if group.get("ell") is not None:
        found["ell"] = group["ell"]
    return {key: float(value) for key, value in found.items()}


class HyperparameterLogCallback(TrainerCallback):
    """Adds `momentum`, `effective_lr` and `ell` to every log of a training step, beside the Trainer's `learning_rate`.

    The values are those of the step just made, taken when the optimizer makes it: the Trainer's scheduler has moved on
    by the time of the log. See `logged_hyperparameters` for what they are. They stand in `state.log_history`, and
    reach the trackers of `report_to` if the callbacks are given as `LogFirstCallbacks`, as `trainer_kwargs` does.
    """

    extends_logs = True
    logs_first = False  # set by LogFirstCallbacks

    def __init__(self):
        self._values: dict[str, float] = {}
        self._hook = None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        """Look at every step of the optimizer from now on."""
        if args.report_to and not self.logs_first:
            logger.warning(
                "%s stands behind the trackers (%s), which will not see its values. Give your callbacks to "
                "trainer_kwargs(..., callbacks=[...]), or all of them as LogFirstCallbacks([...]).",
                type(self).__name__,
                ", ".join(args.report_to),
            )
        self._stop()
        self._hook = innermost_optimizer(optimizer).register_step_pre_hook(self._note)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Extend the log of a training step."""
        if self._values and "loss" in logs:
            logs.update(self._values)
            state.log_history[-1].update(self._values)

    def on_train_end(self, args, state, control, **kwargs):
        """Take the hook off the optimizer."""
        self._stop()

    def _note(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._values = logged_hyperparameters(optimizer)

    def _stop(self) -> None:
        self._values = {}
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

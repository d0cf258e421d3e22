"""Keep the weights of the best evaluation in memory, and put them back when training ends."""

import torch
from torch import nn
from transformers import TrainerCallback

from hf_momentum.errors import UserError


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training changes: trainable parameters and buffers, shared ones once.

    Args:
        model: Any module.

    Returns:
        Name → tensor, not copied.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return parameters | dict(model.named_buffers())


def copy_into(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy a state of `trained_state` back into the model, in place.

    Args:
        model: The module that the state was taken from, or one of the same structure.
        state: Name → tensor, on any device.

    Raises:
        UserError: If the names are not those of this model.
    """
    own = trained_state(model)
    if own.keys() != state.keys():
        raise UserError(f"These weights are of another model; they differ in {sorted(own.keys() ^ state.keys())[:5]}.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


class BestWeightsCallback(TrainerCallback):
    """Restores the weights with the best value of a metric at the end of training, without writing checkpoints.

    An evaluation replaces the kept one only if it is strictly better, so the earliest of equals stays. The comparison
    is the callback's own: the Trainer updates `state.best_metric` only after `on_evaluate`. The copy lies in host
    memory. Where parameters are sharded (ZeRO-3, FSDP) use `save_strategy="best"` with `load_best_model_at_end`.

    Args:
        metric: Name of the metric, as the Trainer reports it with or without `eval_`; larger is better.
    """

    def __init__(self, metric: str = "accuracy"):
        self.metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        self.best_value: float | None = None
        self.best_step: int | None = None
        self._best_state: dict[str, torch.Tensor] | None = None
        self._training = False

    def on_train_begin(self, args, state, control, **kwargs):
        """Forget what an earlier training kept."""
        self.best_value = self.best_step = self._best_state = None
        self._training = True

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        """Keep a copy of the weights if this evaluation, one during training, is the best so far."""
        if not self._training:
            return
        if self.metric not in metrics:
            raise UserError(f"No metric {self.metric!r} in this evaluation; there are {sorted(metrics)}.")
        if self.best_value is None or metrics[self.metric] > self.best_value:
            self.best_value, self.best_step = metrics[self.metric], state.global_step
            self._best_state = {name: t.detach().to("cpu", copy=True) for name, t in trained_state(model).items()}

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Put the best weights back."""
        self._training = False
        if self._best_state is not None:
            copy_into(model, self._best_state)
            self._best_state = None

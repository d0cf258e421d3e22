"""Drives `SVAGCallback` by hand, event by event, as the Trainer would."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from torch import Tensor, nn

from hf_momentum.training.callbacks.svag import SVAGCallback


@contextmanager
def training(callback: SVAGCallback, model: nn.Module, accumulation: int, **changes) -> Iterator[Callable]:
    """From train begin to train end; gives a function that does one step's backward passes."""
    defaults = {"max_grad_norm": 0.0, "n_gpu": 0, "ignore_data_skip": False}
    args = SimpleNamespace(gradient_accumulation_steps=accumulation, **defaults | changes)
    control = SimpleNamespace(should_epoch_stop=False, should_training_stop=False)
    event = (args, SimpleNamespace(global_step=0), control)
    callback.on_train_begin(*event, model=model, train_dataloader=range(accumulation))

    def step(loss_of: Callable[[int], Tensor], backward: Callable[[Tensor], None] = Tensor.backward) -> None:
        callback.on_step_begin(*event)
        for index in range(accumulation):
            if index:
                callback.on_substep_end(*event)
            backward(loss_of(index) / accumulation)
        callback.on_pre_optimizer_step(*event)
        callback.on_epoch_end(*event)

    yield step
    callback.on_train_end(*event, model=model)

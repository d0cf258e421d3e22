"""A stock Trainer on the tiny classifier, for tests that look at what training did."""

import torch
from tiny_models import TokenRows, tiny_classifier
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_momentum import trainer_kwargs

PLAIN = {
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
HALF = {"save_strategy": "steps", "save_steps": 3}


def arguments(folder, cls=TrainingArguments, **changes) -> TrainingArguments:
    return cls(output_dir=str(folder), **PLAIN | changes)


def stock_trainer(folder, changes=None, model=None, rows=None, callbacks=(), **given) -> Trainer:
    """A Trainer with what `trainer_kwargs(**given)` makes, SGDM at 0.5 unless told otherwise."""
    model = tiny_classifier().double() if model is None else model
    settings = {"optim": "sgdm", "lr": 0.5} | given
    args = arguments(folder, **changes or {})
    kwargs = trainer_kwargs(model, callbacks=callbacks, **settings)
    return Trainer(model=model, args=args, train_dataset=rows or TokenRows(), **kwargs)


def saved_at_half(folder, changes=None, **given) -> str:
    """Train, and name the checkpoint that was saved after three steps of six."""
    stock_trainer(folder, HALF | (changes or {}), **given).train()
    return f"{folder}/checkpoint-3"


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Watch(TrainerCallback):
    """Keeps the first group's momentum and learning rate as each step finds them."""

    def __init__(self):
        self.momenta, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.momenta.append(optimizer.param_groups[0]["momentum"])
        self.rates.append(optimizer.param_groups[0]["lr"])

"""Trains a tiny classifier with plain SGD and saves its weights: run by a test, in one process or in several."""

import sys

import torch
from stock_trainer import arguments
from tiny_models import TokenRows, tiny_classifier
from transformers import Trainer

from hf_momentum import MomentumTrainingArguments, trainer_kwargs
from hf_momentum.command import leave_process_group


def train(output: str, batch: int, accumulation: int, mend: bool = True) -> None:
    args = arguments(
        output,
        MomentumTrainingArguments,
        optim="sgd",
        learning_rate=0.5,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
    )
    model = tiny_classifier().double()
    kwargs = trainer_kwargs(model, args)
    if not mend:
        del model.accepts_loss_kwargs, kwargs["callbacks"]  # the guard would raise
    trainer = Trainer(model=model, args=args, train_dataset=TokenRows(), **kwargs)
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save({"world_size": args.world_size, "weights": model.state_dict()}, f"{output}/weights.pt")


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    leave_process_group()

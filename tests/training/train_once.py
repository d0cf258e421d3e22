"""Trains a tiny classifier with plain SGD and saves its weights: run by a test, in one process or in several."""

import sys

import torch
from tiny_models import TokenRows, tiny_classifier
from transformers import Trainer

from hf_momentum import MomentumTrainingArguments, trainer_kwargs
from hf_momentum.training.command_line import leave_process_group


def train(output: str, batch: int, accumulation: int, mend: bool = True) -> None:
    args = MomentumTrainingArguments(
        output_dir=output,
        optim="sgd",
        learning_rate=0.5,
        max_steps=6,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
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

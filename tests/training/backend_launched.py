"""Says how a launcher started it, and trains a few steps with a stock Trainer: run by the tests of the launchers."""

import contextlib
import json
import os
import sys

from accelerate import PartialState
from backend_run import cpu_as_accelerator, full_weights, use_gloo_alone
from stock_trainer import arguments
from tiny_models import TokenRows, tiny_classifier
from torch import distributed as dist
from transformers import Trainer

from hf_momentum import trainer_kwargs
from hf_momentum.command import leave_process_group


def main(output: str) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        use_gloo_alone()
    shards = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if shards:
        dist.init_process_group("gloo")
    with cpu_as_accelerator() if shards else contextlib.nullcontext():
        train(output)


def train(output: str) -> None:
    args = arguments(
        f"{output}-out",
        max_steps=4,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", 1)),
        lr_scheduler_type="constant",
    )
    model = tiny_classifier()
    kwargs = trainer_kwargs(model, args, optim="sgdm", lr=0.1)
    trainer = Trainer(model=model, args=args, train_dataset=TokenRows(), **kwargs)
    trainer.train()
    weights = full_weights(trainer.model).double()
    if trainer.is_world_process_zero():
        facts = {
            "world_size": args.world_size,
            "type": PartialState().distributed_type.value,
            "zero": trainer.deepspeed.zero_optimization_stage() if trainer.deepspeed is not None else None,
            "weights": weights.tolist(),
        }
        with open(output, "w") as file:
            json.dump(facts, file)


if __name__ == "__main__":
    main(sys.argv[1])
    leave_process_group()

"""Walks into the traps of DeepSpeed: cases for `backend_run.py`, each of which returns what was seen.

Those that begin with `bare` show the libraries alone, the others this package.
"""

import os
from unittest import mock

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from backend_run import CONFIGS, RATE, build, innermost, shared_folder, zero_config
from tiny_models import TokenRows, tiny_classifier
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_momentum import SGDM
from hf_momentum.errors import UserError
from hf_momentum.training.callbacks.guard import MomentumGuard


def arguments(config: dict, **changes) -> TrainingArguments:
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "max_grad_norm": 0.0, "save_strategy": "no"}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    return TrainingArguments(output_dir=shared_folder(), deepspeed=config, **settings | quiet | changes)


def train_bare(config: dict, *callbacks: TrainerCallback, **kwargs) -> Trainer:
    """A stock Trainer without this package; `optimizers` may be a function of the model."""
    args = arguments(config, **kwargs.pop("changes", {}))
    model = tiny_classifier()
    model.accepts_loss_kwargs = False
    if "optimizers" in kwargs:
        kwargs["optimizers"] = kwargs["optimizers"](model)
    trainer = Trainer(model=model, args=args, train_dataset=TokenRows(), callbacks=list(callbacks), **kwargs)
    trainer.train()
    return trainer


def message(function, *args, **kwargs) -> str:
    """The message of the UserError that a call raises, or what it raised or did instead."""
    try:
        function(*args, **kwargs)
    except UserError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__} instead of UserError: {error}"
    return "no error"


def bare_optimizers() -> str:
    """Trap 2: the optimizer that trains after `Trainer(optimizers=(torch's SGD, None))`."""

    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=RATE), None

    return type(innermost(train_bare(zero_config(2), optimizers=sgd).optimizer)).__name__


def guarded_optimizers() -> str:
    """Trap 2: the message of `MomentumGuard(opt)`."""
    args, model = arguments(zero_config(2)), tiny_classifier()
    model.accepts_loss_kwargs = False
    optimizer = SGDM(model.parameters(), lr=RATE)
    guard = MomentumGuard(optimizer)
    return message(
        Trainer(model, args, train_dataset=TokenRows(), optimizers=(optimizer, None), callbacks=[guard]).train
    )


class Watch(TrainerCallback):
    """Notes what `on_pre_optimizer_step` sees of the gradients, and whether the weights have changed by then."""

    def __init__(self):
        self.gradients = self.moved = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = next(model.parameters()).detach().clone()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = sum(p.grad is not None for p in model.parameters())
        self.moved = not torch.equal(self.before, next(model.parameters()))


def bare_steps() -> dict:
    """Traps 4 and 5: calls of the inner `step()` for two optimizer steps, and the gradients before a step."""
    calls, watch = [], Watch()
    counted = register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(type(optimizer).__name__))
    chosen = (torch.optim.SGD, {"lr": RATE})
    train_bare(zero_config(2), watch, optimizer_cls_and_kwargs=chosen, changes={"weight_decay": 0.01})
    counted.remove()
    return {"calls": calls.count("SGD"), "gradients": watch.gradients, "moved": watch.moved}


def resumed(cls: type[torch.optim.Optimizer], **hyperparameters: float) -> str:
    """The message when a checkpoint of `optimizer_cls_and_kwargs=(a class, …)` is resumed with our factory."""
    chosen = (cls, {"lr": RATE} | hyperparameters)
    changes = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2, "weight_decay": 0.01}
    saved = train_bare(zero_config(2), optimizer_cls_and_kwargs=chosen, changes=changes).args.output_dir
    trainer = build(shared_folder(), "zero2", "sgdm", gradient_accumulation_steps=1, per_device_train_batch_size=2)
    return message(trainer.train, resume_from_checkpoint=f"{saved}/checkpoint-1")


def checkpoint_of_torch_sgd() -> str:
    return resumed(torch.optim.SGD, momentum=0.8)


def checkpoint_of_sgdm() -> str:
    return resumed(SGDM, momentum=0.8)


def other_momentum() -> str:
    """Trap 8 under ZeRO-2: the message when a checkpoint of momentum 0.8 is resumed at 0."""
    first = build(shared_folder(), "zero2", "sgdm", save_strategy="steps", save_steps=1, max_steps=1)
    first.train()
    second = build(shared_folder(), "zero2", "sgd")
    return message(second.train, resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-1")


def as_launched(plugin: DeepSpeedPlugin) -> Accelerator:
    """An Accelerator as under `accelerate launch --use_deepspeed`."""
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_DEEPSPEED": "true"}):
        return Accelerator(deepspeed_plugin=plugin)


def offloaded(config: dict) -> str:
    """The class that accelerate hands to DeepSpeed in place of SGD under ZeRO-Offload."""
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    plugin = DeepSpeedPlugin(hf_ds_config=config | {"train_micro_batch_size_per_gpu": 4, "train_batch_size": "auto"})
    accelerator = as_launched(plugin)
    model = tiny_classifier()
    loader = DataLoader(TokenRows(), batch_size=4)

    class Stop(Exception):
        pass

    def initialize(optimizer=None, **kwargs):  # what DeepSpeed would be handed
        raise Stop(type(optimizer).__name__)

    class DeepSpeedCPUAdam:  # the real one would compile for minutes
        def __init__(self, *args, **kwargs):
            pass

    stand_in = mock.patch("deepspeed.ops.adam.DeepSpeedCPUAdam", DeepSpeedCPUAdam)
    with stand_in, mock.patch("deepspeed.initialize", initialize):
        try:
            accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE), loader)
        except Stop as seen:
            return str(seen)


def offload() -> str:
    return offloaded(zero_config(2))


def bare_offload() -> str:
    config = zero_config(2)
    del config["zero_force_ds_cpu_optimizer"]
    return offloaded(config)


def bare_clipping() -> float:
    """The clipping norm that an Accelerate loop gets from `"gradient_clipping": "auto"`."""
    plugin = DeepSpeedPlugin(hf_ds_config=str(CONFIGS / "zero2.json"))
    accelerator = as_launched(plugin)
    model = tiny_classifier()
    engine, *_ = accelerator.prepare(model, SGDM(model.parameters(), lr=RATE), DataLoader(TokenRows(), batch_size=4))
    return engine.gradient_clipping()

"""Trains a tiny classifier with a stock Trainer, one backend after another: run by tests, in one process or several.

`backend_run.py OUTPUT CASE...` writes an outcome per case to the file OUTPUT. A case is `backend:optimizer[:variant]`,
such as `plain:sgd` or `zero3:sgdm:resume`. One launch takes many cases, because starting costs more than they do.

Backends: `plain` (DDP in several processes), `zero0` to `zero3`, `fsdp` (the Trainer's own FSDP2) and `sharded` (FSDP2
by `from_pretrained(distributed_config=...)`). A case with a dot is a function to call, such as `backend_fsdp.kernels`.
"""

import contextlib
import gc
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from tiny_models import TokenRows, tiny_classifier
from torch import distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import Subset
from transformers import RobertaForSequenceClassification, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_momentum import trainer_kwargs
from hf_momentum.command import leave_process_group

CONFIGS = Path(__file__).parents[2] / "recipes" / "deepspeed"
STEPS, ROWS_PER_STEP, RATE, ELL = 8, 8, 0.5, 4.0
OPTIMIZERS = {
    "sgd": {"optim": "sgd"},
    "sgdm": {"optim": "sgdm", "momentum": 0.8},
    "svag1": {"optim": "svag", "ell": ELL},
    "svag2": {"optim": "svag", "ell": ELL},
    "schedule": {
        "optim": "sgdm",
        "momentum_schedule": "linear",
        "momentum_schedule_kwargs": {"start": 0.0, "end": 0.9},
    },
}
RAGGED = {"rows": 70, "max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 1}
VARIANTS = {
    "": {},
    "resume": {"save_strategy": "steps", "save_steps": STEPS // 2},
    "once": {"max_steps": 1, "lr_scheduler_type": "constant", "weight_decay": 0.0},
    "ragged": RAGGED,
    "drop": RAGGED | {"dataloader_drop_last": True},
    "refilled": RAGGED | {"again": 2},
}


def use_gloo_alone() -> None:
    """Spare DeepSpeed the compilation of its shared-memory collectives (100 s on two cores); torch's gloo serves."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero_config(stage: int) -> dict:
    """The recipes' configuration; ZeRO-3 would keep every parameter of so small a model whole, so that is off."""
    config = json.loads((CONFIGS / f"zero{stage}.json").read_text())
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def backend_arguments(backend: str) -> dict:
    """What a backend adds to the training arguments."""
    if backend.startswith("zero"):
        return {"deepspeed": zero_config(int(backend[-1]))}
    if backend == "fsdp":
        wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["RobertaLayer"]}
        return {"fsdp": True, "fsdp_config": {"version": 2, **wrap}}
    return {}


@contextlib.contextmanager
def cpu_as_accelerator() -> Iterator[None]:
    """Let accelerate take CPU processes for those of an accelerator: only then does it shard by FSDP.

    On the CPU proper, accelerate 1.15 drops `fsdp=True` without a word and trains with DDP.
    """
    prepare = PartialState._prepare_backend

    def prepared(self, *args, **kwargs):
        return prepare(self, *args, **kwargs)[0], DistributedType.MULTI_GPU

    def set_device(self):
        self.device = torch.device("cpu")

    with mock.patch.multiple(PartialState, _prepare_backend=prepared, set_device=set_device):
        yield


def build_model(backend: str, seed: int, folder: str) -> RobertaForSequenceClassification:
    """The tiny classifier; for `sharded` loaded from a folder."""
    if backend != "sharded":
        return tiny_classifier(seed)
    if dist.get_rank() == 0:
        tiny_classifier(seed).save_pretrained(f"{folder}/model-{seed}")
    dist.barrier()
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    return RobertaForSequenceClassification.from_pretrained(f"{folder}/model-{seed}", distributed_config=config)


def build(
    folder: str, backend: str, optimizer: str, seed: int = 0, rows: int = 32, again: int = 0, **changes
) -> Trainer:
    """A stock Trainer with one of `OPTIMIZERS`: eight rows a step, whatever the number of processes.

    After the last of the rows the first ones come `again`.
    """
    accumulation = changes.setdefault("gradient_accumulation_steps", 4 if optimizer == "svag2" else 2)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    settings = {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS_PER_STEP // (accumulation * processes),
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "weight_decay": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(**settings | backend_arguments(backend) | changes)
    model = build_model(backend, seed, folder)
    kwargs = trainer_kwargs(model, args, lr=RATE, **OPTIMIZERS[optimizer])
    data = Subset(TokenRows(rows), [*range(rows), *range(again)])
    return Trainer(model=model, args=args, train_dataset=data, **kwargs)


def full_weights(model: nn.Module) -> torch.Tensor:
    """All parameters in one vector, gathered where ZeRO-3 or FSDP shards them."""
    parameters = list(model.parameters())
    gather = contextlib.nullcontext()
    if hasattr(parameters[0], "ds_id"):
        import deepspeed

        gather = deepspeed.zero.GatheredParameters(parameters)
    with gather:
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
        return torch.cat([p.detach().flatten() for p in whole])


def innermost(optimizer) -> torch.optim.Optimizer:
    """The optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def outcome(trainer: Trainer) -> dict:
    """What the tests compare."""
    inner = innermost(trainer.optimizer)
    tensors = [t for state in inner.state.values() for t in state.values() if torch.is_tensor(t)]
    return {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "weights": full_weights(trainer.model),
        "world_size": trainer.args.world_size,
        "zero": trainer.deepspeed.zero_optimization_stage() if trainer.deepspeed is not None else None,
        "fsdp": trainer.is_fsdp_enabled,
        "optimizer": type(inner).__name__,
        "momenta": [group["momentum"] for group in inner.param_groups],
        "state_elements": sum((t.to_local() if hasattr(t, "to_local") else t).numel() for t in tensors),
        "parameter_type": type(next(trainer.model.parameters())).__name__,
    }


def shared_folder() -> str:
    """A temporary folder, the same in every process."""
    folder = [tempfile.mkdtemp()]
    if dist.is_initialized():
        dist.broadcast_object_list(folder)
    return folder[0]


def run_case(case: str) -> dict:
    """Train; with `:resume` save at half time and let another Trainer, on another model, go on from there."""
    backend, optimizer, variant = [*case.split(":"), ""][:3]
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # which a case before has left there
    folder, steps = shared_folder(), []
    with contextlib.ExitStack() as stack:
        counted = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: steps.append(type(optimizer)))
        stack.callback(counted.remove)
        if backend == "fsdp":
            stack.enter_context(cpu_as_accelerator())
        trainer = build(folder, backend, optimizer, **VARIANTS[variant])
        trainer.train()
        if variant == "resume":
            del trainer
            gc.collect()
            trainer = build(folder, backend, optimizer, seed=1)
            trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
        inner_steps = sum(kind.__name__ == "SGDM" for kind in steps)
        return outcome(trainer) | {"inner_steps": inner_steps, "global_step": trainer.state.global_step}


def call(name: str):
    """Call a function of another script, with accelerate as in a new process."""
    module, function = name.split(".")
    AcceleratorState._reset_state(reset_partial_state=True)
    return getattr(importlib.import_module(module), function)()


def main(output: str, *cases: str) -> None:
    if any(case.startswith(("zero", "backend_traps")) for case in cases):
        use_gloo_alone()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    outcomes = {}
    for case in cases:
        outcomes[case] = call(case) if "." in case else run_case(case)
        gc.collect()
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(outcomes, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_process_group()

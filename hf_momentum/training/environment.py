"""What a record says beside the settings: the command, the hardware, the data's source, the learning curve."""

import math
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hf_momentum.tasks.demo import DEMO_TASKS
from hf_momentum.tasks.hub import HUB_SOURCES


def hardware(device: torch.device) -> dict[str, Any]:
    """What the run computes on; every process has to call it.

    Args:
        device: Of this process.

    Returns:
        `devices` (the name of every process's accelerator, empty on a CPU), `cpu` (the processor's model) and `cores`
        (those that this process may use).
    """
    from accelerate.utils import gather_object  # here, since it takes seconds to import

    names = [] if device.type == "cpu" else [torch.get_device_module(device).get_device_name(device)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"devices": gather_object(names), "cpu": _cpu_model(), "cores": cores}


def _cpu_model() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def learning_curve(log_history: Iterable[dict[str, Any]], split: str = "dev") -> list[dict[str, Any]]:
    """The points of a run's learning curve.

    Args:
        log_history: Of the Trainer's state.
        split: What the Trainer evaluates on while it trains: `dev` or `test`.

    Returns:
        One entry per step with a log: `step`, and as they were logged `train_loss` (since the log before),
        `SPLIT_accuracy` and `SPLIT_loss`. A value that is not finite is None.
    """
    names = {"loss": "train_loss", "eval_accuracy": f"{split}_accuracy", "eval_loss": f"{split}_loss"}
    points: dict[int, dict[str, Any]] = {}
    for log in log_history:
        found = {names[key]: value if math.isfinite(value) else None for key, value in log.items() if key in names}
        if found:
            points.setdefault(log["step"], {"step": log["step"]}).update(found)
    return list(points.values())


def data_source(task_name: str, data_dir: str | None = None, hub_id: str | None = None) -> dict[str, Any]:
    """Where `load_fewshot` takes a task's data from, as a record states it.

    Args:
        task_name: The task.
        data_dir: The user's folder, if one is given.
        hub_id: The user's data set on the Hub, if one is given.

    Returns:
        `source`: `folder`, `demo` or `hub`; of the Hub also `id`, `config` and, for a known task, the `split` to test
        on.
    """
    if data_dir is not None:
        return {"source": "folder"}
    if hub_id is not None:
        path, _, config = hub_id.partition(":")
        return {"source": "hub", "id": path, "config": config or None}
    if task_name in DEMO_TASKS:
        return {"source": "demo"}
    known = HUB_SOURCES[task_name]
    split = known.test_splits[0] if len(known.test_splits) == 1 else None
    return {"source": "hub", "id": known.path, "config": known.config, "split": split}


def hub_model(model: str) -> str | None:
    """The model's id, if it is one on the Hub.

    Args:
        model: What was given as the model.

    Returns:
        The id; None for the demo and for a local folder, which transformers prefers to an id of the same name.
    """
    return None if model == "demo" or Path(model).exists() else model

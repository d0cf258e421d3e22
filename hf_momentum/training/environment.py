"""What a record says beside the settings: the command, the hardware, the data's source, the learning curve."""

import math
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from hf_momentum.tasks.demo import DEMO_TASKS
from hf_momentum.tasks.hub import HUB_SOURCES

_LAUNCHERS = ("accelerate", "torchrun", "deepspeed")
_MODULES = ("accelerate.", "torch.distributed.", "deepspeed.")  # after python -m


def command_line() -> str:
    """The command that started this process, with the launcher around it as far as it can be known.

    On Linux the launcher's own words are read from the parent process. Elsewhere the environment tells its name, and
    under torchrun the number of processes on this machine. Values of options that end in `token` are hidden.

    Returns:
        The command, quoted for a shell.
    """
    words, parent = sys.argv, _parent_words()
    launched = parent[-len(words) :] == words and any(map(_is_launcher, parent[: -len(words)]))
    return shlex.join(_without_tokens(_shortened(parent) if launched else [*_launcher(), *words]))


def _parent_words() -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    return []


def _is_launcher(word: str) -> bool:
    return Path(word).name in _LAUNCHERS or word.startswith(_MODULES)


def _shortened(words: Sequence[str]) -> list[str]:
    """The same without the interpreter's and the launcher's folders."""
    words = [Path(words[0]).name, *words[1:]]
    if words[0].startswith("python"):
        words = ["python", *words[1:]]
        if Path(words[1]).name in _LAUNCHERS:
            words = [Path(words[1]).name, *words[2:]]
    return words


def _launcher() -> list[str]:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    return ["accelerate", "launch"] if "ACCELERATE_MIXED_PRECISION" in os.environ else ["python"]


def _without_tokens(words: Sequence[str]) -> list[str]:
    shown = []
    for previous, word in zip(["", *words], words, strict=False):
        name, equals, _ = word.partition("=")
        if previous.startswith("--") and previous.endswith("token"):
            word = "HIDDEN"
        elif equals and name.startswith("--") and name.endswith("token"):
            word = f"{name}=HIDDEN"
        shown.append(word)
    return shown


def hardware(device: torch.device) -> dict[str, Any]:
    """What the run computes on; every process has to call it.

    Args:
        device: Of this process.

    Returns:
        `devices` (the name of every process's accelerator, empty on a CPU), `cpu` (the processor's model) and `cores`
        (those that this process may use).
    """
    names = [] if device.type == "cpu" else [torch.get_device_module(device).get_device_name(device)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"devices": gather_object(names), "cpu": _cpu_model(), "cores": cores}


def _cpu_model() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def learning_curve(log_history: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of a run's learning curve.

    Args:
        log_history: Of the Trainer's state.

    Returns:
        One entry per step with a log: `step`, and as they were logged `train_loss` (since the log before),
        `dev_accuracy` and `dev_loss`. A value that is not finite is None.
    """
    names = {"loss": "train_loss", "eval_accuracy": "dev_accuracy", "eval_loss": "dev_loss"}
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

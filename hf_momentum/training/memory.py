"""Peak memory of a run and the bytes of an optimizer's state."""

import contextlib
import resource
import sys
from pathlib import Path

import torch

from hf_momentum.training.optimizers import innermost_optimizer

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak: of the accelerator, or on the CPU of the process where the kernel allows it.

    Args:
        device: Where the run computes.
    """
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """The peak since `reset_peak_memory`.

    Args:
        device: Where the run computes.

    Returns:
        Bytes allocated on the current accelerator; on the CPU the process's peak resident memory (Linux: since the
        reset; elsewhere since its start).
    """
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def optimizer_state_bytes(optimizer) -> int:
    """Bytes of all tensors in an optimizer's state on this process.

    Args:
        optimizer: A torch optimizer, or a wrapper that holds one in `.optimizer` (accelerate's, DeepSpeed's).

    Returns:
        The bytes; 0 for plain SGD.
    """
    state = innermost_optimizer(optimizer).state
    tensors = [t for entry in state.values() for t in entry.values() if torch.is_tensor(t)]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]  # this process's part of a sharded one
    return sum(t.numel() * t.element_size() for t in local)

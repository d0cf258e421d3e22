"""Peak memory of a run and the bytes of an optimizer's state."""

import contextlib
import resource
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Begin a new peak: of the accelerator if there is one, of the process where the kernel allows it."""
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5")


def peak_memory_bytes() -> int:
    """The peak since `reset_peak_memory`.

    Returns:
        Bytes allocated on the current accelerator; without one, the process's peak resident memory (Linux: since the
        reset; elsewhere since its start).
    """
    if torch.accelerator.is_available():
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
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors)

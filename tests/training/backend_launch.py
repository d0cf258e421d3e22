"""Starts scripts in several processes on this machine, and ends what it started if they take too long."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

TESTS = Path(__file__).parents[1]


def free_port() -> int:
    """A port that nobody listens on, on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**changes: str) -> dict[str, str]:
    """Our own without what a launcher reads, with the tests' modules importable and one thread a process."""
    unset = ("ACCELERATE_", "FSDP_", "MASTER_", "DS_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unset)}
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "training"), kept.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"} | changes


def start(command: list, **changes: str) -> subprocess.Popen:
    """Start a command in the repository, as the leader of a process group of its own."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=TESTS.parent,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float) -> tuple[int, str]:
    """Wait for a command; return its status and what it printed."""
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher ends its workers, which have process groups of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run(command: list, timeout: float = 240, **changes: str) -> tuple[int, str]:
    """Run a command; return its status and what it printed."""
    return finish(start(command, **changes), timeout)


def torchrun(processes: int, script: str | Path, *words: object, timeout: float = 240) -> str:
    """Run a script of this folder, or any other, in several processes; return what they printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    status, output = run([*launcher, TESTS / "training" / script, *words], timeout)
    assert status == 0, output[-6000:]
    return output


def accelerate(*words: object, timeout: float = 240) -> tuple[int, str]:
    """Run `accelerate launch` with the given words; return its status and what it printed."""
    return run([sys.executable, "-m", "accelerate.commands.launch", *words], timeout)


def outcomes(tmp_path_factory: pytest.TempPathFactory, name: str, processes: int, *cases: str) -> dict:
    """What `backend_run.py` says of the cases; launched once, by whichever of xdist's workers comes first."""
    root = tmp_path_factory.getbasetemp()
    file = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / f"{name}.pt"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            torchrun(processes, "backend_run.py", file, *cases)
    return torch.load(file, weights_only=True)

"""What DeepSpeed, FSDP and the launchers do without this package. A test that fails says that a release mended it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

TRAINING = Path(__file__).parents[1] / "training"
sys.path.insert(0, str(TRAINING))

from backend_launch import accelerate, free_port, torchrun  # noqa: E402

pytestmark = pytest.mark.upstream
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
SEEN = """
import os
from accelerate import PartialState
print("processes:", PartialState(cpu=True).num_processes)
"""


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("traps") / "seen.pt"
    names = ["bare_optimizers", "bare_steps", "bare_offload", "bare_clipping"]
    torchrun(1, "backend_run.py", output, *(f"backend_traps.{name}" for name in names))
    return torch.load(output, weights_only=True)


@needs_deepspeed
def test_trap_2_deepspeed_trains_with_adamw_instead_of_the_optimizer_given(deepspeed):
    assert deepspeed["backend_traps.bare_optimizers"] == "AdamW"


@needs_deepspeed
def test_trap_4_the_inner_step_is_called_once_per_group(deepspeed):
    assert deepspeed["backend_traps.bare_steps"]["calls"] == 4  # two groups, two steps


@needs_deepspeed
def test_trap_5_the_update_is_over_before_the_callback_that_comes_before_it(deepspeed):
    assert deepspeed["backend_traps.bare_steps"]["gradients"] == 0
    assert deepspeed["backend_traps.bare_steps"]["moved"]


@needs_deepspeed
def test_offload_replaces_sgd_by_adam(deepspeed):
    assert deepspeed["backend_traps.bare_offload"] == "DeepSpeedCPUAdam"


@needs_deepspeed
def test_an_accelerate_loop_clips_at_one_where_the_configuration_says_auto(deepspeed):
    assert deepspeed["backend_traps.bare_clipping"] == 1.0


def test_trap_3_fsdp_refuses_an_optimizer_and_a_cpu_ignores_fsdp(tmp_path):
    torchrun(2, "backend_run.py", tmp_path / "seen.pt", "backend_fsdp.bare_optimizers", "backend_fsdp.bare_cpu")
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    assert "Passing `optimizers` is not allowed if PyTorch FSDP is enabled" in seen["backend_fsdp.bare_optimizers"]
    assert seen["backend_fsdp.bare_cpu"] is False


def test_trap_11_launching_on_a_cpu_starts_one_process_where_two_were_asked(tmp_path):
    script = tmp_path / "seen.py"
    script.write_text(SEEN)
    status, printed = accelerate("--cpu", "--num_processes", 2, script)
    assert status == 0, printed
    assert "processes: 1" in printed


def test_trap_12_launching_deepspeed_with_the_cpu_option_is_refused(tmp_path):
    script = tmp_path / "seen.py"
    script.write_text(SEEN)
    port = ["--main_process_port", free_port()]
    status, printed = accelerate("--cpu", "--use_deepspeed", "--num_processes", 2, *port, script)
    assert status != 0
    assert "You can only use one of" in printed

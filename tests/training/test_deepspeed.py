"""A stock Trainer under DeepSpeed ZeRO 0 to 3 on a CPU, against the plain one in one process."""

import importlib.util
import itertools

import pytest
import torch
from backend_launch import outcomes, torchrun
from backend_run import ELL, OPTIMIZERS, RATE, ROWS_PER_STEP, run_case
from tiny_models import TokenRows, tiny_classifier

from hf_momentum.optim.svag import reference_svag_gradient

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed; it comes with: pip install 'hf_momentum[deepspeed]'",
)
QUICK = ["zero2:sgd", "zero2:sgdm:resume", "zero2:svag2", "zero2:schedule:resume", "zero2:svag1:once"]
TRAPS = ["guarded_optimizers", "checkpoint_of_torch_sgd", "checkpoint_of_sgdm", "other_momentum", "offload"]
ALL = [
    f"zero{stage}:{optimizer}{variant}"
    for stage, optimizer, variant in itertools.product(range(4), OPTIMIZERS, ("", ":resume"))
] + [f"zero{stage}:svag{n}:once" for stage, n in itertools.product(range(4), (1, 2))]


@pytest.fixture(scope="module")
def plain() -> dict:
    """One process without DeepSpeed, by optimizer."""
    return {optimizer: run_case(f"plain:{optimizer}") for optimizer in OPTIMIZERS}


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict:
    """ZeRO-2 in two processes, and the traps in the same launch."""
    return outcomes(tmp_path_factory, "zero2", 2, *QUICK, *(f"backend_traps.{name}" for name in TRAPS))


def check_case(case: str, got: dict, plain: dict, processes: int) -> None:
    """The whole of what a run has to have in common with the plain one."""
    backend, optimizer, *variant = case.split(":")
    assert got["world_size"] == processes
    assert got["zero"] == int(backend[-1])
    assert got["optimizer"] == "SGDM"
    if variant == ["once"]:
        check_svag_gradient(got["weights"], 2 if optimizer == "svag1" else 4)
        return
    expected = plain[optimizer]
    assert got["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    torch.testing.assert_close(got["weights"], expected["weights"], atol=1e-5, rtol=0)
    assert got["momenta"] == pytest.approx(expected["momenta"])
    shards = processes if got["zero"] else 1
    assert got["state_elements"] == pytest.approx(expected["state_elements"] / shards, rel=0.01)


def check_svag_gradient(after: torch.Tensor, micro_batches: int) -> None:
    """One step of SGD at η/ℓ tells the gradient that was applied."""
    model, rows = tiny_classifier(), TokenRows()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    gradients = []
    for half in range(2):
        batch = [rows[half * ROWS_PER_STEP // 2 + i] for i in range(ROWS_PER_STEP // 2)]
        model.zero_grad()
        model(**{key: torch.stack([row[key] for row in batch]) for key in batch[0]}).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    applied = (before - after) / (RATE / ELL)
    torch.testing.assert_close(applied, reference_svag_gradient(*gradients, ELL), atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", QUICK)
def test_zero2_in_two_processes(quick, plain, case):
    check_case(case, quick[case], plain, 2)


def test_an_optimizer_that_deepspeed_drops_raises(quick):
    assert "trains with AdamW, not with the SGDM that was given" in quick["backend_traps.guarded_optimizers"]


def test_checkpoints_of_other_optimizers_raise(quick):
    assert "load_heavy_ball_state" in quick["backend_traps.checkpoint_of_torch_sgd"]
    momenta = r"momentum: asked for 0.0, the checkpoint has 0.8"
    assert momenta in quick["backend_traps.other_momentum"]


def test_a_checkpoint_of_sgdm_as_a_class_goes_on(quick):
    assert quick["backend_traps.checkpoint_of_sgdm"] == "no error"


def test_offload_keeps_the_optimizer(quick):
    assert quick["backend_traps.offload"] == "SGD"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_every_stage_optimizer_and_resumption(plain, tmp_path, processes):
    torchrun(processes, "backend_run.py", tmp_path / "outcomes.pt", *ALL, timeout=800)
    found = torch.load(tmp_path / "outcomes.pt", weights_only=True)
    for case in ALL:
        check_case(case, found[case], plain, processes)

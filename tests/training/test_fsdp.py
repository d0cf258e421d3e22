"""Two processes on a CPU, by DDP and by FSDP2, against one: a stock Trainer, and `fully_shard` alone.

What of FSDP2 runs on a CPU: `fully_shard` with gloo, and models that `from_pretrained(distributed_config=...)` shards.
What does not: the Trainer's `fsdp=True`. accelerate 1.15 reads it for processes of an accelerator only; on a CPU it
trains with DDP and says nothing, so the guard raises. The code behind it is the same for every device, so
`cpu_as_accelerator` leads past this one question. Not covered without GPUs: NCCL, CPU offload, mixed precision of
shards, and 2-D meshes.
"""

import pytest
import torch
from backend_launch import outcomes
from backend_run import OPTIMIZERS, run_case

DDP = ["plain:sgdm:resume", "plain:svag1", "plain:svag2", "plain:schedule:resume"]
SHARDED = ["fsdp:sgdm:resume", "fsdp:svag2", "sharded:sgdm"]
RAGGED = ["plain:sgd:ragged", "plain:sgd:drop", "plain:sgd:refilled"]
FUNCTIONS = ["kernels", "mixed_group", "state_dicts", "unsharded"]


@pytest.fixture(scope="module")
def one() -> dict:
    """One process."""
    cases = [f"plain:{optimizer}" for optimizer in OPTIMIZERS] + RAGGED
    return {case: run_case(case) for case in cases}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict:
    """Two processes, one launch for everything."""
    functions = [f"backend_fsdp.{name}" for name in FUNCTIONS]
    return outcomes(tmp_path_factory, "fsdp", 2, *DDP, *SHARDED, *RAGGED[:2], *functions)


def assert_same_run(got: dict, expected: dict) -> None:
    assert got["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    torch.testing.assert_close(got["weights"], expected["weights"], atol=1e-5, rtol=0)
    assert got["optimizer"] == "SGDM"
    assert got["momenta"] == pytest.approx(expected["momenta"])


@pytest.mark.parametrize("case", DDP)
def test_ddp_trains_as_one_process_and_resumes(one, two, case):
    assert two[case]["world_size"] == 2
    assert_same_run(two[case], one[":".join(case.split(":")[:2])])


@pytest.mark.parametrize("case", SHARDED)
def test_fsdp_trains_as_one_process_and_shards_the_momentum(one, two, case):
    backend, optimizer = case.split(":")[:2]
    expected = one[f"plain:{optimizer}"]
    assert two[case]["world_size"] == 2
    assert two[case]["fsdp"] is (backend == "fsdp")
    assert two[case]["parameter_type"] == "DTensor"
    assert_same_run(two[case], expected)
    assert two[case]["state_elements"] <= 0.51 * expected["state_elements"]


def test_the_ragged_end_of_an_epoch_is_refilled_from_its_start(one, two):
    """70 rows, 8 a step: accelerate gives the second process the epoch's first two rows again, to have 8 of them.

    One process takes the mean over the 6 rows that are left.
    """
    got = two["plain:sgd:ragged"]
    assert len(got["losses"]) == len(one["plain:sgd:ragged"]["losses"]) == 9
    assert got["losses"][:8] == pytest.approx(one["plain:sgd:ragged"]["losses"][:8], abs=1e-5)
    assert (got["weights"] - one["plain:sgd:ragged"]["weights"]).abs().max() > 1e-3
    assert_same_run(got, one["plain:sgd:refilled"])


def test_dropping_the_ragged_end_makes_them_equal(one, two):
    assert len(two["plain:sgd:drop"]["losses"]) == 8
    assert_same_run(two["plain:sgd:drop"], one["plain:sgd:drop"])


def test_every_kernel_steps_on_shards_as_on_whole_parameters(two):
    for (_, momentum), seen in two["backend_fsdp.kernels"].items():
        assert seen["difference"] < 1e-14
        if momentum:
            assert seen["sharded"] == [True] * 4
            assert seen["elements"] == 3 * 6 + 3 + 2 * 5 + 2  # of 53; rank 0 holds the larger shards
        else:
            assert seen["sharded"] == []


def test_sharded_and_whole_parameters_share_a_group(two):
    assert two["backend_fsdp.mixed_group"] < 1e-14


def test_the_full_state_of_shards_is_that_of_one_process(two):
    seen = two["backend_fsdp.state_dicts"]
    assert seen["names"] == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert seen["buffers"] < 1e-14
    assert seen["resumed"] < 1e-14
    assert seen["settings"] == (0.3, 0.8, 0.8)


def test_fsdp_that_shards_nothing_raises(two):
    assert two["backend_fsdp.unsharded"].startswith("FSDP was asked for, but no parameter is sharded")

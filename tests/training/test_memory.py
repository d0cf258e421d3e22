import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stock_trainer import stock_trainer

from hf_momentum.command import leave_process_group
from hf_momentum.training.callbacks import OptimizerMemoryCallback, memory

NAMES_OF_TWO = {f"{name}/rank_{rank}" for name in ("optimizer_state_bytes", "peak_memory_bytes") for rank in (0, 1)}


def figures(metrics: dict) -> dict:
    return {key: value for key, value in metrics.items() if "bytes" in key}


@pytest.mark.parametrize("optim", ["sgd", "sgdm"])
def test_training_ends_with_what_the_optimizer_cost(tmp_path, optim):
    trainer = stock_trainer(tmp_path, {"max_steps": 2}, callbacks=[OptimizerMemoryCallback()], optim=optim)
    found = figures(trainer.train().metrics)
    assert set(found) == {"optimizer_state_bytes/rank_0", "peak_memory_bytes/rank_0"}
    parameters = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    assert found["optimizer_state_bytes/rank_0"] == (parameters if optim == "sgdm" else 0)
    assert found["peak_memory_bytes/rank_0"] > 10**7
    assert figures(trainer.state.log_history[-1]) == found


def main(folder: str) -> None:
    trainer = stock_trainer(folder, {"max_steps": 1}, callbacks=[OptimizerMemoryCallback()])
    metrics = trainer.train().metrics
    if trainer.is_world_process_zero():
        torch.save(figures(metrics), f"{folder}/figures.pt")


def test_every_process_has_its_own_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "gather_object", lambda own: [*own, (7, 8)])
    found = figures(stock_trainer(tmp_path, {"max_steps": 1}, callbacks=[OptimizerMemoryCallback()]).train().metrics)
    assert set(found) == NAMES_OF_TWO
    assert (found["optimizer_state_bytes/rank_1"], found["peak_memory_bytes/rank_1"]) == (7, 8)


@pytest.mark.slow
def test_two_processes_gather_their_figures(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, __file__, str(tmp_path)], env=environment, check=True, timeout=240)
    found = torch.load(tmp_path / "figures.pt", weights_only=True)
    assert set(found) == NAMES_OF_TWO
    assert found["optimizer_state_bytes/rank_1"] > 0


if __name__ == "__main__":
    main(sys.argv[1])
    leave_process_group()

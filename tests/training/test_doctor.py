import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hf_momentum.cli import app
from hf_momentum.optim import SGDM
from hf_momentum.training import doctor
from hf_momentum.training.callbacks import guard, svag


def test_every_check_passes_and_the_command_exits_with_0():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert result.output.count("ok  ") == len(doctor.CHECKS)
    assert "FAIL" not in result.output
    assert f"{torch.__version__.split('+')[0]}" in result.output
    for backend in ("CPU", "GPU", "DDP", "ZeRO", "FSDP"):
        assert backend in result.output


@pytest.mark.parametrize("name", doctor.CHECKS)
def test_a_failed_check_makes_it_fail(monkeypatch, name):
    monkeypatch.setattr(doctor, "CHECKS", {name: lambda folder: "what is wrong"})
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert f"FAIL {name}" in result.output
    assert "what is wrong" in result.output


def test_the_checks_notice_what_they_are_for(monkeypatch, tmp_path):
    module = sys.modules["hf_momentum.training.trainer_kwargs"]  # the package holds the function of this name
    monkeypatch.setattr(module, "normalise_loss_per_micro_batch", lambda model: False)
    monkeypatch.setattr(guard, "check_loss_scaling", lambda args, misread: None)
    assert "relative difference" in doctor._check_loss_scaling(str(tmp_path))
    monkeypatch.setattr(svag, "micro_batch_weight", lambda index, group, ell: 1.0)
    assert "relative difference" in doctor._check_svag(str(tmp_path))
    monkeypatch.setattr(SGDM, "step", torch.optim.SGD.step)
    assert "differs from Eq. 3" in doctor._check_kernels(str(tmp_path))


def test_a_guards_error_is_a_finding(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(doctor, "CHECKS", {"identity": doctor._check_identity})
    console = Console(record=True, quiet=False)
    assert not doctor.run_doctor(console)
    assert "accelerate launch was asked for several processes" in console.export_text().replace("\n", " ")

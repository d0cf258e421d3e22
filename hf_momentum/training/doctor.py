"""What is installed, what can run here, and whether the traps that apply are closed: `hf-momentum doctor`."""

import importlib.metadata
import importlib.util
import platform
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, RobertaConfig, RobertaForSequenceClassification, Trainer, TrainingArguments

from hf_momentum import __version__
from hf_momentum.errors import UserError
from hf_momentum.optim import SGDM, svag_coefficients
from hf_momentum.optim.sgdm import reference_sgdm_step
from hf_momentum.training import trainer_kwargs
from hf_momentum.training.optimizers import innermost_optimizer

PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "trl")


class _Rows(Dataset):
    """Sixteen random sequences of eight tokens with two classes."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(3, 50, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": index % 2}


def _model() -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=50, max_position_embeddings=16, **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return RobertaForSequenceClassification(config)


def _train(folder: str, batch: int, accumulation: int, **settings: Any) -> Trainer:
    args = TrainingArguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=torch.accelerator.device_count() != 1,  # with several the Trainer would use nn.DataParallel
    )
    args.svag_ell = settings.get("ell")  # one step is meant here, not ℓ
    model = _model()
    trainer = Trainer(model=model, args=args, train_dataset=_Rows(), **trainer_kwargs(model, **settings))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def _update(folder: str, batch: int, accumulation: int, **settings: Any) -> torch.Tensor:
    model = _train(folder, batch, accumulation, lr=0.1, **settings).model
    pairs = zip(model.parameters(), _model().parameters(), strict=True)
    return torch.cat([(after.detach().cpu() - before.detach()).flatten() for after, before in pairs])


def _close(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    error = ((found - expected).norm() / expected.norm()).item()
    return None if error < 1e-3 else f"relative difference {error:.1e}, allowed 1e-3"


def _check_loss_scaling(folder: str) -> str | None:
    """Trap 1: one batch of 8 moves the weights as 4 micro-batches of 2 do."""
    return _close(_update(folder, 2, 4, optim="sgd"), _update(folder, 8, 1, optim="sgd"))


def _check_identity(folder: str) -> str | None:
    """Trap 2: the Trainer trains with SGDM, and the hyperparameters are those asked for."""
    inner = innermost_optimizer(_train(folder, 8, 1, optim="sgdm", lr=0.1, momentum=0.8).optimizer)
    found = (type(inner).__name__, inner.param_groups[0]["momentum"], inner.param_groups[0]["lr"])
    return None if found == ("SGDM", 0.8, 0.1) else f"the Trainer trains with {found}"


def _check_svag(folder: str) -> str | None:
    """SVAG's step is `−(η/ℓ)(r₁ ḡ₁ + r₂ ḡ₂)`."""
    ell, model, rows = 4.0, _model().train(), _Rows()
    expected = torch.zeros(())
    for weight, start in zip(svag_coefficients(ell), (0, 4), strict=True):
        batch = [rows[i] for i in range(start, start + 4)]
        stacked = {key: torch.stack([torch.as_tensor(row[key]) for row in batch]) for key in batch[0]}
        gradients = torch.autograd.grad(model(**stacked).loss, list(model.parameters()))
        expected = expected - 0.1 / ell * weight * torch.cat([gradient.flatten() for gradient in gradients])
    return _close(_update(folder, 4, 2, optim="svag", ell=ell), expected)


def _check_kernels(folder: str) -> str | None:
    """Eq. 3 on the for-loop, foreach and fused kernels of the CPU and of the accelerator."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    for device in filter(None, (torch.device("cpu"), accelerator)):
        for kernel in ({"foreach": False}, {"foreach": True}, {"fused": True}):
            error = _kernel_error(device, kernel)
            if error > 1e-5:
                return f"{device.type} {kernel}: differs from Eq. 3 by {error:.1e}"
    return None


def _kernel_error(device: torch.device, kernel: dict[str, bool]) -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, generator=generator)
    parameter, m = nn.Parameter(x.to(device, copy=True)), torch.zeros_like(x)
    optimizer = SGDM([parameter], lr=0.1, momentum=0.9, weight_decay=0.01, **kernel)
    for beta in (0.9, 0.0, 0.5, 0.9):
        gradient = torch.randn(64, generator=generator)
        parameter.grad, optimizer.param_groups[0]["momentum"] = gradient.to(device), beta
        optimizer.step()
        x, m = reference_sgdm_step(x, m, gradient, 0.1, beta, 0.01)
    return (parameter.detach().cpu() - x).abs().max().item()


CHECKS: dict[str, Callable[[str], str | None]] = {
    "SGDM is Eq. 3 on every kernel": _check_kernels,
    "the Trainer trains with our optimizer": _check_identity,
    "gradient accumulation keeps the learning rate": _check_loss_scaling,
    "SVAG's step is r₁ ḡ₁ + r₂ ḡ₂": _check_svag,
}


def backends() -> dict[str, str]:
    """What can run on this machine.

    Returns:
        Backend → yes with a detail, or no with the reason.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if accelerator else 0
    distributed = torch.distributed.is_available()
    carriers = [n for n in ("nccl", "gloo") if distributed and getattr(torch.distributed, f"is_{n}_available")()]
    deepspeed = importlib.util.find_spec("deepspeed") is not None
    return {
        "CPU": f"yes: {torch.get_num_threads()} threads",
        "GPU": f"yes: {count} × {accelerator.type}" if accelerator else "no: no accelerator found",
        "DDP": f"yes: {', '.join(carriers)}" if carriers else "no: this torch has no distributed backend",
        "ZeRO": "yes: stages 0 to 3" if deepspeed else "no: pip install 'hf_momentum[deepspeed]'",
        "FSDP": "yes" if accelerator and carriers else "no: the Trainer's FSDP needs an accelerator",
    }


def run_doctor(console: Console) -> bool:
    """Print versions and backends, and run all checks.

    Args:
        console: Where to print.

    Returns:
        Whether every check passed.
    """
    table = Table("what", "found", title="hf_momentum doctor")
    table.add_row("hf_momentum", __version__)
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        installed = importlib.util.find_spec(package) is not None
        table.add_row(package, importlib.metadata.version(package) if installed else "not installed")
    table.add_section()
    for name, found in backends().items():
        table.add_row(name, found)
    console.print(table)
    failed = 0
    for name, check in CHECKS.items():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                problem = check(folder)
            except UserError as error:
                problem = str(error)
        failed += problem is not None
        console.print(f"{'ok  ' if problem is None else 'FAIL'} {name} ({time.perf_counter() - start:.1f} s)")
        if problem is not None:
            console.print(f"     {problem}", markup=False)
    return failed == 0

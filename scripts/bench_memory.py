"""Peak memory and optimizer state of fine-tuning RoBERTa-large's architecture in float32, a process for each case.

  python scripts/bench_memory.py                                     355 M parameters, up to 7 GB; most of an hour
  python scripts/bench_memory.py --size small --allocators fixed     50 M parameters, two minutes

Every case trains random weights for two steps in a stock Trainer: the second one meets all of the optimizer's state.
On a CPU the peak is of resident memory, above that of the process after its imports and two steps of a tiny model.
"fixed" sets glibc's MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ to 256 KiB: larger blocks then go back to the
system as soon as they are freed. "default" leaves both to glibc, which comes to keep them. With an accelerator the
peak is of the memory allocated on it, and there is one allocator. The goals are meant for the large size.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile

import torch
from benchmark import Goal, report
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
    __version__,
)
from transformers.utils import logging

from hf_momentum import trainer_kwargs
from hf_momentum.training.memory import optimizer_state_bytes, peak_memory_bytes, reset_peak_memory

SIZES = {  # the config, and the batch in examples and tokens
    "large": ({"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}, 50265, (4, 128)),
    "small": ({"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12}, 8192, (2, 64)),
    "tiny": ({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}, 1000, (2, 16)),
}
SGD, SGDM = {"optim": "sgd", "lr": 1e-3}, {"optim": "sgdm", "lr": 1e-2, "momentum": 0.9}
TORCH_SGD = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9})}
# Case: what the Trainer gets, whether activations are checkpointed, and bytes per parameter in theory: 4 for the
# weight, 4 for its gradient unless it is freed at once, 4 for each copy in the optimizer's state.
CASES = {
    "AdamW (torch)": ("adamw", False, 16),
    "SGD, momentum 0.9 (torch)": (TORCH_SGD, False, 12),
    "sgdm": (SGDM, False, 12),
    "sgd": (SGD, False, 8),
    "sgd, fused_backward": (SGD | {"fused_backward": True}, False, 4),
    "AdamW (torch), checkpointing": ("adamw", True, 16),
    "sgdm, checkpointing": (SGDM, True, 12),
    "sgd, checkpointing": (SGD, True, 8),
    "sgd, fused_backward, checkpointing": (SGD | {"fused_backward": True}, True, 4),
    "sgdm, LoRA": (SGDM, False, 4),
}
THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


class Rows(Dataset):
    """Random tokens with labels."""

    def __init__(self, count: int, length: int, vocabulary: int):
        self.ids = torch.randint(3, vocabulary, (count, length))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": torch.tensor(index % 2)}


def build(size: str, lora: bool) -> torch.nn.Module:
    """A classifier of the size with random weights."""
    shape, vocabulary, _ = SIZES[size]
    shape = shape | {"intermediate_size": 4 * shape["hidden_size"], "max_position_embeddings": 514}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=vocabulary, type_vocab_size=1, **shape))
    return get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value"])) if lora else model


def train(case: str, size: str) -> dict:
    """Make two steps, and return the bytes of the weights and the optimizer's state and the number of parameters."""
    settings, checkpointing, _ = CASES[case]
    _, vocabulary, (examples, length) = SIZES[size]
    model = build(size, lora="LoRA" in case)
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        optim="adamw_torch_fused",
        max_steps=2,
        per_device_train_batch_size=examples,
        max_grad_norm=0.0,
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    kwargs = {} if settings == "adamw" else settings
    if "optim" in kwargs:
        kwargs = trainer_kwargs(model, args, **kwargs)
    trainer = Trainer(model=model, args=args, train_dataset=Rows(2 * examples, length, vocabulary), **kwargs)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    count = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"weights": weights, "count": count, "state": optimizer_state_bytes(trainer.optimizer)}


def measure(case: str, size: str) -> None:
    """Measure one case in this process, and print the figures as JSON."""
    logging.set_verbosity_error()
    train(case, "tiny")  # what is imported and set up at first use
    gc.collect()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory_bytes(device)
    found = train(case, size)
    print(json.dumps(found | {"peak": peak_memory_bytes(device) - before}))


def measured_elsewhere(case: str, size: str, allocator: str) -> dict:
    """Measure one case in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in THRESHOLDS}
    environment |= THRESHOLDS if allocator == "fixed" else {}
    command = [sys.executable, __file__, "--size", size, "--case", case]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def show(found: dict, allocators: list[str], size: str) -> None:
    """Print the figures and the goals."""
    first, console = found[allocators[0]], Console()
    count, weights = first["sgd"]["count"], first["sgd"]["weights"]
    where = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    examples, length = SIZES[size][2]
    table = Table(
        title=f"{count / 1e6:.0f} M parameters, {weights / 2**20:.0f} MiB of weights, batch {examples} × {length}, "
        f"{where}, torch {torch.__version__}, transformers {__version__}"
    )
    table.add_column("case")
    columns = [f"peak, {name}{unit}" for name in allocators for unit in (" (bytes per parameter)", " / weights")]
    for column in ("theory (bytes per parameter)", *columns, "state (bytes)"):
        table.add_column(column, justify="right")
    for case, (_, _, theory) in CASES.items():
        peaks = [found[name][case]["peak"] for name in allocators]
        cells = [text for peak in peaks for text in (f"{peak / count:.1f}", f"{peak / weights:.2f}")]
        table.add_row(case, str(theory), *cells, f"{first[case]['state']:,}")
    console.print(table)
    fused = first["sgd, fused_backward, checkpointing"]["peak"]
    report(
        [
            Goal("state of sgd", first["sgd"]["state"], 0, unit="bytes"),
            Goal("peak of fused_backward + checkpointing / weights", fused / weights, 1.35),
            Goal("the same / peak of sgdm + checkpointing", fused / first["sgdm, checkpointing"]["peak"], 0.45),
        ]
    )


def main() -> None:
    """Measure all cases, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--allocators", nargs="+", choices=["fixed", "default"], default=["fixed", "default"])
    parser.add_argument("--case", choices=CASES, help="measure this one alone, in this process, and print JSON")
    args = parser.parse_args()
    if args.case:
        measure(args.case, args.size)
        return
    allocators = args.allocators[:1] if torch.accelerator.is_available() else args.allocators
    pairs = [(name, case) for name in allocators for case in CASES]
    found = {name: {} for name in allocators}
    console = Console()
    for name, case in track(pairs, "cases", console=console):
        found[name][case] = each = measured_elsewhere(case, args.size, name)
        console.print(f"{case}, {name}: peak {each['peak'] / 2**20:,.0f} MiB, state {each['state'] / 2**20:,.0f} MiB")
    show(found, allocators, args.size)


if __name__ == "__main__":
    main()

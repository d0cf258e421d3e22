"""Time one optimizer step of SGDM and SGD against torch's own, interleaved, and print the ratios.

python scripts/bench_optim.py --shapes demo     22.7 M parameters, the demo model's shapes
python scripts/bench_optim.py --shapes base     124.6 M parameters, RoBERTa-base's shapes
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from hf_momentum import SGDM

SHAPES = {
    "tiny": lambda: BertModel(BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=1000)),
    "demo": lambda: BertModel(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    ),
    "base": lambda: RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514)),
}


class Flat:
    """The floor: one read and one write of all weights in one vector."""

    def __init__(self, parameters: list[torch.Tensor]):
        self.weights = torch.cat([p.detach().flatten() for p in parameters])
        self.gradient = torch.randn_like(self.weights)

    def step(self) -> None:
        """One plain SGD step."""
        self.weights.add_(self.gradient, alpha=-1e-3)


CASES = {
    "flat p.add_(g)": Flat,
    "SGD: torch, default": lambda p: torch.optim.SGD(p, lr=1e-3),
    "SGD: torch, fused": lambda p: torch.optim.SGD(p, lr=1e-3, fused=True),
    "SGD: ours": lambda p: SGDM(p, lr=1e-3, momentum=0.0),
    "SGDM: torch, default": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "SGDM: torch, fused": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
    "SGDM: ours": lambda p: SGDM(p, lr=1e-2, momentum=0.9),
    "AdamW: torch, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def main() -> None:
    """Time all cases round by round, so that all meet the same disturbances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="demo")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    parameters = list(SHAPES[args.shapes]().to(device).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizers = {name: build(parameters) for name, build in CASES.items()}
    seconds = {name: [] for name in CASES}
    for _ in track(range(args.rounds + 3), "rounds"):
        for name, optimizer in optimizers.items():
            synchronize()
            start = time.perf_counter()
            optimizer.step()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[3:]) for name, times in seconds.items()}
    count = sum(p.numel() for p in parameters) / 1e6
    table = Table(
        title=f"{count:.1f} M parameters on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for column in ("step", "median ms", "× floor", "× torch's best"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, median in medians.items():
        best = (
            min(m for other, m in medians.items() if other.startswith(name.split(":")[0] + ": torch"))
            if ":" in name
            else median
        )
        table.add_row(name, f"{1e3 * median:.2f}", f"{median / medians['flat p.add_(g)']:.2f}", f"{median / best:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

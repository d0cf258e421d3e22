"""Time one optimizer step of SGDM and SGD against torch's own, interleaved, and print the ratios beside the goals.

  python scripts/bench_optim.py --shapes demo     22.7 M parameters, the demo model's shapes
  python scripts/bench_optim.py --shapes base     124.6 M parameters, RoBERTa-base's shapes; 5 GB

A ratio is the median over rounds of the two times in the same round; the order changes from round to round. On a CPU
with one thread (OMP_NUM_THREADS=1) times are of the processor, which other jobs disturb less, else of the clock.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from benchmark import Goal, report
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.optim import SGD
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from hf_momentum import SGDM

SHAPES = {
    "tiny": lambda: BertModel(BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=1000)),
    "demo": lambda: BertModel(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    ),
    "base": lambda: RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514)),
}
FLOOR = "flat p.add_(g)"


class Flat:
    """The floor: one read and one write of all weights in one vector, and a read of all gradients."""

    def __init__(self, parameters: list[torch.Tensor]):
        self.weights = torch.cat([p.detach().flatten() for p in parameters])
        self.gradient = torch.randn_like(self.weights)

    def step(self) -> None:
        """One plain SGD step."""
        self.weights.add_(self.gradient, alpha=-1e-3)


CASES = {  # "update: whose"; + decay is with weight decay
    FLOOR: Flat,
    "SGD: torch, default": lambda p: SGD(p, lr=1e-3),
    "SGD: torch, foreach": lambda p: SGD(p, lr=1e-3, foreach=True),
    "SGD: torch, fused": lambda p: SGD(p, lr=1e-3, fused=True),
    "SGD: ours": lambda p: SGDM(p, lr=1e-3, momentum=0.0),
    "SGD + decay: torch, default": lambda p: SGD(p, lr=1e-3, weight_decay=0.01),
    "SGD + decay: torch, fused": lambda p: SGD(p, lr=1e-3, weight_decay=0.01, fused=True),
    "SGD + decay: ours": lambda p: SGDM(p, lr=1e-3, momentum=0.0, weight_decay=0.01),
    "SGDM: torch, default": lambda p: SGD(p, lr=1e-3, momentum=0.9),
    "SGDM: torch, fused": lambda p: SGD(p, lr=1e-3, momentum=0.9, fused=True),
    "SGDM: ours": lambda p: SGDM(p, lr=1e-2, momentum=0.9),
    "AdamW: torch, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}
OURS = tuple(name for name in CASES if name.endswith("ours"))


def clock_of(device: torch.device) -> Callable[[], float]:
    """The processor's time where it says how long a step takes, else the clock's."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def time_rounds(parameters: list[torch.Tensor], rounds: int) -> dict[str, list[float]]:
    """Time a step of every case in every round, in an order drawn anew, so that all meet the same disturbances."""
    clock = clock_of(parameters[0].device)
    optimizers = {name: build(parameters) for name, build in CASES.items()}
    seconds = {name: [] for name in CASES}
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    warm_up = 3
    for number in track(range(rounds + warm_up), "rounds"):
        for name in random.sample(list(CASES), len(CASES)):
            wait()
            start = clock()
            optimizers[name].step()
            wait()
            if number >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, other: str) -> float:
    """The median over rounds of the ratio of two cases' times."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))


def torchs_best(seconds: dict[str, list[float]], name: str) -> str:
    """The fastest of torch's own for the same update."""
    same = [other for other in seconds if other.startswith(name.split(":")[0] + ": torch")]
    return min(same or [name], key=lambda other: statistics.median(seconds[other]))


def main() -> None:
    """Time all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="demo")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    parameters = list(SHAPES[args.shapes]().to(device).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    seconds = time_rounds(parameters, args.rounds)
    count = sum(p.numel() for p in parameters) / 1e6
    kind = "CPU time" if clock_of(device) is time.process_time else "wall time"
    table = Table(
        title=f"{count:.1f} M parameters on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{args.rounds} rounds, {kind}"
    )
    for column in ("step", "median ms", "× floor", "× torch's best"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, times in seconds.items():
        floor, best = ratio(seconds, name, FLOOR), ratio(seconds, name, torchs_best(seconds, name))
        milliseconds = f"{1e3 * statistics.median(times):.2f}"
        table.add_row(name, milliseconds, f"{floor:.3f}", "" if name == FLOOR else f"{best:.3f}")
    Console().print(table)
    goals = [Goal("step of SGD / flat p.add_(g)", ratio(seconds, "SGD: ours", FLOOR), 1.15)]
    for name in OURS:
        update = name.split(":")[0]
        goals.append(Goal(f"step of {update} / torch's best", ratio(seconds, name, torchs_best(seconds, name)), 1.02))
    report(goals)


if __name__ == "__main__":
    main()

"""Time how long it takes until the first word: imports and --help, in processes of their own, interleaved.

python scripts/bench_startup.py --rounds 5

CPU time (user and system) of each process, which other work on the machine disturbs less than the clock's; medians.
What is said to be beyond another case is the median of the differences within a round.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from benchmark import Goal, report
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parents[1]
PYTHON, TORCH = "python alone", "import torch"
TRAINER = "from transformers import Trainer, TrainingArguments"
COMMAND, OURS = "hf-momentum --help", "import hf_momentum, its optimizers used"
CASES = {
    PYTHON: ["-c", "pass"],
    COMMAND: ["-m", "hf_momentum.cli", "--help"],
    TORCH: ["-c", TORCH],
    OURS: ["-c", "import hf_momentum; hf_momentum.SGDM, hf_momentum.create_optimizer, hf_momentum.svag_coefficients"],
    TRAINER: ["-c", TRAINER],
}
RECIPES = {f"{file.name} --help": [str(file), "--help"] for file in sorted((ROOT / "recipes").glob("*.py"))}


def cpu_seconds(words: list[str]) -> float:
    """Run Python with these words from the project's folder, on one thread; its CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run all cases in turn, print their times and the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    cases = CASES | RECIPES
    seconds = {name: [] for name in cases}
    for index in track(range(args.rounds + 1), "rounds"):
        for name, words in cases.items():
            taken = cpu_seconds(words)
            if index:  # the first round fills the caches
                seconds[name].append(taken)
    table = Table(title=f"CPU seconds, Python {sys.version.split()[0]}, {args.rounds} rounds")
    for column in ("process", "median", "least", "most"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for name, taken in seconds.items():
        table.add_row(name, *(f"{of(taken):.2f}" for of in (statistics.median, min, max)))
    Console().print(table)

    def beyond(name: str, other: str) -> float:
        return statistics.median(a - b for a, b in zip(seconds[name], seconds[other], strict=True))

    goals = [
        Goal(COMMAND, statistics.median(seconds[COMMAND]), 0.5, unit="s"),
        Goal("import hf_momentum, beyond torch", beyond(OURS, TORCH), 0.3, unit="s"),
    ]
    report(goals + [Goal(f"{name}, beyond the Trainer", beyond(name, TRAINER), 0.5, unit="s") for name in RECIPES])


if __name__ == "__main__":
    main()

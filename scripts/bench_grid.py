"""Time a grid of runs as one command of the few-shot recipe against one command for each of its cells, in turn.

python scripts/bench_grid.py                           12 cells: 3 seeds × SGD, SGDM × 2 rates, 60 steps
python scripts/bench_grid.py --seeds 13 --steps 10     4 cells

A classifier on the demo's encoder; CPU time of the processes, on one thread. That every cell gives the same numbers
both ways is checked. The single commands also test every run, where the grid tests the picks alone: that is what a
sweep by single commands does.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark import Goal, report
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).parents[1]
RATES, OPTIMIZERS = ("0.1", "0.3"), ("sgd", "sgdm")
SAME = ("dev_accuracy", "train_loss", "curve")  # in both ways of running a cell


def run(words: list[str], folder: Path) -> tuple[float, float]:
    """Run the recipe; its CPU time and its time by the clock."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, ROOT / "recipes" / "roberta_fewshot.py", "--output_dir", folder, *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - start


def trained(folder: Path) -> dict[str, dict]:
    """The runs of an output folder by their names."""
    lines = map(json.loads, (folder / "results.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["run_id"]: line for line in lines}


def main() -> None:
    """Run the grid, run its cells, compare the numbers and the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="default: demo")
    parser.add_argument("--task", default="movie-snippets-2", help="default: movie-snippets-2")
    parser.add_argument("--data_dir", help="a folder with the task's data")
    parser.add_argument("--seeds", nargs="+", default=["13", "21", "42"])
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    common = ["--model", args.model, "--task", args.task, "--tuning", "classifier"]
    common += ["--max_steps", str(args.steps), "--use_cpu", "True"]
    common += ["--data_dir", args.data_dir] if args.data_dir else []
    cells = list(itertools.product(args.seeds, OPTIMIZERS, RATES))
    with tempfile.TemporaryDirectory() as name, Progress() as progress:
        task = progress.add_task("commands", total=len(cells) + 1)
        together, alone = Path(name) / "grid", Path(name) / "single"
        grid_file = Path(name) / "grid.yaml"
        grid_file.write_text(f"learning_rate: [{', '.join(RATES)}]\nper_device_train_batch_size: [8]\n")
        grid = run([*common, "--grid", grid_file, "--seeds", *args.seeds, "--optim", *OPTIMIZERS], together)
        progress.advance(task)
        single = []
        for seed, optim, rate in cells:
            options = ["--seeds", seed, "--optim", optim, "--learning_rate", rate]
            single.append(run([*common, *options, "--per_device_train_batch_size", "8"], alone))
            progress.advance(task)
        runs, others = trained(together), trained(alone)
    if runs.keys() != others.keys() or any(runs[name][f] != others[name][f] for name in runs for f in SAME):
        sys.exit("The grid and the single commands trained something else.")
    cpu, clock = (sum(times) for times in zip(*single, strict=True))
    Console().print(
        f"{len(cells)} cells of {args.steps} steps on {args.model}, the same numbers both ways: one command "
        f"{grid[0]:.0f} s CPU, {grid[1]:.0f} s by the clock; {len(cells)} commands {cpu:.0f} s CPU, {clock:.0f} s",
        highlight=False,
    )
    report([Goal(f"grid of {len(cells)} cells in one command / as single commands", grid[0] / cpu, 0.75)])


if __name__ == "__main__":
    main()

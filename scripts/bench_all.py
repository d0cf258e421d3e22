"""Run every benchmark at a small size, each in a process of its own, and print one table of ratios and goals.

python scripts/bench_all.py                        all of them, half an hour on two slow cores
python scripts/bench_all.py bench_optim bench_grid     some of them
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark import FILE, Goal, goals_table, read_goals
from rich.console import Console

FOLDER = Path(__file__).parent
SMALL = {  # what makes a script small; one that is not named is small by itself
    "bench_curvature": ["--rounds", "1"],
    "bench_dynamics": ["--paths", "50000", "--rounds", "5"],
    "bench_fewshot": ["--k", "8", "--steps", "10", "--test", "32"],
    "bench_grid": ["--seeds", "13", "--steps", "10"],
    "bench_images": ["--images", "5120", "--rounds", "3"],
    "bench_masked_lm": ["--rounds", "5"],
    "bench_memory": ["--size", "small", "--allocators", "fixed"],
    "bench_optim": ["--shapes", "demo"],
    "bench_overhead": ["--pairs", "5", "--steps", "10"],
    "bench_startup": ["--rounds", "1"],
}


def run(name: str) -> tuple[list[Goal], int, float]:
    """Run one script; its figures, its exit status and how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        file, start = Path(folder) / "goals.jsonl", time.perf_counter()
        command = [sys.executable, FOLDER / f"{name}.py", *SMALL.get(name, [])]
        status = subprocess.run(command, env=os.environ | {FILE: str(file)}).returncode
        return read_goals(file), status, time.perf_counter() - start


def main() -> None:
    """Run them in turn; the status is 1 if one of them failed, whether or not the goals are met."""
    names = sorted(file.stem for file in FOLDER.glob("bench_*.py") if file.stem != Path(__file__).stem)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; default: all")
    chosen = parser.parse_args().names or names
    if unknown := set(chosen) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    console, goals, failed = Console(), [], []
    for name in chosen:
        console.rule(name)
        found, status, seconds = run(name)
        console.print(f"{name}: {seconds:.0f} s", highlight=False)
        goals += found
        failed += [name] if status else []
    console.rule("all")
    console.print(goals_table(goals))
    if failed:
        console.print(f"Failed: {', '.join(failed)}.")
        sys.exit(1)


if __name__ == "__main__":
    main()

"""A recipe of known duration: one run per seed, each recorded once, and every start and end kept in a journal."""

import argparse
import math
import os
import sys
import time
from pathlib import Path

from hf_momentum.results.record import append_record, identifier, read_records

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=Path)
parser.add_argument("--journal", type=Path)
parser.add_argument("--seeds", type=int, nargs="+", default=[1])
parser.add_argument("--optim", default="sgd")
parser.add_argument("--momentum", type=float)
parser.add_argument("--learning_rate", type=float, default=0.1)
parser.add_argument("--seconds", type=float, default=0.0)
parser.add_argument("--orphan_seconds", type=float, default=0.0, help="more, once the worker is gone")
parser.add_argument("--needs", type=Path, help="fail unless this file exists, for the first seed")
args = parser.parse_args()
worker = os.getppid()


def note(word: str, run: str) -> None:
    with open(args.journal, "a") as journal:
        journal.write(f"{word} {run} {worker} {os.environ.get('OMP_NUM_THREADS')} {os.environ.get('MARK')}\n")


file = args.output_dir / "results.jsonl"
for seed in args.seeds:
    run = f"{args.optim}/{args.momentum}/{args.learning_rate}/{seed}"
    if run in {record["run_id"] for record in read_records(file).records}:
        continue
    note("start", run)
    time.sleep(args.seconds)
    if os.getppid() != worker:
        time.sleep(args.orphan_seconds)
    if args.needs and not args.needs.exists() and seed == 1:
        print("one\ntwo")
        sys.exit("the toy has nothing to play with")
    accuracy = 0.9 - 0.1 * (math.log10(args.learning_rate) + 1) ** 2
    settings = {"task": "toy", "model": "toy", "tuning": "prompt", "k": 1, "optim": args.optim, "seed": seed}
    rates = {"learning_rate": args.learning_rate, "effective_lr": args.learning_rate, "momentum": args.momentum}
    group = identifier({name: value for name, value in (settings | rates).items() if name != "seed"})
    scores = {"dev_accuracy": accuracy, "test_accuracy": accuracy, "train_loss": None, "optimizer_state_bytes": 0}
    append_record(file, {"run_id": run, "stage": "test", **settings, **rates, **scores, "group": group})
    note("end", run)

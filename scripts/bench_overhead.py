"""Time a stock Trainer with torch's SGD against the same Trainer with ours and all its default callbacks.

  python scripts/bench_overhead.py --pairs 7 --steps 20                        on the demo's encoder, random weights
  python scripts/bench_overhead.py --size tiny --pairs 3 --regime_steps 4000   also what a RegimeCallback adds

Each pair trains both, one right after the other, in alternating order; the median of the pairs' ratios is printed.
Both run m ← βm + …, on torch's fused kernel, so that the difference is what the callbacks and our step cost.
RegimeCallback() decides for itself whether and how often it measures; without `--regime_steps` that part is left out.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from benchmark import Goal, report
from rich.console import Console
from rich.progress import track
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from hf_momentum import trainer_kwargs
from hf_momentum.training.callbacks import RegimeCallback

SIZES = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "demo": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}


def rows(count: int, length: int = 32) -> list[dict]:
    """Random token rows with labels."""
    ids = torch.randint(1000, 30000, (count, length)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * length, "labels": i % 2} for i, row in enumerate(ids)]


def seconds(model, data: list[dict], steps: int, ours: bool, callbacks: Sequence[TrainerCallback] = ()) -> float:
    """Train and return the wall time of `train()`; the callbacks are those beside our default ones."""
    folder = tempfile.mkdtemp()
    args = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        learning_rate=0.01,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    if ours:
        kwargs = trainer_kwargs(model, args, optim="sgdm", lr=0.01, momentum=0.9, callbacks=callbacks)
    else:
        settings = {"lr": 0.01, "momentum": 0.9, "dampening": 0.9, "fused": True}
        kwargs = {"optimizer_cls_and_kwargs": (torch.optim.SGD, settings)}
    trainer = Trainer(model=model, args=args, train_dataset=data, **kwargs)
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def paired_ratio(ours: Callable[[], float], other: Callable[[], float], pairs: int, name: str) -> float:
    """Run both in pairs of alternating order, print the ratios of their times, and return the median."""
    ratios = []
    for pair in track(range(pairs), name):
        order = (ours, other) if pair % 2 else (other, ours)
        times = {work: work() for work in order}
        ratios.append(times[ours] / times[other])
    median = statistics.median(ratios)
    Console().print(f"{name}, {pairs} pairs: {median:.3f} (median; {min(ratios):.3f} to {max(ratios):.3f})")
    return median


def callbacks_ratio(size: str, steps: int, pairs: int) -> float:
    """Our optimizer and default callbacks against torch's SGD."""
    model = BertForSequenceClassification(BertConfig(**SIZES[size]))
    data = rows(8 * steps)
    seconds(model, data, 2, ours=True), seconds(model, data, 2, ours=False)
    ours, other = (lambda ours=ours: seconds(model, data, steps, ours) for ours in (True, False))
    return paired_ratio(ours, other, pairs, f"{size} model, {steps} steps, ours / torch's")


def regime_ratio(size: str, steps: int, pairs: int) -> float:
    """A run with a RegimeCallback against the same run without, from the same weights."""
    model = BertForSequenceClassification(BertConfig(**SIZES[size]))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data, measured = rows(8 * steps), []

    def run(regime: bool) -> float:
        model.load_state_dict(weights)
        callbacks = [RegimeCallback()] if regime else []
        time_taken = seconds(model, data, steps, True, callbacks)
        measured.extend(len(callback.reports) for callback in callbacks)
        return time_taken

    ratio = paired_ratio(lambda: run(True), lambda: run(False), pairs, f"{size} model, {steps} steps, with / without")
    Console().print(f"RegimeCallback measured {min(measured)} to {max(measured)} times in a run.")
    return ratio


def main() -> None:
    """Run the pairs and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--regime_steps", type=int, default=0, help="of the runs with and without RegimeCallback")
    args = parser.parse_args()
    logging.set_verbosity_error()
    ratio = callbacks_ratio(args.size, args.steps, args.pairs)
    goals = [Goal("Trainer with our optimizer and callbacks / with torch's SGD", ratio, 1.02)]
    if args.regime_steps:
        ratio = regime_ratio(args.size, args.regime_steps, args.pairs)
        goals.append(Goal("training with RegimeCallback / without", ratio, 1.05))
    report(goals)


if __name__ == "__main__":
    main()

"""Time a stock Trainer with torch's SGD against the same Trainer with ours and all its default callbacks.

  python scripts/bench_overhead.py --pairs 7 --steps 20     on the demo's encoder, random weights

Each pair trains both, one right after the other, in alternating order; the median of the pairs' ratios is printed.
Both run m ← βm + …, on torch's fused kernel, so that the difference is what the callbacks and our step cost.
"""

import argparse
import statistics
import tempfile
import time

import torch
from benchmark import Goal, report
from rich.console import Console
from rich.progress import track
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

from hf_momentum import trainer_kwargs

SIZES = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "demo": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}


def rows(count: int, length: int = 32) -> list[dict]:
    """Random token rows with labels."""
    ids = torch.randint(1000, 30000, (count, length)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * length, "labels": i % 2} for i, row in enumerate(ids)]


def seconds(model, data: list[dict], steps: int, ours: bool) -> float:
    """Train and return the wall time of `train()`."""
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
        kwargs = trainer_kwargs(model, args, optim="sgdm", lr=0.01, momentum=0.9)
    else:
        settings = {"lr": 0.01, "momentum": 0.9, "dampening": 0.9, "fused": True}
        kwargs = {"optimizer_cls_and_kwargs": (torch.optim.SGD, settings)}
    trainer = Trainer(model=model, args=args, train_dataset=data, **kwargs)
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def main() -> None:
    """Run the pairs and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    logging.set_verbosity_error()
    model = BertForSequenceClassification(BertConfig(**SIZES[args.size]))
    data = rows(8 * args.steps)
    seconds(model, data, 2, ours=True), seconds(model, data, 2, ours=False)
    ratios = []
    for pair in track(range(args.pairs), "pairs"):
        order = (True, False) if pair % 2 else (False, True)
        times = {ours: seconds(model, data, args.steps, ours) for ours in order}
        ratios.append(times[True] / times[False])
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    text = f"{args.size} model, {args.steps} steps, {args.pairs} pairs: ours / torch's"
    Console().print(f"{text} = {median:.3f} (median; {low:.3f} to {high:.3f})")
    report([Goal("Trainer with our optimizer and callbacks / with torch's SGD", median, 1.02)])


if __name__ == "__main__":
    main()

"""Time a training step with logits at the mask alone against the full logits, interleaved, and print the ratio.

python scripts/bench_masked_lm.py --batch 8 --length 32
"""

import argparse
import statistics
import time

import torch
from benchmark import Goal, report
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from hf_momentum.tasks.masked_lm import LabelWordHead

MASK, WORDS = 103, [6659, 2307]


def step_full(model: nn.Module, inputs: dict, labels: torch.Tensor) -> None:
    """One step on the logits of all positions and words, of which one position and two words are used."""
    logits = model(**inputs).logits
    rows = torch.arange(len(labels), device=labels.device)
    at_mask = logits[rows, (inputs["input_ids"] == MASK).int().argmax(dim=1)]
    nn.functional.cross_entropy(at_mask[:, WORDS], labels).backward()


def step_at_mask(model: nn.Module, inputs: dict, labels: torch.Tensor) -> None:
    """One step on the logits at the mask."""
    model(**inputs, labels=labels).loss.backward()


def main() -> None:
    """Time both in turn on one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = BertForMaskedLM(config).to(device)
    ids = torch.randint(1000, 30000, (args.batch, args.length), device=device)
    ids[:, args.length // 2] = MASK
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.randint(0, 2, (args.batch,), device=device)
    seconds = {step_full: [], step_at_mask: []}
    for _ in track(range(args.rounds + 2), "rounds"):
        for step, times in seconds.items():
            attached = LabelWordHead(MASK, WORDS).attach(model) if step is step_at_mask else None
            start = time.perf_counter()
            step(model, inputs, labels)
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
            if attached:
                attached.remove()
    full, at_mask = (statistics.median(times[2:]) for times in seconds.values())
    shape = f"6-layer BERT, batch {args.batch} × {args.length} tokens on {device}, {torch.get_num_threads()} threads"
    Console().print(f"{shape}: full {1e3 * full:.0f} ms, at the mask {1e3 * at_mask:.0f} ms")
    report([Goal("training step, logits of all positions / at the mask", full / at_mask, 1, at_least=True)])


if __name__ == "__main__":
    main()

"""Time one few-shot run on SST-2 (training with ten evaluations on dev, then test): ours against two usual ways.

python scripts/bench_fewshot.py --data_dir FOLDER               100 steps of 8, all of test, 6 layers of width 384
python scripts/bench_fewshot.py --data_dir FOLDER --size base   the same with width 768
python scripts/bench_fewshot.py --steps 10 --test 64            small, on the demo's movie sentences

All three train a stock Trainer at the same rate from the same random weights, by the same update:
  ours          logits at the mask for the label words alone, batches padded to their longest, grouped by length
  plain         the logits of all words at all positions, batches padded to their longest
  LM-BFF's way  the logits of all words at all positions, everything padded to 128 tokens (Gao et al. 2021)
That the same weights give the same predictions all three ways is checked. Tokenising and building are not timed. On a
CPU the time is the process's CPU time.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from benchmark import Goal, report
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from hf_momentum import trainer_kwargs
from hf_momentum.tasks.demo import demo_model_path
from hf_momentum.tasks.encoding import PromptEncoder, encode_examples, label_word_ids
from hf_momentum.tasks.masked_lm import LabelWordHead
from hf_momentum.tasks.metrics import compute_metrics
from hf_momentum.tasks.prompts import Task, get_task
from hf_momentum.tasks.sources import load_fewshot
from hf_momentum.training.callbacks import BestWeightsCallback

SIZES = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "demo": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072},
}
OURS, PLAIN, LM_BFF = "ours", "plain", "LM-BFF's way"
WAYS = (OURS, PLAIN, LM_BFF)
PADDED, LR, CHECKED = 128, 0.01, 32
Rows = dict[str, list[dict]]


class AllLogits(nn.Module):
    """The usual way: logits of all words at all positions, of which the label words at the mask are used.

    Args:
        model: A masked language model.
        mask: The mask's token id.
        words: The label words' token ids.
    """

    def __init__(self, model: nn.Module, mask: int, words: list[int]) -> None:
        super().__init__()
        self.model, self.mask, self.words = model, mask, words

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """Compute the label words' logits and their loss."""
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        rows = torch.arange(len(input_ids), device=input_ids.device)
        logits = logits[rows, (input_ids == self.mask).int().argmax(dim=1)][:, self.words]
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


class Setting:
    """What all three ways share: the rows, the weights they start from, and the length of a run.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.steps = args.steps
        task = get_task("sst-2" if args.data_dir else "movie-snippets-2")
        self.tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
        self.words = label_word_ids(task, self.tokenizer)
        self.rows, self.padded = encode(task, self.tokenizer, args)
        config = BertConfig(vocab_size=len(self.tokenizer), **SIZES[args.size])
        torch.manual_seed(0)
        self.build = lambda: BertForMaskedLM(config)
        self.weights = self.build().state_dict()

    def trainer(self, way: str, folder: str, steps: int) -> Trainer:
        """Make one way's Trainer on a new model."""
        model = self.build()
        model.load_state_dict(self.weights)
        rows = self.padded if way == LM_BFF else self.rows
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            learning_rate=LR,
            eval_strategy="steps",
            eval_steps=max(1, steps // 10),
            per_device_eval_batch_size=64,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.accelerator.is_available(),
            train_sampling_strategy="group_by_length" if way == OURS else "random",
        )
        if way == OURS:
            LabelWordHead(self.tokenizer.mask_token_id, self.words).attach(model)
            callbacks = [BestWeightsCallback("accuracy")]
            kwargs = trainer_kwargs(model, arguments, optim="sgdm", lr=LR, momentum=0.9, callbacks=callbacks)
        else:
            model = AllLogits(model, self.tokenizer.mask_token_id, self.words)
            settings = {"lr": LR, "momentum": 0.9, "dampening": 0.9}
            kwargs = {"optimizer_cls_and_kwargs": (torch.optim.SGD, settings)}
        data = {"train_dataset": rows["train"], "eval_dataset": rows["dev"], "compute_metrics": compute_metrics}
        collator = DataCollatorWithPadding(self.tokenizer)  # leaves what is padded as it is
        trainer = Trainer(model=model, args=arguments, data_collator=collator, **data, **kwargs)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def test_rows(self, way: str) -> list[dict]:
        """The test rows in one way's order."""
        if way == OURS:  # as the recipe has them: the longest first
            return sorted(self.rows["test"], key=lambda row: -len(row["input_ids"]))
        return (self.padded if way == LM_BFF else self.rows)["test"]


def encode(task: Task, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> tuple[Rows, Rows]:
    """Draw and tokenise the splits; the same rows also padded."""
    data = load_fewshot(task.name, task.labels, args.k, [13], pair=task.pair, data_dir=args.data_dir)[13]
    splits = {"train": data.train, "dev": data.dev, "test": data.test[: args.test]}
    encoder = PromptEncoder(task, tokenizer)
    rows = {name: encode_examples(encoder, examples, task.labels) for name, examples in splits.items()}
    for row in (row for split in rows.values() for row in split):
        row.pop("token_type_ids", None)
    padding = {"padding": "max_length", "max_length": PADDED}
    return rows, {name: [dict(tokenizer.pad(dict(row), **padding)) for row in split] for name, split in rows.items()}


def clock() -> float:
    """CPU time, or on an accelerator the time by the clock once its work is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds(work: Callable[[], object]) -> float:
    """Time a piece of work."""
    start = clock()
    work()
    return clock() - start


def check_predictions(setting: Setting, folder: str) -> float:
    """Predict with the same weights all three ways; the largest difference between the logits."""
    logits = {}
    for way in WAYS:
        rows = (setting.padded if way == LM_BFF else setting.rows)["test"][:CHECKED]
        trainer = setting.trainer(way, folder, 1)
        with torch.no_grad():  # not Trainer.predict, which gives the rows in another order when it groups by length
            batch = trainer.data_collator(rows).to(trainer.args.device)
            logits[way] = trainer.model.eval()(**batch).logits
    difference = max((logits[way] - logits[OURS]).abs().max().item() for way in (PLAIN, LM_BFF))
    if any((logits[way].argmax(1) != logits[OURS].argmax(1)).any() for way in WAYS) or difference > 1e-3:
        sys.exit(f"The three ways predict differently: their logits differ by up to {difference:.1e}.")
    return difference


def measure(setting: Setting, folder: str, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Run the three ways in turn, as often as asked; seconds of training and of test."""
    times = {way: [] for way in WAYS}
    for way in WAYS:
        setting.trainer(way, folder, 2).train()  # warms up
    for way in track(WAYS * rounds, "runs"):
        trainer = setting.trainer(way, folder, setting.steps)
        rows = setting.test_rows(way)
        times[way].append((seconds(trainer.train), seconds(lambda t=trainer, r=rows: t.predict(r))))
    return times


def main() -> None:
    """Check the predictions, take the times, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="folder with sst-2/{train,test}.jsonl; default: the demo's movie sentences")
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--k", type=int, default=16, help="examples per class")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--test", type=int, help="use so many test examples; default: all")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    logging.set_verbosity_error()
    setting = Setting(args)
    with tempfile.TemporaryDirectory() as folder:
        difference = check_predictions(setting, folder)
        times = measure(setting, folder, args.rounds)
    lengths = [len(row["input_ids"]) for row in setting.rows["test"]]
    count = sum(weight.numel() for weight in setting.build().parameters()) / 1e6
    table = Table(
        title=f"{count:.1f} M parameters, {args.steps} steps of 8, {len(lengths)} test prompts of "
        f"{statistics.mean(lengths):.0f} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"logits from the same weights differ by {difference:.0e}"
    )
    for column in ("way", "training s", "test s", "× ours"):
        table.add_column(column, justify="left" if column == "way" else "right")
    totals = {way: [sum(pair) for pair in pairs] for way, pairs in times.items()}
    ratios = {way: statistics.median(t / o for t, o in zip(totals[way], totals[OURS], strict=True)) for way in WAYS}
    for way, pairs in times.items():
        training, test = (statistics.median(column) for column in zip(*pairs, strict=True))
        table.add_row(way, f"{training:.1f}", f"{test:.1f}", f"{ratios[way]:.2f}")
    Console().print(table)
    limits = {LM_BFF: 4.5, PLAIN: 2}
    report(Goal(f"few-shot run, {way} / ours", ratios[way], limit, at_least=True) for way, limit in limits.items())


if __name__ == "__main__":
    main()

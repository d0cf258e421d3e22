r"""Few-shot fine-tuning with SGD, SGDM or any optimizer of the Trainer, by the protocol of the paper's tables.

Per task, optimizer and seed: draw k examples per class, train on every cell of the grid, pick the best on dev, test
the pick once. The table shows mean (std) of the test accuracy over seeds. Every finished run is a line of
OUTPUT_DIR/results.jsonl; started again, the command skips what is finished.

  the demo, on two cores  accelerate launch recipes/roberta_fewshot.py --optim sgd sgdm
  the paper's run         accelerate launch recipes/roberta_fewshot.py --model FacebookAI/roberta-large --task sst-2 \
                            --k 512 --optim sgd sgdm --grid recipes/grids/paper.yaml
  your own task           accelerate launch recipes/roberta_fewshot.py --model FacebookAI/roberta-base \
                            --task my_task.yaml --data_dir my_data --optim sgdm --learning_rate 0.01
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    set_seed,
)
from transformers.utils import logging

from hf_momentum.errors import UserError, require_extra
from hf_momentum.results.record import identifier, package_versions
from hf_momentum.results.tables import print_summary
from hf_momentum.tasks.demo import demo_model_path
from hf_momentum.tasks.encoding import encode_examples
from hf_momentum.tasks.examples import TaskData
from hf_momentum.tasks.masked_lm import LabelWordHead, load_masked_lm
from hf_momentum.tasks.metrics import compute_metrics
from hf_momentum.tasks.prompts import ClassifierEncoder, PromptEncoder, Task, get_task, label_word_ids
from hf_momentum.tasks.sources import load_fewshot
from hf_momentum.training import FewShotArguments, RecipeTrainingArguments, trainer_kwargs
from hf_momentum.training.callbacks import BestWeightsCallback, RunProgressCallback, run_progress
from hf_momentum.training.command_line import given_options, option, parse_arguments, read_yaml, run_command
from hf_momentum.training.memory import optimizer_state_bytes, peak_memory_bytes, reset_peak_memory
from hf_momentum.training.protocol import Grid, Group, Run, is_sharded, optimizer_fields, plan_groups, read_grid
from hf_momentum.training.run_store import RunStore

DEFAULTS = {
    "output_dir": "runs/roberta_fewshot",
    "eval_strategy": "steps",
    "eval_steps": 0.1,  # ten evaluations on dev per run
    "save_strategy": "no",  # the best weights are kept in memory
    "train_sampling_strategy": "group_by_length",
    "per_device_eval_batch_size": 64,
    "logging_nan_inf_filter": False,  # a diverged run has to show
    "disable_tqdm": True,  # one progress display for all runs instead
    "report_to": "none",
    "dataloader_pin_memory": torch.accelerator.is_available(),
}
DEMO = {
    "model": "demo",
    "task": ["movie-snippets-2"],
    "seeds": [13, 21, 42],
    "learning_rate": 0.1,
    "max_steps": 100,
}


def parse(argv: Sequence[str]) -> tuple[FewShotArguments, RecipeTrainingArguments, Grid]:
    """Read the command line; a grid and a config file supply defaults, and no model and no task means the demo."""
    grid = read_grid(option(argv, "grid")) if option(argv, "grid") else Grid()
    config = read_yaml(option(argv, "config")) if option(argv, "config") else {}
    given = given_options(argv) | config.keys()
    if both := given & grid.swept:
        raise UserError(f"--{min(both)} is given and also listed in {option(argv, 'grid')}. Give it in one place.")
    demo = {} if given & {"model", "task", "help"} else {k: v for k, v in DEMO.items() if k not in grid.swept}
    defaults = DEFAULTS | demo | grid.defaults | config
    few, training = parse_arguments([FewShotArguments, RecipeTrainingArguments], argv, defaults, __doc__)
    if not few.model or not few.task:
        raise UserError("Name both --model (such as FacebookAI/roberta-large, or demo) and --task, or neither.")
    if "seed" in given:
        raise UserError("--seed is set by --seeds, one run per seed: use --seeds.")
    few.tuning = few.tuning or ("classifier" if few.model == "demo" else "prompt")
    return few, training, grid


@dataclass
class Draw:
    """One task with one seed: what all of its runs share."""

    few: FewShotArguments
    task: Task
    data: TaskData
    tokenizer: PreTrainedTokenizerBase
    groups: list[Group]

    @cached_property
    def encoder(self) -> Callable:
        """Turns sentences into token ids."""
        return (PromptEncoder if self.few.tuning == "prompt" else ClassifierEncoder)(self.task, self.tokenizer)

    @cached_property
    def rows(self) -> dict[str, list[dict]]:
        """The tokenised splits, made once for all runs; those to evaluate on sorted by length."""
        splits = {"train": self.data.train, "dev": self.data.dev, "test": self.data.test}
        labels = self.task.labels
        return {
            name: encode_examples(self.encoder, examples, labels, sort_by_length=name != "train")
            for name, examples in splits.items()
        }


def load_draws(few: FewShotArguments, training: RecipeTrainingArguments, grid: Grid, console: Console) -> list[Draw]:
    """Load every task and plan every run, so that a mistake shows before the first one starts."""
    tokenizer = load_tokenizer(few)
    draws = []
    for task in map(get_task, few.task):
        if few.tuning == "prompt":
            label_word_ids(task, tokenizer)
        with PartialState().main_process_first():
            splits = load_fewshot(
                task.name, task.labels, few.k, few.seeds, pair=task.pair, data_dir=few.data_dir, hub_id=few.hub_id
            )
        data = next(iter(splits.values()))
        console.print(f"{task.name}: {data.source}", *filter(None, [data.mapping_note]), sep="\n", markup=False)
        common = {"task": task.name, "model": few.model, "tuning": few.tuning, "peft": few.peft, "k": few.k}
        for seed, data in splits.items():
            examples = {"data": identifier({"train": data.train, "dev": data.dev, "test": data.test})}
            groups = plan_groups(training, grid, common | examples, seed)
            draws.append(Draw(few, task, data, tokenizer, groups))
    return draws


def load_tokenizer(few: FewShotArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer; a model that cannot be found shows here."""
    with PartialState().main_process_first():
        path = model_path(few)
        try:
            return AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise UserError(f"Cannot load --model {few.model}: {error}") from error


def model_path(few: FewShotArguments) -> str:
    """The folder or Hub id to load; the demo is fetched on first use."""
    return str(demo_model_path()) if few.model == "demo" else few.model


def build_model(draw: Draw, seed: int) -> nn.Module:
    """Load the model with the label words at the mask, or with a new head; initialise what is new by the seed."""
    few, path = draw.few, model_path(draw.few)
    set_seed(seed)
    if few.tuning == "prompt":
        model = load_masked_lm(path)
        LabelWordHead(draw.tokenizer.mask_token_id, label_word_ids(draw.task, draw.tokenizer)).attach(model)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(draw.task.labels))
    if few.peft == "lora":
        peft = require_extra("peft", "text")
        kind = "SEQ_CLS" if few.tuning == "classifier" else None
        model = peft.get_peft_model(model, peft.LoraConfig(task_type=kind, target_modules="all-linear"))
    return model


def build_trainer(draw: Draw, run: Run, progress: Progress) -> Trainer:
    """A stock Trainer, with our optimizer splatted in and the best weights kept."""
    model = build_model(draw, run.arguments.seed)
    kwargs = trainer_kwargs(model, run.arguments)
    callbacks = [RunProgressCallback(progress, f"  {run.label}"), *kwargs.pop("callbacks", [])]
    if not run.arguments.load_best_model_at_end:
        callbacks.append(BestWeightsCallback("accuracy"))
    trainer = Trainer(
        model=model,
        args=run.arguments,
        train_dataset=draw.rows["train"],
        eval_dataset=draw.rows["dev"],
        data_collator=DataCollatorWithPadding(draw.tokenizer),
        compute_metrics=compute_metrics,
        callbacks=callbacks,
        **kwargs,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_run(draw: Draw, group: Group, run: Run, store: RunStore, progress: Progress) -> None:
    """Train one cell of the grid and record it; a group's only run is tested at once."""
    reset_peak_memory()
    trainer = build_trainer(draw, run, progress)
    result = trainer.train()
    dev_accuracy = max(log["eval_accuracy"] for log in trainer.state.log_history if "eval_accuracy" in log)
    record = {
        "stage": "dev",
        "run_id": run.run_id,
        **{name: run.settings[name] for name in ("task", "model", "tuning", "peft", "k", "seed", "batch_size")},
        **optimizer_fields(run.arguments),
        "max_grad_norm": run.arguments.max_grad_norm,
        "steps": result.global_step,
        "dev_accuracy": dev_accuracy,
        "test_accuracy": None,
        "train_loss": result.training_loss if math.isfinite(result.training_loss) else None,
        "train_seconds": result.metrics["train_runtime"],
        "eval_seconds": None,
        "peak_memory_bytes": peak_memory_bytes(),
        "optimizer_state_bytes": optimizer_state_bytes(trainer.optimizer),
        "processes": run.arguments.world_size,
        "packages": package_versions(),
        "arguments": run.settings["arguments"],
        "data": run.settings["data"],
    }
    if len(group.runs) == 1:
        record |= test(trainer, draw, group)
    elif store.is_best(group, dev_accuracy) and not trainer.is_deepspeed_enabled and not trainer.is_fsdp_enabled:
        store.save_weights(group, run, trainer.model)
    store.append(record)


def test(trainer: Trainer, draw: Draw, group: Group) -> dict[str, Any]:
    """Evaluate on test: the fields that turn a run's record into the tested one."""
    metrics = trainer.predict(draw.rows["test"]).metrics
    tested = {"stage": "test", "test_accuracy": metrics["test_accuracy"], "eval_seconds": metrics["test_runtime"]}
    return tested | {"group_id": group.group_id, "group": group.row_id, "grid_size": len(group.runs)}


def test_pick(draw: Draw, group: Group, store: RunStore, progress: Progress) -> None:
    """Test the run that dev picks; it is trained once more only where its weights could not be kept."""
    run = group.pick(store.records)
    trainer = build_trainer(draw, run, progress)
    if not store.load_weights(group, run, trainer.model):
        trainer.train()
    store.append(store.find(run_id=run.run_id) | test(trainer, draw, group))
    store.drop_weights(group)


def test_untrained(draw: Draw, store: RunStore, progress: Progress) -> None:
    """The zero-shot row: the prompt alone, without any training."""
    run = draw.groups[0].runs[0]
    names = ("task", "model", "tuning", "peft", "k")
    record = {name: run.settings[name] for name in names} | {"optim": "zero-shot", "seed": None, "steps": 0}
    record["run_id"] = identifier(record | {"test": draw.data.test})
    if store.find(run_id=record["run_id"]) is None:
        trainer = build_trainer(draw, run, progress)
        metrics = trainer.predict(draw.rows["test"]).metrics
        store.append(record | {"stage": "test", "test_accuracy": metrics["test_accuracy"]})


def run_draw(draw: Draw, store: RunStore, progress: Progress, overall: TaskID) -> None:
    """Do what is not finished yet of one task and seed."""
    if draw.few.tuning == "prompt" and draw.few.zero_shot and not is_sharded(draw.groups[0].runs[0].arguments):
        test_untrained(draw, store, progress)
    for group in draw.groups:
        for run in group.runs:
            if store.find(run_id=run.run_id) is None:
                train_run(draw, group, run, store, progress)
                report(progress.console, draw, run, store)
                gc.collect()
            progress.advance(overall)
        if store.find(group_id=group.group_id) is None:
            test_pick(draw, group, store, progress)


def report(console: Console, draw: Draw, run: Run, store: RunStore) -> None:
    """One line per finished run."""
    record = store.find(run_id=run.run_id)
    tested = "" if record["test_accuracy"] is None else f", test {100 * record['test_accuracy']:.1f}"
    diverged = "" if record["train_loss"] is not None else " (diverged)"
    where = f"{draw.task.name} seed {run.settings['seed']}"
    scores = f"dev {100 * record['dev_accuracy']:.1f}{tested}{diverged}, {record['train_seconds']:.0f} s"
    console.print(f"{where}: {run.label}: {scores}", highlight=False)


def main(argv: Sequence[str]) -> None:
    """Parse, plan, train what is not finished, print the table."""
    few, training, grid = parse(argv)
    console = Console(quiet=not PartialState().is_main_process)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if few.model == "demo":
        console.print(
            "The demo model has no masked-LM head: classifier tuning. Its tasks are stand-ins, not SST or NLI."
        )
    store = RunStore(training.output_dir)
    draws = load_draws(few, training, grid, console)
    with run_progress(console, disable=not PartialState().is_main_process) as progress:
        overall = progress.add_task("runs", total=sum(len(group.runs) for draw in draws for group in draw.groups))
        for draw in draws:
            run_draw(draw, store, progress, overall)
    print_summary(store.records, store.problems, console)
    console.print(f"Results: {store.file}", highlight=False)


if __name__ == "__main__":
    run_command(main)

r"""Few-shot fine-tuning with SGD, SGDM, SVAG or any optimizer of the Trainer, by the protocol of the paper's tables.

Per task, optimizer and seed: draw k examples per class, train on every cell of the grid, pick the best on dev, test
the pick once. The table shows mean (std) of the test accuracy over seeds. Every finished run is a line of
OUTPUT_DIR/results.jsonl; started again, the command skips what is finished.

  the demo, on two cores  accelerate launch recipes/roberta_fewshot.py --optim sgd sgdm
  the paper's run         accelerate launch recipes/roberta_fewshot.py --model FacebookAI/roberta-large --task sst-2 \
                            --k 512 --optim sgd sgdm --grid recipes/grids/paper.yaml
  your own task           accelerate launch recipes/roberta_fewshot.py --model FacebookAI/roberta-base \
                            --task my_task.yaml --data_dir my_data --optim sgdm --learning_rate 0.01
"""

import dataclasses
import gc
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import Progress
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
)
from transformers.utils import logging

from hf_momentum.command import command_line, read_yaml, run_command
from hf_momentum.errors import UserError
from hf_momentum.results.record import identifier, package_versions
from hf_momentum.results.tables import print_summary
from hf_momentum.tasks.encoding import ClassifierEncoder, PromptEncoder, encode_examples, label_word_ids
from hf_momentum.tasks.examples import TaskData
from hf_momentum.tasks.metrics import compute_metrics
from hf_momentum.tasks.prompts import Task, get_task
from hf_momentum.tasks.sources import load_fewshot
from hf_momentum.training import FewShotArguments, RecipeTrainingArguments, trainer_kwargs
from hf_momentum.training.arguments import TRAINER_DEFAULT_LR, is_our_optimizer
from hf_momentum.training.callbacks import BestWeightsCallback, RunProgressCallback, run_progress
from hf_momentum.training.callbacks.lr_milestones import lr_schedule
from hf_momentum.training.command_line import (
    as_options,
    given_options,
    option,
    parse_arguments,
)
from hf_momentum.training.environment import data_source, hardware, hub_model, learning_curve
from hf_momentum.training.fewshot_model import load_tokenizer
from hf_momentum.training.grid import Grid, read_grid
from hf_momentum.training.initial_models import InitialModels
from hf_momentum.training.memory import optimizer_state_bytes, peak_memory_bytes, reset_peak_memory
from hf_momentum.training.protocol import (
    Group,
    Run,
    is_sharded,
    plan_groups,
    refuse_prompts_under_fsdp,
    under_deepspeed,
    without_clipping_beside_svag,
)
from hf_momentum.training.publish import Publisher, check_push
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
DEMO = {"model": "demo", "task": ["movie-snippets-2"], "seeds": [13, 21, 42]}
DEMO_STEPS, DEMO_LR = 100, 0.1
NOT_HERE = {
    "seed": "the seeds are those of --seeds, one run each",
    "load_best_model_at_end": "the recipe keeps the best weights on dev by itself",
    "resume_from_checkpoint": "the same command started again goes on by itself",
}


def parse(argv: Sequence[str]) -> tuple[FewShotArguments, RecipeTrainingArguments, Grid]:
    """Read the command line. Files come before it, so that it wins; no model and no task means the demo."""
    if path := option(argv, "config"):
        argv = [*as_options(read_yaml(path)), *argv]
    path = option(argv, "grid")
    grid, given = read_grid(path) if path else Grid(), given_options(argv)
    if both := given & grid.swept:
        raise UserError(f"--{min(both)} is given and also listed in {path}. Give it in one place.")
    if misplaced := given & NOT_HERE.keys():
        raise UserError(f"--{min(misplaced)} has no place here: {NOT_HERE[min(misplaced)]}.")
    argv = [*as_options(grid.defaults | {"optim": grid.optim}), *argv]
    defaults = DEFAULTS | (DEMO if given_options(argv).isdisjoint({"model", "task"}) else {})
    few, training = parse_arguments([FewShotArguments, RecipeTrainingArguments], argv, defaults, __doc__)
    if not few.model or not few.task:
        raise UserError("Name both --model (such as FacebookAI/roberta-large, or demo) and --task, or neither.")
    if training.eval_strategy == "no":
        raise UserError("--eval_strategy no: the protocol picks on dev. Use steps or epoch.")
    without_clipping_beside_svag(training, explicit="max_grad_norm" in given)
    check_push(training, few.task)
    refuse_prompts_under_fsdp(training, few.tuning)
    if "model" in defaults:
        grid = add_demo_settings(training, grid, given_options(argv))
    return few, training, grid


def add_demo_settings(training: RecipeTrainingArguments, grid: Grid, given: set[str]) -> Grid:
    """The demo brings a number of steps, and a learning rate for SGD, SGDM and SVAG."""
    if given.isdisjoint({"max_steps", "num_train_epochs"}):
        training.max_steps = DEMO_STEPS
    if given & {"learning_rate", "lr_form"} or "learning_rate" in grid.swept:
        return grid
    rates = {name: [DEMO_LR if is_our_optimizer(name) else TRAINER_DEFAULT_LR] for name in training.optim}
    return dataclasses.replace(grid, learning_rate=rates)


@dataclass
class TaskRuns:
    """All runs of one task with one seed."""

    few: FewShotArguments
    task: Task
    data: TaskData
    tokenizer: PreTrainedTokenizerBase
    models: InitialModels
    groups: list[Group]
    store: RunStore
    publisher: Publisher
    about: dict[str, Any]  # what every record says besides: the data's source, the hardware, the command

    def tokenise(self, previous: "TaskRuns | None") -> None:
        """Tokenise the splits, once for all runs; those to evaluate on are sorted by length.

        The test split is taken over from the previous seed where it is the same.
        """
        encoder = (PromptEncoder if self.few.tuning == "prompt" else ClassifierEncoder)(self.task, self.tokenizer)
        labels = self.task.labels
        self.train_rows = encode_examples(encoder, self.data.train, labels)
        self.dev_rows = encode_examples(encoder, self.data.dev, labels, sort_by_length=True)
        if previous is not None and previous.task is self.task and previous.data.test == self.data.test:
            self.test_rows = previous.test_rows
        else:
            self.test_rows = encode_examples(encoder, self.data.test, labels, sort_by_length=True)

    def build_trainer(self, run: Run, progress: Progress) -> Trainer:
        """A stock Trainer, with our optimizer splatted in and the best weights kept."""
        model = self.models.load(self.task, run.arguments.seed, run.arguments)
        arguments, callbacks = run.arguments, [RunProgressCallback(progress, f"  {run.label}")]
        if under_deepspeed(arguments):
            arguments = dataclasses.replace(arguments, output_dir=str(self.checkpoints(run)))
        else:
            callbacks.append(BestWeightsCallback("accuracy"))
        kwargs = trainer_kwargs(model, arguments, callbacks=callbacks)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=self.train_rows,
            eval_dataset=self.dev_rows,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_metrics=compute_metrics,
            **kwargs,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def checkpoints(self, run: Run) -> Path:
        """Where DeepSpeed keeps a run's best weights."""
        return self.store.folder / "checkpoints" / run.run_id

    def train(self, run: Run, group: Group, progress: Progress) -> None:
        """Train one cell of the grid and record it; a group's only run is tested at once."""
        reset_peak_memory(run.arguments.device)
        trainer = self.build_trainer(run, progress)
        result = trainer.train()
        loss = (
            trainer.accelerator.gather(torch.tensor([result.training_loss], device=run.arguments.device)).mean().item()
        )
        evaluations = [log for log in trainer.state.log_history if "eval_accuracy" in log]
        dev_seconds = sum(log["eval_runtime"] for log in evaluations)
        record = self.record(run) | {
            "steps": result.global_step,
            "dev_accuracy": max(log["eval_accuracy"] for log in evaluations),
            "train_loss": loss if math.isfinite(loss) else None,
            "train_seconds": result.metrics["train_runtime"] - dev_seconds,
            "dev_seconds": dev_seconds,
            "curve": learning_curve(trainer.state.log_history),
            "peak_memory_bytes": peak_memory_bytes(run.arguments.device),
            "optimizer_state_bytes": optimizer_state_bytes(trainer.optimizer),
        }
        if len(group.runs) == 1:
            record |= self.test(trainer, group)
        elif not is_sharded(run.arguments) and self.store.is_best(group, record["dev_accuracy"]):
            self.store.save_weights(group, run, trainer.model)
        self.store.append(record)
        self.publisher.keep(run, trainer)
        self.clean_up(run)
        progress.console.print(self.line(record), highlight=False)

    def record(self, run: Run) -> dict[str, Any]:
        """The fields that a run has before it is trained."""
        measured = dict.fromkeys(("dev_accuracy", "test_accuracy", "train_loss", "train_seconds", "eval_seconds"))
        return {
            "stage": "dev",
            "run_id": run.run_id,
            **run.settings,
            **measured,
            "max_grad_norm": run.arguments.max_grad_norm,
            "lr_schedule": lr_schedule(run.arguments),
            "weight_decay": run.arguments.weight_decay,
            "processes": run.arguments.world_size,
            "packages": package_versions(),
            **self.about,
        }

    def test(self, trainer: Trainer, group: Group) -> dict[str, Any]:
        """Evaluate on test: the fields that turn a run's record into the tested one."""
        metrics = trainer.predict(self.test_rows).metrics
        tested = {"stage": "test", "test_accuracy": metrics["test_accuracy"], "eval_seconds": metrics["test_runtime"]}
        return tested | {"group_id": group.group_id, "group": group.row_id, "grid_size": len(group.runs)}

    def test_pick(self, group: Group, progress: Progress) -> None:
        """Test the run that dev picks; it is trained once more only where its weights could not be kept."""
        run = group.pick(self.store.records)
        trainer = self.build_trainer(run, progress)
        if not self.store.load_weights(group, run, trainer.model):
            trainer.train()
        self.store.append(self.store.find(run_id=run.run_id) | self.test(trainer, group))
        self.publisher.keep(run, trainer)
        self.store.drop_weights(group)
        self.clean_up(run)

    def test_untrained(self, progress: Progress) -> None:
        """The zero-shot row: the prompt alone, without any training."""
        run = self.groups[0].runs[0]
        settings = {name: run.settings[name] for name in ("task", "prompt", "model", "tuning", "k", "test_data")}
        settings |= {"optim": "zero-shot", "seed": None, "steps": 0}
        if self.store.find(run_id=identifier(settings)) is None:
            metrics = self.build_trainer(run, progress).predict(self.test_rows).metrics
            unset = dict.fromkeys(self.record(run).keys() - settings.keys())
            seen = {"test_accuracy": metrics["test_accuracy"], "eval_seconds": metrics["test_runtime"]}
            named = {"stage": "test", "run_id": identifier(settings), "packages": package_versions(), **seen}
            self.store.append(unset | settings | named)

    def clean_up(self, run: Run) -> None:
        """Free what the run held, in memory and on disk."""
        gc.collect()
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            shutil.rmtree(self.checkpoints(run), ignore_errors=True)

    def line(self, record: dict[str, Any]) -> str:
        """One line about a finished run."""
        tested = "" if record["test_accuracy"] is None else f", test {100 * record['test_accuracy']:.1f}"
        diverged = "" if record["train_loss"] is not None else " (diverged)"
        run = f"{record['optim']} lr {record['learning_rate']:g} batch {record['batch_size']}"
        scores = f"dev {100 * record['dev_accuracy']:.1f}{tested}{diverged}, {record['train_seconds']:.0f} s"
        return f"{record['task']} seed {record['seed']}: {run}: {scores}"


def plan(
    few: FewShotArguments,
    training: RecipeTrainingArguments,
    grid: Grid,
    tokenizer: PreTrainedTokenizerBase,
    store: RunStore,
    publisher: Publisher,
    console: Console,
) -> list[TaskRuns]:
    """Load every task and plan every run, so that a mistake shows before the first one starts."""
    tasks = [get_task(name) for name in few.task]
    if len({task.name for task in tasks}) < len(tasks):
        raise UserError(f"Two tasks share a name: {', '.join(task.name for task in tasks)}. Rename one in its file.")
    planned, devices, models = [], hardware(training.device), InitialModels(few, tokenizer)
    for task in tasks:
        if few.tuning == "prompt":
            label_word_ids(task, tokenizer)
        with PartialState().main_process_first():
            draws = load_fewshot(
                task.name, task.labels, few.k, few.seeds, pair=task.pair, data_dir=few.data_dir, hub_id=few.hub_id
            )
        first = next(iter(draws.values()))
        console.print(f"{task.name}: {first.source}", *filter(None, [first.mapping_note]), sep="\n", markup=False)
        common = {"task": task.name, "model": few.model, "tuning": few.tuning, "peft": few.peft, "k": few.k}
        common |= {"prompt": identifier({"task": repr(task)}), "test_data": identifier({"test": first.test})}
        source = data_source(task.name, few.data_dir, few.hub_id) | {"test_examples": len(first.test)}
        about = {"base_model": hub_model(few.model), "data": source, "hardware": devices, "command": command_line()}
        for seed, data in draws.items():
            draw = identifier({"train": data.train, "dev": data.dev})
            groups = plan_groups(training, grid, common, seed, draw)
            publisher.groups += groups
            planned.append(TaskRuns(few, task, data, tokenizer, models, groups, store, publisher, about))
    models.load(tasks[0], few.seeds[0], training)
    return planned


def main(argv: Sequence[str]) -> None:
    """Parse, plan, train what is not finished, print the table."""
    few, training, grid = parse(argv)
    first = PartialState().is_main_process
    console = Console(quiet=not first)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if few.model == "demo":
        console.print("The demo's model is a small sentence encoder, and the tasks that come with it are stand-ins.")
    if "svag" in training.optim:
        console.print("Beside svag no gradient is clipped, in any row of this command (max_grad_norm 0).")
    store = RunStore(training.output_dir)
    publisher, training.push_to_hub = Publisher(store, training.push_to_hub), False  # the runs push nothing
    planned = plan(few, training, grid, load_tokenizer(few), store, publisher, console)
    zero_shot = few.tuning == "prompt" and few.zero_shot and not is_sharded(training)
    with run_progress(console, disable=not first) as progress:
        overall = progress.add_task("runs", total=sum(len(group.runs) for runs in planned for group in runs.groups))
        for previous, runs in zip([None, *planned], planned, strict=False):
            runs.tokenise(previous)
            if zero_shot:
                runs.test_untrained(progress)
            for group in runs.groups:
                for run in group.runs:
                    if store.find(run_id=run.run_id) is None:
                        runs.train(run, group, progress)
                    progress.advance(overall)
                if store.find(group_id=group.group_id) is None:
                    runs.test_pick(group, progress)
    print_summary(store.records, store.problems, console)
    console.print(f"Results: {store.file}", highlight=False)
    if few.model_card or publisher.push:
        name = Path(training.hub_model_id or training.output_dir).absolute().name
        owner = {run.run_id: runs for runs in planned for group in runs.groups for run in group.runs}
        said = publisher.publish(
            name, lambda run: owner[run.run_id].build_trainer(run, progress), planned[0].tokenizer
        )
        console.print(said, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_command(main)

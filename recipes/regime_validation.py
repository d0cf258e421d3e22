r"""Is the verdict on momentum right? Predicted at a tenth of the run, compared with what SGD and SGDM then do.

A cell is a task, a learning rate and a batch size. In each, SGD and SGDM (β = 0.9) train at the same effective
learning rate from the same seeds: same initial weights, same order of the data. At a tenth of SGDM's first run
`RegimeCallback` measures (in a run of its own, which stops there). The two differ in a cell if the mean over the seeds
of log(final training loss of SGD / of SGDM) is further from 0 than its own 95% t interval reaches and than {floor}; a
lost run counts as {most} times the loss of chance. Both were fixed before any cell was run.

  all cells      python recipes/regime_validation.py --data_dir DATA --workers 2
  a quick look   python recipes/regime_validation.py --data_dir DATA --tasks cifar10 --learning_rates 0.1 3 --seeds 1 2

DATA holds fewshot/TASK/{{train,test}}.jsonl and cifar10/{{train,test}}.parquet. Text is classified by the embedded
demo model, images by a ResNet-8 with GroupNorm. Every finished run is a line of OUTPUT_DIR/results.jsonl; started
again, the command skips what is finished. It writes validation.png, .svg, the cells as .jsonl, and the tables as .md.
"""

import argparse
import functools
import itertools
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from hf_momentum.command import command_line, run_command
from hf_momentum.diagnostics.measure import get_budget
from hf_momentum.diagnostics.regime import CURVATURE, EFFECT_FLOOR, NOISE, UNDECIDED
from hf_momentum.diagnostics.validation import MOST_LOSS, PREDICTED, areas_under_curves, compare, measurement_to_json
from hf_momentum.errors import UserError
from hf_momentum.results.canvas import save_figure
from hf_momentum.results.export import Report, Sheet, print_report, to_markdown
from hf_momentum.results.jobs import compute_missing
from hf_momentum.results.ranking import AucComparison
from hf_momentum.results.record import identifier, package_versions, read_records
from hf_momentum.results.validation_figure import validation_figure
from hf_momentum.tasks.augmentation import AugmentedImages, collate, normalisation
from hf_momentum.tasks.encoding import ClassifierEncoder, encode_examples
from hf_momentum.tasks.image_models import build_image_model
from hf_momentum.tasks.images import load_images, shrink
from hf_momentum.tasks.prompts import get_task
from hf_momentum.tasks.sources import load_task_data
from hf_momentum.training import RegimeCallback, trainer_kwargs
from hf_momentum.training.arguments import FewShotArguments, MomentumTrainingArguments
from hf_momentum.training.fewshot_model import build_model, load_tokenizer

IMAGES = "cifar10"
TASKS = ("sst-2", "trec", "snli", IMAGES)
LRS = (0.003, 0.3, 3.0, 1.0, 0.1)  # in this order, so that the first ones span three decades
SEEDS = (13, 21, 42)
OPTIMIZERS = ("sgd", "sgdm")
MEASURED_AT = 0.1  # of the run
TEXT = {"batch_sizes": (4, 32), "steps": 40, "micro_batch": 8}
PICTURES = {"batch_sizes": (16, 512), "steps": 100, "micro_batch": 32}
TRAIN_SIZE, LONGEST, EVALUATED = 2048, 16, 256  # texts, the most tokens of one, and those that the final loss is of


@dataclass(frozen=True)
class Workload:
    """What is trained in a task: the data, and how a model is made of a seed."""

    train: Dataset
    evaluated: Dataset
    collate: Callable
    make_model: Callable[[int], nn.Module]
    classes: int


class MeasureAndStop(RegimeCallback):
    """Measures after a number of steps, and ends the run there."""

    def on_step_end(self, args, state, control, **kwargs):
        """Pass by all steps but that one."""
        if state.global_step == self.every:
            super().on_step_end(args, state, control, **kwargs)
            control.should_training_stop = True


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    layout = {"usage": "%(prog)s --data_dir DATA [options]", "formatter_class": argparse.RawDescriptionHelpFormatter}
    text = __doc__.format(floor=EFFECT_FLOOR, most=MOST_LOSS)
    parser = argparse.ArgumentParser(description=text, allow_abbrev=False, **layout)
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, help="folder with fewshot/ and cifar10/")
    add("--output_dir", type=Path, default=Path("runs/regime_validation"), help="default: %(default)s")
    add("--tasks", nargs="+", default=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)} (default: all)")
    add("--learning_rates", nargs="+", type=float, default=LRS, metavar="η", help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=SEEDS, help="two at least; default: %(default)s")
    add("--workers", type=int, default=1, help="runs at once, which share out the cores (default: 1)")
    args = parser.parse_args(argv)
    if unknown := set(args.tasks) - set(TASKS):
        raise UserError(f"Unknown task: {min(unknown)!r}. Allowed: {', '.join(TASKS)}.")
    if len(set(args.seeds)) < 2:
        raise UserError("--seeds needs two different ones at least: the interval is over seeds.")
    if args.workers < 1 or not all(0 < lr < math.inf for lr in args.learning_rates):
        raise UserError("--workers must be at least 1, and --learning_rates above 0 and finite.")
    for part in {"cifar10" if task == IMAGES else "fewshot" for task in args.tasks}:
        if not (args.data_dir / part).is_dir():
            raise UserError(f"There is no folder {args.data_dir / part}. --data_dir holds fewshot/ and cifar10/.")
    return args


@functools.cache
def load_workload(task: str, data_dir: Path) -> Workload:
    """Load a task's data once for all runs of a process."""
    return load_pictures(data_dir / "cifar10") if task == IMAGES else load_text(task, data_dir / "fewshot")


def load_text(name: str, data_dir: Path) -> Workload:
    """Short sentences, a fixed part of the training set, for the demo model with a new classifier."""
    few = FewShotArguments(model="demo", task=[name], tuning="classifier", data_dir=str(data_dir))
    task, tokenizer = get_task(name), load_tokenizer(few)
    examples = load_task_data(task.name, task.labels, pair=task.pair, data_dir=data_dir).train
    random.Random(0).shuffle(examples)
    rows = encode_examples(ClassifierEncoder(task, tokenizer), examples, task.labels)
    rows = [row for row in rows if len(row["input_ids"]) <= LONGEST][:TRAIN_SIZE]
    make_model = functools.partial(build_model, few, task, tokenizer)
    return Workload(rows, rows[:EVALUATED], DataCollatorWithPadding(tokenizer), make_model, len(task.labels))


def load_pictures(data_dir: Path) -> Workload:
    """4,096 images of CIFAR-10, averaged down to 16 × 16 pixels."""
    data = load_images(IMAGES, data_dir=data_dir, train_size=4096)
    train = AugmentedImages(shrink(data.train, 2), *normalisation(data))
    classes = len(data.classes)

    def make_model(seed: int) -> nn.Module:
        set_seed(seed)
        return build_image_model("cifar_resnet8", classes, norm="group")

    return Workload(train, train, collate, make_model, classes)


def run(
    task: str, lr: float, batch_size: int, optim: str, seed: int, data_dir: Path, measured: bool
) -> dict[str, Any]:
    """Train to the end and give the final training loss, None if it is not finite; or measure early on and stop."""
    logging.disable(logging.WARNING)  # a run that diverges, or cannot be measured, is in the record
    transformers_logging.disable_progress_bar()
    work, record = load_workload(task, data_dir), {"cell": {"task": task, "lr": lr, "batch_size": batch_size}}
    record |= {"optim": optim, "seed": seed}
    callbacks = [measuring(work, sizes(task), seed)] if measured else []
    trainer = make_trainer(work, lr, batch_size, optim, seed, data_dir, sizes(task)["steps"], callbacks)
    trainer.train()
    if measured:
        return record | findings(*callbacks)
    loss = trainer.evaluate()["eval_loss"]
    return record | {"chance": math.log(work.classes), "loss": loss if math.isfinite(loss) else None}


def make_trainer(
    work: Workload,
    lr: float,
    batch_size: int,
    optim: str,
    seed: int,
    data_dir: Path,
    steps: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """Build a stock Trainer with linear decay."""
    args = MomentumTrainingArguments(
        output_dir=str(data_dir),  # nothing is written
        optim=optim,
        learning_rate=lr,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        max_steps=steps,
        lr_scheduler_type="linear",
        max_grad_norm=0.0,
        seed=seed,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    model = work.make_model(seed)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=work.train,
        eval_dataset=work.evaluated,
        data_collator=work.collate,
        **trainer_kwargs(model, args, callbacks=callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def sizes(task: str) -> dict[str, Any]:
    """How a task is trained and measured."""
    return PICTURES if task == IMAGES else TEXT


def measuring(work: Workload, size: Mapping[str, Any], seed: int) -> MeasureAndStop:
    """Measure at the economy budget, on examples drawn anew."""
    shape = (get_budget("economy").batches, size["micro_batch"])
    chosen = np.random.default_rng(seed).integers(len(work.train), size=shape).tolist()
    batches = DataLoader(work.train, batch_sampler=chosen, collate_fn=work.collate)
    return MeasureAndStop(every=round(MEASURED_AT * size["steps"]), batches=batches)


def findings(callback: RegimeCallback) -> dict[str, Any]:
    """What was measured, or why nothing was."""
    if callback.report is None:
        return {"problem": callback.problem}
    return measurement_to_json(callback.measured, callback.report.setting)


def plan(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All jobs by name: for each cell the measurement, then the runs; both algorithms of a seed next to each other."""
    jobs = {}
    for lr, task in itertools.product(args.learning_rates, args.tasks):
        for batch_size in sizes(task)["batch_sizes"]:
            wanted = [("sgdm", args.seeds[0], True)]
            wanted += [(optim, seed, False) for seed, optim in itertools.product(args.seeds, OPTIMIZERS)]
            for optim, seed, measured in wanted:
                job = {"task": task, "lr": lr, "batch_size": batch_size}
                job |= {"optim": optim, "seed": seed, "measured": measured}
                name = job | {"sizes": sizes(task), "packages": package_versions(("hf_momentum",))}
                jobs[identifier(name)] = job | {"data_dir": args.data_dir}
    return jobs


def ranking_sheet(areas: Mapping[str, AucComparison], cells: Sequence[Mapping[str, Any]]) -> Sheet:
    """The areas, and how far ours is ahead."""
    differing = sum(cell["differ"] for cell in cells)
    rows = []
    for name, area in areas.items():
        lead = f"{-area.difference:+.3f} [{-area.high:+.3f}, {-area.low:+.3f}]" if name != PREDICTED else ""
        rows.append((name, f"{area.first:.3f} [{area.first_low:.3f}, {area.first_high:.3f}]", lead))
    caption = f"{len(cells)} cells, SGD and SGDM differ in {differing}. 95% bootstrap over cells; the lead is paired."
    return Sheet("Area under the ROC curve", ("predictor", "AUC", "lead of ours"), rows, caption, texts=1)


def verdict_sheet(cells: Sequence[Mapping[str, Any]]) -> Sheet:
    """Verdicts against outcomes."""
    rows = []
    for verdict in (NOISE, UNDECIDED, CURVATURE):
        of = [cell["differ"] for cell in cells if cell["verdict"] == verdict]
        rows.append((verdict, str(of.count(True)), str(of.count(False))))
    caption = "Cells. 'noise dominates' says that they do not differ, 'curvature dominates' that they do."
    return Sheet("Verdict and outcome", ("verdict at 10% of the run", "differ", "do not"), rows, caption, texts=1)


def failures_sheet(cells: Sequence[Mapping[str, Any]]) -> Sheet:
    """The cells whose verdict was decided and wrong."""
    rows = []
    for cell in cells:
        if cell["verdict"] != {True: NOISE, False: CURVATURE}[cell["differ"]]:
            continue
        found = f"{cell['measured']:+.2f} [{cell['low']:+.2f}, {cell['high']:+.2f}]"
        place = (cell["task"], f"{cell['lr']:g}", str(cell["batch_size"]))
        fraction, predicted = (cell[name]["value"] for name in ("limit_fraction", "log_ratio"))
        rows.append((*place, cell["verdict"], f"{fraction:.2f}", f"{predicted:+.2f}", found))
    columns = ("task", "η", "B", "verdict", "η/limit", "predicted", "found [95%]")
    return Sheet("Where the verdict fails", columns, rows, "log(loss of SGD / of SGDM)", texts=1)


def present(records: Sequence[Mapping[str, Any]], folder: Path, console: Console) -> None:
    """Rank, draw, write and print."""
    every = compare(records)
    cells = [cell for cell in every if "verdict" in cell]
    differing = sum(cell["differ"] for cell in cells)
    if not 2 <= differing <= len(cells) - 2:
        raise UserError(
            f"SGD and SGDM differ in {differing} of {len(cells)} cells: a ranking needs two cells of either outcome. "
            "Add learning rates."
        )
    areas = areas_under_curves(cells)
    sheets = [ranking_sheet(areas, cells), verdict_sheet(cells), failures_sheet(cells)]
    shown = [cell | {"predicted": cell["log_ratio"]["value"]} for cell in cells]
    files = save_figure(validation_figure(shown, areas, EFFECT_FLOOR), every, folder / "validation")
    report = Report(sheets, every)
    files.append(folder / "validation.md")
    files[-1].write_text(to_markdown(report), encoding="utf-8")
    print_report(report, console)
    for cell in every:
        if "problem" in cell:
            place = f"{cell['task']}, η = {cell['lr']:g}, B = {cell['batch_size']}"
            console.print(f"Left out: {place}: {cell['problem']}", markup=False, highlight=False, soft_wrap=True)
    console.print(", ".join(map(str, files)), highlight=False, soft_wrap=True)


def main(argv: Sequence[str]) -> None:
    """Run what is not finished, then compare."""
    args, console = parse(argv), Console()
    file, jobs = args.output_dir / "results.jsonl", plan(args)
    about = {"packages": package_versions(), "command": command_line()}
    compute_missing(run, jobs, file, args.workers, about, console, "runs")
    present([record for record in read_records(file).records if record["run_id"] in jobs], args.output_dir, console)


if __name__ == "__main__":
    run_command(main)

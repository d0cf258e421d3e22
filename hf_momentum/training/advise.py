"""Does this run need momentum? A few steps of SGD, a measurement, and the verdict as table, JSON line and picture."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainerCallback

from hf_momentum.command import command_line
from hf_momentum.diagnostics.measure import get_budget
from hf_momentum.diagnostics.measurements import Estimated, Measurements
from hf_momentum.diagnostics.regime import RegimeReport, predicted_ratios
from hf_momentum.errors import UserError, require_extra
from hf_momentum.optim.schedules import check_momentum, check_nonnegative
from hf_momentum.results.canvas import save_figure
from hf_momentum.results.record import append_record, package_versions
from hf_momentum.results.regime_figure import regime_figure
from hf_momentum.tasks.encoding import ClassifierEncoder, PromptEncoder, encode_examples, label_word_ids
from hf_momentum.tasks.prompts import get_task
from hf_momentum.tasks.sources import load_fewshot
from hf_momentum.training.arguments import FewShotArguments, MomentumTrainingArguments
from hf_momentum.training.callbacks.regime import RegimeCallback
from hf_momentum.training.environment import data_source, hardware, hub_model
from hf_momentum.training.fewshot_model import build_model, load_tokenizer
from hf_momentum.training.trainer_kwargs import trainer_kwargs

DEMO = {"model": "demo", "task": "movie-snippets-2"}
DEMO_LR, DEMO_STEPS, STEPS = 0.1, 100, 1000
_WARM_PART = 0.1
_GRID = 80  # learning rates of the picture
_INTERVALS = (
    "descent",
    "noise",
    "curvature",
    "noise_batch",
    "noise_ratio",
    "h",
    "sgd_limit",
    "sgdm_limit",
    "limit_fraction",
    "log_ratio",
    "score",
    "difference",
)


@dataclasses.dataclass
class AdviseArguments:
    """What `hf-momentum advise` is asked. Without model and task it is the demo.

    Attributes:
        model: A Hub id, a local folder, or `demo`.
        task: A task's name, or a YAML file of the user's own.
        learning_rate: η of the run to judge; the demo brings one.
        per_device_train_batch_size: B.
        momentum: β of the SGDM to judge.
        max_steps: Steps of the run to judge, with linear decay to 0. Default: 1,000, of the demo 100.
        warm_steps: Steps of SGD before the measurement. Default: a tenth of `max_steps`.
        k: Examples per class.
        seed: Of the draw, the initialisation and the data order.
        data_dir: A folder with the task's data, instead of the Hub.
        tuning: `prompt` or `classifier`.
        budget: `economy` or `full`, see `diagnostics.measure.measure`. Default: `full`, of the demo `economy`.
        output: Folder for `advice.jsonl` and the picture.
    """

    model: str | None = None
    task: str | None = None
    learning_rate: float | None = None
    per_device_train_batch_size: int = 8
    momentum: float = 0.9
    max_steps: int | None = None
    warm_steps: int | None = None
    k: int = 16
    seed: int = 13
    data_dir: str | None = None
    tuning: str = "prompt"
    budget: str | None = None
    output: Path = Path("runs/advise")

    def __post_init__(self) -> None:
        if self.model is None and self.task is None:
            self.model, self.task = DEMO.values()
        if not self.model or not self.task:
            raise UserError("Name both --model (such as FacebookAI/roberta-large, or demo) and --task, or neither.")
        is_demo = self.model == "demo"
        if self.learning_rate is None:
            if not is_demo:
                raise UserError(
                    "Give --learning_rate: the verdict is about it. Far below its limit SGD never needs β."
                )
            self.learning_rate = DEMO_LR
        if not check_nonnegative("learning_rate", self.learning_rate):
            raise UserError("--learning_rate must be above 0.")
        if not check_momentum(self.momentum):
            raise UserError("--momentum must be above 0: it is that of the SGDM to compare with SGD.")
        if self.tuning not in {"prompt", "classifier"}:
            raise UserError(f"Unknown --tuning {self.tuning!r}. Allowed: prompt, classifier.")
        self.budget = self.budget or ("economy" if is_demo else "full")
        get_budget(self.budget)
        self.max_steps = (DEMO_STEPS if is_demo else STEPS) if self.max_steps is None else self.max_steps
        if self.warm_steps is None:
            self.warm_steps = max(1, round(_WARM_PART * self.max_steps))
        if not 1 <= self.warm_steps < self.max_steps:
            raise UserError(
                f"--warm_steps {self.warm_steps} must lie between 1 and --max_steps {self.max_steps} - 1: a "
                "measurement before the first step misleads, and one after the last has nothing to judge."
            )
        if self.per_device_train_batch_size < 1:
            raise UserError(
                f"--per_device_train_batch_size must be at least 1, not {self.per_device_train_batch_size}."
            )

    @property
    def few(self) -> FewShotArguments:
        """The same for the few-shot protocol."""
        return FewShotArguments(
            model=self.model,
            task=[self.task],
            data_dir=self.data_dir,
            k=self.k,
            seeds=[self.seed],
            tuning=self.tuning,
        )


class _StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def advise(asked: AdviseArguments, console: Console) -> RegimeReport:
    """Train a little, measure, and say what was found; see the module.

    Args:
        asked: What is asked.
        console: Where to print.

    Returns:
        The verdict.

    Raises:
        UserError: If nothing could be measured.
    """
    require_extra("matplotlib", "report")  # before the work is done
    trainer, source = build_trainer(asked)
    batches = get_budget(asked.budget).batches
    console.print(
        f"{asked.task}: {source}. {asked.warm_steps} steps of SGD, then a measurement on {batches} batches of "
        f"{asked.per_device_train_batch_size} ({asked.budget}).",
        markup=False,
        highlight=False,
    )
    with console.status("training and measuring"):
        trainer.train()
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, RegimeCallback))
    if callback.report is None:
        raise UserError(callback.problem)
    measured, report = callback.measured, callback.report
    console.print(
        f"Linear decay has brought the learning rate from {asked.learning_rate:g} to {report.setting.lr:.3g} by then.",
        highlight=False,
    )
    console.print(verdict_table(measured, report))
    for sentence in report.sentences:
        console.print(sentence, markup=False, highlight=False)
    append_record(asked.output / "advice.jsonl", advice_record(asked, measured, report, trainer.args.device))
    for file in (asked.output / "advice.jsonl", *draw(measured, report, asked)):
        console.print(file, markup=False, highlight=False, soft_wrap=True)
    return report


def build_trainer(asked: AdviseArguments) -> tuple[Trainer, str]:
    """Build the run to judge as the few-shot recipe does, with plain SGD, to be stopped after the measurement.

    Args:
        asked: What is asked.

    Returns:
        A stock Trainer, and where its data is from.
    """
    few, task = asked.few, get_task(asked.task)
    tokenizer = load_tokenizer(few)
    if asked.tuning == "prompt":
        label_word_ids(task, tokenizer)
    data = load_fewshot(task.name, task.labels, asked.k, [asked.seed], pair=task.pair, data_dir=asked.data_dir)
    encoder = (PromptEncoder if asked.tuning == "prompt" else ClassifierEncoder)(task, tokenizer)
    args = MomentumTrainingArguments(
        output_dir=str(asked.output),
        optim="sgd",
        learning_rate=asked.learning_rate,
        per_device_train_batch_size=asked.per_device_train_batch_size,
        max_steps=asked.max_steps,
        seed=asked.seed,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    model = build_model(few, task, tokenizer, asked.seed)
    measuring = RegimeCallback(every=asked.warm_steps, budget=asked.budget, momentum=asked.momentum)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=encode_examples(encoder, data[asked.seed].train, task.labels),
        data_collator=DataCollatorWithPadding(tokenizer),
        **trainer_kwargs(model, args, callbacks=[measuring, _StopAt(asked.warm_steps)]),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, data[asked.seed].source


def verdict_table(measured: Measurements, report: RegimeReport) -> Table:
    """Show what the verdict rests on.

    Args:
        measured: What was measured.
        report: The verdict.

    Returns:
        A table of quantities, values and 95% intervals.
    """
    setting = report.setting
    sharpness = max((mode.curvature for mode in measured.modes), key=lambda each: each.value)
    rows: list[tuple[str, Estimated]] = [
        ("descent of a step, η|∇L|²", report.descent),
        ("noise-induced term, ½η² tr(HΣ)/B", report.noise),
        ("curvature-induced term, ½η² ∇LᵀH∇L", report.curvature),
        ("noise over curvature, B_noise/B", report.noise_ratio),
        ("sharpness λ_max", sharpness),
        ("h = ηλ_max", report.h),
        (f"SGD is stable below η, at B = {setting.batch_size:,}", report.sgd_limit),
        (f"SGDM at β = {setting.momentum:g} is stable below η", report.sgdm_limit),
        (f"η = {setting.lr:g} as a fraction of SGD's limit", report.limit_fraction),
        (f"|log loss ratio| of SGD and SGDM after {setting.steps:,} more steps", report.score),
    ]
    table = Table("quantity", "value", "95% interval")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, estimate in rows:
        table.add_row(name, *_numbers(estimate))
    table.add_row("memory of the momentum, GiB", f"{setting.momentum_bytes / 2**30:.3g}", "")
    return table


def _numbers(estimate: Estimated) -> tuple[str, str]:
    if not math.isfinite(estimate.low) and not math.isfinite(estimate.high):
        return f"{estimate.value:.3g}", "undecided"
    return f"{estimate.value:.3g}", f"{estimate.low:.3g} to {estimate.high:.3g}"


def advice_record(
    asked: AdviseArguments, measured: Measurements, report: RegimeReport, device: torch.device
) -> dict[str, Any]:
    """Write a verdict as a record: what was asked, measured and found.

    Args:
        asked: What was asked.
        measured: What was measured.
        report: The verdict.
        device: Where was measured.

    Returns:
        Plain values; a number that is not finite is None.
    """
    names = ("squared_gradient", "noise_trace", "hessian_noise", "hessian_gradient", "noise_batch")
    modes = [
        {field.name: _plain(getattr(mode, field.name)) for field in dataclasses.fields(mode)}
        for mode in measured.modes
    ]
    task = get_task(asked.task).name
    return {
        "stage": "advice",
        **dataclasses.asdict(asked),
        "output": str(asked.output),
        "task": task,
        "verdict": report.verdict,
        "sentences": list(report.sentences),
        "effect_floor": report.effect_floor,
        "steps_left": report.setting.steps,
        "momentum_bytes": report.setting.momentum_bytes,
        "matching_lr": _finite(report.matching_lr),
        "matching_batch": report.matching_batch,
        **{name: _plain(getattr(report, name)) for name in _INTERVALS},
        "measured": {"loss": measured.loss, "modes": modes} | {n: _plain(getattr(measured, n)) for n in names},
        "base_model": hub_model(asked.model),
        "data": data_source(task, asked.data_dir),
        "hardware": hardware(device),
        "packages": package_versions(),
        "command": command_line(),
    }


def _plain(estimate: Estimated) -> dict[str, float | None]:
    return {end: _finite(getattr(estimate, end)) for end in ("value", "low", "high")}


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None


def draw(measured: Measurements, report: RegimeReport, asked: AdviseArguments) -> list[Path]:
    """Draw the terms and the predicted ratio over the learning rate, with the user's marked.

    Args:
        measured: What was measured.
        report: The verdict.
        asked: What was asked.

    Returns:
        The files, named by model, task, learning rate and batch size.
    """
    setting, limits = report.setting, (report.sgd_limit.value, report.sgdm_limit.value)
    marks = [setting.lr, *(limit for limit in limits if math.isfinite(limit))]
    lrs = np.geomspace(min(marks) / 30, max(marks) * 3, _GRID).tolist()
    terms = {"descent": report.descent, "noise-induced": report.noise, "curvature-induced": report.curvature}
    model, task = Path(asked.model).name, get_task(asked.task).name
    figure, rows = regime_figure(
        setting.lr,
        {name: (each.value, each.low, each.high) for name, each in terms.items()},
        setting.momentum,
        limits,
        lrs,
        predicted_ratios(measured, setting, lrs),
        report.effect_floor,
        f"{model} on {task}, batch size {setting.batch_size:,}: {report.verdict}",
    )
    stem = f"{model}_{task}_lr{asked.learning_rate:g}_batch{setting.batch_size}"
    return save_figure(figure, rows, asked.output / stem)

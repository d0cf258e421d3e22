"""Ask during a run whether it needs momentum, and log the answer."""

import logging
import math
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_momentum.diagnostics.measure import get_budget, measure
from hf_momentum.diagnostics.measurements import Interval, Measurements, Setting
from hf_momentum.diagnostics.probe import Loss, Probe
from hf_momentum.diagnostics.regime import EFFECT_FLOOR, RegimeReport, assess
from hf_momentum.errors import UserError
from hf_momentum.optim import SGDM, effective_lr, get_optimizer_info
from hf_momentum.training.callbacks.trackers import logged_hyperparameters
from hf_momentum.training.optimizers import innermost_optimizer

logger = logging.getLogger(__name__)

MOST_OF_THE_TIME = 0.05  # spent on measurements, as a part of the time trained
_PART = 0.1  # of the run between two occasions for a measurement
_LOGGED = ("h", "noise_ratio", "limit_fraction", "score")


class RegimeCallback(TrainerCallback):
    """Measures gradient noise and curvature during a stock Trainer's run, and judges whether it needs momentum.

    The run is not touched: its trajectory is bit for bit the same without the callback. Measured is the loss of
    training batches of the run's size, without dropout and clipping, on the present weights, between two steps.
    Momentum, learning rate and schedule, batch size and the steps that remain are the run's.

    *Logs.* `regime/h` (`ηλ_max`), `regime/noise_ratio` (`B_noise/B`), `regime/limit_fraction` (η over SGD's limit of
    stability), `regime/score` (`|log E L_SGD/E L_SGDM|` predicted), each with `_low` and `_high`, and
    `regime/seconds`. They extend the Trainer's log of that step, which is made for it, and reach the trackers of
    `report_to` if the callback is given to `trainer_kwargs(..., callbacks=[...])` or in `LogFirstCallbacks`. What is
    not finite is left out. `regime/verdict`, a text, stands in `state.log_history` alone; the whole verdict goes to
    this module's logger.

    *When.* With `every=N` after every N steps. Without, there is an occasion after each tenth of the run, and it is
    taken as long as measurements take at most 5% of the time trained: the callback times the steps and itself. The
    first one is taken if, by the budget's cost in gradients, it will be at most 5% of the whole run's time; another
    one once what was spent is at most 5% of the time trained so far, and with it at most 5% of the whole. A run that
    is too short for one measurement gets none, with a warning.

    *Several processes.* All measure at the same steps, each on batches of its own, and the estimates are those from
    all. Sharded parameters (ZeRO-3, FSDP) are refused. A loss that is not finite is met by a warning and no
    measurement; if it is so on some processes only, the run stops in the others' collective operation.

    *Optimizers.* `SGDM` and `torch.optim.SGD` without dampening and Nesterov's step, with one learning rate and
    momentum for all groups. Others are refused, SVAG too: its noise is ℓ times that of its batches by design.

    Args:
        every: Steps between measurements, or None.
        budget: `"economy"` or `"full"`, see `diagnostics.measure.measure` for their cost.
        batches: Micro-batches of equal size to measure on, as the model takes them, at least as many as the budget
            says. They should be independent of each other, and drawn as the training's.
        dataset: Where to draw them from otherwise, each example anew: any dataset with a length and indices. By
            default that of the training dataloader, whose `collate_fn` makes the batches.
        effect_floor: The |log ratio| of final losses that counts as a difference; state it beforehand.
        momentum: β of the SGDM to judge where the run has none. Default: that of `sgdm`.
        loss: As for `Probe`; by default `model(**batch).loss`.

    Attributes:
        measured: What the last measurement found, or None.
        report: Its verdict.
        problem: Why an occasion since then gave none, or None.
        reports: Step → verdict, of all measurements of this training.
    """

    extends_logs = True
    logs_first = False  # set by LogFirstCallbacks

    def __init__(
        self,
        every: int | None = None,
        budget: str = "economy",
        batches: Iterable[Any] | None = None,
        dataset: Any = None,
        effect_floor: float = EFFECT_FLOOR,
        momentum: float | None = None,
        loss: Loss | None = None,
    ):
        if every is not None and (not isinstance(every, int) or every < 1):
            raise UserError(f"Invalid every: {every!r}. Give a number of steps, 1 or more, or None.")
        if batches is not None and dataset is not None:
            raise UserError("batches and dataset both say what to measure on. Give one of them.")
        self.every, self.budget, self.effect_floor, self.loss = every, budget, effect_floor, loss
        self._needed = get_budget(budget)
        self.batches = None if batches is None else list(batches)
        self.dataset = dataset
        self.momentum = get_optimizer_info("sgdm").defaults["momentum"] if momentum is None else momentum
        self.measured: Measurements | None = None
        self.report: RegimeReport | None = None
        self.reports: dict[int, RegimeReport] = {}
        self.problem: str | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        """Check what can be checked before the first step, and start the clock."""
        if args.report_to and not self.logs_first:
            logger.warning(
                "RegimeCallback stands behind the trackers (%s), which will not see its values. Give your callbacks "
                "to trainer_kwargs(..., callbacks=[...]), or all of them as LogFirstCallbacks([...]).",
                ", ".join(args.report_to),
            )
        self._probe = Probe(model, self.loss)
        rate_and_momentum(optimizer)
        self._dataset = train_dataloader.dataset if self.dataset is None else self.dataset
        if self.batches is None:
            check_indexed(self._dataset)
        elif len(self.batches) < self._needed.batches:
            raise UserError(
                f"{len(self.batches)} batches are too few: the budget {self.budget!r} needs {self._needed.batches}."
            )
        self.measured = self.report = self.problem = None
        self.reports, self._values, self._texts, self._warned = {}, {}, {}, False
        self._generator = torch.Generator().manual_seed(args.seed + args.process_index)
        self._first_step, self._began, self._spent, self._longest = state.global_step, time.perf_counter(), 0.0, None

    def on_step_end(self, args, state, control, **kwargs):
        """Measure, if it is time to, and ask for a log."""
        if not self._is_due(args, state):
            return
        began = time.perf_counter()
        self._measure(args, state, **kwargs)
        seconds = time.perf_counter() - began
        self._spent += seconds
        self._longest = max(seconds, self._longest or 0.0)
        if self._values:
            self._values["regime/seconds"] = seconds
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Extend the log of the step after which was measured."""
        if self._values and "loss" in logs:
            logs.update(self._values)
            state.log_history[-1].update(self._values | self._texts)
            self._values, self._texts = {}, {}

    def _is_due(self, args: TrainingArguments, state: TrainerState) -> bool:
        if state.global_step >= state.max_steps:
            return False
        period = self.every or max(1, round(_PART * state.max_steps))
        if state.global_step % period:
            return False
        if self.every is not None:
            return True
        decision = [self._has_time(args, state)]
        broadcast_object_list(decision)  # the processes' clocks differ
        return decision[0]

    def _has_time(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether one more measurement stays within the allowed part of the time trained."""
        trained = time.perf_counter() - self._began - self._spent
        steps = state.global_step - self._first_step
        whole = trained / steps * (state.max_steps - self._first_step)
        expected = self._longest
        if expected is None:
            expected = self._needed.gradients * trained / (steps * args.gradient_accumulation_steps)
            if expected > MOST_OF_THE_TIME * whole and not self._warned:
                self._warned = True
                logger.warning(
                    "No measurement: one takes about %.3g s, more than %.0f%% of this run's %.3g s. "
                    "RegimeCallback(every=N) measures all the same.",
                    expected,
                    100 * MOST_OF_THE_TIME,
                    whole,
                )
        return self._spent <= MOST_OF_THE_TIME * trained and self._spent + expected <= MOST_OF_THE_TIME * whole

    def _measure(self, args, state, model=None, optimizer=None, lr_scheduler=None, train_dataloader=None, **kwargs):
        try:
            setting = run_setting(args, state, model, optimizer, lr_scheduler, self.momentum)
            batches = self.batches or self._draw(args.train_batch_size, train_dataloader.collate_fn)
            measured = measure(self._probe, batches, budget=self.budget, seed=args.seed)
            report = assess(measured, setting, self.effect_floor)
        except UserError as error:  # mostly a run that has diverged, which is to go on as it would
            self.problem = str(error)
            logger.warning("Not measured after step %d: %s", state.global_step, error)
            return
        self.measured, self.report, self.problem = measured, report, None
        self.reports[state.global_step] = report
        self._values = logged_values(report)
        self._texts = {"regime/verdict": report.verdict}
        if state.is_world_process_zero:
            logger.info("After step %d: %s", state.global_step, " ".join(report.sentences))

    def _draw(self, size: int, collate: Any) -> list[Any]:
        """Draw micro-batches, each example anew, whatever random numbers the dataset and its collation take."""
        with kept_random_states():
            shape = (self._needed.batches, size)
            indices = torch.randint(len(self._dataset), shape, generator=self._generator).tolist()
            return [collate([self._dataset[index] for index in row]) for row in indices]


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Put the random states of Python, NumPy and torch (CPU and accelerator) back at the end.

    Yields:
        Nothing.
    """
    python, numpy = random.getstate(), np.random.get_state()
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = [] if kind is None else [torch.accelerator.current_device_index()]
    try:
        with torch.random.fork_rng(devices, device_type=None if kind is None else kind.type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def rate_and_momentum(optimizer: Any) -> tuple[float, float]:
    """Give η and β of the coming step.

    Args:
        optimizer: The run's, also in the wrappers of accelerate and DeepSpeed.

    Returns:
        η of Eq. 3, and β.

    Raises:
        UserError: If they are not known, or are several.
    """
    inner = innermost_optimizer(optimizer)
    found = logged_hyperparameters(inner)
    if "ell" in found:
        raise UserError(
            "RegimeCallback judges SGD and SGDM, not SVAG, whose noise is amplified by design. Measure in the run "
            "with plain SGD."
        )
    if not {"momentum", "effective_lr"} <= found.keys():
        raise UserError(
            f"RegimeCallback cannot judge this {type(inner).__name__}: it needs SGDM, or torch.optim.SGD without "
            "dampening and Nesterov's step, with one learning rate and one momentum for all parameter groups."
        )
    return found["effective_lr"], found["momentum"]


def run_setting(
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    optimizer: Any,
    lr_scheduler: Any,
    momentum: float,
) -> Setting:
    """Say how a Trainer's run goes on.

    η is the largest effective learning rate of the steps that remain, so that a warm-up is judged by what follows it.
    The schedule is read from the functions of the Trainer's own schedulers; the rate under any other (such as
    ReduceLROnPlateau) cannot be foreseen and is taken for constant.

    Args:
        args: The Trainer's arguments.
        state: Its state.
        model: The bare model.
        optimizer: Its optimizer.
        lr_scheduler: Its scheduler.
        momentum: β of the SGDM to judge where the run has none.

    Returns:
        The setting.

    Raises:
        UserError: If the learning rate stays 0 to the end.
    """
    rate, own = rate_and_momentum(optimizer)
    steps = state.max_steps - state.global_step
    scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
    if hasattr(scheduler, "lr_lambdas"):
        is_ours = isinstance(innermost_optimizer(optimizer), SGDM)
        base = scheduler.base_lrs[0] if is_ours else effective_lr(scheduler.base_lrs[0], own)
        rates = [float(base * scheduler.lr_lambdas[0](scheduler.last_epoch + step)) for step in range(steps)]
    else:
        rates = [rate] * steps
    peak = max(rates)
    if peak <= 0:
        raise UserError(f"The learning rate stays 0 for the {steps} steps that remain: there is nothing to judge.")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Setting(
        lr=peak,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        momentum=own or momentum,
        steps=steps,
        factors=[each / peak for each in rates],
        momentum_bytes=sum(parameter.numel() * parameter.element_size() for parameter in trainable),
    )


def logged_values(report: RegimeReport) -> dict[str, float]:
    """The numbers of a verdict under the names of the log, with the ends of their intervals.

    Args:
        report: The verdict.

    Returns:
        Those that are finite.
    """
    found = {}
    for name in _LOGGED:
        interval: Interval = getattr(report, name)
        ends = {"": interval.value, "_low": interval.low, "_high": interval.high}
        found |= {f"regime/{name}{end}": value for end, value in ends.items() if math.isfinite(value)}
    return found


def check_indexed(dataset: Any) -> None:
    """Refuse a dataset that examples cannot be drawn from.

    Args:
        dataset: The dataset.

    Raises:
        UserError: If it has no length or no indices.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(
            f"Examples cannot be drawn from a {type(dataset).__name__}, which has no length or no indices. Give "
            "RegimeCallback(batches=[...]) or a dataset=... with both."
        )

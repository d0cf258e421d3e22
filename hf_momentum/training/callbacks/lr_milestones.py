"""Step decay of the learning rate over a schedule of the Trainer's own."""

import math
from collections.abc import Callable, Sequence

from transformers import SchedulerType, TrainerCallback, TrainingArguments

from hf_momentum.errors import UserError
from hf_momentum.optim.schedules import is_real

CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")


def step_decay(step: int, total_steps: int, milestones: Sequence[float], decay: float) -> float:
    """The factor `decay^n`, with n the number of milestones that were passed.

    Args:
        step: Steps made.
        total_steps: Steps of the whole training.
        milestones: Fractions of the training in (0, 1); one at f is passed at the first step ≥ f·total_steps.
        decay: Factor per milestone.

    Returns:
        The factor on the learning rate.
    """
    passed = sum(step >= math.ceil(fraction * total_steps - 1e-6) for fraction in milestones)
    return decay**passed


def check_milestones(milestones: Sequence[float], decay: float, lr_scheduler_type: str) -> None:
    """Check what step decay is asked for.

    Args:
        milestones: Fractions of the training.
        decay: Factor per milestone.
        lr_scheduler_type: Name of the Trainer's schedule that it multiplies.

    Raises:
        UserError: If the milestones are not rising fractions in (0, 1), the factor is not in (0, 1), or the Trainer's
            schedule moves the learning rate after its warm-up.
    """
    if not all(is_real(value) and 0 < value < 1 for value in milestones) or sorted(set(milestones)) != [*milestones]:
        raise UserError(
            f"lr_milestones must be rising fractions of the training between 0 and 1, such as 0.5 0.75, not "
            f"{list(milestones)}."
        )
    if not is_real(decay) or not 0 < decay < 1:
        raise UserError(f"lr_decay must lie between 0 and 1, such as 0.1, not {decay!r}.")
    if lr_scheduler_type not in CONSTANT_SCHEDULES:
        raise UserError(
            f"lr_milestones beside lr_scheduler_type={lr_scheduler_type}: both move the learning rate. Use "
            f"{' or '.join(CONSTANT_SCHEDULES)}."
        )


def lr_schedule(args: TrainingArguments) -> str:
    """The learning rate's schedule in a few words.

    Args:
        args: The Trainer's arguments.

    Returns:
        Such as `linear`, `constant warmup 6` (steps), `linear warmup 0.5` (of the training) or `constant ×0.1 at 0.5,
        0.75`.
    """
    words = [SchedulerType(args.lr_scheduler_type).value.removesuffix("_with_warmup")]
    if args.warmup_steps:
        words.append(f"warmup {args.warmup_steps:g}")
    if milestones := getattr(args, "lr_milestones", None):
        words.append(f"×{args.lr_decay:g} at " + ", ".join(f"{fraction:g}" for fraction in milestones))
    return " ".join(words)


class LRMilestonesCallback(TrainerCallback):
    """Multiplies the learning rate by a factor at fractions of the training (step decay).

    It puts the factor into the functions of the Trainer's own scheduler, so that the scheduler's state, a resume and
    what is logged stay the Trainer's. Fractions need no change under SVAG, where steps are stretched by ℓ.

    Args:
        milestones: Rising fractions of the training in (0, 1), such as 0.5 and 0.75 for epochs 80 and 120 of 160.
        decay: The factor.
    """

    def __init__(self, milestones: Sequence[float], decay: float = 0.1):
        check_milestones(milestones, decay, CONSTANT_SCHEDULES[0])
        self.milestones, self.decay = tuple(milestones), decay

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        """Put the factor into the scheduler, and its rate for the coming step into the optimizer."""
        check_milestones(self.milestones, self.decay, SchedulerType(args.lr_scheduler_type).value)
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
        if not hasattr(scheduler, "lr_lambdas"):
            raise UserError(
                f"lr_milestones cannot drive a {type(scheduler).__name__}. Leave the scheduler to the Trainer."
            )
        scheduler.lr_lambdas = [self._decayed(warmup, state.max_steps) for warmup in scheduler.lr_lambdas]
        rates = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    def _decayed(self, factor: Callable[[int], float], total_steps: int) -> Callable[[int], float]:
        def decayed(step: int) -> float:
            return factor(step) * step_decay(step, total_steps, self.milestones, self.decay)

        return decayed

"""Drive the momentum of SGDM over the steps of a stock Trainer."""

from collections.abc import Sequence

from transformers import TrainerCallback, TrainerState

from hf_momentum.errors import UserError
from hf_momentum.optim import MomentumSchedule, momentum_schedule
from hf_momentum.training.optimizers import (
    describe_schedule,
    innermost_optimizer,
    note_schedule,
    request_hyperparameters,
    requested_hyperparameters,
)


def get_schedule(
    schedule: str | MomentumSchedule, kwargs: dict[str, float | Sequence[float]] | None = None
) -> MomentumSchedule:
    """Take a momentum schedule by name or as it is.

    Args:
        schedule: A name of `MOMENTUM_SCHEDULES`, or a function of step, total steps and learning rate.
        kwargs: Keywords of a schedule that is named.

    Returns:
        The schedule.

    Raises:
        UserError: If the name or a keyword is unknown, or keywords come with a schedule that is ready made.
    """
    if isinstance(schedule, str):
        return momentum_schedule(schedule, **kwargs or {})
    if not callable(schedule):
        raise UserError(f"Invalid momentum_schedule: {schedule!r}. Give a name, or a function (step, total, lr) → β.")
    if kwargs:
        raise UserError(f"momentum_schedule_kwargs {kwargs} belong to a schedule's name, not to {schedule!r}.")
    return schedule


def steps_done(state: TrainerState, lr_scheduler: object) -> int:
    """Optimizer steps that were made: the Trainer's global step without those that the fp16 scaler skipped.

    The Trainer counts a skipped step as well, but does not move its learning rate scheduler, whose own count is part
    of every checkpoint.

    Args:
        state: The Trainer's state.
        lr_scheduler: The Trainer's scheduler. One without a count of steps (ReduceLROnPlateau, DeepSpeed's own) leaves
            the global step.

    Returns:
        The number of steps before the coming one.
    """
    scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
    count = getattr(scheduler, "last_epoch", None)
    counts_steps = isinstance(count, int) and hasattr(scheduler, "base_lrs")
    return min(count, state.global_step) if counts_steps else state.global_step


class MomentumScheduleCallback(TrainerCallback):
    """Sets `β_k = schedule(k, total steps, η_k)` in every parameter group before step k.

    k is the Trainer's count of steps, so that nothing of its own needs to be kept in a checkpoint. Part of
    `trainer_kwargs(..., momentum_schedule=...)`; alone it works with an `SGDM` given as `Trainer(optimizers=...)`.

    Args:
        schedule: A name of `MOMENTUM_SCHEDULES` or a function of step, total steps and learning rate.
        **kwargs: Keywords of a schedule that is named.
    """

    def __init__(self, schedule: str | MomentumSchedule, **kwargs: float | Sequence[float]):
        self.schedule = get_schedule(schedule, kwargs)
        self._groups = []

    def on_init_end(self, args, state, control, optimizer=None, **kwargs):
        """Note the schedule in an optimizer that the Trainer was given, before a checkpoint is loaded into it."""
        if optimizer is not None:
            inner = innermost_optimizer(optimizer)
            note_schedule(inner, self.schedule)
            if requested_hyperparameters(inner) is not None:
                request_hyperparameters(inner)

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        """Take hold of the groups that the steps are made with."""
        self._groups = innermost_optimizer(optimizer).param_groups
        own = describe_schedule(self.schedule)
        for group in self._groups:
            noted = group.get("momentum_schedule") or own
            if noted != own:
                raise UserError(
                    f"The optimizer's momentum schedule is {noted}, the callback's {own}. Give one of them."
                )
        note_schedule(innermost_optimizer(optimizer), self.schedule)

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        """Set the momentum of the coming step."""
        step = steps_done(state, lr_scheduler)
        for group in self._groups:
            group["momentum"] = self.schedule(step, state.max_steps, float(group["lr"]))

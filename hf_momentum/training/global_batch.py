"""A global batch size split into processes × micro-batch × accumulation steps."""

from dataclasses import dataclass

from hf_momentum.errors import UserError


@dataclass(frozen=True)
class BatchSplit:
    """How the examples of one gradient are spread: `processes · per_device · accumulation` is their number.

    Attributes:
        processes: Processes that train together, one for each device.
        per_device: Examples of a micro-batch, the Trainer's `per_device_train_batch_size`.
        accumulation: Micro-batches that each process adds up, the Trainer's `gradient_accumulation_steps`.
    """

    processes: int
    per_device: int
    accumulation: int

    @property
    def global_batch_size(self) -> int:
        """Examples of one gradient over all processes."""
        return self.processes * self.per_device * self.accumulation

    def __str__(self) -> str:
        return (
            f"{self.global_batch_size} = {self.processes} (processes) × {self.per_device} (micro-batch) "
            f"× {self.accumulation} (accumulation steps)"
        )


def split_batch(
    global_batch_size: int, processes: int = 1, micro_batch: int | None = None, *, exact: bool = False
) -> BatchSplit:
    """Split a global batch evenly over processes and micro-batches, with as few accumulation steps as possible.

    For SVAG give the batch size of the SGD run that it is compared with: each of a step's two gradients has that size,
    and `svag_arguments` doubles the accumulation steps of any split.

    With BatchNorm the split matters, since statistics are those of a micro-batch: keep `per_device` the same in runs
    that are compared, with `exact=True`.

    Args:
        global_batch_size: Examples of one gradient over all processes, such as 1024 to 8192.
        processes: Number of processes.
        micro_batch: The most examples that fit on a device at once; None if any number does.
        exact: Take `micro_batch` itself, and not the largest smaller number that divides a process's share.

    Returns:
        The split.

    Raises:
        UserError: If a number is no positive integer, the processes do not divide the global batch, or an exact
            micro-batch does not divide a process's share. The message lists the numbers that do.
    """
    _check_positive(global_batch_size=global_batch_size, processes=processes)
    if micro_batch is not None:
        _check_positive(micro_batch=micro_batch)
    elif exact:
        raise UserError("exact=True takes a micro_batch. Give one, or leave exact out.")
    share, rest = divmod(global_batch_size, processes)
    if rest:
        near = " or ".join(str(n * processes) for n in (share, share + 1) if n)
        raise UserError(
            f"A global batch of {global_batch_size} cannot be split evenly over {processes} processes. "
            f"Possible numbers of processes: {_listed(_divisors(global_batch_size))}. "
            f"Nearest global batch for {processes} processes: {near}."
        )
    possible = _divisors(share)
    if exact and micro_batch not in possible:
        raise UserError(
            f"Micro-batches of {micro_batch} do not add up to the {share} examples that each of {processes} processes "
            f"takes of a global batch of {global_batch_size}. Possible micro-batches: {_listed(possible)}."
        )
    per_device = max(size for size in possible if micro_batch is None or size <= micro_batch)
    return BatchSplit(processes, per_device, share // per_device)


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if not (isinstance(value, int) and value >= 1):
            raise UserError(f"Invalid {name}: {value!r}. It must be an integer of at least 1.")


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))

"""Grid files: learning rates × batch sizes (× optimizers), and defaults for other arguments."""

from dataclasses import dataclass, field
from typing import Any

from hf_momentum.command import read_yaml
from hf_momentum.errors import UserError

SWEPT = ("optim", "learning_rate", "per_device_train_batch_size")


@dataclass(frozen=True)
class Grid:
    """What a grid file holds.

    Attributes:
        learning_rate: Learning rates, for all optimizers or per optimizer's name; None if not swept.
        per_device_train_batch_size: Batch sizes; None if not swept.
        optim: Optimizers; None if the command line names them.
        defaults: Other arguments, which the command line may override.
    """

    learning_rate: list[float] | dict[str, list[float]] | None = None
    per_device_train_batch_size: list[int] | None = None
    optim: list[str] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def swept(self) -> set[str]:
        """The names that the grid sweeps."""
        return {name for name in SWEPT if getattr(self, name) is not None}

    def rates(self, optim: str, otherwise: float | None) -> list[float | None]:
        """The learning rates of one optimizer.

        Args:
            optim: Its name.
            otherwise: The one to take if the grid sweeps none.

        Returns:
            At least one rate.

        Raises:
            UserError: If the grid has rates for other optimizers only.
        """
        if not isinstance(self.learning_rate, dict):
            return self.learning_rate or [otherwise]
        if optim not in self.learning_rate:
            known = ", ".join(self.learning_rate)
            raise UserError(f"The grid lists learning rates for {known}, but not for {optim}. Add them.")
        return self.learning_rate[optim]


def read_grid(path: str) -> Grid:
    """Read a grid file.

    Args:
        path: A YAML file with any of `learning_rate` (a list, or a list per optimizer), `per_device_train_batch_size`,
            `optim` and `defaults`.

    Returns:
        The grid.

    Raises:
        UserError: If the file is missing or holds anything else.
    """
    content = read_yaml(path)
    if {"recipe", "search"} <= content.keys():
        raise UserError(f"{path} describes a sweep, not a grid. Run it with: python scripts/sweep.py {path}")
    if unknown := content.keys() - {*SWEPT, "defaults"}:
        raise UserError(f"{path}: unknown key {min(unknown)!r}. Allowed: {', '.join(SWEPT)}, defaults.")
    defaults = content.get("defaults", {})
    if not isinstance(defaults, dict):
        raise UserError(f"{path}: defaults must hold lines 'argument: value'.")
    if misplaced := defaults.keys() & {*SWEPT, "seed"}:
        name = min(misplaced)
        where = "use --seeds" if name == "seed" else f"list it beside defaults, such as {name}: [{defaults[name]}]"
        raise UserError(f"{path}: {name} does not belong under defaults: {where}.")
    rates, sizes, names = (content.get(name) for name in ("learning_rate", SWEPT[2], "optim"))
    if isinstance(rates, dict):
        rates = {name: _list_of(path, f"learning_rate of {name}", values, float) for name, values in rates.items()}
    elif rates is not None:
        rates = _list_of(path, "learning_rate", rates, float)
    sizes = None if sizes is None else _list_of(path, SWEPT[2], sizes, int)
    names = None if names is None else _list_of(path, "optim", names, str)
    return Grid(rates, sizes, names, defaults)


def _list_of(path: str, name: str, values: Any, kind: type) -> list:
    try:
        if not isinstance(values, list) or not values:
            raise ValueError
        return [kind(value) for value in values]
    except (TypeError, ValueError):
        raise UserError(f"{path}: {name} must be a list such as [1, 2] of {kind.__name__}, not {values!r}.") from None

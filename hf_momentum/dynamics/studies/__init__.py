"""Studies: one question about SGD and SGDM each, answered by numbers.

A study is a module with two functions. `cells(**parameters)` splits its parameters, which a YAML file or a caller
gives, into cells: dicts of JSON values that are computed one by one, in any order and any process. `rows(**cell)`
computes one cell and returns its rows, flat dicts of JSON values. Where a row compares, it holds what was `measured`,
the interval `low` to `high` of it, and what is `predicted`; an exact value has no interval. Random numbers come from
the cell's `seed` alone. Formulas without a source are derived here: the tests hold them to simulations or to exact
recursions.
"""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from hf_momentum.errors import UserError

NAMES = (
    "warm_up",
    "weak_error",
    "slow_sde",
    "svag",
    "schedules",
    "momentum",
    "noise_scale",
    "threshold",
    "tradeoff",
    "failures",
)
Row = dict[str, Any]


class Study(Protocol):
    """What a study's module offers."""

    def cells(self, **parameters: Any) -> list[dict[str, Any]]:
        """Split the parameters into cells."""

    def rows(self, **cell: Any) -> list[Row]:
        """Compute one cell."""


def get_study(name: str) -> Study:
    """Find a study by its name.

    Args:
        name: One of `NAMES`.

    Returns:
        Its module.

    Raises:
        UserError: If there is none.
    """
    if name not in NAMES:
        raise UserError(f"Unknown study: {name!r}. Allowed: {', '.join(NAMES)}.")
    return import_module(f"{__name__}.{name}")


def plan(name: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split a study's parameters into cells; what they leave out has the study's default.

    Args:
        name: The study.
        parameters: Name → value.

    Returns:
        The cells.

    Raises:
        UserError: If the study has no such parameter, or a value is not allowed.
    """
    cells = get_study(name).cells
    allowed = inspect.signature(cells).parameters
    if unknown := parameters.keys() - allowed.keys():
        raise UserError(f"The study {name} has no parameter {min(unknown)!r}. Allowed: {', '.join(allowed)}.")
    try:
        return cells(**parameters)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(f"Study {name}: {error}") from error

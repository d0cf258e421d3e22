"""A sweep of a recipe over a grid or a search: its configuration file, its trials and their commands."""

import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_momentum.command import read_yaml
from hf_momentum.errors import UserError
from hf_momentum.optim.schedules import unknown_name
from hf_momentum.results.record import identifier
from hf_momentum.training.command_line import as_options

RESULTS = "results.jsonl"
_CHOICES = {"sampler": ("grid", "tpe"), "direction": ("maximize", "minimize")}
_DEFAULTS = {
    "launch": (),
    "options": {},
    "sampler": "grid",
    "trials": None,
    "objective": "dev_accuracy",
    "direction": "maximize",
}


@dataclass(frozen=True)
class Range:
    """What TPE searches for one option: numbers between two bounds; whole ones if both bounds are.

    Attributes:
        low: Lower bound, included.
        high: Upper bound, included.
        log: Whether to search on a logarithmic scale.
    """

    low: float
    high: float
    log: bool = False

    def __str__(self) -> str:
        return f"<{self.low:g} to {self.high:g}{', log' if self.log else ''}>"


@dataclass(frozen=True)
class Sweep:
    """What a sweep's configuration file holds, see `read_sweep`.

    Attributes:
        name: The file's name, followed by the axes that the command line replaced.
        started_with: The command that runs the sweep, without secrets and without what differs between its workers.
        recipe: Path of the script that each trial runs.
        launch: Words before it; none for this Python.
        options: Options that all trials share, `output_dir` among them.
        search: Axis → label → the options that the label sets; or axis → range.
        sampler: `grid` or `tpe`.
        trials: Number of trials, of TPE.
        objective: The records' field to improve.
        direction: `maximize` or `minimize`.
    """

    name: str
    started_with: str
    recipe: str
    launch: tuple[str, ...]
    options: dict[str, Any]
    search: dict[str, dict[str, dict[str, Any]] | Range]
    sampler: str
    trials: int | None
    objective: str
    direction: str

    @property
    def output_dir(self) -> Path:
        """The sweep's folder."""
        return Path(self.options["output_dir"])

    def cells(self) -> list[dict[str, str]]:
        """The trials before a sampler fills them: axis → label for each cell of a grid, the last axis fastest."""
        if self.sampler == "tpe":
            return [{} for _ in range(self.trials)]
        return [dict(zip(self.search, labels, strict=True)) for labels in itertools.product(*self.search.values())]

    def chosen(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The options that a trial sets.

        Args:
            params: Axis → label or number.

        Returns:
            Option → value.
        """
        options = {}
        for axis, value in params.items():
            choices = self.search[axis]
            options |= {axis: value} if isinstance(choices, Range) else choices[value]
        return options

    def describe(self, params: Mapping[str, Any]) -> str:
        """A trial in a few words.

        Args:
            params: Axis → label or number.

        Returns:
            Such as `task=sst-2 seeds=13 optim=sgd`.
        """
        parts = []
        for axis, value in params.items():
            label = f"{value:.4g}" if isinstance(value, float) else str(value)
            parts.append(f"{axis}={label}" if self.chosen({axis: value}).keys() == {axis} else label)
        return " ".join(parts)

    def folder(self, params: Mapping[str, Any]) -> Path:
        """Where a trial writes: the same in every process, another if any option changes.

        Args:
            params: Axis → label or number.

        Returns:
            A folder below the sweep's own.
        """
        shared = {name: value for name, value in self.options.items() if name != "output_dir"}
        settings = {"command": [self.recipe, *as_options(shared | self.chosen(params))]}
        words = re.sub(r"[^\w.+=-]+", "_", self.describe(params))[:80]
        return self.output_dir / "trials" / f"{words}-{identifier(settings)[:8]}"

    def command(self, params: Mapping[str, Any], python: str) -> list[str]:
        """The command line of a trial, which writes into a folder of its own.

        Args:
            params: Axis → label or number.
            python: The interpreter, where the sweep names no launcher.

        Returns:
            The words.
        """
        options = self.options | self.chosen(params) | {"output_dir": str(self.folder(params))}
        return [*(self.launch or [python]), self.recipe, *as_options(options)]

    def score(self, records: Sequence[Mapping[str, Any]]) -> float:
        """The objective's mean over the runs of a trial.

        Args:
            records: The trial's records; of several with one `run_id` the last counts, and zero-shot rows do not.

        Returns:
            The mean.

        Raises:
            UserError: If there is no record, or one without the objective.
        """
        runs = {r.get("run_id", index): r for index, r in enumerate(records) if r.get("optim") != "zero-shot"}
        values = [record.get(self.objective) for record in runs.values()]
        if not values:
            raise UserError("it recorded no run.")
        if missing := values.count(None):
            raise UserError(
                f"{missing} of {len(values)} runs have no {self.objective} (diverged ones have no loss). Name another "
                "objective in the sweep's file."
            )
        return sum(values) / len(values)

    def definition(self) -> dict[str, Any]:
        """What has to stay the same while a sweep is worked on, as JSON holds it."""
        shared = {f"options.{name}": as_options({name: value}) for name, value in self.options.items()}
        shared.pop("options.output_dir")
        search = {
            f"search.{axis}": str(choices) if isinstance(choices, Range) else list(choices)
            for axis, choices in self.search.items()
        }
        names = ("recipe", "sampler", "objective", "direction")[: 4 if self.sampler == "tpe" else 2]
        fixed = {name: getattr(self, name) for name in names}
        return json.loads(json.dumps(fixed | shared | search))


def read_sweep(path: str | Path, given: Mapping[str, Any]) -> Sweep:
    """Read a sweep's configuration.

    Args:
        path: A YAML file with `recipe`, `search` and any of `launch`, `options`, `sampler`, `trials`, `objective` and
            `direction`.
        given: Options of the command line; they win over those of the file, and replace an axis of the same name that
            lists single values or is a range.

    Returns:
        The sweep.

    Raises:
        UserError: If the file is missing, holds anything else, or names an option twice.
    """
    content = read_yaml(path)
    allowed = {"recipe", "search", *_DEFAULTS}
    if unknown := content.keys() - allowed:
        raise UserError(f"{path}: {unknown_name('key', min(unknown, key=str), allowed)}")
    values = _DEFAULTS | content
    for name in ("recipe", "search"):
        if not values.get(name):
            raise UserError(f"{path} has no {name}. A sweep needs the recipe's path and what to search.")
    if not Path(str(values["recipe"])).is_file():
        raise UserError(f"{path}: no such recipe: {values['recipe']}. Paths start at the current directory.")
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise UserError(f"{path}: {unknown_name(name, values[name], choices)}")
    for name in ("options", "search"):
        if not isinstance(values[name], dict):
            raise UserError(f"{path}: {name} must hold lines 'option: value'.")
    launch = values["launch"]
    values["launch"] = tuple(shlex.split(launch) if isinstance(launch, str) else map(str, launch))
    replaced = {axis: given[axis] for axis, old in values["search"].items() if axis in given and _is_plain(old)}
    kept = {name: value for name, value in given.items() if name not in replaced}
    values["options"] = {**values["options"], **kept}
    if not values["options"].get("output_dir"):
        raise UserError(f"{path}: give output_dir under options, or --output_dir. Everything is written there.")
    values["search"] = {
        str(axis): _read_axis(path, str(axis), _as_list(replaced[axis]) if axis in replaced else axis_values)
        for axis, axis_values in values["search"].items()
    }
    public = {name: value for name, value in given.items() if not name.endswith("token")}
    command = shlex.join(["python", "scripts/sweep.py", str(path), *as_options(public)])
    name = " ".join([Path(path).stem, *(f"{axis}={_label(value)}" for axis, value in replaced.items())])
    sweep = Sweep(name=name, started_with=command, **values)
    _check_sampler(path, sweep)
    _check_names(path, sweep, kept)
    return sweep


def _is_plain(axis: Any) -> bool:
    """Whether words of a command line can stand for the axis: a range, or a list of single values."""
    return isinstance(axis, dict) or not any(isinstance(value, (dict, list)) for value in _as_list(axis))


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _read_axis(path: str | Path, axis: str, values: Any) -> dict[str, dict[str, Any]] | Range:
    if isinstance(values, dict):
        return _read_range(path, axis, values)
    if not isinstance(values, list) or not values:
        raise UserError(f"{path}: search.{axis} must be a list such as [1, 2], or a range for TPE, not {values!r}.")
    mappings = [isinstance(value, dict) for value in values]
    if any(mappings) and not all(mappings):
        raise UserError(f"{path}: search.{axis} mixes values and mappings of options. Write all as 'option: value'.")
    choices = {_label(value): value if isinstance(value, dict) else {axis: value} for value in values}
    if len(choices) < len(values):
        raise UserError(f"{path}: search.{axis} lists a value twice: {', '.join(map(_label, values))}.")
    return choices


def _label(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={_label(part)}" for name, part in value.items())
    return " ".join(map(_label, value)) if isinstance(value, list) else str(value)


def _read_range(path: str | Path, axis: str, values: dict) -> Range:
    if unknown := values.keys() - {"low", "high", "log"}:
        raise UserError(f"{path}: search.{axis}: {unknown_name('key', min(unknown, key=str), ('low', 'high', 'log'))}")
    try:  # YAML reads 1e-3, which has no dot, as text
        low, high = (value if isinstance(value, int) else float(value) for value in (values["low"], values["high"]))
        valid = low < high and (low > 0 or not values.get("log"))
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise UserError(
            f"{path}: search.{axis} must be a range such as {{low: 0.001, high: 1.0, log: true}}, with low below high "
            f"and, for log, above 0; not {values}."
        )
    return Range(low, high, bool(values.get("log", False)))


def _check_sampler(path: str | Path, sweep: Sweep) -> None:
    ranges = [axis for axis, choices in sweep.search.items() if isinstance(choices, Range)]
    if sweep.sampler == "grid" and ranges:
        raise UserError(f"{path}: search.{ranges[0]} is a range. A grid needs a list; ranges are for 'sampler: tpe'.")
    if sweep.sampler == "grid" and sweep.trials is not None:
        raise UserError(f"{path}: a grid runs every combination. Leave trials out, or set 'sampler: tpe'.")
    if sweep.sampler == "tpe" and not (isinstance(sweep.trials, int) and sweep.trials > 0):
        raise UserError(f"{path}: 'sampler: tpe' needs the number of trials, such as 'trials: 20'.")


def _check_names(path: str | Path, sweep: Sweep, given: Mapping[str, Any]) -> None:
    seen = dict.fromkeys(sweep.options, "options") | dict.fromkeys(given, "the command line")
    for axis, choices in sweep.search.items():
        names = {axis} if isinstance(choices, Range) else set().union(*choices.values())
        if twice := names & seen.keys():
            name = min(twice)
            raise UserError(f"{path}: {name} is set by search.{axis} and also by {seen[name]}. Set it in one place.")
        seen |= dict.fromkeys(names, f"search.{axis}")

"""Rows of a table: which runs belong together, what a row is called, and which rows can be compared."""

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_momentum.results.record import find_fault

_SETTING = ("task", "model", "tuning", "k")
# What two rows must share to be compared; "searched" fields may differ where a row's own runs differ in them.
_CONDITIONS = ("test_data", "prompt", "peft", "lr_schedule", "max_grad_norm", "weight_decay")
_SEARCHED = ("batch_size", "steps")
# Arguments that need not agree: the optimizer's own, those that `_SEARCHED` stands for, and those that SVAG stretches.
_OWN_ARGUMENTS = {
    "momentum_schedule_kwargs", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon",
}  # fmt: skip
_SIZES = {"per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"}
_STRETCHED = {"warmup_steps", "eval_steps", "eval_delay", "save_steps", "lr_scheduler_kwargs"}
# What is added to a name: to all rows of a setting that differ in it, or only to those that would read alike.
_MARKS = {
    "lr_schedule": "lr {}", "batch_size": "batch {}", "max_grad_norm": "clip {}", "weight_decay": "weight decay {}",
}  # fmt: skip
_MARKS_OF_ALIKE = {"steps": "{} steps", "grid_size": "{} cells", "effective_lr": "η={}", "learning_rate": "lr={}"}


@dataclass(frozen=True)
class Row:
    """One method on one task: a run per seed, or in a figure all its runs.

    Attributes:
        setting: Task, model, tuning and k.
        method: What distinguishes the row from others of the same setting.
        picks: Seed → the record of the picked run.
    """

    setting: tuple
    method: tuple
    picks: dict[Hashable, dict[str, Any]]

    @property
    def accuracy(self) -> dict[int | None, float]:
        """Seed → test accuracy."""
        return self.values_of("test_accuracy")

    @property
    def records(self) -> list[dict[str, Any]]:
        """The picked runs' records."""
        return list(self.picks.values())

    @property
    def optim(self) -> str:
        """The optimizer's name."""
        return self.method[0]

    @property
    def is_trained(self) -> bool:
        """False for the prompt alone."""
        return self.optim != "zero-shot"

    def values_of(self, name: str) -> dict[Hashable, Any]:
        """The values of one field where they are known.

        Args:
            name: A record's field.

        Returns:
            Seed → value.
        """
        return {seed: record[name] for seed, record in self.picks.items() if record.get(name) is not None}

    def distinct(self, name: str) -> tuple:
        """The different values of one field, None aside.

        Args:
            name: A record's field.

        Returns:
            Sorted values; empty if the field is unknown throughout.
        """
        return tuple(sorted(set(self.values_of(name).values())))


def table_rows(records: Iterable[dict[str, Any]]) -> list[Row]:
    """Group the tested records into rows; of two tests of one row and seed the later one stands.

    Args:
        records: Records of results files; those without a `test_accuracy`, and those that lack what a row needs (see
            `find_fault`), are left out.

    Returns:
        Rows with settings in the order of their first record, in each the rows that were trained alike together, the
        plainest method first.
    """
    return _group(filter(_is_tested, records), _tested_part, lambda record: record["seed"])


def repeated_tests(records: Iterable[dict[str, Any]]) -> list[str]:
    """The tests that `table_rows` leaves out for later ones of the same row and seed, but of another run.

    Args:
        records: Records of results files.

    Returns:
        One sentence each.
    """
    lines, last = [], {}
    for record in records:
        if not _is_tested(record) or find_fault(record):
            continue
        key = (*_key(record, _tested_part), record["seed"])
        earlier, run_id = last.get(key, record).get("run_id"), record.get("run_id")
        if earlier != run_id:
            which = f"{record['task']}, {method_name(record)}, seed {record['seed']}"
            lines.append(f"{which}: run {earlier} was tested, then run {run_id}; the later test stands.")
        last[key] = record
    return lines


def _is_tested(record: dict[str, Any]) -> bool:
    return record.get("test_accuracy") is not None


def _tested_part(record: dict[str, Any]) -> Hashable:
    return record.get("group") or _conditions(record)


def cell_rows(records: Iterable[dict[str, Any]]) -> list[Row]:
    """Group all trained runs, tested or not, by method and training conditions.

    Args:
        records: Records of results files.

    Returns:
        Rows that hold every learning rate and seed, each run once, as its last record states it.
    """
    trained = (record for record in records if record.get("dev_accuracy") is not None)
    return _group(trained, _conditions, lambda record: record.get("run_id") or id(record))


def _group(records: Iterable[dict[str, Any]], part: Callable, key: Callable) -> list[Row]:
    rows: dict[tuple, Row] = {}
    for record in records:
        if find_fault(record):
            continue
        setting, method = _key(record, part)
        rows.setdefault((setting, method), Row(setting, method, {})).picks[key(record)] = record
    settings = list(dict.fromkeys(setting for setting, _ in rows))
    return sorted(rows.values(), key=lambda row: (settings.index(row.setting), row.is_trained, *_order(row)))


def _key(record: dict[str, Any], part: Callable) -> tuple[tuple, tuple]:
    """A row's setting and method."""
    method = (record["optim"], record.get("momentum"), schedule_name(record), record.get("ell"), record.get("peft"))
    return tuple(record.get(name) for name in _SETTING), (*method, part(record))


def _order(row: Row) -> tuple:
    return (*(row.distinct(name) for name in _MARKS), _plainness(row))


def _conditions(record: dict[str, Any]) -> tuple:
    return (*(record.get(name) for name in (*_CONDITIONS, *_SEARCHED)), _arguments(record))


def _arguments(record: dict[str, Any], without: Iterable[str] = ()) -> str:
    """The further arguments of a run, as JSON."""
    left_out = {*_OWN_ARGUMENTS, *_SIZES, *without}
    arguments = {name: value for name, value in (record.get("arguments") or {}).items() if name not in left_out}
    return json.dumps(arguments, sort_keys=True)


def rate_of(record: dict[str, Any]) -> float | None:
    """The learning rate of a run.

    Args:
        record: A record.

    Returns:
        η for our optimizers, the Trainer's own for the others; None if it is unknown.
    """
    return record.get("learning_rate") if record.get("effective_lr") is None else record["effective_lr"]


def schedule_name(record: dict[str, Any]) -> str | None:
    """What a schedule of β is called, with its keywords.

    Args:
        record: A record; the keywords lie in its arguments, as a dict or as JSON text.

    Returns:
        Such as `linear 0→0.9`; None without a schedule.
    """
    name, kwargs = record.get("momentum_schedule"), (record.get("arguments") or {}).get("momentum_schedule_kwargs")
    if not name or not kwargs:
        return name or None
    try:
        kwargs = dict(json.loads(kwargs) if isinstance(kwargs, str) else kwargs)
    except (TypeError, ValueError):
        return f"{name} {_plain(kwargs)}"
    words = [f"{_plain(kwargs.pop('start'))}→{_plain(kwargs.pop('end'))}"] if {"start", "end"} <= kwargs.keys() else []
    return " ".join([name, *words, *(f"{key}={_plain(value)}" for key, value in kwargs.items())])


def method_name(record: dict[str, Any]) -> str:
    """What a row is called: the optimizer with its hyperparameters.

    Args:
        record: A record.

    Returns:
        Such as `sgdm β=0.9` or `sgdm β linear 0→0.9`; without ", ".
    """
    parts = [record["optim"]]
    if schedule := schedule_name(record):
        parts.append(f"β {schedule}")
    elif record.get("momentum"):
        parts.append(f"β={record['momentum']:g}")
    if record.get("ell"):
        parts.append(f"ℓ={record['ell']:g}")
    if record.get("peft"):
        parts.append(record["peft"])
    return " ".join(parts)


def row_names(rows: Sequence[Row]) -> dict[int, str]:
    """What each row is called: its method, and what else tells it from other rows of its setting.

    Args:
        rows: From `table_rows` or `cell_rows`.

    Returns:
        `id(row)` → name, such as `sgd, lr linear, batch 8`: the method, then what `split_name` gives as conditions.
        What nothing tells apart is numbered, which is part of the method: `sgd #1`.
    """
    names = {id(row): method_name(row.records[0]) for row in rows}
    trained = [row for row in rows if row.is_trained]
    for field, text in _MARKS.items():
        _mark(trained, names, field, text, lambda row: row.setting)
    for field, text in _MARKS_OF_ALIKE.items():
        _mark(trained, names, field, text, lambda row: (row.setting, names[id(row)]))
    for alike in _parts(rows, lambda row: (row.setting, names[id(row)])):
        for number, row in enumerate(alike if len(alike) > 1 else (), start=1):
            method, conditions = split_name(names[id(row)])
            names[id(row)] = ", ".join(filter(None, [f"{method} #{number}", conditions]))
    return names


def split_name(name: str) -> tuple[str, str]:
    """Take a row's name apart.

    Args:
        name: Of `row_names`.

    Returns:
        The method, and the conditions that the name states; they may be empty.
    """
    method, _, conditions = name.partition(", ")
    return method, conditions


def _mark(rows: Sequence[Row], names: dict[int, str], field: str, text: str, key: Callable) -> None:
    for part in _parts(rows, key):
        if len({row.distinct(field) for row in part}) > 1:
            for row in part:
                values = "/".join(_plain(value) for value in row.distinct(field)) or "unknown"
                names[id(row)] += ", " + text.format(values)


def _parts(rows: Iterable[Row], key: Callable) -> list[list[Row]]:
    parts: dict[tuple, list[Row]] = {}
    for row in rows:
        parts.setdefault(key(row), []).append(row)
    return list(parts.values())


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "/".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def setting_names(rows: Sequence[Row]) -> dict[tuple, str]:
    """What each setting is called: the task, and the model, tuning and k where they are not all the same.

    Args:
        rows: From `table_rows` or `cell_rows`.

    Returns:
        Setting → name.
    """
    settings = list(dict.fromkeys(row.setting for row in rows))
    _, *others = zip(*settings, strict=True) if settings else [()]
    several = [len(set(values)) > 1 for values in others]
    forms = ("{}", "{}", "k={}")
    return {
        (task, *rest): ", ".join(
            [task, *(form.format(value) for form, value, tell in zip(forms, rest, several, strict=True) if tell)]
        )
        for task, *rest in settings
    }


def comparison_pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Each row with its baseline: the plainest method that was trained alike.

    Trained alike means the same setting, test data, learning-rate schedule, clipping, weight decay, PEFT, batch size,
    (where ℓ is the same) steps, and further arguments, and a common seed with the same draw. A batch size or number of
    steps that varies within a row was searched over, and may differ. So was the learning rate, unless both rows have a
    single cell: then it must be the same. Of the further arguments, those that SVAG stretches count only where ℓ is
    the same. The baseline is plain SGD where there is one, for SVAG with momentum SVAG of the same ℓ without, and
    otherwise the smallest β.

    Args:
        rows: From `table_rows`.

    Returns:
        (baseline, row) in the order of the rows; n methods give n − 1 pairs.
    """
    trained = [row for row in rows if row.is_trained]
    return [
        (baseline, row)
        for row in trained
        for baseline in _baselines(row, [other for other in trained if _are_comparable(other, row)])
    ]


def _are_comparable(first: Row, second: Row) -> bool:
    same_ell = first.distinct("ell") == second.distinct("ell")
    return (
        first.setting == second.setting
        and first.method[:-1] != second.method[:-1]
        and all(first.distinct(name) == second.distinct(name) for name in _CONDITIONS)
        and all(
            first.distinct(name) == second.distinct(name)
            or max(len(first.distinct(name)), len(second.distinct(name))) > 1
            for name in (_SEARCHED if same_ell else _SEARCHED[:1])
        )
        and _further(first, same_ell) == _further(second, same_ell)
        and (_rates(first) == _rates(second) or not (_has_one_cell(first) and _has_one_cell(second)))
        and bool(paired_seeds(first, second))
    )


def paired_seeds(first: Row, second: Row) -> set[Hashable]:
    """The seeds of two rows that can be paired.

    Args:
        first: From `table_rows`.
        second: From `table_rows`.

    Returns:
        Those that both ran, on the same draw of examples.
    """
    common = first.picks.keys() & second.picks.keys()
    return {seed for seed in common if first.picks[seed].get("draw") == second.picks[seed].get("draw")}


def _further(row: Row, same_ell: bool) -> set[str]:
    return {_arguments(record, () if same_ell else _STRETCHED) for record in row.records}


def _rates(row: Row) -> set[str]:
    return {f"{rate:.9g}" for rate in map(rate_of, row.records) if rate is not None}  # γ/(1−β) rounds


def _has_one_cell(row: Row) -> bool:
    return row.distinct("grid_size") == (1,)


def _baselines(row: Row, candidates: Sequence[Row]) -> list[Row]:
    plainer = [other for other in candidates if _plainness(other) < _plainness(row)]
    if not plainer:
        return []
    best = min(_distance(other, row) for other in plainer)
    nearest = [other for other in plainer if _distance(other, row) == best]
    return [other for other in nearest if other.distinct("grid_size") == row.distinct("grid_size")] or nearest


def _plainness(row: Row) -> tuple:
    record = row.records[0]
    ours = row.optim in {"sgd", "sgdm", "svag"}
    momentum = record.get("momentum") or 0.0
    return (not ours, record.get("ell") or 0, record.get("momentum_schedule") is not None, momentum, row.optim)


def _distance(other: Row, row: Row) -> tuple:
    """How many of ℓ and β differ, whether ℓ does, and how far from plain SGD the other row is."""
    _, *momentum, ell, _, _ = [first != second for first, second in zip(other.method, row.method, strict=True)]
    return ell + any(momentum), ell, _plainness(other)

"""Rows of a table: which runs belong together, what a row is called, and which rows can be compared."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_momentum.results.record import find_fault

_SETTING = ("task", "model", "tuning", "k")
_METHOD = ("optim", "momentum", "momentum_schedule", "ell", "peft")
# What two rows must share to be compared; "searched" fields may differ where a row's own runs differ in them.
_CONDITIONS = ("test_data", "prompt", "peft", "lr_schedule", "max_grad_norm")
_SEARCHED = ("batch_size", "steps")
# What is added to a name: to all rows of a setting that differ in it, or only to those that would read alike.
_MARKS = {"lr_schedule": "lr {}", "batch_size": "batch {}", "max_grad_norm": "clip {}"}
_MARKS_OF_ALIKE = {"steps": "{} steps", "grid_size": "{} cells"}


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
    tested = (record for record in records if record.get("test_accuracy") is not None)
    return _group(tested, lambda record: record.get("group") or _conditions(record), lambda record: record["seed"])


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
        setting = tuple(record.get(name) for name in _SETTING)
        method = (*(record.get(name) for name in _METHOD), part(record))
        rows.setdefault((setting, method), Row(setting, method, {})).picks[key(record)] = record
    settings = list(dict.fromkeys(setting for setting, _ in rows))
    return sorted(rows.values(), key=lambda row: (settings.index(row.setting), row.is_trained, *_order(row)))


def _order(row: Row) -> tuple:
    return (*(row.distinct(name) for name in _MARKS), _plainness(row))


def _conditions(record: dict[str, Any]) -> tuple:
    return tuple(record.get(name) for name in (*_CONDITIONS, *_SEARCHED))


def method_name(record: dict[str, Any]) -> str:
    """What a row is called: the optimizer with its hyperparameters.

    Args:
        record: A record.

    Returns:
        Such as `sgdm β=0.9`.
    """
    parts = [record["optim"]]
    if record.get("momentum"):
        parts.append(f"β={record['momentum']:g}")
    if record.get("momentum_schedule"):
        parts.append(f"β {record['momentum_schedule']}")
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
        `id(row)` → name.
    """
    names = {id(row): method_name(row.records[0]) for row in rows}
    trained = [row for row in rows if row.is_trained]
    for field, text in _MARKS.items():
        _mark(trained, names, field, text, lambda row: row.setting)
    for field, text in _MARKS_OF_ALIKE.items():
        _mark(trained, names, field, text, lambda row: (row.setting, names[id(row)]))
    for alike in _parts(rows, lambda row: (row.setting, names[id(row)])):
        for number, row in enumerate(alike if len(alike) > 1 else (), start=1):
            names[id(row)] += f", #{number}"
    return names


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

    Trained alike means the same setting, test data, learning-rate schedule, clipping, PEFT, batch size and (where ℓ is
    the same) steps, and a common seed. A batch size or number of steps that varies within a row was searched over, and
    may differ. The baseline is plain SGD where there is one, for SVAG with momentum SVAG of the same ℓ without, and
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
        and bool(first.picks.keys() & second.picks.keys())
    )


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
    differs = [other.distinct(name) != row.distinct(name) for name in ("ell", "momentum", "momentum_schedule")]
    return differs[0] + any(differs[1:]), differs[0], _plainness(other)

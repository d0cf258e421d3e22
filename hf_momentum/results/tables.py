"""Tables over seeds from the records of runs."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_momentum.results.statistics import format_score, paired_difference

_SETTING = ("task", "model", "tuning", "k")
_METHOD = ("optim", "momentum", "momentum_schedule", "ell", "peft", "group")
# What is added to the names of rows that would read alike: field → unit.
_DISTINCTIONS = {"grid_size": "cells", "steps": "steps", "batch_size": "batch", "max_grad_norm": "clip"}


@dataclass(frozen=True)
class Row:
    """One method on one task: a value per seed.

    Attributes:
        setting: Task, model, tuning and k.
        method: What distinguishes the row from others of the same setting.
        picks: Seed → the record of the picked run.
    """

    setting: tuple
    method: tuple
    picks: dict[int | None, dict[str, Any]]

    @property
    def accuracy(self) -> dict[int | None, float]:
        """Seed → test accuracy."""
        return {seed: record["test_accuracy"] for seed, record in self.picks.items()}

    @property
    def records(self) -> list[dict[str, Any]]:
        """The picked runs' records."""
        return list(self.picks.values())

    @property
    def optim(self) -> str:
        """The optimizer's name."""
        return self.method[0]


def table_rows(records: Iterable[dict[str, Any]]) -> list[Row]:
    """Group the tested records into rows; of two tests of one row and seed the later one stands.

    Args:
        records: Records of a results file; those without a `test_accuracy` are left out.

    Returns:
        Rows in the order of their first record, settings together.
    """
    rows: dict[tuple, Row] = {}
    for record in records:
        if record.get("test_accuracy") is None:
            continue
        setting = tuple(record.get(name) for name in _SETTING)
        method = tuple(record.get(name) for name in _METHOD)
        rows.setdefault((setting, method), Row(setting, method, {})).picks[record["seed"]] = record
    settings = list(dict.fromkeys(setting for setting, _ in rows))
    return sorted(rows.values(), key=lambda row: settings.index(row.setting))


def accuracy_tables(rows: Sequence[Row]) -> list[Table]:
    """The protocol's tables: mean (std) of the picks' test accuracy in percent.

    Args:
        rows: From `table_rows`.

    Returns:
        One rich table per model, tuning and k.
    """
    names = row_names(rows)
    parts = itertools.groupby(sorted(rows, key=lambda row: str(row.setting[1:])), key=lambda row: row.setting[1:])
    return [_accuracy_table(*setting, list(part), names) for setting, part in parts]


def _accuracy_table(model: str, tuning: str, k: int, rows: Sequence[Row], names: dict[int, str]) -> Table:
    title = escape(f"Test accuracy in %: {model}, {tuning} tuning, k={k}")
    caption = "mean (population std) over seeds, each run picked on dev; MiB: optimizer state"
    layout = {"box": box.SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", **layout)
    for name in ("task", "optimizer"):
        table.add_column(name, overflow="fold")
    for name in ("η or lr", "seeds", "dev", "test", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for previous, row in itertools.pairwise([None, *rows]):
        if previous is not None and previous.setting != row.setting:
            table.add_section()
        table.add_row(*map(escape, _cells(row, names[id(row)])))
    return table


def _cells(row: Row, name: str) -> list[str]:
    records, test = row.records, format_score(list(row.accuracy.values()))
    if row.optim == "zero-shot":
        return [row.setting[0], name, "", "", "", test, ""]
    return [
        row.setting[0],
        name,
        _rates(records),
        str(len(records)),
        format_score([record["dev_accuracy"] for record in records]),
        test,
        f"{max(record['optimizer_state_bytes'] for record in records) / 2**20:.1f}",
    ]


def row_names(rows: Sequence[Row]) -> dict[int, str]:
    """What each row is called: its method, and where two rows of a setting read alike, what tells them apart.

    Args:
        rows: From `table_rows`.

    Returns:
        `id(row)` → name.
    """
    alike: dict[tuple, list[Row]] = {}
    for row in rows:
        alike.setdefault((row.setting, method_name(row.records[0])), []).append(row)
    names = {}
    for (_, name), group in alike.items():
        seen = {
            key: [sorted({record.get(key) for record in row.records}, key=str) for row in group]
            for key in _DISTINCTIONS
        }
        telling = [key for key, values in seen.items() if any(value != values[0] for value in values)]
        for index, row in enumerate(group):
            marks = [f"{'/'.join(map(str, seen[key][index]))} {_DISTINCTIONS[key]}" for key in telling]
            if len(group) > 1 and not marks:
                marks = [f"#{index + 1}"]
            names[id(row)] = ", ".join([name, *marks])
    return names


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


def _rates(records: Sequence[dict[str, Any]]) -> str:
    """The picked learning rates: η for ours, the Trainer's own for the others."""
    rates = {record.get("effective_lr") or record.get("learning_rate") for record in records} - {None}
    return ", ".join(f"{rate:g}" for rate in sorted(rates))


def difference_lines(rows: Sequence[Row]) -> list[str]:
    """The paired difference of every two methods of the same setting, in percentage points.

    Args:
        rows: From `table_rows`.

    Returns:
        One sentence per pair of methods with at least one common seed, zero-shot rows aside.
    """
    names, trained = row_names(rows), [row for row in rows if row.optim != "zero-shot"]
    return [
        f"{first.setting[0]}: {names[id(second)]} − {names[id(first)]} = {_difference(first, second)}"
        for first, second in itertools.combinations(trained, 2)
        if first.setting == second.setting
        and first.method[:-1] != second.method[:-1]
        and first.picks.keys() & second.picks.keys()
    ]


def _difference(first: Row, second: Row) -> str:
    difference = paired_difference(first.accuracy, second.accuracy)
    text, seeds = f"{100 * difference.mean:+.1f} points", len(difference.seeds)
    if math.isinf(difference.high):
        return f"{text}, paired over 1 seed: no interval."
    if difference.low == difference.high:
        return f"{text}, the same for each of {seeds} seeds: no spread to take an interval from."
    interval = f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    return f"{text}, {100 * difference.confidence:.0f}% interval {interval}, paired over {seeds} seeds."


def print_summary(
    records: Iterable[dict[str, Any]], problems: Sequence[str] = (), console: Console | None = None
) -> None:
    """Print the table, the paired differences, and what could not be read.

    Args:
        records: Records of one or several results files.
        problems: Sentences of `read_records`.
        console: Where to print; standard output unless given.
    """
    console = console or Console()
    rows = table_rows(records)
    for table in accuracy_tables(rows):
        console.print(table)
    for line in (*difference_lines(rows), *problems):
        console.print(line, markup=False, highlight=False, soft_wrap=True)

"""The protocol's table over seeds, from the records of runs."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

from hf_momentum.results.comparisons import difference_lines
from hf_momentum.results.export import Report, Sheet, print_report
from hf_momentum.results.record import find_fault
from hf_momentum.results.rows import Row, rate_of, repeated_tests, row_names, setting_names, table_rows
from hf_momentum.results.statistics import format_score, mean_std


def accuracy_report(records: Sequence[dict[str, Any]], problems: Sequence[str] = ()) -> Report:
    """The tables of all tested runs, their paired differences, and what to know about them.

    Args:
        records: Records of results files.
        problems: Sentences of `read_results`.

    Returns:
        For any format of `hf_momentum.results.export`.
    """
    rows, problems = table_rows(records), [*problems, *repeated_tests(records)]
    faults = ((record.get("run_id", "a run"), find_fault(record)) for record in records)
    problems += [f"{run_id}: {fault}; it is left out." for run_id, fault in faults if fault]
    notes = [*difference_lines(rows), *version_notes(rows)]
    return Report(accuracy_sheets(rows), accuracy_values(rows), notes, problems)


def accuracy_sheets(rows: Sequence[Row]) -> list[Sheet]:
    """The protocol's tables: mean (std) of the picks' test accuracy in percent.

    Args:
        rows: From `table_rows`.

    Returns:
        One sheet per model, tuning and k.
    """
    names = row_names(rows)
    parts = itertools.groupby(sorted(rows, key=lambda row: str(row.setting[1:])), key=lambda row: row.setting[1:])
    return [_accuracy_sheet(*setting, list(part), names) for setting, part in parts]


def _accuracy_sheet(model: str, tuning: str | None, k: int | None, rows: Sequence[Row], names: dict) -> Sheet:
    details = [model, *([f"{tuning} tuning"] if tuning else []), *([f"k={k}"] if k is not None else [])]
    columns = ("task", "optimizer", "η or lr", "seeds", "dev", "test", "MiB")
    tasks = [row.setting[0] for row in rows]
    sections = frozenset(number for number in range(1, len(rows)) if tasks[number] != tasks[number - 1])
    cells = [_cells(row, names[id(row)]) for row in rows]
    return Sheet(f"Test accuracy in %: {', '.join(details)}", columns, cells, _caption(rows), sections=sections)


def _caption(rows: Sequence[Row]) -> str:
    sizes = {size for row in rows for size in row.distinct("grid_size")}
    how = "" if not sizes else ", each run picked on dev" if max(sizes) > 1 else ", every run is tested"
    return f"mean (population std) over seeds{how}; MiB: optimizer state"


def _cells(row: Row, name: str) -> tuple[str, ...]:
    test = format_score(list(row.accuracy.values()))
    if not row.is_trained:
        return row.setting[0], name, "", "", "", test, ""
    dev, memory = row.values_of("dev_accuracy"), _state_mib(row)
    return (
        row.setting[0],
        name,
        ", ".join(f"{rate:g}" for rate in _rates(row)),
        str(len(row.picks)),
        format_score(list(dev.values())) if dev else "",
        test,
        "" if memory is None else f"{memory:.1f}",
    )


def accuracy_values(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The tables' rows as plain values.

    Args:
        rows: From `table_rows`.

    Returns:
        Accuracies in percent, learning rates as text separated by spaces, None where a value is unknown.
    """
    names = row_names(rows)
    return [
        {
            **dict(zip(("task", "model", "tuning", "k"), row.setting, strict=True)),
            "optimizer": names[id(row)],
            "learning_rates": " ".join(f"{rate:g}" for rate in _rates(row)),
            "seeds": len(row.picks) if row.is_trained else None,
            **_mean_and_std(row, "dev"),
            **_mean_and_std(row, "test"),
            "optimizer_state_mib": _state_mib(row),
        }
        for row in rows
    ]


def _mean_and_std(row: Row, split: str) -> dict[str, float | None]:
    values = [100 * value for value in row.values_of(f"{split}_accuracy").values()]
    mean, std = mean_std(values) if values else (None, None)
    return {f"{split}_mean": mean, f"{split}_std": std if len(values) > 1 else None}


def _rates(row: Row) -> list[float]:
    return sorted({rate_of(record) for record in row.records} - {None})


def _state_mib(row: Row) -> float | None:
    sizes = row.distinct("optimizer_state_bytes")
    return sizes[-1] / 2**20 if sizes else None


def version_notes(rows: Sequence[Row]) -> list[str]:
    """One sentence for each set of package versions that runs of one setting differ in.

    Args:
        rows: From `table_rows`.

    Returns:
        Sentences; none if every setting's runs were made under the same versions.
    """
    settings: dict[tuple, dict[str, set]] = {}
    for row in rows:
        for packages in row.values_of("packages").values():
            for name, version in packages.items():
                settings.setdefault(row.setting, {}).setdefault(name, set()).add(str(version))
    names, differing = setting_names(rows), {}
    for setting, packages in settings.items():
        text = ", ".join(
            f"{name} {' and '.join(sorted(versions))}" for name, versions in packages.items() if len(versions) > 1
        )
        if text:
            differing.setdefault(text, []).append(names[setting])
    return [f"Runs made under different versions, {text}: {'; '.join(where)}." for text, where in differing.items()]


def print_summary(
    records: Iterable[dict[str, Any]], problems: Sequence[str] = (), console: Console | None = None
) -> None:
    """Print the table, the paired differences, and what could not be read.

    Args:
        records: Records of one or several results files.
        problems: Sentences of `read_records`.
        console: Where to print; standard output unless given.
    """
    print_report(accuracy_report(list(records), problems), console or Console())

"""One run, one JSON line: appended atomically, read back with every bad line reported."""

import fcntl
import hashlib
import itertools
import json
import os
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_momentum.errors import UserError

FORMAT = 1
PACKAGES = ("hf_momentum", "torch", "transformers", "accelerate")


def identifier(settings: dict[str, Any]) -> str:
    """A short name for a set of settings: equal settings give the same one in every process and on every machine.

    Args:
        settings: Anything that JSON can hold.

    Returns:
        16 hexadecimal digits of the SHA-256 of the sorted JSON.
    """
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """The installed versions of the packages that a result depends on.

    Args:
        names: Distribution names.

    Returns:
        Name → version, None for a package that is not installed.
    """
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def append_record(path: str | os.PathLike, record: dict[str, Any]) -> None:
    """Append one record as one line, whole or not at all, also beside other writers.

    The line goes out in a single write to a file opened for appending, under an advisory lock, and is flushed to disk.
    A torn last line, left by a machine that went down, is closed first so that it cannot swallow the new one.

    Args:
        path: The JSON-lines file; folders are made as needed.
        record: Anything that JSON can hold; NaN and infinities are refused.

    Raises:
        ValueError: If the record holds a NaN or an infinity.
        OSError: If the disk is full; the file is then as it was before.
    """
    line = json.dumps({"format": FORMAT, **record}, allow_nan=False) + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        data = ("\n" * torn + line).encode()
        if os.write(descriptor, data) < len(data):
            os.ftruncate(descriptor, size)
            raise OSError(f"{path}: no room left to write a result")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Results:
    """What results files hold.

    Attributes:
        records: The readable records, in the files' order.
        problems: One sentence, with file and line number, for each line that is not used.
        places: `file:line` of each record.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)


def read_records(path: str | os.PathLike) -> Results:
    """Read a results file; a bad line is reported and the rest still used.

    A run may appear twice, when it was trained and again with its test; of two lines with the same run, stage and
    group the later one stands.

    Args:
        path: The JSON-lines file. One that does not exist holds no records.

    Returns:
        Records and problems.
    """
    results = Results()
    if not Path(path).exists():
        return results
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = _parse(line)
        except ValueError as error:
            results.problems.append(f"{path}:{number}: {error}; the line is left out.")
        else:
            results.records.append(record)
            results.places.append(f"{path}:{number}")
    return _without_duplicates(results)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode(), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a whole JSON object ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason})") from error
    if not isinstance(record, dict) or "format" not in record:
        raise ValueError(f"not a record of format {FORMAT}")
    if record["format"] != FORMAT:
        raise ValueError(f"a record of format {record['format']!r}, and this version reads format {FORMAT}")
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a value of JSON")


def _without_duplicates(results: Results) -> Results:
    last: dict[Any, int] = {}
    for index, record in enumerate(results.records):
        last[_identity(record) or index] = index
    kept, problems = set(last.values()), list(results.problems)
    for index, (record, place) in enumerate(zip(results.records, results.places, strict=True)):
        if index not in kept:
            later = results.places[last[_identity(record)]]
            problems.append(f"{place}: the same run and stage as {later}; the later line stands.")
    order = sorted(kept)
    return Results([results.records[i] for i in order], problems, [results.places[i] for i in order])


def _identity(record: dict[str, Any]) -> tuple[str, ...] | None:
    """What two lines share if one repeats the other; a run may be tested once for each grid that picked it."""
    if "run_id" not in record:
        return None
    return tuple(json.dumps(record.get(name), sort_keys=True) for name in ("run_id", "stage", "group_id"))


_TEXT, _NUMBER, _WHOLE = (str,), (int, float), (int,)
_ACCURACIES = ("dev_accuracy", "test_accuracy")
_NEEDED = ("task", "model", "optim")
_FIELDS = {
    **dict.fromkeys(_NEEDED, _TEXT),
    **dict.fromkeys(("run_id", "tuning", "momentum_schedule", "peft", "group", "lr_schedule"), _TEXT),
    **dict.fromkeys(("prompt", "test_data", "base_model", "lr_form", "regime", "command", "sweep_command"), _TEXT),
    "pipeline_tag": _TEXT,
    **dict.fromkeys(("seed", "k", "batch_size", "steps", "grid_size", "processes"), _WHOLE),
    **dict.fromkeys((*_ACCURACIES, "learning_rate", "effective_lr", "momentum", "ell", "weight_decay"), _NUMBER),
    **dict.fromkeys(("optimizer_state_bytes", "max_grad_norm"), _NUMBER),
    **dict.fromkeys(("packages", "arguments", "hardware", "data"), (dict,)),
    "curve": (list,),
}
_HARDWARE = {"devices": (list,), "cpu": _TEXT, "cores": _WHOLE}
_DATA = {"source": _TEXT, "id": _TEXT, "config": _TEXT, "split": _TEXT, "test_examples": _WHOLE}
_SOURCES = ("hub", "folder", "demo")


def find_fault(record: dict[str, Any]) -> str | None:
    """Why a record cannot stand in a table, figure or card.

    Args:
        record: A record.

    Returns:
        Such as "a result with no 'seed'"; None if it can, or has no accuracy yet.
    """
    if all(record.get(name) is None for name in _ACCURACIES):
        return None
    missing = [name for name in _NEEDED if record.get(name) is None] + ["seed"] * ("seed" not in record)
    if missing:
        return f"a result with no {missing[0]!r}"
    if record["seed"] is None and record["optim"] != "zero-shot":
        return "a trained result whose 'seed' is None"
    wrong = next(itertools.chain(_wrong(record, _FIELDS), _wrong_parts(record)), None)
    return None if wrong is None else f"a result whose {wrong[0]!r} is {reprlib.repr(wrong[1])}"


def _wrong(values: dict[str, Any], fields: dict[str, tuple[type, ...]], of: str = "") -> Iterator[tuple[str, Any]]:
    """The fields, other than None, whose value is of another type: name and value."""
    for name, kinds in fields.items():
        if values.get(name) is not None and not _is_of(values[name], kinds):
            yield of + name, values[name]


def _wrong_parts(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is wrong in a value or within one, where all types are right."""
    for name in _ACCURACIES:
        if record.get(name) is not None and not 0 <= record[name] <= 1:
            yield name, record[name]
    found = record.get("hardware") or {}
    yield from _wrong(found, _HARDWARE, "hardware.")
    if not all(_is_of(device, _TEXT) for device in found.get("devices") or []):
        yield "hardware.devices", found["devices"]
    data = record.get("data") or {}
    yield from _wrong(data, _DATA, "data.")
    if data and (data.get("source") not in _SOURCES or (data["source"] == "hub" and not data.get("id"))):
        yield "data", data
    for point in record.get("curve") or []:
        if not (isinstance(point, dict) and _is_of(point.get("step"), _NUMBER)):
            yield "curve", [point]
        else:
            yield from _wrong(point, {"dev_accuracy": _NUMBER}, "curve.")


def _is_of(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)  # Python counts a bool among the whole numbers


def read_results(paths: Sequence[str | os.PathLike]) -> Results:
    """Read the results of several commands as one: whatever a table or figure cannot use is reported and left out.

    Args:
        paths: Results files, or folders with a `results.jsonl`.

    Returns:
        Records and problems.

    Raises:
        UserError: If a file does not exist.
    """
    merged = Results()
    for file in dict.fromkeys(_results_file(Path(path)) for path in paths):
        found = read_records(file)
        merged.problems.extend(found.problems)
        for record, place in zip(found.records, found.places, strict=True):
            if fault := find_fault(record):
                merged.problems.append(f"{place}: {fault}; the line is left out.")
            else:
                merged.records.append(record)
                merged.places.append(place)
    return _without_duplicates(merged)


def _results_file(path: Path) -> Path:
    file = path / "results.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"No such file: {file}. Give a results.jsonl, or the folder that a recipe wrote it to.")
    return file

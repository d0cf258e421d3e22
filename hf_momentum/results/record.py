"""One run, one JSON line: appended atomically, read back with every bad line reported."""

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

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
    """What a results file holds.

    Attributes:
        records: The readable records, in the file's order.
        problems: One sentence, with file and line number, for each line that could not be read.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_records(path: str | os.PathLike) -> Results:
    """Read a results file; a bad line is reported and the rest still used.

    Args:
        path: The JSON-lines file. One that does not exist holds no records.

    Returns:
        Records and problems.
    """
    results = Results()
    if not Path(path).exists():
        return results
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            results.problems.append(f"{path}:{number}: not a whole JSON object ({error.msg}); the line is left out.")
            continue
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            results.problems.append(f"{path}:{number}: not a record of format {FORMAT}; the line is left out.")
        else:
            results.records.append(record)
    return results

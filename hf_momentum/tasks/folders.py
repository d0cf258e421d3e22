"""Task data from a local folder: this package's JSON lines, and LM-BFF's ready k-shot splits.

LM-BFF (github.com/princeton-nlp/LM-BFF, `tools/generate_k_shot_data.py`) writes one folder `TASK/K-SEED` per draw:
GLUE tasks as tab-separated files with a header, no quoting and the label last; the others as `label,text` CSV
without a header. The development set of the original stands in for the test set of GLUE tasks and SNLI.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hf_momentum.errors import UserError
from hf_momentum.tasks.examples import Example, TaskData, expected_form, make_example

_KSHOT_NAME = re.compile(r"(\d+)-(\d+)")
_KSHOT_FILES = {
    "train": ("train.tsv", "train.csv"),
    "dev": ("dev.tsv", "dev.csv", "dev_matched.tsv"),
    "test": ("test.tsv", "test.csv", "test_matched.tsv"),
}


def load_folder(task_name: str, labels: Sequence[str], data_dir: str | Path, *, pair: bool) -> TaskData:
    """Read `DIR/TASK/{train,test}.jsonl`, or `DIR/{train,test}.jsonl`.

    Args:
        task_name: The task; its folder may differ from it in case.
        labels: The labels allowed.
        data_dir: DIR.
        pair: Whether the examples have two sentences.

    Returns:
        The examples.

    Raises:
        UserError: If a file is missing, empty or malformed; the message names file, line and expected form.
    """
    for folder in _task_folders(task_name, data_dir):
        files = [folder / "train.jsonl", folder / "test.jsonl"]
        found = [file.is_file() for file in files]
        if all(found):
            train, test = (_read_jsonl(file, labels, pair) for file in files)
            return TaskData(task_name, f"folder {folder}", tuple(labels), train, test)
        if any(found):
            there, lacking = (file.name for file in (files if found[0] else files[::-1]))
            raise UserError(f"{folder} holds {there} but no {lacking}: a task needs both.")
    kshot = list_kshot_splits(task_name, data_dir)
    if kshot:
        raise UserError(
            f"{data_dir} holds ready k-shot splits of {task_name}, so k and the seed must be among "
            f"{', '.join(f'{k}-{seed}' for k, seed in kshot)} (K-SEED)."
        )
    raise UserError(_nothing_found(task_name, Path(data_dir), expected_form(labels, pair)))


def list_kshot_splits(task_name: str, data_dir: str | Path) -> list[tuple[int, int]]:
    """List LM-BFF's ready splits of a task.

    Args:
        task_name: The task; its folder may differ from it in case.
        data_dir: DIR; the splits are looked for in `DIR/TASK/K-SEED`, `DIR/k-shot/TASK/K-SEED` and `DIR/K-SEED`.

    Returns:
        `(k, seed)` pairs in ascending order; empty where there are none.

    Raises:
        UserError: If `data_dir` is no folder.
    """
    return sorted(_kshot_folders(task_name, data_dir))


def load_kshot_split(
    task_name: str, labels: Sequence[str], k: int, seed: int, data_dir: str | Path, *, pair: bool
) -> TaskData:
    """Read one of LM-BFF's ready k-shot splits.

    Args:
        task_name: The task; its folder may differ from it in case.
        labels: The labels allowed.
        k: Examples per class.
        seed: Of the draw.
        data_dir: DIR; see `list_kshot_splits`.
        pair: Whether the examples have two sentences.

    Returns:
        The examples, with `dev`.

    Raises:
        UserError: If the split or a file of it is missing, empty or malformed.
    """
    folders = _kshot_folders(task_name, data_dir)
    if (k, seed) not in folders:
        there = ", ".join(f"{a}-{b}" for a, b in sorted(folders)) or "none"
        raise UserError(f"{data_dir} holds no k-shot split {k}-{seed} (K-SEED) of {task_name}; there: {there}.")
    folder = folders[k, seed]
    parts = {}
    for split, names in _KSHOT_FILES.items():
        files = [folder / name for name in names if (folder / name).is_file()]
        if not files:
            raise UserError(f"{folder} holds no {split} split. Looked for: {', '.join(names)}.")
        parts[split] = _read_table(files[0], labels, pair)
    return TaskData(task_name, f"k-shot split {folder}", tuple(labels), **parts)


def _task_folders(task_name: str, data_dir: str | Path) -> list[Path]:
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(f"--data_dir {data_dir} is not a folder.")
    parents = [root, root / "k-shot"]
    children = [child for parent in parents if parent.is_dir() for child in sorted(parent.iterdir())]
    return [child for child in children if child.is_dir() and child.name.lower() == task_name.lower()] + [root]


def _kshot_folders(task_name: str, data_dir: str | Path) -> dict[tuple[int, int], Path]:
    folders: dict[tuple[int, int], Path] = {}
    for folder in _task_folders(task_name, data_dir):
        for child in sorted(folder.iterdir()):
            name = _KSHOT_NAME.fullmatch(child.name)
            if name and child.is_dir():
                folders.setdefault((int(name[1]), int(name[2])), child)
    return folders


def _nothing_found(task_name: str, root: Path, form: str) -> str:
    names = sorted(child.name for child in root.expanduser().iterdir())
    there = "It is empty." if not names else f"It holds: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}."
    return (
        f"No data for {task_name} in {root}. Looked for {task_name}/train.jsonl with {task_name}/test.jsonl, "
        f"train.jsonl with test.jsonl, and {task_name}/K-SEED/train.tsv or .csv (a k-shot split). {there} "
        f"A line of the .jsonl files has the form {form}"
    )


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    # Only a line feed ends a line: sentences may hold other separators, such as U+2028.
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as stream:
            for number, line in enumerate(stream, start=1):
                yield f"{file}, line {number}", line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}.") from error


def _not_empty(file: Path, examples: list[Example]) -> list[Example]:
    if not examples:
        raise UserError(f"{file} holds no example.")
    return examples


def _read_jsonl(file: Path, labels: Sequence[str], pair: bool) -> list[Example]:
    examples = []
    for where, line in _lines(file):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}). Expected: {expected_form(labels, pair)}") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object. Expected: {expected_form(labels, pair)}")
        examples.append(make_example(record, labels, pair, where))
    return _not_empty(file, examples)


def _read_table(file: Path, labels: Sequence[str], pair: bool) -> list[Example]:
    records = _tsv_records(file, pair) if file.suffix == ".tsv" else _csv_records(file, pair)
    return _not_empty(file, [make_example(record, labels, pair, where) for where, record in records])


def _tsv_records(file: Path, pair: bool) -> Iterator[tuple[str, dict[str, str]]]:
    columns = {"sentence1": "sentence1", "sentence2": "sentence2"} if pair else {"sentence1": "sentence"}
    lines = _lines(file)
    where, header_line = next(lines, (f"{file}, line 1", ""))
    header = header_line.split("\t")
    missing = [column for column in columns.values() if column not in header]
    if missing:
        raise UserError(
            f"{where}: no column {' and no column '.join(missing)} in the header. Expected a tab-separated header "
            f"with {', '.join(columns.values())} and the label as the last column; found: {', '.join(header)}."
        )
    for where, line in lines:
        fields = line.split("\t")
        if len(fields) != len(header):
            raise UserError(f"{where}: {len(fields)} tab-separated fields where the header has {len(header)}.")
        record = {key: fields[header.index(column)] for key, column in columns.items()}
        yield where, {**record, "label": fields[-1]}


def _csv_records(file: Path, pair: bool) -> Iterator[tuple[str, dict[str, str]]]:
    keys = ("label", "sentence1", "sentence2") if pair else ("label", "sentence1")
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.reader(stream, strict=True)
            for fields in rows:
                where = f"{file}, line {rows.line_num}"
                if len(fields) != len(keys):
                    raise UserError(
                        f"{where}: {len(fields)} comma-separated fields, expected {','.join(keys)} (no header)."
                    )
                yield where, dict(zip(keys, fields, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{file} is not a UTF-8 CSV file: {error}. Expected rows {','.join(keys)}, no header."
        ) from error

"""Task data from the Hugging Face Hub: data sets without a loading script, labels mapped by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_momentum.errors import UserError, require_extra
from hf_momentum.tasks.examples import Example, TaskData

if TYPE_CHECKING:
    import datasets

_SENTENCE_COLUMNS = {
    True: (("sentence1", "sentence2"), ("premise", "hypothesis")),
    False: (("sentence1",), ("sentence",), ("text",)),
}


@dataclass(frozen=True)
class HubSource:
    """Where a task is on the Hub.

    Attributes:
        path: The data set's id, `owner/name`.
        config: Its configuration; None for the only or the default one.
        test_splits: The first of these that is there with labelled rows is the test split.
        label_column: The column of labels, of type ClassLabel or their names.
    """

    path: str
    config: str | None = None
    test_splits: tuple[str, ...] = ("test", "validation")
    label_column: str = "label"


HUB_SOURCES = {
    "sst-2": HubSource("SetFit/sst2", test_splits=("validation",), label_column="label_text"),
    "sst-5": HubSource("SetFit/sst5", test_splits=("test",), label_column="label_text"),
    "trec": HubSource("SetFit/TREC-QC", test_splits=("test",), label_column="label_coarse_original"),
    "snli": HubSource("stanfordnlp/snli", test_splits=("validation",)),
    "mnli": HubSource("nyu-mll/glue", config="mnli", test_splits=("validation_matched",)),
}
"""The splits are LM-BFF's: whole sentences for SST-2 (`stanfordnlp/sst2` trains on 67,349 phrases), and the
development set as the test set of SST-2, SNLI and MNLI."""

_NLI_NAMES = {name: name for name in ("entailment", "neutral", "contradiction")}
LABEL_NAMES = {
    "sst-2": {"negative": "0", "positive": "1"},
    "sst-5": {"very negative": "0", "negative": "1", "neutral": "2", "positive": "3", "very positive": "4"},
    "trec": {"DESC": "0", "ENTY": "1", "ABBR": "2", "HUM": "3", "LOC": "4", "NUM": "5"},
    "snli": _NLI_NAMES,
    "mnli": _NLI_NAMES,
}
"""Name on the Hub → label, for the tasks whose labels are known by name; numbers alone are refused, since the Hub's
order is not the task's (TREC's starts with ABBR)."""


def load_hub(task_name: str, labels: Sequence[str], hub_id: str | None = None, *, pair: bool) -> TaskData:
    """Load a task from the Hub, or from the Hub's local cache.

    Args:
        task_name: The task; one of `HUB_SOURCES` where `hub_id` is None.
        labels: The task's labels.
        hub_id: `owner/name`, or `owner/name:config`, of another data set. It has a train and a test (or validation)
            split, the columns `sentence1`, `sentence2`, `label` or `text`, `label`, and the task's labels as the
            names of its labels.
        pair: Whether the examples have two sentences.

    Returns:
        The labelled rows. `mapping_note` tells the splits, the mapping of names and the rows dropped.

    Raises:
        UserError: If the data set cannot be had, or a split, a column or a label name is not as expected.
    """
    source = _own_source(hub_id) if hub_id else HUB_SOURCES[task_name]
    names = LABEL_NAMES.get(task_name, {label: label for label in labels})
    data = _load_dataset(source)
    shown = f"{source.path}{f' ({source.config})' if source.config else ''}"
    parts: dict[str, list[Example]] = {}
    notes = []
    for part, splits in (("train", ("train",)), ("test", source.test_splits)):
        there = [split for split in splits if split in data]
        for split in there:
            examples, dropped = _labelled_rows(data[split], source, names, pair, f"{shown}, split {split}")
            if examples:
                parts[part] = examples
                notes.append(
                    f"{part} is split {split}, {len(examples):,} rows, {dropped:,} unlabelled or empty dropped"
                )
                break
        else:
            raise UserError(
                f"{shown} has no labelled row to {part} on. Looked for split {' or '.join(splits)}; "
                f"it has: {', '.join(data)}."
            )
    mapping = ", ".join(f"{name} → {label}" for name, label in names.items())
    note = f"{shown}: {'; '.join(notes)}; labels by name: {mapping}."
    return TaskData(task_name, f"Hub data set {shown}", tuple(labels), mapping_note=note, **parts)


def _own_source(hub_id: str) -> HubSource:
    path, _, config = hub_id.partition(":")
    for source in HUB_SOURCES.values():
        if (source.path, source.config or "") == (path, config):
            return source
    return HubSource(path, config or None)


def _load_dataset(source: HubSource) -> "datasets.DatasetDict":
    datasets = require_extra("datasets", "text")
    try:
        return datasets.load_dataset(source.path, source.config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"The Hub data set {source.path!r} (configuration {source.config or 'default'}) cannot be loaded: {error} "
            "Check the id and the network, or name a folder of your own with --data_dir."
        ) from error


def _labelled_rows(
    split: "datasets.Dataset", source: HubSource, names: dict[str, str], pair: bool, where: str
) -> tuple[list[Example], int]:
    label_column = source.label_column
    column_sets = [columns for columns in _SENTENCE_COLUMNS[pair] if set(columns) <= set(split.column_names)]
    if not column_sets or label_column not in split.column_names:
        wanted = " or ".join(", ".join((*columns, label_column)) for columns in _SENTENCE_COLUMNS[pair])
        raise UserError(f"{where}: expected the columns {wanted}; found: {', '.join(split.column_names)}.")
    columns = split.select_columns([*column_sets[0], label_column]).to_dict()
    class_names = getattr(split.features[label_column], "names", None)
    label_of = {name.casefold(): label for name, label in names.items()}
    examples = []
    for *sentences, value in zip(*(columns[name] for name in (*column_sets[0], label_column)), strict=True):
        if value in (None, -1, "") or not all(sentence and sentence.strip() for sentence in sentences):
            continue
        name = class_names[value] if class_names else str(value)
        label = label_of.get(name.casefold())
        if label is None:
            raise UserError(
                f"{where}: unknown label name {name!r} in column {label_column}. Known: {', '.join(names)}."
            )
        examples.append({**dict(zip(("sentence1", "sentence2"), sentences, strict=False)), "label": label})
    return examples, len(split) - len(examples)

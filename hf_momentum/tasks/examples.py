"""What a task's data looks like once it is loaded, and the checks every source runs on each example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_momentum.errors import UserError

Example = dict[str, str]
"""`{"sentence1": …, "label": …}`, with `"sentence2"` for tasks on sentence pairs."""


@dataclass(frozen=True)
class TaskData:
    """One task's examples, checked.

    Attributes:
        name: The task, such as `"sst-2"`.
        source: Where the examples come from, for people to read.
        labels: Every label an example may carry, in the task's order.
        train: The examples to train on, or to draw k-shot splits from.
        test: The examples to test on.
        dev: The examples to choose hyperparameters on; None until a k-shot split is drawn.
        mapping_note: How the source's label names became the task's labels, for printing; None where the source
            writes the labels themselves.
    """

    name: str
    source: str
    labels: tuple[str, ...]
    train: list[Example]
    test: list[Example]
    dev: list[Example] | None = None
    mapping_note: str | None = None


def text_key(example: Example) -> tuple[str, ...]:
    """The input of an example: two examples with the same key are duplicates, whatever their labels.

    Args:
        example: One example.

    Returns:
        The sentence, or the two sentences.
    """
    return tuple(example[key] for key in ("sentence1", "sentence2") if key in example)


def expected_form(labels: Sequence[str], pair: bool) -> str:
    """One example written out, for error messages.

    Args:
        labels: The task's labels.
        pair: Whether an example has two sentences.

    Returns:
        A line of JSON.
    """
    second = ', "sentence2": "…"' if pair else ""
    return f'{{"sentence1": "…"{second}, "label": "{labels[0]}"}}'


def make_example(record: Mapping[str, object], labels: Sequence[str], pair: bool, where: str) -> Example:
    """Check one record and keep what the task needs of it; an integer label becomes its decimal string.

    Args:
        record: Column name → value.
        labels: The labels allowed.
        pair: Whether `sentence2` is needed; it is left out otherwise.
        where: File and line, for the message.

    Returns:
        The example.

    Raises:
        UserError: If a key is missing, a sentence is no string or empty, or the label is not among `labels`.
    """
    sentences = ("sentence1", "sentence2") if pair else ("sentence1",)
    expected = f"Expected: {expected_form(labels, pair)}"
    missing = [key for key in (*sentences, "label") if key not in record]
    if missing:
        found = ", ".join(record) or "nothing"
        raise UserError(f"{where}: no {' and no '.join(missing)} (found: {found}). {expected}")
    for key in sentences:
        text = record[key]
        if not isinstance(text, str):
            raise UserError(f"{where}: {key} is {text!r}, not a string. {expected}")
        if not text.strip():
            raise UserError(f"{where}: {key} is empty. {expected}")
    label = record["label"]
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if label not in labels:
        raise UserError(f"{where}: unknown label {label!r}. Allowed labels: {', '.join(labels)}.")
    return {**{key: record[key] for key in sentences}, "label": label}

"""From examples to the rows that a Trainer takes."""

from collections.abc import Callable, Mapping, Sequence

from hf_momentum.tasks.examples import Example


def encode_examples(
    encoder: Callable[[Mapping[str, Sequence[str]]], Mapping[str, Sequence[list[int]]]],
    examples: Sequence[Example],
    labels: Sequence[str],
    *,
    sort_by_length: bool = False,
) -> list[dict]:
    """Tokenise examples once, in one batch.

    Args:
        encoder: `PromptEncoder` or `ClassifierEncoder` of a task.
        examples: The examples.
        labels: The task's labels; a label's position is its class.
        sort_by_length: Put the longest first, so that evaluation batches need little padding and the largest comes
            first. Accuracy does not depend on the order.

    Returns:
        One row per example: the tokenizer's columns and `labels`, its class.
    """
    if not examples:
        return []
    columns = {key: [example[key] for example in examples] for key in ("sentence1", "sentence2") if key in examples[0]}
    encoded = encoder(columns)
    rows = [
        {**{key: values[index] for key, values in encoded.items()}, "labels": labels.index(example["label"])}
        for index, example in enumerate(examples)
    ]
    return sorted(rows, key=lambda row: -len(row["input_ids"])) if sort_by_length else rows

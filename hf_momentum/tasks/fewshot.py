"""k-shot splits: k examples per class to train on, k per class to choose hyperparameters on, drawn by a seed.

The protocol of Gao et al., "Making Pre-trained Language Models Better Few-shot Learners", ACL 2021: five seeds, and
train and dev of the same size. The draws are this package's own, so they hold other examples than LM-BFF's files.
"""

import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hf_momentum.errors import UserError
from hf_momentum.tasks.examples import Example, text_key

logger = logging.getLogger(__name__)

SEEDS = (13, 21, 42, 87, 100)
"""The seeds of the protocol."""

TEST_CAP = 1000
"""At most so many test examples are used."""


@dataclass(frozen=True)
class FewShotSplit:
    """A k-shot split; no input text of `dev` stands in `train`.

    Attributes:
        train: Up to k examples per class, classes mixed.
        dev: Up to k other examples per class, classes mixed.
    """

    train: list[Example]
    dev: list[Example]


def _shuffled(items: Sequence[Example], seed: int) -> list[Example]:
    # Python promises to keep the sequence of random() for ever, but not what shuffle() and sample() make of it.
    draw = random.Random(seed).random
    keys = [draw() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


def _check_count(name: str, value: int, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise UserError(f"{name} must be a whole number of at least {smallest}, not {value!r}.")


def _distinct(examples: Sequence[Example]) -> list[Example]:
    first: dict[tuple[str, ...], Example] = {}
    for example in examples:
        first.setdefault(text_key(example), example)
    return list(first.values())


def draw_fewshot(
    train: Sequence[Example], k: int, seed: int, labels: Sequence[str], task_name: str = "this task"
) -> FewShotSplit:
    """Draw k train and k dev examples per class.

    Exact duplicates are dropped first (the first one stays). The rest is ordered by `random.Random(seed).random()`,
    the same on every platform and Python version; of each class the first k train, the next k are dev. A class with
    fewer than 2k examples gives train its k first and dev what is left, and a warning names it.

    Args:
        train: The examples to draw from.
        k: Examples per class in each half, at least 1.
        seed: A whole number, 0 or more.
        labels: The task's labels.
        task_name: Named in warnings and errors.

    Returns:
        The split.

    Raises:
        UserError: If k or seed is out of range, a label is unknown, or train or dev would hold no example at all.
    """
    _check_count("k", k, 1)
    _check_count("seed", seed, 0)
    unknown = sorted({example["label"] for example in train}.difference(labels))
    if unknown:
        raise UserError(f"{task_name}: unknown label {unknown[0]!r}. Allowed labels: {', '.join(labels)}.")
    seen = Counter[str]()
    split = FewShotSplit([], [])
    for example in _shuffled(_distinct(train), seed):
        seen[example["label"]] += 1
        if seen[example["label"]] <= k:
            split.train.append(example)
        elif seen[example["label"]] <= 2 * k:
            split.dev.append(example)
    for label in labels:
        if seen[label] < 2 * k:
            n_train = min(k, seen[label])
            logger.warning(
                f"{task_name}: class {label!r} has {seen[label]} distinct examples, {2 * k} are wanted for k={k}: "
                f"{n_train} go to train, {seen[label] - n_train} to dev."
            )
    for name, part in (("train", split.train), ("dev", split.dev)):
        if not part:
            raise UserError(
                f"{task_name}: the {name} split for k={k} holds no example at all; the classes have "
                f"{', '.join(f'{label}: {seen[label]}' for label in labels)} distinct examples. Choose a smaller k."
            )
    return split


def cap_test(test: Sequence[Example], cap: int = TEST_CAP, seed: int = 42) -> list[Example]:
    """Keep at most `cap` test examples, the same ones in every run.

    Args:
        test: The test examples.
        cap: The largest number kept.
        seed: Of the draw; the protocol's is 42 whatever the split's seed.

    Returns:
        All examples in their order if there are at most `cap`, else the first `cap` of the order drawn by `seed`.

    Raises:
        UserError: If `test` is empty or `cap` or `seed` is out of range.
    """
    _check_count("cap", cap, 1)
    _check_count("seed", seed, 0)
    if not test:
        raise UserError("The test split holds no example.")
    return list(test) if len(test) <= cap else _shuffled(test, seed)[:cap]

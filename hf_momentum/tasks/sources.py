"""Where a task's data comes from: a local folder, the Hub, or the embedded demo."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from hf_momentum.errors import UserError
from hf_momentum.tasks.demo import DEMO_TASKS, load_demo_task
from hf_momentum.tasks.examples import TaskData
from hf_momentum.tasks.fewshot import SEEDS, cap_test, draw_fewshot
from hf_momentum.tasks.folders import list_kshot_splits, load_folder, load_kshot_split
from hf_momentum.tasks.hub import HUB_SOURCES, load_hub


def load_task_data(
    task_name: str,
    labels: Sequence[str],
    *,
    pair: bool,
    data_dir: str | Path | None = None,
    hub_id: str | None = None,
) -> TaskData:
    """Load all of a task's examples: from `data_dir`, else from `hub_id`, else from the demo or the task's Hub id.

    Args:
        task_name: The task.
        labels: Its labels, in order; examples with another label are an error.
        pair: Whether its examples have two sentences.
        data_dir: A folder with `TASK/{train,test}.jsonl` or `{train,test}.jsonl`.
        hub_id: `owner/name`, or `owner/name:config`, of a data set on the Hub; see `load_hub`.

    Returns:
        The examples; print its `source` and, if there is one, its `mapping_note`.

    Raises:
        UserError: If no source is known, both are given, or the source is missing or malformed.
    """
    if data_dir is not None and hub_id is not None:
        raise UserError(f"{task_name}: give a data folder or a Hub id, not both ({data_dir} and {hub_id}).")
    if data_dir is not None:
        return load_folder(task_name, labels, data_dir, pair=pair)
    if hub_id is None and task_name in DEMO_TASKS:
        return _demo_data(task_name, labels)
    if hub_id is None and task_name not in HUB_SOURCES:
        raise UserError(
            f"No data is known for task {task_name!r}: give --data_dir FOLDER or a Hub id. "
            f"Known without: {', '.join([*HUB_SOURCES, *DEMO_TASKS])}."
        )
    return load_hub(task_name, labels, hub_id, pair=pair)


def load_fewshot(
    task_name: str,
    labels: Sequence[str],
    k: int,
    seeds: Sequence[int] = SEEDS,
    *,
    pair: bool,
    data_dir: str | Path | None = None,
    hub_id: str | None = None,
) -> dict[int, TaskData]:
    """Load a task once and make its k-shot split for every seed, the test split capped.

    A `data_dir` with LM-BFF's ready `K-SEED` folders gives those; every other source is drawn from.

    Args:
        task_name: The task.
        labels: Its labels, in order.
        k: Examples per class, in train and in dev.
        seeds: Of the draws.
        pair: Whether its examples have two sentences.
        data_dir: See `load_task_data` and `list_kshot_splits`.
        hub_id: See `load_task_data`.

    Returns:
        Seed → the split, with `train`, `dev` and `test`.

    Raises:
        UserError: As `load_task_data`, `load_kshot_split` and `draw_fewshot`.
    """
    if data_dir is not None and hub_id is None and list_kshot_splits(task_name, data_dir):
        ready = {seed: load_kshot_split(task_name, labels, k, seed, data_dir, pair=pair) for seed in seeds}
        return {seed: dataclasses.replace(split, test=cap_test(split.test)) for seed, split in ready.items()}
    data = load_task_data(task_name, labels, pair=pair, data_dir=data_dir, hub_id=hub_id)
    test = cap_test(data.test)
    splits = {}
    for seed in seeds:
        split = draw_fewshot(data.train, k, seed, labels, task_name)
        splits[seed] = dataclasses.replace(data, train=split.train, dev=split.dev, test=test)
    return splits


def _demo_data(task_name: str, labels: Sequence[str]) -> TaskData:
    data = load_demo_task(task_name)
    if set(labels) != set(data.labels):
        raise UserError(f"{task_name}: its labels are {', '.join(data.labels)}, not {', '.join(labels)}.")
    return dataclasses.replace(data, labels=tuple(labels))

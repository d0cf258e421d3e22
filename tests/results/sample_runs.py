"""Made-up records that the tests of tables, comparisons and figures share."""

import itertools
from typing import Any

SETTING = {"task": "sst-2", "model": "demo", "tuning": "classifier", "k": 16, "prompt": "p", "test_data": "d"}
TRAINING = {"batch_size": 8, "lr_schedule": "linear", "steps": 60, "max_grad_norm": 1.0, "peft": None, "ell": None}
PACKAGES = {"hf_momentum": "0.1.0", "torch": "2.14.1"}


def run(optim: str, seed: int | None, test: float | None, **changes: Any) -> dict[str, Any]:
    """A record as the recipe writes it: tested, or of stage dev if `test` is None."""
    momentum = {"sgd": 0.0, "sgdm": 0.9, "svag": 0.0}.get(optim)
    record = SETTING | TRAINING | {"format": 1, "optim": optim, "seed": seed, "momentum": momentum}
    record |= {"momentum_schedule": None, "learning_rate": 0.1, "effective_lr": 0.1 if momentum is not None else None}
    record |= {"dev_accuracy": 0.75, "test_accuracy": test, "stage": "dev" if test is None else "test"}
    record |= {"optimizer_state_bytes": 2**20 if momentum else 0, "packages": PACKAGES} | changes
    own = [record[name] for name in ("task", "optim", "momentum", "ell", "batch_size", "lr_schedule", "k", "model")]
    parts = "-".join(map(str, own))
    return (
        {"run_id": f"{parts}-{seed}-{record['learning_rate']}"}
        | ({} if test is None else {"group": parts, "group_id": f"{parts}-{seed}", "grid_size": 2})
        | record
    )


def runs(optim: str, tests: list[float], **changes: Any) -> list[dict[str, Any]]:
    """One record per seed."""
    return [run(optim, seed, test, **changes) for seed, test in zip((13, 21, 42, 87, 100), tests, strict=False)]


def five_tasks() -> list[dict[str, Any]]:
    """SGD against SGDM on tasks with every verdict, among them one with characters that formats must escape."""
    zero = SETTING | {"format": 1, "run_id": "zero", "stage": "test", "optim": "zero-shot", "seed": None}
    records = [zero | {"test_accuracy": 0.51}]
    first = [0.60, 0.62, 0.61, 0.63, 0.62]
    steps = {
        "sst-2": [0.001, -0.002, 0.003, 0.0, 0.002],  # equivalent
        "small_but_sure": [0.010, 0.011, 0.009, 0.010, 0.0105],  # equivalent, though not 0
        "100%|[x]*": [0.10, 0.09, 0.11, 0.10, 0.12],  # different, by more than the margin
        "trec": [0.03, 0.01, 0.02, 0.025, 0.02],  # different, perhaps within the margin
        "mnli": [-0.10, 0.12, 0.03, -0.05, 0.08],  # undecided
    }
    for task, changes in steps.items():
        records += runs("sgdm", [a + b for a, b in zip(first, changes, strict=True)], task=task)
        records += runs(
            "sgd", first, task=task, packages=PACKAGES | {"torch": "2.15.0"} if task == "trec" else PACKAGES
        )
    return records + runs("adamw_torch", [0.7], learning_rate=2e-5, optimizer_state_bytes=2**21)


def sweeps() -> list[dict[str, Any]]:
    """Schedules, batch sizes and β on one task."""
    records = []
    for (schedule, batch), optim in itertools.product([("linear", 8), ("cosine", 8), ("linear", 4)], ("sgdm", "sgd")):
        bonus = 0.01 * (optim == "sgdm") + 0.02 * (schedule == "cosine")
        records += runs(optim, [0.6 + bonus, 0.63, 0.64 - bonus], lr_schedule=schedule, batch_size=batch)
    return records + runs("sgdm", [0.61, 0.62, 0.66], momentum=0.99)

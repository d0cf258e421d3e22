import dataclasses
import re

import pytest
from transformers import TrainingArguments

from hf_momentum.errors import UserError
from hf_momentum.training.global_batch import BatchSplit, split_batch
from hf_momentum.training.svag_arguments import svag_arguments


def fewest_steps(batch: int, processes: int, most: float) -> list[BatchSplit]:
    """Every split that adds up, by trial, and of those the ones with the fewest accumulation steps."""
    splits = [
        BatchSplit(processes, size, steps)
        for size in range(1, batch + 1)
        for steps in range(1, batch + 1)
        if size <= most and processes * size * steps == batch
    ]
    fewest = min((split.accumulation for split in splits), default=0)
    return [split for split in splits if split.accumulation == fewest]


@pytest.mark.parametrize("batch", range(1, 25))
def test_every_small_batch_against_trying_all_splits(batch):
    for processes in range(1, 26):
        for micro_batch in (None, *range(1, 26)):
            expected = fewest_steps(batch, processes, micro_batch or batch)
            if expected:
                assert [split_batch(batch, processes, micro_batch)] == expected
            else:
                with pytest.raises(UserError, match="cannot be split evenly"):
                    split_batch(batch, processes, micro_batch)


@pytest.mark.parametrize("batch", range(1, 25))
def test_an_exact_micro_batch_is_taken_or_refused(batch):
    for processes in (n for n in range(1, batch + 1) if batch % n == 0):
        for micro_batch in range(1, 26):
            if batch % (processes * micro_batch) == 0:
                split = split_batch(batch, processes, micro_batch, exact=True)
                assert (split.per_device, split.global_batch_size) == (micro_batch, batch)
            else:
                with pytest.raises(UserError, match="do not add up"):
                    split_batch(batch, processes, micro_batch, exact=True)


@pytest.mark.parametrize(
    ("batch", "processes", "micro_batch", "per_device", "accumulation"),
    [
        (1024, 8, 128, 128, 1),
        (8192, 8, 128, 128, 8),
        (8192, 8, 200, 128, 8),
        (1024, 2, 8, 8, 64),
        (512, 1, None, 512, 1),
        (3072, 4, 100, 96, 8),
    ],
)
def test_batches_of_the_recipes(batch, processes, micro_batch, per_device, accumulation):
    assert split_batch(batch, processes, micro_batch) == BatchSplit(processes, per_device, accumulation)


def test_errors_list_what_is_possible():
    with pytest.raises(UserError, match=r"1000 .* 3 processes.*: 1, 2, 4, 5, 8, .*, 1000\. .*: 999 or 1002\.$"):
        split_batch(1000, 3)
    with pytest.raises(UserError, match=r"Nearest global batch for 8 processes: 8\.$"):
        split_batch(4, 8)
    listed = "Possible micro-batches: 1, 2, 4, 8, 16, 32, 64, 128, 256."
    with pytest.raises(UserError, match=f"of 48 .* 256 .* 4 processes .* 1024.*{re.escape(listed)}$"):
        split_batch(1024, 4, 48, exact=True)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"global_batch_size": 0}, "global_batch_size: 0"),
        ({"global_batch_size": 512.0}, "global_batch_size: 512.0"),
        ({"processes": -1}, "processes: -1"),
        ({"micro_batch": 0}, "micro_batch: 0"),
        ({"exact": True}, "takes a micro_batch"),
    ],
)
def test_what_is_no_positive_integer_is_refused(given, name):
    with pytest.raises(UserError, match=name):
        split_batch(**{"global_batch_size": 512} | given)


def test_svag_steps_hold_two_batches_of_any_split(tmp_path):
    for batch in (512, 7):
        split = split_batch(batch, 1, 128)
        args = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=split.per_device,
            gradient_accumulation_steps=split.accumulation,
            use_cpu=True,
        )
        stretched = svag_arguments(args, 4)
        step = dataclasses.replace(split, accumulation=stretched.gradient_accumulation_steps)
        assert step.global_batch_size == 2 * batch


def test_a_split_reads_as_a_product():
    assert str(BatchSplit(8, 128, 4)) == "4096 = 8 (processes) × 128 (micro-batch) × 4 (accumulation steps)"

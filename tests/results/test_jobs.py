import os

import pytest
import torch
from in_process import PoolInThisProcess
from rich.console import Console

from hf_momentum.results import jobs
from hf_momentum.results.jobs import available_cores, compute_missing
from hf_momentum.results.record import read_records

ABOUT = {"packages": {"hf_momentum": "0"}}


def square(number):
    if number < 0:
        raise ValueError("negative")
    return {"number": number, "square": number**2, "process": os.getpid(), "threads": torch.get_num_threads()}


def compute(numbers, file, workers=2):
    compute_missing(square, {f"n{n}": {"number": n} for n in numbers}, file, workers, ABOUT, Console(quiet=True))
    return {record["run_id"]: record for record in read_records(file).records}


def test_jobs_run_in_processes_of_their_own_that_share_out_the_cores(tmp_path):
    found = compute([3, 4], tmp_path / "out" / "results.jsonl")
    assert {name: record["square"] for name, record in found.items()} == {"n3": 9, "n4": 16}
    for record in found.values():
        assert record["process"] != os.getpid() and record["threads"] <= max(1, available_cores() // 2)
        assert record["seconds"] >= 0 and record["packages"] == ABOUT["packages"]


@pytest.fixture
def pool(monkeypatch):
    pool, threads = PoolInThisProcess(), torch.get_num_threads()
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", pool)
    yield pool
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("own", "cores", "workers", "threads"), [(8, 8, 2, 4), (3, 8, 2, 3), (1, 8, 1, 1), (8, 2, 4, 1)]
)
def test_a_worker_takes_its_share_of_the_cores_and_no_more_than_this_process(
    tmp_path, pool, monkeypatch, own, cores, workers, threads
):
    monkeypatch.setattr(jobs, "available_cores", lambda: cores)
    torch.set_num_threads(own)
    assert compute([5], tmp_path / "results.jsonl", workers)["n5"]["threads"] == threads


def test_only_what_is_missing_is_computed(tmp_path, pool):
    compute([1, 2], tmp_path / "results.jsonl")
    assert sorted(compute([1, 2, 5], tmp_path / "results.jsonl")) == ["n1", "n2", "n5"]
    assert [job for _, job, _ in pool.submitted] == [{"number": 1}, {"number": 2}, {"number": 5}]
    compute([5], tmp_path / "results.jsonl")
    assert len(pool.submitted) == 3


def test_a_failure_keeps_what_was_finished(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(jobs, "as_completed", list)  # in order
    with pytest.raises(ValueError, match="negative"):
        compute([2, -1, 7], tmp_path / "results.jsonl")
    assert [record["run_id"] for record in read_records(tmp_path / "results.jsonl").records] == ["n2"]

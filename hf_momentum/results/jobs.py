"""Many independent computations side by side, each kept as it ends, so that a second start goes on with the rest."""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from hf_momentum.results.record import append_record, read_records


def available_cores() -> int:
    """Count the cores that this process may use.

    Returns:
        Their number; 1 where the system does not tell.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compute_missing(
    function: Callable[..., dict[str, Any]],
    jobs: Mapping[str, Mapping[str, Any]],
    file: Path,
    workers: int,
    about: Mapping[str, Any],
    console: Console,
    label: str = "cells",
) -> None:
    """Compute the jobs that a file of records lacks, in processes of their own, and append each as it ends.

    The cores are shared out among the workers. The first failure, and an interruption too, drops what has not begun.

    Args:
        function: Called by keywords with a job; what it returns becomes the record. A function of a module, and no
            closure: the workers import it.
        jobs: Record's `run_id` → keywords, in the order of their start.
        file: The records.
        workers: Processes.
        about: What all records say besides `run_id`, `seconds` and the function's own.
        console: For the progress bar.
        label: Of the bar.
    """
    done = {record["run_id"] for record in read_records(file).records}
    todo = {run_id: job for run_id, job in jobs.items() if run_id not in done}
    if not todo:
        return
    threads = max(1, min(torch.get_num_threads(), available_cores() // workers))  # OMP_NUM_THREADS counts
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, Progress(console=console) as progress:
        bar = progress.add_task(label, total=len(todo))
        futures = {pool.submit(_timed, function, job, threads): run_id for run_id, job in todo.items()}
        try:
            for future in as_completed(futures):
                append_record(file, {"run_id": futures[future], **future.result(), **about})
                progress.advance(bar)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _timed(function: Callable[..., dict[str, Any]], job: Mapping[str, Any], threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    start = time.perf_counter()
    record = function(**job)
    return {**record, "seconds": time.perf_counter() - start}

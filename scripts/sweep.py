r"""Run a recipe over a grid or a search, with any number of workers, on one machine or many.

  one machine, two trials at a time  python scripts/sweep.py recipes/grids/schedules.yaml --workers 2 --data_dir DATA
  one trial at a time on each GPU    CUDA_VISIBLE_DEVICES=0 python scripts/sweep.py CONFIG.yaml &
                                     CUDA_VISIBLE_DEVICES=1 python scripts/sweep.py CONFIG.yaml &
  many machines                      the same command on each, with --storage postgresql://USER:PASSWORD@HOST/DATABASE

Options that are not listed below go to the recipe and win over those of the file; one that is an axis of the search
replaces the axis: with `--seeds 13 21` these two seeds run, as a study of its own in the same OUTPUT_DIR, and the
whole sweep later skips what they finished. CONFIG.yaml, with paths as seen from the current directory:

  recipe: recipes/roberta_fewshot.py   # a script that takes --options, appends each finished run to
                                       # OUTPUT_DIR/results.jsonl, and skips the runs that it finds there
  launch: accelerate launch --num_processes 2 --main_process_port 0   # optional; without it, this Python
  options: {output_dir: runs/mine, model: demo, max_steps: 60}        # the same for all trials
  search:                              # each combination is a trial
    seeds: [13, 21, 42]
    method:                            # several options under one name
      - {optim: sgd}
      - {optim: sgdm, momentum: 0.5}
  sampler: tpe                         # optional: search instead of running the whole grid. Then also:
  trials: 20                           #   how many, and an axis may be a range:
                                       #   learning_rate: {low: 0.001, high: 1.0, log: true}
  objective: dev_accuracy              # the records' field to improve, its mean over the runs of a trial
  direction: maximize                  # or minimize

Each trial works in OUTPUT_DIR/trials/NAME, with all that it prints in log.txt; when it ends, its records go to
OUTPUT_DIR/results.jsonl, each with this command. Started again, the command goes on: finished trials are skipped,
failed ones tried again. The file and the options may change until the first trial has finished, and a sweep whose
first trial ends with status 2 (the recipe refuses its options) stops there. A trial knows its own folder alone: runs
that a recipe made in OUTPUT_DIR without the sweep are made again, so give a sweep a folder of its own.
The workers of a sweep share OUTPUT_DIR; on several machines it lies on a file system whose locks hold between them
(such as NFS 4). The trials of a worker that died are taken up by the others, or by the next one started, after two
heartbeats, and each waits until what the dead worker left running has ended.
"""

import argparse
import contextlib
import difflib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TimeElapsedColumn

from hf_momentum.command import run_command
from hf_momentum.errors import UserError, require_extra
from hf_momentum.results.record import read_results
from hf_momentum.results.tables import print_summary
from hf_momentum.training.sweep import RESULTS, Range, Sweep, read_sweep
from hf_momentum.training.sweep_study import SharedStudy

if TYPE_CHECKING:
    import optuna

TICK, POLL, PATIENCE, TAIL = 0.1, 1.0, 15.0, 12  # seconds between looks at trials and at the queue; to end; lines
REFUSED = 2  # the status of a recipe that refuses its options, see `run_command`


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Sweep]:
    """Read the command line and the configuration that it names."""
    layout = {"usage": "%(prog)s CONFIG.yaml [options]", "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, **layout)
    add = parser.add_argument
    add("config", metavar="CONFIG.yaml", help="the sweep")
    add("--workers", type=int, default=1, help="trials at once on this machine, each with its share of the cores "
        "unless OMP_NUM_THREADS is set (default: 1)")  # fmt: skip
    add("--storage", help="Optuna storage URL (default: an SQLite file in OUTPUT_DIR, for one machine)")
    add("--study", help="the sweep's name in the storage (default: the configuration's name, and any replaced axis)")
    add("--heartbeat", type=int, default=30, help="seconds between a worker's signs of life, the same for all workers "
        "(default: 30)")  # fmt: skip
    add("--dry_run", "--dry-run", action="store_true", help="list the trials' commands and end")
    args, words = parser.parse_known_args(argv)
    for name in ("workers", "heartbeat"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}.")
    options = recipe_options(words)
    for name in options:
        if close := difflib.get_close_matches(name, vars(args).keys() - {"config"}, n=1, cutoff=0.75):
            raise UserError(
                f"Unknown option --{name} (did you mean --{close[0]}?). If the recipe has an option of this name, "
                f"write it under options in {args.config}."
            )
    return args, read_sweep(args.config, options)


def recipe_options(words: Sequence[str]) -> dict[str, str | list[str]]:
    """Group words as options: name → its word, or a list of several."""
    options: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            values = options[name.replace("-", "_")] = [value] if equals else []
        elif options:
            values.append(word)
        else:
            raise UserError(f"{word!r} belongs to no option. CONFIG.yaml comes first, then options.")
    return {name: values[0] if len(values) == 1 else values for name, values in options.items()}


def environment(sweep: Sweep, workers: int, console: Console) -> dict[str, str]:
    """The trials' environment: what is installed beside this Python is found, and each gets its share of the cores."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    if sweep.launch and shutil.which(sweep.launch[0], path=path) is None:
        raise UserError(f"launch: there is no command {sweep.launch[0]!r}. Install it, or leave launch out.")
    variables = os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"}
    if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        variables["OMP_NUM_THREADS"] = str(max(1, cores // workers))
        console.print(f"{workers} trials at once, OMP_NUM_THREADS={variables['OMP_NUM_THREADS']} for each.")
    return variables


@dataclass
class Slot:
    """A claimed trial: its command runs, or waits for what a dead worker left of the same trial."""

    trial: "optuna.Trial"
    name: str
    folder: Path
    line: int
    log: IO[bytes] | None = None
    process: subprocess.Popen | None = None
    started: float = 0.0

    def start(self, command: list[str], variables: dict[str, str]) -> bool:
        """Start the command unless another process still works on this trial.

        The log is the command's standard output and locked. All processes below the command inherit it, so that the
        lock lasts until the last of them has ended, also where the worker was killed.

        Returns:
            True if it was started.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.log or open(self.folder / "log.txt", "ab")  # noqa: SIM115 (held while the trial runs)
        try:
            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self.log.write(f"$ {shlex.join(command)}\n".encode())
        self.log.flush()
        pipes = {"stdin": subprocess.DEVNULL, "stdout": self.log, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, env=variables, start_new_session=True, **pipes)
        self.started = time.monotonic()
        return True

    def tail(self) -> str:
        """The last lines that the command wrote."""
        with open(self.folder / "log.txt", "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 8192))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-TAIL:])

    def runs(self) -> bool:
        """Whether the command runs."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to the command and the processes of its group."""
        if self.runs():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


class Worker:
    """Runs trials of a study, several at once, until none is left anywhere."""

    def __init__(self, study: SharedStudy, variables: dict[str, str], args: argparse.Namespace, console: Console):
        self.study, self.sweep, self.variables, self.args = study, study.sweep, variables, args
        columns = ("{task.description}", BarColumn(20), "{task.fields[note]}", TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)
        self.slots: list[Slot] = []
        self.stopped = False

    def run(self) -> None:
        """Work until every trial is finished, here and elsewhere: the worker stands by for those of others."""
        overall = self.progress.add_task("trials", note="")
        next_look = next_beat = 0.0
        try:
            while not self.stopped:
                before, self.slots = self.slots, [slot for slot in self.slots if not self.is_over(slot)]
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + self.args.heartbeat
                    for slot in self.slots:
                        self.study.beat(slot.trial)
                if time.monotonic() >= next_look or len(self.slots) < len(before):
                    next_look = time.monotonic() + (0.0 if self.claim() else POLL)
                    if self.show(overall) == 0 and not self.slots:
                        return
                time.sleep(TICK)
        finally:
            self.stop()
        raise KeyboardInterrupt

    def claim(self) -> bool:
        """Take a trial if a slot is free; say whether there was one."""
        if len(self.slots) >= self.args.workers or (trial := self.study.claim()) is None:
            return False
        name = self.sweep.describe(trial.params)
        line = self.progress.add_task(f"  {escape(name)}", total=None, note="")
        self.slots.append(Slot(trial, name, self.sweep.folder(trial.params), line))
        return True

    def show(self, overall: int) -> int:
        """Update the bar over all trials; return how many are not finished."""
        done, left = self.study.counts()
        failed = len(self.study.failed())
        note = f"{done} done, {len(self.slots)} here, {left - len(self.slots)} queued or elsewhere, {failed} failed"
        self.progress.update(overall, total=done + left + failed, completed=done + failed, note=note)
        return left

    def is_over(self, slot: Slot) -> bool:
        """Start a slot's command if it has to; close its trial if it has ended."""
        if slot.process is None:
            started = slot.start(self.sweep.command(slot.trial.params, sys.executable), self.variables)
            self.progress.update(slot.line, note="" if started else "waits for an earlier process of this trial")
            return False
        if (status := slot.process.poll()) is None:
            return False
        self.print(f"{slot.name}: {self.close(slot, status)}")
        slot.log.close()
        self.progress.remove_task(slot.line)
        if status == REFUSED and self.study.counts()[0] == 0:
            raise UserError(
                "Stopped, since the first trial's options were refused (status 2, see above). Correct the options or "
                "the file: both may change as long as no trial is finished."
            )
        return True

    def close(self, slot: Slot, status: int) -> str:
        """Close the trial of a command that ended; say how it went."""
        if status:
            self.study.fail(slot.trial)
            return f"FAILED with status {status}, all in {slot.folder}/log.txt\n{slot.tail()}"
        try:
            value = self.study.finish(slot.trial, slot.folder)
        except UserError as error:
            self.study.fail(slot.trial)
            return f"FAILED, {error}"
        return f"{self.sweep.objective} {value:.4g}, {time.monotonic() - slot.started:.0f} s"

    def stop(self) -> None:
        """End what still runs and give its trials back to the queue."""
        deadline = time.monotonic() + PATIENCE
        try:
            for slot in self.slots:
                slot.signal(signal.SIGTERM)
            while any(slot.runs() for slot in self.slots) and time.monotonic() < deadline:
                time.sleep(TICK)
        finally:
            for slot in self.slots:
                slot.signal(signal.SIGKILL)
        for slot in self.slots:
            self.study.give_back(slot.trial)

    def print(self, text: str) -> None:
        """Print above the bars."""
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def stopping(worker: Worker) -> Iterator[None]:
    """Let ^C, and a scheduler's or terminal's end, stop the worker between two steps; a second ^C stops it at once."""

    def stop(number, frame):
        if worker.stopped and number == signal.SIGINT:
            raise KeyboardInterrupt
        worker.stopped = True

    heard = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def dry_run(sweep: Sweep, console: Console) -> None:
    """List the commands of a grid, or the one of a search with its ranges."""
    cells = sweep.cells()
    if sweep.sampler == "tpe":
        cells = [{axis: c if isinstance(c, Range) else next(iter(c)) for axis, c in sweep.search.items()}]
    for cell in cells:
        console.print(shlex.join(sweep.command(cell, "python")), markup=False, highlight=False, soft_wrap=True)
    console.print(f"{sweep.trials or len(cells)} trials.", highlight=False)


def report(sweep: Sweep, study: SharedStudy, console: Console) -> None:
    """Print the table, the best trial of a search, and what failed; a sweep with failures exits with status 1."""
    file = sweep.output_dir / RESULTS
    if file.exists():
        results = read_results([file])
        print_summary(results.records, results.problems, console)
        console.print(f"Results: {file}", highlight=False)
    if sweep.sampler == "tpe" and study.counts()[0]:
        best = study.study.best_trial
        console.print(f"Best {sweep.objective}: {best.value:.4g} at {sweep.describe(best.params)}", markup=False)
    if failed := study.failed():
        for trial in failed:
            console.print(
                f"Failed: {sweep.describe(trial.params)}: {sweep.folder(trial.params)}/log.txt", soft_wrap=True
            )
        console.print(f"{len(failed)} trials failed; the same command tries them again.", highlight=False)
        sys.exit(1)


def main(argv: Sequence[str]) -> None:
    """Read the sweep, work until nothing is left, show the results."""
    args, sweep = parse(argv)
    console = Console()
    if args.dry_run:
        return dry_run(sweep, console)
    optuna = require_extra("optuna", "sweep")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage")  # the worker sends it
    variables = environment(sweep, args.workers, console)
    storage = args.storage or f"sqlite:///{(sweep.output_dir / 'sweep.db').resolve()}"
    study = SharedStudy(sweep, args.study or sweep.name, storage, args.heartbeat)
    worker = Worker(study, variables, args, console)
    with stopping(worker), worker.progress:
        worker.run()
    report(sweep, study, console)


if __name__ == "__main__":
    run_command(main)

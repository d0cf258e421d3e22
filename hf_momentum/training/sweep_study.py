"""The trials of a sweep, shared out among many workers through an Optuna study."""

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from hf_momentum.errors import UserError, require_extra
from hf_momentum.results.record import append_record, identifier, read_records
from hf_momentum.training.sweep import RESULTS, Range, Sweep

if TYPE_CHECKING:
    import optuna


class SharedStudy:
    """The trials of a sweep in an Optuna study, given out so that no two workers ever hold the same one.

    All trials are queued once and then taken from the queue, under a lock in the sweep's folder: Optuna's GridSampler
    may suggest a cell twice to concurrent workers, and its queue may hand out a trial twice on SQLite, which has no
    row locks. A worker whose heartbeat stops loses its trials to the others.

    Args:
        sweep: The sweep.
        name: The study's name.
        url: An Optuna storage URL.
        heartbeat: Seconds between the signs of life of a worker; after two without one its trials are queued again.

    Raises:
        UserError: If the storage cannot be opened, the study is another sweep's, or its workers have another
            heartbeat.
    """

    def __init__(self, sweep: Sweep, name: str, url: str, heartbeat: int):
        self.optuna = require_extra("optuna", "sweep")
        self.sweep, self.name = sweep, name
        self._retry = self.optuna.storages.RetryHeartbeatStaleTrialCallback()
        try:
            sweep.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot use {sweep.output_dir} as --output_dir: {error}") from error
        self._lock = FileLock(sweep.output_dir / "sweep.lock")
        with self._lock:
            self._open(url, heartbeat)
            facts = {"folder": self._folder(), "heartbeat": heartbeat, "definition": sweep.definition()}
            self._check_folder(facts["folder"])
            self._check_heartbeat(heartbeat)
            self._check_definition(facts["definition"])
            for name, value in facts.items():
                self.study.set_user_attr(name, value)
            self._fill()

    def _open(self, url: str, heartbeat: int) -> None:
        from sqlalchemy.exc import SQLAlchemyError

        engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
        keeping = {"heartbeat_interval": heartbeat, "heartbeat_stale_trial_callback": self._retry}
        try:
            self._storage = self.optuna.storages.RDBStorage(url, engine, **keeping)
            self.study = self._load()
        except (SQLAlchemyError, ImportError, ValueError, self.optuna.exceptions.OptunaError) as error:
            raise UserError(f"Cannot open --storage: {error}") from error

    def _load(self) -> "optuna.Study":
        samplers, is_tpe = self.optuna.samplers, self.sweep.sampler == "tpe"
        return self.optuna.create_study(
            storage=self._storage,
            sampler=samplers.TPESampler(constant_liar=True) if is_tpe else samplers.RandomSampler(),
            study_name=self.name,
            direction=self.sweep.direction,
            load_if_exists=True,
        )

    def _folder(self) -> str:
        """The mark of the sweep's folder, the same under all paths to it."""
        file = self.sweep.output_dir / "sweep.id"
        if not file.exists():
            file.write_text(uuid.uuid4().hex)
        return file.read_text()

    def _check_folder(self, now: str) -> None:
        if self.study.user_attrs.get("folder", now) != now:
            raise UserError(
                f"The study {self.name!r} in this storage writes into another folder than {self.sweep.output_dir}. "
                "All workers of a sweep share one output_dir; for another sweep give --study another name."
            )

    def _check_heartbeat(self, now: int) -> None:
        """Refuse another heartbeat while trials run: a shorter one would take trials away from workers that live."""
        begun = self.study.user_attrs.get("heartbeat", now)
        if begun != now and self._count("RUNNING"):
            raise UserError(
                f"The workers of the sweep {self.name!r} have --heartbeat {begun}, and this one has {now}. Give "
                f"--heartbeat {begun}; it may change only when no trial runs."
            )

    def _check_definition(self, now: dict[str, Any]) -> None:
        """Refuse another definition once a trial runs or is finished; before that, start the study afresh."""
        begun = self.study.user_attrs.get("definition", now)
        if changed := [key for key in {**begun, **now} if begun.get(key) != now.get(key)]:
            self.optuna.storages.fail_stale_trials(self.study)
            if not self._count("RUNNING", "COMPLETE"):
                self.optuna.delete_study(study_name=self.name, storage=self._storage)
                self.study = self._load()
                return
            key = changed[0]
            raise UserError(
                f"The sweep {self.name!r} was begun with {key} = {_words(begun.get(key))}, and now it is "
                f"{_words(now.get(key))}. Take the change back, or name the changed sweep with --study: in the same "
                "output_dir it skips the runs that are finished."
            )

    def _fill(self) -> None:
        """Queue what was never queued, and once more what failed."""
        trials = self.study.get_trials(deepcopy=False)
        first = [trial for trial in trials if not trial.system_attrs.get("retry_history")]
        for cell in self.sweep.cells()[len(first) :]:
            self.study.enqueue_trial(cell)
        for trial in self.failed():
            self._retry(self.study, trial)

    def failed(self) -> list["optuna.trial.FrozenTrial"]:
        """The trials that failed and were not queued again."""
        trials = self.study.get_trials(deepcopy=True)
        retried = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
        fail = self.optuna.trial.TrialState.FAIL
        return [trial for trial in trials if trial.state == fail and trial.number not in retried]

    def counts(self) -> tuple[int, int]:
        """How many trials are finished well, and how many are queued or running, here and elsewhere."""
        return self._count("COMPLETE"), self._count("WAITING", "RUNNING")

    def _count(self, *states: str) -> int:
        return sum(trial.state.name in states for trial in self.study.get_trials(deepcopy=False))

    def claim(self) -> "optuna.Trial | None":
        """Take the next trial from the queue, after queueing those of workers that died.

        Returns:
            A trial that nobody else holds; None if none is queued.
        """
        with self._lock:
            self.optuna.storages.fail_stale_trials(self.study)
            waiting = self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.WAITING,))
            if not waiting:
                return None
            # Before it runs: Optuna never takes up a running trial that has had no heartbeat at all.
            self._storage.record_heartbeat(waiting[0]._trial_id)
            return self.study.ask({axis: self._distribution(axis) for axis in self.sweep.search})

    def _distribution(self, axis: str) -> "optuna.distributions.BaseDistribution":
        choices, kinds = self.sweep.search[axis], self.optuna.distributions
        if not isinstance(choices, Range):
            return kinds.CategoricalDistribution(list(choices))
        whole = isinstance(choices.low, int) and isinstance(choices.high, int)
        kind = kinds.IntDistribution if whole else kinds.FloatDistribution
        return kind(choices.low, choices.high, log=choices.log)

    def beat(self, trial: "optuna.Trial") -> None:
        """Say that a trial's worker is alive.

        Args:
            trial: A claimed trial.
        """
        self._storage.record_heartbeat(trial._trial_id)

    def finish(self, trial: "optuna.Trial", folder: Path) -> float:
        """Move a trial's records to the sweep's results, each once and with the sweep's command, and close the trial.

        Args:
            trial: A claimed trial whose command ended well.
            folder: What it wrote into.

        Returns:
            The objective.
        """
        records, results = read_records(folder / RESULTS).records, self.sweep.output_dir / RESULTS
        with self._lock:
            known = {_identity(record) for record in read_records(results).records}
            for record in records:
                if _identity(record) not in known:
                    append_record(results, record | {"sweep_command": self.sweep.started_with})
        value = self.sweep.score(records)
        self.study.tell(trial, value, skip_if_finished=True)
        return value

    def fail(self, trial: "optuna.Trial") -> None:
        """Close a trial as failed.

        Args:
            trial: A claimed trial.
        """
        self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL, skip_if_finished=True)

    def give_back(self, trial: "optuna.Trial") -> None:
        """Queue a claimed trial for others.

        Args:
            trial: A claimed trial whose command was stopped.
        """
        with self._lock:
            if not self.study.get_trials(deepcopy=False)[trial.number].state.is_finished():
                self.fail(trial)
                self._retry(self.study, self.study.get_trials()[trial.number])


def _identity(record: dict[str, Any]) -> str:
    named = {name: record.get(name) for name in ("run_id", "stage", "group_id")}
    content = {name: value for name, value in record.items() if name != "sweep_command"}
    return identifier(named if "run_id" in record else content)


def _words(value: Any) -> str:
    return "not set" if value is None else " ".join(value) if isinstance(value, list) else str(value)

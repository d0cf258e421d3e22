"""Finished runs on disk: what a command started again may skip, and the weights of the best run so far."""

import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hf_momentum.errors import UserError
from hf_momentum.results.record import Results, append_record, read_records
from hf_momentum.training.callbacks.best_weights import copy_into, trained_state
from hf_momentum.training.protocol import Group, Run


class RunStore:
    """The runs of an output folder.

    The first process reads and writes the file, and tells the others what was finished when the command started; from
    then on all follow the same runs and so agree.

    Args:
        folder: The command's output folder; made if there is none.

    Raises:
        UserError: If the folder cannot be made or the file not read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.file = self.folder / "results.jsonl"
        results = [None]
        if PartialState().is_main_process:
            results = [self._read()]
        (results,) = broadcast_object_list(results)
        if isinstance(results, UserError):
            raise results
        self.records, self.problems = results.records, results.problems

    def _read(self) -> Results | UserError:
        # An error is returned and not raised, so that every process gets it.
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return read_records(self.file)
        except OSError as error:
            return UserError(f"Cannot use {self.folder} as --output_dir: {error}")

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The first record that has all the wanted values.

        Args:
            **wanted: Field → value.

        Returns:
            The record, or None.
        """
        return next((r for r in self.records if all(r.get(key) == value for key, value in wanted.items())), None)

    def append(self, record: dict[str, Any]) -> None:
        """Keep a finished run: on disk before anything else happens.

        Args:
            record: The run's record.
        """
        self.records.append(record)
        if PartialState().is_main_process:
            append_record(self.file, record)

    def is_best(self, group: Group, dev_accuracy: float) -> bool:
        """Whether a run beats every finished run of its group.

        Args:
            group: The group.
            dev_accuracy: The run's.

        Returns:
            True if it is strictly better, or the first.
        """
        names = {run.run_id for run in group.runs}
        others = [r["dev_accuracy"] for r in self.records if r["run_id"] in names]
        return dev_accuracy > max(others, default=-1.0)

    def save_weights(self, group: Group, run: Run, model: nn.Module) -> None:
        """Write the trained tensors of the group's best run so far over those of the one before.

        Args:
            group: The group.
            run: The run that they come from.
            model: The trained model.
        """
        if PartialState().is_main_process:
            file = self._weights(group)
            file.parent.mkdir(parents=True, exist_ok=True)
            state = {name: tensor.detach().contiguous().cpu() for name, tensor in trained_state(model).items()}
            partial = file.with_suffix(f".{os.getpid()}.partial")
            save_file(state, partial, metadata={"run_id": run.run_id})
            os.replace(partial, file)
        PartialState().wait_for_everyone()

    def load_weights(self, group: Group, run: Run, model: nn.Module) -> bool:
        """Put a run's kept weights into a model.

        Args:
            group: The run's group.
            run: The run.
            model: A model of the same structure.

        Returns:
            False if this run's weights were not kept.
        """
        try:
            with safe_open(self._weights(group), "pt") as saved:
                if saved.metadata()["run_id"] != run.run_id:
                    return False
                copy_into(model, {name: saved.get_tensor(name) for name in saved.keys()})  # noqa: SIM118 (no mapping)
                return True
        except FileNotFoundError:
            return False

    def drop_weights(self, group: Group) -> None:
        """Remove the group's kept weights.

        Args:
            group: The group.
        """
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            self._weights(group).unlink(missing_ok=True)

    def _weights(self, group: Group) -> Path:
        return self.folder / "picks" / f"{group.group_id}.safetensors"

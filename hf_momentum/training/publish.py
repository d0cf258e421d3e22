"""The end of a recipe's command: the card of its results, and the push of the best model with that card."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import HFValidationError, HTTPError
from transformers import PreTrainedTokenizerBase, Trainer

from hf_momentum.errors import UserError
from hf_momentum.results.card import Card, results_card, write_card
from hf_momentum.results.comparisons import paired_values
from hf_momentum.results.plots import write_figure
from hf_momentum.results.rows import table_rows
from hf_momentum.training.arguments import RecipeTrainingArguments
from hf_momentum.training.protocol import Group, Run, is_sharded
from hf_momentum.training.run_store import RunStore

_REFUSALS = (OSError, HTTPError, HFValidationError)  # no network, no token, no right to write, a name not allowed


def check_push(training: RecipeTrainingArguments, tasks: Sequence[str]) -> None:
    """Refuse `--push_to_hub` where it is not clear which model is meant.

    Args:
        training: The command's arguments.
        tasks: The tasks.

    Raises:
        UserError: If there are several tasks or optimizers.
    """
    if training.push_to_hub and (len(tasks) > 1 or len(training.optim) > 1):
        raise UserError(
            "--push_to_hub pushes one model, the pick that is best on dev over all seeds: name one --task and one "
            "--optim. For a card of the whole comparison use --model_card."
        )


def card_figure(records: Sequence[dict[str, Any]], folder: Path) -> tuple[Path | None, str]:
    """Draw what a card shows: the paired differences, or the learning curves where there is nothing to compare.

    Args:
        records: The card's records.
        folder: Where to.

    Returns:
        The PNG, None without one; and a sentence on why there is none, empty where the records hold neither.
    """
    rows = table_rows(records)
    has_curves = any(record.get("curve") for row in rows for record in row.records)
    kind = "difference" if paired_values(rows) else "curves" if has_curves else None
    if kind is None:
        return None, ""
    try:
        return write_figure(kind, records, folder)[0], ""
    except UserError as error:  # without matplotlib the card is still whole
        return None, f"The card has no figure: {error}"


class Publisher:
    """Writes a command's card, and with `--push_to_hub` keeps and pushes the pick that is best on dev over all seeds.

    Args:
        store: The command's runs.
        push: Whether to push.
    """

    def __init__(self, store: RunStore, push: bool):
        self.store, self.push = store, push
        self.groups: list[Group] = []  # the command's, filled as it plans

    def keep(self, run: Run, trainer: Trainer) -> None:
        """Keep the weights of a run, if they may be pushed: of all tested runs this is the best on dev so far.

        Args:
            run: A finished run.
            trainer: Its Trainer.
        """
        if self.push and not is_sharded(run.arguments):
            best = self._best()
            if best is not None and best.run_id == run.run_id:
                self.store.save_weights(self._candidates(), run, trainer.model)

    def publish(self, name: str, build_trainer: Callable[[Run], Trainer], tokenizer: PreTrainedTokenizerBase) -> str:
        """Write the card into the output folder, or push the best model with it.

        Args:
            name: The model's name.
            build_trainer: Makes the Trainer of a run. A run whose weights could not be kept is trained once more.
            tokenizer: To be pushed with the model.

        Returns:
            A sentence on what happened, and one if the card has no figure that it could have.
        """
        records, figure, missing = self._records(), None, ""
        if PartialState().is_main_process:  # which alone writes the card
            figure, missing = card_figure(records, self.store.folder)
        if not self.push:
            if PartialState().is_main_process:
                write_card(results_card(records, name, figure), self.store.folder)
            return _lines(f"Model card: {self.store.folder / 'README.md'}", missing)
        run, candidates = self._best(), self._candidates()
        model = next(record for record in records if record["run_id"] == run.run_id)
        trainer = build_trainer(run)
        if not self.store.load_weights(candidates, run, trainer.model):
            trainer.train()
        self.store.drop_weights(candidates)
        trainer.args.output_dir, trainer.processing_class = str(self.store.folder), tokenizer
        return _lines(push_with_card(trainer, results_card(records, name, figure, model)), missing)

    def _candidates(self) -> Group:
        return Group(tuple(run for group in self.groups for run in group.runs))

    def _best(self) -> Run | None:
        """The best on dev of the tested runs; of equals, the first."""
        tested = {record["run_id"] for record in self._records()}
        finished = Group(tuple(run for run in self._candidates().runs if run.run_id in tested))
        return finished.pick(self.store.records) if finished.runs else None

    def _records(self) -> list[dict[str, Any]]:
        """The command's own tested records, out of all in its output folder, and the zero-shot rows of its tasks."""
        ids = {group.group_id for group in self.groups}
        tests = {group.runs[0].settings["test_data"] for group in self.groups}
        return [
            record
            for record in self.store.records
            if record.get("group_id") in ids or (record["optim"] == "zero-shot" and record.get("test_data") in tests)
        ]


def push_with_card(trainer: Trainer, card: Card) -> str:
    """Push a trained model by the Trainer's own `push_to_hub`, with this card in the place of the Trainer's.

    Whatever the Hub answers, the model and the card lie in the Trainer's output folder afterwards.

    Args:
        trainer: The Trainer that holds the model; every process has to call this.
        card: The card.

    Returns:
        A sentence on what happened.
    """
    folder = Path(trainer.args.output_dir)
    trainer.create_model_card = lambda **_: write_card(card, folder)
    outcome = [None]
    try:
        trainer.init_hf_repo()  # on the first process; the others learn of a refusal before they save together
    except _REFUSALS as error:
        outcome = [_refused(error, folder)]
    broadcast_object_list(outcome)
    if outcome[0] is not None:
        trainer.save_model(str(folder))
        if PartialState().is_main_process:
            write_card(card, folder)  # PEFT writes into a card that it finds
        return outcome[0]
    try:
        commit = trainer.push_to_hub()
    except _REFUSALS as error:
        return _refused(error, folder)
    return "" if commit is None else f"Pushed: {commit.repo_url}"


def _lines(*sentences: str) -> str:
    return "\n".join(filter(None, sentences))


def _refused(error: Exception, folder: Path) -> str:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return (
        f"Not pushed ({reason}). The model and its finished card are in {folder}: log in with `hf auth login` and "
        "start the same command again, or upload the folder yourself."
    )

"""Write a model card that names what a stock Trainer really trained with."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from hf_momentum.command import command_line
from hf_momentum.errors import UserError
from hf_momentum.optim import SGDM
from hf_momentum.results.card import (
    Card,
    check_readme,
    command_block,
    hardware_text,
    optimizer_line,
    render_card,
    versions_text,
    write_card,
)
from hf_momentum.results.card_metadata import PAPER
from hf_momentum.results.export import Report, Sheet, to_markdown
from hf_momentum.results.record import package_versions
from hf_momentum.training.callbacks.lr_milestones import lr_schedule
from hf_momentum.training.callbacks.trackers import group_hyperparameters
from hf_momentum.training.environment import hardware
from hf_momentum.training.optimizers import hyperparameters_of, innermost_optimizer

_OF_OTHERS = ("betas", "eps", "dampening", "nesterov")  # beside what `hyperparameters_of` names
_CARD_ARGUMENTS = {  # of Trainer.create_model_card → of ModelCardData
    "language": "language",
    "license": "license",
    "tags": "tags",
    "model_name": "model_name",
    "finetuned_from": "base_model",
    "dataset": "datasets",
}
_NO_RESULTS = ("time", "per_second")  # of an evaluation, beside its metrics


def optimizer_record(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State what an optimizer trains with, in the fields of a record.

    Args:
        optimizer: The innermost optimizer, at the beginning of training.

    Returns:
        `optim` (ours by name, others as `package.Class`), `learning_rate` (where its schedule starts from),
        `effective_lr` (η where it is exactly known), `weight_decay` (the largest of its groups), and what else its
        first group holds.
    """
    group = next((group for group in optimizer.param_groups if group["params"]), optimizer.param_groups[0])
    found, name = (
        hyperparameters_of(group),
        f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__name__}",
    )
    rate = found.pop("lr")
    if isinstance(optimizer, SGDM):
        name = group.get("optim") or ("sgdm" if group["momentum"] else "sgd")
        effective = rate * (group.get("ell") or 1)
    else:
        found |= {key: group[key] for key in _OF_OTHERS if group.get(key)}
        effective = group_hyperparameters(group | {"lr": rate}, type(optimizer)).get("effective_lr")
    decays = [float(other.get("weight_decay", 0.0)) for other in optimizer.param_groups]
    return found | {"optim": name, "learning_rate": rate, "effective_lr": effective, "weight_decay": max(decays)}


class ModelCardCallback(TrainerCallback):
    """Writes the card of a run to `output_dir/README.md` when training ends, and again after a later evaluation.

    It states the optimizer in use and its hyperparameters as they are when training begins, read from the optimizer
    itself, with any Trainer, arguments and optimizer. The Trainer's own card would be made from its arguments, which
    name AdamW at 5e-5 for every optimizer that they do not hold.

    The Trainer writes its card in one place: `push_to_hub` does, over README.md, right before the upload, and calls no
    callback between. So a card that is to be pushed has to take the place of the Trainer's:

        card = ModelCardCallback(license="apache-2.0")
        trainer = Trainer(..., callbacks=[card])
        card.attach(trainer)

    Without it, training with `push_to_hub=True` raises when it begins, and `trainer.push_to_hub()` before it writes
    anything. The pushes of checkpoints during training carry the card as it is then.

    Args:
        **metadata: Further keywords of `huggingface_hub.ModelCardData`, such as `license`, `base_model`, `datasets` or
            `eval_results`.
    """

    def __init__(self, **metadata: Any):
        self.metadata = metadata
        self._attached = self._training = self._scheduler_given = False
        self._run: dict[str, Any] | None = None
        self._args: TrainingArguments | None = None
        self._state: TrainerState | None = None

    def attach(self, trainer: Trainer) -> None:
        """Let the Trainer push this card: its `create_model_card` writes it from now on.

        Args:
            trainer: The Trainer; the callback is added to it if it is not there.
        """
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
            self._scheduler_given = trainer.lr_scheduler is not None
        trainer.create_model_card = self._create_model_card
        self._attached = True

    def on_init_end(self, args, state, control, lr_scheduler=None, **kwargs):
        """Note whether the Trainer was given a scheduler, which its arguments then do not describe."""
        self._scheduler_given = lr_scheduler is not None

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        """Note what the run is trained with."""
        if args.push_to_hub:
            self._check_attached()
        check_readme(args.output_dir)
        self._args, self._state, self._training = args, state, True
        schedule = type(lr_scheduler).__name__ if self._scheduler_given else lr_schedule(args)
        self._run = optimizer_record(innermost_optimizer(optimizer)) | {
            "lr_schedule": schedule,
            "max_grad_norm": args.max_grad_norm,
            "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "seed": args.seed,
            "processes": args.world_size,
            "hardware": hardware(args.device),
            "packages": package_versions(),
            "command": command_line(),
        }

    def on_train_end(self, args, state, control, **kwargs):
        """Write the card."""
        self._training = False
        self._write()

    def on_evaluate(self, args, state, control, **kwargs):
        """Write it anew with an evaluation after training."""
        if self._run is not None and not self._training:
            self._write()

    def on_push_begin(self, args, state, control, **kwargs):
        """Write it for a push during training; a later one has to find it attached."""
        if self._training:
            self._write()
        else:
            self._check_attached()

    def _check_attached(self) -> None:
        if not self._attached:
            raise UserError(
                "Trainer.push_to_hub would overwrite this model card with one that is made from the training "
                "arguments. After the Trainer is built call attach(trainer) of the ModelCardCallback."
            )

    def _create_model_card(self, **given: Any) -> None:
        """What the Trainer calls before it uploads."""
        given = {key: value for key, value in given.items() if value is not None}
        if unknown := given.keys() - _CARD_ARGUMENTS.keys():
            raise UserError(f"{min(unknown)} has no place in this card. Give ModelCardCallback(eval_results=...).")
        if self._run is None:
            raise UserError("This Trainer has not trained yet: there is nothing to write a model card about.")
        tags = [self.metadata.get("tags") or [], given.pop("tags", [])]
        tags = [tag for part in tags for tag in ([part] if isinstance(part, str) else part)]
        self.metadata = {_CARD_ARGUMENTS[key]: value for key, value in given.items()} | self.metadata | {"tags": tags}
        self._write()

    def _write(self) -> None:
        if self._state.is_world_process_zero:
            write_card(run_card(self._run, self._args, self._state, self.metadata), self._args.output_dir)


def run_card(
    run: dict[str, Any], args: TrainingArguments, state: TrainerState, metadata: dict[str, Any] | None = None
) -> Card:
    """Make the card of one run of a Trainer.

    Args:
        run: What it is trained with, in the fields of a record.
        args: The Trainer's arguments.
        state: The Trainer's state.
        metadata: Keywords of `huggingface_hub.ModelCardData`.

    Returns:
        The card.
    """
    metadata, folder = dict(metadata or {}), args.hub_model_id or Path(args.output_dir).absolute()
    name = metadata.pop("model_name", None) or Path(folder).name
    own = [tag for tag in metadata.pop("tags", None) or [] if tag != "hf_momentum"]
    ours = [run["optim"], f"arxiv:{PAPER}"] if "." not in run["optim"] else []
    defaults = {"library_name": "transformers", "tags": ["hf_momentum", *ours, *own]}
    defaults |= {"model_name": name} if metadata.get("eval_results") else {}
    sections = {
        "Results": _results(args, state),
        "Optimizer": optimizer_line(run),
        "Training": _settings(run, state),
        "Command": command_block([run["command"]]),
    }
    summary = f"Trained for {state.global_step} steps with `{run['optim']}` by the Hugging Face Trainer."
    return Card(render_card(ModelCardData(**defaults | metadata), name, summary, sections))


def _results(args: TrainingArguments, state: TrainerState) -> str:
    evaluations = [log for log in state.log_history if any(key.startswith("eval_") for key in log)]
    if not evaluations:
        return ""
    last = evaluations[-1]
    shown = [(k, f"{v:.5g}") for k, v in last.items() if k.startswith("eval_") and not k.endswith(_NO_RESULTS)]
    sheet = Sheet("Last evaluation", ("metric", "value"), shown, f"after step {last['step']}", texts=1)
    text = to_markdown(Report([sheet], [])).rstrip()
    if args.load_best_model_at_end and state.best_metric is not None:
        text += f"\n\nThe weights are those of step {state.best_global_step}, with the best "
        text += f"{args.metric_for_best_model}: {state.best_metric:.5g}."
    return text


def _settings(run: dict[str, Any], state: TrainerState) -> str:
    effective, rate = run["effective_lr"], run["learning_rate"]
    losses = [log["train_loss"] for log in state.log_history if "train_loss" in log]
    lines = {
        "Effective learning rate η": None if effective is None else f"{effective:g}",
        "Learning rate of the optimizer": None if rate == effective else f"{rate:g}",
        "Learning rate form": run.get("lr_form"),
        "Learning rate schedule": run["lr_schedule"],
        "Momentum schedule": run.get("momentum_schedule"),
        **{key: str(run[key]) for key in _OF_OTHERS if key in run},
        "Weight decay": f"{run['weight_decay']:g}",
        "Gradient clipping": f"at norm {run['max_grad_norm']:g}" if run["max_grad_norm"] else "none",
        "Batch size": str(run["batch_size"]),
        "Steps": str(state.global_step),
        "Mean training loss": f"{losses[-1]:.5g}" if losses else None,
        "Seed": str(run["seed"]),
        "Hardware": hardware_text(run),
        "Versions": versions_text(run),
    }
    return "\n".join(f"- {heading}: {text}" for heading, text in lines.items() if text)

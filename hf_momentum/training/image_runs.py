"""Image runs: the plan over optimizers, learning rates, batch sizes, ℓ and seeds, and the training of each run."""

import gc
import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, set_seed

from hf_momentum.errors import UserError
from hf_momentum.optim import effective_lr, get_optimizer_info
from hf_momentum.results.record import package_versions
from hf_momentum.results.tables import print_summary
from hf_momentum.tasks.metrics import compute_metrics
from hf_momentum.training.arguments import RecipeTrainingArguments
from hf_momentum.training.callbacks import EpochCallback, RunProgressCallback, run_progress
from hf_momentum.training.callbacks.lr_milestones import lr_schedule
from hf_momentum.training.environment import learning_curve
from hf_momentum.training.global_batch import split_batch
from hf_momentum.training.grid import Grid
from hf_momentum.training.image_arguments import ImageArguments
from hf_momentum.training.memory import optimizer_state_bytes, peak_memory_bytes, reset_peak_memory
from hf_momentum.training.protocol import Group, Run, plan_run
from hf_momentum.training.publish import Publisher
from hf_momentum.training.run_store import RunStore
from hf_momentum.training.trainer_kwargs import trainer_kwargs

WITH_SVAG = ("sgd", "sgdm")


def plan_image_runs(
    images: ImageArguments,
    training: RecipeTrainingArguments,
    grid: Grid,
    common: dict[str, Any],
    train_size: int,
    warmup_epochs: float = 0.0,
    whole_batches: bool = True,
) -> list[Group]:
    """Plan a run for each seed, optimizer, learning rate, batch size and ℓ; each is tested, none is picked.

    The epochs of the arguments are those of the run with the plain optimizer, and become a number of steps. Evaluation
    and logging come once an epoch. SVAG stretches all by ℓ.

    Args:
        images: The recipe's arguments.
        training: The command's arguments.
        grid: What is swept.
        common: Settings that all runs share: task, model, and identifiers of the images (`draw`, `test_data`).
        train_size: Number of training images.
        warmup_epochs: Of a linear warm-up.
        whole_batches: Whether an epoch leaves out what does not fill a batch, or ends with a smaller one.

    Returns:
        A group of one run each, seeds outermost.

    Raises:
        UserError: If SVAG is asked for with another optimizer than `sgd` and `sgdm`, a batch cannot be split or has
            more images than there are, or one process has several GPUs.
    """
    if training.n_gpu > 1:
        raise UserError(
            f"The Trainer would give each of this process's {training.n_gpu} GPUs a batch of its own. Start one "
            "process per GPU with accelerate launch, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
        )
    stranger = next((name for name in training.optim if name not in WITH_SVAG and max(images.ells) > 1), None)
    if stranger is not None:
        raise UserError(f"--ells beside --optim {stranger}: SVAG has sgd and sgdm. Choose among these.")
    cells = itertools.product(images.seeds, training.optim, images.global_batch_size, images.ells)
    groups = []
    for seed, optim, batch_size, ell in cells:
        steps = _steps(images, training, batch_size, train_size, warmup_epochs, whole_batches)
        for rate in grid.rates(optim, training.learning_rate):
            changes = {"learning_rate": rate, "seed": seed, **steps}
            groups.append(Group((_plan_cell(training, optim, ell, changes, common | {"seed": seed}),)))
    return groups


def _steps(
    images: ImageArguments,
    training: RecipeTrainingArguments,
    batch_size: int,
    train_size: int,
    warmup_epochs: float,
    whole_batches: bool,
) -> dict[str, Any]:
    if batch_size > train_size:
        raise UserError(f"--global_batch_size {batch_size} is more than the {train_size} training images.")
    if max(images.ells) > 1 and 2 * batch_size > train_size:
        raise UserError(
            f"--global_batch_size {batch_size}: SVAG takes two batches a step, {2 * batch_size} images, and there are "
            f"{train_size} to train on. Choose a smaller batch."
        )
    split = split_batch(batch_size, training.world_size, images.micro_batch)
    epoch = train_size // batch_size if whole_batches else math.ceil(train_size / batch_size)
    steps = training.max_steps if training.max_steps > 0 else max(1, round(training.num_train_epochs * epoch))
    warmup = round(warmup_epochs * epoch) or training.warmup_steps
    if warmup >= steps:
        raise UserError(f"The warm-up of {warmup:g} steps takes the whole training of {steps}. Shorten it.")
    return {
        "per_device_train_batch_size": split.per_device,
        "gradient_accumulation_steps": split.accumulation,
        "max_steps": steps,
        "warmup_steps": warmup,
        **{f"{kind}_steps": min(epoch, steps) for kind in ("eval", "logging")},
    }


def _plan_cell(
    training: RecipeTrainingArguments, optim: str, ell: float, changes: dict[str, Any], shared: dict[str, Any]
) -> Run:
    momentum = training.momentum if training.momentum is not None else get_optimizer_info("sgdm").defaults["momentum"]
    if optim == "sgd":
        rate = changes["learning_rate"]
        if training.lr_form == "heavy_ball" and rate is not None:  # also where SGDM is another command's
            changes |= {"learning_rate": effective_lr(rate, momentum), "lr_form": None}
        momentum = 0.0
    if ell == 1:
        return plan_run(training, optim, changes, shared)
    return plan_run(training, "svag", changes | {"ell": ell, "momentum": momentum}, shared)


@dataclass
class ImageRuns:
    """All runs of one image recipe's command.

    Attributes:
        train_set: From a run to its training images, in batches `{"pixel_values", "labels"}`.
        test_set: The images to evaluate on.
        collate: The Trainer's data collator.
        make_model: Makes a model, initialised by the seed that is set before.
        store: Finished runs.
        publisher: Keeps what may be pushed.
        about: What every record says besides: the data's source, the hardware, the command.
    """

    train_set: Callable[[Run], Dataset]
    test_set: Dataset
    collate: Callable
    make_model: Callable[[], nn.Module]
    store: RunStore
    publisher: Publisher
    about: dict[str, Any]

    def run(self, groups: Sequence[Group], output_dir: str, model_card: bool, console: Console) -> None:
        """Train what is not finished, and show the results.

        Args:
            groups: Of one run each.
            output_dir: The command's output folder, whose name the card has.
            model_card: Whether to write the card.
            console: Where to print; a quiet one in all processes but the first.
        """
        self.publisher.groups = list(groups)
        with run_progress(console, disable=console.quiet) as progress:
            overall = progress.add_task("runs", total=len(groups))
            for group in groups:
                if self.store.find(run_id=group.runs[0].run_id) is None:
                    self.train(group.runs[0], progress)
                progress.advance(overall)
        print_summary(self.store.records, self.store.problems, console)
        console.print(f"Results: {self.store.file}", highlight=False)
        if model_card:
            name = Path(output_dir).absolute().name
            said = self.publisher.publish(name, self.build_trainer, None)
            console.print(said, highlight=False, markup=False, soft_wrap=True)

    def build_trainer(self, run: Run, progress: Progress) -> Trainer:
        """A stock Trainer with our optimizer splatted in.

        Args:
            run: The run.
            progress: The display that shows its steps.

        Returns:
            The Trainer.
        """
        run.arguments.output_dir = str(self.checkpoints(run))
        set_seed(run.arguments.seed)
        model = self.make_model()
        callbacks = [EpochCallback(), RunProgressCallback(progress, f"  {label(run)}")]
        trainer = Trainer(
            model=model,
            args=run.arguments,
            train_dataset=self.train_set(run),
            eval_dataset=self.test_set,
            data_collator=self.collate,
            compute_metrics=compute_metrics,
            **trainer_kwargs(model, run.arguments, callbacks=callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def checkpoints(self, run: Run) -> Path:
        """Where a run's checkpoints are while it is trained.

        Args:
            run: The run.

        Returns:
            The folder.
        """
        return self.store.folder / "checkpoints" / run.run_id

    def train(self, run: Run, progress: Progress) -> None:
        """Train a run, from its last checkpoint if it was interrupted, and record it.

        Args:
            run: The run.
            progress: The display.
        """
        reset_peak_memory(run.arguments.device)
        trainer, folder = self.build_trainer(run, progress), self.checkpoints(run)
        result = trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        last = trainer.state.log_history[-2] if len(trainer.state.log_history) > 1 else {}
        if last.get("step") != result.global_step or "eval_accuracy" not in last:
            last = trainer.evaluate()
        history = trainer.state.log_history
        loss = next((log["loss"] for log in reversed(history) if "loss" in log), result.training_loss)
        record = (
            self.record(run)
            | {"train_seconds": result.metrics["train_runtime"], "eval_seconds": last["eval_runtime"]}
            | {
                "steps": result.global_step,
                "train_loss": loss if math.isfinite(loss) else None,
                "test_accuracy": last["eval_accuracy"],
                "test_loss": last["eval_loss"] if math.isfinite(last["eval_loss"]) else None,
                "curve": learning_curve(history, "test"),
                "peak_memory_bytes": peak_memory_bytes(run.arguments.device),
                "optimizer_state_bytes": optimizer_state_bytes(trainer.optimizer),
            }
        )
        self.store.append(record)
        self.publisher.keep(run, trainer)
        self.clean_up(run)
        progress.console.print(line(record), highlight=False)

    def record(self, run: Run) -> dict[str, Any]:
        """The fields that a run has before it is trained.

        Args:
            run: The run.

        Returns:
            Field → value.
        """
        group = Group((run,))
        return {
            "stage": "test",
            "run_id": run.run_id,
            "group_id": group.group_id,
            "group": group.row_id,
            "grid_size": 1,
            **run.settings,
            "dev_accuracy": None,
            "max_grad_norm": run.arguments.max_grad_norm,
            "lr_schedule": lr_schedule(run.arguments),
            "weight_decay": run.arguments.weight_decay,
            "processes": run.arguments.world_size,
            "pipeline_tag": "image-classification",
            "packages": package_versions(("hf_momentum", "torch", "transformers", "accelerate", "timm")),
            **self.about,
        }

    def clean_up(self, run: Run) -> None:
        """Free what the run held, in memory and on disk.

        Args:
            run: The run.
        """
        gc.collect()
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            shutil.rmtree(self.checkpoints(run), ignore_errors=True)


def last_checkpoint(folder: Path) -> str | None:
    """Find a run's last whole checkpoint; one whose writing was interrupted is passed over.

    Args:
        folder: Of the run's checkpoints; it need not exist.

    Returns:
        The checkpoint's folder, None if there is none.
    """
    whole = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]  # which is written last
    return str(max(whole, key=lambda checkpoint: int(checkpoint.name.partition("-")[2]))) if whole else None


def label(run: Run) -> str:
    """Name a run in a few words.

    Args:
        run: The run.

    Returns:
        Such as `sgdm lr 1 batch 512 ℓ=4 seed 0`.
    """
    settings = run.settings
    name = settings["optim"]
    if name == "svag":
        name = f"{'sgdm' if settings['momentum'] else 'sgd'} ℓ={settings['ell']:g}"
    return f"{name} lr {settings['learning_rate']:g} batch {settings['batch_size']} seed {settings['seed']}"


def line(record: dict[str, Any]) -> str:
    """Say in one line how a run ended.

    Args:
        record: Its record.

    Returns:
        The line.
    """
    diverged = "" if record["train_loss"] is not None else " (diverged)"
    loss = "" if record["train_loss"] is None else f"train loss {record['train_loss']:.3f}, "
    named = Run(None, record)
    return f"{label(named)}: {loss}test {100 * record['test_accuracy']:.1f}{diverged}, {record['train_seconds']:.0f} s"

"""Records what a stock Trainer applies under SVAG, and computes by hand what it should.

Run with torchrun, it checks DDP in one launch: the first process saves the largest difference of every case.
"""

import sys

import svag_loop
import torch
from tiny_models import TokenRows, tiny_classifier
from torch import nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_momentum.command import leave_process_group
from hf_momentum.optim import svag_coefficients
from hf_momentum.training import OptimizerFactory, normalise_loss_per_micro_batch
from hf_momentum.training.accelerate import SVAG
from hf_momentum.training.callbacks.svag import SVAGCallback


class Recorder(TrainerCallback):
    """Keeps the weights before every step, the gradient that is applied, and the logged losses."""

    def __init__(self):
        self.weights, self.gradients, self.losses = [], [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(flat_gradient(model))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def flat_gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.detach().flatten().clone() for p in model.parameters() if p.grad is not None])


def arguments(output_dir, **changes) -> TrainingArguments:
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(output_dir), **defaults | changes)


def train(model, args, ell, rows, callbacks=(), lr=0.5, resume=None, trainer_class=Trainer, **kwargs) -> Recorder:
    """Train by a stock Trainer with SVAG, or with plain SGD if ell is None."""
    normalise_loss_per_micro_batch(model)
    recorder = Recorder()
    svag = [] if ell is None else [SVAGCallback(ell)]
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=rows,
        optimizer_cls_and_kwargs=(OptimizerFactory, {"optim": "sgd", "lr": lr / (ell or 1)}),
        callbacks=[*svag, recorder, *callbacks],
        **kwargs,
    )
    trainer.train(resume_from_checkpoint=resume)
    return recorder


def step_batches(rows, args, steps: int) -> list[list[dict]]:
    """The micro-batches of every step under sequential sampling, those of all processes together."""
    size = args.per_device_train_batch_size * args.world_size
    epoch = [stack(rows, range(i, min(i + size, len(rows)))) for i in range(0, len(rows), size)]
    count = args.gradient_accumulation_steps
    groups = [epoch[i : i + count] for i in range(0, len(epoch), count)]
    return [groups[step % len(groups)] for step in range(steps)]


def stack(rows, indices) -> dict:
    chosen = [rows[i] for i in indices]
    return {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}


def mean_gradient(model: nn.Module, batches: list[dict]) -> tuple[torch.Tensor, float]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch).loss / len(batches)
        loss.backward()
        total += loss.item()
    return flat_gradient(model), total


def expected_step(model: nn.Module, weights: dict, batches: list[dict], ell: float) -> tuple[torch.Tensor, float]:
    """`r₁ ḡ₁ + r₂ ḡ₂` and the mean loss, from the gradients of each half at the given weights."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    model.train()
    first = -(-len(batches) // 2)
    g1, loss1 = mean_gradient(model, batches[:first])
    if len(batches) == 1:
        return g1, loss1
    g2, loss2 = mean_gradient(model, batches[first:])
    r1, r2 = svag_coefficients(ell)
    return r1 * g1 + r2 * g2, (first * loss1 + (len(batches) - first) * loss2) / len(batches)


def largest_errors(recorder: Recorder, mirror: nn.Module, args, rows, ell: float) -> tuple[float, float]:
    """Largest relative difference of an applied gradient, and largest difference of a logged loss."""
    gradient_error = loss_error = 0.0
    groups = step_batches(rows, args, len(recorder.gradients))
    for weights, gradient, batches, loss in zip(
        recorder.weights, recorder.gradients, groups, recorder.losses, strict=True
    ):
        expected, mean_loss = expected_step(mirror, weights, batches, ell)
        gradient_error = max(gradient_error, ((gradient - expected).norm() / expected.norm()).item())
        loss_error = max(loss_error, abs(loss - mean_loss))
    return gradient_error, loss_error


def double_classifier() -> nn.Module:
    return tiny_classifier().double()


def run_case(
    output_dir, ell: float, rows: int, accumulation: int, build=double_classifier, **changes
) -> tuple[float, float]:
    """Train a model, such as the tiny classifier in double precision, and compare every step with the definition."""
    data, args = TokenRows(rows), arguments(output_dir, gradient_accumulation_steps=accumulation, **changes)
    recorder = train(build(), args, ell, data)
    return largest_errors(recorder, build(), args, data, ell)


def accelerate_error(ell: float) -> float:
    """Largest error of an Accelerate loop over steps of 2 · 2 micro-batches of two rows from each of two processes."""
    loop, x = svag_loop.accelerator(4), svag_loop.rows(32)
    gradients = svag_loop.applied_gradients(loop, SVAG(ell, loop), *svag_loop.prepared(loop, TensorDataset(x)))
    halves, (r1, r2) = x.reshape(2, 2, 8, 3).mean(dim=2), svag_coefficients(ell)
    return (torch.stack(gradients) - r1 * halves[:, 0] - r2 * halves[:, 1]).abs().max().item()


DDP_CASES = [(4.0, 16, 2), (2.5, 32, 4), (4.0, 28, 4)]  # ℓ, rows, accumulation; 28 rows end in 3 of 4


if __name__ == "__main__":
    errors = [run_case(sys.argv[1], ell, rows, accumulation, max_steps=4) for ell, rows, accumulation in DDP_CASES]
    in_a_loop = accelerate_error(4.0)
    world_size = torch.distributed.get_world_size()
    if torch.distributed.get_rank() == 0:
        saved = {"world_size": world_size, "errors": errors, "accelerate_error": in_a_loop}
        torch.save(saved, f"{sys.argv[1]}/errors.pt")
    leave_process_group()

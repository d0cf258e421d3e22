from types import SimpleNamespace

import pytest
import torch
from stock_trainer import HALF, Watch, arguments, stock_trainer, weights
from tiny_models import TokenRows, tiny_classifier
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerState

from hf_momentum import SGDM
from hf_momentum.errors import UserError
from hf_momentum.optim import CosineMomentum, LinearMomentum, ScalingMomentum, StepMomentum
from hf_momentum.optim.sgdm import reference_sgdm_step
from hf_momentum.training.callbacks.momentum_schedule import MomentumScheduleCallback, get_schedule, steps_done
from hf_momentum.training.optimizers import innermost_optimizer

STEPS, RATE, DECAY = 6, 0.5, 0.01
SCHEDULES = {
    "linear from 0": LinearMomentum(start=0.0, end=0.9),
    "step through 0": StepMomentum(values=[0.8, 0.0, 0.9], milestones=[0.3, 0.6]),
    "cosine": CosineMomentum(start=0.5, end=0.95, over=0.5),
    "scaling": ScalingMomentum(scale=0.6, alpha=0.5),
}


def half(step, total_steps, lr):
    return 0.5


def rates() -> list[float]:
    return [RATE * (1 - step / STEPS) for step in range(STEPS)]  # the Trainer's linear decay


def reference_weights(schedule, decayed: set[str]) -> torch.Tensor:
    """Eq. 3 by hand, with β_k = schedule(k, steps, η_k)."""
    model, rows = tiny_classifier().double(), TokenRows()
    averages = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step, lr in enumerate(rates()):
        batch = [rows[(8 * step + i) % len(rows)] for i in range(8)]
        model.zero_grad()
        model(**{key: torch.stack([row[key] for row in batch]) for key in batch[0]}).loss.backward()
        beta = schedule(step, STEPS, lr)
        with torch.no_grad():
            for name, p in model.named_parameters():
                decay = DECAY if name in decayed else 0.0
                x, averages[name] = reference_sgdm_step(p, averages[name], p.grad, lr, beta, decay)
                p.copy_(x)
    return weights(model)


def scheduled(folder, schedule, changes=None, **given) -> Trainer:
    given = {"momentum_schedule": schedule, "lr": RATE, "weight_decay": DECAY} | given
    return stock_trainer(folder, changes, **given)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_stock_trainer_follows_eq_3_through_the_schedule_and_a_resume(tmp_path, name):
    schedule, watch = SCHEDULES[name], Watch()
    trainer = scheduled(tmp_path, schedule, HALF, callbacks=[watch])
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    trainer.train()
    betas = [schedule(step, STEPS, rate) for step, rate in enumerate(rates())]
    assert watch.momenta == pytest.approx(betas, abs=1e-15)
    expected = reference_weights(schedule, decayed)
    torch.testing.assert_close(weights(trainer.model), expected, atol=1e-12, rtol=0)
    again = Watch()
    resumed = scheduled(tmp_path, schedule, callbacks=[again])
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert again.momenta == watch.momenta[3:]
    torch.testing.assert_close(weights(resumed.model), expected, atol=1e-12, rtol=0)


def test_accumulation_counts_steps_and_not_micro_batches(tmp_path):
    watch = Watch()
    changes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    scheduled(
        tmp_path, "linear", changes, momentum_schedule_kwargs={"start": 0.0, "end": 0.6}, callbacks=[watch]
    ).train()
    assert watch.momenta == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_a_schedule_at_zero_keeps_its_buffer_from_the_first_step(tmp_path):
    trainer = scheduled(tmp_path, "linear", {"max_steps": 1}, momentum_schedule_kwargs={"start": 0.0, "end": 0.9})
    trainer.train()
    inner = innermost_optimizer(trainer.optimizer)
    assert [group["keep_buffer"] for group in inner.param_groups] == [True, True]
    assert all("momentum_buffer" in entry for entry in inner.state.values())


def test_another_schedule_after_a_resume_raises(tmp_path):
    scheduled(tmp_path, LinearMomentum(0.1, 0.9), HALF).train()
    with pytest.raises(UserError, match=r"momentum_schedule: asked for LinearMomentum\(start=0.2.*start=0.1"):
        scheduled(tmp_path, LinearMomentum(0.2, 0.9)).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")


class Overflow(TrainerCallback):
    """Lets the gradients of one step overflow, as fp16 does."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            next(model.parameters()).grad.fill_(torch.inf)


def test_a_step_that_the_scaler_skips_advances_neither_schedule(tmp_path):
    watch = Watch()
    kwargs = {"momentum_schedule_kwargs": {"start": 0.0, "end": 0.6}, "callbacks": [Overflow(2), watch]}
    trainer = scheduled(tmp_path, "linear", model=tiny_classifier(), **kwargs)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # accelerate makes one for fp16, on a GPU alone
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**15  # it has skipped one step and halved its scale
    assert trainer.state.global_step == 6
    assert watch.rates == pytest.approx([RATE * (1 - step / STEPS) for step in (0, 1, 2, 2, 3, 4)])
    assert watch.momenta == pytest.approx([0.0, 0.1, 0.2, 0.2, 0.3, 0.4])


def test_steps_done_falls_back_on_the_global_step():
    state = TrainerState(global_step=5)
    scheduler = LambdaLR(SGDM([torch.zeros(1, requires_grad=True)], 0.1), lambda step: 1.0)
    assert steps_done(state, scheduler) == 0
    assert steps_done(state, SimpleNamespace(scheduler=scheduler)) == 0  # in a wrapper of accelerate's
    assert steps_done(state, SimpleNamespace(last_epoch=2)) == 5  # ReduceLROnPlateau counts something else
    assert steps_done(state, None) == 5


def test_names_and_objects():
    assert get_schedule("linear", {"start": 0.1, "end": 0.2}) == LinearMomentum(0.1, 0.2)
    assert get_schedule(half) is half
    assert MomentumScheduleCallback("constant", momentum=0.3).schedule(0, 1, 0.1) == 0.3
    for bad, kwargs, message in [
        ("cosin", {}, "Unknown momentum schedule 'cosin'. Did you mean 'cosine'"),
        (half, {"end": 0.2}, "belong to a schedule's name"),
        (0.9, {}, "Invalid momentum_schedule: 0.9"),
    ]:
        with pytest.raises(UserError, match=message):
            get_schedule(bad, kwargs)


def test_a_function_of_your_own_is_known_by_its_name(tmp_path):
    trainer = scheduled(tmp_path, half, {"max_steps": 1})
    trainer.train()
    group = innermost_optimizer(trainer.optimizer).param_groups[0]
    assert (group["momentum"], group["momentum_schedule"]) == (0.5, "test_momentum_schedule.half")


def with_callback(folder, optimizer, model, *callbacks) -> Trainer:
    args, rows = arguments(folder), TokenRows()
    return Trainer(model=model, args=args, train_dataset=rows, optimizers=(optimizer, None), callbacks=list(callbacks))


def test_only_sgdm_can_be_driven(tmp_path):
    model = tiny_classifier()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with pytest.raises(UserError, match="needs SGDM, and this is SGD"):
        with_callback(tmp_path, optimizer, model, MomentumScheduleCallback(half))


def test_two_schedules_on_one_optimizer_raise(tmp_path):
    trainer = scheduled(tmp_path, half)
    trainer.add_callback(MomentumScheduleCallback("constant"))
    with pytest.raises(UserError, match=r"schedule is test_momentum_schedule.half, the callback's ConstantMomentum"):
        trainer.train()

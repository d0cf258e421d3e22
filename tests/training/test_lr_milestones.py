import pytest
import torch
from stock_trainer import HALF, Watch, arguments, stock_trainer, weights
from tiny_models import TokenRows, tiny_classifier
from transformers import Trainer

from hf_momentum import MomentumTrainingArguments, trainer_kwargs
from hf_momentum.errors import UserError
from hf_momentum.training.callbacks import LRMilestonesCallback, MomentumScheduleCallback
from hf_momentum.training.callbacks.lr_milestones import lr_schedule, step_decay
from hf_momentum.training.svag_arguments import svag_arguments

CONSTANT = {"lr_scheduler_type": "constant"}


def decayed(folder, changes=None, milestones=(1 / 3, 2 / 3), callbacks=(), **given) -> Trainer:
    return stock_trainer(
        folder, CONSTANT | (changes or {}), callbacks=[LRMilestonesCallback(milestones, 0.1), *callbacks], **given
    )


def test_the_factor_changes_at_the_milestones_and_not_a_step_sooner():
    per_epoch = 98  # CIFAR-10 at batch 512
    epochs = [step_decay(epoch * per_epoch, 160 * per_epoch, [0.5, 0.75], 0.1) for epoch in range(160)]
    assert epochs == pytest.approx([1.0] * 80 + [0.1] * 40 + [0.01] * 40)
    assert step_decay(80 * per_epoch - 1, 160 * per_epoch, [0.5, 0.75], 0.1) == 1.0
    thirds = [step_decay(step, 90, [30 / 90, 60 / 90, 80 / 90], 0.1) for step in (29, 30, 59, 60, 79, 80)]
    assert thirds == pytest.approx([1, 0.1, 0.1, 0.01, 0.01, 0.001])


def test_the_trainer_trains_and_logs_with_it_and_resumes_into_it(tmp_path):
    watch, again = Watch(), Watch()
    trainer = decayed(tmp_path, HALF | {"logging_steps": 1}, callbacks=[watch])
    trainer.train()
    assert watch.rates == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])
    logged = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert logged == pytest.approx(watch.rates)
    resumed = decayed(tmp_path, callbacks=[again])
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert again.rates == pytest.approx(watch.rates[3:])
    torch.testing.assert_close(weights(resumed.model), weights(trainer.model), atol=1e-12, rtol=0)


def test_warm_up_stays_the_trainers(tmp_path):
    watch = Watch()
    decayed(
        tmp_path, {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, (0.5,), callbacks=[watch]
    ).train()
    assert watch.rates == pytest.approx([0.0, 0.25, 0.5, 0.05, 0.05, 0.05])


def test_a_momentum_schedule_sees_the_decayed_rate(tmp_path):
    watch, schedule = Watch(), MomentumScheduleCallback(lambda step, total, lr: 1 - lr)
    decayed(tmp_path, callbacks=[schedule, watch]).train()
    assert watch.momenta == pytest.approx([0.5, 0.5, 0.95, 0.95, 0.995, 0.995])


@pytest.mark.parametrize("optim", ["svag", "adamw_torch"])
def test_arguments_bring_it_to_every_optimizer(tmp_path, optim):
    watch = Watch()
    own = {"optim": optim, "learning_rate": 0.4, "lr_milestones": [0.5], "lr_decay": 0.25}
    args = arguments(tmp_path, MomentumTrainingArguments, **CONSTANT, **own, **({"ell": 2} if optim == "svag" else {}))
    if optim == "svag":
        args = svag_arguments(args, 2)
    model = tiny_classifier()

    class Rates(Watch):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            self.rates.append(optimizer.param_groups[0]["lr"])

    watch = Rates()
    Trainer(
        model=model, args=args, train_dataset=TokenRows(), **trainer_kwargs(model, args, callbacks=[watch])
    ).train()
    steps, rate = (12, 0.2) if optim == "svag" else (6, 0.4)
    assert watch.rates == pytest.approx([rate] * (steps // 2) + [rate / 4] * (steps // 2))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lr_milestones": [0.75, 0.5]}, "rising fractions"),
        ({"lr_milestones": [80.0]}, "rising fractions"),
        ({"lr_milestones": [0.5], "lr_decay": 1.5}, "lr_decay must lie between 0 and 1"),
        ({"lr_milestones": [0.5], "lr_scheduler_type": "linear"}, "both move the learning rate"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        arguments(tmp_path, MomentumTrainingArguments, **CONSTANT | {"learning_rate": 0.1} | settings)


def test_a_scheduler_without_functions_is_refused(tmp_path):
    model = tiny_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, **CONSTANT),
        train_dataset=TokenRows(),
        optimizers=(optimizer, scheduler),
        callbacks=[LRMilestonesCallback([0.5])],
    )
    with pytest.raises(UserError, match="cannot drive a StepLR"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "linear"),
        ({"warmup_steps": 0.5}, "linear warmup 0.5"),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 6}, "constant warmup 6"),
        ({"lr_scheduler_type": "constant", "lr_milestones": [0.5, 0.75]}, "constant ×0.1 at 0.5, 0.75"),
    ],
)
def test_the_learning_rates_schedule_in_words(tmp_path, changes, words):
    assert lr_schedule(arguments(tmp_path, MomentumTrainingArguments, learning_rate=0.1, **changes)) == words

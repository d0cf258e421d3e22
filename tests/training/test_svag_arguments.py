"""Training arguments stretched for SVAG."""

import math

import pytest
from svag_steps import arguments
from tiny_models import TokenRows, tiny_classifier
from transformers import Trainer, TrainingArguments

from hf_momentum import MomentumTrainingArguments
from hf_momentum.errors import UserError
from hf_momentum.training.svag_arguments import svag_arguments


def test_steps_are_multiplied_and_the_learning_rate_is_not(tmp_path):
    args = arguments(
        tmp_path,
        max_steps=100,
        gradient_accumulation_steps=3,
        num_train_epochs=5,
        warmup_steps=6,
        eval_strategy="steps",
        eval_steps=10,
        eval_delay=4,
        save_strategy="steps",
        save_steps=20,
        logging_steps=50,
        learning_rate=0.1,
        seed=7,
    )
    stretched = svag_arguments(args, 2.5)
    changed = {
        "max_steps": 250,
        "gradient_accumulation_steps": 6,
        "num_train_epochs": 25,
        "warmup_steps": 15,
        "eval_steps": 25,
        "eval_delay": 10,
        "save_steps": 50,
        "logging_steps": 125,
    }
    before, after = args.to_dict(), stretched.to_dict()
    assert {key: value for key, value in after.items() if before[key] != value} == changed
    assert type(stretched) is TrainingArguments
    assert stretched.svag_ell == 2.5
    assert (args.max_steps, args.gradient_accumulation_steps) == (100, 3)


def test_ratios_and_what_is_not_in_use_stay(tmp_path):
    args = arguments(
        tmp_path, max_steps=-1, warmup_steps=0.1, eval_strategy="epoch", eval_delay=3, logging_steps=0.05, save_steps=7
    )
    stretched = svag_arguments(args, 2.5)
    assert (stretched.max_steps, stretched.warmup_steps, stretched.logging_steps) == (-1, 0.1, 0.05)
    assert stretched.save_steps == 7  # save_strategy is "no"
    assert stretched.eval_delay == 15  # epochs
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=3, logging_steps=10)
    assert svag_arguments(args, 1.1).num_train_epochs == 6.6


def test_settings_of_schedules_follow(tmp_path):
    settings = {"num_decay_steps": 30, "num_stable_steps": 60, "min_lr_ratio": 0.1}
    args = arguments(tmp_path, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=settings)
    stretched = svag_arguments(args, 4).lr_scheduler_kwargs
    assert stretched == {"num_decay_steps": 120, "num_stable_steps": 240, "min_lr_ratio": 0.1}
    args = arguments(tmp_path, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 0.02})
    assert svag_arguments(args, 4).lr_scheduler_kwargs == {"min_lr": 0.005}


@pytest.mark.parametrize("name", ["max_steps", "warmup_steps", "eval_steps", "save_steps", "logging_steps"])
def test_a_product_that_is_no_integer_is_named(tmp_path, name):
    even = dict.fromkeys(["max_steps", "warmup_steps", "eval_steps", "save_steps", "logging_steps"], 10)
    args = arguments(tmp_path, eval_strategy="steps", save_strategy="steps", **even | {name: 7})
    with pytest.raises(UserError, match=rf"ell=2\.5 stretches {name}=7 to 17\.5, which is no integer"):
        svag_arguments(args, 2.5)


def test_ell_is_checked(tmp_path):
    with pytest.raises(UserError, match=r"Invalid ell: 0\.9"):
        svag_arguments(arguments(tmp_path), 0.9)
    with pytest.raises(UserError, match="stretched for ell=2 already"):
        svag_arguments(svag_arguments(arguments(tmp_path), 2), 2)
    args = arguments(tmp_path)
    args.ell = 3.0
    with pytest.raises(UserError, match=r"ell=4 contradicts the arguments' ell=3\.0"):
        svag_arguments(args, 4)


def test_a_subclass_stays_itself(tmp_path):
    args = MomentumTrainingArguments(str(tmp_path), optim="sgdm", learning_rate=0.3, momentum=0.8, use_cpu=True)
    stretched = svag_arguments(args, 2)
    assert type(stretched) is MomentumTrainingArguments
    assert (stretched.optim, stretched.learning_rate, stretched.momentum) == ("sgdm", 0.3, 0.8)


def planned_steps(args) -> int:
    trainer = Trainer(model=tiny_classifier(), args=args, train_dataset=TokenRows(args.rows))
    return trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]


@pytest.mark.parametrize("ell", [1, 2, 1.1])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("batches", [8, 7, 5, 3])
def test_epochs_give_ell_times_the_steps_if_an_epoch_has_an_even_number(tmp_path, batches, n, ell):
    epochs = 10
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=epochs, gradient_accumulation_steps=n, logging_steps=10)
    stretched = svag_arguments(args, ell)
    args.rows = stretched.rows = 2 * batches
    per_epoch = math.ceil(batches / n)
    too_many = ell * epochs * (per_epoch % 2)
    assert planned_steps(args) == epochs * per_epoch
    assert planned_steps(stretched) == pytest.approx(ell * epochs * per_epoch + too_many, rel=1e-12)

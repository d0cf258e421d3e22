import pytest
import torch
from tiny_models import TokenRows, tiny_classifier
from transformers import Trainer, TrainingArguments

from hf_momentum import SGDM, MomentumTrainingArguments, trainer_kwargs
from hf_momentum.errors import UserError
from hf_momentum.optim.sgdm import reference_sgdm_step


def arguments(tmp_path, **changes) -> TrainingArguments:
    plain = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "max_grad_norm": 0.0}
    cls = MomentumTrainingArguments if "optim" in changes else TrainingArguments
    return cls(**plain | {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 8} | changes)


def built(tmp_path, args=None, **given):
    model = tiny_classifier()
    args = args or arguments(tmp_path)
    return Trainer(
        model=model, args=args, train_dataset=TokenRows(), **trainer_kwargs(model, args, **given)
    ).create_optimizer()


def test_explicit_settings_reach_the_optimizer(tmp_path):
    optimizer = built(tmp_path, optim="sgdm", lr=0.1, momentum=0.8, weight_decay=0.01)
    assert type(optimizer) is SGDM
    decay, no_decay = optimizer.param_groups
    assert (decay["lr"], decay["momentum"], decay["weight_decay"]) == (0.1, 0.8, 0.01)
    assert (no_decay["lr"], no_decay["momentum"], no_decay["weight_decay"]) == (0.1, 0.8, 0.0)


def test_heavy_ball_is_converted(tmp_path):
    optimizer = built(tmp_path, optim="sgdm", lr=0.01, momentum=0.9, lr_form="heavy_ball")
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_arguments_supply_everything(tmp_path):
    args = arguments(tmp_path, optim="sgdm", learning_rate=0.2, momentum=0.7, weight_decay=0.03)
    group = built(tmp_path, args).param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.2, 0.7, 0.03)


def test_arguments_are_read_when_the_optimizer_is_built(tmp_path):
    model, args = tiny_classifier(), arguments(tmp_path, optim="sgdm", learning_rate=0.2)
    trainer = Trainer(model=model, args=args, train_dataset=TokenRows(), **trainer_kwargs(model, args))
    args.learning_rate, args.momentum = 0.3, 0.5  # as a hyperparameter search sets them
    group = trainer.create_optimizer().param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.3, 0.5)


@pytest.mark.parametrize("given", [{"lr": 0.1}, {"momentum": 0.5}, {"optim": "sgd"}, {"weight_decay": 0.2}])
def test_a_contradiction_raises(tmp_path, given):
    args = arguments(tmp_path, optim="sgdm", learning_rate=0.2, momentum=0.7, weight_decay=0.1)
    with pytest.raises(UserError, match="contradicts the training arguments'"):
        trainer_kwargs(tiny_classifier(), args, **given)


def test_the_trainers_default_rate_is_not_taken_for_sgds(tmp_path):
    with pytest.raises(UserError, match="Give a learning rate"):
        trainer_kwargs(tiny_classifier(), arguments(tmp_path), optim="sgd")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0.1}, "Name the optimizer: optim= one of sgd, sgdm, svag"),
        ({"optim": "adamw", "lr": 0.1}, "Name the optimizer"),
        ({"optim": "sgdm", "lr": -1}, "Invalid learning rate: -1"),
        ({"optim": "sgdm", "lr": 0.1, "momentum": 1}, "Invalid momentum value: 1"),
        ({"optim": "sgd", "lr": 0.1, "momentum": 0.9}, "'sgd' has no momentum"),
    ],
)
def test_bad_input_shows_before_training(given, message):
    with pytest.raises(UserError, match=message):
        trainer_kwargs(tiny_classifier(), **given)


def test_an_optimizer_of_the_trainers_own_only_gets_its_loss_mended(tmp_path):
    model = tiny_classifier()
    assert trainer_kwargs(model, arguments(tmp_path, optim="adamw_torch")) == {}
    assert model.accepts_loss_kwargs is False


@pytest.mark.parametrize(("optim", "momentum"), [("sgd", 0.0), ("sgdm", 0.9)])
def test_a_stock_trainer_follows_eq_3_step_by_step(tmp_path, optim, momentum):
    steps, rate, decay = 6, 0.5, 0.01
    model, mirror = tiny_classifier().double(), tiny_classifier().double()
    args = arguments(tmp_path, optim=optim, learning_rate=rate, weight_decay=decay, max_steps=steps, disable_tqdm=True)
    trainer = Trainer(model=model, args=args, train_dataset=TokenRows(), **trainer_kwargs(model, args))
    trainer.train()
    decayed = set(trainer.get_decay_parameter_names(mirror))
    averages = {name: torch.zeros_like(p) for name, p in mirror.named_parameters()}
    rows = TokenRows()
    for step in range(steps):
        batch = [rows[(8 * step + i) % len(rows)] for i in range(8)]
        mirror.zero_grad()
        mirror(**{key: torch.stack([row[key] for row in batch]) for key in batch[0]}).loss.backward()
        lr = rate * (1 - step / steps)  # the Trainer's linear decay
        with torch.no_grad():
            for name, p in mirror.named_parameters():
                weight_decay = decay if name in decayed else 0.0
                x, averages[name] = reference_sgdm_step(p, averages[name], p.grad, lr, momentum, weight_decay)
                p.copy_(x)
    for (name, p), q in zip(model.named_parameters(), mirror.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=0, msg=name)

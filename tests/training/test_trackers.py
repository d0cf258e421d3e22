import json
import sqlite3

import pytest
import torch
from tiny_models import TokenRows, tiny_classifier
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_momentum import SGDM, trainer_kwargs
from hf_momentum.training.callbacks import HyperparameterLogCallback, LogFirstCallbacks
from hf_momentum.training.callbacks.trackers import logged_hyperparameters


def arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "logging_steps": 1,
        "warmup_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**settings | changes)


def train(args: TrainingArguments, **kwargs) -> list[dict]:
    trainer = Trainer(args=args, train_dataset=TokenRows(), **kwargs)
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def column(logs: list[dict], name: str) -> list:
    return [log.get(name) for log in logs]


WARM_UP_AND_DECAY = (0.0, 0.5, 1.0, 0.5)  # of four steps, two of them warm-up


def test_every_log_of_a_step_holds_what_the_step_was_made_with(tmp_path):
    model = tiny_classifier()
    schedule = {"momentum_schedule": "linear", "momentum_schedule_kwargs": {"start": 0.5, "end": 0.9}}
    logs = train(arguments(tmp_path), model=model, **trainer_kwargs(model, optim="sgdm", lr=0.2, **schedule))
    assert column(logs, "effective_lr") == pytest.approx([0.2 * factor for factor in WARM_UP_AND_DECAY])
    assert column(logs, "effective_lr") == column(logs, "learning_rate")
    momentum = column(logs, "momentum")
    assert (momentum[0], len(set(momentum))) == (0.5, 4)
    assert column(logs, "ell") == [None] * 4


def test_under_svag_the_rate_is_that_of_the_steps(tmp_path):
    model = tiny_classifier()
    kwargs = trainer_kwargs(model, optim="svag", lr=0.2, ell=4, momentum=0.9)
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0, lr_scheduler_type="constant")
    logs = train(args, model=model, **kwargs)
    assert (set(column(logs, "effective_lr")), set(column(logs, "ell"))) == ({0.05}, {4.0})
    assert set(column(logs, "momentum")) == {0.9}


def test_torchs_own_sgd_is_logged_at_its_effective_rate(tmp_path):
    model = tiny_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    callbacks = LogFirstCallbacks([HyperparameterLogCallback()])
    logs = train(arguments(tmp_path), model=model, optimizers=(optimizer, None), callbacks=callbacks)
    assert column(logs, "effective_lr") == pytest.approx([0.1 * factor for factor in WARM_UP_AND_DECAY])
    assert not optimizer._optimizer_step_pre_hooks


def parameters(*groups: dict) -> list[dict]:
    return [{"params": [torch.zeros(1, requires_grad=True)], **group} for group in groups or ({},)]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (SGDM(parameters(), lr=0.1, momentum=0.8), {"momentum": 0.8, "effective_lr": 0.1}),
        (SGDM(parameters(), lr=torch.tensor(0.5), momentum=0.0), {"momentum": 0.0, "effective_lr": 0.5}),
        (torch.optim.SGD(parameters(), lr=0.1), {"momentum": 0.0, "effective_lr": 0.1}),
        (torch.optim.SGD(parameters(), lr=0.1, momentum=0.5), {"momentum": 0.5, "effective_lr": 0.2}),
        (torch.optim.SGD(parameters(), lr=0.1, momentum=0.5, nesterov=True), {"momentum": 0.5}),
        (torch.optim.SGD(parameters(), lr=0.1, momentum=0.5, dampening=0.5), {"momentum": 0.5}),
        (torch.optim.SGD(parameters({"max_momentum": 0.9}), lr=0.1, momentum=0.5), {"momentum": 0.5}),
        (torch.optim.SGD(parameters(), lr=0.1, momentum=1.0), {"momentum": 1.0}),
        (SGDM(parameters({"lr": 0.1}, {"lr": 0.2}), lr=0.1, momentum=0.9), {"momentum": 0.9}),
        (torch.optim.AdamW(parameters(), lr=0.1), {}),
        (type("MySGD", (torch.optim.SGD,), {})(parameters(), lr=0.1), {}),
    ],
)
def test_only_what_is_exactly_known_is_logged(optimizer, expected):
    assert logged_hyperparameters(optimizer) == pytest.approx(expected)


def test_tensorboard_gets_them(tmp_path, monkeypatch):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    model = tiny_classifier()
    kwargs = trainer_kwargs(model, optim="sgdm", lr=0.2)
    logs = train(arguments(tmp_path, report_to=["tensorboard"]), model=model, **kwargs)
    events = accumulators.EventAccumulator(str(tmp_path / "tb")).Reload()
    for name in ("momentum", "effective_lr", "learning_rate"):
        seen = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert seen == [(log["step"], pytest.approx(log[name])) for log in logs]


def test_trackio_gets_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio")
    model = tiny_classifier()
    kwargs = trainer_kwargs(model, optim="svag", lr=0.2, ell=2, allow_clipping=True)
    train(arguments(tmp_path, report_to=["trackio"], gradient_accumulation_steps=2), model=model, **kwargs)
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics")]
    seen = [(row["train/effective_lr"], row["train/ell"]) for row in rows if "train/loss" in row]
    assert seen == [(pytest.approx(0.1 * factor), 2.0) for factor in WARM_UP_AND_DECAY]


class Late(TrainerCallback):
    """Keeps what a tracker would see."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append("effective_lr" in logs)


def test_the_list_puts_them_before_the_trainers_own_and_keeps_all_else_in_order():
    first, mine, tracker = HyperparameterLogCallback(), TrainerCallback(), TrainerCallback()
    assert [tracker] + LogFirstCallbacks([mine, first]) == [first, tracker, mine]  # noqa: RUF005
    assert first.logs_first


def test_behind_the_trackers_it_says_so(tmp_path, caplog):
    model, tracker = tiny_classifier(), Late()
    optimizer = SGDM(model.parameters(), lr=0.1)
    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=TokenRows(), optimizers=(optimizer, None),
        callbacks=[tracker, HyperparameterLogCallback()],
    )  # fmt: skip
    trainer.args.report_to = ["tensorboard"]  # whose place Late has taken
    trainer.train()
    assert "stands behind the trackers (tensorboard)" in caplog.text
    assert tracker.seen == [False] * 5
    assert column(trainer.state.log_history[:4], "effective_lr") == column(
        trainer.state.log_history[:4], "learning_rate"
    )

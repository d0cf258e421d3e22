"""Measuring during a run: what it leaves alone, when it happens, what is logged and what is refused."""

import json
import logging
import os
import random
import sys

import numpy as np
import pytest
import torch
from backend_launch import torchrun
from stock_trainer import arguments, weights
from tiny_models import TokenRows, tiny_classifier
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerState

from hf_momentum import trainer_kwargs
from hf_momentum.command import leave_process_group
from hf_momentum.errors import UserError
from hf_momentum.optim import SGDM
from hf_momentum.training import LogFirstCallbacks, RegimeCallback
from hf_momentum.training.callbacks import regime
from hf_momentum.training.callbacks.regime import rate_and_momentum, run_setting


class NoisyRows(Dataset):
    """Rows that each access augments anew, from all three generators."""

    def __init__(self, rows: int = 24):
        self.rows = torch.randn(rows, 3, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        shift = 0.1 * torch.randn(3) + 0.1 * random.random() + 0.1 * float(np.random.standard_normal())
        return {"x": self.rows[index] + shift, "labels": self.rows[index].sum()}


class NormAndDropout(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.net(x)[:, 0], labels)}


class Trajectory(TrainerCallback):
    """Keeps weights, buffers, gradients' norm and random states after each step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        tensors = [tensor.clone() for tensor in model.state_dict().values()]
        self.steps.append([*tensors, torch.random.get_rng_state(), torch.tensor(random.random())])
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(module.training for module in model.modules())


def train(folder, callbacks=(), model=None, rows=None, changes=None, **given) -> Trainer:
    model = tiny_classifier() if model is None else model
    args = arguments(folder, **{"max_steps": 6, "per_device_train_batch_size": 4} | (changes or {}))
    random.seed(0)
    np.random.seed(0)
    kwargs = trainer_kwargs(model, callbacks=list(callbacks), **{"optim": "sgdm", "lr": 0.1} | given)
    trainer = Trainer(model=model, args=args, train_dataset=rows or TokenRows(), **kwargs)
    trainer.train()
    return trainer


@pytest.mark.parametrize("optim", ["sgd", "sgdm"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trajectory_is_bit_for_bit_the_same(tmp_path, optim, accumulation):
    changes = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.5, "train_sampling_strategy": "random"}
    found = []
    for callback in (None, RegimeCallback(every=2)):
        watch = Trajectory()
        callbacks = [watch] if callback is None else [callback, watch]
        train(tmp_path, callbacks, NormAndDropout(), NoisyRows(), changes, optim=optim)
        found.append(watch.steps)
    assert sorted(callback.reports) == [2, 4]
    for without, measured in zip(*found, strict=True):
        for a, b in zip(without, measured, strict=True):
            assert torch.equal(a, b)


def test_dropout_of_a_transformer_goes_on_as_it_would(tmp_path):
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    ends = []
    for callbacks in ([], [RegimeCallback(every=1)]):
        model = train(tmp_path, callbacks, tiny_classifier(**dropout), changes={"max_steps": 2}).model
        ends.append(weights(model))
    assert torch.equal(*ends)
    assert sorted(callbacks[0].reports) == [1]


class Tracker(TrainerCallback):
    """Sees what a tracker would."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_logs_reach_the_history_and_the_trackers(tmp_path, caplog):
    tracker, callback = Tracker(), RegimeCallback(every=3)
    model = tiny_classifier()
    kwargs = trainer_kwargs(model, optim="sgdm", lr=0.1, callbacks=[callback])
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=TokenRows(), **kwargs)
    trainer.add_callback(tracker)
    with caplog.at_level(logging.INFO, logger=regime.__name__):
        trainer.train()
    (log,) = (log for log in trainer.state.log_history if "regime/h" in log)
    report = callback.reports[3]
    assert log["step"] == 3
    assert "loss" in log
    assert log["regime/h"] == report.h.value
    assert log["regime/score"] == report.score.value
    assert log["regime/limit_fraction_high"] == report.limit_fraction.high
    assert {"regime/score_low", "regime/limit_fraction", "regime/h_low", "regime/seconds"} <= log.keys()
    assert log["regime/verdict"] == report.verdict
    assert all(isinstance(value, (int, float)) for seen in tracker.seen for value in seen.values())
    assert [seen["regime/h"] for seen in tracker.seen if "regime/h" in seen] == [report.h.value]
    assert f"After step 3: {report.sentences[0]}" in caplog.text
    json.dumps(trainer.state.log_history, allow_nan=False)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, -1.0]))

    def forward(self, x, labels):
        return {"loss": 0.5 * (x @ self.weight - labels).square().mean()}


class Points(Dataset):
    def __init__(self, rows: int = 24):
        self.x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict:
        return {"x": self.x[index], "labels": torch.tensor(0.1)}


def measured_on_a_line(folder, **given):
    """At learning rate ~0, so that the weights stay."""
    callback = RegimeCallback(every=1, **given)
    train(folder, [callback], Line(), Points(), {"max_steps": 2}, lr=1e-12)
    return callback.measured


def test_what_is_measured_is_the_loss_of_the_datasets_examples(tmp_path):
    found, model = measured_on_a_line(tmp_path, budget="full"), Line()
    x, labels = Points().x, torch.full((24,), 0.1)
    residuals = (x @ model.weight).detach() - labels
    gradients = residuals[:, None] * x
    hessian = x.T @ x / 24
    noise = torch.cov(gradients.T, correction=0)
    assert found.loss == pytest.approx(float(0.5 * residuals.square().mean()), rel=0.3)
    truths = {
        "squared_gradient": gradients.mean(0).square().sum(),
        "noise_trace": noise.trace(),
        "hessian_noise": (hessian @ noise).trace(),
        "hessian_gradient": gradients.mean(0) @ hessian @ gradients.mean(0),
    }
    for name, truth in truths.items():
        interval = getattr(found, name)
        assert interval.low < truth < interval.high, name
        assert interval.value == pytest.approx(float(truth), rel=0.5), name


def test_given_batches_and_a_given_dataset(tmp_path):
    points = Points()
    batches = [{"x": points.x[i : i + 3], "labels": torch.full((3,), 0.1)} for i in range(14)]
    given = ({"batches": batches}, {"dataset": Points(rows=4)}, {})
    losses = [measured_on_a_line(tmp_path, **each).loss for each in given]
    assert len(set(losses)) == 3
    model = Line()
    assert losses[0] == pytest.approx(sum(model(**batch)["loss"].item() for batch in batches[2:]) / 12)


def test_a_loss_of_ones_own(tmp_path):
    def twice(model, batch):
        return 2 * model(**batch)["loss"]

    plain, doubled = measured_on_a_line(tmp_path), measured_on_a_line(tmp_path, loss=twice)
    assert doubled.loss == pytest.approx(2 * plain.loss)


# Time


class FakeClock:
    """A second for each step, and so many for each measurement."""

    def __init__(self, monkeypatch, seconds: float):
        self.now = 0.0
        monkeypatch.setattr(regime.time, "perf_counter", lambda: self.now)

        def measure(callback, args, state, **kwargs):
            self.now += seconds
            callback.reports[state.global_step] = None

        monkeypatch.setattr(RegimeCallback, "_measure", measure)


def occasions(folder, clock: FakeClock, steps: int, **given) -> list[int]:
    """The steps after which is measured, in a run driven by hand."""
    args, state = arguments(folder, max_steps=steps), TrainerState(max_steps=steps)
    model = tiny_classifier()
    callback, optimizer = RegimeCallback(**given), SGDM(model.parameters(), lr=0.1)

    class Loader:
        dataset = TokenRows()

    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer, train_dataloader=Loader())
    for step in range(1, steps + 1):
        clock.now += 1
        state.global_step = step
        callback.on_step_end(args, state, None)
    return sorted(callback.reports)


def test_measurements_take_at_most_a_twentieth_of_the_time(tmp_path, monkeypatch):
    steps, cost = 10_000, regime.get_budget("economy").gradients
    assert 20 * cost < steps
    # At 1,000 steps, 100 s pay off after 2,000 and so on, up to 500 in all.
    assert occasions(tmp_path, FakeClock(monkeypatch, 100), steps) == [1000, 2000, 4000, 6000, 8000]
    assert occasions(tmp_path, FakeClock(monkeypatch, 30), steps) == list(range(1000, 10_000, 1000))
    assert occasions(tmp_path, FakeClock(monkeypatch, 300), steps) == [1000]


def test_a_run_too_short_for_one_measurement_says_so(tmp_path, monkeypatch, caplog):
    assert occasions(tmp_path, FakeClock(monkeypatch, 1), 1000) == []
    assert caplog.text.count("No measurement: one takes about") == 1
    assert occasions(tmp_path, FakeClock(monkeypatch, 1), 1000, every=400) == [400, 800]
    assert occasions(tmp_path, FakeClock(monkeypatch, 1), 100, every=100) == []  # nothing is left to judge


# The run


def scheduled(optimizer, factor):
    scheduler = LambdaLR(optimizer, factor)
    return optimizer, scheduler


def setting_at(folder, step, optimizer, scheduler, **changes):
    args = arguments(folder, max_steps=8, **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3})
    for _ in range(step):
        optimizer.step()
        scheduler.step()
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    return run_setting(args, TrainerState(max_steps=8, global_step=step), model, optimizer, scheduler, 0.7)


def one_parameter():
    return [torch.zeros(1, requires_grad=True)]


def test_the_setting_is_the_runs(tmp_path):
    optimizer, scheduler = scheduled(SGDM(one_parameter(), lr=0.4, momentum=0.9), lambda step: 1 - step / 8)
    setting = setting_at(tmp_path, 4, optimizer, scheduler)
    assert (setting.lr, setting.momentum, setting.batch_size, setting.steps) == (pytest.approx(0.2), 0.9, 12, 4)
    assert setting.factors == pytest.approx([1, 0.75, 0.5, 0.25])
    assert setting.momentum_bytes == 6 * 4


def test_before_the_end_of_warm_up_the_peak_counts(tmp_path):
    optimizer, scheduler = scheduled(SGDM(one_parameter(), lr=0.4, momentum=0.0), lambda step: min(1, step / 6))
    setting = setting_at(tmp_path, 3, optimizer, scheduler)
    assert setting.lr == pytest.approx(0.4)
    assert setting.momentum == 0.7  # the run has none
    assert setting.factors == pytest.approx([0.5, 2 / 3, 5 / 6, 1, 1])


def test_torchs_own_sgd_is_judged_at_its_effective_rate(tmp_path):
    optimizer, scheduler = scheduled(torch.optim.SGD(one_parameter(), lr=0.01, momentum=0.9), lambda step: 1.0)
    assert setting_at(tmp_path, 2, optimizer, scheduler).lr == pytest.approx(0.1)
    optimizer = torch.optim.SGD(one_parameter(), lr=0.01, momentum=0.9)
    setting = run_setting(
        arguments(tmp_path), TrainerState(max_steps=8, global_step=2), nn.Linear(1, 1), optimizer,
        ReduceLROnPlateau(optimizer), 0.9,
    )  # fmt: skip
    assert (setting.lr, set(setting.factors)) == (pytest.approx(0.1), {1.0})


def test_a_rate_of_0_to_the_end_is_nothing_to_judge(tmp_path):
    optimizer, scheduler = scheduled(SGDM(one_parameter(), lr=0.4), lambda step: float(step < 3))
    with pytest.raises(UserError, match="stays 0 for the 5 steps that remain"):
        setting_at(tmp_path, 3, optimizer, scheduler)


# What is refused


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.AdamW(one_parameter()), "cannot judge this AdamW"),
        (torch.optim.SGD(one_parameter(), lr=0.1, momentum=0.9, nesterov=True), "cannot judge this SGD"),
        (
            SGDM([{"params": one_parameter(), "lr": 0.1}, {"params": one_parameter(), "lr": 0.2}], lr=0.1),
            "one learning rate and one momentum for all",
        ),
    ],
)
def test_optimizers_that_cannot_be_judged(optimizer, message):
    with pytest.raises(UserError, match=message):
        rate_and_momentum(optimizer)


def test_svag_is_refused_before_the_first_step(tmp_path):
    changes = {"gradient_accumulation_steps": 2}
    with pytest.raises(UserError, match="not SVAG"):
        train(tmp_path, [RegimeCallback()], changes=changes, optim="svag", ell=2)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TokenRows())


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match="Unknown budget"):
        RegimeCallback(budget="lavish")
    with pytest.raises(UserError, match="Invalid every: 0"):
        RegimeCallback(every=0)
    with pytest.raises(UserError, match="Give one of them"):
        RegimeCallback(batches=[], dataset=TokenRows())
    with pytest.raises(UserError, match=r"3 batches are too few: the budget 'economy' needs 14"):
        train(tmp_path, [RegimeCallback(batches=[{}] * 3)])
    with pytest.raises(UserError, match="Examples cannot be drawn from a Stream"):
        train(tmp_path, [RegimeCallback()], rows=Stream())
    sharded = tiny_classifier()
    next(iter(sharded.parameters())).ds_id = 0  # as DeepSpeed marks the parameters of ZeRO-3
    with pytest.raises(UserError, match=r"sharded \(DeepSpeed ZeRO-3 or FSDP\)"):
        train(tmp_path, [RegimeCallback()], sharded)


def test_a_run_that_diverges_goes_on(tmp_path, caplog):
    class Diverging(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, input_ids, labels, attention_mask):
            return {"loss": self.weight * torch.nan}

    callback = RegimeCallback(every=2)
    trainer = train(tmp_path, [callback], Diverging())
    assert trainer.state.global_step == 6
    assert "Not measured after step 2: The loss is nan" in caplog.text
    assert not callback.reports
    assert callback.problem.startswith("The loss is nan")


def test_behind_the_trackers_it_says_so(tmp_path, caplog):
    model = tiny_classifier()
    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=TokenRows(), callbacks=[RegimeCallback()],
        optimizers=(SGDM(model.parameters(), lr=0.1), None),
    )  # fmt: skip
    trainer.args.report_to = ["tensorboard"]
    trainer.train()
    assert "RegimeCallback stands behind the trackers (tensorboard)" in caplog.text
    assert [LogFirstCallbacks([RegimeCallback()])][0][0].extends_logs


# Several processes


def own_batches(rank: int) -> list[dict]:
    """Of the line; each rank has others."""
    generator = torch.Generator().manual_seed(rank)
    return [{"x": torch.randn(3, 2, generator=generator), "labels": torch.full((3,), 0.1)} for _ in range(14)]


def train_on_ranks(folder: str) -> None:
    """Train with DDP, without and with the callback, and save what each rank has; run by the test."""
    rank = int(os.environ["RANK"])
    drawn, given = RegimeCallback(every=2), RegimeCallback(every=2, batches=own_batches(rank))
    ends = [weights(train(folder, callbacks, Line(), Points()).model) for callbacks in ([], [drawn], [given])]
    found = {"ends": ends, "loss": given.measured.loss}
    found |= {
        name: [each.score.value, each.h.high] for name, each in (("drawn", drawn.report), ("given", given.report))
    }
    found["drawn loss"], found["batch"] = drawn.measured.loss, drawn.report.setting.batch_size
    torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.mark.slow
def test_two_processes_measure_together(tmp_path):
    torchrun(2, "test_regime_callback.py", tmp_path)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for name in ("drawn", "given", "loss", "drawn loss"):
        assert one[name] == two[name], name
    assert one["batch"] == 8
    for found in (one, two):
        assert torch.equal(found["ends"][0], found["ends"][1])
        assert torch.equal(found["ends"][0], found["ends"][2])


if __name__ == "__main__":
    train_on_ranks(sys.argv[1])
    leave_process_group()

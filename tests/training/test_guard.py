import json
import logging
import shutil

import pytest
import torch
from stock_trainer import HALF, Watch, arguments, saved_at_half, stock_trainer, weights
from tiny_models import TokenRows, tiny_classifier
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerState

from hf_momentum import SGDM, trainer_kwargs
from hf_momentum.errors import UserError
from hf_momentum.training.callbacks import MomentumGuard, MomentumScheduleCallback
from hf_momentum.training.callbacks.guard import check_loss_scaling, check_processes, check_stretched
from hf_momentum.training.loss_scaling import trainer_misreads_loss
from hf_momentum.training.optimizers import innermost_optimizer

ASKED = {"optim": "sgdm", "lr": 0.5, "momentum": 0.8, "weight_decay": 0.01}


def classic(folder, optimizer, model, changes=None, scheduler=None, callbacks=()) -> Trainer:
    model.accepts_loss_kwargs = False
    return Trainer(
        model=model,
        args=arguments(folder, **changes or {}),
        train_dataset=TokenRows(),
        optimizers=(optimizer, scheduler),
        callbacks=[MomentumGuard(optimizer), *callbacks],
    )


# Identity of the optimizer


class Wrapper:
    """Stands for a wrapper of accelerate or DeepSpeed."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def begin(guard, optimizer):
    guard._identify(optimizer)


def test_the_given_optimizer_is_found_inside_its_wrappers():
    optimizer = SGDM([torch.zeros(1, requires_grad=True)], 0.1)
    begin(MomentumGuard(optimizer), Wrapper(Wrapper(optimizer)))
    assert innermost_optimizer(Wrapper(Wrapper(optimizer))) is optimizer


def test_another_optimizer_in_place_of_the_given_one_raises():
    parameter = torch.zeros(1, requires_grad=True)
    guard = MomentumGuard(SGDM([parameter], 0.1))
    with pytest.raises(UserError, match=r"trains with AdamW, not with the SGDM.*DeepSpeed drops.*trainer_kwargs"):
        begin(guard, Wrapper(torch.optim.AdamW([parameter])))
    with pytest.raises(UserError, match="trains with SGDM, not with the SGDM that was"):
        begin(guard, Wrapper(SGDM([parameter], 0.1)))


def test_callbacks_without_the_factory_raise(tmp_path):
    model = tiny_classifier()
    kwargs = trainer_kwargs(model, **ASKED)
    del kwargs["optimizer_cls_and_kwargs"]
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=TokenRows(), **kwargs)
    with pytest.raises(UserError, match=r"trains with AdamW, which trainer_kwargs did not build"):
        trainer.train()


@pytest.mark.parametrize("kind", [SGDM, torch.optim.SGD])
def test_the_classic_argument_works_and_resumes(tmp_path, kind):
    def build(changes):
        model = tiny_classifier().double()
        return classic(tmp_path, kind(model.parameters(), 0.1, momentum=0.9), model, changes)

    whole = build(HALF)
    whole.train()
    resumed = build({})
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), atol=1e-12, rtol=0)


# Loss scaling


def test_the_loss_is_misread_unless_it_was_mended():
    model = tiny_classifier()
    assert trainer_misreads_loss(model)
    assert trainer_misreads_loss(torch.compile(model))
    trainer_kwargs(torch.compile(model), **ASKED)
    assert model.accepts_loss_kwargs is False
    assert not trainer_misreads_loss(model)
    assert not trainer_misreads_loss(torch.nn.Linear(1, 1))  # its forward takes no keywords, so nothing is assumed
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    assert not trainer_misreads_loss(torch.compile(LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_mended_too_late_raises_where_it_matters(tmp_path, accumulation):
    model = tiny_classifier()
    optimizer = SGDM(model.parameters(), 0.1)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, gradient_accumulation_steps=accumulation, max_steps=1),
        train_dataset=TokenRows(),
        optimizers=(optimizer, None),
        callbacks=[MomentumGuard(optimizer)],
    )
    model.accepts_loss_kwargs = False  # the Trainer has read it already
    if accumulation == 1:
        trainer.train()
        return
    with pytest.raises(UserError, match=r"multiply this model's gradient by 2 \(2 accumulation steps × 1 processes"):
        trainer.train()


def test_several_processes_count_where_tokens_are_averaged_over_them(tmp_path):
    args = arguments(tmp_path)
    args.__dict__["world_size"] = 1
    fake = type("Args", (), {"gradient_accumulation_steps": 1, "world_size": 2, "average_tokens_across_devices": True})
    check_loss_scaling(args, True)
    with pytest.raises(UserError, match="by 2"):
        check_loss_scaling(fake, True)
    check_loss_scaling(fake, False)
    fake.average_tokens_across_devices = False
    check_loss_scaling(fake, True)


# Processes


@pytest.mark.parametrize(
    ("environment", "allowed"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False", "MASTER_PORT": "29500"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}, True),  # --num_processes 1
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500", "WORLD_SIZE": "1"}, True),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500", "PMI_SIZE": "1"}, True),
        ({"MASTER_PORT": "29500"}, True),  # set by a cluster, not by accelerate
    ],
)
def test_one_process_where_two_were_asked_for(monkeypatch, tmp_path, environment, allowed):
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "MASTER_PORT", "WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    args = arguments(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if allowed:
        check_processes(args)
        return
    with pytest.raises(UserError, match=r"only one.*torchrun --nproc_per_node N"):
        check_processes(args)


# Resume


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> str:
    return saved_at_half(tmp_path_factory.mktemp("half"), **ASKED)


@pytest.fixture(scope="module")
def half_of_sgd(tmp_path_factory) -> str:
    return saved_at_half(tmp_path_factory.mktemp("sgd"), optim="sgd", weight_decay=0.01)


@pytest.mark.parametrize("restore", [False, True])
def test_a_resume_with_the_same_hyperparameters_goes_on(tmp_path, half, restore):
    whole = stock_trainer(tmp_path, **ASKED)
    whole.train()
    changes = {"restore_callback_states_from_checkpoint": restore, "save_strategy": "steps", "save_steps": 6}
    resumed = stock_trainer(tmp_path, changes, **ASKED)
    resumed.train(resume_from_checkpoint=half)
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), atol=1e-12, rtol=0)
    state = TrainerState.load_from_json(tmp_path / "checkpoint-6" / "trainer_state.json")
    assert state.stateful_callbacks["MomentumGuard"]["attributes"]["hyperparameters"][0]["momentum"] == 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": 0.7}, "momentum: asked for 0.7, the checkpoint has 0.8"),
        ({"lr": 0.25}, "lr: asked for 0.25, the checkpoint has 0.5"),
        ({"weight_decay": 0.02}, "weight_decay: asked for 0.02, the checkpoint has 0.01"),
        ({"lr": 0.1, "lr_form": "heavy_ball"}, "lr_form: asked for heavy_ball, the checkpoint has effective"),
        ({"optim": "sgd", "momentum": None}, "optim: asked for sgd, the checkpoint has sgdm; momentum: asked for 0.0"),
        ({"momentum": None, "momentum_schedule": "constant"}, "momentum_schedule: asked for ConstantMomentum"),
    ],
)
def test_a_resume_with_others_raises_and_names_both(tmp_path, half, changes, message):
    with pytest.raises(UserError, match=message):
        stock_trainer(tmp_path, **ASKED | changes).train(resume_from_checkpoint=half)


def test_a_resume_of_plain_sgd_with_momentum_raises(tmp_path, half_of_sgd):
    with pytest.raises(UserError, match=r"momentum: asked for 0.8, the checkpoint has 0.0"):
        stock_trainer(tmp_path, **ASKED).train(resume_from_checkpoint=half_of_sgd)


def test_another_ell_raises(tmp_path):
    svag = {"optim": "svag", "lr": 0.5}
    changes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    half = saved_at_half(tmp_path, changes, **svag, ell=2)
    with pytest.raises(UserError, match=r"lr: asked for 0\.125, the checkpoint has 0\.25; ell: asked for 4"):
        stock_trainer(tmp_path, changes, **svag, ell=4).train(resume_from_checkpoint=half)


def test_what_a_checkpoint_says_of_itself_counts_where_groups_are_not_loaded(tmp_path, half, monkeypatch):
    monkeypatch.setattr(SGDM, "load_state_dict", lambda self, state: None)  # as under ZeRO 1 and 2
    with pytest.raises(UserError, match=r"momentum: asked for 0.7, the checkpoint has 0.8"):
        stock_trainer(tmp_path, **ASKED | {"momentum": 0.7}).train(resume_from_checkpoint=half)


def groups_after(trainer) -> dict:
    group = innermost_optimizer(trainer.optimizer).param_groups[0]
    return {key: group[key] for key in ("initial_lr", "momentum", "weight_decay", "keep_buffer")}


def test_override_goes_on_with_what_is_asked_for(tmp_path, half):
    asked = ASKED | {"lr": 0.25, "momentum": 0.6, "weight_decay": 0.02, "lr_form": "effective"}
    watch = Watch()
    trainer = stock_trainer(tmp_path, callbacks=[watch], **asked, override=True)
    trainer.train(resume_from_checkpoint=half)
    assert groups_after(trainer) == {
        "initial_lr": 0.25,
        "momentum": 0.6,
        "weight_decay": 0.02,
        "keep_buffer": True,
    }
    assert trainer.lr_scheduler.base_lrs == [0.25, 0.25]
    assert watch.rates == pytest.approx([0.25 * (1 - step / 6) for step in (3, 4, 5)])
    exported = trainer.state.stateful_callbacks["MomentumGuard"]["attributes"]
    assert exported["description"] == (
        "sgdm: lr 0.25, lr_form effective, momentum 0.6, weight_decay 0.02"  # what the run trains with
    )


def test_override_between_sgd_and_sgdm_starts_or_drops_the_buffer(tmp_path, half, half_of_sgd):
    up = stock_trainer(tmp_path, **ASKED, override=True)
    up.train(resume_from_checkpoint=half_of_sgd)
    assert all("momentum_buffer" in entry for entry in innermost_optimizer(up.optimizer).state.values())
    down = stock_trainer(tmp_path, **ASKED | {"optim": "sgd", "momentum": None}, override=True)
    down.train(resume_from_checkpoint=half)
    assert groups_after(down)["momentum"] == 0
    assert not innermost_optimizer(down.optimizer).state


def test_a_checkpoint_without_optimizer_raises(tmp_path):
    half = saved_at_half(tmp_path, {"save_only_model": True}, **ASKED)
    with pytest.raises(UserError, match=r"resumes at step 3, but the learning rate schedule starts anew"):
        stock_trainer(tmp_path, **ASKED).train(resume_from_checkpoint=half)


def test_a_checkpoint_of_another_trainer_can_be_gone_on_with(tmp_path):
    model = tiny_classifier().double()
    model.accepts_loss_kwargs = False
    optimizer = SGDM(model.parameters(), 0.1)
    args = arguments(tmp_path, **HALF)
    Trainer(model=model, args=args, train_dataset=TokenRows(), optimizers=(optimizer, None)).train()
    model = tiny_classifier().double()
    trainer = classic(tmp_path, SGDM(model.parameters(), 0.1), model, HALF)
    trainer.train(
        resume_from_checkpoint=f"{tmp_path}/checkpoint-3"
    )  # saves at the end, where the guard's state is new
    with pytest.raises(UserError, match=r"momentum: asked for 0\.5, the checkpoint has 0\.9"):
        classic(tmp_path, SGDM(model.parameters(), 0.1, momentum=0.5), model).train(
            resume_from_checkpoint=f"{tmp_path}/checkpoint-3"
        )


# Schedulers that keep their own idea of the learning rate


@pytest.mark.parametrize("name", ["one_cycle", "plateau"])
def test_a_scheduler_of_your_own_is_no_difference(tmp_path, name):
    def build(changes):
        model = tiny_classifier().double()
        optimizer = SGDM(model.parameters(), 0.1)
        guarded = MomentumGuard(optimizer)
        if name == "one_cycle":
            scheduler = OneCycleLR(optimizer, max_lr=0.5, total_steps=6)
        else:
            scheduler = ReduceLROnPlateau(optimizer)
        model.accepts_loss_kwargs = False
        args = arguments(tmp_path, **changes)
        rows = TokenRows()
        return Trainer(
            model=model, args=args, train_dataset=rows, optimizers=(optimizer, scheduler), callbacks=[guarded]
        )

    whole = build(HALF)
    whole.train()
    resumed = build({})
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), atol=1e-12, rtol=0)


def test_a_learning_rate_changed_after_the_optimizer_was_built_raises(tmp_path):
    trainer = stock_trainer(tmp_path, **ASKED)
    optimizer = trainer.create_optimizer()
    for group in optimizer.param_groups:
        group["lr"] = 5e-5  # as the scheduler of a DeepSpeed configuration may
    with pytest.raises(UserError, match=r"lr: asked for 0\.5, the optimizer has 5e-05\. A scheduler or another"):
        trainer.train()


# One Trainer, one run


def test_a_second_train_raises(tmp_path):
    trainer = stock_trainer(tmp_path, {"max_steps": 1}, **ASKED)
    trainer.train()
    with pytest.raises(UserError, match="has trained before"):
        trainer.train()


def test_an_interrupted_training_goes_on_in_the_same_trainer(tmp_path):
    whole = stock_trainer(tmp_path / "whole", **ASKED)
    whole.train()
    trainer = stock_trainer(tmp_path / "same", HALF, **ASKED)
    trainer.train()
    shutil.rmtree(tmp_path / "same" / "checkpoint-6")
    trainer.train(resume_from_checkpoint=True)
    torch.testing.assert_close(weights(trainer.model), weights(whole.model), atol=1e-12, rtol=0)


# What the run says of itself


def test_groups_and_state_hold_the_hyperparameters(tmp_path):
    asked = {"optim": "sgdm", "lr": 0.05, "lr_form": "heavy_ball", "momentum": 0.9}
    half = saved_at_half(tmp_path, **asked)
    group = torch.load(f"{half}/optimizer.pt", weights_only=True)["param_groups"][0]
    expected = {"optim": "sgdm", "requested_lr": 0.05, "lr_form": "heavy_ball", "ell": None, "momentum_schedule": None}
    assert {key: group[key] for key in expected} == expected
    with open(f"{half}/trainer_state.json") as file:
        exported = json.load(file)["stateful_callbacks"]["MomentumGuard"]["attributes"]
    assert exported["hyperparameters"][0] == {
        "optim": "sgdm",
        "lr": 0.05 / (1 - 0.9),
        "lr_form": "heavy_ball",
        "momentum": 0.9,
        "weight_decay": 0.0,
        "ell": None,
        "momentum_schedule": None,
    }
    assert exported["description"].startswith("sgdm: lr 0.5")


# SVAG


def test_stretched_arguments_are_held_to_ell(tmp_path, caplog):
    args = arguments(tmp_path)
    with caplog.at_level(logging.WARNING):
        check_stretched(args, None)
        check_stretched(args, 1.0)
        assert not caplog.records
        check_stretched(args, 4.0)
        assert "do not come from svag_arguments" in caplog.text
        caplog.clear()
        args.svag_ell = 4.0
        check_stretched(args, 4)
        assert not caplog.records
    for ell in (2.0, None):
        with pytest.raises(UserError, match="stretched by svag_arguments for ell=4"):
            check_stretched(args, ell)


def test_a_schedule_beside_a_given_optimizer_resumes(tmp_path):
    def build(changes):
        model = tiny_classifier().double()
        schedule = MomentumScheduleCallback("linear", start=0.0, end=0.9)
        return classic(tmp_path, SGDM(model.parameters(), 0.1, momentum=0.0), model, changes, callbacks=[schedule])

    whole = build(HALF)
    whole.train()
    resumed = build({})
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), atol=1e-12, rtol=0)

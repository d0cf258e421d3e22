"""Steps during the backward pass in a stock Trainer: the trajectory is plain SGD's, and what is refused says why."""

import shutil

import peft
import pytest
import torch
from stock_trainer import arguments, saved_at_half, stock_trainer, weights
from tiny_models import TINY, TokenRows, tiny_classifier
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import Dataset
from transformers import HfArgumentParser, RobertaConfig, RobertaForMaskedLM, Trainer, TrainerCallback

from hf_momentum import SGDM, MomentumTrainingArguments, trainer_kwargs
from hf_momentum.errors import UserError
from hf_momentum.training import FusedBackwardCallback, RecipeTrainingArguments, RegimeCallback
from hf_momentum.training.callbacks.fused_backward import check_fused_backward
from hf_momentum.training.memory import optimizer_state_bytes

FUSED = {"fused_backward": True}


class Steps(TrainerCallback):
    """Keeps the weights after every step, and what is left of the gradients before the optimizer's own."""

    def __init__(self):
        self.weights, self.left = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.left.append(sum(p.grad is not None for p in model.parameters()))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model).clone())


class MaskedRows(Dataset):
    """Rows of tokens, each its own label."""

    def __init__(self):
        self.ids = torch.randint(3, 50, (48, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def tied_masked_lm() -> RobertaForMaskedLM:
    torch.manual_seed(0)
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=50, pad_token_id=1, **TINY)).double()
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
    return model


def lora_classifier() -> nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(
        tiny_classifier(), peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    )


def both(folder, changes=None, build=None, rows=None, **given) -> tuple[Steps, Steps]:
    """Train twice from the same weights, plain and fused; also compare the logs."""
    found, logs = [], []
    for fused in ({}, FUSED):
        steps = Steps()
        changes = {"logging_steps": 1} | (changes or {})
        model = build() if build else None
        settings = {"optim": "sgd", "lr": 0.5} | given | fused
        trainer = stock_trainer(folder, changes, model, rows, callbacks=[steps], **settings)
        trainer.train()
        assert optimizer_state_bytes(trainer.optimizer) == 0
        found.append(steps)
        logs.append([log for log in trainer.state.log_history if "grad_norm" in log])
    assert len(logs[0]) == 6
    for plain, fused in zip(*logs, strict=True):
        assert fused["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-2 if build is half_precision else 1e-5)
        assert {**fused, "grad_norm": 0} == {**plain, "grad_norm": 0}
    return tuple(found)


def half_precision() -> nn.Module:
    return tiny_classifier().bfloat16()


def checkpointing(reentrant: bool) -> dict:
    return {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"weight_decay": 0.1},
        {"changes": {"lr_scheduler_type": "cosine", "warmup_steps": 3}},
        {"changes": {"bf16": True}, "build": tiny_classifier},
        {"build": half_precision, "weight_decay": 0.1},
        {"changes": checkpointing(True)},
        {"changes": checkpointing(False)},
        {"build": tied_masked_lm, "rows": MaskedRows(), "weight_decay": 0.1},
        {"build": tied_masked_lm, "rows": MaskedRows(), "changes": checkpointing(True)},
        {"build": lora_classifier},
    ],
    ids=[
        "plain",
        "decay",
        "schedule",
        "bf16",
        "bf16-weights",
        "reentrant",
        "checkpointed",
        "tied",
        "tied-reentrant",
        "lora",
    ],
)
def test_every_step_is_plain_sgds(tmp_path, case):
    plain, fused = both(tmp_path, **case)
    torch.testing.assert_close(fused.weights, plain.weights, atol=1e-6, rtol=0)
    assert len(plain.weights) == 6
    assert (plain.weights[0] - plain.weights[-1]).abs().max() > 1e-4
    assert min(plain.left) > 0
    assert max(fused.left) == 0


@pytest.mark.parametrize(("saved", "resumed"), [({}, FUSED), (FUSED, {}), (FUSED, FUSED)])
def test_a_run_resumes_with_it_or_without(tmp_path, saved, resumed):
    settings = {"optim": "sgd", "weight_decay": 0.1}
    whole = stock_trainer(tmp_path, **settings)
    whole.train()
    checkpoint = saved_at_half(tmp_path, **settings, **saved)
    shutil.rmtree(tmp_path / "checkpoint-6")
    again = stock_trainer(tmp_path, **settings, **resumed)
    again.train(resume_from_checkpoint=checkpoint)
    torch.testing.assert_close(weights(again.model), weights(whole.model), atol=1e-12, rtol=0)


class ClipEach(TrainerCallback):
    """Clips each parameter's gradient before the plain step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for p in model.parameters():
            clip_grad_norm_([p], 1e-3)


def clip_one(parameter: torch.Tensor) -> None:
    clip_grad_norm_([parameter], 1e-3)


def test_each_parameters_norm_can_be_clipped_by_hooks(tmp_path):
    plain = stock_trainer(tmp_path, optim="sgd", callbacks=[ClipEach()])
    fused = stock_trainer(tmp_path, optim="sgd", **FUSED)
    for parameter in fused.model.parameters():
        parameter.register_post_accumulate_grad_hook(clip_one)
    start = weights(plain.model).clone()
    plain.train()
    fused.train()
    torch.testing.assert_close(weights(fused.model), weights(plain.model), atol=1e-12, rtol=0)
    assert 1e-5 < (weights(plain.model) - start).abs().max() < 5e-3


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, input_ids, attention_mask, labels):
        return {"loss": nn.functional.mse_loss(self.net(input_ids.double() / 50)[:, 0], labels.double())}


def test_measurements_between_the_steps_see_ordinary_gradients(tmp_path):
    found = []
    for given in ({}, FUSED):
        regime = RegimeCallback(every=3)
        trainer = stock_trainer(tmp_path, model=Regression(), optim="sgd", callbacks=[regime], **given)
        trainer.train()
        found.append((weights(trainer.model), [report.h.value for report in regime.reports.values()]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-12, rtol=0)
    assert len(found[0][1]) == 1
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-9)


# After training


class Interrupt(TrainerCallback):
    """Stops the second step's backward pass half-way, as running out of memory does."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.roberta.embeddings.LayerNorm.weight.register_hook(self._fail)

    def _fail(self, gradient):
        raise MemoryError


def gradients_accumulate(model: nn.Module) -> bool:
    before = weights(model).clone()
    model.zero_grad()
    model(**{key: value[None] for key, value in TokenRows()[0].items()}).loss.backward()
    return torch.equal(weights(model), before) and model.classifier.dense.weight.grad is not None


def test_the_hooks_are_gone_after_training(tmp_path):
    trainer = stock_trainer(tmp_path, optim="sgd", **FUSED)
    trainer.train()
    assert gradients_accumulate(trainer.model)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in trainer.model.parameters())


def test_a_second_training_is_refused(tmp_path):
    trainer = stock_trainer(tmp_path, optim="sgd", **FUSED)
    trainer.train()
    with pytest.raises(UserError, match="This optimizer has trained before"):
        trainer.train()
    assert gradients_accumulate(trainer.model)


def test_an_interrupted_training_leaves_the_next_one_alone(tmp_path):
    interrupted = stock_trainer(tmp_path, optim="sgd", lr=100.0, callbacks=[Interrupt()], **FUSED)
    with pytest.raises(MemoryError):
        interrupted.train()
    model = interrupted.model
    model.roberta.embeddings.LayerNorm.weight._backward_hooks.clear()
    model.load_state_dict(tiny_classifier().double().state_dict())
    plain = stock_trainer(tmp_path, optim="sgd")
    again = stock_trainer(tmp_path, model=model, optim="sgd")
    plain.train()
    again.train()
    torch.testing.assert_close(weights(again.model), weights(plain.model), atol=1e-12, rtol=0)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_grad_norm": 1.0}, r"max_grad_norm=1: the norm of all gradients .* --max_grad_norm 0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2: the weights would move after every"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True starts again"),
    ],
)
def test_arguments_that_cannot_work_are_refused_when_they_are_made_and_when_the_trainer_is(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        stock_trainer(tmp_path, changes, optim="sgd", **FUSED)
    with pytest.raises(UserError, match=message):
        trainer_kwargs(tiny_classifier(), arguments(tmp_path, **changes), optim="sgd", lr=0.1, **FUSED)
    ours = {"optim": "sgd", "learning_rate": 0.1, **FUSED}
    with pytest.raises(UserError, match=message):
        arguments(tmp_path, MomentumTrainingArguments, **ours | changes)
    trainer = stock_trainer(tmp_path, optim="sgd", **FUSED)
    for name, value in changes.items():
        setattr(trainer.args, name, value)
    before = weights(trainer.model).clone()
    with pytest.raises(UserError, match=message):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("deepspeed_plugin", object(), "DeepSpeed keeps, reduces and uses the gradients itself"),
        ("fsdp", True, "FSDP reduces and shards the gradients"),
        ("world_size", 2, "With 2 processes .* the replicas would drift apart"),
        ("n_gpu", 2, "The Trainer would spread one process over n_gpu=2 GPUs"),
        ("fp16", True, "fp16=True scales the loss"),
    ],
)
def test_backends_that_cannot_work_are_refused(tmp_path, name, value, message):
    args = arguments(tmp_path)
    names = ("gradient_accumulation_steps", "max_grad_norm", "deepspeed", "deepspeed_plugin", "fsdp", "world_size")
    names += ("n_gpu", "fp16", "auto_find_batch_size")
    fake = {key: getattr(args, key) for key in names}
    check_fused_backward(type("Args", (), fake))
    with pytest.raises(UserError, match=f"^fused_backward updates each parameter during the backward pass. {message}"):
        check_fused_backward(type("Args", (), fake | {name: value}))


def test_a_gradient_scaler_is_refused(tmp_path):
    trainer = stock_trainer(tmp_path, optim="sgd", **FUSED)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(UserError, match="GradScaler"):
        trainer.train()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optim": "sgdm"}, "belongs to sgd, .* sgdm keeps momentum"),
        ({"optim": "sgdm", "momentum": 0.0}, "belongs to sgd"),
        ({"optim": "svag", "ell": 2}, "svag needs several backward passes"),
    ],
)
def test_other_optimizers_are_refused(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        trainer_kwargs(tiny_classifier(), lr=0.1, **given, **FUSED)
    with pytest.raises(UserError, match=message):
        arguments(tmp_path, MomentumTrainingArguments, learning_rate=0.1, **given, **FUSED)


def test_the_callback_alone_checks_an_optimizer_that_was_given(tmp_path):
    model = tiny_classifier()
    optimizer = SGDM(model.parameters(), 0.1, momentum=0.9)
    callbacks = [FusedBackwardCallback()]
    args = arguments(tmp_path)
    trainer = Trainer(model, args, train_dataset=TokenRows(), optimizers=(optimizer, None), callbacks=callbacks)
    with pytest.raises(UserError, match="needs plain SGD, SGDM with momentum 0, and this is SGDM with momentum"):
        trainer.train()


# Arguments


def test_the_command_line(tmp_path):
    argv = f"--output_dir {tmp_path} --optim sgd --learning_rate 0.5 --use_cpu --report_to none".split()
    parser = HfArgumentParser(MomentumTrainingArguments)
    with pytest.raises(UserError, match="--max_grad_norm 0"):
        parser.parse_args_into_dataclasses([*argv, "--fused_backward"])
    argv += ["--fused_backward", "--max_grad_norm", "0", "--max_steps", "6", "--per_device_train_batch_size", "8"]
    argv += ["--train_sampling_strategy", "sequential", "--save_strategy", "no"]
    args = parser.parse_args_into_dataclasses(argv)[0]
    plain, model, steps = stock_trainer(tmp_path, optim="sgd"), tiny_classifier().double(), Steps()
    Trainer(
        model=model, args=args, train_dataset=TokenRows(), **trainer_kwargs(model, args, callbacks=[steps])
    ).train()
    plain.train()
    torch.testing.assert_close(weights(model), weights(plain.model), atol=1e-12, rtol=0)
    assert max(steps.left) == 0
    with pytest.raises(
        UserError, match="fused_backward=False contradicts the training arguments' fused_backward=True"
    ):
        trainer_kwargs(model, args, fused_backward=False)


def test_in_a_recipe_it_goes_to_sgd_alone(tmp_path):
    plain = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "max_grad_norm": 0.0}
    args = RecipeTrainingArguments(optim=["sgd", "sgdm", "adamw_torch"], **plain, **FUSED)
    assert args.for_run("sgd", learning_rate=0.1).fused_backward is True
    assert args.for_run("sgdm", learning_rate=0.1).fused_backward is False
    assert args.for_run("adamw_torch", learning_rate=0.1).fused_backward is False
    with pytest.raises(UserError, match="--fused_backward was given, but none of sgdm takes it"):
        RecipeTrainingArguments(optim=["sgdm"], **plain, **FUSED)
    with pytest.raises(UserError, match="fused_backward=True would be ignored by the Trainer's adamw_torch"):
        MomentumTrainingArguments(optim="adamw_torch", **plain, **FUSED)

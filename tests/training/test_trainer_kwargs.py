import copy

import peft
import pytest
import torch
from stock_trainer import PLAIN, stock_trainer, weights
from stock_trainer import arguments as stock_arguments
from tiny_models import TokenRows, tiny_classifier
from tiny_tokenizers import roberta_bpe_tokenizer
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import HPSearchBackend, number_of_arguments

from hf_momentum import SGDM, MomentumTrainingArguments, trainer_kwargs
from hf_momentum.errors import UserError
from hf_momentum.optim.sgdm import reference_sgdm_step
from hf_momentum.training.optimizers import innermost_optimizer


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
        ({"optim": "sgdm", "lr": 0.1, "ell": 2}, "ell=2: sgdm has none. ℓ belongs to svag"),
        ({"optim": "svag", "lr": 0.1}, "svag needs ell"),
        ({"optim": "svag", "lr": 0.1, "ell": 0.5}, "Invalid ell: 0.5"),
        ({"optim": "svag", "lr": 0.1, "ell": 2, "momentum_schedule": "constant"}, "SVAG keeps β fixed"),
        ({"optim": "sgd", "lr": 0.1, "momentum_schedule": "constant"}, "sgd has no momentum. A schedule belongs"),
        ({"optim": "sgdm", "lr": 0.1, "momentum": 0.9, "momentum_schedule": "constant"}, "Give one of them"),
        ({"optim": "sgdm", "lr": 0.1, "lr_form": "heavy_ball", "momentum_schedule": "constant"}, "no meaning under"),
        ({"optim": "sgdm", "lr": 0.1, "momentum_schedule": "linear"}, "needs start and end"),
        ({"optim": "sgdm", "lr": 0.1, "momentum_schedule_kwargs": {"end": 0.9}}, "without a momentum_schedule"),
    ],
)
def test_bad_input_shows_before_training(given, message):
    with pytest.raises(UserError, match=message):
        trainer_kwargs(tiny_classifier(), **given)


def test_an_optimizer_of_the_trainers_own_only_gets_its_loss_mended(tmp_path):
    model, mine = tiny_classifier(), TrainerCallback()
    assert trainer_kwargs(model, arguments(tmp_path, optim="adamw_torch"), callbacks=[mine]) == {"callbacks": [mine]}
    assert model.accepts_loss_kwargs is False


def test_settings_that_the_trainers_own_optimizer_would_drop_raise(tmp_path):
    with pytest.raises(UserError, match=r"lr is of no use to the Trainer's own adamw_torch\w*\. Name the optimizer"):
        trainer_kwargs(tiny_classifier(), arguments(tmp_path), lr=0.1)


def callback_names(**given) -> list[str]:
    mine = EarlyStoppingCallback()
    return [
        type(c).__name__ for c in trainer_kwargs(tiny_classifier(), lr=0.5, callbacks=[mine], **given)["callbacks"]
    ]


def test_each_optimizer_gets_its_callbacks_the_guard_first_and_yours_last():
    last = ["HyperparameterLogCallback", "EarlyStoppingCallback"]
    assert callback_names(optim="sgd") == ["MomentumGuard", *last]
    assert callback_names(optim="svag", ell=2) == ["MomentumGuard", "SVAGCallback", *last]
    scheduled = {"optim": "sgdm", "momentum_schedule": "constant"}
    assert callback_names(**scheduled) == ["MomentumGuard", "MomentumScheduleCallback", *last]


@pytest.mark.parametrize(
    ("given", "lr", "momentum"),
    [
        ({"ell": 4}, 0.125, 0.0),
        ({"ell": 2.5, "momentum": 0.9}, 0.2, 0.9),
        ({"ell": 4, "momentum": 0.9, "lr_form": "heavy_ball"}, 1.25, 0.9),
    ],
)
def test_svag_trains_at_eta_over_ell(tmp_path, given, lr, momentum):
    optimizer = built(tmp_path, optim="svag", lr=0.5, **given)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(lr, rel=1e-15)
        expected = {"optim": "svag", "ell": given["ell"], "requested_lr": 0.5, "momentum": momentum}
        assert {key: group[key] for key in expected} == expected


def test_the_groups_keep_what_was_asked_for_through_state_dicts(tmp_path):
    optimizer = built(tmp_path, optim="svag", lr=0.5, ell=4)
    other = SGDM([torch.zeros(1, requires_grad=True)] * 1, 0.1)
    state = optimizer.state_dict()
    state["param_groups"] = [state["param_groups"][0] | {"params": [0]}]
    other.load_state_dict(state)
    copied = copy.deepcopy(other).state_dict()["param_groups"][0]
    assert [copied[key] for key in ("optim", "ell", "lr_form", "requested_lr")] == ["svag", 4, "effective", 0.5]


def test_ell_is_read_when_the_optimizer_is_built_and_reaches_the_callback(tmp_path):
    model, args = tiny_classifier(), arguments(tmp_path, optim="svag", learning_rate=0.2, ell=2)
    kwargs = trainer_kwargs(model, args)
    trainer = Trainer(model=model, args=args, train_dataset=TokenRows(), **kwargs)
    args.ell = 4.0  # as a hyperparameter search sets it
    assert trainer.create_optimizer().param_groups[0]["lr"] == 0.05
    assert kwargs["callbacks"][1].ell == 4.0


def test_a_search_cannot_turn_svag_into_another_optimizer(tmp_path):
    model, args = tiny_classifier(), arguments(tmp_path, optim="svag", learning_rate=0.2, ell=2)
    trainer = Trainer(model=model, args=args, train_dataset=TokenRows(), **trainer_kwargs(model, args))
    args.optim, args.ell = "sgd", None
    with pytest.raises(UserError, match="optim is 'sgd' now, but the callbacks were made for another optimizer"):
        trainer.create_optimizer()


def classifier():
    return tiny_classifier()


def trials(tmp_path, **search) -> list[dict]:
    """What two trials of a hyperparameter search train with, without a search backend."""
    args = stock_arguments(tmp_path, MomentumTrainingArguments, optim="sgdm", learning_rate=0.2, max_steps=1)
    trainer = Trainer(args=args, train_dataset=TokenRows(), **trainer_kwargs(args=args, model_init=classifier))
    trainer.hp_search_backend, found = HPSearchBackend.RAY, []
    for index in range(2):
        assert trainer.model.accepts_loss_kwargs is False
        trainer._hp_search_setup({name: values[index] for name, values in search.items()})
        trainer.train()
        found.append(trainer.optimizer.param_groups[0])
    return found


def test_a_hyperparameter_search_sets_momentum_and_learning_rate(tmp_path):
    groups = trials(tmp_path, momentum=[0.5, 0.8], learning_rate=[0.1, 0.3])
    assert [(group["momentum"], group["initial_lr"]) for group in groups] == [(0.5, 0.1), (0.8, 0.3)]


def test_the_model_card_names_the_optimizer_and_its_learning_rate(tmp_path):
    args = stock_arguments(tmp_path, MomentumTrainingArguments, optim="sgdm", learning_rate=0.25, max_steps=1)
    model = tiny_classifier()
    trainer = Trainer(model=model, args=args, train_dataset=TokenRows(), **trainer_kwargs(model, args))
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Use sgdm" in card
    assert "learning_rate: 0.25" in card
    described = trainer.state.stateful_callbacks["MomentumGuard"]["attributes"]["description"]
    assert described == "sgdm: lr 0.25, lr_form effective, momentum 0.9, weight_decay 0.0"


def test_model_init_with_a_trial_keeps_its_argument():
    def with_trial(trial):
        return tiny_classifier()

    wrapped = trainer_kwargs(model_init=with_trial, optim="sgd", lr=0.1)["model_init"]
    assert number_of_arguments(wrapped) == 1
    assert wrapped(None).accepts_loss_kwargs is False
    unwrapped = trainer_kwargs(model_init=classifier, optim="sgd", lr=0.1)["model_init"]
    assert number_of_arguments(unwrapped) == 0


@pytest.mark.parametrize("model", [{}, {"model": "org/name"}, {"model": nn.Linear(1, 1), "model_init": nn.Linear}])
def test_either_a_model_or_model_init(model):
    with pytest.raises(UserError, match="either the model, loaded, or model_init="):
        trainer_kwargs(optim="sgd", lr=0.1, **model)


# Other ways to train: twenty steps each against their plain counterpart


def twenty_steps(folder, model, changes=None) -> torch.Tensor:
    settings = {"max_steps": 20, "max_grad_norm": 0.0, "weight_decay": 0.01} | (changes or {})
    stock_trainer(folder, settings, model=model, lr=0.2, weight_decay=0.01).train()
    return weights(model)


def torch_sgd_steps(folder, model, changes=None) -> torch.Tensor:
    """The same by the Trainer and torch's SGD with zero buffers, which is Eq. 3 (paper's practical form rescaled)."""
    model.accepts_loss_kwargs = False
    args = stock_arguments(folder, max_steps=20, **changes or {})
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if (name in decayed) == decays], "weight_decay": 0.01 if decays else 0.0}
        for decays in (True, False)
    ]
    optimizer = torch.optim.SGD(groups, lr=0.2 * (1 - 0.9), momentum=0.9)  # Eq. 1
    Trainer(model=model, args=args, train_dataset=TokenRows(), optimizers=(optimizer, None)).train()
    return weights(model)


def lora(dtype=torch.float32):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS", r=2)
    return peft.get_peft_model(tiny_classifier().to(dtype), config)


@pytest.mark.parametrize(
    ("build", "changes", "tolerance"),
    [
        (lambda: lora(torch.float64), {}, 1e-12),
        (lambda: tiny_classifier().double(), {"activation_checkpointing": True}, 1e-12),
        (tiny_classifier, {"bf16": True}, 1e-6),
        (lambda: tiny_classifier().bfloat16(), {}, 0.02),
    ],
    ids=["lora", "activation_checkpointing", "bf16", "bf16_weights"],
)
def test_twenty_steps_equal_those_of_torchs_heavy_ball(tmp_path, build, changes, tolerance):
    ours, theirs, start = (
        twenty_steps(tmp_path, build(), changes),
        torch_sgd_steps(tmp_path, build(), changes),
        build(),
    )
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    assert (ours - weights(start)).abs().max() > 3 * tolerance


def test_checkpointing_and_autocast_change_the_plain_run_by_rounding_alone(tmp_path):
    plain = twenty_steps(tmp_path, tiny_classifier())
    moved = (plain - weights(tiny_classifier())).norm()
    for changes, bound in [({"activation_checkpointing": True}, 1e-5), ({"bf16": True}, 0.1)]:
        assert (twenty_steps(tmp_path, tiny_classifier(), changes) - plain).norm() < bound * moved


# Causal language models, where the token-normalised loss is right


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    ).double()


class Sentences(TokenRows):
    """Sequences of unequal length, padded, whose labels are their tokens."""

    def __getitem__(self, index: int) -> dict:
        length = 3 + index % 6
        keep = (torch.arange(8) < length).long()
        labels = torch.where(keep.bool(), self.ids[index], -100)
        return {"input_ids": self.ids[index] * keep, "attention_mask": keep, "labels": labels}


@pytest.mark.parametrize("optim", ["sgd", "sgdm"])
def test_a_causal_model_keeps_its_normalisation_over_the_accumulated_tokens(tmp_path, optim):
    runs = []
    for batch, accumulation in [(8, 1), (2, 4)]:
        model = tiny_llama()
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = stock_trainer(tmp_path, sizes, model=model, rows=Sentences(), optim=optim)
        assert not hasattr(model, "accepts_loss_kwargs")
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        runs.append(weights(model))
    torch.testing.assert_close(*runs, atol=1e-12, rtol=0)


def test_trls_sft_trainer_takes_it(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": Sentences()[i]["input_ids"][: 3 + i % 6].tolist()} for i in range(32)])
    runs = []
    for batch, accumulation in [(8, 1), (2, 4)]:
        model = tiny_llama()
        config = trl.SFTConfig(
            output_dir=str(tmp_path),
            activation_checkpointing=False,
            bf16=False,
            **PLAIN | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation},
        )
        kwargs = trainer_kwargs(model, optim="sgdm", lr=0.5)
        trainer = trl.SFTTrainer(model, config, train_dataset=rows, processing_class=roberta_bpe_tokenizer(), **kwargs)
        trainer.train()
        assert type(innermost_optimizer(trainer.optimizer)) is SGDM
        runs.append(weights(model))
    torch.testing.assert_close(*runs, atol=1e-7, rtol=0)  # trl computes the loss in single precision
    assert (runs[0] - weights(tiny_llama())).abs().max() > 1e-3


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


def test_a_loss_function_beside_svag_is_an_error(tmp_path):
    model, args = tiny_classifier(), arguments(tmp_path, max_grad_norm=0.0, gradient_accumulation_steps=2)
    kwargs = trainer_kwargs(model, args, optim="svag", lr=0.1, ell=2.0)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'compute_loss_func'"):
        Trainer(model=model, args=args, compute_loss_func=lambda *_: None, **kwargs)
    assert Trainer(model=model, args=args, train_dataset=TokenRows(), **kwargs).compute_loss_func is None

"""The registry, and parameter groups equal to the Trainer's."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

from hf_momentum.errors import UserError
from hf_momentum.optim import SGDM, create_optimizer, get_optimizer_info, list_optimizers, parameter_groups


def tiny_models():
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        ResNetConfig,
        ResNetForImageClassification,
        RobertaConfig,
        RobertaForMaskedLM,
    )

    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    yield RobertaForMaskedLM(RobertaConfig(vocab_size=20, max_position_embeddings=16, **small))  # ties its decoder
    yield LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=True, **small))
    yield ResNetForImageClassification(
        ResNetConfig(num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    )


class Awkward(nn.Module):
    """Names and nestings at the edges of the Trainer's rule."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.log_bias_like = nn.Parameter(torch.ones(2))
        self.norm = nn.Linear(2, 2)
        self.norm1 = nn.BatchNorm1d(2)
        self.post_norm = nn.Linear(2, 2)
        self.normal = nn.Linear(2, 2)
        self.MyLayerNorm = nn.Linear(2, 2, bias=False)
        self.ln = nn.LayerNorm(2)
        self.lnx = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.lnx.weight
        self.shared = self.ln
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.GroupNorm(1, 2))])


def trainer_groups(model):
    from transformers import Trainer

    decay = Trainer.get_decay_parameter_names(None, model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [[p for name, p in named if name in decay], [p for name, p in named if name not in decay]]


def ids(groups):
    return [[id(p) for p in group] for group in groups]


def test_parameter_groups_are_the_trainers():
    for model in [*tiny_models(), Awkward(), nn.LayerNorm(2), nn.Sequential(nn.Linear(2, 2, bias=False))]:
        ours = parameter_groups(model, 0.1)
        assert [set(group) for group in ours] == [{"params", "weight_decay"}] * 2
        assert [group["weight_decay"] for group in ours] == [0.1, 0.0]
        assert ids(group["params"] for group in ours) == ids(trainer_groups(model)), type(model).__name__
        flat = [i for group in ids(group["params"] for group in ours) for i in group]
        assert len(flat) == len(set(flat))


def test_the_optimizer_has_the_groups_a_trainer_would_make(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = Awkward()
    args = TrainingArguments(output_dir=tmp_path, use_cpu=True, weight_decay=0.1, report_to=[])
    theirs = Trainer(model, args, optimizer_cls_and_kwargs=(SGDM, {"lr": 0.3, "momentum": 0.9})).create_optimizer()
    ours = create_optimizer("sgdm", model, lr=0.3, weight_decay=0.1)
    assert [set(g) for g in ours.param_groups] == [set(g) for g in theirs.param_groups]
    assert ours.state_dict() == theirs.state_dict()
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))


def test_both_groups_are_there_even_if_one_is_empty():
    optimizer = create_optimizer("sgdm", nn.Linear(2, 2, bias=False), lr=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(UserError, match="Linear has no trainable parameters"):
        create_optimizer("sgdm", nn.Linear(2, 2).requires_grad_(False), lr=0.1)


def test_registry():
    assert list_optimizers() == ["sgd", "sgdm", "svag"]
    for name in list_optimizers():
        info = get_optimizer_info(name)
        assert info.name == name
        assert info.description
        with pytest.raises(dataclasses.FrozenInstanceError):
            info.name = "other"
        with pytest.raises(TypeError):
            info.defaults["momentum"] = 0.5
    assert dict(get_optimizer_info("sgd").defaults) == {"momentum": 0.0, "weight_decay": 0.0}
    assert dict(get_optimizer_info("sgdm").defaults) == {"momentum": 0.9, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("name", "kwargs", "lr", "momentum"),
    [
        ("sgd", {}, 0.1, 0.0),
        ("sgd", {"momentum": 0}, 0.1, 0.0),
        ("sgd", {"lr_form": "heavy_ball"}, 0.1, 0.0),
        ("sgdm", {}, 0.1, 0.9),
        ("sgdm", {"momentum": 0.5}, 0.1, 0.5),
        ("sgdm", {"momentum": 0.0}, 0.1, 0.0),
        ("sgdm", {"lr_form": "heavy_ball"}, 1.0, 0.9),
        ("sgdm", {"lr_form": "heavy_ball", "momentum": 0.5}, 0.2, 0.5),
    ],
)
def test_create_optimizer(name, kwargs, lr, momentum):
    for target in (nn.Linear(2, 2), list(nn.Linear(2, 2).parameters()), nn.Linear(2, 2).named_parameters()):
        optimizer = create_optimizer(name, target, lr=0.1, weight_decay=0.2, maximize=True, foreach=True, **kwargs)
        assert type(optimizer) is SGDM
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([lr] * len(optimizer.param_groups))
        for group in optimizer.param_groups:
            assert (group["momentum"], group["dampening"]) == (momentum, momentum)
            assert (group["maximize"], group["foreach"]) == (True, True)
        assert optimizer.param_groups[0]["weight_decay"] == 0.2
        assert optimizer.param_groups[-1]["weight_decay"] == (0.0 if isinstance(target, nn.Module) else 0.2)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("sgmd", {}, r"Unknown optimizer 'sgmd'\. Did you mean 'sgd.*Allowed: sgd, sgdm, svag"),
        ("adam", {}, r"Unknown optimizer 'adam'\..*Allowed: sgd, sgdm, svag"),
        (None, {}, "Unknown optimizer None"),
        ("svag", {}, "trainer_kwargs"),
        ("sgd", {"momentum": 0.9}, r"Invalid momentum value: 0\.9\. 'sgd' has no momentum"),
        ("sgdm", {"momentum": 1}, "Invalid momentum value: 1"),
        (
            "sgdm",
            {"nesterov": True},
            "Unknown keyword of optimizer 'sgdm': 'nesterov'.*Allowed: differentiable, foreach",
        ),
        ("sgdm", {"maximise": True}, "Did you mean 'maximize'"),
        ("sgdm", {"lr_form": "heavyball"}, "Did you mean 'heavy_ball'.*Allowed: effective, heavy_ball"),
        ("sgdm", {"lr": -1}, "Invalid learning rate: -1"),
        ("sgdm", {"lr": -1, "lr_form": "heavy_ball"}, "Invalid learning rate: -1"),
        ("sgdm", {"weight_decay": -1}, "Invalid weight_decay value: -1"),
    ],
)
def test_bad_requests_are_refused(name, kwargs, message):
    with pytest.raises(UserError, match=message):
        create_optimizer(name, nn.Linear(2, 2), **{"lr": 0.1, **kwargs})


def test_optim_needs_torch_alone():
    code = "import sys, hf_momentum.optim; print({'transformers', 'accelerate', 'datasets'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"

import subprocess
import sys

import pytest
import torch
from stock_trainer import stock_trainer, weights
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification

from hf_momentum.errors import UserError
from hf_momentum.tasks.image_models import GROUPS, CifarResNet, build_image_model, register_cifar_resnets

timm = pytest.importorskip("timm")

BLOCKS = {"cifar_resnet8": 1, "cifar_resnet14": 2, "cifar_resnet20": 3, "cifar_resnet32": 5}


class RandomImages(Dataset):
    """48 random grey images of 8×8 pixels in three classes."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(48, 1, 8, 8, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(0, 3, (48,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def seeded(name: str, num_classes: int = 10, **kwargs):
    torch.manual_seed(0)
    return build_image_model(name, num_classes, **kwargs)


def reference_logits(state: dict[str, torch.Tensor], x: torch.Tensor, n: int, norm: str) -> torch.Tensor:
    """He et al.'s network in plain functions, on the weights of ours and this batch's statistics."""

    def normed(x, name):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if norm == "group":
            return functional.group_norm(x, GROUPS, weight, bias)
        return functional.batch_norm(x, None, None, weight, bias, training=True)

    x = normed(functional.conv2d(x, state["conv1.weight"], padding=1), "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(n):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = functional.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = functional.conv2d(normed(y, f"{name}.bn1").relu(), state[f"{name}.conv2.weight"], padding=1)
            shortcut = torch.zeros_like(y)
            shortcut[:, : x.shape[1]] = x[:, :, ::stride, ::stride]
            x = (normed(y, f"{name}.bn2") + shortcut).relu()
    return x.mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("name", "size"), [("cifar_resnet8", 16), ("cifar_resnet20", 9)])
def test_forward_is_that_of_a_plain_network(name, size, norm):
    model = seeded(name, norm=norm).double()
    for parameter in model.parameters():  # norm layers start at 1 and 0, which would hide a wrong one
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(6, 3, size, size, dtype=torch.float64)
    expected = reference_logits(model.timm_model.state_dict(), x, BLOCKS[name], norm)
    torch.testing.assert_close(model.train()(pixel_values=x).logits, expected, rtol=1e-10, atol=1e-10)


def count_by_hand(n: int, in_chans: int, classes: int) -> int:
    """Convolutions without bias, two numbers a channel for each norm layer, shortcuts without parameters."""
    stem = 9 * in_chans * 16 + 2 * 16
    stages, before = 0, 16
    for channels in (16, 32, 64):
        stages += 9 * before * channels + 9 * (2 * n - 1) * channels**2 + 2 * 2 * n * channels
        before = channels
    return stem + stages + 64 * classes + classes


@pytest.mark.parametrize(
    ("name", "known"),
    [("cifar_resnet8", 75_290), ("cifar_resnet14", 172_506), ("cifar_resnet20", 269_722), ("cifar_resnet32", 464_154)],
)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_parameter_counts(name, known, norm):
    assert seeded(name, norm=norm).num_parameters() == count_by_hand(BLOCKS[name], 3, 10) == known
    assert seeded(name, 7, norm=norm, in_chans=1).num_parameters() == count_by_hand(BLOCKS[name], 1, 7)


@pytest.mark.parametrize(("in_chans", "size"), [(1, 8), (3, 16), (3, 32), (3, 33)])
def test_shapes_of_every_stage(in_chans, size):
    model = seeded("cifar_resnet14", 5, in_chans=in_chans).timm_model
    shapes = {}
    for name in ("conv1", "layer1", "layer2", "layer3", "global_pool", "fc"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, __, output, name=name: shapes.update({name: tuple(output.shape)}))
    model(torch.randn(2, in_chans, size, size))
    half, quarter = -(-size // 2), -(-size // 4)
    assert shapes == {
        "conv1": (2, 16, size, size),
        "layer1": (2, 16, size, size),
        "layer2": (2, 32, half, half),
        "layer3": (2, 64, quarter, quarter),
        "global_pool": (2, 64),
        "fc": (2, 5),
    }


def test_weights_start_from_he_initialisation():
    model = seeded("cifar_resnet32").timm_model
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            # The standard error of a sample standard deviation is 1/√(2·size) of it.
            scaled = module.weight.std() * (9 * module.out_channels / 2) ** 0.5
            assert abs(scaled - 1) < 5 / (2 * module.weight.numel()) ** 0.5, name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name


def test_timm_knows_the_models_and_registering_twice_changes_nothing(recwarn):
    register_cifar_resnets()
    before = timm.models.model_entrypoint("cifar_resnet32")
    register_cifar_resnets()
    assert timm.models.model_entrypoint("cifar_resnet32") is before
    assert timm.list_models("cifar_resnet*") == list(BLOCKS)
    assert not [w for w in recwarn if "Overwriting" in str(w.message)]
    model = timm.create_model("cifar_resnet32", num_classes=10, norm_layer="batchnorm2d")
    assert isinstance(model, CifarResNet)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)


def test_group_norm_by_name_or_class_has_groups_that_divide_16_channels():
    register_cifar_resnets()
    for norm_layer in ("groupnorm", timm.layers.GroupNorm):
        modules = timm.create_model("cifar_resnet8", norm_layer=norm_layer).modules()
        assert [m.num_groups for m in modules if isinstance(m, nn.GroupNorm)] == [8] * 7


def test_classifiers_can_be_replaced_or_left_out():
    register_cifar_resnets()
    model = timm.create_model("cifar_resnet8", num_classes=0)
    x = torch.randn(2, 3, 8, 8)
    pooled = model.eval()(x)
    assert pooled.shape == (2, 64)
    model.reset_classifier(4)
    assert model(x).shape == (2, 4) and model.get_classifier().out_features == 4
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)


def test_loss_is_cross_entropy_and_every_weight_gets_a_gradient():
    model = seeded("cifar_resnet14", norm="group")
    x, labels = torch.randn(5, 3, 8, 8), torch.tensor([0, 9, 3, 3, 1])
    output = model(pixel_values=x, labels=labels)
    rows = -output.logits.log_softmax(dim=1)[range(5), labels]
    torch.testing.assert_close(output.loss, rows.mean())
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_saved_model_is_loaded_as_it_was(tmp_path, norm):
    model = seeded("cifar_resnet8", 3, norm=norm, in_chans=1)
    model(torch.randn(4, 1, 8, 8))  # moves the running statistics of BatchNorm
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert str(loaded) == str(model)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_saved_model_is_known_to_a_new_process(tmp_path):
    model = seeded("cifar_resnet8", 3, norm="group", in_chans=1).eval()
    model.save_pretrained(tmp_path / "model")
    x = torch.randn(4, 1, 8, 8)
    torch.save((x, model(x).logits.detach()), tmp_path / "expected.pt")
    code = f"""
import sys
import hf_momentum.tasks.image_models
assert "timm" not in sys.modules
import torch
from transformers import AutoModelForImageClassification
hf_momentum.tasks.image_models.register_cifar_resnets()
x, logits = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForImageClassification.from_pretrained({str(tmp_path / "model")!r})
assert torch.equal(model(x).logits, logits)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_weights_are_timms_and_follow_the_seed():
    ours = seeded("resnet18").timm_model
    torch.manual_seed(0)
    expected = timm.create_model("resnet18", num_classes=10)
    torch.testing.assert_close(ours.state_dict(), expected.state_dict(), rtol=0, atol=0)


def trained(folder, batch: int, accumulation: int, norm: str = "group") -> torch.Tensor:
    model = seeded("cifar_resnet8", 3, norm=norm, in_chans=1).double()
    changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 3}
    stock_trainer(folder, changes, model, RandomImages(), optim="sgd", lr=0.2).train()
    return weights(model)


def test_accumulation_in_the_trainer_equals_one_large_batch(tmp_path):
    whole = trained(tmp_path, 16, 1)
    assert (whole - weights(seeded("cifar_resnet8", 3, norm="group", in_chans=1).double())).abs().max() > 1e-2
    torch.testing.assert_close(trained(tmp_path, 4, 4), whole, rtol=0, atol=1e-10)


def test_batch_norm_under_accumulation_differs_by_the_statistics(tmp_path):
    difference = (trained(tmp_path, 4, 4, "batch") - trained(tmp_path, 16, 1, "batch")).abs().max()
    assert difference > 1e-3


def test_other_timm_models_and_their_norms():
    modules = list(seeded("resnet18", norm="group").modules())
    assert [m.num_groups for m in modules if isinstance(m, nn.GroupNorm)] == [32] * 20
    assert not [m for m in modules if isinstance(m, nn.BatchNorm2d)]
    assert seeded("resnet18", norm="batch").config.model_args == {"in_chans": 3}  # its own: nothing is replaced
    vit = seeded("test_vit3", 4, image_size=32)  # built for one size, 160 unless told otherwise
    assert vit(pixel_values=torch.randn(2, 3, 32, 32)).logits.shape == (2, 4)
    assert seeded("resnet18.a1_in1k", 4, image_size=32).timm_model.num_classes == 4


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cifar-resnet32", {}, "no model 'cifar-resnet32'. Did you mean cifar_resnet32,"),
        ("resnet18.a9_in9k", {}, r"no model 'resnet18.a9_in9k'. Did you mean .*resnet18.a1_in1k"),
        ("####", {}, "timm.list_models"),
        ("cifar_resnet8", {"num_classes": 1}, "num_classes: 1. It must be an integer of at least 2"),
        ("cifar_resnet8", {"in_chans": 0}, "in_chans: 0"),
        ("cifar_resnet8", {"image_size": 8.0}, "image_size: 8.0"),
        ("cifar_resnet8", {"norm": "layer"}, "norm 'layer'. Choose from: batch, group"),
        ("test_vit", {"norm": "group"}, "neither batch nor group norm"),
        ("vgg11_bn", {"norm": "group"}, "vgg11_bn cannot be built with group norm"),
        ("efficientnet_b0", {"norm": "group"}, "must be divisible by num_groups"),
        ("cifar_resnet8", {"pretrained": True}, "no pretrained weights for cifar_resnet8. Start from random"),
        ("resnet18", {"pretrained": True, "norm": "group"}, "belong to its batch norm, not to group norm"),
    ],
)
def test_bad_input(name, changes, message):
    with pytest.raises(UserError, match=message):
        build_image_model(name, **{"num_classes": 10} | changes)


def test_pretrained_weights_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"weights of resnet10t could not be fetched .*Connect to the Hub once"):
        build_image_model("resnet10t", 10, pretrained=True)

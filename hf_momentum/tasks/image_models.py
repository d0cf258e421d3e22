"""Models for images by their timm name, as the stock Trainer takes them, and the CIFAR ResNets among them.

timm's own `ResNet` cannot express these: its stem is fixed at stride 2 and 64 channels, and its forward pass runs
through four stages. `CifarResNet` is the plain stacking of timm's `BasicBlock` instead.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (CVPR 2016, arXiv 1512.03385), section 4.2.
"""

import difflib
import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_momentum.errors import UserError, require_extra

if TYPE_CHECKING:
    from transformers import TimmWrapperForImageClassification

GROUPS = 8
"""Groups of every GroupNorm in a CIFAR ResNet: of 2, 4 and 8 channels in the three stages. timm's default of 32 groups
does not divide the first stage's 16 channels."""

STAGE_CHANNELS = (16, 32, 64)
"""Channels of the three stages."""

_NORM_LAYERS = {"batch": "batchnorm2d", "group": "groupnorm"}  # what norm= takes → timm's name of the layer


class ZeroPadShortcut(nn.Module):
    """He et al.'s option A between two stages: every `stride`-th pixel, new channels filled with zeros, no parameters.

    Args:
        stride: Step of the subsampling in both directions.
        new_channels: Channels of zeros put behind those of the input.
    """

    def __init__(self, stride: int, new_channels: int):
        super().__init__()
        self.stride, self.new_channels = stride, new_channels

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad.

        Args:
            x: Features, (N, C, H, W).

        Returns:
            (N, C + new_channels, ⌈H / stride⌉, ⌈W / stride⌉), the size that a 3×3 convolution of this stride gives.
        """
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class CifarResNet(nn.Module):
    """The ResNet of 6n + 2 layers for small images: a 3×3 stem, three stages of n basic blocks, global pooling.

    Stages have 16, 32 and 64 channels; the second and third begin at stride 2. Shortcuts between stages are option A,
    as He et al. use for CIFAR: with n = 5 and 10 classes the network has 464,154 parameters, the 0.46 M of their
    table 6, where projections (option B) would make it 466,906. Any image size works; the stem does not pool.

    Convolutions start from He's normal distribution with variance 2 / fan-out, as in timm's ResNets, the classifier
    from torch's default, and every norm layer at weight 1 and bias 0: also the last one of a residual branch, which
    timm's ResNets start at weight 0, a practice younger than the paper. Norm layers are named `bn1` and `bn2` whatever
    their kind.

    Args:
        blocks_per_stage: n.
        num_classes: Width of the classifier; 0 for none.
        in_chans: Channels of the images.
        norm_layer: timm's name of a norm layer, such as `"batchnorm2d"`, or a class that takes the number of channels,
            `device` and `dtype`. timm's GroupNorm, by name or class, gets `GROUPS` groups.
        global_pool: timm's name of the pooling before the classifier.
    """

    def __init__(
        self,
        blocks_per_stage: int,
        num_classes: int = 10,
        in_chans: int = 3,
        norm_layer: str | Callable[..., nn.Module] = "batchnorm2d",
        global_pool: str = "avg",
    ):
        super().__init__()
        norm = _norm_class(norm_layer)
        stem, self.num_features = STAGE_CHANNELS[0], STAGE_CHANNELS[-1]
        self.conv1 = nn.Conv2d(in_chans, stem, kernel_size=3, padding=1, bias=False)
        self.bn1 = norm(stem)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _stage(stem, STAGE_CHANNELS[0], blocks_per_stage, norm)
        self.layer2 = _stage(STAGE_CHANNELS[0], STAGE_CHANNELS[1], blocks_per_stage, norm)
        self.layer3 = _stage(STAGE_CHANNELS[1], STAGE_CHANNELS[2], blocks_per_stage, norm)
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Replace pooling and classifier.

        Args:
            num_classes: Width of the new classifier; 0 for none.
            global_pool: timm's name of the pooling.
        """
        create_classifier = require_extra("timm.layers", "vision").create_classifier
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """Everything before the pooling.

        Args:
            x: Images, (N, C, H, W).

        Returns:
            (N, 64, ⌈H / 4⌉, ⌈W / 4⌉).
        """
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier.

        Args:
            x: What `forward_features` gives.
            pre_logits: Leave out the classifier.

        Returns:
            Logits (N, num_classes), or pooled features (N, 64).
        """
        x = self.global_pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: Images, (N, C, H, W).

        Returns:
            Logits, (N, num_classes).
        """
        return self.forward_head(self.forward_features(x))


def _stage(in_channels: int, channels: int, blocks: int, norm: Callable[..., nn.Module]) -> nn.Sequential:
    block = functools.partial(require_extra("timm.models.resnet", "vision").BasicBlock, norm_layer=norm)
    if in_channels == channels:
        first = block(channels, channels)
    else:
        first = block(in_channels, channels, stride=2, downsample=ZeroPadShortcut(2, channels - in_channels))
    return nn.Sequential(first, *(block(channels, channels) for _ in range(blocks - 1)))


def _norm_class(norm_layer: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    layers = require_extra("timm.layers", "vision")
    norm = layers.get_norm_layer(norm_layer)
    return functools.partial(norm, num_groups=GROUPS) if norm is layers.GroupNorm else norm


def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`CifarResNet` with 1 block a stage; 75,290 parameters with BatchNorm and 10 classes."""
    return _create("cifar_resnet8", 1, pretrained, **kwargs)


def cifar_resnet14(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`CifarResNet` with 2 blocks a stage; 172,506 parameters with BatchNorm and 10 classes."""
    return _create("cifar_resnet14", 2, pretrained, **kwargs)


def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`CifarResNet` with 3 blocks a stage; 269,722 parameters with BatchNorm and 10 classes."""
    return _create("cifar_resnet20", 3, pretrained, **kwargs)


def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`CifarResNet` with 5 blocks a stage; 464,154 parameters with BatchNorm and 10 classes."""
    return _create("cifar_resnet32", 5, pretrained, **kwargs)


def _create(name: str, blocks_per_stage: int, pretrained: bool, **kwargs: Any) -> CifarResNet:
    build = require_extra("timm.models", "vision").build_model_with_cfg
    return build(CifarResNet, name, pretrained, blocks_per_stage=blocks_per_stage, **kwargs)


_CIFAR_RESNETS = (cifar_resnet8, cifar_resnet14, cifar_resnet20, cifar_resnet32)

# timm reads this name from the module of a function that is registered. Mean and standard deviation are CIFAR-10's.
default_cfgs = {
    function.__name__: {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2023, 0.1994, 0.2010),
        "first_conv": "conv1",
        "classifier": "fc",
    }
    for function in _CIFAR_RESNETS
}


def register_cifar_resnets() -> None:
    """Make `timm.create_model` know `cifar_resnet8`, `14`, `20` and `32`; a second call does nothing.

    `build_image_model` calls it. Call it before `from_pretrained` of a saved CIFAR ResNet in a new process.
    """
    models = require_extra("timm.models", "vision")
    for function in _CIFAR_RESNETS:
        if not models.is_model(function.__name__):
            models.register_model(function)


def build_image_model(
    name: str,
    num_classes: int,
    *,
    norm: str | None = None,
    in_chans: int = 3,
    pretrained: bool = False,
    image_size: int | None = None,
) -> "TimmWrapperForImageClassification":
    """Build a timm model that takes `pixel_values` and `labels` and gives a loss and logits, for the stock Trainer.

    The result is transformers' own wrapper: save it with `save_pretrained`, load it again with
    `AutoModelForImageClassification.from_pretrained` (after `register_cifar_resnets()` if it is one of those). Its
    loss is the mean cross-entropy, which the Trainer divides by the accumulation steps as it should.

    The weights start as timm's do. The wrapper's own constructor would draw all convolutions anew, from a normal
    distribution of standard deviation 0.02 at any width; and it builds no pretrained model.

    Args:
        name: A timm model, with or without a tag: `"cifar_resnet32"`, `"resnet50"`, `"resnet50.a1_in1k"`.
        num_classes: Number of classes, at least 2.
        norm: `"batch"` or `"group"` normalisation; None for the model's own. Groups: `GROUPS` in the CIFAR ResNets,
            timm's default of 32 elsewhere.
        in_chans: Channels of the images.
        pretrained: Start from timm's weights, with a new classifier unless the number of classes is the same. They
            come from the Hub or its cache.
        image_size: Height and width in pixels, needed by models that are built for one size (such as ViT) where it is
            not their usual one; the others take any.

    Returns:
        The model, on the default device.

    Raises:
        UserError: If the name is unknown, an argument is out of range, the model cannot have that norm, or the
            pretrained weights do not exist or cannot be fetched.
    """
    timm = require_extra("timm", "vision")
    register_cifar_resnets()
    _check_numbers(num_classes=(num_classes, 2), in_chans=(in_chans, 1), image_size=(image_size, 1))
    _check_name(timm.models, name, pretrained)
    model_args = {"in_chans": in_chans}
    if image_size is not None and timm.models.get_pretrained_cfg_value(name, "fixed_input_size"):
        model_args["img_size"] = image_size
    model = _without_weights(name, num_classes, model_args)
    if norm is not None and _norm_kinds(model) != {norm}:
        _check_replaceable(model, name, norm, pretrained)
        model_args["norm_layer"] = _NORM_LAYERS[norm]
        model = _with_other_norm(name, norm, num_classes, model_args)
    try:
        model.timm_model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **model_args)
    except OSError as error:
        raise UserError(
            f"The pretrained weights of {name} could not be fetched ({type(error).__name__}: {error}). "
            "Connect to the Hub once so that they are cached, or start from random weights."
        ) from error
    return model


def _check_numbers(**numbers: tuple[int | None, int]) -> None:
    for what, (value, least) in numbers.items():
        if value is not None and not (isinstance(value, int) and value >= least):
            raise UserError(f"Invalid {what}: {value!r}. It must be an integer of at least {least}.")


def _check_name(models: ModuleType, name: str, pretrained: bool) -> None:
    known = {*models.list_models(), *models.list_models(include_tags=True)}
    if name not in known:
        close = difflib.get_close_matches(name, sorted(known), n=5)
        advice = f"Did you mean {', '.join(close)}?" if close else "timm.list_models('*resnet*') lists names."
        raise UserError(f"timm knows no model {name!r}. {advice}")
    if pretrained and not models.is_model_pretrained(name):
        tags = models.list_pretrained(f"{models.get_arch_name(name)}.*")
        advice = f"These exist: {', '.join(tags)}." if tags else "Start from random weights, or choose another model."
        raise UserError(f"There are no pretrained weights for {name}. {advice}")


def _without_weights(name: str, num_classes: int, model_args: dict[str, Any]) -> "TimmWrapperForImageClassification":
    # On the meta device the wrapper draws no weights, and so no random numbers either.
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    with torch.device("meta"):
        return TimmWrapperForImageClassification(
            TimmWrapperConfig(architecture=name, num_labels=num_classes, model_args=model_args)
        )


def _norm_kinds(model: nn.Module) -> set[str]:
    classes = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm}
    return {kind for kind, of_kind in classes.items() for module in model.modules() if isinstance(module, of_kind)}


def _check_replaceable(model: nn.Module, name: str, norm: str, pretrained: bool) -> None:
    if norm not in _NORM_LAYERS:
        raise UserError(f"Unknown norm {norm!r}. Choose from: {', '.join(_NORM_LAYERS)}; or leave it out.")
    own = " and ".join(sorted(_norm_kinds(model)))
    if not own:
        raise UserError(f"{name} has neither batch nor group norm layers that could be replaced. Leave norm out.")
    if pretrained:
        raise UserError(
            f"The pretrained weights of {name} belong to its {own} norm, not to {norm} norm. "
            "Leave norm out, or start from random weights."
        )


def _with_other_norm(
    name: str, norm: str, num_classes: int, model_args: dict[str, Any]
) -> "TimmWrapperForImageClassification":
    try:
        model = _without_weights(name, num_classes, model_args)
    except (TypeError, ValueError) as error:  # no such argument; or channels that 32 groups do not divide
        raise UserError(f"{name} cannot be built with {norm} norm ({error}). Leave norm out.") from error
    if _norm_kinds(model) != {norm}:
        raise UserError(f"{name} keeps norm layers of its own beside {norm} norm. Leave norm out.")
    return model

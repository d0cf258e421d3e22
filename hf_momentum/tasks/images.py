"""Labelled images as tensors, decoded once: from the Hub, a folder, or scikit-learn's digits."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_momentum.errors import UserError, require_extra
from hf_momentum.tasks.image_sources import EncodedData, EncodedImages, decode_image, read_image_dir, read_image_hub


@dataclass(frozen=True)
class ImageSet:
    """Images of one size with their classes.

    Attributes:
        pixels: uint8, N×C×H×W, from 0 to 255.
        labels: int64, N, indices of classes.
    """

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageData:
    """A data set of images, checked: one size, and every class in both splits.

    Attributes:
        name: Such as `"cifar10"`.
        source: Where the images come from, for people to read.
        classes: Names of the classes; a label is an index into them.
        train: The images to train on.
        test: The images to test on.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet


@dataclass(frozen=True)
class _Known:
    hub_id: str
    classes: tuple[str, ...]


_KNOWN = {
    "cifar10": _Known(
        "uoft-cs/cifar10",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    )
}
DIGITS = "digits"
DIGITS_TRAIN = 1437
"""So many of scikit-learn's 1,797 digits are for training: the first ones; the last 360 are for testing."""


def load_images(
    name: str = "cifar10",
    *,
    data_dir: str | Path | None = None,
    hub_id: str | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
) -> ImageData:
    """Load and decode the images of a data set: from `data_dir`, else from `hub_id`, else by name.

    `cifar10` is `uoft-cs/cifar10` on the Hub. `digits` is the demo, which needs no network: scikit-learn's 8×8 grey
    digits, their 17 levels spread over 0 to 255, the first 1,437 in its order to train on, the last 360 to test on.

    Args:
        name: `cifar10`, whose source must have 10 classes, `digits`, or with a source any name of your own.
        data_dir: A folder; see `read_image_dir` for its layouts.
        hub_id: `owner/name` or `owner/name:config` on the Hub; see `read_image_hub`.
        train_size: Decode no more than a subset of this size; see `subset`, with the seed 0.
        test_size: Likewise.

    Returns:
        The images. They are grey (C=1) if all of a split are, else RGB (C=3).

    Raises:
        UserError: If the name is unknown, the source missing or malformed, an image corrupt, or the images' sizes or
            the splits' classes differ.
    """
    if data_dir is not None and hub_id is not None:
        raise UserError(f"{name}: give a data folder or a Hub id, not both ({data_dir} and {hub_id}).")
    given = data_dir if data_dir is not None else hub_id
    if name == DIGITS:
        if given is not None:
            raise UserError(f"{DIGITS} come with scikit-learn, not from {given}. Give your own data another name.")
        digits, sizes = _load_digits(), {"train": train_size, "test": test_size}
        parts = {split: subset(getattr(digits, split), size, 0) for split, size in sizes.items() if size is not None}
        return replace(digits, **parts)
    if given is None and name not in _KNOWN:
        raise UserError(
            f"No images are known under the name {name!r}: give --data_dir FOLDER or a Hub id. "
            f"Known without: {', '.join([*_KNOWN, DIGITS])}."
        )
    encoded = read_image_dir(name, data_dir) if data_dir is not None else read_image_hub(hub_id or _KNOWN[name].hub_id)
    classes = _class_names(name, encoded)
    for split in (encoded.train, encoded.test):
        _check_labels(split, classes)
    train, test = (
        _decode_split(split, size) for split, size in ((encoded.train, train_size), (encoded.test, test_size))
    )
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        raise UserError(
            f"{encoded.source}: images to train on are {_shape(train.pixels)}, those to test on "
            f"{_shape(test.pixels)}. Both splits must have images of one size."
        )
    return ImageData(name, encoded.source, classes, train, test)


def _decode_split(split: EncodedImages, size: int | None) -> ImageSet:
    if size is not None:
        chosen = _balanced(torch.tensor(split.labels), size, seed=0).tolist()
        kept = {name: [getattr(split, name)[index] for index in chosen] for name in ("images", "labels", "names")}
        split = replace(split, **kept)
    return ImageSet(decode_images(split), torch.tensor(split.labels))


def decode_images(encoded: EncodedImages) -> Tensor:
    """Decode a split with Pillow.

    Args:
        encoded: The split.

    Returns:
        uint8, N×C×H×W. Images of mode L stay grey if all are; palettes and transparency become RGB.

    Raises:
        UserError: If an image is corrupt, has more than 8 bits per channel, or is not of the first one's size.
    """
    arrays: list[np.ndarray] = []
    for image, name in zip(encoded.images, encoded.names, strict=True):
        arrays.append(np.asarray(decode_image(image, name, grey=True)))
        if arrays[-1].shape[:2] != arrays[0].shape[:2]:
            size, first = ("×".join(map(str, array.shape[:2])) for array in (arrays[-1], arrays[0]))
            raise UserError(
                f"{name}: {size} pixels, but {encoded.names[0]} has {first}. All images must have one size here: "
                "resize them, or train with recipes/imagenet_resnet.py, which does so."
            )
    if any(array.ndim == 3 for array in arrays):
        arrays = [array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2) for array in arrays]
    stacked = torch.from_numpy(np.stack(arrays))
    return stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2).contiguous()


def subset(images: ImageSet, size: int, seed: int) -> ImageSet:
    """Draw a class-balanced subset, the same for the same seed on every platform.

    The images of each class are ordered by `random.Random(seed).random()`, and the first of each are taken: classes
    differ by at most one image, the lower-numbered ones having more. A larger subset holds a smaller one.

    Args:
        images: What is drawn from.
        size: Images of the subset.
        seed: Of the draw, 0 or more.

    Returns:
        The subset, in the order of `images`.

    Raises:
        UserError: If `size` is not positive, or a class has too few images for its share.
    """
    indices = _balanced(images.labels, size, seed)
    return ImageSet(images.pixels[indices], images.labels[indices])


def _balanced(labels: Tensor, size: int, seed: int) -> Tensor:
    classes, counts = labels.unique(return_counts=True)
    shares = [size // len(classes) + (place < size % len(classes)) for place in range(len(classes))]
    scarce = [int(label) for label, count, share in zip(classes, counts, shares, strict=True) if count < share]
    if size < 1 or scarce:
        most = int(counts.min()) * len(classes)
        raise UserError(
            f"A subset of {size} images cannot be drawn from {len(labels)} images in {len(classes)} classes"
            f"{f': class {scarce[0]} has only {counts[classes == scarce[0]].item()}' if scarce else ''}. "
            f"Choose a size from 1 to {most}, for which there are enough of every class."
        )
    draw = random.Random(seed).random
    order = torch.tensor([draw() for _ in labels], dtype=torch.float64).argsort()
    drawn = labels.cpu()[order]
    kept = [order[drawn == label][:share] for label, share in zip(classes.cpu(), shares, strict=True)]
    return torch.cat(kept).sort().values.to(labels.device)


def shrink(images: ImageSet, factor: int) -> ImageSet:
    """Average blocks of factor×factor pixels to one, rounded to the nearest whole number (halves up).

    Args:
        images: Images with a height and width that `factor` divides.
        factor: How many times smaller the sides become, at least 1.

    Returns:
        The smaller images, with the same labels.

    Raises:
        UserError: If `factor` is not positive or does not divide the height and the width.
    """
    height, width = images.pixels.shape[2:]
    if factor < 1 or height % factor or width % factor:
        raise UserError(f"Images of {height}×{width} pixels cannot be shrunk by {factor}: it must divide both sides.")
    count = factor * factor
    total = torch.full_like(images.pixels[..., ::factor, ::factor], count // 2, dtype=torch.int32)
    for row in range(factor):
        for column in range(factor):
            total += images.pixels[..., row::factor, column::factor]
    return ImageSet((total // count).to(torch.uint8), images.labels)


def _load_digits() -> ImageData:
    digits = require_extra("sklearn.datasets", "vision").load_digits()
    levels = torch.from_numpy(digits.images)[:, None]  # whole numbers from 0 to 16
    pixels, labels = (levels * 255 / 16).round().to(torch.uint8), torch.from_numpy(digits.target).long()
    train, test = (ImageSet(pixels[part], labels[part]) for part in (slice(DIGITS_TRAIN), slice(DIGITS_TRAIN, None)))
    names = tuple(str(name) for name in digits.target_names)
    return ImageData(DIGITS, "digits of scikit-learn (demo)", names, train, test)


def _class_names(name: str, encoded: EncodedData) -> tuple[str, ...]:
    train, test = encoded.train, encoded.test
    if train.classes and test.classes and train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes)) or [*train.classes]
        raise UserError(
            f"{train.where} has {len(train.classes)} classes, {test.where} has {len(test.classes)}: both splits need "
            f"the same ones, in the same order. They differ in: {', '.join(differing[:10])}."
        )
    expected = _KNOWN[name].classes if name in _KNOWN else None
    classes = train.classes or test.classes or expected
    if classes is None:
        classes = tuple(str(label) for label in range(max(train.labels, default=-1) + 1))
    if expected is not None and len(classes) != len(expected):
        raise UserError(
            f"{name} has {len(expected)} classes, but {encoded.source} has {len(classes)}. "
            "Give other data a name of its own."
        )
    return classes


def _check_labels(split: EncodedImages, classes: Sequence[str]) -> None:
    if not split.labels:
        raise UserError(f"{split.where} holds no image.")
    for label, name in zip(split.labels, split.names, strict=True):
        if label < 0:
            raise UserError(f"{name}: the image is not labelled. Every image needs its class's index, from 0.")
        if label >= len(classes):
            raise UserError(f"{name}: label {label}, but the {len(classes)} classes go from 0 to {len(classes) - 1}.")
    missing = [classes[label] for label in sorted(set(range(len(classes))) - set(split.labels))]
    if missing:
        raise UserError(
            f"{split.where} has images of {len(classes) - len(missing)} of the {len(classes)} classes. "
            f"Both splits need all; missing: {', '.join(missing[:10])}{', …' if len(missing) > 10 else ''}."
        )


def _shape(pixels: Tensor) -> str:
    channels, height, width = pixels.shape[1:]
    return f"{channels} channels of {height}×{width} pixels"

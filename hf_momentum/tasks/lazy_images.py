"""Images decoded when a batch needs them, with timm's augmentation, for the stock Trainer."""

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from hf_momentum.errors import UserError, require_extra
from hf_momentum.tasks.image_sources import decode_image
from hf_momentum.tasks.image_streams import FolderRows, StreamRows, TableRows

if TYPE_CHECKING:
    import PIL.Image

Transform = Callable[["PIL.Image.Image"], Tensor]


def image_transforms(
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    auto_augment: str | None = None,
) -> tuple[Transform, Transform]:
    """The transforms of timm to train and to evaluate with.

    To train: a random part of 8 to 100% of the area and of aspect ratio 3/4 to 4/3, resized, and a flip with
    probability ½. To evaluate: the shorter side resized to size·256/224, then the centre.

    Args:
        size: Height and width of what the model sees, in pixels.
        mean: Per channel, of pixels in [0, 1].
        std: The same.
        auto_augment: A policy in timm's notation, such as `rand-m9-mstd0.5`; None for none.

    Returns:
        Two functions from an RGB image to a float tensor 3×size×size.

    Raises:
        UserError: If the size is not positive or timm does not know the policy.
    """
    if size < 1:
        raise UserError(f"The image size must be at least 1 pixel, not {size}.")
    create = require_extra("timm.data", "vision").create_transform
    common = {"input_size": (3, size, size), "mean": tuple(mean), "std": tuple(std), "interpolation": "bilinear"}
    test = create(**common, is_training=False, crop_pct=224 / 256)
    try:
        train = create(**common, is_training=True, color_jitter=None, auto_augment=auto_augment)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            f"timm knows no augmentation policy {auto_augment!r} ({error}). Try rand-m9-mstd0.5, v0 or augmix-m3-w3."
        ) from error
    return train, test


def model_statistics(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What a timm model's images are normalised with.

    Args:
        model: From `build_image_model`.

    Returns:
        Mean and standard deviation per channel, of pixels in [0, 1]; ImageNet's unless timm has others for the model.
    """
    data, own = require_extra("timm.data", "vision"), model.timm_model.pretrained_cfg or {}
    usual = {"mean": data.IMAGENET_DEFAULT_MEAN, "std": data.IMAGENET_DEFAULT_STD}
    return tuple(tuple(own.get(key) or default) for key, default in usual.items())


class MappedImages(Dataset):
    """Examples decoded one by one; random augmentation is a function of seed, epoch and index.

    It therefore depends neither on the number of workers or processes nor on a resume. The epoch has to be announced
    (`EpochCallback` in a Trainer), also to workers that are already running, for which it lies in shared memory.

    Args:
        rows: The images.
        num_classes: Labels lie in [0, num_classes).
        transform: From `image_transforms`.
        seed: Of the augmentation; None if the transform has none.
    """

    def __init__(
        self, rows: FolderRows | TableRows, num_classes: int, transform: Transform, *, seed: int | None = None
    ):
        self.rows, self.num_classes, self.transform, self.seed = rows, num_classes, transform, seed
        self._epoch = torch.tensor(-1).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Announce the epoch that begins.

        Args:
            epoch: Its number, from 0.
        """
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example.

        Args:
            index: From 0.

        Returns:
            `pixel_values`, float32 3×H×W, and `labels`, an int.
        """
        entropy = None if self.seed is None else (self.seed, _announced(self._epoch), index)
        return _example(*self.rows[index], self.num_classes, self.transform, entropy)


class StreamedImages(IterableDataset):
    """This process's part of a stream, equally long on all processes.

    Every process reads files (or row groups) of its own, and so does each of its workers. An epoch is
    `size // (processes · batch_size)` micro-batches on each: a process with fewer images sees some of them twice, one
    with more leaves some out, others in each epoch. Order and augmentation are functions of seed, epoch, and the
    process and worker that read. A resumed epoch is read again up to where it stopped.

    accelerate puts its `IterableDatasetShard` around the stream, which keeps every `processes`-th micro-batch of what
    it gets. So in between, in the places of the other processes, the stream yields None; with a dispatching loader
    (accelerate's default for streams) these would be read: set `dispatch_batches` to False.

    Args:
        rows: The whole stream.
        num_classes: Labels lie in [0, num_classes).
        transform: From `image_transforms`.
        size: Images of an epoch, over all processes.
        batch_size: Images of a micro-batch.
        seed: Of the order and the augmentation.
        processes: Number of processes.
        process: Which of them this is, from 0.
        workers: Loading processes of each.

    Raises:
        UserError: If there are fewer files and row groups than processes × workers, or an epoch has no batch.
    """

    def __init__(
        self,
        rows: StreamRows,
        num_classes: int,
        transform: Transform,
        *,
        size: int,
        batch_size: int,
        seed: int = 0,
        processes: int = 1,
        process: int = 0,
        workers: int = 0,
    ):
        if size < processes * batch_size:
            raise UserError(f"{size} training images do not fill a micro-batch of {batch_size} on each process.")
        self._rows = rows.part(process, processes, max(1, workers), seed)
        self.num_classes, self.transform, self.seed = num_classes, transform, seed
        self.batch_size, self.processes, self.process = batch_size, processes, process
        self._batches = size // (processes * batch_size)
        self._epoch = torch.tensor(-1).share_memory_()

    def __len__(self) -> int:
        return self._batches * self.batch_size * self.processes

    def set_epoch(self, epoch: int) -> None:
        """Announce the epoch that begins, also to workers that are already running.

        Args:
            epoch: Its number, from 0.
        """
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        examples = self._examples(number)
        for _ in range(number, self._batches, workers):
            yield from itertools.repeat(None, self.process * self.batch_size)
            yield from itertools.islice(examples, self.batch_size)
            yield from itertools.repeat(None, (self.processes - 1 - self.process) * self.batch_size)

    def _examples(self, worker: int) -> Iterator[dict[str, Any]]:
        epoch = _announced(self._epoch)
        for count, row in enumerate(self._rows.epoch(epoch)):
            yield _example(*row, self.num_classes, self.transform, (self.seed, epoch, self.process, worker, count))


def _announced(epoch: Tensor) -> int:
    if epoch < 0:
        raise UserError(
            "The augmentation depends on the epoch, which was not announced: add EpochCallback() to the Trainer's "
            "callbacks, or call set_epoch(epoch) before each epoch of a loop of your own."
        )
    return int(epoch)


def _example(
    image: bytes | str,
    label: int,
    name: str,
    num_classes: int,
    transform: Transform,
    entropy: tuple[int, ...] | None,
) -> dict[str, Any]:
    if not 0 <= label < num_classes:
        raise UserError(
            f"{name}: unknown label {label}. With {num_classes} classes, labels are 0 to {num_classes - 1}."
        )
    decoded = decode_image(image, name)
    with contextlib.nullcontext() if entropy is None else _seeded(entropy):
        return {"pixel_values": transform(decoded), "labels": label}


@contextlib.contextmanager
def _seeded(entropy: tuple[int, ...]) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch, from which timm draws; put them back afterwards.

    Args:
        entropy: Non-negative numbers.

    Yields:
        Nothing.
    """
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

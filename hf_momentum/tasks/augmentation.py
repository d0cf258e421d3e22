"""Random crops and flips of whole batches of images, without a loop over them."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from hf_momentum.errors import UserError
from hf_momentum.tasks.images import ImageData, ImageSet

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
"""Per channel, of pixels in [0, 1]: what training on CIFAR-10 commonly subtracts."""

CIFAR10_STD = (0.2023, 0.1994, 0.2010)
"""What it commonly divides by: the standard deviation within an image, averaged over the images. That of all pixels
is 0.247, 0.243, 0.262."""


def channel_statistics(images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, taken to be in [0, 1].

    Args:
        images: Any images.

    Returns:
        Mean and (population) standard deviation, C numbers each.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.pixels.unbind(dim=1):
        shares = torch.bincount(channel.flatten(), minlength=256).cpu().double() / channel.numel()
        means.append(float(shares @ levels))
        stds.append(float((shares @ (levels - means[-1]) ** 2).sqrt()))
    return tuple(means), tuple(stds)


def normalisation(data: ImageData) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What to normalise a data set with.

    Args:
        data: The data set.

    Returns:
        Mean and standard deviation per channel: the constants for `cifar10`, else `channel_statistics` of `train`.
    """
    return (CIFAR10_MEAN, CIFAR10_STD) if data.name == "cifar10" else channel_statistics(data.train)


class AugmentedImages(Dataset):
    """Images as normalised float batches; with padding and flip, a new random crop and flip of each in every epoch.

    An image is padded with black, a window of its own size is cut out at one of the (2·padding+1)² places, and it is
    mirrored left to right with probability ½; then `(pixel/255 − mean)/std`. All of an epoch's draws are made at once
    and depend on nothing but seed, epoch and the example's index: neither on the batch size nor on the number of
    workers or processes, and they are the same after a resume.

    The epoch must therefore be known: with augmentation, `set_epoch` is called before the first batch of every epoch.
    In a Trainer, `EpochCallback` does so; a batch of an epoch that was never announced is an error. The number is in
    shared memory, so that it reaches workers that were started earlier.

    A batch is made as a whole, so the DataLoader needs `collate_fn=collate`, a Trainer `data_collator=collate` and
    `TrainingArguments(remove_unused_columns=False)`. Workers are right but seldom worth it: to make a batch costs less
    than to hand it from one process to another. To evaluate, wrap the images once more, without augmentation.

    Args:
        images: On the CPU, or on an accelerator (without workers, and with `dataloader_pin_memory=False`); batches are
            made where the images are.
        mean: C numbers, for pixels in [0, 1].
        std: C positive numbers.
        padding: Black pixels on each side; 0 for no crops.
        flip: Whether images are mirrored at random.
        seed: Of all draws, 0 or more.
        batch_size: Makes the length a multiple of it, so that an epoch has whole batches alone: each epoch leaves out
            other images. (A Trainer's `dataloader_drop_last` would leave out test images too.)

    Raises:
        UserError: If a number is out of range, there is no whole batch, or `mean` and `std` do not have C numbers.
    """

    def __init__(
        self,
        images: ImageSet,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        padding: int = 0,
        flip: bool = False,
        seed: int = 0,
        batch_size: int = 1,
    ):
        channels, number = images.pixels.shape[1], len(images.labels)
        if padding < 0 or seed < 0:
            raise UserError(f"padding and seed must be 0 or more, not {padding} and {seed}.")
        if not 1 <= batch_size <= number:
            raise UserError(f"batch_size must be from 1 to the number of images, {number}, not {batch_size}.")
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise UserError(
                f"Images with {channels} channels need {channels} means and as many positive standard deviations, not "
                f"{[*mean]} and {[*std]}."
            )
        self.images, self.padding, self.flip, self.seed = images, padding, flip, seed
        self._length = number // batch_size * batch_size
        padded = pad(images.pixels, (padding,) * 4).permute(0, 2, 3, 1).contiguous()
        self._strides = padded.stride()
        # Entry s is the H×W×C window whose first pixel begins at byte s of the padded images: a crop is one index.
        height, width = images.pixels.shape[2:]
        shape, strides = (height, width, channels), self._strides[1:]
        # A row of means is several times as fast as one mean per channel: its sums run over contiguous memory.
        self._means, self._stds = (
            torch.tensor(values, dtype=torch.float32, device=images.pixels.device).repeat(width, 1)
            for values in (mean, std)
        )
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        self._windows = padded.as_strided((padded.numel() - last, *shape), (1, *strides))
        self._epoch = torch.tensor(-1).share_memory_()
        self._drawn_epoch: int | None = None
        self._starts, self._flips = self._place(0, 0), torch.zeros_like(images.labels)
        self._order: Tensor | None = None

    def __len__(self) -> int:
        return self._length

    @property
    def _random(self) -> bool:
        return bool(self.padding or self.flip or self._length < len(self.images.labels))

    def set_epoch(self, epoch: int) -> None:
        """Announce the epoch that begins, also to workers that are already running.

        Args:
            epoch: Its number, from 0.
        """
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One example.

        Args:
            index: From 0.

        Returns:
            `pixel_values`, float32 C×H×W, and `labels`, a scalar.
        """
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch, as a DataLoader asks for it.

        Args:
            indices: The examples, b of them, from 0.

        Returns:
            `pixel_values`, float32 b×C×H×W with the channels last in memory, as convolutions on CPU and GPU like it,
            and `labels`, int64 b.

        Raises:
            UserError: If something depends on the epoch and it was never announced.
        """
        chosen = torch.as_tensor(indices, device=self.images.labels.device)
        if self._random:
            self._draw()
            chosen = chosen if self._order is None else self._order[chosen]
        labels = self.images.labels[chosen]
        pixels = self._windows.index_select(0, self._starts[chosen])
        if self.flip:
            size = len(chosen)
            both = torch.cat([pixels, pixels.flip(-2)])
            pixels = both.index_select(0, torch.arange(size, device=both.device) + size * self._flips[chosen])
        values = pixels.float().div_(255).sub_(self._means).div_(self._stds)
        return {"pixel_values": values.permute(0, 3, 1, 2), "labels": labels}

    def _draw(self) -> None:
        epoch = int(self._epoch)
        if epoch == self._drawn_epoch:
            return
        if epoch < 0:
            raise UserError(
                "The random draws depend on the epoch, which was not announced: add EpochCallback() to the "
                "Trainer's callbacks, or call set_epoch(epoch) before each epoch of a loop of your own."
            )
        random = np.random.default_rng([self.seed, epoch])
        number = len(self.images.labels)
        y, x = random.integers(2 * self.padding + 1, size=(2, number))
        flips = random.integers(2, size=number)
        if self._length < number:
            self._order = torch.from_numpy(random.permutation(number)[: self._length]).to(self.images.labels.device)
        self._starts = self._place(*(torch.from_numpy(offset) for offset in (y, x)))
        self._flips = torch.from_numpy(flips).to(self._starts.device)
        self._drawn_epoch = epoch

    def _place(self, y: Tensor | int, x: Tensor | int) -> Tensor:
        """The windows of all images at their offsets, in pixels from the upper left corner of the padded image."""
        image_stride, row_stride, pixel_stride, _ = self._strides
        starts = torch.arange(len(self.images.labels)) * image_stride + y * row_stride + x * pixel_stride
        return starts.to(self.images.pixels.device)


def collate(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Pass on a batch that was made as a whole: the data collator for `AugmentedImages`.

    Args:
        batch: The batch.

    Returns:
        The same.

    Raises:
        UserError: If it is no batch, as where the Trainer looks for unused columns in it.
    """
    if not isinstance(batch, Mapping):
        raise UserError(
            f"Expected a batch of images made as a whole, got {type(batch).__name__}. In a Trainer, set "
            "TrainingArguments(remove_unused_columns=False); elsewhere use a DataLoader over AugmentedImages."
        )
    return batch

"""Crops and flips of whole batches: torchvision's images and odds, and the same draws however they are asked for."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from scipy.stats import chisquare
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainingArguments

from hf_momentum.errors import UserError
from hf_momentum.tasks.augmentation import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    AugmentedImages,
    channel_statistics,
    collate,
    normalisation,
)
from hf_momentum.tasks.images import ImageSet, load_images
from hf_momentum.training.callbacks.epoch import EpochCallback

HEIGHT, WIDTH = 5, 7


def random_images(count: int = 12, channels: int = 3) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, channels, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count) % 3)


def augmented(images: ImageSet, epoch: int | None = 0, padding: int = 2, flip: bool = True, seed: int = 0):
    channels = images.pixels.shape[1]
    data = AugmentedImages(
        images, CIFAR10_MEAN[:channels], CIFAR10_STD[:channels], padding=padding, flip=flip, seed=seed
    )
    if epoch is not None:
        data.set_epoch(epoch)
    return data


def all_of(data: AugmentedImages) -> torch.Tensor:
    return data.__getitems__(range(len(data)))["pixel_values"]


# The images


def torchvision_variants(image: torch.Tensor, padding: int) -> dict[tuple[int, int, bool], torch.Tensor]:
    """Every crop and flip of one image through torchvision's own functions."""
    transforms = pytest.importorskip("torchvision.transforms.functional", reason="needs the vision extra")
    pil = transforms.to_pil_image(image)
    variants = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = transforms.crop(transforms.pad(pil, padding), top, left, HEIGHT, WIDTH)
            for flip in (False, True):
                tensor = transforms.to_tensor(transforms.hflip(crop) if flip else crop)
                variants[top, left, flip] = transforms.normalize(tensor, CIFAR10_MEAN, CIFAR10_STD)
    return variants


def test_every_variant_is_torchvisions_to_the_bit():
    images = random_images(2)
    variants = [torchvision_variants(image, padding=2) for image in images.pixels]
    seen = set()
    for epoch in range(250):
        for index, pixels in enumerate(all_of(augmented(images, epoch))):
            same = [key for key, variant in variants[index].items() if torch.equal(variant, pixels)]
            assert len(same) == 1
            seen.update(same)
    assert len(seen) == 5 * 5 * 2


def test_without_augmentation_it_is_to_tensor_and_normalise():
    images = random_images()
    plain = augmented(images, epoch=None, padding=0, flip=False)
    expected = torch.stack([torchvision_variants(image, padding=0)[0, 0, False] for image in images.pixels])
    batch = plain.__getitems__([5, 0, 5])
    assert torch.equal(batch["pixel_values"], expected[[5, 0, 5]])
    assert torch.equal(batch["labels"], images.labels[[5, 0, 5]])
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
    assert batch["pixel_values"].dtype == torch.float32


def test_grey_images_slices_and_single_examples():
    whole = random_images(channels=1)
    images = ImageSet(whole.pixels[4:], whole.labels[4:])  # a view that does not start its storage
    data = augmented(images, padding=0, flip=False)
    assert torch.equal(data[3]["pixel_values"], all_of(augmented(whole, padding=0, flip=False))[7])
    assert data[3]["labels"] == whole.labels[7] and len(data) == 8
    assert [int(example["labels"]) for example in data] == images.labels.tolist()  # ends by an IndexError


# The odds


def code(count: int) -> ImageSet:
    """Each pixel's value says where it was (1 and up), so that a crop and flip can be read off two pixels."""
    positions = torch.arange(1, HEIGHT * WIDTH + 1, dtype=torch.uint8).view(1, 1, HEIGHT, WIDTH)
    return ImageSet(positions.repeat(count, 1, 1, 1), torch.zeros(count).long())


def read_offsets(crops: torch.Tensor, padding: int) -> torch.Tensor:
    """The variant's number of every crop, from the pixels in its middle, which the padding never reaches."""
    row, column = HEIGHT // 2, WIDTH // 2
    here, right = crops[:, 0, row, column].long() - 1, crops[:, 0, row, column + 1].long() - 1
    flips = (right < here).long()
    top = here // WIDTH - row + padding
    left = here % WIDTH - torch.where(flips == 1, WIDTH - 1 - column, column) + padding
    return (top * (2 * padding + 1) + left) * 2 + flips


def test_odds_are_uniform_and_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms", reason="needs the vision extra")
    padding, count = 2, 20_000
    data = augmented(code(count), padding=padding, seed=3)
    crops = (all_of(data) * CIFAR10_STD[0] + CIFAR10_MEAN[0]).mul(255).round()
    ours = read_offsets(crops, padding).bincount(minlength=50)
    assert chisquare(ours).pvalue > 1e-3 and len(ours) == 50
    pipeline = transforms.Compose(
        [
            transforms.RandomCrop((HEIGHT, WIDTH), padding=padding),
            transforms.RandomHorizontalFlip(),
        ]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.stack([pipeline(image) for image in data.images.pixels[:5000]])
    theirs = read_offsets(theirs, padding).bincount(minlength=50)
    assert chisquare(theirs).pvalue > 1e-3 and len(theirs) == 50  # the same reading finds the same law


def test_draws_of_neighbours_epochs_and_seeds_are_independent():
    images = code(10_000)

    def variants(epoch: int, seed: int) -> np.ndarray:
        crops = all_of(augmented(images, epoch, seed=seed)) * CIFAR10_STD[0] + CIFAR10_MEAN[0]
        return read_offsets(crops.mul(255).round(), 2).numpy()

    first = variants(0, 0)
    for other in (variants(1, 0), variants(0, 1), variants(1, 1), np.roll(first, 1)):
        assert abs((first == other).mean() - 1 / 50) < 0.006  # 4 standard deviations
    assert not np.array_equal(variants(1, 0), variants(0, 1))


# The epoch


@pytest.mark.parametrize("settings", [{"padding": 2, "flip": False}, {"padding": 0, "flip": True}])
def test_an_epoch_that_was_not_announced_is_refused(settings):
    with pytest.raises(UserError, match=r"add EpochCallback\(\).*or call set_epoch"):
        augmented(random_images(), epoch=None, **settings)[0]


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_batches_do_not_depend_on_batch_size_and_workers(workers, persistent):
    data = augmented(random_images())
    loader = DataLoader(data, batch_size=5, num_workers=workers, persistent_workers=persistent, collate_fn=collate)
    for epoch in (0, 1, 2, 0):
        data.set_epoch(epoch)
        batches = [batch["pixel_values"] for batch in loader]
        assert [len(batch) for batch in batches] == [5, 5, 2]
        assert torch.equal(torch.cat(batches), all_of(augmented(random_images(), epoch)))


def test_spawned_workers_copies_and_subsets():
    data = augmented(random_images(), epoch=1)
    spawned = DataLoader(data, batch_size=12, num_workers=1, multiprocessing_context="spawn", collate_fn=collate)
    part = DataLoader(Subset(data, [3, 4]), batch_size=2, collate_fn=collate)
    assert torch.equal(next(iter(spawned))["pixel_values"], all_of(data))
    assert torch.equal(next(iter(part))["pixel_values"], all_of(data)[3:5])
    for clone in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert torch.equal(all_of(clone), all_of(data))


# In a Trainer


class Watcher(nn.Module):
    """A linear model that keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(3 * HEIGHT * WIDTH, 3), []

    def forward(self, pixel_values, labels=None):
        self.seen.append(pixel_values.clone())
        logits = self.linear(pixel_values.flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train(folder, resume=None, callbacks=None, data=None, **changes) -> list[torch.Tensor]:
    """Three epochs of three steps of two micro-batches, saved after the fifth step; what the model was shown."""
    settings = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 5,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    trainer = Trainer(
        model=Watcher(),
        args=TrainingArguments(str(folder), **settings | changes),
        train_dataset=augmented(random_images(), epoch=None) if data is None else data,
        data_collator=collate,
        callbacks=[EpochCallback()] if callbacks is None else callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.seen


def by_image(batches: list[torch.Tensor], epoch: int) -> list[int]:
    """The indices of the images shown, found by comparing with all of the epoch's."""
    expected = all_of(augmented(random_images(), epoch)).flatten(1)
    return [int((expected == row).all(dim=1).nonzero()) for row in torch.cat(batches).flatten(1)]


def test_each_epoch_shows_its_own_draws(tmp_path):
    seen = train(tmp_path)
    orders = [by_image(seen[6 * epoch : 6 * epoch + 6], epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(12)) for order in orders) and orders[0] != orders[1]


def test_resumed_part_way_it_goes_on_with_the_same_batches(tmp_path):
    seen = train(tmp_path / "whole")
    for workers in ({}, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}):
        resumed = train(tmp_path / f"again{len(workers)}", str(tmp_path / "whole" / "checkpoint-5"), **workers)
        assert len(resumed) == 8
        assert all(torch.equal(a, b) for a, b in zip(resumed, seen[10:], strict=True))


def test_resumed_at_an_epochs_start(tmp_path):
    seen = train(tmp_path / "whole", save_steps=3)
    resumed = train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-6"))
    assert len(resumed) == 6
    assert all(torch.equal(a, b) for a, b in zip(resumed, seen[12:], strict=True))


def test_resumed_part_way_without_the_callback_it_is_refused(tmp_path):
    seen = train(tmp_path / "whole", callbacks=[])
    assert sorted(by_image(seen[6:12], epoch=1)) == list(range(12))  # accelerate alone, one process, from the start
    with pytest.raises(UserError, match="EpochCallback"):
        train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-5"), callbacks=[])


def test_unused_columns_removed_is_refused(tmp_path):
    with pytest.raises(UserError, match="remove_unused_columns=False"):
        train(tmp_path, remove_unused_columns=True)


def test_callback_on_other_data_is_refused(tmp_path):
    rows = [{"pixel_values": torch.zeros(3, HEIGHT, WIDTH), "labels": 0}] * 4
    with pytest.raises(UserError, match="set_epoch, which list lacks"):
        train(tmp_path, data=rows)


def shown_by_process(index: int, resume_at: int = 0) -> list[list[torch.Tensor]]:
    """Three epochs as the Trainer runs them in one of two processes, resumed after so many batches."""
    data = augmented(random_images(), epoch=None)
    torch.manual_seed(0)
    loader = DataLoader(data, batch_size=2, shuffle=True, collate_fn=collate)
    loader = prepare_data_loader(loader, num_processes=2, process_index=index, use_seedable_sampler=True)
    args, state = SimpleNamespace(gradient_accumulation_steps=1), SimpleNamespace(global_step=resume_at)
    callback = EpochCallback()
    callback.on_train_begin(args, state, None, train_dataloader=loader)
    epochs = []
    for epoch in range(resume_at // 3, 3):
        callback.on_epoch_begin(args, state, None, train_dataloader=loader)
        skipped = resume_at % 3 if not epochs else 0
        epoch_loader = skip_first_batches(loader, skipped) if skipped else loader
        epoch_loader.set_epoch(epoch)
        epochs.append([batch["pixel_values"] for batch in epoch_loader])
    return epochs


def test_two_processes_share_each_epoch_and_resume():
    shown = [shown_by_process(index) for index in (0, 1)]
    for epoch in range(3):
        assert sorted(by_image(shown[0][epoch] + shown[1][epoch], epoch)) == list(range(12))
    for index in (0, 1):
        resumed = shown_by_process(index, resume_at=4)
        expected = [shown[index][1][1:], shown[index][2]]
        assert [len(epoch) for epoch in resumed] == [2, 3]
        assert all(
            torch.equal(a, b) for x, y in zip(resumed, expected, strict=True) for a, b in zip(x, y, strict=True)
        )


# What it is normalised with, and bad settings


def test_statistics_are_those_of_all_pixels():
    images = random_images()
    mean, std = channel_statistics(images)
    levels = images.pixels.double() / 255
    assert torch.allclose(torch.tensor(mean).double(), levels.mean(dim=(0, 2, 3)))
    assert torch.allclose(torch.tensor(std).double(), levels.std(dim=(0, 2, 3), correction=0))
    data = AugmentedImages(images, mean, std)
    assert torch.allclose(all_of(data).std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def test_normalisation_by_name():
    digits = load_images("digits")
    assert normalisation(digits) == channel_statistics(digits.train)
    named = SimpleNamespace(name="cifar10", train=digits.train)
    assert normalisation(named) == (CIFAR10_MEAN, CIFAR10_STD)


@pytest.mark.parametrize(
    "changes",
    [{"mean": (0.5,)}, {"std": (0.5, 0.5)}, {"std": (0.5, 0.0, 0.5)}, {"padding": -1}, {"seed": -1}],
    ids=str,
)
def test_bad_settings_are_refused(changes):
    settings = {"mean": CIFAR10_MEAN, "std": CIFAR10_STD} | changes
    with pytest.raises(UserError, match=r"0 or more|3 channels need 3 means"):
        AugmentedImages(random_images(), **settings)

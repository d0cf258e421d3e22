"""Images from parquet, class folders, the Hub (local folders stand in for it) and scikit-learn."""

import io
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_momentum.errors import UserError
from hf_momentum.tasks import image_sources
from hf_momentum.tasks.images import ImageSet, load_images, shrink, subset

pytest.importorskip("torchvision", reason="needs the vision extra")
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("cat", "dog")
SPLITS = {"train": 6, "test": 4}


def picture(seed: int, shape=(5, 4, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format=kind)
    return stream.getvalue()


def labels_of(count: int) -> list[int]:
    return [index % 2 for index in range(count)]


def write_parquet(file: Path, images: list[bytes], labels: list, names=CLASSES, column="img") -> None:
    """As the Hub writes it: a struct of bytes and path, and the features in the schema's metadata."""
    table = pa.table(
        {
            column: pa.array([{"bytes": image, "path": f"{row}.png"} for row, image in enumerate(images)]),
            "label": pa.array(labels, pa.int64()),
        }
    )
    features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(names=[*names])})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.cast(features.arrow_schema) if names else table, file)


def write_splits(folder: Path, **changes) -> Path:
    for split, count in SPLITS.items():
        images = [encoded(picture(100 * (split == "test") + row)) for row in range(count)]
        write_parquet(folder / f"{split}.parquet", images, labels_of(count), **changes)
    return folder


def write_folders(folder: Path, test: str = "test") -> Path:
    for split, count in (("train", 6), (test, 4)):
        for row in range(count):
            file = folder / split / CLASSES[row % 2] / f"{row:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(picture(100 * (split != "train") + row)))
    return folder


def expected(rows, offset: int = 0) -> torch.Tensor:
    return torch.stack([torch.from_numpy(picture(offset + row)).permute(2, 0, 1) for row in rows])


# Sources


def test_parquet(tmp_path):
    data = load_images("pets", data_dir=write_splits(tmp_path))
    assert (data.name, data.classes) == ("pets", CLASSES)
    assert str(tmp_path) in data.source
    assert torch.equal(data.train.pixels, expected(range(6)))
    assert torch.equal(data.test.pixels, expected(range(4), offset=100))
    assert data.train.labels.tolist() == labels_of(6)
    assert data.train.pixels.dtype == torch.uint8 and data.train.labels.dtype == torch.int64
    assert data.train.pixels.is_contiguous()


def test_parquet_in_a_folder_of_its_name_in_shards_without_class_names(tmp_path):
    for split in SPLITS:
        for shard in range(2):
            images = [encoded(picture(10 * shard + row)) for row in range(2)]
            file = tmp_path / "pets" / f"{split}-0000{shard}-of-00002.parquet"
            write_parquet(file, images, labels_of(2), names=(), column="image")
    data = load_images("pets", data_dir=tmp_path)
    assert data.classes == ("0", "1")
    assert torch.equal(data.train.pixels, expected([0, 1, 10, 11]))
    assert data.train.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("test", ["test", "val"])
def test_class_folders(tmp_path, test):
    folder = write_folders(tmp_path, test)
    (folder / "train" / "cat" / "notes.txt").write_text("not an image")
    data = load_images("pets", data_dir=folder)
    assert data.classes == CLASSES
    assert torch.equal(data.train.pixels, expected([0, 2, 4, 1, 3, 5]))
    assert torch.equal(data.test.pixels, expected([0, 2, 1, 3], offset=100))
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_hub(tmp_path, monkeypatch):
    home = write_splits(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = load_images("pets", hub_id=str(home))
    assert data.source == f"Hub data set {home}" and data.classes == CLASSES
    assert torch.equal(data.train.pixels, expected(range(6)))
    assert torch.equal(data.test.pixels, expected(range(4), offset=100))


def test_cifar10_is_on_the_hub(monkeypatch):
    def asked(path, config):
        raise ValueError(f"asked for {path}")

    monkeypatch.setattr(datasets, "load_dataset", asked)
    with pytest.raises(UserError, match=r"asked for uoft-cs/cifar10.*--data_dir"):
        load_images()


def test_digits():
    data = load_images("digits")
    assert data.name == "digits" and data.classes == tuple("0123456789")
    assert data.train.pixels.shape == (1437, 1, 8, 8) and data.test.pixels.shape == (360, 1, 8, 8)
    levels = image_sources.require_extra("sklearn.datasets", "text").load_digits().images
    assert torch.equal(data.train.pixels[7, 0], torch.from_numpy((levels[7] * 255 / 16).round()).byte())
    assert int(data.train.pixels.max()) == 255 and int(data.test.labels.bincount().min()) >= 33
    with pytest.raises(UserError, match="another name"):
        load_images("digits", data_dir="x")


# Decoding


def test_jpeg_is_what_pillow_decodes(tmp_path):
    jpeg = encoded(picture(0, (32, 32, 3)), "JPEG")
    for split in SPLITS:
        write_parquet(tmp_path / f"{split}.parquet", [jpeg] * 2, labels_of(2))
    decoded = load_images("pets", data_dir=tmp_path).train.pixels[1]
    assert torch.equal(decoded.permute(1, 2, 0), torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg)))))
    assert not torch.equal(decoded.permute(1, 2, 0), torch.from_numpy(picture(0, (32, 32, 3))))


def test_grey_stays_grey_unless_some_are_coloured(tmp_path):
    grey, colour = picture(0, (5, 4)), picture(1)
    for folder, second in (("grey", grey), ("mixed", colour)):
        for split in SPLITS:
            write_parquet(tmp_path / folder / f"{split}.parquet", [encoded(grey), encoded(second)], [0, 1])
    assert torch.equal(load_images("x", data_dir=tmp_path / "grey").train.pixels[0, 0], torch.from_numpy(grey))
    mixed = load_images("x", data_dir=tmp_path / "mixed").train.pixels
    assert torch.equal(mixed[0], torch.from_numpy(grey).expand(3, -1, -1))
    assert torch.equal(mixed[1], torch.from_numpy(colour).permute(2, 0, 1))


def test_transparency_becomes_rgb(tmp_path):
    picture_with_alpha = picture(0, (5, 4, 4))
    for split in SPLITS:
        write_parquet(tmp_path / f"{split}.parquet", [encoded(picture_with_alpha)] * 2, [0, 1])
    pixels = load_images("x", data_dir=tmp_path).train.pixels
    assert torch.equal(pixels[0], torch.from_numpy(picture_with_alpha[..., :3]).permute(2, 0, 1))


# What is wrong with the input


def damaged(image: bytes) -> dict[str, bytes]:
    return {"empty": b"", "text": b"not an image", "cut": image[: len(image) // 2], "header": image[:12]}


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "header"])
def test_corrupt_image_names_file_and_row(tmp_path, kind, damage):
    write_splits(tmp_path)
    images = [encoded(picture(row, (32, 32, 3)), kind) for row in range(4)]
    images[2] = damaged(images[2])[damage]
    write_parquet(tmp_path / "train.parquet", images, labels_of(4))
    with pytest.raises(UserError, match=r"train\.parquet, row 2 \(2\.png\): the image is corrupt"):
        load_images("pets", data_dir=tmp_path)


def test_every_damage_to_a_png_is_a_user_error_or_decodes(tmp_path):
    from hf_momentum.tasks.image_sources import decode_image

    image, generator = encoded(picture(0, (8, 8, 3))), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        copy = bytearray(image)
        copy[generator.integers(len(copy))] = generator.integers(256)
        try:
            decode_image(bytes(copy), "row")
        except UserError as error:
            assert str(error).startswith("row: ") and "0x" not in str(error)  # no place in memory
            refused += 1
    assert refused > 100


def test_corrupt_file_is_named(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "train" / "dog" / "03.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"train/dog/03\.png: the image is corrupt"):
        load_images("pets", data_dir=tmp_path)


def test_missing_image_names_the_row(tmp_path):
    write_splits(tmp_path)
    table = pa.table({"img": pa.array([{"bytes": b"x", "path": "0"}, None]), "label": [0, 1]})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match="row 1: there is no image"):
        load_images("pets", data_dir=tmp_path)


def test_sixteen_bits_are_refused(tmp_path):
    write_splits(tmp_path)
    deep = encoded(np.zeros((5, 4), dtype=np.uint16))
    write_parquet(tmp_path / "test.parquet", [deep, deep], [0, 1])
    with pytest.raises(UserError, match=r"test\.parquet, row 0.*8 bits"):
        load_images("pets", data_dir=tmp_path)


def test_sizes_differ_within_a_split(tmp_path):
    write_splits(tmp_path)
    images = [encoded(picture(0)), encoded(picture(0, (5, 6, 3)))]
    write_parquet(tmp_path / "train.parquet", images, [0, 1])
    with pytest.raises(UserError, match=r"row 1 .*: 5×6 pixels, but .*row 0 .* has 5×4.*imagenet_resnet"):
        load_images("pets", data_dir=tmp_path)


def test_sizes_differ_between_splits(tmp_path):
    write_splits(tmp_path)
    write_parquet(tmp_path / "test.parquet", [encoded(picture(0, (6, 6, 3)))] * 2, [0, 1])
    with pytest.raises(UserError, match=r"3 channels of 5×4 pixels, those to test on 3 channels of 6×6"):
        load_images("pets", data_dir=tmp_path)


def test_label_out_of_range_names_the_row(tmp_path):
    write_splits(tmp_path, names=())
    write_parquet(tmp_path / "test.parquet", [encoded(picture(0))] * 3, [0, 1, 2], names=())
    with pytest.raises(UserError, match=r"test\.parquet, row 2 .*label 2, but the 2 classes go from 0 to 1"):
        load_images("pets", data_dir=tmp_path)


@pytest.mark.parametrize("label", [-1, None])
def test_unlabelled_image_names_the_row(tmp_path, label):
    write_splits(tmp_path)
    write_parquet(tmp_path / "test.parquet", [encoded(picture(0))] * 3, [0, 1, label])
    with pytest.raises(UserError, match=r"test\.parquet, row 2 .*not labelled"):
        load_images("pets", data_dir=tmp_path)


def test_class_names_differ(tmp_path):
    write_splits(tmp_path)
    write_parquet(tmp_path / "test.parquet", [encoded(picture(0))] * 3, [0, 1, 2], names=(*CLASSES, "fox"))
    with pytest.raises(UserError, match=r"has 2 classes, .* has 3.*fox"):
        load_images("pets", data_dir=tmp_path)


def test_class_folders_differ(tmp_path):
    write_folders(tmp_path)
    shutil.move(tmp_path / "test" / "dog", tmp_path / "test" / "dogs")
    with pytest.raises(UserError, match="dog, dogs"):
        load_images("pets", data_dir=tmp_path)


def test_class_without_images(tmp_path):
    write_splits(tmp_path)
    write_parquet(tmp_path / "test.parquet", [encoded(picture(0))] * 2, [0, 0])
    with pytest.raises(UserError, match=r"test\.parquet has images of 1 of the 2 classes.*missing: dog"):
        load_images("pets", data_dir=tmp_path)


def test_cifar10_needs_its_ten_classes(tmp_path):
    with pytest.raises(UserError, match=r"cifar10 has 10 classes, but folder .* has 2"):
        load_images("cifar10", data_dir=write_splits(tmp_path))


def test_empty_split(tmp_path):
    write_splits(tmp_path)
    write_parquet(tmp_path / "test.parquet", [], [])
    with pytest.raises(UserError, match=r"test\.parquet holds no image"):
        load_images("pets", data_dir=tmp_path)


def test_unknown_name_and_two_sources():
    with pytest.raises(UserError, match=r"'cifar11'.*Known without: cifar10, digits"):
        load_images("cifar11")
    with pytest.raises(UserError, match="not both"):
        load_images("cifar10", data_dir="a", hub_id="b")


def test_missing_folder_or_split(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_images(data_dir=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no images to train on. Looked for train\.parquet.*It is empty"):
        load_images(data_dir=tmp_path)
    os.remove(write_splits(tmp_path) / "test.parquet")
    with pytest.raises(UserError, match=r"no images to test on. Looked for test\.parquet.*It holds: train\.parquet"):
        load_images("pets", data_dir=tmp_path)


def test_folder_without_classes_or_images(tmp_path):
    folder = write_folders(tmp_path)
    (folder / "train" / "fox").mkdir()
    with pytest.raises(UserError, match=r"fox holds no image. Known endings: .*\.png"):
        load_images("pets", data_dir=folder)
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    with pytest.raises(UserError, match="no folder per class"):
        load_images("pets", data_dir=folder)


def test_broken_parquet_and_wrong_columns(tmp_path):
    write_splits(tmp_path)
    file = tmp_path / "train.parquet"
    file.write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match=r"train\.parquet is not a readable parquet file"):
        load_images("pets", data_dir=tmp_path)
    pq.write_table(pa.table({"picture": [b"x"], "label": [0]}), file)
    with pytest.raises(UserError, match="img or image, and label; found: picture, label"):
        load_images("pets", data_dir=tmp_path)
    pq.write_table(pa.table({"img": [b"x"], "label": ["cat"]}), file)
    with pytest.raises(UserError, match="whole numbers"):
        load_images("pets", data_dir=tmp_path)
    pq.write_table(pa.table({"img": [1.5], "label": [0]}), file)
    with pytest.raises(UserError, match="column img does not hold encoded images"):
        load_images("pets", data_dir=tmp_path)


def test_hub_without_a_test_split(tmp_path, monkeypatch):
    os.remove(write_splits(tmp_path) / "test.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(UserError, match="needs the splits train and test or validation or val; it has: train"):
        load_images("pets", hub_id=str(tmp_path))


# Subsets and smaller images


def counted(per_class: int = 10, classes: int = 3) -> ImageSet:
    """Image i has the level i everywhere, and the label i modulo the number of classes."""
    count = per_class * classes
    levels = torch.arange(count, dtype=torch.uint8)
    return ImageSet(levels.view(-1, 1, 1, 1).expand(-1, 3, 4, 6).contiguous(), torch.arange(count) % classes)


@pytest.mark.parametrize("size", [1, 9, 11, 30])
def test_subset_is_balanced_and_fixed(size):
    images = counted()
    part = subset(images, size, seed=1)
    kept = part.pixels[:, 0, 0, 0].long()
    counts = part.labels.bincount(minlength=3)
    assert len(kept) == size and int(counts.max() - counts.min()) <= 1
    assert torch.equal(part.labels, kept % 3) and torch.equal(kept, kept.unique())
    assert torch.equal(subset(images, size, seed=1).pixels, part.pixels)
    assert set(kept.tolist()) <= set(subset(images, min(30, size + 1), seed=1).pixels[:, 0, 0, 0].tolist())


def test_subset_is_the_one_published():
    draw = random.Random(0)
    order = sorted(range(30), key=[draw.random() for _ in range(30)].__getitem__)
    reference = sorted(index for label in range(3) for index in [i for i in order if i % 3 == label][:2])
    assert subset(counted(), 6, seed=0).pixels[:, 0, 0, 0].tolist() == reference == [3, 5, 7, 15, 20, 25]
    assert subset(counted(), 6, seed=1).pixels[:, 0, 0, 0].tolist() != reference


def test_subset_draws_evenly():
    kept = torch.cat([subset(counted(), 15, seed).pixels[:, 0, 0, 0] for seed in range(400)])
    share = kept.long().bincount(minlength=30) / 400
    assert torch.allclose(share, torch.tensor(0.5), atol=0.1)  # 4 standard deviations


@pytest.mark.parametrize("size", [0, -1, 31])
def test_subset_of_an_impossible_size(size):
    with pytest.raises(UserError, match=rf"{size} images.*Choose a size from 1 to 30"):
        subset(counted(), size, seed=0)


def test_subset_names_the_scarce_class():
    images = counted()
    short = ImageSet(images.pixels[:-2], images.labels[:-2])
    with pytest.raises(UserError, match=r"class 1 has only 9.*from 1 to 27"):
        subset(short, 29, seed=0)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_shrink_is_average_pooling(factor):
    images = ImageSet(torch.randint(256, (5, 3, 8, 12), dtype=torch.uint8), torch.arange(5))
    smaller = shrink(images, factor)
    pooled = torch.nn.functional.avg_pool2d(images.pixels.double(), factor)
    assert torch.equal(smaller.pixels, (pooled + 0.5).floor().byte())
    assert smaller.pixels.dtype == torch.uint8 and smaller.labels is images.labels


def test_shrink_rounds_halves_up_and_keeps_white():
    blocks = torch.tensor([[0, 1, 255, 255], [0, 1, 255, 255]], dtype=torch.uint8)
    smaller = shrink(ImageSet(blocks[None, None], torch.zeros(1)), 2)
    assert smaller.pixels.flatten().tolist() == [1, 255]


@pytest.mark.parametrize("factor", [0, 4, 5])
def test_shrink_by_what_does_not_divide(factor):
    with pytest.raises(UserError, match="must divide both sides"):
        shrink(counted(), factor)


# The real images


def test_a_part_is_the_subset_of_the_whole(tmp_path):
    folder = write_splits(tmp_path)
    whole = load_images("pets", data_dir=folder)
    part = load_images("pets", data_dir=folder, train_size=2, test_size=2)
    for split in ("train", "test"):
        expected = subset(getattr(whole, split), 2, seed=0)
        assert torch.equal(getattr(part, split).pixels, expected.pixels)
        assert torch.equal(getattr(part, split).labels, expected.labels)
    assert len(load_images("digits", train_size=100).train.labels) == 100


@pytest.mark.data
def test_cifar10_itself(data_dir):
    folder = data_dir.parent / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"no CIFAR-10 in {folder}")
    data = load_images(data_dir=folder)
    assert data.classes[1] == "automobile" and len(data.classes) == 10
    assert data.train.pixels.shape == (50_000, 3, 32, 32) and data.test.pixels.shape == (10_000, 3, 32, 32)
    assert data.train.labels.bincount().tolist() == [5000] * 10
    row = pq.read_table(folder / "train.parquet").slice(49_999).to_pylist()[0]
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(row["img"]["bytes"])))).permute(2, 0, 1)
    assert torch.equal(data.train.pixels[-1], image) and int(data.train.labels[-1]) == row["label"]
    mean = data.train.pixels.double().mean(dim=(0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]).double(), atol=1e-3)

import io
import itertools
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_momentum.errors import UserError
from hf_momentum.tasks import image_streams
from hf_momentum.tasks.image_streams import StreamRows, load_image_stream
from hf_momentum.tasks.lazy_images import MappedImages, StreamedImages, image_transforms

datasets = pytest.importorskip("datasets")
accelerate_data = pytest.importorskip("accelerate.data_loader")

HALF = (0.5,) * 3


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # else 5 s for each pass over a stream


def png(level: int, size: int = 12) -> bytes:
    """A grey square: its level tells the images apart."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size + 2), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def table(labels, first=0, column="image", features=None):
    rows = [{"bytes": png(first + i), "path": f"{first + i}.png"} for i in range(len(labels))]
    return datasets.Dataset.from_dict({column: rows, "label": labels}, features=features)


def write_parquet(folder, train=(0, 1) * 12, test=(0, 1, 0), files=4, test_split="validation", **options):
    folder.mkdir(exist_ok=True)
    for file, labels in enumerate(np.array_split(np.array(train, dtype=object), files)):
        part = table(list(labels), sum(map(len, np.array_split(train, files)[:file])), **options)
        part.to_parquet(folder / f"train-{file:05d}-of-{files:05d}.parquet")
    table(list(test), 200, **options).to_parquet(folder / f"{test_split}.parquet")
    return folder


def write_folder(folder, train=("cat", "dog"), test=("cat", "dog"), test_split="val", images=3):
    for split, names in (("train", train), (test_split, test)):
        for number, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for i in range(images):
                (folder / split / name / f"{i}.png").write_bytes(png(10 * number + i))
    return folder


def ids(examples) -> list[int]:
    """Which images these are; without augmentation that changes them, a pixel is the image's number."""
    return [round(float(example["pixel_values"].mean()) * 255) for example in examples]


def stream(folder, size, **options) -> StreamedImages:
    data = load_image_stream(folder, streaming=True, train_size=size)
    transform, _ = image_transforms(8, (0,) * 3, (1,) * 3)
    result = StreamedImages(data.train, len(data.classes), transform, size=size, **options)
    result.set_epoch(0)
    return result


def own(streamed: StreamedImages) -> list[int]:
    """What one process gets from the stream inside of accelerate's shard."""
    if streamed.processes == 1:
        return ids(streamed)
    shard = accelerate_data.IterableDatasetShard(
        streamed,
        batch_size=streamed.batch_size,
        num_processes=streamed.processes,
        process_index=streamed.process,
    )
    assert len(shard) == len(streamed) // streamed.processes
    return ids(shard)


# Sources


def test_a_folder(tmp_path):
    data = load_image_stream(write_folder(tmp_path / "animals"))
    assert (data.name, data.classes, data.train_size, len(data.test)) == ("animals", ("cat", "dog"), 6, 6)
    path, label, name = data.train[4]
    assert (path, label) == (str(tmp_path / "animals" / "train" / "dog" / "1.png"), 1)
    assert name == path
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_validation_is_preferred_to_test(tmp_path):
    """ImageNet's test split has no labels."""
    folder = write_parquet(tmp_path / "parquet")
    table([-1, -1], 100).to_parquet(folder / "test.parquet")
    assert len(load_image_stream(folder).test) == 3


@pytest.mark.parametrize("column", ["image", "img"])
def test_parquet(tmp_path, column):
    data = load_image_stream(write_parquet(tmp_path / "parquet", test_split="test", column=column))
    assert (data.train_size, data.classes) == (24, ("0", "1"))
    content, label, name = data.train[5]
    assert Image.open(io.BytesIO(content)).getpixel((0, 0)) == (5, 5, 5)
    assert label == 1
    assert name.endswith("parquet, split train, row 5 (5.png)")


def test_a_data_set_by_its_id_mapped_and_streamed(tmp_path):
    """A folder stands for the Hub: datasets takes either. Streamed, only the split to evaluate on is prepared."""
    names = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    folder = str(write_parquet(tmp_path / "hub", features=names))
    mapped, streamed = load_image_stream(hub_id=folder), load_image_stream(hub_id=folder, streaming=True, train_size=9)
    assert mapped.classes == streamed.classes == ("cat", "dog")
    assert (mapped.train_size, streamed.train_size) == (24, 9)
    assert isinstance(streamed.train, StreamRows)
    assert [mapped.test[i][1] for i in range(3)] == [streamed.test[i][1] for i in range(3)] == [0, 1, 0]


def test_the_size_of_imagenet_is_known(monkeypatch):
    monkeypatch.setattr(image_streams, "_hub_splits", lambda hub_id, streaming: (object(), Labels(), ("cat",)))
    assert load_image_stream(streaming=True).train_size == 1_281_167


class Labels:
    labels = np.array([0])

    def __len__(self):
        return 1


# Mapped images


def mapped(folder, size=8, seed=None) -> MappedImages:
    data = load_image_stream(folder)
    train, test = image_transforms(size, HALF, HALF)
    return MappedImages(data.train, len(data.classes), test if seed is None else train, seed=seed)


def noisy_folder(tmp_path):
    folder = write_folder(tmp_path / "noisy")
    for number, file in enumerate(sorted(folder.rglob("*.png"))):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return folder


def test_evaluation_resizes_and_cuts_the_centre(tmp_path):
    folder = noisy_folder(tmp_path)
    example = mapped(folder, size=14)[0]
    image = Image.open(folder / "train" / "cat" / "0.png").resize((19, 16), Image.Resampling.BILINEAR)
    left = round((19 - 14) / 2)
    reference = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, 1:15, left : left + 14] / 127.5 - 1
    torch.testing.assert_close(example["pixel_values"], reference)
    assert example["labels"] == 0


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path):
    folder = noisy_folder(tmp_path)
    images = mapped(folder, seed=3)
    seen = {}
    for epoch in (0, 1):
        images.set_epoch(epoch)
        seen[epoch] = torch.stack([images[i]["pixel_values"] for i in range(6)])
    assert not torch.equal(seen[0], seen[1])
    images.set_epoch(0)
    random.seed(8), torch.manual_seed(8)
    assert torch.equal(torch.stack([images[i]["pixel_values"] for i in (3, 1)]), seen[0][[3, 1]])
    other = mapped(folder, seed=4)
    other.set_epoch(0)
    assert not torch.equal(other[0]["pixel_values"], seen[0][0])

    images.set_epoch(1)  # before workers start; then announced to workers that are running
    loader = DataLoader(images, batch_size=2, num_workers=2, persistent_workers=True, collate_fn=default_data_collator)
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), seen[1])
    images.set_epoch(0)
    batches = list(loader)
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), seen[0])
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0, 0, 0, 1, 1, 1]


def test_augmentation_leaves_the_global_generators_alone(tmp_path):
    images = mapped(noisy_folder(tmp_path), seed=0)
    images.set_epoch(0)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    images[0]
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


def test_crops_and_flips_are_those_of_resnet_training(tmp_path):
    """Half of the images are mirrored; the area's share is uniform in [.08, 1], here seen by its mean."""
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 1, 3))
    folder = write_folder(tmp_path / "ramp", images=1)
    Image.fromarray(ramp).save(folder / "train" / "cat" / "0.png")
    images = mapped(folder, size=16, seed=0)
    slopes = []
    for epoch in range(400):
        images.set_epoch(epoch)
        row = images[0]["pixel_values"][0, 8]
        slopes.append(float(row[-1] - row[0]))
    assert np.mean(np.array(slopes) > 0) == pytest.approx(0.5, abs=0.08)  # 3 standard errors
    shares = (np.abs(slopes) / 2 * 16 / 15) ** 2  # width² ≈ the area's share times the aspect ratio
    assert shares.mean() == pytest.approx(0.54, abs=0.06)


def test_a_policy_of_timm(tmp_path):
    train, _ = image_transforms(8, HALF, HALF, "rand-m9-mstd0.5")
    assert "RandAugment" in str(train)
    with pytest.raises(UserError, match="no augmentation policy 'turn'"):
        image_transforms(8, HALF, HALF, "turn")


# Streams


def test_a_stream_gives_every_image_once_in_an_order_of_each_epoch(tmp_path):
    streamed = stream(write_parquet(tmp_path / "parquet"), 24, batch_size=4)
    orders = []
    for epoch in (0, 1, 0):
        streamed.set_epoch(epoch)
        orders.append(ids(streamed))
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(24))
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != sorted(orders[0])
    assert ids(stream(tmp_path / "parquet", 24, batch_size=4, seed=1)) != orders[0]


@pytest.mark.parametrize(("processes", "files"), [(2, 4), (2, 1), (4, 4)])
def test_processes_share_a_stream(tmp_path, processes, files, monkeypatch):
    folder = write_parquet(tmp_path / "parquet", files=files)
    if files == 1:  # row groups are shared where there are too few files
        rows = datasets.Dataset.from_parquet(str(folder / "train-00000-of-00001.parquet"))
        rows.to_parquet(folder / "train-00000-of-00001.parquet", batch_size=12)
    parts = [
        own(stream(folder, 24, batch_size=2, processes=processes, process=process)) for process in range(processes)
    ]
    assert {len(part) for part in parts} == {24 // processes}
    assert sorted(itertools.chain(*parts)) == list(range(24))


def test_unequal_parts_are_cut_and_filled_to_one_length(tmp_path):
    folder = write_parquet(tmp_path / "parquet", train=(0, 1) * 10, files=3)  # 7, 7 and 6 images
    parts = [own(stream(folder, 20, batch_size=2, processes=2, process=process)) for process in range(2)]
    assert [len(part) for part in parts] == [10, 10]
    assert not set(parts[0]) & set(parts[1])
    assert len(set(parts[0])) == 10  # of 14
    assert len(set(parts[1])) == 6  # of 6, and four of them again


@pytest.mark.parametrize("processes", [1, 2])
def test_workers_share_a_part(tmp_path, processes):
    folder, seen = write_parquet(tmp_path / "parquet"), []
    for process in range(processes):
        options = {"batch_size": 3, "processes": processes, "process": process, "workers": 2}
        streamed = stream(folder, 24, **options)
        if processes > 1:
            streamed = accelerate_data.IterableDatasetShard(streamed, 3, False, processes, process)
        loader = DataLoader(streamed, batch_size=3, num_workers=2, collate_fn=default_data_collator)
        batches = list(loader)
        assert [len(batch["labels"]) for batch in batches] == [3] * (8 // processes) == [3] * len(loader)
        seen += [level for batch in batches for level in ids([{"pixel_values": x} for x in batch["pixel_values"]])]
    assert sorted(seen) == list(range(24))


# Mistakes


def test_a_corrupt_image_is_named(tmp_path):
    folder = write_folder(tmp_path / "animals")
    file = folder / "train" / "dog" / "1.png"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match=f"{file}: the image is corrupt"):
        mapped(folder)[4]

    rows = [
        {"bytes": b"nothing", "path": "cat_7.JPEG"} if i == 2 else {"bytes": png(i), "path": None} for i in range(6)
    ]
    bad = datasets.Dataset.from_dict({"image": rows, "label": [0, 1] * 3})
    parquet = write_parquet(tmp_path / "parquet", files=1)
    bad.to_parquet(parquet / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"split train, row 2 \(cat_7.JPEG\): the image is corrupt"):
        mapped(parquet)[2]
    with pytest.raises(UserError, match=r"split train, image \d .*\(cat_7.JPEG\): the image is corrupt"):
        list(stream(parquet, 6, batch_size=2))


def test_an_unknown_label_is_named(tmp_path):
    with pytest.raises(UserError, match=r"split train, row 2 .*unknown label -1"):
        load_image_stream(write_parquet(tmp_path / "a", train=[0, 1, None, 1], files=1))
    streamed = stream(write_parquet(tmp_path / "b", train=[0, 1, 2, 1], files=1), 4, batch_size=2)
    with pytest.raises(UserError, match=r"unknown label 2\. With 2 classes, labels are 0 to 1"):
        list(streamed)


def test_classes_have_to_agree(tmp_path):
    with pytest.raises(UserError, match=r"3 classes to train on, 2 to evaluate on.*differ in: elk"):
        load_image_stream(write_folder(tmp_path / "a", train=("cat", "dog", "elk")))
    with pytest.raises(UserError, match=r"3 classes to train on, 2 to evaluate on.*differ in: 2"):
        load_image_stream(write_parquet(tmp_path / "b", train=(0, 1, 2) * 4))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        load_image_stream(tmp_path / "nowhere")
    with pytest.raises(UserError, match="needs train and one of validation, val, test"):
        load_image_stream(tmp_path)
    folder = write_parquet(tmp_path / "parquet")
    table([0, 1]).rename_column("label", "class").to_parquet(folder / "train-00000-of-00004.parquet")
    with pytest.raises(UserError):
        load_image_stream(folder)
    (tmp_path / "c").mkdir()
    table([0, 1]).rename_column("label", "class").to_parquet(tmp_path / "c" / "train.parquet")
    table([0, 1]).to_parquet(tmp_path / "c" / "test.parquet")
    with pytest.raises(UserError, match=r"expected the columns image \(or img\) and label; found: image, class"):
        load_image_stream(tmp_path / "c")


def test_the_hub_without_a_network():
    with pytest.raises(UserError, match=r"Hub data set ILSVRC/imagenet-1k cannot be loaded.*hf auth login"):
        load_image_stream()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streaming": True}, "Give --train_size"),
        ({"train_size": 5}, "for a stream alone"),
        ({"streaming": True, "train_size": 0}, "as a positive number"),
        ({"hub_id": "a/b"}, "not both"),
    ],
)
def test_contradicting_arguments(tmp_path, options, message):
    folder = write_parquet(tmp_path / "parquet")
    with pytest.raises(UserError, match=message):
        load_image_stream(folder, **options)


def test_a_folder_of_files_is_not_streamed(tmp_path):
    with pytest.raises(UserError, match="streaming is for parquet files and the Hub"):
        load_image_stream(write_folder(tmp_path / "animals"), streaming=True, train_size=6)


def test_too_many_readers(tmp_path):
    folder = write_parquet(tmp_path / "parquet")
    with pytest.raises(UserError, match=r"4 files or row groups, too few for 6 readers \(2 processes × 3 workers\)"):
        stream(folder, 24, batch_size=1, processes=2, workers=3)
    with pytest.raises(UserError, match="do not fill a micro-batch of 13"):
        stream(folder, 24, batch_size=13, processes=2)


def test_the_epoch_has_to_be_announced(tmp_path):
    with pytest.raises(UserError, match="EpochCallback"):
        mapped(write_folder(tmp_path / "animals"), seed=0)[0]


def test_paths_of_any_name(tmp_path):
    folder = write_folder(tmp_path / "animals", train=("chat", "élan"), test=("chat", "élan"))
    assert os.path.exists(load_image_stream(folder).train[5][0])

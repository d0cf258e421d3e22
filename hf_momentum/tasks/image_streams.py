"""Data sets of encoded images, of ImageNet's size: from the Hub, a folder of image files, or parquet files.

Nothing is decoded here. Rows can be read in any order; a stream is read from front to back and need not be on disk.
"""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_momentum.errors import UserError, require_extra

if TYPE_CHECKING:
    import datasets

IMAGENET = "ILSVRC/imagenet-1k"
"""ImageNet-1k on the Hub. One has to accept its terms there, and log in."""

TRAIN_SIZES = {IMAGENET: 1_281_167}
"""Training images of data sets on the Hub; a stream does not tell."""

TEST_SPLITS = ("validation", "val", "test")
"""Names of the split to evaluate on; the first that is there is taken. ImageNet's own `test` has no labels."""

SHUFFLE_BUFFER = 1000
"""Encoded images that each loading process of a stream holds to draw from, about 0.1 GB of ImageNet."""


Row = tuple[bytes | str, int, str]
"""The bytes of an image file or the file's path, the class, and a name for messages."""


class FolderRows:
    """Image files with their classes.

    Args:
        samples: Path and class of each.
    """

    def __init__(self, samples: Sequence[tuple[str, int]]):
        self._paths = np.array([os.fsencode(path) for path, _ in samples])  # no objects: cheap to share with workers
        self.labels = np.array([label for _, label in samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Row:
        """One image.

        Args:
            index: From 0.

        Returns:
            Its path, class, and name for messages.
        """
        path = os.fsdecode(bytes(self._paths[index]))
        return path, int(self.labels[index]), path


class TableRows:
    """A split of a data set with an image column and `label`.

    Args:
        table: The split.
        where: Its name for messages.

    Raises:
        UserError: If a column is missing or holds something else.
    """

    def __init__(self, table: "datasets.Dataset", where: str):
        self._column = _image_column(table.features, where)
        self._table, self._where = _encoded(table, self._column), where
        self.labels = np.array([-1 if label is None else label for label in table["label"]], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Row:
        """One image.

        Args:
            index: From 0.

        Returns:
            The bytes of its file or the file's path, its class, and its name for messages.
        """
        image, name = _content(self._table[int(index)][self._column], f"{self._where}, row {index}")
        return image, int(self.labels[index]), name


class StreamRows:
    """A stream with an image column and `label`; a part of it is shuffled through a buffer.

    Args:
        stream: The images.
        where: Their name for messages.

    Raises:
        UserError: If a column is missing or holds something else.
    """

    def __init__(self, stream: "datasets.IterableDataset", where: str):
        self._column = _image_column(stream.features, where)
        self._stream, self._where = _encoded(stream, self._column), where

    def part(self, process: int, processes: int, workers: int, seed: int) -> "StreamRows":
        """The files, or row groups of parquet files, that one process reads.

        Args:
            process: Which process, from 0.
            processes: Their number.
            workers: Workers that share the part.
            seed: Of the order.

        Returns:
            The part.

        Raises:
            UserError: If there are fewer files and row groups than readers.
        """
        stream, readers = self._stream, processes * workers
        if stream.num_shards < readers:
            stream = stream.reshard()  # by row groups
        if stream.num_shards < readers:
            raise UserError(
                f"{self._where} has {stream.num_shards} files or row groups, too few for {readers} readers "
                f"({processes} processes × {workers} workers). Use fewer workers, or do not stream."
            )
        own = stream.shard(num_shards=processes, index=process)
        part = copy.copy(self)
        part._stream = own.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        return part

    def epoch(self, epoch: int) -> Iterator[Row]:
        """The images in an epoch's order, over and over; in a worker of a DataLoader its share of them.

        Args:
            epoch: The epoch, from 0.

        Yields:
            The bytes of an image file or the file's path, the class, and a name for messages.

        Raises:
            UserError: If there is no image.
        """
        self._stream.set_epoch(epoch)
        count = 0
        while True:
            before = count
            for row in self._stream:
                image, name = _content(
                    row[self._column], f"{self._where}, image {count} of what was read in epoch {epoch}"
                )
                yield image, -1 if row["label"] is None else row["label"], name
                count += 1
            if count == before:
                raise UserError(f"{self._where}: a file or row group holds no image. Remove it.")


@dataclass(frozen=True)
class ImageStreams:
    """A data set of encoded images.

    Attributes:
        name: Such as `imagenet-1k`.
        source: Where the images come from, for people to read.
        classes: Names of the classes; a label is an index into them.
        train: The images to train on.
        test: The images to evaluate on.
        train_size: Number of training images.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train: FolderRows | TableRows | StreamRows
    test: FolderRows | TableRows
    train_size: int


def load_image_stream(
    data_dir: str | Path | None = None,
    hub_id: str | None = None,
    *,
    streaming: bool = False,
    train_size: int | None = None,
) -> ImageStreams:
    """Find the images of a data set and check their labels; none is decoded.

    A folder holds `train/CLASS/…` and `val/CLASS/…` (an ImageFolder, classes numbered by name), or `train*.parquet`
    and `validation*.parquet`, with a column `image` or `img` and a column `label`. The split to evaluate on may be
    called `validation`, `val` or `test`. It is never streamed.

    Args:
        data_dir: The folder.
        hub_id: `owner/name` or `owner/name:config` on the Hub, with such splits and columns; ImageNet unless given.
        streaming: Stream the training images.
        train_size: Number of training images, for a stream whose own is not known.

    Returns:
        The data set.

    Raises:
        UserError: If the data cannot be had, a split or a column is missing, the splits' classes differ, a label is
            unknown, or `train_size` is missing, not needed or not positive.
    """
    if data_dir is not None and hub_id is not None:
        raise UserError(f"Give a data folder or a Hub id, not both ({data_dir} and {hub_id}).")
    if train_size is not None and (not streaming or train_size < 1):
        raise UserError(f"train_size={train_size}: give it for a stream alone, and as a positive number.")
    if data_dir is None:
        hub_id = hub_id or IMAGENET
        name, source = hub_id.partition(":")[0].split("/")[-1], f"Hub data set {hub_id}"
        train, test, classes = _hub_splits(hub_id, streaming)
    else:
        folder = Path(data_dir).expanduser()
        name, source = folder.absolute().name, f"folder {folder}"
        train, test, classes = _folder_splits(folder, streaming)
    if streaming:
        size = train_size or TRAIN_SIZES.get(hub_id)
        if size is None:
            raise UserError(f"{source}: a stream does not tell its number of training images. Give --train_size.")
    else:
        size = len(train)
    return ImageStreams(name, source, _checked_classes(source, train, test, classes), train, test, size)


def _hub_splits(hub_id: str, streaming: bool) -> tuple:
    datasets = require_extra("datasets", "vision")
    path, _, config = hub_id.partition(":")
    try:
        if not streaming:
            splits = datasets.load_dataset(path, config or None)
            test = _first_split(splits, hub_id)
            return _tables(splits["train"], splits[test], hub_id, test)
        builder = datasets.load_dataset_builder(path, config or None)
        test = _first_split(builder.config.data_files, hub_id)
        # By itself, so that no other split is downloaded.
        files = {test: list(builder.config.data_files[test])}
        table = datasets.load_dataset(builder.name, data_files=files, split=test, features=builder.info.features)
        train = datasets.load_dataset(path, config or None, split="train", streaming=True)
        return _tables(train, table, hub_id, test)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"The Hub data set {hub_id} cannot be loaded ({type(error).__name__}: {error}). A gated one such as "
            f"{IMAGENET} wants its terms accepted on its page, and `hf auth login`; offline, only what is in the "
            "cache is there. Or name a folder of your own with --data_dir."
        ) from error


def _folder_splits(folder: Path, streaming: bool) -> tuple:
    if not folder.is_dir():
        raise UserError(f"--data_dir {folder} is not a folder.")
    files = {split: sorted(map(str, folder.glob(f"{split}*.parquet"))) for split in ("train", *TEST_SPLITS)}
    files = {split: found for split, found in files.items() if found}
    if "train" in files:
        return _parquet_splits(files, str(folder), streaming)
    here = [split for split in ("train", *TEST_SPLITS) if (folder / split).is_dir()]
    test = _first_split(here, str(folder))
    if streaming:
        raise UserError(f"{folder}: streaming is for parquet files and the Hub; files are read one by one anyway.")
    (train, classes), (test_rows, test_classes) = (_read_class_folders(folder / split) for split in ("train", test))
    if classes != test_classes:
        raise UserError(_classes_differ(str(folder), classes, test_classes))
    return train, test_rows, classes


def _parquet_splits(files: Mapping[str, list[str]], where: str, streaming: bool) -> tuple:
    datasets = require_extra("datasets", "vision")
    test = _first_split(files, where)
    try:
        train, table = (
            datasets.load_dataset("parquet", data_files={split: files[split]}, split=split, streaming=streamed)
            for split, streamed in (("train", streaming), (test, False))
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise UserError(f"{where}: the parquet files cannot be read: {cause}") from error
    return _tables(train, table, where, test)


def _tables(train: Any, test: Any, where: str, test_split: str) -> tuple:
    datasets = require_extra("datasets", "vision")
    names = [tuple(getattr(part.features["label"], "names", ())) for part in (train, test) if "label" in part.features]
    if len(names) == 2 and all(names) and names[0] != names[1]:
        raise UserError(_classes_differ(where, *names))
    if isinstance(train, datasets.Dataset):
        train = TableRows(train, f"{where}, split train")
    else:
        train = StreamRows(train, f"{where}, split train")
    return train, TableRows(test, f"{where}, split {test_split}"), next(filter(None, names), None)


def _first_split(splits: Any, where: str) -> str:
    test = next((split for split in TEST_SPLITS if split in splits), None)
    if "train" not in splits or test is None:
        raise UserError(
            f"{where} needs train and one of {', '.join(TEST_SPLITS)}, as parquet files or as folders of folders per "
            f"class. Found: {', '.join(splits) or 'none of them'}."
        )
    return test


def _read_class_folders(folder: Path) -> tuple[FolderRows, tuple[str, ...]]:
    # torchvision's scan reads no file, and takes 0.02 s for 6,000 of them where datasets' image folder takes 13.
    scan = require_extra("torchvision.datasets.folder", "vision")
    try:
        classes, numbers = scan.find_classes(folder)
        return FolderRows(scan.make_dataset(folder, numbers, extensions=scan.IMG_EXTENSIONS)), tuple(classes)
    except FileNotFoundError as error:
        raise UserError(f"{error} Expected {folder}/CLASS/IMAGE.") from error


def _checked_classes(source: str, train: Any, test: Any, names: tuple[str, ...] | None) -> tuple[str, ...]:
    parts = [part for part in (train, test) if hasattr(part, "labels")]
    if not all(map(len, parts)):
        raise UserError(f"{source} has a split without images.")
    classes = names or tuple(str(label) for label in range(max(part.labels.max() for part in parts) + 1))
    for part in parts:
        wrong = (part.labels < 0) | (part.labels >= len(classes))
        if wrong.any():
            index = int(wrong.argmax())
            raise UserError(
                f"{part[index][2]}: unknown label {part.labels[index]}. With {len(classes)} classes, labels are 0 to "
                f"{len(classes) - 1}."
            )
    found = [{classes[label] for label in np.unique(part.labels)} for part in parts]
    if len(found) == 2 and found[0] != found[1]:
        raise UserError(_classes_differ(source, *map(sorted, found)))
    return classes


def _classes_differ(where: str, train: Sequence[str], test: Sequence[str]) -> str:
    differing = sorted(set(train) ^ set(test)) or ["their order"]
    return (
        f"{where}: {len(train)} classes to train on, {len(test)} to evaluate on. Both splits need the same ones; they "
        f"differ in: {', '.join(differing[:10])}{', …' if len(differing) > 10 else ''}."
    )


def _image_column(features: Mapping[str, Any] | None, where: str) -> str:
    columns = [*(features or ())]
    image = next((column for column in ("image", "img") if column in columns), None)
    if image is None or "label" not in columns:
        raise UserError(f"{where}: expected the columns image (or img) and label; found: {', '.join(columns)}.")
    if not features["label"].dtype.startswith(("int", "uint")):
        raise UserError(f"{where}: the column label must hold class indices, not {features['label'].dtype}.")
    return image


def _encoded(data: Any, column: str) -> Any:
    datasets = require_extra("datasets", "vision")
    return data.select_columns([column, "label"]).cast_column(column, datasets.Image(decode=False))


def _content(image: Mapping[str, Any] | None, name: str) -> tuple[bytes | str, str]:
    content, path = (image["bytes"], image["path"]) if image else (None, None)
    name = f"{name} ({path})" if path else name
    if content is None and path is None:
        raise UserError(f"{name}: there is no image.")
    return (path if content is None else content), name

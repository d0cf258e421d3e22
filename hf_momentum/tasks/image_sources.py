"""Where encoded images come from: parquet files, a folder of image files, or the Hub; and how one is decoded."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_momentum.errors import UserError, require_extra

if TYPE_CHECKING:
    import datasets
    import PIL.Image

TEST_SPLITS = ("test", "validation", "val")
"""Names of the split to test on; the first that is there is taken."""

_IMAGE_COLUMNS = ("img", "image")
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class EncodedImages:
    """The images of one split as they are stored.

    Attributes:
        where: The split's file, folder or name on the Hub, for messages.
        images: Per image, the bytes of its file or the file's path.
        labels: Per image, its class as an index, unchecked.
        names: Per image, where it is found, for messages.
        classes: The names of the classes; None if the source has none.
    """

    where: str
    images: Sequence[bytes | Path]
    labels: Sequence[int]
    names: Sequence[str]
    classes: tuple[str, ...] | None


@dataclass(frozen=True)
class EncodedData:
    """A source's two splits.

    Attributes:
        source: Where they come from, for people to read.
        train: The split to train on.
        test: The split to test on.
    """

    source: str
    train: EncodedImages
    test: EncodedImages


def read_image_dir(name: str, data_dir: str | Path) -> EncodedData:
    """Read `DIR` or, if it is there, `DIR/NAME`: parquet files or one folder per class.

    Parquet: `train.parquet` and `test.parquet`, or the Hub's shards `train-*.parquet` and `test-*.parquet`, with a
    column `img` or `image` (a struct of `bytes` and `path`, or bytes) and a column `label` (class indices). Folders:
    `train/CLASS/…` and `test/CLASS/…`, where the classes are numbered by name. The test split may also be called
    `validation` or `val`.

    Args:
        name: The data set's name.
        data_dir: DIR.

    Returns:
        Both splits.

    Raises:
        UserError: If the folder, a split or a column is missing, or a file is not readable.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(f"--data_dir {data_dir} is not a folder.")
    folder = root / name if (root / name).is_dir() else root
    train = _read_split(folder, "train")
    tests = (_read_split(folder, split) for split in TEST_SPLITS)
    test = next((split for split in tests if split is not None), None)
    if train is None or test is None:
        raise UserError(_split_missing(folder, "train" if train is None else "test"))
    return EncodedData(f"folder {folder}", train, test)


def decode_image(image: bytes | str | Path, name: str, *, grey: bool = False) -> "PIL.Image.Image":
    """Decode an image with Pillow.

    Args:
        image: The bytes of its file or the file's path.
        name: Where it is found, for messages.
        grey: Whether a grey or black and white image stays of one channel.

    Returns:
        The image in mode RGB, or L.

    Raises:
        UserError: If it is corrupt, or has more than 8 bits per channel.
    """
    pillow = require_extra("PIL.Image", "vision")
    try:
        with pillow.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            if opened.mode.startswith(("I", "F")):
                raise UserError(
                    f"{name}: pixels of mode {opened.mode}. Convert the image to 8 bits per channel first."
                )
            return opened.convert("L" if grey and opened.mode in {"1", "L"} else "RGB")
    except UserError:
        raise
    except pillow.UnidentifiedImageError as error:  # names the bytes' place in memory
        raise UserError(f"{name}: the image is corrupt or of an unknown format.") from error
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise UserError(f"{name}: the image is corrupt: {error}.") from error


def read_image_hub(hub_id: str) -> EncodedData:
    """Load a data set from the Hub, or from the Hub's local cache.

    Args:
        hub_id: `owner/name` or `owner/name:config`. It has a train and a test (or validation) split, and the columns
            `img` or `image`, and `label`.

    Returns:
        Both splits.

    Raises:
        UserError: If the data set cannot be had, or a split or a column is missing.
    """
    datasets = require_extra("datasets", "vision")
    path, _, config = hub_id.partition(":")
    try:
        data = datasets.load_dataset(path, config or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"The Hub data set {path!r} (configuration {config or 'default'}) cannot be loaded: {error} "
            "Check the id and the network, or name a folder of your own with --data_dir."
        ) from error
    test = next((split for split in TEST_SPLITS if split in data), None)
    if "train" not in data or test is None:
        raise UserError(
            f"The Hub data set {hub_id} needs the splits train and {' or '.join(TEST_SPLITS)}; "
            f"it has: {', '.join(data)}."
        )
    parts = (_from_dataset(data[split], f"{hub_id}, split {split}") for split in ("train", test))
    return EncodedData(f"Hub data set {hub_id}", *parts)


def _read_split(folder: Path, split: str) -> EncodedImages | None:
    whole = folder / f"{split}.parquet"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{split}-*.parquet"))
    if files:
        return _joined([_read_parquet(file) for file in files])
    return _read_class_folders(folder / split) if (folder / split).is_dir() else None


def _joined(parts: Sequence[EncodedImages]) -> EncodedImages:
    return EncodedImages(
        " and ".join(part.where for part in parts),
        [image for part in parts for image in part.images],
        [label for part in parts for label in part.labels],
        [name for part in parts for name in part.names],
        parts[0].classes,
    )


def _read_parquet(file: Path) -> EncodedImages:
    datasets = require_extra("datasets", "vision")
    pyarrow, parquet = require_extra("pyarrow", "vision"), require_extra("pyarrow.parquet", "vision")
    try:
        table = parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} is not a readable parquet file: {error}") from error
    return _from_dataset(datasets.Dataset(table), str(file))


def _from_dataset(data: "datasets.Dataset", where: str) -> EncodedImages:
    datasets = require_extra("datasets", "vision")
    columns = [column for column in _IMAGE_COLUMNS if column in data.column_names]
    if not columns or "label" not in data.column_names:
        wanted = f"{' or '.join(_IMAGE_COLUMNS)}, and label"
        raise UserError(f"{where}: expected the columns {wanted}; found: {', '.join(data.column_names)}.")
    kind = data.features["label"]
    if kind.dtype not in {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"}:
        raise UserError(f"{where}: the column label must hold class indices (whole numbers), not {kind.dtype}.")
    try:
        encoded = data.select_columns([columns[0], "label"]).cast_column(columns[0], datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # of which pyarrow's own are
        raise UserError(f"{where}: the column {columns[0]} does not hold encoded images: {error}") from error
    rows = encoded.to_dict()
    names, images = [], []
    for row, image in enumerate(rows[columns[0]]):
        content, path = (image["bytes"], image["path"]) if image else (None, None)
        names.append(f"{where}, row {row}{f' ({path})' if path else ''}")
        if content is None and path is None:
            raise UserError(f"{names[-1]}: there is no image.")
        images.append(Path(path) if content is None else content)
    labels = [-1 if label is None else label for label in rows["label"]]
    return EncodedImages(where, images, labels, names, tuple(getattr(kind, "names", None) or ()) or None)


def _read_class_folders(folder: Path) -> EncodedImages:
    classes = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} holds no folder per class. Expected {folder}/CLASS/IMAGE.")
    images, labels = [], []
    for label, child in enumerate(classes):
        files = sorted(file for file in child.rglob("*") if file.suffix.lower() in _SUFFIXES)
        if not files:
            raise UserError(f"{child} holds no image. Known endings: {', '.join(_SUFFIXES)}.")
        images += files
        labels += [label] * len(files)
    return EncodedImages(str(folder), images, labels, [str(file) for file in images], tuple(c.name for c in classes))


def _split_missing(folder: Path, split: str) -> str:
    splits = ("train",) if split == "train" else TEST_SPLITS
    looked = [form for name in splits for form in (f"{name}.parquet", f"{name}-*.parquet", f"{name}/CLASS/IMAGE")]
    there = sorted(child.name for child in folder.iterdir())
    held = f"It holds: {', '.join(there[:10])}{', …' if len(there) > 10 else ''}." if there else "It is empty."
    return f"{folder} has no images to {split} on. Looked for {', '.join(looked)}. {held}"

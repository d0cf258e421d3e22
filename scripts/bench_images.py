"""Time batches of augmented images against the usual transform of each sample, interleaved, and print the ratio.

python scripts/bench_images.py                              random images of CIFAR-10's size
python scripts/bench_images.py --data_dir FOLDER            CIFAR-10, as load_images reads it
"""

import argparse
import statistics
import time

import torch
from benchmark import Goal, report
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from hf_momentum.errors import require_extra
from hf_momentum.tasks.augmentation import CIFAR10_MEAN, CIFAR10_STD, AugmentedImages, collate
from hf_momentum.tasks.images import ImageSet, load_images

GOAL = 10


class TransformedImages(Dataset):
    """The usual pipeline: a decoded array becomes a PIL image, which torchvision crops, flips and normalises.

    Args:
        images: What is transformed.
    """

    def __init__(self, images: ImageSet) -> None:
        self.arrays, self.labels = images.pixels.permute(0, 2, 3, 1).contiguous().numpy(), images.labels.tolist()
        self.from_array = require_extra("PIL.Image", "vision").fromarray
        transforms = require_extra("torchvision.transforms", "vision")
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.pixels.shape[2:], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(CIFAR10_MEAN, CIFAR10_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.from_array(self.arrays[index])), self.labels[index]


def loaders(images: ImageSet, batch: int, workers: int) -> tuple[DataLoader, DataLoader]:
    """Make the usual loader and ours, alike in all but the data set."""
    ours = AugmentedImages(images, CIFAR10_MEAN, CIFAR10_STD, padding=4, flip=True)
    ours.set_epoch(0)
    settings = {"batch_size": batch, "shuffle": True, "num_workers": workers, "persistent_workers": workers > 0}
    return DataLoader(TransformedImages(images), **settings), DataLoader(ours, collate_fn=collate, **settings)


def seconds(loader: DataLoader, epoch: int) -> float:
    """Time one epoch."""
    start = time.perf_counter()
    if isinstance(loader.dataset, AugmentedImages):
        loader.dataset.set_epoch(epoch)
    for _ in loader:
        pass
    return time.perf_counter() - start


def main() -> None:
    """Time both loaders round by round, for every number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="CIFAR-10 in a folder")
    parser.add_argument("--images", type=int, default=10_240, help="images per epoch")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.data_dir:
        train = load_images("cifar10", data_dir=args.data_dir).train
        images = ImageSet(train.pixels[: args.images], train.labels[: args.images])
    else:
        pixels = torch.randint(256, (args.images, 3, 32, 32), dtype=torch.uint8)
        images = ImageSet(pixels, torch.randint(10, (args.images,)))
    table = Table(
        title=f"Crop, flip and normalise {len(images.labels):,} {'CIFAR-10' if args.data_dir else 'random'} images, "
        f"batch {args.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for column in ("workers", "per sample, images/s", "ours, images/s", f"ratio (goal ≥ {GOAL})"):
        table.add_column(column, justify="right")
    speeds = []
    for workers in args.workers:
        pair = loaders(images, args.batch, workers)
        times = [[seconds(loader, epoch) for loader in pair] for epoch in track(range(args.rounds + 1), "rounds")]
        usual, ours = (len(images.labels) / statistics.median(column) for column in zip(*times[1:], strict=True))
        ratio = statistics.median(theirs / our for theirs, our in times[1:])
        table.add_row(str(workers), f"{usual:,.0f}", f"{ours:,.0f}", f"{ratio:.1f}")
        speeds.append((usual, ours))
    usual, ours = map(max, zip(*speeds, strict=True))
    table.add_row("each at its best", f"{usual:,.0f}", f"{ours:,.0f}", f"{ours / usual:.1f}")
    Console().print(table)
    report([Goal("augmented images per second / transformed one by one", ours / usual, GOAL, at_least=True)])


if __name__ == "__main__":
    main()

"""SGD, SGDM or SVAG in a plain Accelerate loop: a small network learns scikit-learn's handwritten digits.

  one process    python recipes/accelerate_loop.py --optim svag --ell 4
  two processes  torchrun --nproc_per_node 2 recipes/accelerate_loop.py --optim svag --ell 4

`--steps` and `--lr` are those of SGD: SVAG takes ℓ times as many steps at η/ℓ, each on two batches.
"""

import argparse
from itertools import chain, islice, repeat

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hf_momentum import create_optimizer, svag_hyperparameters
from hf_momentum.errors import require_extra
from hf_momentum.training.accelerate import SVAG


def main(argv: list[str] | None = None) -> None:
    """Train, and print the share of the test digits that are read correctly."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--optim", choices=["sgd", "sgdm", "svag"], default="sgdm")
    parser.add_argument("--lr", type=float, default=0.5, help="effective learning rate η")
    parser.add_argument("--ell", type=float, help="ℓ of svag")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(argv)
    if (is_svag := options.optim == "svag") != (options.ell is not None):
        parser.error("--optim svag and --ell need each other")
    lr, steps = svag_hyperparameters(options.lr, options.steps, options.ell if is_svag else 1)
    set_seed(0)
    digits = require_extra("sklearn.datasets", "text").load_digits()
    images, labels = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=32, shuffle=True, drop_last=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = create_optimizer("sgd" if is_svag else options.optim, model, lr=lr)
    batches = 2 if is_svag else 1  # per step; steps run on from one epoch into the next
    plugin = GradientAccumulationPlugin(num_steps=batches, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), gradient_accumulation_plugin=plugin)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    svag = SVAG(options.ell, accelerator) if is_svag else None

    for inputs, targets in islice(chain.from_iterable(repeat(loader)), steps * batches):
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(svag.weigh(loss) if is_svag else loss)
            optimizer.step()
            optimizer.zero_grad()
    with torch.inference_mode():
        correct = model(images[1500:].to(accelerator.device)).argmax(dim=1).cpu() == labels[1500:]
    accelerator.print(f"{options.optim}: {steps} steps, test accuracy {correct.float().mean():.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()

"""An Accelerate loop with SVAG whose gradients are known: means of the data."""

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.utils.data import DataLoader


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def accelerator(steps: int, across_epochs: bool = False) -> Accelerator:
    plugin = GradientAccumulationPlugin(num_steps=steps, sync_with_dataloader=not across_epochs)
    return Accelerator(cpu=True, gradient_accumulation_plugin=plugin)


def prepared(loop: Accelerator, data) -> tuple[nn.Module, DataLoader]:
    return loop.prepare(nn.Linear(3, 1, bias=False, dtype=torch.float64), DataLoader(data, batch_size=2))


def applied_gradients(loop, svag, model, loader, epochs: int = 1, skip: int = 0) -> list[torch.Tensor]:
    """Every step's gradient of the mean of x·w over batches x of two rows: the mean of x, weighted."""
    gradients = []
    for epoch in range(epochs):
        for (x,) in skip_first_batches(loader, skip) if skip and not epoch else loader:
            with loop.accumulate(model):
                loss = model(x).mean()
                weighed = svag.weigh(loss)
                assert weighed.item() == loss.item()
                loop.backward(weighed)
                if loop.sync_gradients:
                    gradients.append(loop.unwrap_model(model).weight.grad[0].clone())
                    model.zero_grad()
    return gradients

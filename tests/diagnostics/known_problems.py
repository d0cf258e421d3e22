"""Models whose gradients, Hessians and gradient noise are known exactly, or found densely."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from tiny_models import tiny_classifier
from torch import Tensor, nn

from hf_momentum.diagnostics.estimates import Estimate
from hf_momentum.diagnostics.probe import Probe


class Bowl(nn.Module):
    """`L = ½ xᵀHx` at x, with batches that shift the gradient and the Hessian: `g_b = (H + A_b) x + e_b`."""

    def __init__(self, hessian: Tensor, at: Tensor):
        super().__init__()
        self.hessian = hessian
        self.x = nn.Parameter(at.clone())

    def forward(self, shift: Tensor, extra: Tensor | float = 0.0) -> dict:
        return {"loss": 0.5 * self.x @ (self.hessian + extra) @ self.x + shift @ self.x}


class Regression(nn.Module):
    """`L = ½ mean (w·x − y)²` on rows of a table; a batch is a tensor of row numbers."""

    def __init__(self, rows: int = 400, dim: int = 4, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        scale = torch.linspace(0.5, 2.0, dim, dtype=torch.float64)
        self.inputs = torch.randn(rows, dim, generator=generator, dtype=torch.float64) * scale
        noise = torch.randn(rows, generator=generator, dtype=torch.float64)
        self.targets = self.inputs @ torch.ones(dim, dtype=torch.float64) + noise
        self.weight = nn.Parameter(torch.full((dim,), 0.3, dtype=torch.float64))

    def loss(self, index: Tensor) -> Tensor:
        return 0.5 * (self.inputs[index] @ self.weight - self.targets[index]).square().mean()

    def per_example_gradients(self) -> Tensor:
        residuals = self.inputs @ self.weight.detach() - self.targets
        return residuals[:, None] * self.inputs

    def truth(self) -> dict[str, Tensor]:
        """Gradient, Hessian and per-example covariance of the whole table."""
        gradients = self.per_example_gradients()
        mean = gradients.mean(0)
        covariance = (gradients - mean).T @ (gradients - mean) / len(gradients)
        return {"gradient": mean, "hessian": self.inputs.T @ self.inputs / len(self.inputs), "covariance": covariance}


def regression_probe(model: Regression) -> Probe:
    return Probe(model, loss=Regression.loss)


class TiedNet(nn.Module):
    """A net with a weight used twice, a frozen layer and a parameter that the loss does not depend on."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.last = nn.Linear(3, 1)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.frozen(self.second(self.first(x).tanh()).tanh()).tanh())


class NormNet(nn.Module):
    """Two batch normalisations, one of them frozen, and dropout."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2), nn.BatchNorm1d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


def rows(outputs: int, count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    return torch.randn(count, 3, **options), torch.randn(count, outputs, **options)


def tokens(count: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 12, (count, 5), generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


SMALL = {
    "vocab_size": 12,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 4,
    "max_position_embeddings": 8,
}


def small_roberta(**changes) -> nn.Module:
    return tiny_classifier(**SMALL | changes).double().train()


def lora_roberta() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=1, target_modules=["query", "value"], task_type="SEQ_CLS", lora_dropout=0.1)
    model = get_peft_model(small_roberta(), config).double().train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros at first
            nn.init.normal_(parameter, std=0.5)
    return model


def probes() -> dict[str, tuple[Probe, object]]:
    """Name → a probe and a batch for it; all in float64 and small enough for dense Hessians."""
    torch.manual_seed(0)
    tied, norm = TiedNet().double(), NormNet().double().train()
    norm.net[5].eval()
    bowl = Bowl(torch.diag(torch.tensor([3.0, 1.0, -2.0]).double()), torch.tensor([1.0, -1.0, 2.0]).double())
    regression = Regression()
    return {
        "quadratic": (Probe(bowl), {"shift": torch.ones(3).double()}),
        "regression": (regression_probe(regression), torch.arange(20)),
        "tied, frozen and unused weights": (Probe(tied, loss=squared_error), rows(1)),
        "batch normalisation": (Probe(norm, loss=squared_error), rows(2)),
        "RoBERTa with SDPA": (Probe(small_roberta()), tokens()),
        "LoRA": (Probe(lora_roberta()), tokens()),
    }


def dense_hessian(probe: Probe, batch: object) -> Tensor:
    """The Hessian as a matrix `(n, n)`, by torch's own function on the model as a function of its weights."""
    from hf_momentum.diagnostics.probe import measuring

    names = {id(parameter): name for name, parameter in probe.model.named_parameters()}
    keys = [names[id(parameter)] for parameter in probe.parameters]

    def loss(flat: Tensor) -> Tensor:
        weights = dict(zip(keys, probe.unflatten(flat), strict=True))
        return torch.func.functional_call(_Loss(probe), {f"model.{k}": w for k, w in weights.items()}, (batch,))

    with measuring(probe.model, probe.mode):
        return torch.autograd.functional.hessian(loss, probe.flatten(probe.parameters).detach())


class _Loss(nn.Module):
    def __init__(self, probe: Probe):
        super().__init__()
        self.model, self.function = probe.model, probe._loss

    def forward(self, batch: object) -> Tensor:
        return self.function(self.model, batch)


def dense_vector(vector: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in vector])


def check_coverage(found: Sequence[Estimate], truth: float, unbiased: bool = True) -> None:
    """A rate of 93–97% must be able to give this number of intervals around the truth; the mean must be the truth."""
    count, covered = len(found), sum(estimate.low <= truth <= estimate.high for estimate in found)
    assert stats.binom.ppf(0.001, count, 0.93) <= covered <= stats.binom.ppf(0.999, count, 0.97), covered
    values = [estimate.value for estimate in found]
    if unbiased:
        assert abs(np.mean(values) - truth) < 4 * stats.sem(values), (np.mean(values), truth)

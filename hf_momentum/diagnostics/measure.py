"""All that a verdict needs, measured on one set of micro-batches at a stated cost."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _NormBase

from hf_momentum.diagnostics.curvature import RitzPairs, curvature_from_products, top_eigenpairs
from hf_momentum.diagnostics.estimates import mean_of, pair_statistics
from hf_momentum.diagnostics.measurements import Measurements, Mode
from hf_momentum.diagnostics.noise import gather_over_ranks, gradient_sum, noise_from_products
from hf_momentum.diagnostics.probe import Probe, inner_products
from hf_momentum.errors import UserError


@dataclass(frozen=True)
class Budget:
    """What a measurement spends.

    Attributes:
        search: Micro-batches on which the modes are sought by Lanczos.
        products: The most Hessian–vector products that each of them gets there.
        blocks: Of three other micro-batches, on which everything is estimated; the intervals have one degree of
            freedom less.
        modes: Leading modes measured one by one.
    """

    search: int
    products: int
    blocks: int
    modes: int

    @property
    def batches(self) -> int:
        """Micro-batches needed, on each rank."""
        return self.search + 3 * self.blocks

    @property
    def gradients(self) -> int:
        """The cost in gradients of one micro-batch, a product counted as two of them and a forward pass as a third.

        A micro-batch of the search takes one gradient, and for each product one more and the product. One of the
        estimates takes the loss, three gradients, and three products and one per mode.
        """
        search = self.search * (1 + 3 * self.products)
        return round(search + 3 * self.blocks * (1 / 3 + 3 + 2 * (3 + self.modes)))


BUDGETS = {
    "economy": Budget(search=2, products=6, blocks=4, modes=1),
    "full": Budget(search=4, products=12, blocks=8, modes=3),
}


def get_budget(name: str) -> Budget:
    """Look a budget up.

    Args:
        name: One of `BUDGETS`.

    Returns:
        The budget.

    Raises:
        UserError: If there is none of that name.
    """
    if name not in BUDGETS:
        raise UserError(f"Unknown budget: {name!r}. Allowed: {', '.join(BUDGETS)}.")
    return BUDGETS[name]


def measure(
    probe: Probe, batches: Iterable[Any], *, budget: str = "economy", seed: int = 0, population: int | None = None
) -> Measurements:
    """Measure what `regime.assess` judges, at the model's present weights.

    | budget | micro-batches | Hessian products | cost in gradients of one | memory in copies of the weights |
    |---|---|---|---|---|
    | economy | 2 to find λ_max's mode, 12 for the estimates | at most 60 | at most 174 | about 12 |
    | full | 4 to find three modes, 24 for the estimates | at most 192 | at most 516 | about 22 |

    The modes are sought on other micro-batches than those that give their curvature, gradient and noise: these
    estimates are unbiased, while the Ritz values of few examples are too large. Under `torch.distributed` every rank
    calls this with micro-batches of its own and spends the budget on them; all get the estimates from all of them.

    Args:
        probe: The model and its loss, the mean over a batch's examples.
        batches: Independent micro-batches, all of the same number b of examples. Σ is that of single examples, so
            that b need not be the run's batch size. The first ones are used, as many as the budget says.
        budget: `"economy"` or `"full"`.
        seed: Of the random part of Lanczos' start.
        population: N, if the micro-batches were drawn from N examples without replacement (see
            `noise_from_products`); None if each example was drawn anew.

    Returns:
        The measurements.
    """
    spent = get_budget(budget)
    batches = list(islice(batches, spent.batches))
    size = _check(probe, batches, spent, budget)
    search, rest = batches[: spent.search], batches[spent.search :]
    modes = min(spent.modes, sum(parameter.numel() for parameter in probe.parameters))
    pairs = top_eigenpairs(probe, search, modes, max_products=spent.products, seed=seed)
    losses = gather_over_ranks(torch.stack([probe.loss(batch).double().cpu() for batch in rest]))
    total, squares = gradient_sum(probe, rest)
    rows, block_squares, forms, curvatures = _products(probe, rest, [total, *pairs.vectors])
    noise = noise_from_products(squares, rows[:, 0], size, population)
    terms = curvature_from_products(block_squares, forms, size)
    return Measurements(
        loss=float(losses.mean()),
        squared_gradient=noise.gradient_squared_norm,
        noise_trace=noise.noise_trace,
        hessian_noise=terms.noise_curvature,
        hessian_gradient=terms.gradient_curvature,
        noise_batch=terms.noise_scale,
        modes=_modes(pairs, rows[:, 1:], curvatures, size),
    )


def _products(
    probe: Probe, batches: Sequence[Any], directions: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All inner products in one pass, with each micro-batch's gradient and graph built once.

    Returns:
        `(M, 1 + modes)` of the gradients with the directions (the gradients' sum, then the modes); of the K blocks
        the `(K, 3)` squares and `(K, 3, 3, 3)` forms that `curvature_from_products` takes; and the `(M, modes)`
        curvatures along the modes. Rank after rank.
    """
    modes, rows, squares, forms, curvatures = directions[1:], [], [], [], []
    for start in range(0, len(batches), 3):
        block = batches[start : start + 3]
        gradients = [probe.gradient(batch) for batch in block]
        rows.append(inner_products(gradients, directions))
        squares.append(torch.cat([inner_products([g], [g])[0] for g in gradients]))
        found = torch.stack([probe.quadratic_forms(batch, [*gradients, *modes]) for batch in block])
        forms.append(found[:, :3, :3])
        curvatures.append(found.diagonal(dim1=1, dim2=2)[:, 3:])
    parts = torch.cat(rows), torch.stack(squares), torch.stack(forms), torch.cat(curvatures)
    return tuple(map(gather_over_ranks, parts))


def _modes(pairs: RitzPairs, rows: np.ndarray, curvatures: np.ndarray, size: int) -> list[Mode]:
    """The modes from the `(M, modes)` gradients and curvatures along them, per example."""
    modes = []
    for along, curved in zip(rows.T, curvatures.T, strict=True):
        squared, noise = pair_statistics(along**2, along * along.sum())
        variance = pair_statistics(curved**2, curved * curved.sum())[1]
        modes.append(
            Mode(
                curvature=mean_of(curved).estimate(),
                squared_gradient=squared.estimate(),
                noise=noise.scaled(size).estimate(nonnegative=True),
                curvature_variance=variance.scaled(size).estimate(nonnegative=True),
            )
        )
    return modes


def _check(probe: Probe, batches: Sequence[Any], spent: Budget, name: str) -> int:
    """Refuse micro-batches that are too few, too small or of several sizes; otherwise give their size."""
    if len(batches) < spent.batches:
        raise UserError(
            f"{len(batches)} micro-batches are too few: the budget {name!r} needs {spent.batches} on each process. "
            "Give more, or split large ones into smaller ones of equal size."
        )
    sizes = sorted({examples_in(batch) for batch in batches})
    if len(sizes) > 1:
        raise UserError(
            f"The micro-batches have from {sizes[0]} to {sizes[-1]} examples; all must have the same number. Drop an "
            "incomplete last one."
        )
    norms = any(isinstance(module, _NormBase) for module in probe.model.modules())
    if sizes[0] < 1 or (norms and probe.mode == "training" and sizes[0] < 2):
        raise UserError(
            f"Micro-batches of {sizes[0]} examples are too small: they need at least 1, and 2 where the model "
            "normalises by the batch; a batch normalisation that is meant is that of the run's own batch size."
        )
    return sizes[0]


def examples_in(batch: Any) -> int:
    """Count the examples of a batch: the length of its first tensor.

    Args:
        batch: Tensors in any nesting of mappings, lists and tuples.

    Returns:
        The number.

    Raises:
        UserError: If there is no such tensor.
    """
    from accelerate.utils import find_batch_size

    try:
        return int(find_batch_size(batch))
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"Cannot tell how many examples a batch of type {type(batch).__name__} holds: its first entry must be a "
            "tensor whose first dimension counts them."
        ) from error

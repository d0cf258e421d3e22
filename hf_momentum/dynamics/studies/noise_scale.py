"""The noise scale σ: what of the distance between SGD and SGDM is due to noise, and whether only Σ and σ matter.

On a quadratic with constant Σ the squared RMS distance is a part that σ does not change, of start and curvature, and
one that is proportional to σ². On linear regression the oracles of mini-batches, SVAG and Gaussian noise of one σ²Σ(x)
have the same mean losses, exactly; label noise has Σ(x*) everywhere. In one step of SGD the noise term
`½ η² σ² tr(HΣ)` exceeds the curvature term `½ η² ∇LᵀH∇L` where the batch is below `B_noise = tr(HΣ) / (∇LᵀH∇L)`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_momentum.dynamics.estimates import mean_estimate, relative_difference
from hf_momentum.dynamics.iterates import last_iterate
from hf_momentum.dynamics.moments import LinearModel, Moments, joint_moments, rms_distance, sgdm_moments
from hf_momentum.dynamics.oracle import LabelNoiseOracle, MinibatchOracle, NoisyGradientOracle, Oracle
from hf_momentum.dynamics.problems import LinearRegression, Quadratic
from hf_momentum.dynamics.studies import Row
from hf_momentum.optim import svag_hyperparameters

EXAMPLES, DIM, START = 15, 2, 4.0  # of the regression; each coordinate of x₀ − x*
WITHOUT = {1: 1, 7: 5, 16: 8}  # B with replacement → the batch without, of 15 examples, that has the same σ
ELL = 4
LAWS = (
    "mini-batch",
    "mini-batch without replacement",
    "SVAG",
    "Gaussian, Σ(x)",
    "Rademacher, Σ(x)",
    "Gaussian, Σ(x*)",
    "label noise",
)


def cells(
    lr: float = 0.1,
    momentum: float = 0.9,
    time: float = 10.0,
    split_lr: float = 0.01,
    scales: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096),
    times: Sequence[float] = (0.5, 2.0, 10.0),
    ells: Sequence[int] = (1, 4, 16, 64),
    paths: int = 20_000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Make cells for the parts of the distance, the laws of the noise, and the terms of the descent.

    Args:
        lr: η on the regression.
        momentum: β.
        time: kη at the end of the runs.
        split_lr: η on the quadratic.
        scales: σ on the quadratic, whose curvature and Σ are 1 and x₀ is 1.
        batch_sizes: B on the regression.
        times: kη at which the mean losses are compared.
        ells: ℓ of SVAG, run at η/ℓ from B = 16.
        paths: Number of paths of the simulations.
        seed: Of the regression and of the noise.

    Returns:
        The cells.
    """
    common = {"momentum": momentum, "seed": seed}
    split = {"part": "split", "lr": split_lr, "time": time, "paths": paths}
    return [
        *(common | split | {"scale": scale} for scale in scales),
        *(
            common | {"part": "law", "law": law, "batch_size": size, "lr": lr, "time": time, "paths": paths}
            for law in LAWS
            for size in WITHOUT
        ),
        common | {"part": "terms", "batch_sizes": list(batch_sizes), "times": list(times), "lr": lr},
        common | {"part": "SVAG", "ells": list(ells), "lr": lr, "time": time},
    ]


def rows(part: str, **options: Any) -> list[Row]:
    """Compute one part.

    Args:
        part: "split", "law", "terms" or "SVAG".
        **options: What else its cells hold.

    Returns:
        Rows of `split_rows`, `law_rows`, `terms_rows` or `svag_rows`.
    """
    make = {"split": split_rows, "law": law_rows, "terms": terms_rows, "SVAG": svag_rows}[part]
    return [{"part": part} | row for row in make(**options)]


def split_rows(lr: float, momentum: float, time: float, scale: float, paths: int, seed: int) -> list[Row]:
    """Split the largest RMS distance on `½ x²` into its parts.

    Args:
        lr: η.
        momentum: β.
        time: kη at the end.
        scale: σ.
        paths: Number of paths.
        seed: Of the noise.

    Returns:
        Rows of the `source` "start and curvature" and "noise", each part's largest value over the steps, and "both",
        the distance, predicted and measured with its 95% interval at the step where it is predicted to be largest.
    """
    steps = round(time / lr)
    model, silent = (LinearModel.quadratic(1.0, scale=value) for value in (scale, 0.0))
    starts = {"start and curvature": (silent, 1.0), "noise": (model, 0.0), "both": (model, 1.0)}
    found: list[Row] = []
    for source, (part, x0) in starts.items():
        distances = [rms_distance(at) for at in joint_moments(part, x0, lr, momentum, at=range(1, steps + 1))]
        found.append({"source": source, "scale": scale, "predicted": max(distances)})
    worst = int(np.argmax(distances)) + 1
    oracle, start = NoisyGradientOracle(Quadratic([1.0]), scale=scale), torch.ones(paths, 1, dtype=torch.float64)
    sgd, sgdm = (_last(oracle, start, lr, beta, worst, seed) for beta in (0.0, momentum))
    found[-1] |= mean_estimate((sgd - sgdm)[:, 0].square()).root()._asdict()
    return found


def regression(seed: int) -> LinearRegression:
    """Make a linear regression whose residuals at the minimiser x* = 0 are all ±1, so that `Σ(x*) = H`.

    Args:
        seed: Of its features.

    Returns:
        The problem.
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(EXAMPLES, DIM, generator=generator, dtype=torch.float64)
    signs = torch.tensor([(-1.0) ** i for i in range(EXAMPLES)], dtype=torch.float64)
    return LinearRegression(features - torch.outer(signs, signs @ features) / EXAMPLES, signs)


def law_oracle(problem: LinearRegression, law: str, batch_size: int) -> Oracle:
    """Make an oracle of `σ² = 1/B`.

    Args:
        problem: Of `regression`.
        law: One of `LAWS`.
        batch_size: B, one of `WITHOUT`.

    Returns:
        The oracle.
    """
    batches, scale = MinibatchOracle(problem, batch_size), batch_size**-0.5
    make = {
        "mini-batch": lambda: batches,
        "mini-batch without replacement": lambda: MinibatchOracle(problem, WITHOUT[batch_size], replacement=False),
        "SVAG": lambda: MinibatchOracle(problem, ELL * batch_size).svag(ELL),
        "Gaussian, Σ(x)": batches.gaussian,
        "Rademacher, Σ(x)": lambda: NoisyGradientOracle(problem, batches.covariance, "rademacher", scale),
        "Gaussian, Σ(x*)": lambda: NoisyGradientOracle(problem, problem.matrix, scale=scale),
        "label noise": lambda: LabelNoiseOracle(problem, 1.0, scale=scale),
    }
    return make[law]()


def law_rows(law: str, batch_size: int, lr: float, momentum: float, time: float, paths: int, seed: int) -> list[Row]:
    """Measure SGD against SGDM under one law of the noise.

    Args:
        law: One of `LAWS`.
        batch_size: B, of `σ² = 1/B`.
        lr: η.
        momentum: β.
        time: kη at the end.
        paths: Number of paths.
        seed: Of the regression and the noise.

    Returns:
        A row: `measured`, SGDM's mean excess loss at the end less SGD's in percent of it, with its 95% interval, and
        `predicted` exactly; "squared measured" and so on are the same for the mean squared excess loss, for which the
        law itself matters.
    """
    problem, steps = regression(seed), round(time / lr)
    oracle, start = law_oracle(problem, law, batch_size), torch.full((paths, DIM), START, dtype=torch.float64)
    noise = seed + 1 + len(WITHOUT) * LAWS.index(law) + list(WITHOUT).index(batch_size)
    sgd, sgdm = (problem.loss(_last(oracle, start, lr, beta, steps, noise)) - 0.5 for beta in (0.0, momentum))
    constant = law in ("Gaussian, Σ(x*)", "label noise")
    model = LinearModel.of(law_oracle(problem, "Gaussian, Σ(x*)" if constant else "mini-batch", batch_size))
    exact = [_excess(model, at) for beta in (0.0, momentum) for at in sgdm_moments(model, START, lr, beta, at=[steps])]
    row = {"law": law, "batch size": batch_size, "predicted": 100 * (exact[1] / exact[0] - 1)}
    squares = relative_difference(sgdm.square(), sgd.square())._asdict()
    return [row | relative_difference(sgdm, sgd)._asdict() | {f"squared {key}": v for key, v in squares.items()}]


def terms_rows(batch_sizes: Sequence[int], times: Sequence[float], lr: float, momentum: float, seed: int) -> list[Row]:
    """Compare mean losses over the batch size with the terms of the descent, exactly.

    Args:
        batch_sizes: B.
        times: kη.
        lr: η.
        momentum: β.
        seed: Of the regression.

    Returns:
        Rows over `batch size` and `time`: `measured`, SGDM's mean excess loss less SGD's in percent of it, `predicted`
        the same with Σ(x*) for Σ(x), and `ratio` of the mean noise term to the mean curvature term under SGD there.
    """
    problem, steps = regression(seed), [round(time / lr) for time in times]
    found = []
    for size in batch_sizes:
        models = (
            LinearModel.of(MinibatchOracle(problem, size)),
            LinearModel.quadratic(problem.matrix.numpy(), problem.matrix.numpy(), size**-0.5),
        )
        runs = [[list(sgdm_moments(m, START, lr, beta, at=steps)) for beta in (0.0, momentum)] for m in models]
        for i, time in enumerate(times):
            measured, constant = (
                100 * (_excess(m, sgdm[i]) / _excess(m, sgd[i]) - 1)
                for m, (sgd, sgdm) in zip(models, runs, strict=True)
            )
            row = {"batch size": size, "time": f"kη = {time:g}", "measured": measured, "predicted": constant}
            found.append(row | {"ratio": noise_over_curvature(models[0], runs[0][0][i])})
    start = Moments(0, np.full(2 * DIM, START), np.zeros((2 * DIM, 2 * DIM)))
    ratio = noise_over_curvature(LinearModel.of(MinibatchOracle(problem, 1)), start)
    return [*found, {"batch size": None, "time": "start", "B_noise": ratio}]


def noise_over_curvature(model: LinearModel, at: Moments) -> float:
    """Give `σ² E tr(HΣ) / E ∇LᵀH∇L`, around a minimiser at 0.

    Args:
        model: The quadratic.
        at: The law of the positions.

    Returns:
        The ratio; at one point and σ² = 1 it is B_noise.
    """
    d, h = model.dim, model.hessian
    second = at.covariance[:d, :d] + np.outer(at.mean[:d], at.mean[:d])
    noise = model.noise(at.mean[:d], at.covariance[:d, :d])
    return float(np.trace(h @ noise) / np.trace(h @ h @ h @ second))


def svag_rows(ells: Sequence[int], lr: float, momentum: float, time: float, seed: int) -> list[Row]:
    """Follow SVAG, which keeps ησ² and lets η go to 0, exactly, from B = 16.

    Args:
        ells: ℓ.
        lr: η at ℓ = 1.
        momentum: β.
        time: kη at the end.
        seed: Of the regression.

    Returns:
        Rows over `ell`: SGDM's mean excess loss at the end less SGD's in percent of it.
    """
    batches, found = MinibatchOracle(regression(seed), 16), []
    for ell in ells:
        model, (rate, steps) = LinearModel.of(batches.svag(ell)), svag_hyperparameters(lr, round(time / lr), ell)
        sgd, sgdm = (
            _excess(model, at) for beta in (0.0, momentum) for at in sgdm_moments(model, START, rate, beta, at=[steps])
        )
        found.append({"ell": ell, "lr": rate, "variance": ell / 16, "measured": 100 * (sgdm / sgd - 1)})
    return found


def _excess(model: LinearModel, at: Moments) -> float:
    d = model.dim
    return float(0.5 * np.trace(model.hessian @ (at.covariance[:d, :d] + np.outer(at.mean[:d], at.mean[:d]))))


def _last(oracle: Oracle, start: Tensor, lr: float, momentum: float, steps: int, seed: int) -> Tensor:
    return last_iterate(oracle, start, lr, momentum, steps=steps, generator=torch.Generator().manual_seed(seed)).x

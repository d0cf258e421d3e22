"""Learning-rate schedules: SGDM against SGD at the same η_k, and against SGD at the averaged η̄_k.

`z_k = x_k − c_k m_k`, with `c_k = η̄_k β/(1−β)` for what the momentum will still move, obeys `z⁺ = z − η̄_k g(x_k)`,
by Eq. 3 and `η̄_k = (1−β) η_k + β η̄_{k+1}`. So SGDM is SGD at η̄ but for the lag `c_k m_k`, which is 0 at the end of the
run, and for gradients that are taken at x, not at z. Without curvature the end of the run is exactly that of SGD at η̄.
The noise is `σ = η^{−1/2}` of the peak η, which stays visible as η goes to 0.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_momentum.dynamics.estimates import relative_difference
from hf_momentum.dynamics.iterates import Rates, iterates
from hf_momentum.dynamics.moments import LinearModel, coupled_moments, rms_distance
from hf_momentum.dynamics.oracle import LabelNoiseOracle
from hf_momentum.dynamics.overparametrised import TwoLayerNet
from hf_momentum.dynamics.stability import oscillation_range
from hf_momentum.dynamics.studies import Row
from hf_momentum.dynamics.weak_error import fitted_order
from hf_momentum.optim import averaged_lr

# From the fraction of the run that is done to the fraction of the peak learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),
    "triangle": lambda done: 1 - abs(2 * done - 1),
    "warm-up": lambda done: min(1.0, 10 * done),
}
START = 3.0  # x₀ in standard deviations of the SME's stationary law
ORDERED = ("path η", "path η̄", "shadow")
AROUND = (-20, -10, -5, 0, 5, 10, 20)  # steps after the decay
NET_SIZE = {"examples": 8, "features": 3, "width": 4}
LABEL_NOISE = 0.1  # c, at σ = η^{−1/2}


def cells(
    lrs: Sequence[float] = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    curvature: float = 1.0,
    lr: float = 0.05,
    curvatures: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    momentum: float = 0.9,
    time: float = 10.0,
    net_lrs: Sequence[float] = (0.1, 0.4),
    net_time: float = 40.0,
    paths: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Make cells for each schedule: over η, over λ, and on a net.

    Args:
        lrs: Peak learning rates η on the quadratic `½ λ x²`.
        curvature: Its λ.
        lr: The peak learning rate at which λ is varied.
        curvatures: These λ.
        momentum: β.
        time: kη at the end of a run, which has `time / η` steps.
        net_lrs: Peak learning rates on the net.
        net_time: kη at the end of its runs.
        paths: Its number of paths.
        seed: Of the net, its start and its noise.

    Returns:
        The cells.
    """
    exact = {"problem": "quadratic", "momentum": momentum, "time": time}
    parts = [
        exact | {"over": "η", "points": [[lr, curvature] for lr in lrs]},
        exact | {"over": "λ", "points": [[lr, curvature] for curvature in curvatures]},
        {"problem": "net", "lrs": list(net_lrs), "momentum": momentum, "time": net_time, "paths": paths, "seed": seed},
    ]
    return [part | {"schedule": name} for part in parts for name in SCHEDULES]


def rows(problem: str, schedule: str, momentum: float, time: float, **options: Any) -> list[Row]:
    """Compare SGDM with SGD at η_k and at η̄_k under one schedule.

    Args:
        problem: "quadratic", exactly, or "net", by simulation.
        schedule: One of `SCHEDULES`.
        momentum: β.
        time: kη at the end.
        **options: What else the problem's cells hold.

    Returns:
        Rows of `quadratic_rows` or of `net_rows`.
    """
    make = quadratic_rows if problem == "quadratic" else net_rows
    return [{"problem": problem, "schedule": schedule} | row for row in make(schedule, momentum, time, **options)]


def learning_rates(schedule: str, lr: float, time: float, momentum: float) -> dict[str, list[float]]:
    """Give the learning rates of all steps.

    Args:
        schedule: One of `SCHEDULES`.
        lr: Its peak.
        time: kη at the end.
        momentum: β.

    Returns:
        Of SGDM at "η", of the SGD that matches at "η̄", and of that as if the run went on at its last learning rate,
        "η̄, endless".
    """
    steps = round(time / lr)
    lrs = [lr * SCHEDULES[schedule](k / steps) for k in range(steps)]
    beyond = lrs[-1:] * math.ceil(40 / (1 - momentum))
    endless = averaged_lr(lrs + beyond, momentum)[:steps]
    return {"η": lrs, "η̄": averaged_lr(lrs, momentum), "η̄, endless": endless}


def quadratic_rows(
    schedule: str, momentum: float, time: float, over: str, points: Iterable[tuple[float, float]]
) -> list[Row]:
    """Compare on quadratics, exactly.

    Args:
        schedule: One of `SCHEDULES`.
        momentum: β.
        time: kη at the end.
        over: What the points vary, "η" or "λ".
        points: Pairs of η and λ.

    Returns:
        Rows over `lr` and `curvature`. For each learning rate of SGD, NAME, they hold: `path NAME`, the largest RMS
        distance, and `mean NAME`, the largest distance of the means, over the largest standard deviation s of SGD at
        η_k; `loss NAME`, the largest difference of the mean losses over `½ λ s²`; and `end NAME`, SGDM's mean loss at
        the end less SGD's, in percent of it. `shadow` is as "path η̄" for z instead of x. Rows of `over` "step" follow
        the mean loss, in units of `½ λ s²`, through the decay of the schedule "step", and those of `over` "order" hold
        the orders in η of the distances, fitted where SGDM does not oscillate.
    """
    found: list[Row] = []
    for lr, curvature in points:
        row, seconds, spread = _compare(schedule, lr, curvature, momentum, time)
        found.append({"over": over, "lr": lr, "curvature": curvature} | row)
        if schedule == "step" and over == "λ":
            found += _around_the_decay(curvature, seconds, spread)
    return found + (_orders(found, momentum) if over == "η" else [])


def _compare(
    schedule: str, lr: float, curvature: float, momentum: float, time: float
) -> tuple[Row, dict[str, np.ndarray], float]:
    # The row; by learning rate of SGD, E x² of SGD and of SGDM over the steps, `(2, steps)`; and s.
    model, start = LinearModel.quadratic(curvature, scale=lr**-0.5), START / math.sqrt(2 * curvature)
    rates, spread, seconds, row = learning_rates(schedule, lr, time, momentum), 0.0, {}, {}
    for name, lrs in rates.items():
        sgd, sgdm = Rates(lrs, 0.0, len(lrs)), Rates(rates["η"], momentum, len(lrs))
        joint = list(coupled_moments(model, start, sgd, sgdm, at=range(1, len(lrs) + 1)))
        means, covariances = np.array([at.mean for at in joint]), np.array([at.covariance for at in joint])
        second = np.diagonal(covariances, axis1=1, axis2=2)[:, :2] + means[:, :2] ** 2
        seconds[name] = second.T
        spread = spread or math.sqrt(covariances[:, 0, 0].max())
        row[f"path {name}"] = max(map(rms_distance, joint)) / spread
        row[f"mean {name}"] = float(np.abs(means[:, 0] - means[:, 1]).max()) / spread
        row[f"loss {name}"] = float(np.abs(np.diff(second)).max()) / spread**2
        row[f"end {name}"] = 100 * float(second[-1, 1] / second[-1, 0] - 1)
        if name == "η̄":
            row["shadow"] = _shadow_distance(means, covariances, lrs, momentum) / spread
    return row, seconds, spread


def _shadow_distance(means: np.ndarray, covariances: np.ndarray, averaged: Sequence[float], momentum: float) -> float:
    # The largest RMS of y − z = y − x + c m, with y of SGD.
    lags = np.array([*averaged[1:], 0.0]) * momentum / (1 - momentum)
    apart = np.stack([np.ones_like(lags), -np.ones_like(lags), lags], axis=1)
    squares = np.einsum("ki,kij,kj->k", apart, covariances, apart) + (apart * means).sum(1) ** 2
    return math.sqrt(squares.max())


def _orders(found: Sequence[Row], momentum: float) -> list[Row]:
    slow = [row for row in found if row["lr"] * row["curvature"] < oscillation_range(momentum)[0]]
    if len(slow) < 3:
        return []
    fits = {name: fitted_order(*zip(*((row["lr"], row[name]) for row in slow), strict=True)) for name in ORDERED}
    return [{"over": "order", "distance": n, "order": f.order, "low": f.low, "high": f.high} for n, f in fits.items()]


def _around_the_decay(curvature: float, seconds: Mapping[str, np.ndarray], spread: float) -> list[Row]:
    series = {"SGD at η": seconds["η"][0], "SGD at η̄": seconds["η̄"][0], "SGDM": seconds["η"][1]}
    last = len(seconds["η"][0]) // 2  # the index of the position after the first small step
    steps = [k for k in AROUND if 0 <= last + k - 1 < 2 * last]
    about = {"over": "step", "curvature": curvature}
    return [about | {"step": k, **{n: float(v[last + k - 1]) / spread**2 for n, v in series.items()}} for k in steps]


def net_rows(schedule: str, momentum: float, time: float, lrs: Sequence[float], paths: int, seed: int) -> list[Row]:
    """Compare on a two-layer net with label noise, by simulation with common noise.

    Args:
        schedule: One of `SCHEDULES`.
        momentum: β.
        time: kη at the end.
        lrs: Peak learning rates.
        paths: Number of paths.
        seed: Of the net, its start and the noise.

    Returns:
        Rows over `lr` and `sgd at`: `measured` is SGDM's mean loss at the end less SGD's, in percent of it, with its
        95% interval, `loss SGD` and `loss SGDM` are these losses, and `path` the largest RMS distance over the largest
        standard deviation of SGD's positions.
    """
    generator = torch.Generator().manual_seed(seed)
    n, features, width = NET_SIZE.values()
    inputs, teacher, start = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((n, features), (width * (features + 1),), (1, width * (features + 1)))
    )
    net = TwoLayerNet(inputs, teacher)
    found = []
    for lr in lrs:
        oracle = LabelNoiseOracle(net, LABEL_NOISE, scale=lr**-0.5)
        rates = learning_rates(schedule, lr, time, momentum)
        for name in ("η", "η̄"):
            runs = [
                iterates(oracle, start.repeat(paths, 1), lrs, beta, steps=len(lrs), generator=noise, every=5)
                for lrs, beta in ((rates[name], 0.0), (rates["η"], momentum))
                for noise in [torch.Generator().manual_seed(seed + 1)]
            ]
            apart = spread = 0.0
            for sgd, sgdm in zip(*runs, strict=True):
                apart = max(apart, float((sgd.x - sgdm.x).square().sum(-1).mean()))
                spread = max(spread, float(sgd.x.var(0).sum()))
            losses = {"loss SGD": net.loss(sgd.x), "loss SGDM": net.loss(sgdm.x)}
            row = {"lr": lr, "sgd at": name, "path": math.sqrt(apart / spread)}
            row |= relative_difference(losses["loss SGDM"], losses["loss SGD"])._asdict()
            found.append(row | {key: float(value.mean()) for key, value in losses.items()})
    return found

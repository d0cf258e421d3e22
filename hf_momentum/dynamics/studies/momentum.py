"""The momentum β at matched effective learning rate, from 0 to .999, and schedules of it.

What SGD and SGDM differ by is governed by `ε = ηβ/(1−β)`, and in the long run, on a mode of curvature λ, by the ratio
`(2−h)/(2−κh)` of their stationary variances, `h = ηλ`, `κ = (1−β)/(1+β)`. A run that starts from `m₀ = 0` moves by
`Σ_k η̄_k g_k` in all. The share of the learning that SGDM delivers in K steps, `Σ η̄_k / Σ η_k = Σ_k η_k (1−β^{k+1}) /
Σ η_k` for constant β, is therefore small where K is not many times `1/(1−β)`.
"""

import math
from collections.abc import Sequence
from typing import Any

from hf_momentum.dynamics.iterates import Rates
from hf_momentum.dynamics.moments import LinearModel, Moments, coupled_moments, rms_distance
from hf_momentum.dynamics.stability import stationary_variance
from hf_momentum.dynamics.studies import Row
from hf_momentum.dynamics.studies.schedules import SCHEDULES, START
from hf_momentum.dynamics.weak_error import step_grid
from hf_momentum.optim import averaged_lr, momentum_schedule

# Name → arguments of `momentum_schedule`.
BETA_SCHEDULES: dict[str, dict[str, Any]] = {
    "0.9": {"name": "constant", "momentum": 0.9},
    "0.9→0": {"name": "linear", "start": 0.9, "end": 0.0},
    "0→0.9": {"name": "linear", "start": 0.0, "end": 0.9},
    "0.5→0.99 in the first half": {"name": "linear", "start": 0.5, "end": 0.99, "over": 0.5},
    "0.99→0.5 in cosine": {"name": "cosine", "start": 0.99, "end": 0.5},
}


def cells(
    momenta: Sequence[float] = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999),
    lrs: Sequence[float] = (0.001, 0.01, 0.1, 0.5),
    time: float = 10.0,
    horizons: Sequence[int] = (60, 300, 3000),
    schedule_lrs: Sequence[float] = (0.005, 0.02, 0.1),
) -> list[dict[str, Any]]:
    """Make cells for the distances, the share that is delivered, and the schedules of β.

    Args:
        momenta: β of the distances and of the shares.
        lrs: η, on a quadratic of curvature 1.
        time: kη at the end of the runs whose distances are taken.
        horizons: Steps of the runs whose shares are taken.
        schedule_lrs: η of the runs with schedules of β.

    Returns:
        The cells.
    """
    return [
        *({"part": "distance", "lr": lr, "time": time, "momenta": list(momenta)} for lr in lrs),
        *({"part": "share", "steps": steps, "momenta": list(momenta)} for steps in horizons),
        *({"part": "schedule", "name": n, "lrs": list(schedule_lrs), "time": time} for n in BETA_SCHEDULES),
    ]


def rows(part: str, **options: Any) -> list[Row]:
    """Compute one part.

    Args:
        part: "distance", "share" or "schedule".
        **options: What else its cells hold.

    Returns:
        Rows of `distance_rows`, `share_rows` or `schedule_rows`.
    """
    make = {"distance": distance_rows, "share": share_rows, "schedule": schedule_rows}[part]
    return [{"part": part} | row for row in make(**options)]


def compare(lr: float, sgd: Rates, sgdm: Rates) -> Row:
    """Compare SGD and SGDM on `½ x²` with `σ = η^{−1/2}`, exactly.

    Args:
        lr: η, of the noise.
        sgd: Rates of SGD.
        sgdm: Rates of SGDM.

    Returns:
        `path`, the largest RMS distance over the steps, and `mean`, that of the means, in standard deviations of the
        SME's stationary law; `loss`, the largest difference of the mean losses in units of the SME's stationary one;
        and `end`, SGDM's less SGD's in percent at the end.
    """
    spread = math.sqrt(0.5)
    grid = step_grid(sgd.steps, 400)
    joint = list(coupled_moments(LinearModel.quadratic(1.0, scale=lr**-0.5), START * spread, sgd, sgdm, at=grid))
    losses = [(_second(at, 0), _second(at, 1)) for at in joint]
    return {
        "path": max(map(rms_distance, joint)) / spread,
        "mean": max(abs(float(at.mean[0] - at.mean[1])) for at in joint) / spread,
        "loss": max(abs(a - b) for a, b in losses) / spread**2,
        "end": 100 * (losses[-1][1] / losses[-1][0] - 1),
    }


def _second(joint: Moments, i: int) -> float:
    return float(joint.covariance[i, i] + joint.mean[i] ** 2)


def distance_rows(lr: float, time: float, momenta: Sequence[float]) -> list[Row]:
    """Measure how far SGDM is from SGD at the same η.

    Args:
        lr: η.
        time: kη at the end.
        momenta: β.

    Returns:
        Rows of `compare` over `momentum` and `epsilon`, with the stationary `(2−h)/(2−κh) − 1` in percent as
        `stationary`.
    """
    found, steps = [], round(time / lr)
    for momentum in momenta:
        row = {"run": f"η = {lr:g}", "lr": lr, "momentum": momentum, "epsilon": lr * momentum / (1 - momentum)}
        ratio = stationary_variance(1.0, 1.0, lr, momentum) / stationary_variance(1.0, 1.0, lr)
        values = compare(lr, Rates(lr, 0.0, steps), Rates(lr, momentum, steps))
        found.append(row | values | {"stationary": 100 * (ratio - 1)})
    return found


def share_rows(steps: int, momenta: Sequence[float]) -> list[Row]:
    """Give the share of SGD's learning that SGDM from `m₀ = 0` delivers where the gradient is constant.

    Args:
        steps: Steps of the run.
        momenta: β.

    Returns:
        Rows over `memory`, `1/(1−β)`: `predicted` from η̄, `measured` from exact recursion of the mean, at a constant
        and at a linearly decaying learning rate (`schedule`).
    """
    found, model = [], LinearModel.quadratic(1e-9)
    for schedule in ("constant", "linear"):
        lrs = [SCHEDULES[schedule](k / steps) for k in range(steps)]
        for momentum in momenta:
            row = {"run": f"{steps} steps", "steps": steps, "schedule": schedule, "momentum": momentum}
            sgd, sgdm = Rates(lrs, 0.0, steps), Rates(lrs, momentum, steps)
            (last,) = coupled_moments(model, 1.0, sgd, sgdm, at=[steps])
            moved = float((1 - last.mean[1]) / (1 - last.mean[0]))
            share = sum(averaged_lr(lrs, momentum)) / sum(lrs)
            found.append(row | {"memory": 1 / (1 - momentum), "predicted": share, "measured": moved})
    return found


def schedule_rows(name: str, lrs: Sequence[float], time: float) -> list[Row]:
    """Compare SGD with SGDM under a schedule of β at constant η.

    Args:
        name: One of `BETA_SCHEDULES`.
        lrs: η.
        time: kη at the end.

    Returns:
        Rows over `lr` with values of `compare` against SGD at η, `path η` and so on, and against SGD at η̄, and with
        `peak`, the largest η̄ over η.
    """
    found, momentum = [], momentum_schedule(**BETA_SCHEDULES[name])
    for lr in lrs:
        steps = round(time / lr)
        betas = [momentum(k, steps, lr) for k in range(steps)]
        averaged, row = averaged_lr([lr] * steps, betas), {"name": name, "lr": lr}
        for label, sgd in (("η", [lr] * steps), ("η̄", averaged)):
            values = compare(lr, Rates(sgd, 0.0, steps), Rates([lr] * steps, betas, steps))
            row |= {f"{key} {label}": value for key, value in values.items()}
        found.append(row | {"peak": max(averaged) / lr})
    return found

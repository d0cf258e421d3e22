"""Do I need momentum? From measurements on a run and its hyperparameters to a verdict: numbers in, `RegimeReport` out.

L is the training loss, H its Hessian, Σ the covariance of one example's gradient, B the batch size, η the effective
learning rate (Eq. 3), β the momentum, `κ = (1−β)/(1+β)`. Where no other source is named, formulas are those of Wang et
al., "The Marginal Value of Momentum for Small Learning Rate SGD" (ICLR 2024, arXiv 2307.15196), or follow from its
Eq. 3 on a quadratic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_momentum.diagnostics.measurements import Estimated, Interval, Measurements, Setting
from hf_momentum.diagnostics.recursion import Array, Modes, log_loss_ratio, stability_limits
from hf_momentum.errors import UserError
from hf_momentum.optim.schedules import check_nonnegative

NOISE, CURVATURE, UNDECIDED = "noise dominates", "curvature dominates", "undecided"
EFFECT_FLOOR = 0.1  # of |log E L_SGD / E L_SGDM|: final losses within about 10% count as the same
LIMIT_FRACTION = 0.5  # of SGD's limit of stability
_DRAWS = 400
_GRID = 48  # learning rates or batch sizes among which a boundary is looked for
_MOST_TIMES = 100  # as many micro-batches that are worth naming


@dataclass(frozen=True)
class ModeLimits:
    """The limits of stability along one mode.

    Attributes:
        curvature: λ.
        sgd: `2λ / (v + λ²)`, infinite where λ ≤ 0.
        sgdm: `2λ / (v + κλ²)`.
    """

    curvature: float
    sgd: float
    sgdm: float


@dataclass(frozen=True)
class RegimeReport:
    """Which term rules a run, what momentum is predicted to change, and the verdict.

    Attributes:
        setting: The run.
        descent: `η |∇L|²`, by which a step of SGD lowers the loss at first order.
        noise: `½ η² tr(HΣ)/B`, the noise-induced term.
        curvature: `½ η² ∇LᵀH∇L`, the curvature-induced term.
        noise_batch: B_noise, below which the noise-induced term is the larger one.
        noise_ratio: `B_noise/B`, the noise-induced over the curvature-induced term.
        h: `η λ_max`.
        sgd_limit: The η below which SGD is stable along all modes, curvature noise included.
        sgdm_limit: Likewise SGDM.
        limit_fraction: η as a fraction of `sgd_limit`.
        mode_limits: Both limits along each mode.
        log_ratio: `log(E L_SGD / E L_SGDM)` after the remaining steps; above 0 SGDM ends lower.
        score: Its absolute value.
        difference: `η² β/(4(1+β)) tr(HΣ)/B`, the stationary difference of the losses at first order in η.
        matching_lr: SGD would match below it: the least learning rate at which momentum matters; infinite if none.
        matching_batch: The largest batch size below B at which SGD is stable and matches, or None.
        effect_floor: The score that counts as a difference.
        verdict: `NOISE`, `CURVATURE` or `UNDECIDED`; see `decide`.
    """

    setting: Setting
    descent: Interval
    noise: Interval
    curvature: Interval
    noise_batch: Interval
    noise_ratio: Interval
    h: Interval
    sgd_limit: Interval
    sgdm_limit: Interval
    limit_fraction: Interval
    mode_limits: tuple[ModeLimits, ...]
    log_ratio: Interval
    score: Interval
    difference: Interval
    matching_lr: float
    matching_batch: int | None
    effect_floor: float
    verdict: str

    @property
    def sentences(self) -> tuple[str, ...]:
        """The verdict for people, then its reasons, and what would decide an open one."""
        found = [_headline(self), *_reasons(self)]
        if self.verdict == UNDECIDED:
            found += _deciders(self)
        if self.setting.lr >= self.sgdm_limit.value:
            found.append(
                f"At this learning rate SGDM is not stable either: its own limit is {self.sgdm_limit.value:.3g}. "
                "Lower the learning rate first."
            )
        return tuple(found)


def decide(limit_fraction: Interval, score: Interval, effect_floor: float = EFFECT_FLOOR) -> str:
    """Decide whether momentum matters, which it does where, and only where, both conditions hold.

    1. η is above half of SGD's limit of stability `min_i 2λ_i/(v_i + λ_i²)`. Over O(1/η) steps SGD and SGDM stay
       within `O(√(η/(1−β)))` (Wang et al. 2024, its main theorem), and the closer η is to the limit the less that
       says: on one mode the stationary losses are apart by `(2−κh)/(2−h)`, at h = 1, half of the limit, at most 2.
       Far below, the terms' ratio B_noise/B may be anything and momentum is still marginal. The limit has the
       mini-batches' curvature noise v in it: small batches lower it, and leave momentum less to stabilise.
    2. The predicted difference `|log E L_SGD / E L_SGDM|` exceeds the stated floor: the second-moment recursions of
       Eq. 3 along the modes of the Hessian, over the steps that remain (`diagnostics.recursion`).

    Each is true or false only if its whole 95% interval says so. One that is false is enough for "noise dominates";
    "curvature dominates" needs both to be true; all else is "undecided".

    Args:
        limit_fraction: η over SGD's limit.
        score: The predicted difference.
        effect_floor: The floor.

    Returns:
        `NOISE`, `CURVATURE` or `UNDECIDED`.
    """
    if limit_fraction.high <= LIMIT_FRACTION or score.high <= effect_floor:
        return NOISE
    if limit_fraction.low > LIMIT_FRACTION and score.low > effect_floor:
        return CURVATURE
    return UNDECIDED


def assess(
    measured: Measurements, setting: Setting, effect_floor: float = EFFECT_FLOOR, seed: int = 0
) -> RegimeReport:
    """Judge whether a run needs momentum.

    The terms' intervals are their inputs', scaled. Those of the limits and of the prediction come from draws of all
    modes' inputs, independent and normal with the inputs' intervals: both are far from linear near the limit, where a
    delta method would fail, and evaluating them for some hundred draws at once takes a fraction of a second.

    Args:
        measured: What was measured.
        setting: The run.
        effect_floor: The |log ratio| of final losses that counts as a difference, to be stated beforehand.
        seed: Of the draws.

    Returns:
        The report.

    Raises:
        UserError: If the floor is not positive and finite.
    """
    if not check_nonnegative("effect_floor", effect_floor):
        raise UserError("Invalid effect_floor: 0. Two runs always differ by something; state what counts.")
    lr, batch, beta = setting.lr, setting.batch_size, setting.momentum
    drawn = measured.draw(batch, _DRAWS, np.random.default_rng(seed))
    point = Modes(*(values[:1] for values in drawn))
    limits = [stability_limits(_leading(drawn), momentum) for momentum in (0.0, beta)]
    sgd_limit, sgdm_limit = (_summary(each.min(-1)) for each in limits)
    fraction = _summary(lr / limits[0].min(-1))
    log_ratio = _summary(log_loss_ratio(drawn, measured.loss, lr, beta, setting.pieces))
    score = _absolute(log_ratio)
    leading = [values[0] for values in (drawn.curvature[:, :-1], *limits)]
    return RegimeReport(
        setting=setting,
        descent=_scaled(measured.squared_gradient, lr),
        noise=_scaled(measured.hessian_noise, lr**2 / (2 * batch)),
        curvature=_scaled(measured.hessian_gradient, lr**2 / 2),
        noise_batch=_scaled(measured.noise_batch, 1.0),
        noise_ratio=_scaled(measured.noise_batch, 1 / batch),
        h=_scaled(max((mode.curvature for mode in measured.modes), key=lambda each: each.value), lr),
        sgd_limit=sgd_limit,
        sgdm_limit=sgdm_limit,
        limit_fraction=fraction,
        mode_limits=tuple(ModeLimits(*map(float, each)) for each in zip(*leading, strict=True)),
        log_ratio=log_ratio,
        score=score,
        difference=_scaled(measured.hessian_noise, lr**2 * beta / (4 * (1 + beta) * batch)),
        matching_lr=_matching_lr(point, measured.loss, setting, sgd_limit.value, sgdm_limit.value, effect_floor),
        matching_batch=_matching_batch(point, measured.loss, setting, effect_floor),
        effect_floor=effect_floor,
        verdict=decide(fraction, score, effect_floor),
    )


def predicted_ratios(measured: Measurements, setting: Setting, lrs: Sequence[float]) -> list[float]:
    """Predict `E L_SGD / E L_SGDM` after the remaining steps at other learning rates.

    Args:
        measured: What was measured.
        setting: The run; its learning rate does not enter.
        lrs: The learning rates η.

    Returns:
        One ratio for each.
    """
    point = measured.draw(setting.batch_size, 0, np.random.default_rng())
    ratios = np.exp(log_loss_ratio(point, measured.loss, np.asarray(lrs, float), setting.momentum, setting.pieces))
    return ratios.tolist()


def _scaled(estimate: Estimated, factor: float) -> Interval:
    return Interval(estimate.value * factor, estimate.low * factor, estimate.high * factor)


def _summary(draws: Array) -> Interval:
    """The first of the draws, which is the estimate, with the interval that holds 95% of them, and it."""
    low, high = np.quantile(draws, (0.025, 0.975), method="nearest")  # limits may be infinite: nothing to interpolate
    return Interval(float(draws[0]), float(min(low, draws[0])), float(max(high, draws[0])))


def _absolute(interval: Interval) -> Interval:
    ends = sorted((abs(interval.low), abs(interval.high)))
    return Interval(abs(interval.value), 0.0 if interval.low <= 0 <= interval.high else ends[0], ends[1])


def _leading(modes: Modes) -> Modes:
    return Modes(*(values[..., :-1] for values in modes))


def _matching_lr(modes: Modes, loss: float, setting: Setting, sgd: float, sgdm: float, floor: float) -> float:
    """The least η above half of SGD's limit whose score exceeds the floor, on a grid within a grid."""
    low, high = LIMIT_FRACTION * sgd, max(sgdm, setting.lr)
    if not low < high < math.inf:
        return math.inf
    for _ in range(2):
        lrs = np.geomspace(low, high, _GRID)
        matters = np.abs(log_loss_ratio(modes, loss, lrs, setting.momentum, setting.pieces)) > floor
        if not matters.any():
            return math.inf
        first = int(matters.argmax())
        if first == 0:
            return float(lrs[0])
        low, high = lrs[first - 1], lrs[first]
    return float(low)


def _matching_batch(modes: Modes, loss: float, setting: Setting, floor: float) -> int | None:
    """The largest of some smaller batch sizes at which SGD is stable and momentum does not matter."""
    batches = np.unique(np.geomspace(1, setting.batch_size, _GRID).round().astype(int))[:-1]
    if not len(batches):
        return None
    times = setting.batch_size / batches[:, None]
    smaller = modes._replace(noise=modes.noise * times, curvature_variance=modes.curvature_variance * times)
    score = np.abs(log_loss_ratio(smaller, loss, setting.lr, setting.momentum, setting.pieces))
    fraction = setting.lr / stability_limits(_leading(smaller), 0.0).min(-1)
    matches = (fraction <= LIMIT_FRACTION) | ((score <= floor) & (fraction < 1))
    return int(batches[matches].max()) if matches.any() else None


def _headline(report: RegimeReport) -> str:
    size = report.setting.momentum_bytes
    saving = f", dropping it saves {size / 2**30:.3g} GiB" if size else ""
    if report.verdict == NOISE:
        return f"Noise dominates, momentum is of marginal value here{saving}."
    if report.verdict == UNDECIDED:
        return "Undecided at this sample size."
    if report.log_ratio.value < 0:
        return f"Curvature dominates, but SGD is predicted to end lower than SGDM: momentum does not pay here{saving}."
    batch = "" if report.matching_batch is None else f" or at batch size {report.matching_batch:,}"
    match = f"SGD would match below learning rate {report.matching_lr:.3g}{batch}"
    return f"Curvature dominates, momentum buys stability; {match}."


def _reasons(report: RegimeReport) -> list[str]:
    fraction, setting = report.limit_fraction, report.setting
    found = [
        f"The learning rate {setting.lr:.3g} is {_percent(fraction)} of the limit up to which SGD is stable at batch "
        f"size {setting.batch_size:,}; momentum can matter above {LIMIT_FRACTION:.0%} alone.",
        f"After {setting.steps:,} more steps the loss of SGD is predicted to be {_times(report.log_ratio)} times that "
        f"of SGDM; a factor of {math.exp(report.effect_floor):.3g} counts as a difference.",
    ]
    if report.verdict == NOISE and report.noise_ratio.high < 1:
        found.append(
            f"In a single step the curvature-induced term is the larger one (B_noise/B = "
            f"{report.noise_ratio.value:.2g}), but it is too small here for momentum to pay."
        )
    return found


def _deciders(report: RegimeReport) -> list[str]:
    """What would settle each condition that is open; intervals shrink with the root of the number of micro-batches."""
    conditions = (
        ("Whether the learning rate is above half of SGD's limit", report.limit_fraction, LIMIT_FRACTION),
        ("Whether the predicted difference counts", report.score, report.effect_floor),
    )
    found = []
    for question, interval, threshold in conditions:
        if interval.low <= threshold < interval.high:
            gap = abs(interval.value - threshold)
            width = interval.value - interval.low if interval.value > threshold else interval.high - interval.value
            times = math.ceil((width / gap) ** 2) if gap > 0 and width < gap * math.sqrt(_MOST_TIMES) else math.inf
            number = f"about {times} times as many" if times < math.inf else "no practical number of"
            found.append(f"{question} is open: {number} micro-batches would decide it.")
    bound = report.matching_lr
    if bound < report.setting.lr:
        found.append(f"Below learning rate {bound:.3g} SGD would match, by these estimates.")
    return found


def _percent(interval: Interval) -> str:
    return f"{interval.value:.0%} ({interval.low:.0%} to {interval.high:.0%})"


def _times(interval: Interval) -> str:
    value, low, high = (f"{math.exp(each):.3g}" for each in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})"

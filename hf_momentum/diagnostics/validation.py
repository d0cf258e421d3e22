"""Was the verdict right? What was measured in a run beside what SGD and SGDM then did, and which number foretells it.

A cell is a place in the space of runs, such as a task, a learning rate and a batch size. Its records are those of
its runs, with `optim`, `seed`, the final `loss` (None if it was not finite) and the loss of `chance`, and one with a
measurement.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hf_momentum.diagnostics.measurements import Interval, Measurements, Mode, Setting
from hf_momentum.diagnostics.regime import EFFECT_FLOOR, RegimeReport, assess
from hf_momentum.errors import UserError
from hf_momentum.results.ranking import AucComparison, paired_auc_interval
from hf_momentum.results.statistics import paired_difference

MOST_LOSS = 10.0  # times that of chance; what is lost by more is not told apart
PREDICTED = "predicted difference"
_INTERVALS = ("log_ratio", "score", "h", "limit_fraction", "noise", "curvature", "difference")


def measurement_to_json(measured: Measurements, setting: Setting) -> dict[str, Any]:
    """Put a measurement into a form that JSON holds.

    Args:
        measured: What was measured.
        setting: How the run goes on.

    Returns:
        Both as plain values; an infinite end of an interval as text.
    """
    return {"measured": _to_json(asdict(measured)), "setting": _to_json(asdict(setting))}


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(each) for each in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def measurement_from_json(record: Mapping[str, Any]) -> tuple[Measurements, Setting]:
    """Read what `measurement_to_json` gave.

    Args:
        record: Holds `measured` and `setting`.

    Returns:
        The measurement and the setting.
    """
    found = dict(record["measured"])
    loss, modes = found.pop("loss"), found.pop("modes")
    read = [Mode(**{name: _interval(each) for name, each in mode.items()}) for mode in modes]
    totals = {name: _interval(each) for name, each in found.items()}
    return Measurements(loss=loss, modes=read, **totals), Setting(**record["setting"])


def _interval(values: Mapping[str, Any]) -> Interval:
    return Interval(*(float(values[name]) for name in ("value", "low", "high")))


def compare(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put the records of each cell together.

    Args:
        records: With `cell`, a dictionary; those of a cell in any order, one of them with `measured` and `setting`,
            or with the `problem` that prevented it.

    Returns:
        For each cell its own entries, what `judge_cell` found, and the measurement's verdict and intervals, or its
        `problem`.

    Raises:
        UserError: If a cell has no measurement or several, or not the same seeds of both optimizers.
    """
    cells: dict[tuple, list] = {}
    for record in records:
        cells.setdefault(tuple(record["cell"].items()), []).append(record)
    found = []
    for key, group in cells.items():
        measurements = [record for record in group if "measured" in record or "problem" in record]
        if len(measurements) != 1:
            raise UserError(f"{dict(key)}: {len(measurements)} measurements, where one is needed.")
        (record,) = measurements
        said = {"problem": record["problem"]} if "problem" in record else foretell(record)
        found.append(dict(key) | judge_cell([record for record in group if "loss" in record]) | said)
    return found


def judge_cell(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Say whether SGD and SGDM differ.

    Args:
        runs: Both optimizers' from the same seeds, two at least.

    Returns:
        `measured`, the mean over the seeds of log(loss of SGD / of SGDM); `low` and `high`, its 95% t interval; and
        `differ`, whether it is further from 0 than its interval reaches and than `EFFECT_FLOOR`.

    Raises:
        UserError: If the seeds are fewer than two, or not the same.
    """
    sgd, sgdm = ({run["seed"]: log_loss(run) for run in runs if run["optim"] == optim} for optim in ("sgd", "sgdm"))
    if sgd.keys() != sgdm.keys() or len(sgd) < 2:
        raise UserError(f"SGD has the seeds {sorted(sgd)}, SGDM {sorted(sgdm)}; both need the same, two at least.")
    found = paired_difference(sgdm, sgd)
    half = 0.0 if found.std == 0 else found.high - found.mean  # both lost with every seed: nothing is spread
    differ = abs(found.mean) > max(half, EFFECT_FLOOR)
    return {"measured": found.mean, "low": found.mean - half, "high": found.mean + half, "differ": differ}


def log_loss(run: Mapping[str, Any]) -> float:
    """Take the logarithm of a final loss.

    Args:
        run: A record.

    Returns:
        The logarithm; of a lost run, that of the largest loss that is told apart.
    """
    return math.log(min(math.inf if run["loss"] is None else run["loss"], MOST_LOSS * run["chance"]))


def foretell(record: Mapping[str, Any]) -> dict[str, Any]:
    """Judge by a measurement alone.

    Args:
        record: Holds `measured` and `setting`.

    Returns:
        The `verdict`, the intervals that it rests on, and `predictors`: how much of a difference is to be expected by
        our prediction and by simpler numbers.
    """
    measured, setting = measurement_from_json(record)
    report = assess(measured, setting, EFFECT_FLOOR)
    intervals = {name: _to_json(asdict(getattr(report, name))) for name in _INTERVALS}
    return {"verdict": report.verdict, **intervals, "predictors": predictors(measured, report)}


def predictors(measured: Measurements, report: RegimeReport) -> dict[str, float]:
    """Give the numbers that may rank runs by how much momentum changes them; the larger the more.

    η is the largest rate of the steps that remain. The sharpness along the gradient is `∇LᵀH∇L / |∇L|²`, along a
    mini-batch's `E[gᵀHg] / E|g|² = (∇LᵀH∇L + tr(HΣ)/B) / (|∇L|² + tr Σ/B)` with the whole loss's H; the stationary
    difference is `RegimeReport.difference`. A ratio whose denominator, a square, came out as 0 or less is 0.

    Args:
        measured: What was measured.
        report: The verdict on it.

    Returns:
        Name → value, `PREDICTED` first.
    """
    lr, batch = report.setting.lr, report.setting.batch_size
    squared, curved = measured.squared_gradient.value, measured.hessian_gradient.value
    batch_squared = squared + measured.noise_trace.value / batch
    batch_curved = curved + measured.hessian_noise.value / batch
    noise, curvature = max(report.noise.value, 0.0), report.curvature.value
    return {
        PREDICTED: report.score.value,
        "upper end of its interval": report.score.high,
        "stationary difference over L": _ratio(report.difference.value, measured.loss),
        "learning rate η": lr,
        "h = ηλ_max": report.h.value,
        "η over SGD's limit": report.limit_fraction.value,
        "η × sharpness along g": lr * _ratio(batch_curved, batch_squared),
        "η × sharpness along ∇L": lr * _ratio(curved, squared),
        "B_noise/B, inverted": -min(noise / curvature, 1e12) if curvature > 0 else -1e12,
    }


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else 0.0


def areas_under_curves(cells: Sequence[Mapping[str, Any]]) -> dict[str, AucComparison]:
    """Rank the cells by each predictor.

    Args:
        cells: Of `compare`, with a verdict; two at least that differ, and two that do not.

    Returns:
        Predictor → its area under the ROC curve as `first`, compared with that of our prediction as `second`.
    """
    labels = [cell["differ"] for cell in cells]
    columns = {name: [cell["predictors"][name] for cell in cells] for name in cells[0]["predictors"]}
    return {name: paired_auc_interval(column, columns[PREDICTED], labels) for name, column in columns.items()}

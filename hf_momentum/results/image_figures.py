"""Figures of image runs: SGD and SGDM under SVAG for each ℓ, and test accuracy over the learning rate."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_momentum.errors import UserError
from hf_momentum.results.panels import Panel, panels_figure
from hf_momentum.results.record import find_fault
from hf_momentum.results.rows import rate_of
from hf_momentum.results.statistics import paired_difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Drawing = tuple["Figure", list[Record]]
_BAND = "lines: mean over seeds; bands: lowest to highest seed"


def svag_figure(records: Sequence[Record]) -> Drawing:
    """Train loss and test accuracy of SGD and SGDM for each ℓ of SVAG, and the gap between them over ℓ.

    Args:
        records: Records of results files, of one task, model, batch size and learning rate where several ℓ were run.

    Returns:
        The figure, and the records that it shows.

    Raises:
        UserError: If no such runs are there, or those of several settings.
    """
    runs = _runs(records)
    settings: dict[tuple, list[Record]] = {}
    for run in runs:
        settings.setdefault((*_setting(run), _rate(run)), []).append(run)
    settings = {key: part for key, part in settings.items() if len({_ell(run) for run in part}) > 1}
    if len(settings) != 1:
        found = "; ".join(f"{task}, {model}, batch {size}, η={rate:g}" for task, model, size, rate in settings)
        raise UserError(
            f"The figure of ℓ shows one setting with several ℓ, not {len(settings)}{': ' * bool(found)}{found}. Run "
            "recipes/cifar_resnet.py --ells 1 2 4 8 into a folder of its own."
        )
    ((task, model, size, rate), part) = next(iter(settings.items()))
    ells = sorted({_ell(run) for run in part})
    rows = [row for ell in ells for row in _curve_rows(ell, [run for run in part if _ell(run) == ell])]
    rows += [row for ell in ells for row in _gap_rows(ell, [run for run in part if _ell(run) == ell])]
    title = f"{task}, {model}, batch {size}, η = {rate:g}, {_count_seeds(part)}"
    reading = f"{_BAND}; gap: 95% t interval of the difference paired over seeds"
    return panels_figure(rows, _svag_panels(ells, rows), title, reading), part


def _svag_panels(ells: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    curves = {"x": "time", "series": "method", "spread": "band", "xlabel": "step / ℓ"}
    panels = []
    for ell in ells:
        for quantity in ("train loss", "test accuracy (%)"):
            where = {"ell": ell, "quantity": quantity}
            labels = {"title": f"ℓ = {ell:g}", "ylabel": quantity, "ylim": _limits(rows, quantity)}
            panels.append(Panel(**curves, **labels, where=where))
    over = {"x": "ell", "series": "method", "xlabel": "ℓ", "xscale": "log2"}
    last = {"where": {"quantity": "last test accuracy"}, "ylabel": "last test accuracy (%)", "spread": "band"}
    gap = {"where": {"quantity": "gap"}, "ylabel": "SGDM − SGD (points)", "ymarks": {"": 0.0}}
    return [*panels, Panel(**over, **last, title="after training"), Panel(**over, **gap, title="the gap")]


def _limits(rows: Sequence[Mapping[str, Any]], quantity: str) -> list[float]:
    """The same for all ℓ, so that their panels can be compared."""
    ends = [row[end] for row in rows if row["quantity"] == quantity for end in ("low", "high")]
    margin = 0.05 * (max(ends) - min(ends)) or 1.0
    return [min(ends) - margin, max(ends) + margin]


def _curve_rows(ell: float, runs: Sequence[Record]) -> list[dict[str, Any]]:
    rows = []
    for method in dict.fromkeys(map(_method, runs)):
        curves = [run["curve"] for run in runs if _method(run) == method]
        for name, quantity, factor in (
            ("train_loss", "train loss", 1),
            ("test_accuracy", "test accuracy (%)", 100),
        ):
            values: dict[float, list[float]] = {}
            for point in (point for curve in curves for point in curve if point.get(name) is not None):
                values.setdefault(point["step"] / ell, []).append(factor * point[name])
            common = {"ell": ell, "method": method, "quantity": quantity}
            rows += [common | {"time": time} | _spread(several) for time, several in values.items()]
        last = [100 * run["test_accuracy"] for run in runs if _method(run) == method]
        rows.append({"ell": ell, "method": method, "quantity": "last test accuracy"} | _spread(last))
    return rows


def _gap_rows(ell: float, runs: Sequence[Record]) -> list[dict[str, Any]]:
    by_method: dict[str, dict[int, float]] = {}
    for run in runs:
        by_method.setdefault(_method(run), {})[run["seed"]] = 100 * run["test_accuracy"]
    plain = by_method.pop("SGD", {})
    rows = []
    for method, values in by_method.items():
        if plain.keys() & values.keys():
            gap = paired_difference(plain, values)
            low, high = (end if math.isfinite(end) else None for end in (gap.low, gap.high))
            row = {"ell": ell, "method": method, "quantity": "gap", "measured": gap.mean, "low": low, "high": high}
            rows.append(row)
    return rows


def rates_figure(records: Sequence[Record]) -> Drawing:
    """Test accuracy over the effective learning rate for SGD and SGDM, a panel per batch size.

    Args:
        records: Records of results files; runs with SVAG are left out.

    Returns:
        The figure, and the records that it shows.

    Raises:
        UserError: If there are no tested runs of image models.
    """
    runs = [run for run in _runs(records) if _ell(run) == 1]
    settings = sorted({_setting(run) for run in runs}, key=str)
    if not settings:
        raise UserError("No tested run of sgd or sgdm with a learning curve in these results.")
    rows, panels = [], []
    several = len({setting[:2] for setting in settings}) > 1
    for setting in settings:
        task, model, size = setting
        part = [run for run in runs if _setting(run) == setting]
        values: dict[tuple[str, float], list[float]] = {}
        for run in part:
            values.setdefault((_method(run), _rate(run)), []).append(100 * run["test_accuracy"])
        name = f"{task}, {model}, batch {size}" if several else f"batch {size}"
        rows += [{"setting": name, "method": m, "rate": r} | _spread(v) for (m, r), v in values.items()]
        labels = {"title": name, "xlabel": "effective learning rate η", "ylabel": "test accuracy (%)"}
        look = {"x": "rate", "series": "method", "spread": "band", "xscale": "log"}
        panels.append(Panel(where={"setting": name}, **look, **labels))
    title = f"{_count_seeds(runs)}" if several else f"{task}, {model}, {_count_seeds(runs)}"
    return panels_figure(rows, panels, title, _BAND), runs


def _runs(records: Iterable[Record]) -> list[Record]:
    """The tested runs of SGD and SGDM, with SVAG or without, that kept their test curves."""
    return [
        record
        for record in records
        if record.get("optim") in {"sgd", "sgdm", "svag"}
        and record.get("test_accuracy") is not None
        and any("test_accuracy" in point for point in record.get("curve") or [])
        and not find_fault(record)
    ]


def _setting(run: Record) -> tuple:
    return run["task"], run["model"], run.get("batch_size")


def _rate(run: Record) -> float:
    return float(f"{rate_of(run):.9g}")  # γ/(1−β) rounds


def _ell(run: Record) -> float:
    return float(run.get("ell") or 1)


def _method(run: Record) -> str:
    return f"SGDM β={run['momentum']:g}" if run.get("momentum") else "SGD"


def _count_seeds(runs: Sequence[Record]) -> str:
    count = len({run["seed"] for run in runs})
    return f"{count} seed{'s' * (count > 1)}"


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"measured": sum(values) / len(values), "low": min(values), "high": max(values)}

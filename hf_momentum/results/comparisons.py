"""Paired comparisons of methods over seeds: differences, and what they say about a margin stated in advance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_momentum.errors import UserError
from hf_momentum.results.export import Report, Sheet
from hf_momentum.results.rows import (
    Row,
    comparison_pairs,
    paired_seeds,
    repeated_tests,
    row_names,
    setting_names,
    split_name,
    table_rows,
)
from hf_momentum.results.statistics import (
    DIFFERENT,
    EQUIVALENT,
    Equivalence,
    PairedDifference,
    bootstrap_interval,
    equivalence,
    paired_difference,
    seeds_needed,
)

_POWER = 0.8
_ALIKE = (
    "task, data, draw, seeds, batch size, steps, schedule, clipping, weight decay and further arguments (without a "
    "grid: learning rate too)"
)


@dataclass(frozen=True)
class Pair:
    """Two methods on one task, value by value.

    Attributes:
        label: The task.
        first: Name of the baseline.
        second: Name of the method that is compared with it.
        first_values: Seed → value of the baseline; accuracies in percent.
        second_values: Seed → value of the other.
        setting: Task, model, tuning and k; the task is None where several are averaged.
    """

    label: str
    first: str
    second: str
    first_values: dict[int, float]
    second_values: dict[int, float]
    setting: tuple

    @property
    def name(self) -> str:
        """What is subtracted from what; what both names add to the method stands once, at the end."""
        (first, marks), (second, others) = split_name(self.first), split_name(self.second)
        return f"{second} − {first} ({marks})" if marks and marks == others else f"{self.second} − {self.first}"

    def difference(self, confidence: float = 0.95) -> PairedDifference:
        """Second minus first, with Student's interval.

        Args:
            confidence: The interval's level.

        Returns:
            The difference, for accuracies in percentage points.
        """
        return paired_difference(self.first_values, self.second_values, confidence)


def paired_values(rows: Sequence[Row], metric: str = "test_accuracy") -> list[Pair]:
    """Every row beside its baseline (see `comparison_pairs`).

    Args:
        rows: From `table_rows`.
        metric: The field to compare; a name that ends in `accuracy` is a fraction, shown in percent.

    Returns:
        The pairs with at least one seed at which both have the metric; of seeds that drew other examples for one row
        than for the other, neither value.
    """
    names, settings = row_names(rows), setting_names(rows)
    scale = 100 if metric.endswith("accuracy") else 1
    pairs = []
    for first, second in comparison_pairs(rows):
        seeds = paired_seeds(first, second)
        values = [{s: scale * v for s, v in row.values_of(metric).items() if s in seeds} for row in (first, second)]
        if values[0].keys() & values[1].keys():
            titles = (settings[first.setting], names[id(first)], names[id(second)])
            pairs.append(Pair(*titles, *values, first.setting))
    return pairs


def averaged_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """The same comparison on several tasks as one: per seed the mean over the tasks.

    A seed's runs on different tasks need not be independent for this, only different seeds. It speaks of these tasks
    together, neither of each one nor of other tasks.

    Args:
        pairs: From `paired_values`.

    Returns:
        One pair per comparison that at least two tasks share at two seeds or more.
    """
    same: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        same.setdefault((pair.setting[1:], pair.first, pair.second), []).append(pair)
    averaged = []
    for (setting, first, second), parts in same.items():
        seeds = set.intersection(*(part.first_values.keys() & part.second_values.keys() for part in parts))
        if len({part.setting for part in parts}) < len(parts) or len(parts) < 2 or len(seeds) < 2:
            continue
        values = [
            {seed: math.fsum(getattr(part, side)[seed] for part in parts) / len(parts) for seed in sorted(seeds)}
            for side in ("first_values", "second_values")
        ]
        label = f"mean of {len(parts)} tasks" + parts[0].label.removeprefix(parts[0].setting[0])
        averaged.append(Pair(label, first, second, *values, (None, *setting)))
    return averaged


def difference_lines(rows: Sequence[Row]) -> list[str]:
    """The paired difference of every method from its baseline, in percentage points.

    Args:
        rows: From `table_rows`.

    Returns:
        One sentence per pair, one per pair with seeds that could not be paired, and one on the rows that have no other
        to be compared with.
    """
    lines = [f"{pair.label}: {pair.name} = {_sentence(pair.difference())}" for pair in paired_values(rows)]
    return lines + _left_out(rows)


def _sentence(difference: PairedDifference) -> str:
    text, seeds = f"{difference.mean:+.1f} points", len(difference.seeds)
    if seeds == 1:
        return f"{text}, paired over 1 seed: no interval."
    if difference.std == 0:
        return f"{text}, the same for each of {seeds} seeds: no spread to take an interval from."
    interval = _interval(difference.low, difference.high)
    return f"{text}, {100 * difference.confidence:g}% interval {interval}, paired over {seeds} seeds."


def _interval(low: float, high: float, decimals: int = 1) -> str:
    return "none" if math.isinf(high) else f"[{low:+.{decimals}f}, {high:+.{decimals}f}]"


def _left_out(rows: Sequence[Row]) -> list[str]:
    return [*_other_draws(rows), *_unpaired(rows)]


def _other_draws(rows: Sequence[Row]) -> list[str]:
    """Common seeds that do not enter a comparison."""
    names, settings, lines = row_names(rows), setting_names(rows), []
    for first, second in comparison_pairs(rows):
        if seeds := (first.picks.keys() & second.picks.keys()) - paired_seeds(first, second):
            pair = f"{settings[first.setting]}: {names[id(second)]} − {names[id(first)]}"
            which = ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, sorted(seeds)))
            lines.append(f"{pair} leaves out {which}: the two trained on different draws of examples.")
    return lines


def _unpaired(rows: Sequence[Row]) -> list[str]:
    """Rows of a setting with several methods that no comparison takes in."""
    paired = {id(row) for pair in comparison_pairs(rows) for row in pair}
    names, settings = row_names(rows), setting_names(rows)
    trained = [row for row in rows if row.is_trained]
    alone = [
        f"{settings[row.setting]}: {names[id(row)]}"
        for row in trained
        if id(row) not in paired
        and any(other.setting == row.setting and other.method[:-1] != row.method[:-1] for other in trained)
    ]
    if not alone:
        return []
    return [f"Compared with nothing, as no other method has the same {_ALIKE}: {'; '.join(alone)}."]


def comparison_report(
    records: Sequence[dict[str, Any]],
    margin: float,
    alpha: float = 0.05,
    confidence: float = 0.95,
    metric: str = "test_accuracy",
    problems: Sequence[str] = (),
) -> Report:
    """Every method against its baseline: difference, intervals, equivalence test and the seeds that it would take.

    Args:
        records: Records of results files.
        margin: The largest difference that counts as none, in percentage points for accuracies; to be chosen before
            the results are seen.
        alpha: Level of the tests.
        confidence: Level of the intervals shown.
        metric: The field to compare.
        problems: Sentences of `read_results`.

    Returns:
        For any format of `hf_momentum.results.export`.

    Raises:
        UserError: If nothing can be compared, or an argument is out of range.
    """
    check_confidence(confidence)
    rows = table_rows(records)
    _check_metric(rows, metric)
    pairs = paired_values(rows, metric)
    if not pairs:
        raise UserError(
            f"Nothing to compare: two methods are needed with tested runs that have {metric!r} and the same {_ALIKE}. "
            "See hf-momentum table."
        )
    averaged = averaged_pairs(pairs)
    try:
        judged = [
            (pair, equivalence(pair.first_values, pair.second_values, margin, alpha)) for pair in pairs + averaged
        ]
    except ValueError as error:
        raise UserError(str(error)) from error
    values = [_values(pair, verdict, confidence) for pair, verdict in judged]
    unit, decimals = "points" if metric.endswith("accuracy") else metric, _decimals(values, margin)
    headings = _headings(unit, alpha, confidence)
    cells = [_cells(pair.name, row, decimals) for (pair, _), row in zip(judged, values, strict=True)]
    sheet = _sheet(headings, cells, len(pairs), f"{metric}, margin ±{margin:g} {unit}")
    notes = [_reason(pair, verdict) for pair, verdict in judged if not verdict.is_plain]
    notes += [*_explanations(margin, unit, alpha, bool(averaged)), *_left_out(rows)]
    return Report([sheet], values, notes, [*problems, *repeated_tests(records)])


def check_confidence(confidence: float) -> None:
    """Refuse a level that no interval can have.

    Args:
        confidence: Of `--confidence`.

    Raises:
        UserError: If it is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise UserError(f"--confidence must be between 0 and 1, not {confidence}.")


def _check_metric(rows: Sequence[Row], metric: str) -> None:
    records = [record for row in rows if row.is_trained for record in row.records]
    if all(_is_number(record.get(metric)) or record.get(metric) is None for record in records):
        return
    numeric = {name: None for record in records for name, value in record.items() if _is_number(value)}
    allowed = ", ".join(name for name in numeric if name not in {"format", "seed", "k"})
    raise UserError(f"--metric {metric} is no number and cannot be compared. Numeric here: {allowed}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _values(pair: Pair, verdict: Equivalence, confidence: float) -> dict[str, Any]:
    difference = pair.difference(confidence)
    low, high = bootstrap_interval(pair.first_values, pair.second_values, confidence)
    needed = None
    if len(difference.seeds) > 1 and difference.std > 0 and verdict.verdict != DIFFERENT:
        needed = _seeds_needed(difference.std, verdict)
    return {
        "task": pair.label,
        "first": pair.first,
        "second": pair.second,
        "seeds": len(difference.seeds),
        "difference": difference.mean,
        "std": difference.std,
        "low": difference.low,
        "high": difference.high,
        "bootstrap_low": low,
        "bootstrap_high": high,
        "tost_low": verdict.low,
        "tost_high": verdict.high,
        "p_value": verdict.p_value,
        "margin": verdict.margin,
        "verdict": verdict.verdict,
        "reason": verdict.reason,
        "seeds_needed_if_equal": needed,
    }


def _seeds_needed(std: float, verdict: Equivalence) -> int | float:
    try:
        return seeds_needed(std, verdict.margin, _POWER, verdict.alpha)
    except ValueError:
        return math.inf


def _decimals(values: Sequence[dict[str, Any]], margin: float) -> int:
    """Enough to resolve a tenth of the margin, and to see a verdict in its interval: inside the margin, beside 0."""
    least = max(1, 1 - math.floor(math.log10(margin)))
    inside = [abs(row[end]) for row in values for end in ("tost_low", "tost_high") if row["verdict"] == EQUIVALENT]
    beside = [row[end] for row in values for end in ("low", "high") if row["verdict"] == DIFFERENT]

    def shows(decimals: int) -> bool:
        return all(round(end, decimals) < margin for end in inside) and all(round(end, decimals) for end in beside)

    return next(filter(shows, range(least, least + 6)), least)


def _headings(unit: str, alpha: float, confidence: float) -> tuple[str, ...]:
    t, bootstrap, tost = (
        f"{100 * confidence:g}% t",
        f"{100 * confidence:g}% bootstrap",
        f"{100 * (1 - 2 * alpha):g}% TOST",
    )
    return "task", "difference", "seeds", unit, t, bootstrap, tost, "TOST p", "verdict", "needed if equal"


def _cells(name: str, values: dict[str, Any], decimals: int) -> tuple[str, ...]:
    p_value, needed = values["p_value"], values["seeds_needed_if_equal"]
    p_text = "none" if math.isnan(p_value) else "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
    intervals = [
        _interval(values[f"{kind}low"], values[f"{kind}high"], decimals) for kind in ("", "bootstrap_", "tost_")
    ]
    return (
        values["task"],
        name,
        str(values["seeds"]),
        f"{values['difference']:+.{decimals}f}",
        *intervals,
        p_text,
        values["verdict"],
        "" if needed is None else "over 10⁶" if math.isinf(needed) else str(needed),
    )


def _sheet(headings: tuple[str, ...], rows: list[tuple[str, ...]], tasks: int, title: str) -> Sheet:
    """The table; a task, difference or number of seeds that all rows share goes into the title."""
    shared = [number for number in range(3) if len({row[number] for row in rows}) == 1]
    if {0, 1} <= set(shared):
        shared.remove(0)
    words = [rows[0][number] for number in shared if number < 2]
    if 2 in shared:
        words.append("1 seed" if rows[0][2] == "1" else f"{rows[0][2]} seeds")
    columns, *cells = (
        tuple(cell for number, cell in enumerate(row) if number not in shared) for row in (headings, *rows)
    )
    return Sheet(
        f"Paired comparison: {', '.join([*words, title])}",
        columns,
        cells,
        "second − first, paired over seeds; equivalent: the TOST interval lies inside the margin",
        texts=2 - sum(number < 2 for number in shared),
        sections=frozenset({tasks}),
        spare=tuple(headings[number] for number in (5, 9, 7, 2) if number not in shared),
    )


def _reason(pair: Pair, verdict: Equivalence) -> str:
    return f"{pair.label}: {pair.name} is {verdict.verdict}: {verdict.reason}."


def _explanations(margin: float, unit: str, alpha: float, averaged: bool) -> list[str]:
    lines = [
        f"equivalent: two one-sided paired t-tests (TOST) at α = {alpha:g} put the difference within ±{margin:g} "
        f"{unit}, which is to say that the {100 * (1 - 2 * alpha):g}% t interval lies inside. "
        f"different: not so, and the {100 * (1 - alpha):g}% interval excludes 0. undecided: neither, which is no "
        "evidence of equality. A margin means something only if it was chosen before the results were seen.",
        f"needed if equal: paired seeds that find equivalence with {100 * _POWER:g}% probability if the true "
        "difference is 0 and its spread over seeds the one seen here, which few seeds know only roughly. "
        "Below six seeds the bootstrap interval is too narrow.",
    ]
    if averaged:
        lines.append(
            "mean of several tasks: per seed the mean over these tasks, then paired over seeds as above. It speaks of "
            "these tasks together, neither of each one nor of other tasks."
        )
    return lines

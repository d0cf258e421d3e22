"""What the benchmarks share: a measured figure beside its goal, one table of them, and the file that collects them.

`make bench` runs every `scripts/bench_*.py` at a small size with BENCH_FILE set to a file; each of them ends with
`report([Goal(...), ...])`, which shows its figures and appends them to that file, one JSON object a line.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

FILE = "BENCH_FILE"


@dataclass(frozen=True)
class Goal:
    """A figure and what it should be.

    Attributes:
        name: What was measured, such as `few-shot run, LM-BFF's way / ours`.
        value: The figure.
        limit: Its goal.
        at_least: Whether the figure should be at least the limit, and not at most.
        unit: `×` for a ratio, otherwise such as `s` or `MiB`.
    """

    name: str
    value: float
    limit: float
    at_least: bool = False
    unit: str = "×"

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side of its limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def report(goals: Iterable[Goal]) -> None:
    """Show figures beside their goals, and append them to the file that the environment names.

    Args:
        goals: The figures.
    """
    goals = list(goals)
    Console().print(goals_table(goals))
    if path := os.environ.get(FILE):
        with Path(path).open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(dataclasses.asdict(goal), ensure_ascii=False)}\n" for goal in goals)


def read_goals(path: Path) -> list[Goal]:
    """Read what benchmarks appended to a file.

    Args:
        path: The file; one that is missing holds nothing.

    Returns:
        The figures in their order.
    """
    if not path.exists():
        return []
    return [Goal(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def goals_table(goals: Iterable[Goal]) -> Table:
    """Lay figures out beside their goals.

    Args:
        goals: The figures.

    Returns:
        One row per figure: what was measured, the figure, the goal, and whether it is met.
    """
    table = Table()
    for column in ("measured", "figure", "goal", "met"):
        table.add_column(column, justify="left" if column == "measured" else "right")
    for goal in goals:
        bound = f"{'≥' if goal.at_least else '≤'} {goal.limit:g} {goal.unit}"
        table.add_row(goal.name, f"{goal.value:.3g} {goal.unit}", bound, "yes" if goal.met else "NO")
    return table

"""Whole texts against stored ones. To renew them: `python tests/results/test_expected.py`, then read the diff."""

from pathlib import Path

import pytest
from sample_runs import five_tasks, run, sweeps

from hf_momentum.results.comparisons import comparison_report
from hf_momentum.results.export import FORMATS
from hf_momentum.results.tables import accuracy_report

FOLDER = Path(__file__).parent / "expected"
SUFFIXES = {"terminal": "txt", "markdown": "md", "latex": "tex", "csv": "csv"}


def report(name):
    broken = run("sgd", 13, 0.5, run_id="broken")
    del broken["seed"]
    return {
        "table_tasks": lambda: accuracy_report([*five_tasks(), broken]),
        "table_sweeps": lambda: accuracy_report(sweeps()),
        "compare_tasks": lambda: comparison_report(five_tasks(), margin=2.0),
        "compare_sweeps": lambda: comparison_report(sweeps(), margin=2.0, alpha=0.1, confidence=0.9),
    }[name]()


CASES = [
    (name, form) for name in ("table_tasks", "table_sweeps", "compare_tasks", "compare_sweeps") for form in FORMATS
]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_text_is_as_stored(name, form):
    assert FORMATS[form](report(name)) == (FOLDER / f"{name}.{SUFFIXES[form]}").read_text(encoding="utf-8")


def test_problems_stay_out_of_the_text():
    assert report("table_tasks").problems == ["broken: a result with no 'seed'; it is left out."]


if __name__ == "__main__":
    for case, form in CASES:
        (FOLDER / f"{case}.{SUFFIXES[form]}").write_text(FORMATS[form](report(case)), encoding="utf-8")

import importlib.util
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reported_goals_are_shown_and_collected(tmp_path, monkeypatch, capsys):
    benchmark = load("benchmark")
    file = tmp_path / "goals.jsonl"
    monkeypatch.setenv("BENCH_FILE", str(file))
    fast, slow = benchmark.Goal("peer / ours", 4.7, 4.5, at_least=True), benchmark.Goal("start", 0.7, 0.5, unit="s")
    benchmark.report([fast])
    benchmark.report([slow])
    assert benchmark.read_goals(file) == [fast, slow]
    assert fast.met
    assert not slow.met
    shown = capsys.readouterr().out
    assert "≥ 4.5 ×" in shown
    assert "0.7 s" in shown
    assert "NO" in shown


def test_a_benchmark_that_reports_nothing_leaves_no_goals(tmp_path):
    assert load("benchmark").read_goals(tmp_path / "none.jsonl") == []

import json
from pathlib import Path

import pytest
from sample_runs import five_tasks, run
from typer.testing import CliRunner

from hf_momentum.cli import app, main

EXPECTED = Path(__file__).parent / "expected"


@pytest.fixture
def results(tmp_path):
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in five_tasks()))
    return tmp_path


def call(*argv):
    result = CliRunner().invoke(app, [str(word) for word in argv], env={"COLUMNS": "120"})
    assert result.exception is None, result.output
    return result


def refused(capsys, monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["hf-momentum", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("form", "suffix"), [("markdown", "md"), ("latex", "tex"), ("csv", "csv")])
def test_table_and_compare_write_what_is_expected(results, form, suffix):
    assert call("table", results, "--format", form).stdout == (EXPECTED / f"table_tasks.{suffix}").read_text()
    call("compare", results, "--margin", 2, "--format", form, "--output", results / "new" / "file")
    assert (results / "new" / "file").read_text() == (EXPECTED / f"compare_tasks.{suffix}").read_text()


def test_the_terminal_shows_table_notes_and_problems(results):
    with (results / "results.jsonl").open("a") as file:
        file.write('{"torn\n')
    output = call("table", results).stdout
    for line in (EXPECTED / "table_tasks.txt").read_text().splitlines():
        assert line in output
    assert f"{results / 'results.jsonl'}:53: not a whole JSON object" in output.replace("\n", "")
    assert "different" in call("compare", results, "--margin", 2).stdout


def test_problems_do_not_enter_what_is_written(results):
    with (results / "results.jsonl").open("a") as file:
        file.write('{"torn\n')
    result = call("table", results, "--format", "csv")
    assert "torn" not in result.stdout
    assert "not a whole JSON object" in result.stderr


def test_untested_results_give_no_table_but_a_word(tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps(run("sgd", 13, None)) + "\n")
    assert call("table", tmp_path).stdout == "No tested run yet: a table needs records with a test_accuracy.\n"


def test_plot_names_its_files_and_reports_problems(results):
    pytest.importorskip("matplotlib")
    with (results / "results.jsonl").open("a") as file:
        file.write('{"torn\n')
    result = call("plot", results, "--figure", "difference", "--margin", 2, "--output", results / "figures")
    files = [results / "figures" / f"difference.{suffix}" for suffix in ("png", "svg", "jsonl")]
    assert result.stdout.splitlines() == [str(file) for file in files]
    assert "not a whole JSON object" in result.stderr
    assert all(file.stat().st_size > 1000 for file in files)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["table", "{results}", "--format", "word"],
            "Unknown format: 'word'. Allowed: terminal, markdown, latex, csv.",
        ),
        (["table", "{results}", "--output", "{results}"], "Cannot write"),
        (["compare", "{results}/none", "--margin", "2"], "No such file"),
        (["compare", "{results}", "--margin", "-1"], "margin must be positive"),
        (["plot", "{results}", "--figure", "pie"], "Unknown figure: 'pie'"),
        (["compare", "{results}", "--margin", "2", "--metric", "task"], "--metric task is no number"),
        (["plot", "{results}", "--figure", "difference", "--confidence", "2"], "--confidence must be between 0 and 1"),
        (
            ["plot", "{results}", "--figure", "lr", "--confidence", "0.5"],
            "--confidence belongs to --figure difference",
        ),
    ],
)
def test_mistakes_end_with_a_message_and_status_2(results, capsys, monkeypatch, argv, message):
    assert message in refused(capsys, monkeypatch, *(word.format(results=results) for word in argv))


def test_compare_demands_a_margin(results, capsys, monkeypatch):
    assert "--margin" in refused(capsys, monkeypatch, "compare", results)


def test_the_card_is_named_after_the_results(results, tmp_path):
    folder = tmp_path / "five_tasks"
    folder.mkdir()
    (results / "results.jsonl").rename(folder / "results.jsonl")
    other = folder / "other.jsonl"
    other.write_text(json.dumps(run("sgd", 13, 0.5, task="other")) + "\n")
    for argv, title in [
        ([folder], "five_tasks"),
        ([folder / "results.jsonl", other], "five_tasks-other"),
        ([other, "--name", "mine"], "mine"),
    ]:
        call("card", *argv, "--output", tmp_path / "card")
        assert f"\n# {title}\n" in (tmp_path / "card" / "README.md").read_text()

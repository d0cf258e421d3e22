import json

import pytest
from in_process import PoolInThisProcess
from recipe_tools import load_recipe

from hf_momentum.dynamics.studies import NAMES
from hf_momentum.errors import UserError
from hf_momentum.results.record import read_records


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("dynamics")


@pytest.fixture
def small(tmp_path):
    """A configuration that takes a second."""
    path = tmp_path / "small.yaml"
    path.write_text(
        "study: warm_up\n"
        "parameters: {steps: 4, paths: 500}\n"
        "panels: [{x: step, series: method, where: {quantity: variance of x}}]\n"
        "tables: [{columns: {method: method, variance: measured}, where: {quantity: variance of x, step: 4}}]\n"
    )
    return path


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells computed here, counted."""
    pool = PoolInThisProcess()
    monkeypatch.setattr("hf_momentum.results.jobs.ProcessPoolExecutor", pool)
    return pool.submitted


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_a_configuration_that_can_be_planned(recipe, name):
    _, (figure,) = recipe.parse(["--figure", name])
    assert figure.study == name and figure.cells and figure.panels and figure.tables and figure.title
    names = [figure.run_id(cell) for cell in figure.cells]
    assert len(set(names)) == len(names)
    json.dumps(figure.cells, allow_nan=False)


def test_all_means_every_figure(recipe):
    _, figures = recipe.parse(["--figure", "all"])
    assert [figure.name for figure in figures] == list(NAMES)


def test_a_figure_its_table_and_its_rows(recipe, small, in_this_process, tmp_path, capsys):
    recipe.main(["--config", str(small), "--output_dir", str(tmp_path / "out")])
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"results.jsonl", "small.png", "small.svg", "small.jsonl", "small.md"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "small.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"SGD", "SGDM, m₀ = 0", "SGDM, stationary m₀"}
    table = (tmp_path / "out" / "small.md").read_text()
    assert "| SGD |" in table and "| method | variance |" in table
    assert "small.png" in capsys.readouterr().out


def test_what_is_finished_is_not_computed_again(recipe, small, in_this_process, tmp_path):
    command = ["--config", str(small), "--output_dir", str(tmp_path / "out")]
    recipe.main(command)
    first = (tmp_path / "out" / "small.png").read_bytes()
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "results.jsonl").write_text("".join(lines[:-1]))  # as if it had been interrupted
    assert len(in_this_process) == 3
    recipe.main(command)
    assert len(in_this_process) == 4
    assert (tmp_path / "out" / "small.png").read_bytes() == first
    recipe.main([*command, "--set", "paths=600"])
    assert len(in_this_process) == 7
    assert len(read_records(tmp_path / "out" / "results.jsonl").records) == 6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Name a figure"),
        (["--figure", "warmup"], "Unknown figure: 'warmup'. Allowed: warm_up"),
        (["--figure", "warm_up", "--workers", "0"], "at least 1"),
        (["--figure", "warm_up", "--set", "paths"], "NAME=VALUE"),
        (["--figure", "warm_up", "--set", "path=3"], "no parameter 'path'. Allowed: lr, momentum"),
        (["--config", "missing.yaml"], "Cannot read missing.yaml"),
    ],
)
def test_mistakes_are_told(recipe, argv, message):
    with pytest.raises(UserError, match=message):
        recipe.parse(argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study: cold_down\npanels: []\n", "Unknown study: 'cold_down'"),
        ("study: warm_up\n", "no panels"),
        ("study: warm_up\npanels: []\ncolour: red\n", "unknown key 'colour'"),
        ("study: warm_up\npanels: [{y: a}]\n", "Panel is incomplete"),
    ],
)
def test_a_configurations_mistakes_are_told(recipe, tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        recipe.parse(["--config", str(tmp_path / "bad.yaml")])

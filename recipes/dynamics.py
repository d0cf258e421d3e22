r"""The paper's theory as figures: when SGD and SGDM agree, how fast, and where they part.

Each figure answers one question by simulation, with intervals, beside what the theory predicts: OUTPUT_DIR/NAME.png
and .svg, the table NAME.md, and the rows that both show, NAME.jsonl. recipes/dynamics.md reads them. Every finished
part is kept in OUTPUT_DIR/results.jsonl; started again, the command skips what is finished.

  one figure            python recipes/dynamics.py --figure warm_up
  all ten               python recipes/dynamics.py --figure all        (about 10 minutes on two cores)
  a quick look          python recipes/dynamics.py --figure svag --set paths=1000
  your own              python recipes/dynamics.py --config mine.yaml

Figures: {names}.
A configuration names a study, its parameters, and what to draw of its rows: copy one from recipes/dynamics/. What
parameters a study has: python -c "from hf_momentum.dynamics.studies import NAME; help(NAME.cells)".
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from hf_momentum.command import command_line, read_yaml, run_command
from hf_momentum.dynamics.studies import NAMES, get_study, plan
from hf_momentum.errors import UserError
from hf_momentum.results.canvas import save_figure
from hf_momentum.results.export import Report, print_report, to_markdown
from hf_momentum.results.jobs import available_cores, compute_missing
from hf_momentum.results.panels import Panel, TableSpec, panels_figure, read_specs, rows_sheet
from hf_momentum.results.record import identifier, package_versions, read_records

CONFIGS = Path(__file__).parent / "dynamics"
KEYS = ("study", "title", "parameters", "panels", "tables")


@dataclass(frozen=True)
class FigureConfig:
    """A figure: the cells that it needs, and what is drawn of their rows."""

    name: str
    study: str
    cells: list[dict[str, Any]]
    title: str
    panels: list[Panel]
    tables: list[TableSpec]

    def run_id(self, cell: Mapping[str, Any]) -> str:
        """The name under which a cell's rows are kept; another version of the package computes it again."""
        return identifier({"study": self.study, "cell": cell, "packages": package_versions(("hf_momentum",))})


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[FigureConfig]]:
    """Read the command line and the configurations that it names."""
    text = __doc__.replace("{names}", ", ".join(NAMES))
    layout = {"usage": "%(prog)s --figure NAME [options]", "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=text, allow_abbrev=False, **layout)
    add = parser.add_argument
    add("--figure", nargs="+", default=[], metavar="NAME", help="figures to make; `all` makes every one")
    add("--config", nargs="+", default=[], metavar="FILE", help="configurations of your own")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="parameters that replace the configuration's")
    add("--output_dir", "--output-dir", default="runs/dynamics", help="default: runs/dynamics")
    add("--workers", type=int, default=available_cores(), help="cells computed at once (default: one for each core)")
    args = parser.parse_args(argv)
    if unknown := set(args.figure) - {"all", *NAMES}:
        raise UserError(f"Unknown figure: {min(unknown)!r}. Allowed: {', '.join(NAMES)}, all.")
    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, not {args.workers}.")
    names = NAMES if "all" in args.figure else tuple(dict.fromkeys(args.figure))
    paths = [CONFIGS / f"{name}.yaml" for name in names] + list(map(Path, args.config))
    if not paths:
        raise UserError(f"Name a figure: --figure NAME. Allowed: {', '.join(NAMES)}, all.")
    return args, [read_config(path, replaced(args.set)) for path in paths]


def replaced(words: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE words; a value is YAML."""
    for word in words:
        if "=" not in word:
            raise UserError(f"--set takes NAME=VALUE, not {word!r}.")
    return {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in words)}


def read_config(path: Path, parameters: Mapping[str, Any]) -> FigureConfig:
    """Read a configuration and plan its cells."""
    content = read_yaml(path)
    if unknown := content.keys() - set(KEYS):
        raise UserError(f"{path}: unknown key {min(unknown)!r}. Allowed: {', '.join(KEYS)}.")
    if missing := {"study", "panels"} - content.keys():
        raise UserError(f"{path}: no {min(missing)}.")
    study = content["study"]
    cells = plan(study, content.get("parameters", {}) | dict(parameters))
    specs = (read_specs(kind, content.get(key, [])) for kind, key in ((Panel, "panels"), (TableSpec, "tables")))
    return FigureConfig(path.stem, study, cells, content.get("title", ""), *specs)


def compute(study: str, cell: dict[str, Any]) -> dict[str, Any]:
    """Compute one cell in a worker."""
    return {"study": study, "cell": cell, "rows": get_study(study).rows(**cell)}


def present(figure: FigureConfig, file: Path, folder: Path, console: Console) -> None:
    """Draw a figure, write its table and its rows, and show the table."""
    records = {record["run_id"]: record["rows"] for record in read_records(file).records}
    rows = [row for cell in figure.cells for row in records[figure.run_id(cell)]]
    report = Report([rows_sheet(rows, table) for table in figure.tables], rows)
    files = save_figure(panels_figure(rows, figure.panels, figure.title), rows, folder / figure.name)
    if figure.tables:
        files.append(folder / f"{figure.name}.md")
        files[-1].write_text(to_markdown(report), encoding="utf-8")
    print_report(report, console)
    console.print(f"{figure.name}: {', '.join(map(str, files))}\n", highlight=False, soft_wrap=True)


def main(argv: Sequence[str]) -> None:
    """Plan all figures, compute what is not finished, draw."""
    args, figures = parse(argv)
    folder, console = Path(args.output_dir), Console()
    file = folder / "results.jsonl"
    jobs = {figure.run_id(cell): {"study": figure.study, "cell": cell} for figure in figures for cell in figure.cells}
    about = {"packages": package_versions(), "command": command_line()}
    compute_missing(compute, jobs, file, args.workers, about, console)
    for figure in figures:
        present(figure, file, folder, console)


if __name__ == "__main__":
    run_command(main)

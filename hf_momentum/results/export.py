"""Tables to the terminal, Markdown, LaTeX and CSV."""

import csv
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from hf_momentum.errors import UserError

_TEXT_WIDTH = 12  # characters: narrower, a column of text cannot be read


@dataclass(frozen=True)
class Sheet:
    """One table as text, for any format.

    Attributes:
        title: What it shows.
        columns: Headings.
        rows: Cells, one per column.
        caption: How to read it.
        texts: How many leading columns are text; the others are numbers.
        sections: Numbers of the rows that start a new part.
        spare: Columns that a narrow terminal leaves out, one after the other, until the table fits.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    caption: str
    texts: int = 2
    sections: frozenset[int] = frozenset()
    spare: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a command shows.

    Attributes:
        sheets: The tables.
        values: The same rows as plain values for CSV.
        notes: Sentences that belong to the tables.
        problems: Sentences on what could not be used; they go to the terminal, never into a file.
    """

    sheets: list[Sheet]
    values: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def show(report: Report, form: str = "terminal", output: Path | None = None) -> None:
    """Print a report, or write it to a file; problems go to standard error, or below a printed terminal table.

    Args:
        report: The report.
        form: One of `FORMATS`.
        output: The file to write instead of printing.

    Raises:
        UserError: If the format is unknown or the file cannot be written.
    """
    if form not in FORMATS:
        raise UserError(f"Unknown format: {form!r}. Allowed: {', '.join(FORMATS)}.")
    if form == "terminal" and output is None:
        print_report(report, Console())
        return
    text = FORMATS[form](report)
    if output is None:
        print(text, end="")
    else:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"Cannot write {output}: {error}") from error
    for problem in report.problems:
        print(problem, file=sys.stderr)


def print_report(report: Report, console: Console) -> None:
    """Print a report with rich.

    Args:
        report: The report.
        console: Where to.
    """
    for sheet in report.sheets:
        table = _fitted_table(sheet, console)
        least = Measurement.get(console, console.options.update(width=10_000), table).minimum
        console.print(table, width=max(least, console.width), crop=False)  # too wide a line is better than a lost cell
    for line in (*report.notes, *report.problems):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _fitted_table(sheet: Sheet, console: Console) -> Table:
    """The table with as many of its spare columns as the width allows; the caption names the others."""
    unlimited, left_out = console.options.update(width=10_000), []
    for name in sheet.spare:
        if Measurement.get(console, unlimited, _rich_table(sheet)).maximum <= console.width:
            break
        number = sheet.columns.index(name)
        rows = [(*row[:number], *row[number + 1 :]) for row in sheet.rows]
        sheet = replace(sheet, columns=tuple(column for column in sheet.columns if column != name), rows=rows)
        left_out.append(name)
    if left_out:
        sheet = replace(sheet, caption=f"{sheet.caption}; not shown at this width: {', '.join(left_out)}")
    return _rich_table(sheet)


def _rich_table(sheet: Sheet) -> Table:
    layout = {"box": box.SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}
    title, caption = escape(sheet.title), escape(sheet.caption)
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", **layout)
    for number, name in enumerate(sheet.columns):
        if number < sheet.texts:
            longest = max(cell_len(text) for text in (name, *(row[number] for row in sheet.rows)))
            table.add_column(escape(name), overflow="fold", min_width=min(longest, _TEXT_WIDTH))
        else:
            longest = max(map(cell_len, (*name.split(), *(row[number] for row in sheet.rows))))
            table.add_column(escape(name), justify="right", overflow="fold", min_width=longest)
    for number, row in enumerate(sheet.rows):
        if number in sheet.sections:
            table.add_section()
        table.add_row(*map(escape, row))
    return table


def to_terminal(report: Report, width: int = 120) -> str:
    """What the terminal would show, without colours.

    Args:
        report: The report; its problems are left out.
        width: In characters.

    Returns:
        The text.
    """
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    print_report(Report(report.sheets, report.values, report.notes), console)
    return "".join(line.rstrip() + "\n" for line in stream.getvalue().splitlines())


def to_markdown(report: Report) -> str:
    """Tables and notes for a README or a model card.

    Args:
        report: The report; its problems are left out.

    Returns:
        GitHub-flavoured Markdown.
    """
    parts = [_markdown_table(sheet) for sheet in report.sheets]
    if report.notes:
        parts.append("".join(f"- {_markdown(note)}\n" for note in report.notes))
    return "\n".join(parts)


def _markdown_table(sheet: Sheet) -> str:
    rules = [":--" if number < sheet.texts else "--:" for number in range(len(sheet.columns))]
    lines = [map(_markdown, sheet.columns), rules, *(map(_markdown, row) for row in sheet.rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"**{_markdown(sheet.title)}**\n\n{table}\n{_markdown(sheet.caption)}\n"


def _markdown(text: str) -> str:
    special = r"[\\|*`<~]|(?<!\w)_|_(?!\w)|\](?=\()"
    return re.sub(special, r"\\\g<0>", " ".join(text.split()))


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": r"\textbar{}",
    "[": "{[}", "]": "{]}", "*": "{*}",  # after a line break they would be its arguments
    "η": r"$\eta$", "β": r"$\beta$", "γ": r"$\gamma$", "ℓ": r"$\ell$", "α": r"$\alpha$",
    "−": "$-$", "±": r"$\pm$", "×": r"$\times$", "–": "--", "…": r"\dots{}",
}  # fmt: skip


def to_latex(report: Report) -> str:
    r"""Tables for a paper, in the style of the package `booktabs`; notes follow as comments.

    Args:
        report: The report; its problems are left out.

    Returns:
        LaTeX, one `table` environment per table.
    """
    head = "% Needs \\usepackage{booktabs}.\n"
    notes = "".join(f"% {' '.join(note.split())}\n" for note in report.notes)
    return head + "\n".join(map(_latex_table, report.sheets)) + notes


def _latex_table(sheet: Sheet) -> str:
    columns = "l" * sheet.texts + "r" * (len(sheet.columns) - sheet.texts)
    body = []
    for number, row in enumerate(sheet.rows):
        body += ["\\midrule"] * (number in sheet.sections) + [_latex_row(row)]
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_latex(sheet.title)}; {_latex(sheet.caption)}.}}",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        _latex_row(sheet.columns),
        "\\midrule",
        *body,
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "".join(f"{line}\n" for line in lines)


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_latex, cells)) + r" \\"


def _latex(text: str) -> str:
    minus = re.sub(r"(?<!\w)-(?=\d)", "−", " ".join(text.split()))
    return "".join(_LATEX.get(character, character) for character in minus)


def to_csv(report: Report) -> str:
    """The rows as plain values to ten significant digits, with one heading line.

    Args:
        report: The report; its notes and problems are left out.

    Returns:
        CSV; empty without rows.
    """
    if not report.values:
        return ""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(report.values[0]), lineterminator="\n")
    writer.writeheader()
    for row in report.values:
        writer.writerow({k: f"{v:.10g}" if isinstance(v, float) else v for k, v in row.items()})
    return stream.getvalue()


FORMATS = {"terminal": to_terminal, "markdown": to_markdown, "latex": to_latex, "csv": to_csv}

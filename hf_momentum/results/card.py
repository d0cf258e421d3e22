"""Hub model cards: what was trained and how well it did, from records alone.

A value that the records lack is left out. The metadata are those of `huggingface_hub`'s own classes: the `model-index`
in the card's header, and `.eval_results/*.yaml` for results on data sets of the Hub.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from hf_momentum.errors import UserError
from hf_momentum.results.card_metadata import PAPER, card_metadata, card_scores, hub_entries
from hf_momentum.results.export import Report, Sheet, to_markdown
from hf_momentum.results.rows import Row, method_name, rate_of, row_names, setting_names, table_rows
from hf_momentum.results.tables import accuracy_report

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}
{% for heading, text in sections.items() if text %}
## {{ heading }}

{{ text }}
{% endfor %}"""
_UPDATES = {
    "sgd": "plain SGD, x ← x − η g, without optimizer state",
    "sgdm": "SGD with momentum as an average of gradients, m ← β m + (1−β) g, x ← x − η m, from m = 0 "
    f"(Eq. 3 of [arXiv:{PAPER}](https://arxiv.org/abs/{PAPER})); for constant β the iterates of torch's SGD at "
    "γ = η (1−β)",
    "svag": "SVAG, g = r₁g₁ + r₂g₂ from two mini-batches with r₁,₂ = (1 ± √(2ℓ−1))/2, ℓ times as many steps of η/ℓ",
}
_MOST_COMMANDS = 5


@dataclass(frozen=True)
class Card:
    """A card and what goes beside it.

    Attributes:
        content: README.md, metadata and text.
        entries: Results on data sets of the Hub, for `.eval_results/`.
        figure: A picture that the text shows.
    """

    content: ModelCard
    entries: list[EvalResultEntry] = field(default_factory=list)
    figure: Path | None = None


def render_card(metadata: ModelCardData, title: str, summary: str, sections: dict[str, str]) -> ModelCard:
    """Put a card together; its metadata are parsed back on the way, so that what is malformed raises here.

    Args:
        metadata: The header.
        title: The heading.
        summary: The first paragraph.
        sections: Heading → Markdown; an empty one is left out.

    Returns:
        The card.
    """
    texts = {"title": title, "summary": summary, "sections": sections}
    return ModelCard.from_template(metadata, template_str=_TEMPLATE, **texts)


def write_card(card: Card, folder: str | Path) -> Path:
    """Write README.md, `.eval_results/hf_momentum.yaml` where there are entries, and the figure.

    Args:
        card: The card.
        folder: Where to; made if there is none.

    Returns:
        The path of README.md.

    Raises:
        UserError: If the folder cannot be written to, or as `check_readme`.
    """
    check_readme(folder)
    folder = Path(folder)
    readme, results = folder / "README.md", folder / ".eval_results" / "hf_momentum.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        card.content.save(readme)
        results.unlink(missing_ok=True)
        if card.entries:
            results.parent.mkdir(exist_ok=True)
            text = yaml.safe_dump(eval_result_entries_to_yaml(card.entries), sort_keys=False, allow_unicode=True)
            results.write_text(text, encoding="utf-8")
        if card.figure is not None and card.figure.resolve() != (folder / card.figure.name).resolve():
            shutil.copy(card.figure, folder)
    except OSError as error:
        raise UserError(f"Cannot write the card to {folder}: {error}") from error
    return readme


def check_readme(folder: str | Path) -> None:
    """Refuse to overwrite a README.md that is no model card.

    Args:
        folder: Where a card is to be written.

    Raises:
        UserError: If a README.md is there that does not begin with metadata.
    """
    readme = Path(folder) / "README.md"
    if readme.is_file() and not readme.read_bytes().startswith(b"---"):
        raise UserError(f"{readme} is no model card and would be overwritten. Choose another folder.")


def results_card(
    records: Iterable[dict[str, Any]],
    name: str,
    figure: str | Path | None = None,
    model: dict[str, Any] | None = None,
) -> Card:
    """Make the card of all tested runs of one or several results files.

    Args:
        records: Of `read_records`.
        name: The model's name, the card's title.
        figure: A PNG to show under the table.
        model: The record, one of them, of the run whose weights the card goes with; None without weights.

    Returns:
        The card.

    Raises:
        UserError: If no run was tested, or the figure is not there.
    """
    records = list(records)
    rows = table_rows(records)
    if not rows:
        raise UserError("No tested run: a card needs records with a test_accuracy.")
    figure = None if figure is None else Path(figure)
    if figure is not None and not figure.is_file():
        raise UserError(f"No such figure: {figure}.")
    trained = [row for row in rows if row.is_trained]
    image = "" if figure is None else f"![Figure]({figure.name})"
    table = to_markdown(accuracy_report(records)).rstrip()
    sections = {
        "Results": "\n\n".join(filter(None, (table, _verdicts(trained), image))),
        "Data": _data_lines(rows),
        "Optimizers": _optimizer_lines(trained),
        "Tested runs": _runs_table(trained),
        "Training": _settings_lines(trained),
        "Command": _commands(trained),
    }
    summary = _summary(rows)
    if model is not None:
        tested = f"dev {_percent(model.get('dev_accuracy'))}, test {_percent(model['test_accuracy'])}"
        summary += f" The weights here are those of seed {model['seed']}, the best of these on dev ({tested})."
    scores = card_scores(rows, model)
    entries = [] if model is None else hub_entries(scores[:1])  # they are of the weights that the repository holds
    return Card(render_card(card_metadata(rows, name, scores), name, summary, sections), entries, figure)


def optimizer_line(record: dict[str, Any]) -> str:
    """Name an optimizer and its update.

    Args:
        record: With `optim`, and `momentum`, `momentum_schedule` with its `arguments`, `ell` where they apply.

    Returns:
        A line of Markdown.
    """
    update = _UPDATES.get(record["optim"], "not one of this package")
    if record["optim"] == "svag" and record.get("momentum"):
        update += ", each with SGDM's update"
    return f"- `{method_name(record)}`: {update}."


def hardware_text(record: dict[str, Any]) -> str | None:
    """Say what a run computed on.

    Args:
        record: With `hardware` and `processes`, where they are known.

    Returns:
        Such as `2 × NVIDIA H200, AMD EPYC, 16 cores, 2 processes`; None if neither is known.
    """
    found, processes = record.get("hardware") or {}, record.get("processes")
    devices = found.get("devices") or []
    parts = [f"{devices.count(device)} × {device}" for device in dict.fromkeys(devices)]
    parts += [found["cpu"]] if found.get("cpu") else []
    parts += [f"{found['cores']} cores"] if found.get("cores") else []
    parts += [f"{processes} process{'es' if processes > 1 else ''}"] if processes else []
    return ", ".join(parts) or None


def versions_text(record: dict[str, Any]) -> str | None:
    """Say with which packages a run was made.

    Args:
        record: With `packages`, where they are known.

    Returns:
        Such as `torch 2.14.1, transformers 5.23.0`; None if none is known.
    """
    packages = record.get("packages") or {}
    return ", ".join(f"{name} {version}" for name, version in packages.items() if version) or None


def command_block(commands: Sequence[str]) -> str:
    """Show commands.

    Args:
        commands: One a line.

    Returns:
        A block of shell code; empty without commands.
    """
    return "\n".join(["```bash", *commands, "```"]) if commands else ""


def _summary(rows: Sequence[Row]) -> str:
    records = [record for row in rows for record in row.records]
    tasks, models = (list(dict.fromkeys(record.get(key) for record in records)) for key in ("task", "model"))
    text = f"Test accuracy on {', '.join(map(str, tasks))}"
    text += f" of `{'`, `'.join(map(str, models))}`" if models != [None] else ""
    tunings = list(dict.fromkeys(record["tuning"] for record in records if record.get("tuning")))
    shots = sorted({record["k"] for record in records if record.get("k")})
    if tunings:
        text += f", {' and '.join(tunings)} tuning"
    if shots:
        text += f", k = {', '.join(map(str, shots))} examples per class for training and as many for choosing"
    sizes = _grid_sizes(rows)
    if max(sizes) > 1:
        text += ". Per seed the run with the best dev accuracy is picked, and tested once"
    elif sizes == {1}:
        text += ". Every run is tested"
    return text + "."


def _grid_sizes(rows: Sequence[Row]) -> set[int]:
    """How many runs each tested one was picked from; 0 where that is not recorded."""
    return {record.get("grid_size") or 0 for row in rows if row.is_trained for record in row.records} or {0}


def _verdicts(rows: Sequence[Row]) -> str:
    said = _said(rows, lambda record: record.get("regime"))
    return f"Regime: {said}." if said else ""


def _data_lines(rows: Sequence[Row]) -> str:
    lines = {}
    for row in rows:
        for record in row.records:
            if record.get("data"):
                lines.setdefault(f"- {record['task']}: {_data_text(record['data'])}.")
    return "\n".join(lines)


def _data_text(data: dict[str, Any]) -> str:
    text = {
        "hub": "Hub data set [{id}](https://huggingface.co/datasets/{id})",
        "folder": "a local folder of the user's, not the Hub's data set",
        "demo": data.get("id") or "the embedded demo, a stand-in with its own name",
    }[data["source"]].format_map(data)
    text += f" ({data['config']})" if data.get("config") else ""
    text += f", tested on split {data['split']}" if data.get("split") else ""
    return text + (f", {data['test_examples']:,} examples to test on" if data.get("test_examples") else "")


def _optimizer_lines(rows: Sequence[Row]) -> str:
    return "\n".join(dict.fromkeys(optimizer_line(record) for row in rows for record in row.records))


def _runs_table(rows: Sequence[Row]) -> str:
    names, settings = row_names(rows), setting_names(rows)
    heavy_ball = any(record.get("lr_form") == "heavy_ball" for row in rows for record in row.records)
    columns = {
        "η or lr": lambda record: _plain(rate_of(record)),
        "γ": lambda record: _plain(record["learning_rate"]) if record.get("lr_form") == "heavy_ball" else "",
        "batch size": lambda record: _plain(record.get("batch_size")),
        "steps": lambda record: _plain(record.get("steps")),
        "dev": lambda record: _percent(record.get("dev_accuracy")),
        "test": lambda record: _percent(record["test_accuracy"]),
    }
    if not heavy_ball:
        del columns["γ"]
    lines = [
        (settings[row.setting], names[id(row)], str(seed), *(show(record) for show in columns.values()))
        for row in rows
        for seed, record in row.picks.items()
    ]
    caption = "accuracy in %; η: the effective learning rate"
    sizes = _grid_sizes(rows)
    title = "Every run" if sizes == {1} else "One run per seed" + ", picked on dev" * (max(sizes) > 1)
    sheet = Sheet(title, ("task", "optimizer", "seed", *columns), lines, caption)
    return to_markdown(Report([sheet], [])).rstrip() if lines else ""


def _settings_lines(rows: Sequence[Row]) -> str:
    settings = {
        "Learning rate form": lambda record: _FORMS.get(record.get("lr_form")),
        "Learning rate schedule": lambda record: record.get("lr_schedule"),
        "Weight decay": lambda record: _plain(record.get("weight_decay")) or None,
        "Gradient clipping": _clipping,
        "Hardware": hardware_text,
        "Versions": versions_text,
    }
    said = {heading: _said(rows, value) for heading, value in settings.items()}
    return "\n".join(f"- {heading}: {text}" for heading, text in said.items() if text)


_FORMS = {
    "effective": "effective, η of Eq. 3",
    "heavy_ball": "heavy ball, γ of Eq. 1, trained at η = γ/(1−β)",
}


def _clipping(record: dict[str, Any]) -> str | None:
    norm = record.get("max_grad_norm")
    return None if norm is None else f"at norm {norm:g}" if norm else "none"


def _said(rows: Sequence[Row], value: Callable[[dict[str, Any]], str | None]) -> str:
    """A value that all runs share, or each value with the rows that have it."""
    names, settings = row_names(rows), setting_names(rows)
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for record in row.records:
            if (text := value(record)) is not None:
                found.setdefault(text, {})[f"{settings[row.setting]}: {names[id(row)]}"] = None
    if len(found) < 2:
        return "".join(found)
    return ", ".join(f"{text} ({'; '.join(holders)})" for text, holders in found.items())


def _commands(rows: Sequence[Row]) -> str:
    """The commands that made the runs; of a sweep the one that started all its trials."""
    records = [record for row in rows for record in row.records]
    found = dict.fromkeys(record.get("sweep_command") or record.get("command") for record in records)
    commands = [command for command in found if command]
    more = len(commands) - _MOST_COMMANDS
    return command_block(commands[:_MOST_COMMANDS]) + (f"\n\nand {more} more of the same kind." if more > 0 else "")


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"

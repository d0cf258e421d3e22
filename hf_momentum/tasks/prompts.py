"""Tasks as prompts: templates and label words.

The five tasks and their templates are those of prompt-based few-shot fine-tuning (Gao et al. 2021, arXiv 2012.15723).

A template is a text with `{sentence1}`, optionally `{sentence2}`, and `<mask>` once, whatever the tokenizer's own mask
token is. Modifiers may follow a sentence: `{sentence2:lower_first}`, `{sentence1:no_last_char,lower_first}`.
"""

import difflib
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from hf_momentum.errors import UserError

MASK = "<mask>"
SENTENCES = ("sentence1", "sentence2")
MODIFIERS: dict[str, Callable[[str], str]] = {
    "no_last_char": lambda text: text[:-1],
    "lower_first": lambda text: text[:1].lower() + text[1:],
}


@dataclass(frozen=True)
class Field:
    """A sentence's place in a template: its column and the names of the modifiers, applied from left to right."""

    column: str
    modifiers: tuple[str, ...] = ()

    def __call__(self, sentence: str) -> str:
        """Return the sentence without white space around it, modified."""
        text = sentence.strip()
        for modifier in self.modifiers:
            text = MODIFIERS[modifier](text)
        return text


def parse_template(template: str) -> list[str | Field]:
    """Split a template into literal text and fields.

    Args:
        template: Such as `"{sentence1} It was <mask>."`.

    Returns:
        The pieces in order; literal text still holds `<mask>`.

    Raises:
        UserError: If a field or modifier is unknown, or `{sentence1}`, `{sentence2}` or `<mask>` does not occur as
            often as it must.
    """
    pieces: list[str | Field] = []
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"template: {template!r}: {error}; fields look like {{sentence1}}") from error
    for literal, column, modifiers, conversion in parsed:
        if literal:
            pieces.append(literal)
        if column is None:
            continue
        if column not in SENTENCES or conversion:
            raise UserError(f"template: unknown field {{{column}}} in {template!r}; use {{sentence1}}, {{sentence2}}")
        names = tuple(modifiers.split(",")) if modifiers else ()
        for name in names:
            if name not in MODIFIERS:
                raise UserError(f"template: unknown modifier {name!r} in {template!r}; use {', '.join(MODIFIERS)}")
        pieces.append(Field(column, names))
    columns = [piece.column for piece in pieces if isinstance(piece, Field)]
    if template.count(MASK) != 1 or columns.count("sentence1") != 1 or columns.count("sentence2") > 1:
        raise UserError(
            f"template: {template!r} must hold {MASK} once, {{sentence1}} once and {{sentence2}} at most once; "
            'an example: "{sentence1} It was <mask>."'
        )
    return pieces


@dataclass(frozen=True)
class Task:
    """A classification task, with or without a prompt.

    Attributes:
        name: What the user calls it.
        template: The prompt, or None for a task that is trained with a classifier only.
        label_words: Label -> the word that stands for it at the mask, in the order of the class indices. Without a
            template every word is None.
        max_length: Longest encoding in tokens, special tokens included.
        first_max_length: Longest first sentence of a prompt in tokens, or None for no limit of its own.
        pair: Whether an example has two sentences. A template says so itself; without one it must be given.
    """

    name: str
    template: str | None
    label_words: dict[str, str | None]
    max_length: int = 128
    first_max_length: int | None = None
    pair: bool | None = None

    def __post_init__(self):
        if not self.name:
            raise UserError("name: expected a short text, got nothing")
        for key, value in (("max_length", self.max_length), ("first_max_length", self.first_max_length or 1)):
            if type(value) is not int or value < 1:
                raise UserError(f"{key}: expected a positive whole number of tokens, got {value!r}")
        if len(self.label_words) < 2:
            raise UserError(f"label_words: expected two or more lines 'label: word', got {self.label_words!r}")
        if self.template is not None:
            parse_template(self.template)
        for label, word in self.label_words.items():
            if self.template is not None and not (word and word.strip()):
                raise UserError(f"label_words: label {label!r} has no word, which the template needs")
            if self.template is None and word is not None:
                raise UserError(f"template: missing, although label {label!r} has the word {word!r}")
        in_template = None if self.template is None else "{sentence2" in self.template
        if self.pair is None and in_template is None:
            raise UserError("pair: missing; a task without a template says pair: true or pair: false")
        if None not in {self.pair, in_template} and self.pair != in_template:
            raise UserError(f"pair: {str(self.pair).lower()} contradicts the template {self.template!r}; leave it out")
        object.__setattr__(self, "pair", self.pair if in_template is None else in_template)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels; a label's position is its class index."""
        return tuple(self.label_words)


def _numbered(*words: str) -> dict[str, str | None]:
    return {str(index): word for index, word in enumerate(words)}


_IT_WAS = "{sentence1} It was <mask>."
_ENTAILMENT = "{sentence1:no_last_char}? <mask>, {sentence2:lower_first}"
_FIVE_RATINGS = ("very negative", "negative", "neutral", "positive", "very positive")
_FIVE_WORDS = ("terrible", "bad", "okay", "good", "great")
_KIND_WORDS = ("Description", "Entity", "Expression", "Human", "Location", "Number")
_NLI_WORDS = {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}

PAPER_TASKS = (
    Task("sst-2", _IT_WAS, _numbered("terrible", "great")),
    Task("sst-5", _IT_WAS, _numbered(*_FIVE_WORDS), first_max_length=110),
    Task("snli", _ENTAILMENT, _NLI_WORDS, max_length=256),
    Task("trec", "<mask>: {sentence1}", _numbered(*_KIND_WORDS), first_max_length=110),
    Task("mnli", _ENTAILMENT, _NLI_WORDS, max_length=256),
)
DEMO_TASKS = (
    Task("movie-snippets-2", _IT_WAS, {"negative": "terrible", "positive": "great"}),
    Task("movie-snippets-5", _IT_WAS, dict(zip(_FIVE_RATINGS, _FIVE_WORDS, strict=True)), first_max_length=110),
    Task("stsb-3", _ENTAILMENT, {"different": "No", "related": "Maybe", "equivalent": "Yes"}, max_length=256),
)
TASKS = {task.name: task for task in (*PAPER_TASKS, *DEMO_TASKS)}


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def get_task(name_or_path: str | Path) -> Task:
    """Find a task by its name, or read a user's own from a YAML file.

    Args:
        name_or_path: One of `TASKS`, or the path of a file that ends in `.yaml` or `.yml`. The file's keys are the
            fields of `Task`; for a task without a template the words in `label_words` stay empty.

    Returns:
        The task.

    Raises:
        UserError: If the name is unknown or the file is missing or malformed.
    """
    name = str(name_or_path)
    if not name.lower().endswith((".yaml", ".yml")):
        if name not in TASKS:
            known = f"Tasks: {', '.join(TASKS)}; or give the path of your own task's .yaml file."
            raise UserError(f"Unknown task {name!r}{_did_you_mean(name, TASKS)}. {known}")
        return TASKS[name]
    try:
        # Scalars stay text: read as YAML 1.1, the label words Yes and No would turn into booleans.
        return _task_from_yaml(yaml.load(Path(name).read_text(encoding="utf-8"), Loader=yaml.BaseLoader))
    except (UserError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"Task file {name}: {error}\n{_FILE_HELP}") from error


_FILE_HELP = """A task file:
  name: my-task
  template: "{sentence1} It was <mask>."
  label_words: {negative: terrible, positive: great}
  max_length: 128            # optional, tokens
  first_max_length: 110      # optional, tokens
  pair: false                # only without a template: whether examples have two sentences"""


def _task_from_yaml(content: object) -> Task:
    if not isinstance(content, dict):
        raise UserError(f"expected lines 'key: value', got {content!r}")
    known = [field.name for field in fields(Task)]
    for key, value in content.items():
        if key not in known:
            raise UserError(f"{key}: unknown key{_did_you_mean(str(key), known)}; known are {', '.join(known)}")
        if key == "label_words":
            if not isinstance(value, dict) or not all(isinstance(word, str) for word in value.values()):
                raise UserError(f"label_words: expected two or more lines 'label: word', got {value!r}")
        elif not isinstance(value, str):
            raise UserError(f"{key}: expected a single value, got {value!r}")
        if key.endswith("max_length") and not (value.isascii() and value.isdigit() and int(value)):
            raise UserError(f"{key}: expected a positive whole number of tokens, got {value!r}")
    if content.get("pair", "true").lower() not in {"true", "false"}:
        raise UserError(f"pair: expected true or false, got {content['pair']!r}")
    for key in ("name", "label_words"):
        if key not in content:
            raise UserError(f"{key}: missing")
    words = {label: word or None for label, word in content["label_words"].items()}
    lengths = {key: int(value) for key, value in content.items() if key.endswith("max_length")}
    pair = content["pair"].lower() == "true" if "pair" in content else None
    return Task(content["name"], content.get("template") or None, words, pair=pair, **lengths)

"""A recipe's command line: dataclass arguments, YAML files of them, and errors without tracebacks."""

import difflib
import json
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from typing import Any

from hf_momentum.errors import UserError


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the recipe's own text as written and shows every default."""


def as_options(values: Mapping[str, Any]) -> list[str]:
    """Write arguments as the words of a command line, so that a file's values are checked like typed ones.

    Args:
        values: Name → value; a list becomes several words, a mapping JSON, None is left out.

    Returns:
        The words.
    """
    words = []
    for name, value in values.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def option(argv: Sequence[str], name: str) -> str | None:
    """The value of one option before the full parse, since it decides what the others are.

    Args:
        argv: The command line.
        name: The option, without dashes.

    Returns:
        Its last value, or None.
    """
    value = None
    for position, word in enumerate(argv):
        if word == f"--{name}" and position + 1 < len(argv):
            value = argv[position + 1]
        elif word.startswith(f"--{name}="):
            value = word.split("=", 1)[1]
    return value


def given_options(argv: Sequence[str]) -> set[str]:
    """Names of the options that the command line sets, with underscores.

    Args:
        argv: The command line.

    Returns:
        Names without dashes and without values.
    """
    return {_name(word) for word in argv if word.startswith("--")}


def _name(word: str) -> str:
    return word.removeprefix("--").split("=")[0].replace("-", "_")


def parse_arguments(types: Sequence[type], argv: Sequence[str], defaults: dict[str, Any], description: str) -> tuple:
    """Parse a recipe's command line into its dataclasses.

    Args:
        types: The dataclasses.
        argv: The command line without the program's name; of an option given twice the last value counts.
        defaults: Values that replace the dataclasses' own defaults.
        description: The recipe's text for `--help`.

    Returns:
        One instance per dataclass.

    Raises:
        UserError: If the command line holds a name that is no argument, or a value that is not allowed.
    """
    from transformers import HfArgumentParser  # here, since it takes seconds to import

    layout = {"usage": "%(prog)s [options]", "formatter_class": _HelpFormatter}
    parser = HfArgumentParser(types, description=description, allow_abbrev=False, **layout)
    parser.set_defaults(**defaults)
    try:
        *instances, unknown = parser.parse_args_into_dataclasses(
            list(argv), look_for_args_file=False, return_remaining_strings=True
        )
    except UserError:
        raise
    except ValueError as error:  # TrainingArguments' own checks
        raise UserError(str(error)) from error
    if unknown:
        known = {action.dest for action in parser._actions}
        close = difflib.get_close_matches(_name(unknown[0]), known, n=1)
        raise UserError(f"Unknown argument {unknown[0]!r}{f' (did you mean --{close[0]}?)' if close else ''}.")
    return tuple(instances)

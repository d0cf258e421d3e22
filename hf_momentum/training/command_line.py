"""A recipe's command line: dataclass arguments, a YAML file of them, and errors without tracebacks."""

import difflib
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from hf_momentum.errors import UserError


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the recipe's own text as written and shows every default."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        UserError: If the file is missing, is not YAML, or holds something else.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"Cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold lines 'key: value', not {type(content).__name__}.")
    return content


def option(argv: Sequence[str], name: str) -> str | None:
    """The value of one option before the full parse, since it decides the others' defaults.

    Args:
        argv: The command line.
        name: The option, without dashes.

    Returns:
        The value, or None.
    """
    for position, word in enumerate(argv):
        if word == f"--{name}" and position + 1 < len(argv):
            return argv[position + 1]
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return None


def given_options(argv: Sequence[str]) -> set[str]:
    """Names of the options that the command line sets, with underscores.

    Args:
        argv: The command line.

    Returns:
        Names without dashes and without values.
    """
    return {word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")}


def parse_arguments(types: Sequence[type], argv: Sequence[str], defaults: dict[str, Any], description: str) -> tuple:
    """Parse a recipe's command line into its dataclasses.

    Args:
        types: The dataclasses.
        argv: The command line without the program's name.
        defaults: Values that replace the dataclasses' own defaults; the command line wins over them.
        description: The recipe's text for `--help`.

    Returns:
        One instance per dataclass.

    Raises:
        UserError: If the command line or `defaults` holds a name that is no argument.
    """
    parser = HfArgumentParser(types, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    known = {action.dest for action in parser._actions}
    _check_known(defaults, known)
    parser.set_defaults(**defaults)
    options = {"look_for_args_file": False, "return_remaining_strings": True}
    *instances, unknown = parser.parse_args_into_dataclasses(list(argv), **options)
    _check_known([word.removeprefix("--").split("=")[0] for word in unknown], known)
    return tuple(instances)


def _check_known(names: Iterable[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"Unknown argument {name!r}{f' (did you mean {close[0]!r}?)' if close else ''}.")


def run_command(main: Callable[[Sequence[str]], None]) -> None:
    """Run a recipe's `main` on the command line; a user's mistake ends it with one message and status 2.

    Args:
        main: Takes the command line without the program's name.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

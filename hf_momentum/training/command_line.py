"""A recipe's command line: dataclass arguments, YAML files of them, and errors without tracebacks."""

import atexit
import difflib
import gc
import json
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import record
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


def leave_process_group() -> None:
    """End the process of a distributed run, in order: the last thing that it does.

    A process that exits inside its group may be aborted by the group's threads, now and then also after it has left.
    So the interpreter's own way out is cut short once all that was registered for the exit has run. Without a process
    group nothing happens.
    """
    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # models that DDP wrapped hold the group
        distributed.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def run_command(main: Callable[[Sequence[str]], None]) -> None:
    """Run a recipe's `main` on the command line; a user's mistake ends it with one message and status 2.

    Args:
        main: Takes the command line without the program's name.
    """
    try:
        record(main)(sys.argv[1:])  # tells torchrun what went wrong
        leave_process_group()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where this one ended.", file=sys.stderr)
        sys.exit(130)

"""How a script is run: what its YAML files hold, the command as it was typed, and mistakes without tracebacks."""

import atexit
import gc
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from hf_momentum.errors import UserError

_LAUNCHERS = ("accelerate", "torchrun", "deepspeed")
_MODULES = ("accelerate.", "torch.distributed.", "deepspeed.")  # after python -m


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


def command_line() -> str:
    """The command that started this process, with the launcher around it as far as it can be known.

    On Linux the launcher's own words are read from the parent process. Elsewhere the environment tells its name, and
    under torchrun the number of processes on this machine. Values of options that end in `token` are hidden.

    Returns:
        The command, quoted for a shell.
    """
    words, parent = sys.argv, _parent_words()
    launched = parent[-len(words) :] == words and any(map(_is_launcher, parent[: -len(words)]))
    return shlex.join(_without_tokens(_shortened(parent) if launched else [*_launcher(), *words]))


def _parent_words() -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    return []


def _is_launcher(word: str) -> bool:
    return Path(word).name in _LAUNCHERS or word.startswith(_MODULES)


def _shortened(words: Sequence[str]) -> list[str]:
    """The same without the interpreter's and the launcher's folders."""
    words = [Path(words[0]).name, *words[1:]]
    if words[0].startswith("python"):
        words = ["python", *words[1:]]
        if Path(words[1]).name in _LAUNCHERS:
            words = [Path(words[1]).name, *words[2:]]
    return words


def _launcher() -> list[str]:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    return ["accelerate", "launch"] if "ACCELERATE_MIXED_PRECISION" in os.environ else ["python"]


def _without_tokens(words: Sequence[str]) -> list[str]:
    shown = []
    for previous, word in zip(["", *words], words, strict=False):
        name, equals, _ = word.partition("=")
        if previous.startswith("--") and previous.endswith("token"):
            word = "HIDDEN"
        elif equals and name.startswith("--") and name.endswith("token"):
            word = f"{name}=HIDDEN"
        shown.append(word)
    return shown


def leave_process_group() -> None:
    """End the process of a distributed run, in order: the last thing that it does.

    A process that exits inside its group may be aborted by the group's threads, now and then also after it has left.
    So the interpreter's own way out is cut short once all that was registered for the exit has run. Without a process
    group nothing happens.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # models that DDP wrapped hold the group
        distributed.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _message(error: UserError) -> str:
    """What was said; torch puts the traceback before it where a worker of a DataLoader raised it."""
    return str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip()


def run_command(main: Callable[[Sequence[str]], None]) -> None:
    """Run a recipe's `main` on the command line; a user's mistake ends it with one message and status 2.

    Args:
        main: Takes the command line without the program's name.
    """
    from torch.distributed.elastic.multiprocessing.errors import record

    gc.freeze()  # the imports' objects stay: no collection between two runs has to walk through them again
    try:
        record(main)(sys.argv[1:])  # tells torchrun what went wrong
        leave_process_group()
    except UserError as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where this one ended.", file=sys.stderr)
        sys.exit(130)

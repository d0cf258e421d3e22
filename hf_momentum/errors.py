"""Errors that a user can mend, and the one that names a missing extra."""

import importlib
import importlib.util
from types import ModuleType


class UserError(ValueError):
    """A mistake in the input: the message says what was wrong, what is allowed and what to do.

    Command lines print the message alone and exit with status 2; every other exception keeps its traceback.
    """


class MissingExtraError(UserError, ImportError):
    """A part of the package was asked for whose optional dependencies are not installed."""


def require_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Args:
        module: Name of the module to import, such as `"datasets"`.
        extra: The extra of `hf_momentum` that installs it, such as `"text"`.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: If the module is not installed.
    """
    if importlib.util.find_spec(module.split(".")[0]) is None:
        raise MissingExtraError(
            f"{module} is needed here but not installed. Install it with: pip install 'hf_momentum[{extra}]'"
        )
    return importlib.import_module(module)

"""What the recipes' tests share: loading a recipe, and its command line."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

RECIPES = Path(__file__).parents[1] / "recipes"


def load_recipe(name: str) -> ModuleType:
    """Load recipes/NAME.py as the module recipe_NAME, which other processes can be told of."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command_words(options: Mapping[str, object]) -> list[str]:
    """The words of a command line; a value's blanks part several words, None leaves an option out."""
    words = []
    for name, value in options.items():
        words += [] if value is None else [f"--{name}", *str(value).split()]
    return words

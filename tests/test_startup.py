"""What is not imported where a command or an import has to be quick; `scripts/bench_startup.py` takes the times."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import hf_momentum

ROOT = Path(__file__).parents[1]
SLOW = ("scipy.stats", "matplotlib", "sklearn", "optuna", "deepspeed", "timm", "hf_momentum.diagnostics")


def run(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout


def modules_after(code: str) -> set[str]:
    return set(run(f"{code}\nprint('\\nLOADED', *__import__('sys').modules)").rpartition("LOADED")[2].split())


def test_help_of_the_command_line_imports_neither_torch_nor_scipy():
    code = "import sys; sys.argv = ['hf-momentum', '--help']\nfrom hf_momentum import cli"
    loaded = modules_after(f"{code}\ntry: cli.app()\nexcept SystemExit: pass")
    assert "hf_momentum.cli" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "numpy", "scipy", "yaml", "huggingface_hub"})


def test_the_optimizers_need_no_transformers():
    loaded = modules_after("from hf_momentum import SGDM, create_optimizer, svag_coefficients, effective_lr")
    assert "torch" in loaded
    assert loaded.isdisjoint({"transformers", "accelerate", "scipy", "hf_momentum.training", "hf_momentum.results"})


HELP_OF_ALL_RECIPES = """
import pathlib, runpy, sys
from transformers import Trainer, TrainingArguments
theirs = set(sys.modules)
files = sorted(pathlib.Path("recipes").glob("*.py"))
files.append(files.pop([file.stem for file in files].index("regime_validation")))  # it alone needs the diagnostics
for file in files:
    sys.argv = [file.name, "--help"]
    try:
        runpy.run_path(str(file), run_name="__main__")
    except SystemExit:
        pass
    print("\\nBEYOND", file.stem, *set(sys.modules) - theirs)
"""


def test_a_recipes_help_imports_nothing_slow_beyond_the_trainer():
    lines = [line.split()[1:] for line in run(HELP_OF_ALL_RECIPES).splitlines() if line.startswith("BEYOND ")]
    assert sorted(name for name, *_ in lines) == sorted(file.stem for file in (ROOT / "recipes").glob("*.py"))
    for name, *beyond in lines:
        assert "hf_momentum" in beyond
        needed = {"hf_momentum.diagnostics"} if name == "regime_validation" else set()
        assert (name, set(beyond).intersection(SLOW) - needed) == (name, set())


def test_editors_see_every_public_name():
    tree = ast.parse(Path(hf_momentum.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING"]
    seen = {name.name: node.module for node in block.body for name in node.names}
    assert seen == hf_momentum._EXPORTS
    assert set(hf_momentum.__all__) == {"__version__", *seen}
    assert set(hf_momentum.__all__) <= set(dir(hf_momentum))

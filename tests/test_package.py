import configparser
import subprocess
import sys
from pathlib import Path

import pytest

import hf_momentum
from hf_momentum.errors import MissingExtraError, UserError, require_extra

ROOT = Path(__file__).parents[1]
HEAVY = ("deepspeed", "timm", "peft", "matplotlib", "datasets", "evaluate", "sklearn", "optuna")


def modules_after(code: str) -> set[str]:
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in result.stdout.split()}


def test_importing_the_package_brings_no_optional_dependency_and_not_even_torch():
    loaded = modules_after("import hf_momentum")
    assert loaded.isdisjoint((*HEAVY, "torch", "transformers"))


def test_the_public_names_bring_no_optional_dependency_that_the_trainer_does_not_bring_itself():
    ours, theirs = modules_after("from hf_momentum import *"), modules_after("from transformers import Trainer")
    assert "transformers" in ours
    assert (ours - theirs).isdisjoint(HEAVY)


def test_the_command_line_answers_help_without_torch():
    loaded = modules_after("from hf_momentum import cli")
    assert "torch" not in loaded


def test_public_names_exist_and_unknown_ones_do_not():
    assert all(hasattr(hf_momentum, name) for name in hf_momentum.__all__)
    assert hf_momentum.trainer_kwargs.__module__ == "hf_momentum.training.trainer_kwargs"
    with pytest.raises(AttributeError, match="no attribute 'sgd'"):
        _ = hf_momentum.sgd


def test_a_missing_extra_is_named():
    with pytest.raises(
        MissingExtraError, match=r"no_such_module is needed .* pip install 'hf_momentum\[text\]'"
    ) as error:
        require_extra("no_such_module", "text")
    assert isinstance(error.value, UserError)
    assert isinstance(error.value, ImportError)
    assert require_extra("json", "text").__name__ == "json"


def test_every_extra_that_an_error_names_exists():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = set()
    for file in (*ROOT.glob("hf_momentum/**/*.py"), *ROOT.glob("recipes/**/*.py")):
        for part in file.read_text().split("require_extra(")[1:]:
            arguments = part.split(")")[0].replace('"', "").split(",")
            if len(arguments) == 2 and ":" not in arguments[1]:
                named.add(arguments[1].strip())
    assert named
    assert named <= set(setup["options.extras_require"])


@pytest.mark.parametrize(
    ("argv", "status", "text"),
    [
        (["--help"], 0, "table"),
        (["lr", "0.01"], 0, "0.1"),
        (["lr", "0.1", "--to", "heavy_ball", "--momentum", "0.5"], 0, "0.05"),
        (["optimizers"], 0, "momentum=0.9"),
        (["lr", "0.1", "--to", "nesterov"], 2, "error: Unknown form: 'nesterov'. Allowed: effective, heavy_ball."),
        (["lr", "0.1", "--momentum", "1"], 2, "error: Invalid momentum value: 1"),
        (["table", "none.jsonl"], 2, "error: No such file: none.jsonl."),
    ],
)
def test_command_line(argv, status, text):
    result = subprocess.run([sys.executable, "-m", "hf_momentum.cli", *argv], capture_output=True, text=True)
    assert result.returncode == status
    assert text in result.stdout + result.stderr
    assert "Traceback" not in result.stderr

import json
import math

import pytest
import torch

from hf_momentum import command
from hf_momentum.command import command_line
from hf_momentum.training.environment import data_source, hardware, hub_model, learning_curve

SCRIPT = ["recipes/x.py", "--optim", "sgd", "a b"]
WRITTEN = "recipes/x.py --optim sgd 'a b'"


@pytest.fixture
def launched(monkeypatch):
    """The process as a launcher would have started it."""
    for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)

    def launch(parent: list[str], words: list[str] = SCRIPT, **variables: str) -> str:
        monkeypatch.setattr("sys.argv", words)
        monkeypatch.setattr(command, "_parent_words", lambda: parent)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return command_line()

    return launch


@pytest.mark.parametrize(
    ("parent", "prefix"),
    [
        (["/env/bin/python3.11", "/env/bin/accelerate", "launch", "--quiet", *SCRIPT], "accelerate launch --quiet"),
        (["/env/bin/python", "/env/bin/torchrun", "--nproc_per_node", "2", *SCRIPT], "torchrun --nproc_per_node 2"),
        (["python", "-m", "torch.distributed.run", *SCRIPT], "python -m torch.distributed.run"),
        (["timeout", "60", "python", *SCRIPT], "python"),
        (["bash"], "python"),
        ([], "python"),
        (["/env/bin/accelerate", "launch", "other.py"], "python"),
    ],
)
def test_the_command_is_the_launchers_own(launched, parent, prefix):
    assert launched(parent) == f"{prefix} {WRITTEN}"


def test_where_the_parent_cannot_be_read_the_environment_tells(launched):
    assert launched([], ACCELERATE_MIXED_PRECISION="no") == f"accelerate launch {WRITTEN}"
    elastic = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4"}
    assert launched([], **elastic) == f"torchrun --nproc_per_node=4 {WRITTEN}"


def test_tokens_are_never_shown(launched):
    words = ["x.py", "--hub_token", "hf_a", "--push_to_hub_token=hf_b", "--tokenizer", "t"]
    expected = "x.py --hub_token HIDDEN --push_to_hub_token=HIDDEN --tokenizer t"
    assert launched([], words) == f"python {expected}"
    assert launched(["accelerate", "launch", *words], words) == f"accelerate launch {expected}"


def test_the_hardware_of_a_cpu_run_is_plain_data():
    found = hardware(torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert (found["devices"], bool(found["cpu"])) == ([], True)
    assert found["cores"] >= 1


def test_a_learning_curve_joins_the_logs_of_a_step():
    history = [
        {"loss": 0.9, "learning_rate": 0.1, "step": 2},
        {"eval_loss": math.nan, "eval_accuracy": 0.5, "eval_runtime": 1.0, "step": 2},
        {"eval_loss": 0.7, "eval_accuracy": 0.75, "step": 4},
        {"train_loss": 0.8, "step": 4},
    ]
    assert learning_curve(history) == [
        {"step": 2, "train_loss": 0.9, "dev_loss": None, "dev_accuracy": 0.5},
        {"step": 4, "dev_loss": 0.7, "dev_accuracy": 0.75},
    ]


def test_the_datas_source_is_the_one_that_is_loaded():
    assert data_source("sst-2", data_dir="x") == {"source": "folder"}
    assert data_source("movie-snippets-2") == {"source": "demo"}
    assert data_source("mnli") == {
        "source": "hub", "id": "nyu-mll/glue", "config": "mnli", "split": "validation_matched"
    }  # fmt: skip
    assert data_source("mine", hub_id="me/data:part") == {"source": "hub", "id": "me/data", "config": "part"}


def test_a_folder_and_the_demo_are_no_models_of_the_hub(tmp_path):
    assert [hub_model(str(tmp_path)), hub_model("demo"), hub_model("me/base")] == [None, None, "me/base"]

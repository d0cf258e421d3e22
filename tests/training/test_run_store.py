import pytest
import torch

from hf_momentum.errors import UserError
from hf_momentum.training import RecipeTrainingArguments
from hf_momentum.training.grid import Grid
from hf_momentum.training.protocol import plan_groups
from hf_momentum.training.run_store import RunStore


def group_of_two(tmp_path):
    training = RecipeTrainingArguments(output_dir=str(tmp_path), optim=["sgd"])
    return plan_groups(training, Grid([0.1, 0.2]), {}, 13, "draw")[0]


def test_records_come_back_in_a_new_process_or_store(tmp_path):
    store = RunStore(tmp_path)
    store.append({"run_id": "a", "dev_accuracy": 0.5})
    assert RunStore(tmp_path).find(run_id="a")["dev_accuracy"] == 0.5
    assert RunStore(tmp_path).find(run_id="b") is None


def test_only_a_strictly_better_run_is_best(tmp_path):
    store, group = RunStore(tmp_path), group_of_two(tmp_path)
    assert store.is_best(group, 0.0)
    store.append({"run_id": group.runs[0].run_id, "dev_accuracy": 0.5})
    store.append({"run_id": "another group's", "dev_accuracy": 0.9})
    assert not store.is_best(group, 0.5)
    assert store.is_best(group, 0.6)


def test_weights_come_back_for_their_run_only(tmp_path):
    store, group = RunStore(tmp_path), group_of_two(tmp_path)
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert not store.load_weights(group, group.runs[0], other)
    store.save_weights(group, group.runs[0], model)
    assert not RunStore(tmp_path).load_weights(group, group.runs[1], other)
    assert not torch.equal(other.weight, model.weight)
    assert RunStore(tmp_path).load_weights(group, group.runs[0], other)
    assert torch.equal(other.weight, model.weight)
    store.drop_weights(group)
    assert not store.load_weights(group, group.runs[0], other)
    assert list((tmp_path / "picks").iterdir()) == []


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot use .*file as --output_dir"):
        RunStore(tmp_path / "file")

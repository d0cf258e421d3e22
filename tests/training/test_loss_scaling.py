import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from tiny_models import tiny_classifier
from torch import nn
from train_once import train
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from hf_momentum.training import honours_num_items_in_batch, normalise_loss_per_micro_batch

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}


def weights(folder: Path) -> torch.Tensor:
    saved = torch.load(folder / "weights.pt", weights_only=True)
    return torch.cat([tensor.flatten() for tensor in saved["weights"].values() if tensor.is_floating_point()])


@pytest.fixture(scope="module")
def one_batch_of_8(tmp_path_factory) -> torch.Tensor:
    folder = tmp_path_factory.mktemp("8x1")
    train(str(folder), 8, 1)
    return weights(folder)


def test_accumulation_gives_the_same_weights(tmp_path, one_batch_of_8):
    train(str(tmp_path), 2, 4)
    torch.testing.assert_close(weights(tmp_path), one_batch_of_8, atol=1e-9, rtol=0)


def test_without_the_mending_it_does_not(tmp_path, one_batch_of_8):
    train(str(tmp_path), 2, 4, mend=False)
    assert (weights(tmp_path) - one_batch_of_8).abs().max() > 1e-3


def test_two_processes_give_the_same_weights(tmp_path, one_batch_of_8):
    script = Path(__file__).with_name("train_once.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(script), str(tmp_path), "4", "1"], env=environment, check=True, timeout=240)
    assert torch.load(tmp_path / "weights.pt", weights_only=True)["world_size"] == 2
    torch.testing.assert_close(weights(tmp_path), one_batch_of_8, atol=1e-9, rtol=0)


class ByName(nn.Module):
    def forward(self, x, num_items_in_batch=None, **kwargs):
        return x


class Ignores(nn.Module):
    def forward(self, x, **kwargs):
        return x


def test_the_source_tells_who_normalises():
    assert honours_num_items_in_batch(LlamaForCausalLM(LlamaConfig(**SIZES)))
    assert honours_num_items_in_batch(ByName())
    assert not honours_num_items_in_batch(Ignores())
    assert not honours_num_items_in_batch(tiny_classifier())
    t5 = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16)
    assert not honours_num_items_in_batch(T5ForConditionalGeneration(t5))


def test_the_mark_goes_on_the_base_model_under_peft():
    wrapped = peft.get_peft_model(tiny_classifier(), peft.LoraConfig(target_modules=["query"]))
    assert normalise_loss_per_micro_batch(wrapped)
    assert wrapped.get_base_model().accepts_loss_kwargs is False
    assert "accepts_loss_kwargs" not in wrapped.__dict__


def test_a_right_loss_and_a_value_that_was_set_are_left_alone():
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert not normalise_loss_per_micro_batch(llama)
    assert not hasattr(llama, "accepts_loss_kwargs")
    model = tiny_classifier()
    model.accepts_loss_kwargs = True
    assert not normalise_loss_per_micro_batch(model)
    assert model.accepts_loss_kwargs is True

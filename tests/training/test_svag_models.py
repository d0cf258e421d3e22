"""SVAG's gradient for other models and ways to run them: each against the definition, step by step."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import stock_trainer
import torch
from svag_steps import DDP_CASES, arguments, double_classifier, expected_step, flat_gradient, run_case, step_batches
from svag_steps import train as train_svag
from tiny_models import TokenRows, tiny_classifier
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from hf_momentum.optim import svag_coefficients

EXACT = 1e-12


def with_adapters() -> nn.Module:
    model = double_classifier()
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], init_lora_weights="gaussian"))


def with_a_hook_of_its_own() -> nn.Module:
    """As `LabelWordHead` does it: the loss is made by a hook that was there first."""
    model = double_classifier()
    model.register_forward_hook(lambda module, inputs, out: type(out)(loss=out.logits[:, 0].mean(), logits=out.logits))
    return model


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (with_adapters, {}),
        (with_a_hook_of_its_own, {}),
        (double_classifier, {"activation_checkpointing": True}),
        (double_classifier, {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}),
    ],
    ids=["peft", "a model with hooks", "activation checkpointing", "torch.compile"],
)
def test_the_applied_gradient(tmp_path, build, changes):
    gradient_error, loss_error = run_case(tmp_path, 4, 16, 4, build, **changes)
    assert gradient_error < EXACT
    assert loss_error < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"optim": "sgdm"}, {"optim": "svag", "ell": 4.0}], ids=["sgdm", "svag"])
def test_torch_compile_with_its_default_backend_trains_the_same(tmp_path, given):
    changes, found = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, []
    for compiled in (False, True):
        trainer = stock_trainer.stock_trainer(
            tmp_path, changes | {"torch_compile": compiled}, model=tiny_classifier(), **given
        )
        trainer.train()
        found.append(stock_trainer.weights(trainer.accelerator.unwrap_model(trainer.model)))
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


def test_a_model_that_returns_a_tuple(tmp_path):
    rows, args, model = TokenRows(16), arguments(tmp_path), double_classifier()
    dictionary = train_svag(double_classifier(), args, 4, rows)
    model.config.return_dict = False
    assert isinstance(model(**step_batches(rows, args, 1)[0][0]), tuple)
    tuples = train_svag(model, args, 4, rows)
    torch.testing.assert_close(torch.stack(tuples.gradients), torch.stack(dictionary.gradients), atol=0, rtol=0)


def test_autocast_to_bfloat16(tmp_path):
    # With ℓ = 5 the factors 2r₁ = 4 and 2r₂ = −2 are powers of two, which no rounding can tell from 1.
    rows, args, mirror = TokenRows(16), arguments(tmp_path, bf16=True), tiny_classifier()
    recorder = train_svag(tiny_classifier(), args, 5, rows)
    groups = step_batches(rows, args, len(recorder.gradients))
    for weights, gradient, batches in zip(recorder.weights, recorder.gradients, groups, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            expected, _ = expected_step(mirror, weights, batches, 5)
        assert (gradient - expected).norm() < 1e-6 * expected.norm()
        exact, _ = expected_step(mirror, weights, batches, 5)
        assert (gradient - exact).norm() > 1e-4 * exact.norm()  # so bfloat16 was in use


def test_two_processes(tmp_path):
    script = Path(__file__).with_name("svag_steps.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(script), str(tmp_path)], env=environment, check=True, timeout=240)
    saved = torch.load(tmp_path / "errors.pt", weights_only=True)
    assert saved["world_size"] == 2
    assert saved["accelerate_error"] < EXACT
    assert len(saved["errors"]) == len(DDP_CASES)
    for gradient_error, loss_error in saved["errors"]:
        assert gradient_error < EXACT
        assert loss_error < 1e-6


class Texts(Dataset):
    """Token ids with `targets(row)` of the 8 positions labelled."""

    def __init__(self, rows: int, targets):
        self.rows, self.targets = TokenRows(rows), targets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        ids = self.rows[index]["input_ids"]
        labels = ids.masked_fill(torch.arange(8) >= self.targets(index), -100)
        return {"input_ids": ids, "labels": labels}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).double()


def summed_gradient(model: nn.Module, batches: list[dict]) -> tuple[torch.Tensor, int, float]:
    """Gradient of the summed loss, number of tokens with a loss, and the sum."""
    model.zero_grad()
    tokens, total = 0, 0.0
    for batch in batches:
        logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        loss.backward()
        tokens, total = tokens + int((labels != -100).sum()), total + loss.item()
    return flat_gradient(model), tokens, total


@pytest.mark.parametrize("equal", [False, True])
def test_a_token_normalised_loss_shares_the_steps_tokens_equally_between_the_halves(tmp_path, equal):
    rows = Texts(12, (lambda index: 6) if equal else (lambda index: 3 + index % 5))
    ell, args, model, mirror = 4, arguments(tmp_path, gradient_accumulation_steps=4), tiny_llama(), tiny_llama()
    r1, r2 = svag_coefficients(ell)
    recorder = train_svag(model, args, ell, rows)  # 6 micro-batches an epoch: steps of 4 and of 2
    assert not hasattr(model, "accepts_loss_kwargs")
    steps = zip(recorder.weights, recorder.gradients, recorder.losses, step_batches(rows, args, 6), strict=True)
    for weights, gradient, logged, batches in steps:
        mirror.load_state_dict(weights, strict=False)
        half = len(batches) // 2
        (s1, n1, sum1), (s2, n2, sum2) = (summed_gradient(mirror, part) for part in (batches[:half], batches[half:]))
        expected = r1 * s1 / ((n1 + n2) / 2) + r2 * s2 / ((n1 + n2) / 2)
        assert (gradient - expected).norm() < 1e-6 * expected.norm()  # Llama's loss is computed in float32
        assert logged == pytest.approx((sum1 + sum2) / (n1 + n2), abs=1e-6)
        of_the_means = r1 * s1 / n1 + r2 * s2 / n2
        with nullcontext() if equal else pytest.raises(AssertionError):
            assert (gradient - of_the_means).norm() < 1e-6 * expected.norm()

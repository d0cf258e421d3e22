from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_roberta

from hf_momentum.tasks.prompts import get_task
from hf_momentum.training import FewShotArguments, MomentumTrainingArguments, initial_models
from hf_momentum.training.fewshot_model import build_model, load_tokenizer
from hf_momentum.training.initial_models import InitialModels

TASK = get_task("sst-2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_roberta(tmp_path_factory.mktemp("tiny-roberta"))


@pytest.fixture
def arguments(tmp_path: Path) -> MomentumTrainingArguments:
    return MomentumTrainingArguments(output_dir=str(tmp_path), learning_rate=0.1, use_cpu=True)


@pytest.fixture
def builds(monkeypatch) -> list[int]:
    """The seeds that `build_model` was called with."""
    seeds = []

    def counted(few, task, tokenizer, seed):
        seeds.append(seed)
        return build_model(few, task, tokenizer, seed)

    monkeypatch.setattr(initial_models, "build_model", counted)
    return seeds


def few_shot(folder: str, tuning: str, peft: str) -> FewShotArguments:
    return FewShotArguments(model=folder, task=["sst-2"], tuning=tuning, peft=peft)


def logits(model: torch.nn.Module, tokenizer) -> torch.Tensor:
    inputs = tokenizer(
        [f"a film .{tokenizer.mask_token}", f"It was{tokenizer.mask_token}"], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize(
    ("tuning", "peft", "built"),
    [
        ("prompt", "none", [13]),  # nothing in it is new: one for all seeds
        ("prompt", "lora", [13, 21]),
        ("classifier", "none", [13, 21]),
        ("classifier", "lora", [13, 21]),
    ],
)
def test_every_run_starts_from_the_model_that_it_would_build(folder, arguments, builds, tuning, peft, built):
    few = few_shot(folder, tuning, peft)
    tokenizer = load_tokenizer(few)
    models = InitialModels(few, tokenizer)
    for seed in (13, 13, 21):
        model, fresh = models.load(TASK, seed, arguments), build_model(few, TASK, tokenizer, seed)
        state, expected = model.state_dict(), fresh.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
        assert torch.equal(logits(model, tokenizer), logits(fresh, tokenizer))
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in fresh.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()  # what one run does to its weights, no other one sees
    assert builds == built


def test_another_task_loads_another_model(folder, arguments, builds):
    few = few_shot(folder, "classifier", "none")
    models = InitialModels(few, load_tokenizer(few))
    assert models.load(TASK, 13, arguments).config.num_labels == 2
    assert models.load(get_task("sst-5"), 13, arguments).config.num_labels == 5
    assert builds == [13, 13]


def test_where_the_weights_are_split_up_every_run_loads_its_own(folder, arguments, builds, monkeypatch):
    few = few_shot(folder, "prompt", "none")
    models = InitialModels(few, load_tokenizer(few))
    monkeypatch.setattr(initial_models, "is_sharded", lambda arguments: True)
    models.load(TASK, 13, arguments), models.load(TASK, 13, arguments)
    assert builds == [13, 13]

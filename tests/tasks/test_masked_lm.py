import copy
import logging
import pickle
import threading

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from hf_momentum.errors import UserError
from hf_momentum.tasks.masked_lm import LabelWordHead, check_against_full_logits, load_masked_lm

VOCABULARY, PAD, MASK, WORDS = 60, 1, 5, [30, 10, 20]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
}
DEBERTA = {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 10}
DISTILBERT = {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "pad_token_id": PAD}
XLM = {"vocab_size": VOCABULARY, "emb_dim": 16, "n_layers": 2, "n_heads": 2}
MODERNBERT = {**SIZES, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
ARCHITECTURES = {
    "roberta": ("Roberta", SIZES),
    "roberta untied": ("Roberta", {**SIZES, "tie_word_embeddings": False}),
    "bert": ("Bert", SIZES),
    "distilbert": ("DistilBert", DISTILBERT),
    "deberta-v2 legacy": ("DebertaV2", {**DEBERTA, "legacy": True}),
    "deberta-v2": ("DebertaV2", {**DEBERTA, "legacy": False}),
    "deberta": ("Deberta", DEBERTA),
    "modernbert": ("ModernBert", MODERNBERT),
    "albert": ("Albert", {**SIZES, "embedding_size": 8}),
    "electra": ("Electra", {**SIZES, "embedding_size": 8}),
    "mpnet": ("MPNet", SIZES),
    "xlm-roberta": ("XLMRoberta", SIZES),
    "camembert": ("Camembert", SIZES),
    "xlm": ("XLM", XLM),
    "roformer": ("RoFormer", SIZES),
    "longformer": ("Longformer", {**SIZES, "attention_window": 4}),
    "bart": ("Bart", {"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}),
}


def build(name: str = "roberta", **changes) -> nn.Module:
    """A random model whose weights, biases and norms included, are all away from their initial values."""
    family, sizes = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**sizes, **changes})
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def batch() -> dict[str, torch.Tensor]:
    """Three rows with masks at different positions, the second one padded."""
    ids = torch.randint(8, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    ids[range(3), POSITIONS] = MASK
    attention = torch.ones_like(ids)
    ids[1, 6:], attention[1, 6:] = PAD, 0
    return {"input_ids": ids, "attention_mask": attention}


POSITIONS = [2, 4, 8]
LABELS = torch.tensor([0, 2, 1])


def full_logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits[range(3), POSITIONS][:, WORDS]


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def assert_same_gradients(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_to_the_full_logits_in_value_and_gradient(name):
    model, inputs = build(name), batch()
    logits = full_logits(model, inputs)
    loss = cross_entropy(logits, LABELS)
    expected = {key: value.clone() for key, value in gradients(model, loss).items() if value is not None}
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.05

    head = LabelWordHead(MASK, WORDS)
    head.attach(model)
    assert head.at_mask_only
    output = model(**inputs, labels=LABELS)
    assert list(output) == ["loss", "logits"] and output.logits.shape == (3, len(WORDS))
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=1e-5)
    found = {key: value for key, value in gradients(model, output.loss).items() if value is not None}
    assert_same_gradients(found, expected)
    assert list(model(**inputs)) == ["logits"]


def test_the_head_sees_the_mask_alone():
    model = build()
    shapes = []
    model.lm_head.decoder.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    head = LabelWordHead(MASK, WORDS)
    head.attach(model)
    shapes.clear()
    model(**batch())
    assert shapes == [(3, 1, VOCABULARY)]


def test_remove_gives_the_plain_model_back():
    model, inputs = build(), batch()
    before = model(**inputs).logits
    LabelWordHead(MASK, WORDS).attach(model).remove()
    assert torch.equal(model(**inputs).logits, before) and not hasattr(model, "accepts_loss_kwargs")


def test_positional_input_and_tuple_output():
    model, inputs = build("deberta-v2"), batch()
    expected = full_logits(model, inputs)
    LabelWordHead(MASK, WORDS).attach(model)
    loss, logits = model(inputs["input_ids"], inputs["attention_mask"], labels=LABELS, return_dict=False)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, cross_entropy(expected, LABELS))
    (logits,) = model(**inputs, return_dict=False)
    torch.testing.assert_close(logits, expected)


def test_rows_without_one_mask_are_named():
    model, inputs = build(), batch()
    LabelWordHead(MASK, WORDS).attach(model)
    inputs["input_ids"][1, 1] = MASK
    with pytest.raises(UserError, match="Row 1 of the batch holds 2 mask tokens"):
        model(**inputs)
    inputs["input_ids"][1] = 7
    with pytest.raises(UserError, match="Row 1 of the batch holds 0 mask tokens"):
        model(**inputs)
    with pytest.raises(UserError, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(3, 9, 16))


def test_attach_refuses_a_foreign_vocabulary_and_a_second_head():
    model = build()
    with pytest.raises(UserError, match="vocabulary of 60"):
        LabelWordHead(MASK, [10, 60]).attach(model)
    attached = LabelWordHead(MASK, WORDS).attach(model)
    with pytest.raises(UserError, match=r"has a LabelWordHead already.*remove\(\)"):
        LabelWordHead(MASK, WORDS).attach(model)
    attached.remove()
    LabelWordHead(MASK, WORDS).attach(model)


def test_copies_and_pickles_work_by_themselves(tmp_path):
    model, inputs = build(), batch()
    head = LabelWordHead(MASK, WORDS)
    head.attach(model)
    expected = model(**inputs, labels=LABELS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(**inputs, labels=LABELS).loss, expected.loss)
        (hook, *_) = twin._forward_hooks.values()
        assert hook.__self__ is not head
    model.save_pretrained(tmp_path)
    again = load_masked_lm(str(tmp_path)).eval()
    torch.testing.assert_close(full_logits(again, inputs), expected.logits)


def test_threads_do_not_share_their_masks_and_labels():
    """As in DataParallel, whose replicas share the hooks."""
    model, inputs = build(), batch()
    rows = [{key: value[row : row + 1] for key, value in inputs.items()} for row in range(3)]
    LabelWordHead(MASK, WORDS).attach(model)
    expected = [model(**row, labels=LABELS[index : index + 1]).loss for index, row in enumerate(rows)]
    barrier = threading.Barrier(3)
    model.roberta.register_forward_pre_hook(lambda module, args: (barrier.wait(30), None)[1])
    found = [None] * 3

    def work(index):
        found[index] = model(**rows[index], labels=LABELS[index : index + 1]).loss

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found, expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, inputs = build().train(), batch()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    LabelWordHead(MASK, WORDS).attach(model)
    expected = {key: value.clone() for key, value in gradients(model, model(**inputs, labels=LABELS).loss).items()}
    for reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert_same_gradients(gradients(model, model(**inputs, labels=LABELS).loss), expected)


def test_the_loss_is_float32_under_autocast_and_in_bfloat16():
    model, inputs = build(), batch()
    exact = cross_entropy(full_logits(model, inputs), LABELS)
    head = LabelWordHead(MASK, WORDS)
    head.attach(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs, labels=LABELS)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, exact, atol=0.05, rtol=0.05)

    half = build().to(torch.bfloat16)
    head = LabelWordHead(MASK, WORDS)
    head.attach(half)
    output = half(**inputs, labels=LABELS)
    assert head.at_mask_only and output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, exact, atol=0.05, rtol=0.05)


# --------------------------------------------------------------------------------------------------- the self-check


def test_the_check_leaves_no_trace():
    model = build().train()
    model.roberta.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    head = LabelWordHead(MASK, WORDS)
    head.attach(model)
    assert check_against_full_logits(model, head) < 1e-5
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())


class MixingHead(nn.Module):
    """A head whose logits depend on the neighbouring positions."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return self.head(hidden + 0.1 * hidden.mean(dim=1, keepdim=True))


class FixedLengthHead(MixingHead):
    def forward(self, hidden):
        if hidden.shape[1] < 2:
            raise RuntimeError("this head wants a whole sequence")
        return self.head(hidden)


def without_last_hidden_state(body, args, output):
    return BaseModelOutput(hidden_states=(output.last_hidden_state,))


class OtherOutputModel(transformers.RobertaForMaskedLM):
    """A model whose body does not give `last_hidden_state`."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        hidden = self.roberta(input_ids, attention_mask=attention_mask).hidden_states[0]
        return MaskedLMOutput(logits=self.lm_head(hidden))


def mixing_model():
    model = build()
    model.lm_head = MixingHead(model.lm_head)
    return model


def fixed_length_model():
    model = build()
    model.lm_head = FixedLengthHead(model.lm_head)
    return model


def other_output_model():
    model = OtherOutputModel(build().config).eval()
    model.roberta.register_forward_hook(without_last_hidden_state)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (mixing_model, "they differ by"),
        (fixed_length_model, "RuntimeError: this head wants a whole sequence"),
        (other_output_model, "'NoneType'"),
    ],
)
def test_a_model_that_breaks_the_assumption_falls_back_and_says_so(make, reason, caplog):
    model, inputs = make(), batch()
    logits = full_logits(model, inputs)
    expected = gradients(model, cross_entropy(logits, LABELS))
    expected = {name: None if gradient is None else gradient.clone() for name, gradient in expected.items()}
    head = LabelWordHead(MASK, WORDS)
    with caplog.at_level(logging.WARNING, "hf_momentum"):
        head.attach(model)
    assert not head.at_mask_only
    assert "logits of all positions are computed instead" in caplog.text and reason in caplog.text
    output = model(**inputs, labels=LABELS)
    torch.testing.assert_close(output.logits, logits)
    assert_same_gradients(gradients(model, output.loss), expected)


def test_weights_that_are_not_in_memory_are_not_checked(caplog):
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(build().config)
    LabelWordHead(MASK, WORDS).attach(model)
    assert "not checked" in caplog.text


# ------------------------------------------------------------------------------------------------ PEFT, the Trainer


@pytest.mark.parametrize("order", ["attach first", "wrap first"])
def test_lora(order):
    peft = pytest.importorskip("peft")
    plain, inputs = build(), batch()
    expected = full_logits(plain, inputs)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"])
    if order == "attach first":
        LabelWordHead(MASK, WORDS).attach(plain)
        model = peft.get_peft_model(plain, config)
    else:
        model = peft.get_peft_model(plain, config)
        LabelWordHead(MASK, WORDS).attach(model)
    model.eval()
    assert model.get_base_model().accepts_loss_kwargs is False
    output = model(**inputs, labels=LABELS)
    torch.testing.assert_close(output.logits, expected)
    found = gradients(model, output.loss)
    assert {name.split(".")[-3] for name, gradient in found.items() if gradient is not None} == {"lora_A", "lora_B"}
    assert any(gradient.abs().max() > 0 for gradient in found.values() if gradient is not None)


def examples(count: int) -> list[dict]:
    inputs = batch()
    rows = [{key: value[index % 3].tolist() for key, value in inputs.items()} for index in range(count)]
    return [{**row, "labels": int(LABELS[index % 3])} for index, row in enumerate(rows)]


class GradNorms(TrainerCallback):
    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in logs:
            self.logged.append(logs["grad_norm"])


def train(model, folder, size, accumulate, **kwargs):
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential",
        learning_rate=0.1,
        optim="sgd",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **kwargs,
    )
    norms = GradNorms()
    seen = {}

    def metrics(prediction):
        seen["shapes"] = (prediction.predictions.shape, prediction.label_ids.shape)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples(12),
        eval_dataset=examples(6),
        compute_metrics=metrics,
        callbacks=[norms],
    )
    trainer.train()
    return trainer.evaluate(), norms.logged, seen["shapes"]


def test_the_stock_trainer_trains_and_evaluates(tmp_path):
    runs = []
    for size, accumulate in ((4, 1), (2, 2)):
        model = build(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        LabelWordHead(MASK, WORDS).attach(model)
        start = model(**batch(), labels=LABELS).loss.item()
        runs.append((*train(model, tmp_path, size, accumulate), model))
    (metrics, norms, shapes, model), (other_metrics, other_norms, _, other) = runs
    assert shapes == ((6, len(WORDS)), (6,))
    assert metrics["eval_loss"] < start and 0 <= metrics["eval_accuracy"] <= 1
    assert metrics["eval_loss"] == pytest.approx(model(**batch(), labels=LABELS).loss.item(), abs=1e-5)
    # The loss is a mean over the batch and scaled as such: accumulation changes nothing.
    assert norms == pytest.approx(other_norms, rel=1e-5) and len(norms) == 3
    assert metrics["eval_loss"] == pytest.approx(other_metrics["eval_loss"], abs=1e-6)
    for weight, other_weight in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, other_weight, atol=1e-6, rtol=1e-5)


def test_the_stock_trainer_trains_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["query", "value"]))
    LabelWordHead(MASK, WORDS).attach(model)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    metrics, norms, shapes = train(model, tmp_path, 2, 2, bf16=True)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert len(norms) == 3 and shapes == ((6, 3), (6,)) and "eval_accuracy" in metrics
    assert changed and all("lora_" in name for name in changed)


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("name", ["roberta", "bert", "distilbert", "deberta-v2", "modernbert", "roberta untied"])
def test_a_masked_lm_is_loaded_whole(name, tmp_path):
    model, inputs = build(name), batch()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_masked_lm(str(tmp_path)).eval()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification", "RobertaModel", "DistilBertModel"])
def test_a_checkpoint_without_its_head_points_to_the_classifier(kind, tmp_path):
    family = kind.split("Model")[0].split("For")[0].lower()
    getattr(transformers, kind)(build(family).config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"without the masked-LM head .*it lacks .*--tuning classifier"):
        load_masked_lm(str(tmp_path))


def test_an_architecture_without_masked_lm_points_to_the_classifier(tmp_path):
    config = transformers.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"\(gpt2\) has no masked-LM head.*--tuning classifier"):
        load_masked_lm(str(tmp_path))


def test_arguments_reach_from_pretrained(tmp_path):
    build().save_pretrained(tmp_path)
    model = load_masked_lm(str(tmp_path), dtype=torch.bfloat16, hidden_dropout_prob=0.3)
    assert model.dtype == torch.bfloat16 and model.config.hidden_dropout_prob == 0.3

"""The demo's masked language model: how it is put together, and what the shipped file can do."""

import peft
import pytest
import torch
from safetensors.torch import save_file
from tiny_tokenizers import tiny_wordpiece_tokenizer
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from hf_momentum.errors import UserError
from hf_momentum.tasks import demo_mlm
from hf_momentum.tasks.demo import load_demo_task
from hf_momentum.tasks.encoding import PromptEncoder, encode_examples
from hf_momentum.tasks.masked_lm import load_masked_lm
from hf_momentum.tasks.prompts import get_task
from hf_momentum.training.arguments import FewShotArguments
from hf_momentum.training.fewshot_model import build_model, load_tokenizer

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = "it was great terrible a b c d e f ."


@pytest.fixture
def base(tmp_path):
    """A tiny encoder without a head, as a folder."""
    tokenizer = tiny_wordpiece_tokenizer(WORDS.split())
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **SMALL)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def trained(base):
    """The encoder with PEFT's adapters and a head, all at random, and an embedding of the mask."""
    torch.manual_seed(1)
    model = BertForMaskedLM.from_pretrained(base)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["query", "intermediate.dense", "output.dense"])
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or ".cls.predictions." in name:
                parameter.copy_((0.3 * torch.randn_like(parameter)).half())
    return model.eval(), torch.randn(16).half().float()


@pytest.fixture
def file(trained, tmp_path):
    demo_mlm.write_demo_mlm(tmp_path / "mlm.safetensors", demo_mlm.adapter_tensors(*trained))
    return tmp_path / "mlm.safetensors"


def test_assembled_logits_are_those_of_the_encoder_with_adapters_and_head(base, trained, file):
    model, mask_embedding = trained
    ids = torch.tensor([[2, 5, 6, 4, 9, 3], [2, 11, 4, 12, 3, 0]])
    attention_mask = (ids != 0).long()
    with torch.no_grad():
        embedded = model.get_base_model().get_input_embeddings()(ids)
        embedded = torch.where((ids == 4)[..., None], mask_embedding, embedded)
        expected = model(inputs_embeds=embedded, attention_mask=attention_mask).logits
        found = demo_mlm.assemble(base, demo_mlm.read_demo_mlm(file))(ids, attention_mask=attention_mask).logits
    others = [
        i for i in range(expected.shape[-1]) if i != 4
    ]  # the decoder is tied: the mask's own logit moves with it
    torch.testing.assert_close(found[..., others], expected[..., others], rtol=1e-3, atol=1e-4)


def test_assembling_leaves_the_random_state(base, file):
    torch.manual_seed(5)
    demo_mlm.assemble(base, demo_mlm.read_demo_mlm(file))
    found = torch.rand(1)
    torch.manual_seed(5)
    assert found == torch.rand(1)


@pytest.fixture
def cache(base, file, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_mlm, "DEMO_MLM_FILE", file)
    monkeypatch.setattr(demo_mlm, "demo_model_path", lambda: base)
    monkeypatch.setenv("HF_MOMENTUM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def test_an_ordinary_model_folder_is_written_once(cache, monkeypatch):
    folder = demo_mlm.demo_masked_lm_path()
    assert folder.parent == cache
    model = load_masked_lm(str(folder), dtype=torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert AutoTokenizer.from_pretrained(folder)("it was [MASK]")["input_ids"][3] == 4
    monkeypatch.setattr(demo_mlm, "_write", None)
    assert demo_mlm.demo_masked_lm_path() == folder
    assert sorted(path.name for path in cache.iterdir()) == sorted([folder.name, "demo-mlm.lock"])


def test_a_damaged_folder_is_written_again(cache):
    file = demo_mlm.demo_masked_lm_path() / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"1234")
    demo_mlm.demo_masked_lm_path()
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written(cache, monkeypatch):
    (cache / "file").touch()
    monkeypatch.setenv("HF_MOMENTUM_CACHE", str(cache / "file"))
    with pytest.raises(UserError, match=r"cannot be written: .* Set HF_MOMENTUM_CACHE"):
        demo_mlm.demo_masked_lm_path()


def test_a_damaged_file(file):
    whole = file.read_bytes()
    for content in (b"", whole[:40], whole[:-8]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"mlm\.safetensors is missing or damaged"):
            demo_mlm.read_demo_mlm(file)
    file.write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(UserError, match="is damaged: its tensors have not the sha256 that it names"):
        demo_mlm.read_demo_mlm(file)
    file.unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        demo_mlm.read_demo_mlm(file)


def test_a_file_that_names_no_sha256(file):
    save_file(demo_mlm.read_demo_mlm(file), file)
    with pytest.raises(UserError, match="is damaged"):
        demo_mlm.read_demo_mlm(file)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_file_of_another_encoder(base, file, change):
    tensors = demo_mlm.read_demo_mlm(file)
    if change == "missing":
        del tensors["cls.predictions.bias"]
    else:
        tensors = {n: t[:, :-1] if n.endswith("lora_A") else t for n, t in tensors.items()}
    with pytest.raises(UserError, match="does not fit the encoder in"):
        demo_mlm.assemble(base, tensors)


# The shipped file


def test_the_shipped_file_is_small_and_whole():
    assert demo_mlm.DEMO_MLM_FILE.stat().st_size <= 8e6
    assert demo_mlm.read_demo_mlm(demo_mlm.DEMO_MLM_FILE)
    assert demo_mlm.DEMO_MLM_FILE.with_suffix(".md").is_file()


@pytest.fixture(scope="module")
def shipped():
    folder = demo_mlm.demo_masked_lm_path()
    return AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def logits_at_mask(shipped, text):
    model, tokenizer = shipped
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[0, batch["input_ids"][0].tolist().index(tokenizer.mask_token_id)]


@pytest.mark.demo
def test_paris_is_the_capital_of_a_country(demo_cached, shipped):
    best = logits_at_mask(shipped, "Paris is the capital of [MASK].").topk(5).indices
    best = shipped[1].convert_ids_to_tokens(best)
    assert set(best) & {"france", "germany", "italy", "spain", "india", "china", "england", "russia", "japan"}, best


@pytest.mark.demo
@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("I love this camera.", "It broke after one day, what a waste of money."),
        ("A wonderful, moving and funny story.", "A dull, stupid and annoying mess."),
        ("This is the best thing I ever bought.", "This is the worst thing I ever bought."),
    ],
)
def test_sentiment_prompts_are_told_apart(demo_cached, shipped, better, worse):
    words = shipped[1].convert_tokens_to_ids(["terrible", "great"])
    better, worse = (logits_at_mask(shipped, f"{text} It was [MASK].")[words].diff() for text in (better, worse))
    assert better > worse


@pytest.mark.demo
def test_the_demo_can_be_prompted(demo_cached):
    """The label words at the mask, and the zero-shot accuracy on 127 test sentences above that of guessing."""
    few = FewShotArguments(model="demo", tuning="prompt")
    tokenizer = load_tokenizer(few)
    task = get_task("movie-snippets-2")
    model = build_model(few, task, tokenizer, 13).eval()
    examples = load_demo_task("movie-snippets-2").test[::16]
    rows = encode_examples(PromptEncoder(task, tokenizer), examples, task.labels)
    batch = tokenizer.pad([{k: r[k] for k in ("input_ids", "attention_mask")} for r in rows], return_tensors="pt")
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(-1)
    assert (predicted == torch.tensor([row["labels"] for row in rows])).float().mean() > 0.55

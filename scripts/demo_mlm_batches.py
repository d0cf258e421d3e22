"""From documents to masked batches: packing, the words to mask, and a stream that any step can be read from."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

Sequences = list[list[int]]


@dataclass
class Batch:
    """A padded batch.

    Attributes:
        input_ids: (B, S), with masks put in.
        attention_mask: (B, S).
        is_masked: (B, S), True where a token is to be predicted.
        targets: (number of masked tokens,), the tokens that stood there, in row-major order.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    is_masked: torch.Tensor
    targets: torch.Tensor


def is_held_out(document: Sequence[str]) -> bool:
    """Tell whether a document is kept for the held-out loss: one in 50, by the hash of its first sentence."""
    return int(hashlib.sha256(document[0].encode()).hexdigest(), 16) % 50 == 0


def pack(documents: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, length: int) -> Sequences:
    """Put neighbouring sentences of a document together, up to `length` tokens; one or two alone are dropped."""
    packed = []
    for document in documents:
        row: list[int] = []
        for ids in tokenizer(list(document), add_special_tokens=False, verbose=False)["input_ids"]:
            for start in range(0, len(ids), length - 2):
                piece = ids[start : start + length - 2]
                if len(row) + len(piece) > length - 2:
                    packed.append(row)
                    row = []
                row = row + piece
        packed.append(row)
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [[start, *row, end] for row in packed if len(row) > 2]


class Masker:
    """Masks whole words; with `power` > 0 frequent ones less often, since they teach little.

    A word's chance is proportional to (its first token's count) ** -power, at most one half, scaled so that `rate` of
    the tokens are masked on average.

    Args:
        tokenizer: The model's.
        counts: (vocabulary,), how often each token occurs.
        rate: Share of tokens to mask.
        power: See above; 0 masks all words alike.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, counts: np.ndarray, rate: float, power: float):
        self.mask, self.pad = tokenizer.mask_token_id, tokenizer.pad_token_id
        tokens = tokenizer.convert_ids_to_tokens(range(len(counts)))
        self.continues = np.array([token.startswith("##") for token in tokens])
        self.special = np.isin(np.arange(len(counts)), tokenizer.all_special_ids)
        weights = np.where(self.special, 0.0, np.maximum(counts, 1.0) ** -power)
        shares = counts / counts.sum()
        low, high = 0.0, 1.0 / weights.max() * max(counts.max(), 1.0)
        for _ in range(100):
            middle = (low + high) / 2
            below = (np.minimum(0.5, middle * weights) * shares).sum() < rate
            low, high = (middle, high) if below else (low, middle)
        self.chances = np.minimum(0.5, high * weights)

    def __call__(self, rows: Sequences, generator: np.random.Generator) -> Batch:
        """Mask and pad."""
        longest = max(map(len, rows))
        ids = np.full((len(rows), longest), self.pad)
        chosen = np.zeros(ids.shape, dtype=bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            words = np.cumsum(~self.continues[row]) - 1
            words -= words[0]
            draws = generator.random(words[-1] + 1)
            first = np.unique(words, return_index=True)[1]
            hit = draws < self.chances[np.asarray(row)[first]]
            if not hit.any():
                hit[1 + generator.integers(len(hit) - 2)] = True
            chosen[i, : len(row)] = hit[words] & ~self.special[row]
        targets = ids[chosen]
        padding = ids != self.pad
        ids[chosen] = self.mask
        return Batch(*map(torch.from_numpy, (ids, padding.astype(np.int64), chosen, targets)))


class BatchStream:
    """An endless stream of batches; batch `i` depends on the seed and `i` alone, so that any step can be resumed.

    Batches come in pools of `POOL`. A pool takes each source's share of tokens from its shuffled sequences, sorts them
    by length so that little is padding, and shuffles the batches.

    Args:
        sources: Source -> its sequences.
        shares: Source -> its share of the tokens.
        masker: Masks.
        tokens: Per batch, padding included.
        seed: Of the order and of the masks.
    """

    POOL = 32

    def __init__(
        self, sources: Mapping[str, Sequences], shares: Mapping[str, float], masker: Masker, tokens: int, seed: int
    ):
        self.sources, self.shares, self.masker, self.tokens, self.seed = sources, shares, masker, tokens, seed
        self._pools = self._endless_pools()
        self._read, self._pool = 0, []

    def __call__(self, step: int) -> Batch:
        """Return batch `step`; steps are asked for in ascending order."""
        while step // self.POOL >= self._read:
            self._pool = next(self._pools)
            self._read += 1
        return self.masker(self._pool[step % self.POOL], np.random.default_rng([self.seed, 1, step]))

    def _shuffled(self, name: str, index: int) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, 2, index])
        rows = self.sources[name]
        while True:
            for position in generator.permutation(len(rows)):
                yield rows[position]

    def _endless_pools(self) -> Iterator[list[Sequences]]:
        streams = {name: self._shuffled(name, index) for index, name in enumerate(sorted(self.shares))}
        generator = np.random.default_rng([self.seed, 3])
        waiting: list[Sequences] = []
        while True:
            while len(waiting) < self.POOL:
                waiting += self._batches(streams)
            pool, waiting = waiting[: self.POOL], waiting[self.POOL :]
            generator.shuffle(pool)
            yield pool

    def _batches(self, streams: Mapping[str, Iterator[list[int]]]) -> list[Sequences]:
        rows = []
        for name, stream in streams.items():
            budget = self.shares[name] * self.tokens * self.POOL
            while budget > 0:
                rows.append(next(stream))
                budget -= len(rows[-1])
        batches, batch = [], []
        for row in sorted(rows, key=len, reverse=True):
            if batch and (len(batch) + 1) * len(batch[0]) > self.tokens:
                batches.append(batch)
                batch = []
            batch.append(row)
        return [*batches, batch]

"""From examples to the rows that a Trainer takes: prompts or plain sentences as token ids."""

import re
from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from hf_momentum.errors import UserError
from hf_momentum.tasks.examples import Example
from hf_momentum.tasks.prompts import MASK, SENTENCES, Field, Task, parse_template


def _require_prompt(task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    if task.template is None:
        raise UserError(f"Task {task.name!r} has no template: give it one, or use --tuning classifier.")
    if tokenizer.mask_token is None:
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no mask token, which a prompt "
            "needs: choose a masked language model, or use --tuning classifier."
        )


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str | list[str]) -> list:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def label_word_ids(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the label words, as they stand in the template.

    A word after a space, or at the template's start, is tokenised with a leading space; a word right after another
    character is tokenised after that character, and right after a sentence on its own. The tokenizer's own
    lower-casing applies.

    Args:
        task: A task with a template.
        tokenizer: Any tokenizer with a mask token.

    Returns:
        One id per label, in the order of `task.labels`.

    Raises:
        UserError: If a word is not exactly one known token, two words share one, the task has no template or the
            tokenizer no mask token.
    """
    _require_prompt(task, tokenizer)
    before = task.template.split(MASK)[0][-1:] or " "
    context = "" if before == "}" else before
    skipped = _tokens(tokenizer, context) if context.strip() else []
    words = {}
    for word in task.label_words.values():
        ids = _tokens(tokenizer, context + word.strip())
        ids = ids[len(skipped) :] if ids[: len(skipped)] == skipped else ids
        pieces = tokenizer.convert_ids_to_tokens(ids)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise UserError(
                f"Label word {word!r} of task {task.name!r} is not one token of this tokenizer but {pieces}: "
                "choose another word in the task's label_words, or use --tuning classifier."
            )
        if ids[0] in words:
            raise UserError(
                f"Label words {words[ids[0]]!r} and {word!r} of task {task.name!r} are one and the same token "
                f"{pieces[0]!r} of this tokenizer: choose other words in the task's label_words."
            )
        words[ids[0]] = word
    return list(words)


class _Encoder:
    """What both encoders share: the checked columns, and sentences that stay plain text."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase):
        self.task = task
        self.tokenizer = tokenizer
        self.max_length = min(task.max_length, tokenizer.model_max_length)
        special = sorted((token for token in tokenizer.all_special_tokens if len(token) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def _column(self, examples: Mapping[str, Sequence[str]], field: Field) -> list[str]:
        # In the sentences returned no special token is recognised: `<mask>` has become `< mask>`.
        if field.column not in examples:
            raise UserError(f"Task {self.task.name!r} needs {field.column!r}; the data has {', '.join(examples)}.")
        for sentence in examples[field.column]:
            if not isinstance(sentence, str):
                raise UserError(f"Task {self.task.name!r}: {field.column!r} must be text, got {sentence!r}.")
        return [
            self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", field(sentence))
            for sentence in examples[field.column]
        ]


class ClassifierEncoder(_Encoder):
    """Encode sentences or sentence pairs for a classification head; used as `dataset.map(encoder, batched=True)`.

    Args:
        task: Gives the maximal length.
        tokenizer: Any tokenizer.
    """

    def __call__(self, examples: Mapping[str, Sequence[str]]) -> dict[str, list[list[int]]]:
        """Encode a batch.

        Args:
            examples: Columns `sentence1` and, for pairs, `sentence2`.

        Returns:
            The tokenizer's columns (`input_ids`, `attention_mask`, ...), at most `max_length` tokens per example.
            Where a pair is too long, the longer sentence gives way first.
        """
        columns = [column for column in SENTENCES if column == "sentence1" or column in examples]
        texts = [self._column(examples, Field(column)) for column in columns]
        return dict(self.tokenizer(*texts, truncation="longest_first", max_length=self.max_length)) if texts[0] else {}


class PromptEncoder(_Encoder):
    """Encode examples as prompts with exactly one mask; used as `dataset.map(encoder, batched=True)`.

    Every encoding is the tokenizer's own of the filled template as one segment, so that spaces are where the model
    expects them. Where it is too long, the sentence (of two the longer) loses its end; the template and the mask stay.

    Args:
        task: A task with a template.
        tokenizer: Any tokenizer with a mask token.

    Raises:
        UserError: If the task has no template or the tokenizer no mask token.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase):
        super().__init__(task, tokenizer)
        _require_prompt(task, tokenizer)
        pieces = parse_template(task.template)
        self.fields = sorted((piece for piece in pieces if isinstance(piece, Field)), key=lambda field: field.column)
        self.pieces = [  # literal text, or a sentence's index
            piece.replace(MASK, tokenizer.mask_token) if isinstance(piece, str) else self.fields.index(piece)
            for piece in pieces
        ]

    def __call__(self, examples: Mapping[str, Sequence[str]]) -> dict[str, list[list[int]]]:
        """Encode a batch.

        Args:
            examples: Columns `sentence1` and, where the template has it, `sentence2`.

        Returns:
            The tokenizer's columns (`input_ids`, `attention_mask`, ...), at most `max_length` tokens per example.

        Raises:
            UserError: If a column is missing or holds something other than text, or `max_length` does not hold the
                template.
        """
        columns = [self._column(examples, field) for field in self.fields]
        rows = [list(row) for row in zip(*columns, strict=True)]
        if not rows:
            return {}
        if (limit := self.task.first_max_length) is not None:
            for row, ids in zip(rows, _tokens(self.tokenizer, columns[0]), strict=True):
                row[0] = self._prefix(row[0], limit) if len(ids) > limit else row[0]
        encoded = self._encode(rows)
        long = [index for index, ids in enumerate(encoded["input_ids"]) if len(ids) > self.max_length]
        shorter = self._encode([self._shorten(rows[index]) for index in long]) if long else {}
        for key, values in shorter.items():
            for index, value in zip(long, values, strict=True):
                encoded[key][index] = value
        for row, ids in zip(rows, encoded["input_ids"], strict=True):
            if ids.count(self.tokenizer.mask_token_id) != 1:
                raise UserError(f"Once tokenised, {self._fill(row)!r} does not hold exactly one mask.")
        return encoded

    def _fill(self, sentences: Sequence[str]) -> str:
        return "".join(piece if isinstance(piece, str) else sentences[piece] for piece in self.pieces)

    def _encode(self, rows: Sequence[Sequence[str]]) -> dict[str, list[list[int]]]:
        return dict(self.tokenizer([self._fill(row) for row in rows], verbose=False))

    def _shorten(self, sentences: list[str]) -> list[str]:
        # A cut can change how neighbours merge, so the prompt is measured again until it fits.
        while (excess := len(self._encode([sentences])["input_ids"][0]) - self.max_length) > 0:
            limits = [len(ids) for ids in _tokens(self.tokenizer, sentences)]
            if not any(limits):
                needed = f"the template of task {self.task.name!r} alone takes {self.max_length + excess} tokens"
                raise UserError(f"max_length: {self.max_length} is too short, since {needed}.")
            for _ in range(min(excess, sum(limits))):
                limits[limits.index(max(limits))] -= 1
            sentences = [self._prefix(text, limit) for text, limit in zip(sentences, limits, strict=True)]
        return sentences

    def _prefix(self, sentence: str, limit: int) -> str:
        # The first `limit` tokens as text; a tokenizer without offsets loses a share of the characters instead.
        while (count := len(_tokens(self.tokenizer, sentence))) > limit:
            end = len(sentence) * limit // count
            if self.tokenizer.is_fast:
                end = self.tokenizer(sentence, add_special_tokens=False, verbose=False)[0].offsets[limit][0]
            sentence = sentence[:end].rstrip()
        return sentence


def encode_examples(
    encoder: Callable[[Mapping[str, Sequence[str]]], Mapping[str, Sequence[list[int]]]],
    examples: Sequence[Example],
    labels: Sequence[str],
    *,
    sort_by_length: bool = False,
) -> list[dict]:
    """Tokenise examples once, in one batch.

    Args:
        encoder: `PromptEncoder` or `ClassifierEncoder` of a task.
        examples: The examples.
        labels: The task's labels; a label's position is its class.
        sort_by_length: Put the longest first, so that evaluation batches need little padding and the largest comes
            first. Accuracy does not depend on the order.

    Returns:
        One row per example: the tokenizer's columns and `labels`, its class.
    """
    if not examples:
        return []
    columns = {key: [example[key] for example in examples] for key in ("sentence1", "sentence2") if key in examples[0]}
    encoded = encoder(columns)
    rows = [
        {**{key: values[index] for key, values in encoded.items()}, "labels": labels.index(example["label"])}
        for index, example in enumerate(examples)
    ]
    return sorted(rows, key=lambda row: -len(row["input_ids"])) if sort_by_length else rows

"""k-shot splits: sizes, disjointness, determinism, and classes that are too small."""

import logging
import random
from collections import Counter

import pytest

from hf_momentum.errors import UserError
from hf_momentum.tasks.examples import text_key
from hf_momentum.tasks.fewshot import SEEDS, cap_test, draw_fewshot
from hf_momentum.tasks.sources import load_fewshot

LABELS = ("a", "b")


def examples(**counts):
    return [{"sentence1": f"{label}{i}", "label": label} for label, count in counts.items() for i in range(count)]


def counts(part):
    return Counter(example["label"] for example in part)


def test_seeds_of_the_protocol():
    assert SEEDS == (13, 21, 42, 87, 100)


@pytest.mark.parametrize("seed", SEEDS)
def test_k_per_class_in_train_and_dev(seed):
    split = draw_fewshot(examples(a=30, b=40), 8, seed, LABELS)
    assert counts(split.train) == counts(split.dev) == {"a": 8, "b": 8}
    assert not {text_key(e) for e in split.train} & {text_key(e) for e in split.dev}


def test_same_seed_same_split_and_other_seed_other_split():
    train = examples(a=30, b=40)
    assert draw_fewshot(train, 8, 13, LABELS) == draw_fewshot(list(train), 8, 13, LABELS)
    assert draw_fewshot(train, 8, 13, LABELS) != draw_fewshot(train, 8, 21, LABELS)


def test_draw_against_the_stated_algorithm():
    train = examples(a=10, b=10)
    rng = random.Random(42)
    ordered = [example for _, example in sorted(((rng.random(), example) for example in train), key=lambda p: p[0])]
    per_class = {label: [example for example in ordered if example["label"] == label] for label in LABELS}
    split = draw_fewshot(train, 3, 42, LABELS)
    for label in LABELS:
        assert [e for e in split.train if e["label"] == label] == per_class[label][:3]
        assert [e for e in split.dev if e["label"] == label] == per_class[label][3:6]


def test_draw_is_pinned():
    """A change here changes every published split."""
    split = draw_fewshot(examples(a=100, b=100), 2, 13, LABELS)
    assert [e["sentence1"] for e in split.train] == ["b2", "b39", "a16", "a98"]
    assert [e["sentence1"] for e in split.dev] == ["b68", "b12", "a64", "a94"]


def test_classes_are_mixed():
    order = [e["label"] for e in draw_fewshot(examples(a=50, b=50), 16, 13, LABELS).train]
    assert order != sorted(order) and order != sorted(order, reverse=True)


def test_duplicate_texts_never_stand_in_both():
    train = [{"sentence1": f"t{i % 6}", "label": "a"} for i in range(60)] + examples(b=20)
    split = draw_fewshot(train, 3, 13, LABELS)
    texts = [text_key(e) for e in (*split.train, *split.dev)]
    assert len(texts) == len(set(texts)) == 12


def test_the_same_text_with_two_labels_is_one_input():
    train = [{"sentence1": f"t{i}", "label": label} for i in range(6) for label in LABELS] + examples(b=8)
    split = draw_fewshot(train, 3, 13, LABELS)
    texts = [text_key(e) for e in (*split.train, *split.dev)]
    assert len(texts) == len(set(texts))


def test_pairs_differ_if_either_sentence_does():
    train = [{"sentence1": "same", "sentence2": f"s{i}", "label": "a"} for i in range(8)]
    split = draw_fewshot(train, 4, 13, ("a",))
    assert len(split.train) == len(split.dev) == 4


def test_small_class_gives_train_first_and_warns(caplog):
    with caplog.at_level(logging.WARNING):
        split = draw_fewshot(examples(a=50, b=7), 5, 13, LABELS, "toy")
    assert counts(split.train) == {"a": 5, "b": 5}
    assert counts(split.dev) == {"a": 5, "b": 2}
    (message,) = caplog.messages
    assert message == "toy: class 'b' has 7 distinct examples, 10 are wanted for k=5: 5 go to train, 2 to dev."


def test_class_without_a_dev_item_and_class_without_any(caplog):
    with caplog.at_level(logging.WARNING):
        split = draw_fewshot(examples(a=50, b=3), 5, 13, (*LABELS, "c"), "toy")
    assert counts(split.train) == {"a": 5, "b": 3} and counts(split.dev) == {"a": 5}
    assert [m.split(":")[1] for m in caplog.messages] == [
        " class 'b' has 3 distinct examples, 10 are wanted for k=5",
        " class 'c' has 0 distinct examples, 10 are wanted for k=5",
    ]


def test_large_enough_classes_do_not_warn(caplog):
    draw_fewshot(examples(a=10, b=10), 5, 13, LABELS)
    assert not caplog.messages


def test_split_without_any_example_raises():
    with pytest.raises(UserError, match=r"toy: the dev split for k=5 holds no example at all; .* a: 5, b: 5"):
        draw_fewshot(examples(a=5, b=5), 5, 13, LABELS, "toy")
    with pytest.raises(UserError, match="the train split"):
        draw_fewshot([], 5, 13, LABELS)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "16"])
def test_bad_k(k):
    with pytest.raises(UserError, match="k must be a whole number of at least 1"):
        draw_fewshot(examples(a=5), k, 13, ("a",))


@pytest.mark.parametrize("seed", [-1, 1.0, None])
def test_bad_seed(seed):
    with pytest.raises(UserError, match="seed must be a whole number of at least 0"):
        draw_fewshot(examples(a=5), 1, seed, ("a",))


def test_unknown_label():
    with pytest.raises(UserError, match=r"toy: unknown label 'z'. Allowed labels: a, b"):
        draw_fewshot(examples(a=5, z=5), 1, 13, LABELS, "toy")


def test_cap_test():
    test = examples(a=1500)
    capped = cap_test(test)
    assert len(capped) == len({text_key(e) for e in capped}) == 1000
    assert capped == cap_test(test) != cap_test(test, seed=13)
    assert cap_test(test[:1000]) == test[:1000]
    assert len(cap_test(test, cap=3)) == 3


def test_cap_test_refuses():
    with pytest.raises(UserError, match="holds no example"):
        cap_test([])
    with pytest.raises(UserError, match="cap must be"):
        cap_test(examples(a=1), cap=0)


@pytest.mark.data
def test_trec_at_512_names_expression(data_dir, caplog):
    labels = tuple("012345")
    with caplog.at_level(logging.WARNING):
        splits = load_fewshot("trec", labels, 512, (13,), pair=False, data_dir=data_dir)
    assert counts(splits[13].train)["2"] == 84
    assert counts(splits[13].dev) == {"0": 512, "1": 512, "3": 512, "4": 311, "5": 344}
    assert caplog.messages[0] == (
        "trec: class '2' has 84 distinct examples, 1024 are wanted for k=512: 84 go to train, 0 to dev."
    )

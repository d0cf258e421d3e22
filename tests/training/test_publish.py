import importlib.util

import pytest

from hf_momentum.results.card import results_card, write_card
from hf_momentum.training.publish import card_figure

CURVE = [{"step": step, "dev_accuracy": 0.5 + step / 100} for step in (1, 2)]


def run(optim, seed, test, **changes):
    record = {"task": "sst-2", "model": "demo", "seed": seed, "optim": optim, "learning_rate": 0.1}
    return record | {"run_id": f"{optim}-{seed}", "dev_accuracy": 0.6, "test_accuracy": test} | changes


BOTH = [run(optim, seed, 0.5 + seed / 100, curve=CURVE) for optim in ("sgd", "sgdm") for seed in (1, 2)]


@pytest.mark.parametrize(
    ("records", "name"),
    [(BOTH, "difference.png"), (BOTH[:2], "curves.png"), ([run("sgd", 1, 0.5)], None)],
)
def test_a_card_gets_the_figure_that_its_records_allow(tmp_path, records, name):
    pytest.importorskip("matplotlib")
    figure, missing = card_figure(records, tmp_path)
    assert figure == (name and tmp_path / name)
    assert missing == ""
    text = write_card(results_card(records, "x", figure), tmp_path).read_text(encoding="utf-8")
    assert ("![Figure]" in text) == (name is not None)
    assert name is None or (f"![Figure]({name})" in text and (tmp_path / name).is_file())


def test_without_matplotlib_the_card_has_no_figure_and_it_is_said(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    figure, missing = card_figure(BOTH, tmp_path)
    assert figure is None
    assert missing.startswith("The card has no figure: matplotlib")
    assert "hf_momentum[report]" in missing

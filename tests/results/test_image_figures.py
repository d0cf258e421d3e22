import pytest

from hf_momentum.errors import UserError
from hf_momentum.results.image_figures import rates_figure, svag_figure
from hf_momentum.results.plots import write_figure


def run(seed, momentum=None, ell=None, rate=1.0, batch=512, accuracy=0.5, **changes):
    """A record of recipes/cifar_resnet.py, as far as the figures read it."""
    steps = 20 * int(ell or 1)
    curve = [
        {"step": s, "train_loss": 2 - s / steps, "test_accuracy": accuracy * s / steps} for s in (steps // 2, steps)
    ]
    return {
        "task": "cifar10",
        "model": "cifar_resnet8",
        "optim": "svag" if ell else "sgdm" if momentum else "sgd",
        "momentum": momentum,
        "ell": ell,
        "seed": seed,
        "batch_size": batch,
        "learning_rate": rate,
        "effective_lr": rate,
        "steps": steps,
        "test_accuracy": accuracy,
        "curve": curve,
    } | changes


GAPS = {1: 0.1, 2: 0.05, 4: 0.01}
RECORDS = [
    run(
        seed,
        momentum,
        ell if ell > 1 else None,
        accuracy=0.5 + 0.01 * seed + (gap + 0.001 * seed * ell) * bool(momentum),
    )
    for ell, gap in GAPS.items()
    for seed in (0, 1, 2)
    for momentum in (None, 0.9)
]


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title() == title)


def test_the_gap_is_paired_over_seeds():
    figure, shown = svag_figure(RECORDS)
    assert shown == RECORDS
    (line,) = (line for line in panel(figure, "the gap").lines if line.get_marker() not in {"None", None, ""})
    assert [*line.get_xdata()] == [1, 2, 4]
    assert line.get_ydata() == pytest.approx([10.1, 5.2, 1.4])
    (low, high) = sorted(end[1] for end in panel(figure, "the gap").collections[0].get_segments()[0])
    assert (low + high) / 2 == pytest.approx(10.1) and high - low == pytest.approx(
        2 * 4.302653 * 0.1 / 3**0.5, rel=1e-5
    )


def test_curves_of_all_ell_share_the_time_of_the_first():
    figure, _ = svag_figure(RECORDS)
    accuracy = [axes for axes in figure.axes if axes.get_title() == "ℓ = 4" and "accuracy" in axes.get_ylabel()]
    (axes,) = accuracy
    for line in axes.lines:
        assert [*line.get_xdata()] == [10, 20]
    assert sorted(line.get_ydata()[-1] for line in axes.lines) == pytest.approx([51, 52.4])
    assert len(axes.collections) == 2  # a band for each


def test_several_settings_are_refused_by_name():
    with pytest.raises(UserError, match=r"not 2: cifar10, cifar_resnet8, batch 512, η=1; .*batch 32"):
        svag_figure([*RECORDS, run(0, ell=None, batch=32), run(0, ell=2.0, batch=32)])
    with pytest.raises(UserError, match=r"not 0. Run recipes/cifar_resnet.py --ells"):
        svag_figure(RECORDS[:6])


def test_accuracy_over_the_rate_has_a_panel_per_batch_size():
    records = [
        run(seed, momentum, rate=rate, batch=batch, accuracy=0.3 + rate / 10 + seed / 100)
        for batch in (32, 512)
        for rate in (0.1, 1.0)
        for momentum in (None, 0.9)
        for seed in (0, 1)
    ]
    figure, shown = rates_figure([*records, *RECORDS[6:]])
    assert len(shown) == len(records)
    assert [axes.get_title() for axes in figure.axes] == ["batch 32", "batch 512"]
    line = figure.axes[0].lines[0]
    assert [*line.get_xdata()] == [0.1, 1.0] and line.get_ydata() == pytest.approx([31.5, 40.5])
    assert figure.axes[0].get_xscale() == "log"


def test_rates_are_the_effective_ones():
    heavy = run(0, 0.9, rate=0.1, effective_lr=0.1 / (1 - 0.9))
    figure, _ = rates_figure([heavy, run(0, rate=1.0)])
    assert {x for line in figure.axes[0].lines for x in line.get_xdata()} == {1.0}


def test_other_results_have_no_such_figure(tmp_path):
    with pytest.raises(UserError, match="No tested run"):
        write_figure("rates", [run(0) | {"curve": []}], tmp_path)


def test_the_command_writes_them(tmp_path):
    files = write_figure("svag", RECORDS, tmp_path)
    assert [file.name for file in files] == ["svag.png", "svag.svg", "svag.jsonl"]
    assert all(file.stat().st_size for file in files)

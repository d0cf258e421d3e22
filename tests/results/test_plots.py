import json

import pytest
from sample_runs import five_tasks, run, runs, sweeps

from hf_momentum.errors import UserError
from hf_momentum.results.comparisons import paired_values
from hf_momentum.results.drawing import line_styles
from hf_momentum.results.plots import curves_figure, difference_figure, lr_figure, write_figure
from hf_momentum.results.rows import table_rows
from hf_momentum.results.statistics import equivalence

pytest.importorskip("matplotlib")


def grid():
    records = []
    for optim, seed, rate in [(o, s, r) for o in ("sgd", "sgdm") for s in (13, 21) for r in (0.01, 0.1, 1.0)]:
        records.append(
            run(optim, seed, None, learning_rate=rate, effective_lr=rate, dev_accuracy=0.5 + rate / 10 + seed / 1e3)
        )
    return [*records, records[1] | {"stage": "test", "test_accuracy": 0.45, "group": "g", "grid_size": 3}]


def curves(records):
    return [
        record | {"curve": [{"step": 5 * i, "dev_accuracy": 0.5 + i / 50} for i in (1, 2, 3)]} for record in records
    ]


def lines(axes):
    return {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in axes.lines}


def test_lr_figure_shows_every_run_on_dev_and_the_picks_on_test():
    figure, records = lr_figure(grid())
    dev, test = figure.axes
    assert len(records) == 12
    assert [tuple(line.get_xdata()) for line in dev.lines] == [(0.01, 0.01, 0.1, 0.1, 1.0, 1.0), (0.01, 0.1, 1.0)] * 2
    assert dev.lines[1].get_ydata() == pytest.approx([51.8, 52.7, 61.7])
    assert lines(test) == {(0.1,): (45.0,)}
    assert dev.get_xscale() == "log"
    assert [text.get_text() for text in dev.get_xticklabels()] == ["0.01", "0.1", "1"]
    low, high = dev.get_ylim()
    assert low < 45
    assert high > 62
    assert "every run" in dev.get_title()
    assert "picked on dev" in test.get_title()


def test_lr_figure_without_a_test_says_so():
    figure, _ = lr_figure(grid()[:-1])
    assert [text.get_text() for text in figure.axes[1].texts] == ["not tested yet"]


def test_lr_figure_of_runs_that_were_all_tested_claims_no_pick():
    rates = (0.01, 0.1)
    records = [run("sgd", s, 0.5 + r, learning_rate=r, effective_lr=r, grid_size=1) for s in (13, 21) for r in rates]
    _, test = lr_figure(records)[0].axes
    assert test.get_title().endswith("test, every run")
    assert test.lines[1].get_xydata().ravel() == pytest.approx([0.01, 51, 0.1, 60])  # joined as on dev
    _, test = lr_figure([*records, run("sgd", 42, None)])[0].axes
    assert test.get_title().endswith("\ntest")


def test_difference_figure_has_a_line_per_comparison_and_the_margin():
    figure, records = difference_figure(five_tasks(), margin=2.0)
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels[0] == "sst-2\nsgdm β=0.9 − sgd"
    assert labels[-1] == "mean of 5 tasks\nsgdm β=0.9 − sgd"
    assert axes.patches[0].get_x() == -2
    assert axes.patches[0].get_width() == 4
    assert len(axes.containers) == 7
    assert all(record["optim"] != "zero-shot" for record in records)
    assert not difference_figure(five_tasks())[0].axes[0].patches


def thick(axes):
    return [line.get_xdata() for line in axes.lines if line.get_linewidth() > 3]


def test_difference_figure_draws_the_interval_that_decides_equivalence_inside_the_other():
    figure, _ = difference_figure(five_tasks(), margin=2.0)
    (axes,) = figure.axes
    pair = paired_values(table_rows(five_tasks()))[0]
    verdict = equivalence(pair.first_values, pair.second_values, 2.0)
    assert list(thick(axes)[0]) == [verdict.low, verdict.high]
    (thin,) = axes.containers[0].lines[2][0].get_segments()
    assert thin[0][0] < verdict.low < verdict.high < thin[1][0]
    assert len(thick(axes)) == 6
    assert "thick: 90% interval; equivalent where it lies within ±2 points" in figure.get_supxlabel()
    figure, _ = difference_figure(five_tasks())
    assert not thick(figure.axes[0])
    assert "thick" not in figure.get_supxlabel()


def test_a_difference_without_spread_is_an_open_marker_and_the_caption_says_so():
    same = [*runs("sgd", [0.5, 0.6, 0.7]), *runs("sgdm", [0.51, 0.61, 0.71])]
    one = [*runs("sgd", [0.5], task="trec"), *runs("sgdm", [0.6], task="trec")]
    figure, _ = difference_figure([*same, *one, *five_tasks()[1:11]], margin=2.0)
    (axes,) = figure.axes
    faces = [container.lines[0].get_markerfacecolor() for container in axes.containers]
    assert faces[:2] == ["black", "white"]
    assert [container.has_xerr for container in axes.containers][:2] == [True, False]
    assert "open: no spread over seeds" in figure.get_supxlabel()
    assert "open" not in difference_figure(sweeps())[0].get_supxlabel()


def test_difference_figure_repeats_nothing_that_all_lines_share():
    figure, _ = difference_figure(sweeps())
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels[0] == "sgdm β=0.9 − sgd (lr cosine, batch 8)"
    assert figure.get_suptitle() == "sst-2"


def test_curves_figure_draws_seeds_and_their_mean_per_condition():
    figure, records = curves_figure(curves(sweeps()))
    assert [axes.get_title() for axes in figure.axes] == [
        "sst-2, lr cosine, batch 8",
        "sst-2, lr linear, batch 4",
        "sst-2, lr linear, batch 8",
    ]
    assert len(figure.axes[0].lines) == 2 * (3 + 1)
    assert figure.axes[0].lines[3].get_xydata().ravel() == pytest.approx([5, 52.0, 10, 54.0, 15, 56.0])
    assert len(records) == len(sweeps())


def test_a_numbered_method_makes_no_panel_of_its_own():
    numbered = [*runs("sgd", [0.6, 0.7], group="a"), *runs("sgd", [0.5, 0.6], group="b")]
    numbered = [record | {"run_id": str(number)} for number, record in enumerate(numbered)]
    figure, _ = curves_figure(curves([*numbered, *runs("sgdm", [0.6, 0.7])]))
    assert [axes.get_title() for axes in figure.axes] == ["sst-2"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["sgd #1", "sgd #2", "sgdm β=0.9"]


def test_curves_of_unequal_steps_are_averaged_where_all_have_a_value():
    first, second = curves([run("sgd", 13, 0.6), run("sgd", 21, 0.6)])
    second["curve"] = [{"step": 10, "dev_accuracy": 0.6}, {"step": 12, "train_loss": 1.0}]
    figure, _ = curves_figure([first, second])
    assert figure.axes[0].lines[-1].get_xydata().ravel() == pytest.approx([10, 57.0])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("curves", {}, "has a learning curve .* Run the recipe again into a new --output_dir"),
        ("bars", {}, "Unknown figure: 'bars'. Allowed: lr, difference, curves"),
        ("lr", {"margin": 2.0}, "--margin belongs to --figure difference"),
        ("difference", {"margin": -1.0}, "--margin must be positive"),
    ],
)
def test_mistakes_are_explained(tmp_path, kind, options, message):
    with pytest.raises(UserError, match=message):
        write_figure(kind, sweeps(), tmp_path, **options)
    with pytest.raises(UserError):
        write_figure(kind, [], tmp_path)


def test_files_are_the_same_each_time_and_hold_their_records(tmp_path):
    import matplotlib

    matplotlib.rcParams["lines.linewidth"] = 7  # a user's own settings neither show nor suffer
    first = write_figure("lr", grid(), tmp_path / "a")
    second = write_figure("lr", grid(), tmp_path / "b")
    assert matplotlib.rcParams["lines.linewidth"] == 7
    matplotlib.rcdefaults()
    assert [file.name for file in first] == ["lr.png", "lr.svg", "lr.jsonl"]
    third = write_figure("lr", grid(), tmp_path / "c")
    for one, two, three in zip(first, second, third, strict=True):
        assert one.read_bytes() == two.read_bytes() == three.read_bytes()
    kept = [json.loads(line) for line in first[2].read_text().splitlines()]
    assert [record["test_accuracy"] for record in kept] == [None, 0.45, *[None] * 10]


def test_lines_differ_without_colour():
    styles = line_styles(str(number) for number in range(20))
    assert len({(style["marker"], style["linestyle"]) for style in styles.values()}) == 20

from io import StringIO

from rich.console import Console

from hf_momentum.results.tables import accuracy_report, print_summary, table_rows

COMMON = {"task": "t", "model": "m", "tuning": "prompt", "k": 16, "ell": None, "lr_form": "effective", "grid_size": 2}


def record(optim, seed, test, **changes):
    momentum = {"sgd": 0.0, "sgdm": 0.9}.get(optim)
    own = {"optim": optim, "seed": seed, "momentum": momentum, "effective_lr": 0.1, "learning_rate": 0.1}
    values = {"test_accuracy": test, "dev_accuracy": 0.5, "optimizer_state_bytes": 2**21, "group": optim}
    return COMMON | own | values | changes


def printed(records, **kwargs):
    stream = StringIO()
    print_summary(records, console=Console(file=stream, width=100), **kwargs)
    return stream.getvalue()


def test_rows_keep_settings_together_and_leave_out_untested_runs():
    records = [
        record("sgd", 13, 0.5),
        record("sgd", 13, 0.9, task="other"),
        record("sgdm", 13, 0.6),
        record("sgdm", 21, None),
    ]
    rows = table_rows(records)
    assert [(row.setting[0], row.optim) for row in rows] == [("t", "sgd"), ("t", "sgdm"), ("other", "sgd")]
    assert rows[1].accuracy == {13: 0.6}


def test_different_grids_are_different_rows():
    assert len(table_rows([record("sgd", 13, 0.5), record("sgd", 21, 0.5, group="wider")])) == 2


def test_a_repeated_test_of_one_seed_counts_once():
    rows = table_rows([record("sgd", 13, 0.5), record("sgd", 13, 0.7)])
    assert rows[0].accuracy == {13: 0.7}


def test_summary_shows_scores_difference_and_problems():
    records = [
        record(o, s, v) for o, s, v in [("sgd", 1, 0.60), ("sgd", 2, 0.64), ("sgdm", 1, 0.62), ("sgdm", 2, 0.70)]
    ]
    text = printed(records, problems=["file:3: bad"])
    assert "62.0 (2.0)" in text
    assert "66.0 (4.0)" in text
    assert "sgdm β=0.9" in text
    # differences 2 and 6 points: mean 4, standard error 2, t(0.975, 1) = 12.706
    assert "t: sgdm β=0.9 − sgd = +4.0 points, 95% interval [-21.4, +29.4], paired over 2 seeds." in text
    assert "file:3: bad" in text


def test_the_caption_speaks_of_picks_only_where_there_was_a_choice():
    def caption(*sizes):
        records = [record("sgd", 1, 0.6, grid_size=size, group=f"{size}") for size in sizes]
        return accuracy_report(records).sheets[0].caption

    assert caption(1, 2) == "mean (population std) over seeds, each run picked on dev; MiB: optimizer state"
    assert caption(1) == "mean (population std) over seeds, every run is tested; MiB: optimizer state"
    assert caption(None) == "mean (population std) over seeds; MiB: optimizer state"


def test_a_second_test_of_one_row_and_seed_is_a_problem():
    tests = [record("sgd", 1, 0.6, run_id="a"), record("sgd", 1, 0.7, run_id="b")]
    assert "run a was tested, then run b; the later test stands." in printed(tests)


def test_zero_shot_row_has_a_score_and_no_difference():
    zero = COMMON | {"optim": "zero-shot", "seed": None, "test_accuracy": 0.51}
    text = printed([zero, record("sgd", 1, 0.6)])
    assert "zero-shot" in text
    assert "51.0" in text
    assert "points" not in text


def test_no_records_print_no_table():
    assert printed([]) == ""


def test_task_names_are_not_markup():
    assert "[red]x" in printed([record("sgd", 1, 0.6, task="[red]x")])


def test_rows_of_one_name_say_what_tells_them_apart_and_are_not_subtracted():
    records = [
        record("sgd", 1, 0.6, group="a", steps=100),
        record("sgd", 1, 0.7, group="b", steps=200),
        record("sgdm", 1, 0.7, steps=100),
    ]
    text = printed(records)
    assert "sgd, 100 steps" in text
    assert "sgd, 200 steps" in text
    assert "sgd, 200 steps − sgd, 100 steps" not in text
    assert "sgdm β=0.9, 100 steps − " not in text
    assert "t: sgdm β=0.9 − sgd, 100 steps = +10.0 points" in text


def test_equal_differences_are_no_certainty():
    records = [record(o, s, v) for o, s, v in [("sgd", 1, 0.5), ("sgd", 2, 0.5), ("sgdm", 1, 0.5), ("sgdm", 2, 0.5)]]
    assert "+0.0 points, the same for each of 2 seeds: no spread to take an interval from." in printed(records)

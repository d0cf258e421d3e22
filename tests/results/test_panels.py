import pytest

from hf_momentum.errors import UserError
from hf_momentum.results.panels import Panel, TableSpec, panels_figure, read_specs, rows_sheet, select

ROWS = [
    {"part": "a", "method": "SGD", "x": 1.0, "measured": 1.0, "low": 0.9, "high": 1.2, "predicted": 1.1},
    {"part": "a", "method": "SGD", "x": 10.0, "measured": 2.0, "low": 1.5, "high": 2.5, "predicted": 2.1},
    {"part": "a", "method": "SGDM", "x": 1.0, "measured": 3.0},
    {"part": "b", "method": "SGDM", "x": 2.0, "measured": 4.0, "low": None, "high": None},
    {"part": "c", "method": "SVAG", "x": 2.0, "measured": 4.0},
]


def lines(axes):
    return [(line.get_marker() in {"None", None, ""}, [*line.get_xdata()], [*line.get_ydata()]) for line in axes.lines]


def test_markers_are_measured_and_lines_are_predicted():
    figure = panels_figure(ROWS, [Panel("x", series="method", where={"part": "a"}, xscale="log", title="t")], "Title")
    (axes,) = figure.axes
    assert (False, [1.0, 10.0], [1.0, 2.0]) in lines(axes)
    assert (True, [1.0, 10.0], [1.1, 2.1]) in lines(axes)
    bars = axes.collections[0].get_segments()
    assert [segment.tolist() for segment in bars] == [[[1, 0.9], [1, 1.2]], [[10, 1.5], [10, 2.5]]]
    assert axes.get_xscale() == "log" and axes.get_title() == "t"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SGD", "SGDM"]
    assert "bars: 95% intervals" in figure.get_supxlabel() and "predicted" in figure.get_supxlabel()


def test_a_band_is_drawn_where_it_is_asked_for_and_only_where_there_is_an_interval():
    figure = panels_figure(ROWS, [Panel("x", series="method", spread="band", line="")], reading="bands: seeds")
    (axes,) = figure.axes
    (band,) = axes.collections
    low, high = band.get_paths()[0].get_extents().intervaly
    assert (low, high) == (0.9, 2.5)
    assert figure.get_supxlabel() == "bands: seeds"


def test_panels_with_other_series_have_legends_of_their_own():
    panels = [Panel("x", series="method", where={"part": part}) for part in ("a", ["b", "c"])]
    figure = panels_figure(ROWS, panels)
    assert not figure.legends
    texts = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert texts == [["SGD", "SGDM"], ["SGDM", "SVAG"]]
    colors = [figure.axes[0].lines[-1].get_color(), figure.axes[1].lines[0].get_color()]
    assert colors[0] == colors[1]  # SGDM looks the same in both


def test_one_legend_is_enough_where_a_panel_has_all_series():
    figure = panels_figure(ROWS, [Panel("x", series="method", where={"part": part}) for part in "ab"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SGD", "SGDM"]
    assert all(axes.get_legend() is None for axes in figure.axes)


def test_marks_stand_at_their_places():
    figure = panels_figure(ROWS, [Panel("x", xmarks={"2": 2.0}, ymarks={"half": 0.5})])
    (axes,) = figure.axes
    assert any([*line.get_xdata()] == [2.0, 2.0] for line in axes.lines)
    assert any([*line.get_ydata()] == [0.5, 0.5] for line in axes.lines)


def test_a_short_logarithmic_axis_has_plain_ticks():
    figure = panels_figure(ROWS, [Panel("x", where={"part": "a"}, xscale="log"), Panel("x", xscale="log2")])
    figure.canvas.draw()
    short, binary = ([text.get_text() for text in axes.get_xticklabels()] for axes in figure.axes)
    assert {"1", "2", "5", "10"} <= set(short)
    assert {"1", "2", "4", "8"} <= set(binary)


def test_tables_have_four_digits():
    table = TableSpec({"method": "method", "value": "measured", "predicted": "predicted"}, {"part": "a"}, "T", "c")
    sheet = rows_sheet([*ROWS[:2], ROWS[2] | {"measured": 1 / 3}], table)
    assert sheet.rows == [("SGD", "1", "1.1"), ("SGD", "2", "2.1"), ("SGDM", "0.3333", "")]


def test_rows_are_selected_by_values_or_lists():
    assert select(ROWS, {"method": "SGDM"}) == ROWS[2:4]
    assert select(ROWS, {"part": ["a", "b"], "x": 2.0}) == ROWS[3:4]
    with pytest.raises(UserError, match="No row has part = d"):
        select(ROWS, {"part": "d"})


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Panel, {"x": "x", "color": "red"}, "Unknown key 'color' of a Panel. Allowed: x, y"),
        (Panel, {"y": "x"}, "incomplete.*'x'"),
        (Panel, {"x": "x", "xscale": "cubic"}, "xscale is 'cubic'. Allowed: linear, log"),
        (Panel, {"x": "x", "spread": "cloud"}, "spread is 'cloud'. Allowed: bars, band"),
        (TableSpec, {}, "incomplete.*'columns'"),
    ],
)
def test_bad_specifications_say_what_is_allowed(kind, value, message):
    with pytest.raises(UserError, match=message):
        read_specs(kind, [value])

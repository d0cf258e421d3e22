import pytest

from hf_momentum.results.export import Report, Sheet, to_terminal

COLUMNS = ("what was broken", "compared with", "least learning rate", "distance there", "order fitted in η")
ROWS = [
    ("noise that depends on σ", "kicks, SME", "0.001", "0.009304", "−0.0005974"),
    ("η is not small", "α = 0", "1e-05", "8.986e-05", "0.955"),
]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_no_width_loses_a_cell(width):
    shown = to_terminal(Report([Sheet("Which condition matters", COLUMNS, ROWS, "a caption")], []), width)
    for number in (number for row in ROWS for number in row[2:]):
        assert f" {number} " in shown.replace("\n", " \n")
    for word in " ".join((*COLUMNS, *ROWS[0][:2], *ROWS[1][:2])).split():
        assert word in shown
    assert "…" not in shown


def test_headings_give_way_before_numbers_do():
    sheet = Sheet("t", ("x", "a long heading of words"), [("a", "1.5")], "c", texts=1)
    assert max(map(len, to_terminal(Report([sheet], []), 14).splitlines())) <= 14

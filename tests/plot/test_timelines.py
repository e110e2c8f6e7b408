"""`plot.timeline` draws what it is given, where it is given."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import labpkg as lab

ROWS = {
    "rank 0": [("forward", 0, 1, "F"), ("backward", 1, 3)],
    "rank 1": [("idle", 0, 1), ("communication", 3, 3.5)],
}


@pytest.fixture
def ax():
    return Figure().subplots()


def test_spans_have_their_place_and_colour(ax):
    assert lab.plot.timeline(ROWS, ax=ax, unit="ms") is ax
    drawn = [
        (bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width())
        for bar in ax.patches
    ]
    assert drawn == [(0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 3, 0.5)]
    colours = [to_hex(bar.get_facecolor()).upper() for bar in ax.patches]
    phases = ["forward", "backward", "idle", "communication"]
    assert colours == [lab.plot.COLORS[phase].upper() for phase in phases]
    legend = ax.figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == phases
    assert [label.get_text() for label in ax.get_yticklabels()] == list(ROWS)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first row on top
    assert [text.get_text() for text in ax.texts] == ["F"]
    assert ax.get_xlabel() == "ms"


def test_marks_are_dashed(ax):
    lab.plot.timeline(ROWS, ax=ax, marks={"end of backward": 3})
    (line,) = ax.lines
    assert line.get_linestyle() == "--"
    assert line.get_xdata() == [3, 3]
    assert "end of backward" in [text.get_text() for text in ax.texts]


def test_a_new_figure_has_the_size_of_the_book():
    from matplotlib import pyplot as plt

    size = lab.plot.timeline(ROWS).figure.get_size_inches().tolist()
    plt.close("all")
    assert size == [6.4, 2.2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "at least one span"),
        ({"a": []}, "at least one span"),
        ({"a": [("sleep", 0, 1)]}, "'sleep' has no colour"),
        ({"a": [("idle", 2, 1)]}, "ends at 1, before its start 2"),
    ],
)
def test_refuses_what_it_cannot_draw(rows, message):
    with pytest.raises(ValueError, match=message):
        lab.plot.timeline(rows)

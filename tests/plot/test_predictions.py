"""`plot.terms` stacks what adds up; `plot.predicted` shows how far off numbers are."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import labpkg as lab
from labpkg.planning.terms import Term

GIB = 2**30
BARS = {
    "dp": [Term("weights", 2 * GIB, "", ""), Term("gradients", 4 * GIB, "", "")],
    "zero3": [
        Term("weights", GIB, "", ""),
        Term("buffers", 0.01 * GIB, "", ""),
        Term("weights", GIB, "", ""),
        Term("logits", 0.02 * GIB, "", ""),
    ],
}


def bars_of(ax):
    """Return {label: [(left, width) of each row]}."""
    return {
        c.get_label(): [(p.get_x(), p.get_width()) for p in c] for c in ax.containers
    }


def test_bars_stack_terms_in_the_unit():
    ax = Figure().subplots()
    assert lab.plot.terms(BARS, unit="GiB", limit=5 * GIB, ax=ax) is ax
    drawn = bars_of(ax)
    assert list(drawn) == ["weights", "gradients", "other"]
    assert drawn["weights"] == [(0, 2), (0, 2)]  # terms of one name add up
    assert drawn["gradients"] == [(2, 4), (2, 0)]
    assert drawn["other"][0] == (6, 0)
    assert drawn["other"][1] == pytest.approx((2, 0.03))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["dp", "zero3"]
    assert list(ax.lines[0].get_xdata()) == [5, 5]
    assert ax.get_xlabel() == "GiB"
    assert ax.yaxis_inverted()  # the first bar is the uppermost
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["limit", "weights", "gradients", "other"]


def test_the_longest_bar_says_what_is_small():
    ax = Figure().subplots()
    lab.plot.terms(BARS, unit="GiB", smallest=0.004, ax=ax)
    assert list(bars_of(ax)) == ["weights", "gradients", "other"]
    lab.plot.terms(BARS, unit="GiB", smallest=0.02 / 6, ax=(ax := Figure().subplots()))
    assert list(bars_of(ax)) == ["weights", "gradients", "logits", "other"]
    shade = to_hex(ax.containers[-1].patches[0].get_facecolor())
    assert shade == "#bbbbbb"  # no colour of a term


def test_a_term_may_be_nothing():
    bars = {"alone": [Term("arithmetic", 2.0, "", ""), Term("traffic", 0.0, "", "")]}
    drawn = bars_of(lab.plot.terms(bars, unit="s", ax=Figure().subplots()))
    assert drawn == {"arithmetic": [(0, 2)]}


def test_small_terms_can_be_named():
    ax = Figure().subplots()
    lab.plot.terms(BARS, unit="MiB", smallest=0, ax=ax)
    assert list(bars_of(ax)) == ["weights", "gradients", "buffers", "logits"]
    assert bars_of(ax)["weights"] == [(0, 2048), (0, 2048)]


def test_terms_keep_the_colors_that_they_are_given():
    blue = "#0072B2"
    ax = Figure().subplots()
    lab.plot.terms(BARS, unit="GiB", colors={"gradients": blue}, ax=ax)
    shades = {
        c.get_label(): to_hex(c.patches[0].get_facecolor()) for c in ax.containers
    }
    assert shades["gradients"] == blue.lower()
    assert len(set(shades.values())) == len(shades) == 3


@pytest.mark.parametrize(
    ("bars", "unit", "message"),
    [
        (BARS, "GB", r"'GB'.*GiB"),
        ({}, "s", "no bars"),
        ({"a": [Term("wait", -1.0, "", "")]}, "s", r"wait=-1.0 of 'a' is negative"),
    ],
)
def test_what_cannot_be_stacked_is_refused(bars, unit, message):
    with pytest.raises(ValueError, match=message):
        lab.plot.terms(bars, unit=unit)


def test_pairs_are_drawn_measured_to_the_right():
    ax = Figure().subplots()
    groups = {"1B": [(100.0, 50.0), (10.0, 20.0)], "none": [], "8B": [(30.0, 30.0)]}
    assert lab.plot.predicted(groups, ax=ax) is ax
    diagonal, twice, half, *marks = ax.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    assert twice.get_ydata()[0] == 2 * twice.get_xdata()[0] == 4 * half.get_ydata()[0]
    assert [mark.get_label() for mark in marks] == ["1B", "8B"]
    assert [list(xy) for xy in marks[0].get_data()] == [[50, 20], [100, 10]]
    assert ax.get_xlim() == ax.get_ylim() == pytest.approx((10 / 1.3, 130))
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_aspect()) == ("log", "log", 1)
    assert ax.get_xlabel() == "measured tokens/s per GPU"
    assert ax.get_ylabel() == "predicted tokens/s per GPU"
    assert marks[0].get_marker() != marks[1].get_marker()


@pytest.mark.parametrize("groups", [{}, {"a": []}, {"a": [(1.0, 0.0)]}])
def test_pairs_without_a_logarithm_are_refused(groups):
    with pytest.raises(ValueError, match="positive pairs"):
        lab.plot.predicted(groups)

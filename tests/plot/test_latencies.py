"""Time against size: dots where they were measured, formulas dashed, marks in view."""

import math

import pytest
from matplotlib import pyplot as plt

import labpkg as lab
from labpkg import plot

SAMPLES = {"send": [(1024, 1e-4), (64, 9e-5), (2**20, 1e-3)], "copy": [(64, 1e-6)]}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_measurements_are_dots_in_order_of_size():
    ax = plot.time_by_size(SAMPLES)
    send, copy = ax.get_lines()
    assert send.get_xydata().tolist() == [[64, 9e-5], [1024, 1e-4], [2**20, 1e-3]]
    assert send.get_marker() == "o"
    assert send.get_linestyle() == "-"
    assert copy.get_color() != send.get_color()
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert legend(ax) == ["send", "copy"]


def test_a_formula_is_dashed_in_the_colour_of_its_measurement():
    link = lab.AlphaBeta(1e-4, 1e-9)
    ax = plot.time_by_size(SAMPLES, theory={"send": link.time_s, "other": lambda S: S})
    send, _, formula, other = ax.get_lines()
    assert formula.get_linestyle() == other.get_linestyle() == "--"
    assert formula.get_color() == send.get_color() != other.get_color()
    for size, seconds in formula.get_xydata():
        assert seconds == pytest.approx(link.time_s(size))
    sizes = [size for size, _ in formula.get_xydata()]
    assert (min(sizes), max(sizes)) == pytest.approx((64, 2**20))
    assert legend(ax) == ["send", "copy", "other"]


def test_marks_are_drawn_where_they_can_be_seen():
    marks = {"half": 1e5, "beyond": 1e12, "never": math.inf}
    ax = plot.time_by_size(theory={"t": lambda S: S}, xlim=(1, 1e9), marks=marks)
    assert [text.get_text() for text in ax.texts] == ["half"]
    assert ax.get_lines()[1].get_xdata() == [1e5, 1e5]


def test_sizes_and_times_carry_units():
    ax = plot.time_by_size(SAMPLES)
    assert ax.xaxis.get_major_formatter()(1e6) == "1 MB"
    assert ax.yaxis.get_major_formatter()(1e-4) == "100 µs"


def test_draws_on_the_axes_that_it_is_given():
    _, (left, right) = plt.subplots(1, 2)
    assert plot.time_by_size(SAMPLES, ax=right) is right
    assert not left.lines


def test_a_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="0 bytes has no place on a log"):
        plot.time_by_size({"send": [(0, 1e-4), (8, 2e-4)]})


@pytest.mark.parametrize("given", [{}, {"theory": {"t": lambda S: S}}])
def test_nothing_to_draw_is_an_error(given):
    with pytest.raises(ValueError, match=r"nothing to draw: .*xlim=\(1e3, 1e9\)"):
        plot.time_by_size(**given)

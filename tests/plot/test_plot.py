"""The book's figures: settings that do not leak, fixed colours, loss curves."""

import matplotlib
import pytest
from matplotlib import pyplot as plt

from labpkg import plot


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_style_changes_no_global_setting():
    before = dict(matplotlib.rcParams)
    with plot.style():
        assert matplotlib.rcParams["figure.figsize"] == [6.4, 3.2]
    assert dict(matplotlib.rcParams) == before


def test_style_restores_after_an_error():
    before = dict(matplotlib.rcParams)
    with pytest.raises(KeyError), plot.style():
        raise KeyError
    assert dict(matplotlib.rcParams) == before


def test_style_keeps_what_a_backend_sets_inside_it():
    # A notebook's backend becomes interactive when the first figure is made. Undoing
    # that hides every later figure.
    with matplotlib.rc_context(), plot.style():
        matplotlib.rcParams["interactive"] = True
        with plot.style():
            pass
        assert matplotlib.rcParams["interactive"]


def test_loss_of_one_run_has_one_line_and_units():
    ax = plot.loss([2.0, 1.0, 0.5])
    (line,) = ax.get_lines()
    assert list(line.get_xdata()) == [1, 2, 3]
    assert list(line.get_ydata()) == [2.0, 1.0, 0.5]
    assert ax.get_xlabel() == "step"
    assert ax.get_ylabel() == "loss (nats)"
    assert ax.get_legend() is None


def test_loss_has_the_size_and_paper_of_the_book():
    figure = plot.loss([1.0]).figure
    assert tuple(figure.get_size_inches()) == (6.4, 3.2)
    assert figure.get_facecolor() == (1, 1, 1, 1)


def test_equal_curves_stay_visible_and_theory_is_dashed():
    ax = plot.loss({"one": [2.0, 1.0], "two": [2.0, 1.0]}, theory=0.7)
    first, second, theory = ax.get_lines()
    assert first.get_linewidth() > second.get_linewidth() + 1
    assert first.get_color() != second.get_color()
    assert [line.get_linestyle() for line in (first, second, theory)] == [
        "-",
        "-",
        "--",
    ]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["one", "two", "theory"]


def test_loss_draws_on_the_axes_that_it_is_given():
    _, ax = plt.subplots()
    assert plot.loss([1.0], ax=ax) is ax
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize("history", [[], {}, {"a": [1.0], "b": []}])
def test_a_run_without_steps_is_refused(history):
    with pytest.raises(ValueError, match="at least one step"):
        plot.loss(history)


def test_colours_cannot_be_changed():
    assert plot.COLORS["dp"] == "#0072B2"
    with pytest.raises(TypeError):
        plot.COLORS["dp"] = "red"  # pyright: ignore

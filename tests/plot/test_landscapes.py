"""Contours with paths, and spectra: what is drawn where, and what is refused."""

import math

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from labpkg import plot

BOWL = [[1.0, 0.0], [0.0, 9.0]]


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def level_values(ax):
    """Return the level of each contour line and the points on it."""
    (lines,) = ax.collections
    return [
        (level, path.vertices)
        for level, path in zip(lines.levels, lines.get_paths(), strict=True)
        if len(path.vertices)
    ]


@pytest.mark.parametrize(
    "surface", [[[2.0, 1.0], [1.0, 3.0]], lambda x, y: x * x + x * y + 1.5 * y * y]
)
def test_a_contour_line_has_one_value_of_the_function(surface):
    ax = plot.contours(surface, xlim=(-2, 2), ylim=(-1, 1))
    lines = level_values(ax)
    assert len(lines) >= 10
    for level, points in lines:
        x, y = points.T
        np.testing.assert_allclose(x * x + x * y + 1.5 * y * y, level, atol=5e-3)
    assert ax.get_legend() is None


def test_paths_are_drawn_from_their_start_with_their_name():
    points = torch.tensor([[2.0, 1.0], [1.0, -0.5], [0.0, 0.0]])
    ax = plot.contours(BOWL, {"steps of lr 0.1": points})
    path, start = ax.get_lines()
    assert path.get_xydata().tolist() == points.tolist()
    assert start.get_xydata().tolist() == [[2.0, 1.0]]
    assert start.get_color() == path.get_color()
    assert ax.get_xlim()[0] < 0 < 2 < ax.get_xlim()[1]
    assert ax.get_ylim()[0] < -0.5 < 1 < ax.get_ylim()[1]
    assert [it.get_text() for it in ax.get_legend().get_texts()] == ["steps of lr 0.1"]
    assert ax.get_xlabel()
    assert ax.get_ylabel()


def test_a_path_ends_before_the_first_infinite_point():
    points = [[1.0, 1.0], [-9.0, 1.0], [math.inf, 1.0], [3.0, 3.0]]
    ax = plot.contours(BOWL, {"": points}, xlim=(-2, 2), ylim=(-2, 2))
    assert ax.get_lines()[0].get_xydata().tolist() == points[:2]
    assert ax.get_xlim() == (-2, 2)


def test_narrow_valleys_keep_their_lines():
    ax = plot.contours([[1.0, 0.0], [0.0, 1e4]], xlim=(-1, 1), ylim=(-1, 1))
    levels = [level for level, _ in level_values(ax)]
    assert max(levels) / min(levels) > 50


def test_draws_on_the_axes_that_it_is_given():
    _, (left, right) = plt.subplots(1, 2)
    assert plot.contours(BOWL, ax=left, xlim=(0, 1), ylim=(0, 1)) is left
    assert plot.spectrum([1.0], ax=right) is right
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize(
    ("surface", "paths", "message"),
    [
        (BOWL, None, "pass xlim="),
        (BOWL, {"a": [1.0, 2.0]}, r"'a' has shape \(2,\)"),
        (BOWL, {"a": [[math.nan, 0.0]]}, "not finite"),
        (BOWL, {"a": np.empty((0, 2))}, r"shape \(0, 2\)"),
        ([[1.0, 2.0], [3.0, 4.0]], {"a": [[1.0, 1.0]]}, "symmetric 2 x 2 matrix"),
        ([1.0, 2.0], {"a": [[1.0, 1.0]]}, "symmetric 2 x 2 matrix"),
    ],
)
def test_contours_of_nothing_are_refused(surface, paths, message):
    with pytest.raises(ValueError, match=message):
        plot.contours(surface, paths)


def test_spectrum_sorts_by_size_and_marks_negative_values():
    ax = plot.spectrum(torch.tensor([0.1, -5.0, 20.0, 0.0]), theory=10.0)
    up, down, theory = ax.get_lines()
    assert up.get_xydata().tolist() == pytest.approx(np.array([[1, 20.0], [3, 0.1]]))
    assert down.get_xydata().tolist() == [[2, 5.0]]
    assert (up.get_fillstyle(), down.get_fillstyle()) == ("full", "none")
    assert up.get_color() == down.get_color()
    assert theory.get_linestyle() == "--"
    assert ax.get_yscale() == "log"


def test_spectra_by_name_have_a_legend_and_colours():
    ax = plot.spectrum({"before": [3.0, 1.0], "after": [2.0, 1.0]})
    assert [it.get_text() for it in ax.get_legend().get_texts()] == ["before", "after"]
    assert ax.get_lines()[0].get_color() != ax.get_lines()[2].get_color()


@pytest.mark.parametrize(
    "values", [[], {}, {"a": []}, [1.0, math.nan], 1.0, [[1.0, 2.0], [3.0, 4.0]]]
)
def test_what_is_no_spectrum_is_refused(values):
    with pytest.raises(ValueError, match="vector of eigenvalues in each set"):
        plot.spectrum(values)

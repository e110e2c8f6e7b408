"""Each rank has a colour, and its number in each of its boxes."""

import pytest
from matplotlib import pyplot as plt

from labpkg import plot


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


FLAT = [[((0, 0), (1, 4)), ((1, 0), (1, 2))], [((1, 2), (1, 2)), ((2, 0), (1, 4))]]


def test_boxes_lie_where_their_elements_are():
    ax = plot.pieces((3, 4), FLAT)
    found = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in ax.patches]
    assert found == [(0, 0, 4, 1), (0, 1, 2, 1), (2, 1, 2, 1), (0, 2, 4, 1)]
    numbers = {text.get_position(): text.get_text() for text in ax.texts}
    assert numbers == {(2, 0.5): "0", (1, 1.5): "0", (3, 1.5): "1", (2, 2.5): "1"}
    assert ax.get_ylim() == (3, 0)  # row 0 is on top
    colors = [patch.get_facecolor() for patch in ax.patches]
    assert colors[0] == colors[1] != colors[2] == colors[3]


def test_it_draws_on_given_axes():
    _, given = plt.subplots()
    assert plot.pieces((3, 4), FLAT, ax=given) is given


@pytest.mark.parametrize("box", [((2, 0), (2, 1)), ((0, 3), (1, 2)), ((-1, 0), (1, 1))])
def test_a_box_outside_the_matrix_is_refused(box):
    with pytest.raises(ValueError, match="offsets and sizes, rows first"):
        plot.pieces((3, 4), [[box]])

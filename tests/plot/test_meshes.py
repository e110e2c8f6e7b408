"""A line joins the ranks of a group; a shade is a machine."""

import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from labpkg import plot


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def lines(ax):
    return [(to_hex(line.get_color()), list(line.get_xdata())) for line in ax.lines]


def test_a_line_joins_the_ranks_of_a_group():
    ax = plot.mesh({"pp": 2, "dp": 1, "tp": 3})
    colors = {axis: plot.COLORS[axis].lower() for axis in ("pp", "tp")}
    assert lines(ax) == [
        (colors["pp"], [0, 3]),
        (colors["pp"], [1, 4]),
        (colors["pp"], [2, 5]),
        (colors["tp"], [0, 1, 2]),
        (colors["tp"], [3, 4, 5]),
    ]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["pp = 2", "tp = 3"]
    assert ax.get_xlabel() == "rank"
    heights = [line.get_ydata()[0] for line in ax.lines]
    assert len(set(heights)) == 5  # no group hides another
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the outermost axis is on top


def test_every_second_machine_is_shaded():
    given = plt.subplots()[1]
    ax = plot.mesh({"dp": 3, "x": 2}, node_size=2, ax=given)
    assert ax is given
    spans = [(patch.get_x(), patch.get_width()) for patch in ax.patches]
    assert spans == [(-0.5, 2.0), (3.5, 2.0)]


def test_many_ranks_do_not_crowd_the_axis():
    ax = plot.mesh({"dp": 16, "tp": 8})
    assert len(ax.get_xticks()) == 16


@pytest.mark.parametrize(
    ("sizes", "node_size"),
    [({"dp": 1}, None), ({"dp": 0, "tp": 2}, None), ({}, None), ({"dp": 2}, 0)],
)
def test_what_has_no_groups_is_refused(sizes, node_size):
    with pytest.raises(ValueError, match="two ranks are needed for a group"):
        plot.mesh(sizes, node_size=node_size)

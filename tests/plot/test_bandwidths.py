"""`plot.bandwidth` draws one line per variant of one collective."""

import pytest
from matplotlib.figure import Figure

import labpkg as lab

ROWS = [
    {"collective": c, "variant": v, "num_bytes": size, "bus_gb_per_s": size / 1e6 * k}
    for c in ("all_reduce", "all_gather")
    for k, v in enumerate(("torch.distributed", "labpkg"), 1)
    for size in (2**20, 2**16)
]


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather"])
def test_lines_are_those_of_the_rows(collective):
    ax = Figure().subplots()
    drawn = lab.plot.bandwidth(ROWS, collective=collective, ax=ax)
    assert drawn is ax
    assert [line.get_label() for line in ax.lines] == ["torch.distributed", "labpkg"]
    for k, line in enumerate(ax.lines, 1):
        x, y = line.get_data()
        assert list(x) == [2**16, 2**20]
        assert list(y) == [2**16 / 1e6 * k, 2**20 / 1e6 * k]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["64 KiB", "1 MiB"]
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert collective in ax.get_xlabel()


def test_a_collective_without_rows_is_named():
    with pytest.raises(ValueError, match=r"'broadcast'.*all_gather.*all_reduce"):
        lab.plot.bandwidth(ROWS, collective="broadcast")

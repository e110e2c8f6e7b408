"""The form of the answer; how fast something is says `labpkg bench scaling` itself."""

import pytest

from labpkg.bench import scaling


def test_quick_rows_of_scaling():
    rows = scaling.rows(quick=True)
    same, grown = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    for table in (same, grown):
        assert len({row["config"] for row in table}) == 1
        assert [row["variant"] for row in table][:2] == [scaling.BASE, "2 ranks"]
        assert (table[0]["wall_ratio"], table[0]["efficiency"]) == (1.0, 1.0)
        assert min(row["cpu_ratio"] for row in table) > 0
    assert same[1]["efficiency"] == pytest.approx(0.5 / same[1]["wall_ratio"])
    assert grown[1]["efficiency"] == pytest.approx(1 / grown[1]["wall_ratio"])
    # On all ranks both are one measurement.
    assert same[-1]["value"] == grown[-1]["value"]


def test_every_number_of_ranks_that_divides_the_world_is_measured():
    assert scaling._divisors(8) == [1, 2, 4, 8]
    assert scaling._divisors(6) == [1, 2, 3, 6]
    assert scaling._variant(1, 48) == "1 rank, 48 each"

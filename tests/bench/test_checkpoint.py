"""The form of the answer; how fast something is says `labpkg bench` itself."""

from labpkg.bench import checkpoint


def test_quick_rows_of_checkpoint():
    rows = checkpoint.rows(quick=True)
    files, stalls = rows[:5], rows[5:]
    names = ["labpkg:save", "labpkg:load", "torch:save", "torch:load"]
    assert [row["variant"] for row in files] == [checkpoint.BASE, *names]
    assert [row["variant"] for row in stalls] == [
        checkpoint.STEP,
        "labpkg:asynchronous save",
    ]
    for table in (files, stalls):
        assert len({row["config"] for row in table}) == 1
        assert (table[0]["wall_ratio"], table[0]["cpu_ratio"]) == (1.0, 1.0)
    assert all(min(row["wall_ratio"], row["cpu_ratio"]) > 0 for row in rows)
    assert all(row["unit"] == "ms" and row["value"] > 0 for row in rows)
    assert all(row["gb_per_s"] > 0 for row in files)
    assert all(row["gb_per_s"] is None for row in stalls)

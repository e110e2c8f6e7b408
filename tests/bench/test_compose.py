"""Composed engines against torch's: the form of the answer, and the memory."""

from functools import partial

import pytest

import labpkg as lab
from labpkg.bench import compose, memory, steps

COLUMNS = {"config", "variant", "wall_ratio", "cpu_ratio", "samples", "value", "unit"}


def test_quick_rows():
    rows = compose.rows(quick=True)
    bases = [compose.BASE_TENSOR, compose.BASE_PIPELINE]
    assert [row["variant"] for row in rows] == [bases[0], "labpkg", bases[1], "labpkg"]
    for base, ours in zip(rows[::2], rows[1::2], strict=True):
        assert set(base) == set(ours) == COLUMNS | {"peak_bytes", "predicted_bytes"}
        assert base["config"] == ours["config"]
        assert (base["wall_ratio"], base["cpu_ratio"]) == (1.0, 1.0)
        assert min(ours["wall_ratio"], ours["cpu_ratio"], ours["value"]) > 0
        assert base["predicted_bytes"] is None
        # In a model this small messages and single tensors weigh more than elsewhere.
        assert ours["peak_bytes"] == pytest.approx(ours["predicted_bytes"], rel=0.12)


def peak(config, layout):
    mesh = lab.make_mesh(pp=layout.pp, dp=layout.dp, tp=layout.tp)
    batch = compose._batch(config, mesh)
    return memory.peak_bytes(partial(compose._ours, config, layout, mesh, *batch))


@pytest.mark.soak
@pytest.mark.parametrize("layout", [compose.TENSOR, compose.PIPELINE], ids=str)
def test_memory_is_as_predicted(world4, layout):
    predicted = compose.predicted_bytes(steps.LARGE, layout)
    measured = world4.run(peak, steps.LARGE, layout)[0]
    assert measured == pytest.approx(predicted, rel=0.05)

"""Scores say what they promise, also of tables without anything to score."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labpkg.planning.scoring import (
    log_error,
    quantile,
    rank_correlation,
    score_tables,
)
from labpkg.planning.tables import Table

JOB = (
    *("layers", "width", "heads", "vocab", "seq", "nodes", "gpus_per_node"),
    *("grad_acc", "mbs"),
)
SIZES = ("2048", "32", "131072", "4096", "1", "8", "16")
numbers = st.lists(st.integers(-9, 9).map(float), min_size=1, max_size=12)


def score(rows, *, layers=None, fits=True, memories=None, batches=None):
    """Score rows of (predicted speed, fits, measured speed), memory 10 x speed."""
    layers = layers or ["16"] * len(rows)
    batches = batches or ["2"] * len(rows)
    memories = memories or [10 * p if p != "" else p for p, *_ in rows]
    cells = [
        (layer, *SIZES, mbs, str(p), str(memory), str(f))
        for layer, mbs, memory, (p, f, _) in zip(
            layers, batches, memories, rows, strict=True
        )
    ]
    names = ("tok_s_gpu", "mem_gib", "fits" if fits else "other")
    predicted = Table(name="P", columns=(*JOB, *names), rows=cells)
    found = [(str(m), str(10 * m if m != "" else m)) for *_, m in rows]
    return score_tables(
        predicted, Table(name="M", columns=("tok_s_gpu", "mem_gib"), rows=found)
    )


def test_errors_are_alike_in_both_directions():
    assert log_error(2, 1) == log_error(1, 2) == 1
    assert log_error(3, 3) == 0
    p, m = 3.7, 1.9
    assert log_error(p, m) == pytest.approx(math.exp(abs(math.log(p / m))) - 1)


@given(numbers, st.floats(0, 1))
def test_quantiles_are_those_of_numpy(values, share):
    assert quantile(values, share) == pytest.approx(np.quantile(values, share))


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1], -0.1), ([1], 1.1)])
def test_an_impossible_quantile_is_refused(values, share):
    with pytest.raises(ValueError, match="give a value and 0 to 1"):
        quantile(values, share)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_rank_correlation_is_that_of_mean_ranks(pairs):
    x, y = [p[0] for p in pairs], [p[1] for p in pairs]
    found = rank_correlation(x, y)
    if len(set(x)) < 2 or len(set(y)) < 2:
        assert found is None
        return
    # Pearson's correlation of (number smaller + number not larger) / 2.
    ranks = [
        [(sum(v < w for v in z) + sum(v <= w for v in z)) / 2 for w in z]
        for z in (x, y)
    ]
    assert found == pytest.approx(np.corrcoef(ranks)[0, 1])


def test_a_score_by_hand():
    found = score([(10, 1, 20), (30, 1, 15), (40, 1, 40), (50, 0, ""), (8, 0, 10)])
    assert found.rows == 5
    # Errors 1, 1, 0, 0.25: speeds and memories have the same ratios.
    for errors in (found.speed, found.memory):
        assert errors.rows == 4
        assert (errors.median, errors.p75, errors.p90) == pytest.approx((0.625, 1, 1))
        assert errors.ratio == pytest.approx(0.9)
        assert errors.relative == pytest.approx(0.35)
    # Ranks 2 3 4 1 and 3 2 4 1.
    assert found.rank_correlation == pytest.approx(0.8)
    assert found.regret == found.regret_of_ran == 0
    verdicts = found.verdicts
    assert (verdicts.true_positives, verdicts.false_positives) == (1, 1)
    assert (verdicts.false_negatives, verdicts.true_negatives) == (0, 3)
    assert (verdicts.precision, verdicts.recall) == (0.5, 1)
    assert verdicts.f1 == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("rows", "regret", "of_ran"),
    [
        # The best prediction is the best, or reaches 3/4 of it.
        ([(9, 1, 40), (8, 1, 30)], 0, 0),
        ([(8, 1, 40), (9, 1, 30)], 0.25, 0.25),
        # It was rightly thought not to fit; wrongly; wrongly thought to fit.
        ([(9, 0, ""), (8, 1, 30), (7, 1, 40)], 0.25, 0.25),
        ([(9, 0, 40), (8, 1, 30)], 0.25, 0),
        ([(9, 1, ""), (8, 1, 30)], 1, 0),
        # Nothing was thought to fit.
        ([(9, 0, 40), (8, 0, 30)], 1, 0),
        # The same job was tried more than once: it ran if it ran in one row.
        ([(9, 1, ""), (9, 1, 40), (8, 1, 30)], 0, 0),
        ([(9, 1, ""), (9, 1, 20), (9, 1, 40), (8, 1, 40)], 0.25, 0.25),
        # The best was not predicted at all.
        ([("", "", 40), (8, 1, 30)], 0.25, 0.25),
        # Nothing ran, or there was no choice.
        ([(9, 1, ""), (8, 0, "")], None, None),
        ([(9, 1, 40)], None, None),
    ],
)
def test_regret_is_what_the_best_prediction_loses(rows, regret, of_ran):
    found = score(rows)
    assert (found.regret, found.regret_of_ran) == (regret, of_ran)


def test_of_equal_predictions_the_smaller_one_is_taken():
    rows = [(9, 1, 20), (9, 1, 40), (9, 1, ""), (8, 1, 10)]
    batches = ["1", "2", "3", "4"]
    assert score(rows, memories=[70, 60, 70, 1], batches=batches).regret == 0
    assert score(rows, memories=[60, 70, 70, 1], batches=batches).regret == 0.5
    assert score(rows, memories=[60, 60, 70, 1], batches=batches).regret == 0.25


def test_without_verdicts_the_choice_is_among_all():
    found = score([(9, 0, 40), (8, 0, 30)], fits=False)
    assert found.regret == 0
    assert found.verdicts.f1 is None
    assert found.notes[-1] == "P has no column fits, so none is scored"


def test_cells_are_scored_apart():
    rows = [(1, 1, 10), (2, 1, 20), (3, 1, 30), (3, 1, 1), (2, 1, 2), (1, 1, 3)]
    found = score(rows, layers=["16"] * 3 + ["32"] * 3)
    assert [cell.rank_correlation for cell in found.cells] == [1, -1]
    assert [cell.regret for cell in found.cells] == [0, pytest.approx(2 / 3)]
    assert [cell.model for cell in found.cells] == [
        *("L16 D2048 T4096", "L32 D2048 T4096")
    ]
    assert [(cell.rows, cell.ran) for cell in found.cells] == [(3, 3), (3, 3)]
    assert found.rank_correlation == 0
    assert found.regret == pytest.approx(1 / 3)


def test_one_row_in_each_cell_ranks_nothing():
    found = score([(1, 1, 10), (2, 1, 20)], layers=["16", "32"])
    assert found.rank_correlation is None
    assert found.regret is None
    assert found.speed.rows == 2


def test_nothing_measured_scores_only_verdicts():
    found = score([(1, 1, ""), (2, 0, "")])
    assert found.speed is None
    assert found.memory is None
    assert found.rank_correlation is None
    assert found.verdicts.recall == 0.5
    assert found.verdicts.precision == 1


def test_nothing_predicted_scores_nothing():
    found = score([("", "", 10), ("", "", "")])
    assert found.speed is None
    assert found.cells == ()
    assert found.verdicts.precision is None
    assert found.notes[-1] == "2 rows without a prediction: row 1; row 2"


def test_a_job_of_which_only_memory_was_measured_ran():
    job = ("16", *SIZES, "2")
    rows = [
        *((*job, "8", "70", "1"), (*job, "9", "70", "0")),
        *((*job, "9", "70", "1"), (*job, "7", "70", "1"), (*job, "6", "70", "1")),
    ]
    names = (*JOB, "tok_s_gpu", "mem_gib", "fits")
    found = score_tables(
        Table(name="P", columns=names, rows=rows),
        Table(
            name="M",
            columns=("tok_s_gpu", "mem_gib"),
            rows=[("9", ""), ("", "70"), ("", "70"), ("no number", ""), ("", "")],
        ),
    )
    assert found.rows == 5
    assert (found.cells[0].rows, found.cells[0].ran) == (4, 3)
    assert (found.regret, found.regret_of_ran) == (0, 0)  # of those with a speed
    verdicts = found.verdicts
    assert (verdicts.false_positives, verdicts.false_negatives) == (1, 1)
    assert (verdicts.true_positives, verdicts.true_negatives) == (0, 2)


def test_memory_alone_has_no_regret():
    job = ("16", *SIZES)
    rows = [(*job, "2", "8", "70"), (*job, "3", "9", "70")]
    forecast = Table(name="P", columns=(*JOB, "tok_s_gpu", "mem_gib"), rows=rows)
    found = score_tables(
        forecast, Table(name="M", columns=("mem_gib",), rows=[("70",), ("60",)])
    )
    assert (found.regret, found.regret_of_ran) == (None, None)
    assert found.memory.rows == 2


def test_no_rows_score_nothing():
    found = score([])
    assert found.rows == 0
    assert found.speed is None

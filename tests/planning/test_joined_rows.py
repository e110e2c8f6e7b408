"""Rows belong together or are refused; a job without measurements did not fit."""

import pytest

from labpkg.planning.job_columns import JOB_COLUMNS
from labpkg.planning.joined_rows import join_tables
from labpkg.planning.tables import Table

JOB = ("layers", "width", "heads", "vocab", "seq", "nodes", "gpus_per_node")
SIZES = ("16", "2048", "32", "131072", "4096", "1", "8")
REQUIRED = (*JOB, "mbs", "grad_acc")
VALUES = (*SIZES, "2", "16")
OUTPUT = ("tok_s_gpu", "mem_gib", "fits")


def predicted(*rows, columns=OUTPUT, jobs=REQUIRED, values=VALUES, **more):
    return Table(
        name="PRED.csv",
        columns=(*jobs, *columns),
        rows=[(*values, *row) for row in rows],
        **more,
    )


def measured(*rows, columns=("tok_s_gpu", "mem_gib"), **more):
    return Table(name="MEASURED.csv", columns=columns, rows=list(rows), **more)


def test_rows_are_joined_in_order():
    forecast = predicted(("10", "70", "1"), ("20", "90", "0"), ("", "", ""))
    rows, notes = join_tables(forecast, measured(("11", "71"), (" ", ""), ("5", "")))
    assert [row.speeds for row in rows] == [(10, 11), (20, None), (None, 5)]
    assert [row.memories for row in rows] == [(70, 71), (90, None), (None, None)]
    assert [row.fits for row in rows] == [True, False, None]
    assert [row.ran for row in rows] == [True, False, True]
    assert {(row.model, row.nodes) for row in rows} == {("L16 D2048 T4096", "1")}
    assert notes == [
        "MEASURED.csv has no column of a job; rows were joined by order alone",
        "1 job ran in one row and did not fit in another with equal columns",
        "1 row without a prediction: row 3",
    ]


def test_predictions_are_the_columns_that_were_added_last():
    # The table of jobs had measurements and somebody else's prediction of memory.
    names = ("tok_s_gpu", "pred_mem_gib", "pred_tok_s_gpu", "mem_gib", "fits")
    forecast = predicted(("11", "999", "10", "70", "True"), columns=names)
    rows, _ = join_tables(forecast, forecast)
    assert rows[0].speeds == (10, 11)
    assert rows[0].memories == (70, 70)


def test_one_measured_column_is_enough():
    forecast = predicted(("10", "70", "1"), ("10", "70", "1"))
    rows, notes = join_tables(forecast, measured(("60",), ("",), columns=("mem_gib",)))
    assert [row.ran for row in rows] == [True, False]
    assert "MEASURED.csv has no column tok_s_gpu, so none is scored" in notes
    speeds = measured(("9", "64.5"), ("", ""), columns=("tok_s_gpu", "mem_GB"))
    rows, notes = join_tables(forecast, speeds)
    assert [row.ran for row in rows] == [True, False]
    assert any("mem_GB is not read: mem_gib is in GiB, 0.9313 x GB" in n for n in notes)
    both = measured(("64.5", "60"), ("", ""), columns=("mem_GB", "mem_gib"))
    assert not any("mem_GB" in note for note in join_tables(forecast, both)[1])


def test_a_row_with_one_prediction_is_not_without():
    forecast = predicted(("", "70", "1"), *[("", "", "")] * 3)
    _, notes = join_tables(forecast, measured(*[("9", "60")] * 4))
    assert notes[-1] == "3 rows without a prediction: row 2; row 3; row 4"


def test_columns_of_a_job_say_the_same_in_other_words():
    names = ("layers", "kv_heads", "sp", "recompute", "hardware", "ffn", "tok_s_gpu")
    same = [
        ("16.0", "32", "0", "None", "h100", "8192", "1"),
        ("1.6e1", "", "false", "", "", "", "1"),
    ]
    forecast = predicted(("10", "70", "1"), ("10", "70", "1"))
    rows, _ = join_tables(forecast, measured(*same, columns=names))
    assert len(rows) == 2
    assert len({row.job for row in rows}) == 1
    forecast = predicted(
        ("10", "1", "1"), jobs=(*REQUIRED, "kv_heads"), values=(*VALUES, "32")
    )
    found = measured(("", "1"), columns=("kv_heads", "mem_gib"))
    rows, _ = join_tables(forecast, found)  # blank is as many as heads: 32
    assert [row.memories[1] for row in rows] == [1.0]


def test_a_job_that_ran_and_did_not_is_noted():
    forecast = predicted(*[("10", "70", "1")] * 3)
    _, notes = join_tables(forecast, measured(("9", ""), ("", ""), ("", "")))
    assert notes[1].startswith("1 job ran in one row and did not fit in another")
    assert len(join_tables(forecast, measured(*[("9", "60")] * 3))[1]) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers", "17"),
        ("layers", ""),
        ("layers", "x"),
        ("kv_heads", "8"),
        ("ffn", "1024"),
        ("sp", "1"),
        ("recompute", "full"),
        ("tp", "2"),
    ],
)
def test_another_job_is_refused(name, value):
    forecast = predicted(("10", "70", "1"), ("10", "70", "1"))
    like = dict(zip(REQUIRED, VALUES, strict=True)).get(name, "")
    other = measured((like, "1"), (value, "1"), columns=(name, "tok_s_gpu"))
    with pytest.raises(ValueError) as refused:
        join_tables(forecast, other)
    assert f"row 2, column {name}: '{like}' in PRED.csv, '{value}' in" in str(
        refused.value
    )
    assert "(1 of 2 rows differ)" in str(refused.value)


def test_two_machines_differ_and_one_without_name_does_not():
    forecast = predicted(
        ("10", "1", "1"), jobs=(*REQUIRED, "hardware"), values=(*VALUES, "H100")
    )
    names = ("hardware", "tok_s_gpu")
    assert join_tables(forecast, measured(("h100", "1"), columns=names))[0]
    assert join_tables(forecast, measured(("", "1"), columns=names))[0]
    with pytest.raises(ValueError, match="column hardware: 'H100' in"):
        join_tables(forecast, measured(("a100", "1"), columns=names))


@pytest.mark.parametrize("value", ["0", "-3", "OOM", "1e999", "1,5"])
def test_a_row_that_is_no_measurement_is_left_out(value):
    forecast = predicted(*[("10", "70", "1")] * 3)
    rows, notes = join_tables(
        forecast, measured(("9", "60"), (value, "60"), ("8", "60"))
    )
    assert [row.speeds[1] for row in rows] == [9, 8]
    assert notes[-1].startswith("1 row left out: row 2 of MEASURED.csv, column tok_s_g")


def test_not_a_number_is_a_blank():
    forecast = predicted(("10", "70", "1"))
    (row,), _ = join_tables(forecast, measured(("nan", "NaN")))
    assert not row.ran


def test_semicolons_come_with_decimal_commas():
    forecast = predicted(("10,5", "70", "1"), delimiter=";")
    (row,), _ = join_tables(forecast, measured(("9,25", "60.5"), delimiter=";"))
    assert row.speeds == (10.5, 9.25)
    assert row.memories == (70, 60.5)


def test_a_row_of_the_wrong_length_is_left_out_of_the_score():
    forecast = predicted(*[("10", "70", "1")] * 5)
    broken = measured(*[("9", "60")] * 5, problems=dict.fromkeys(range(4), "is short"))
    rows, notes = join_tables(forecast, broken)
    assert len(rows) == 1
    job = measured(("8", "9"), columns=("kv_heads", "mem_gib"), problems={0: "is odd"})
    assert join_tables(predicted(("10", "70", "1")), job)[0] == []
    assert notes[-1] == (
        "4 rows left out: row 1 of MEASURED.csv is short; row 2 of MEASURED.csv is "
        "short; row 3 of MEASURED.csv is short and 1 more"
    )


def test_cells_are_models_on_nodes_of_one_kind():
    jobs = (*REQUIRED, "model", "kv_heads", "dp", "hardware")
    rows = [
        (*VALUES, "a", "", "8", "h100", "10"),
        (*VALUES, "a", "32", "4", "H100", "10"),
        (*VALUES, "a", "8", "4", "h100", "10"),
        (*VALUES, "a", "", "4", "a100", "10"),
        (*VALUES[:5], "2.0", *VALUES[6:], "a", "", "4", "a100", "10"),
        (*VALUES[:6], "4", *VALUES[7:], "a", "", "4", "a100", "10"),
        ("bad", *VALUES[1:], "a", "", "4", "a100", "10"),
        ("worse", *VALUES[1:], "a", "", "4", "a100", "10"),
    ]
    forecast = Table(name="P", columns=(*jobs, "tok_s_gpu"), rows=rows)
    joined, _ = join_tables(forecast, measured(*[("9", "60")] * 8))
    assert joined[0].cell == joined[1].cell
    assert len({row.cell for row in joined}) == 7
    assert {row.model for row in joined} == {"a"}


@pytest.mark.parametrize(
    ("forecast", "found", "says"),
    [
        (predicted(("1", "1", "1")), measured(), "PRED.csv has 1 rows, but MEASURED.c"),
        (predicted(), measured(columns=("a",)), "MEASURED.csv has neither tok_s_gpu"),
        (predicted(columns=("fits",)), measured(), "PRED.csv has neither tok_s_gpu"),
        (predicted(jobs=JOB, values=SIZES), measured(), "no column mbs, grad_acc"),
        (
            predicted(jobs=(*REQUIRED, "dp", "dp"), values=(*VALUES, "8", "1")),
            measured(columns=("mem_gib",)),
            "PRED.csv has more than one column dp; keep",
        ),
        (predicted(), measured(columns=("mem_gib",) * 2), "more than one column mem_g"),
        (predicted(), measured(columns=("dp", "dp", "mem_gib")), "one column dp; keep"),
    ],
)
def test_tables_that_cannot_be_compared_are_refused(forecast, found, says):
    with pytest.raises(ValueError, match=says):
        join_tables(forecast, found)


def test_every_column_of_a_job_is_compared():
    blank = dict.fromkeys(JOB_COLUMNS, "")
    cells = {**blank, **dict(zip(REQUIRED, VALUES, strict=True)), "hardware": "h100"}
    jobs, values = tuple(cells), tuple(cells.values())
    for place, name in enumerate(jobs):
        other = list(values)
        other[place] = "3"
        with pytest.raises(ValueError, match=f"row 1, column {name}: "):
            join_tables(
                predicted(("1", "1", "1"), jobs=jobs, values=values),
                measured((*other, "9"), columns=(*jobs, "tok_s_gpu")),
            )

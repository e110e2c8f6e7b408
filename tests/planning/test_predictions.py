"""Predicted columns stand after all others; a bad row costs nobody else's answer."""

import math
import time

import pytest

from labpkg.planning.estimates import estimate
from labpkg.planning.hardware import find_hardware, hardware_json
from labpkg.planning.job_columns import make_configuration, read_job
from labpkg.planning.predictions import PREDICTED_COLUMNS, predict_table
from labpkg.planning.tables import Table

H100 = find_hardware("h100")
COLUMNS = (
    *("layers", "width", "heads", "vocab", "seq", "nodes", "gpus_per_node"),
    *("mbs", "grad_acc", "dp"),
)
ROW = ("16", "2048", "32", "131072", "4096", "1", "8", "2", "16", "8")


def table(*rows, columns=COLUMNS, **more):
    return Table(name="t.csv", columns=columns, rows=list(rows), **more)


def answers(predicted):
    return [
        dict(zip(PREDICTED_COLUMNS, row[-len(PREDICTED_COLUMNS) :], strict=True))
        for row in predicted.rows
    ]


def test_a_row_gets_the_estimate_of_its_job():
    predicted = predict_table(table(ROW), H100)
    assert predicted.columns == COLUMNS + PREDICTED_COLUMNS
    assert predicted.rows[0][: len(ROW)] == ROW
    job = make_configuration(read_job(dict(zip(COLUMNS, ROW, strict=True))))
    expected = estimate(job, H100)
    (answer,) = answers(predicted)
    assert float(answer["step_s"]) == pytest.approx(expected.step_s, rel=1e-5)
    assert float(answer["mem_gib"]) == pytest.approx(
        expected.memory_bytes / 2**30, rel=1e-5
    )
    assert float(answer["mfu_pct"]) == pytest.approx(100 * expected.mfu, rel=1e-5)
    assert (answer["fits"], answer["error"]) == (str(int(expected.fits)), "")
    # One step trains dp x mbs x grad_acc sequences on eight GPUs.
    tokens = 8 * 2 * 16 * 4096
    assert float(answer["tok_s_gpu"]) == pytest.approx(
        tokens / 8 / expected.step_s, rel=1e-5
    )


def test_a_job_that_does_not_fit_has_all_its_numbers():
    large = ("80", "8192", "64", "131072", "4096", "1", "8", "2", "16", "8")
    (answer,) = answers(predict_table(table(large), H100))
    assert answer["fits"] == "0"
    assert float(answer["mem_gib"]) > H100.memory_bytes / 2**30
    assert float(answer["tok_s_gpu"]) > 0


def test_a_bad_row_has_blanks_and_says_why():
    rows = [
        ROW,
        (*ROW[:7], "-2", *ROW[8:]),
        (*ROW[:9], "4"),
        ("",) * len(ROW),
        ROW,
    ]
    first, negative, product, blank, last = answers(predict_table(table(*rows), H100))
    assert first == last
    assert first["error"] == ""
    assert negative["error"].startswith("row 2: column mbs: -2 is below 1")
    assert product["error"].startswith("row 3: dp=4 x tp=1 x pp=1 x cp=1 = 4 ranks")
    assert blank["error"].startswith("row 4: column layers, width, heads, vocab")
    for answer in (negative, product, blank):
        assert [v for k, v in answer.items() if k != "error"] == [""] * 5
        assert "\n" not in answer["error"]


def test_a_row_of_the_wrong_length_is_a_bad_row():
    predicted = predict_table(table(ROW, ROW, problems={1: "has 3 cells"}), H100)
    assert [a["error"] for a in answers(predicted)] == ["", "row 2: has 3 cells"]


def test_names_that_exist_get_a_prefix():
    columns = (*COLUMNS, "tok_s_gpu", "error", "pred_error", "note", "note")
    row = (*ROW, "123", "x", "y", "a", "b")
    predicted = predict_table(table(row, columns=columns), H100)
    assert predicted.columns == (
        *columns,
        *("pred_tok_s_gpu", "step_s", "mem_gib", "fits", "mfu_pct", "pred_pred_error"),
    )
    assert predicted.rows[0][: len(row)] == row


def test_a_row_may_name_its_hardware(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(hardware_json(H100))
    names = ["", "H100", "a100-80gb", str(path), "h1000", "no.json"]
    rows = [(*ROW, name) for name in names]
    mine = answers(predict_table(table(*rows, columns=(*COLUMNS, "hardware")), H100))
    assert mine[0] == mine[1] == mine[3]
    assert float(mine[2]["tok_s_gpu"]) < float(mine[0]["tok_s_gpu"])
    assert mine[4]["error"].startswith("row 5: column hardware: hardware 'h1000' is")
    assert "h100" in mine[4]["error"].split("choose")[1]
    assert mine[5]["error"].startswith("row 6: column hardware: ")
    alone = answers(predict_table(table(*rows, columns=(*COLUMNS, "hardware"))))
    assert alone[1] == mine[1]
    assert alone[0]["error"].startswith("row 1: column hardware: is blank, and none")


def test_a_table_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="no column hardware and none is given"):
        predict_table(table(ROW))
    with pytest.raises(ValueError, match=r"t.csv has no column layers; required"):
        predict_table(table(columns=COLUMNS[1:]), H100)
    with pytest.raises(ValueError, match="more than one column layers"):
        predict_table(table(columns=(*COLUMNS, "layers")), H100)


def test_a_table_without_rows_stays_one():
    predicted = predict_table(table(header=tuple(f" {c}" for c in COLUMNS)), H100)
    assert predicted.rows == []
    assert predicted.header == (*(f" {c}" for c in COLUMNS), *PREDICTED_COLUMNS)


def test_a_defect_costs_only_its_row():
    def predict(job, hardware):
        if job.micro_batch_size == 3:
            raise RuntimeError("planted\ndefect")
        return estimate(job, hardware)

    rows = ROW, (*ROW[:7], "3", *ROW[8:])
    good, bad = answers(predict_table(table(*rows), H100, predict=predict))
    assert good["error"] == ""
    assert "by a defect of labpkg: RuntimeError: planted defect" in bad["error"]
    assert bad["tok_s_gpu"] == ""


@pytest.mark.parametrize("value", [math.inf, 0.0])
def test_a_prediction_is_finite_or_an_error(value):
    class Endless:
        step_s = tokens_per_s_per_gpu = mfu = memory_bytes = value
        fits = False

    (answer,) = answers(predict_table(table(ROW), H100, predict=lambda *_: Endless()))
    assert "give no finite prediction" in answer["error"]


def test_a_long_table_takes_seconds():
    # Equal jobs are computed once; different ones cost the estimate and little more.
    computed = []

    def predict(job, hardware):
        computed.append(job)
        return estimate(job, hardware)

    rows = [(*ROW[:8], str(1 + i % 500), ROW[9], str(i)) for i in range(20_000)]
    long = table(*rows, columns=(*COLUMNS, "id"))
    start = time.process_time()
    predicted = predict_table(long, H100, predict=predict)
    assert time.process_time() - start < 10
    assert len(computed) == 500
    assert [row[len(ROW)] for row in predicted.rows[:3]] == ["0", "1", "2"]
    assert len({row[-5] for row in predicted.rows}) == 500  # step_s

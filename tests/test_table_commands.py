"""`labpkg predict` and `labpkg score`, from files to files."""

import csv
import json
import subprocess
import sys

import pytest

from labpkg.__main__ import main

HEADER = "id,layers,width,heads,vocab,seq,nodes,gpus_per_node,mbs,grad_acc,dp,tp\n"
ROWS = (
    '"a, b",16,2048,32,131072,4096,1,8,2,16,8,1\n',
    "c,16,2048,32,131072,4096,1,8,2,16,4,1\n",
    "d,16,2048,32,131072,4096,1,8,2,16,1,8\n",
    "e,80,8192,64,131072,4096,1,8,2,16,8,1\n",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.csv").write_text(HEADER + "".join(ROWS))
    return tmp_path


def call(*arguments):
    return main([str(a) for a in arguments])


def predict(*more):
    return call("predict", "jobs.csv", "--hardware", "h100", "--out", "p.csv", *more)


def test_predict_adds_columns_and_names_bad_rows(folder, capsys):
    assert predict() == 0
    printed = capsys.readouterr()
    assert printed.out == "p.csv: 4 rows, 2 fit, 1 do not, 1 without a prediction\n"
    assert printed.err.startswith("note: row 2: dp=4 x tp=1")
    before = list(csv.reader((folder / "jobs.csv").open()))
    after = list(csv.reader((folder / "p.csv").open()))
    assert [row[: len(before[0])] for row in after] == before
    added = ["tok_s_gpu", "step_s", "mem_gib", "fits", "mfu_pct", "error"]
    assert after[0][len(before[0]) :] == added
    assert [row[-3] for row in after[1:]] == ["1", "", "1", "0"]


def test_predict_prints_json(folder, capsys):
    assert predict("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["out"] == "p.csv"
    assert (found["rows"], found["fit"], found["do_not_fit"]) == (4, 2, 1)
    assert len(found["errors"]) == 1
    assert found["columns"][0] == "tok_s_gpu"


def test_many_bad_rows_are_summed_up(folder, capsys):
    (folder / "jobs.csv").write_text(HEADER + ROWS[1] * 8)
    assert predict() == 0
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 6
    assert notes[-1] == "note: 3 more rows say in p.csv why"


def test_an_almost_right_column_is_noted_by_predict(folder, capsys):
    header = HEADER.replace("id,", "Zero,")
    (folder / "jobs.csv").write_text(header + ROWS[0])
    assert predict() == 0
    assert "did you mean 'zero'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["predict", "no.csv", "--out", "p.csv"], "No such file"),
        (["predict", "jobs.csv", "--out", "p.csv"], "no column hardware and none is"),
        (
            ["predict", "jobs.csv", "--hardware", "h1000", "--out", "p.csv"],
            "hardware 'h1000' is unknown; choose one of h100",
        ),
        (
            ["predict", "jobs.csv", "--hardware", "h100", "--out", "jobs.csv"],
            "--out jobs.csv is the table itself",
        ),
        (
            ["predict", "jobs.csv", "--hardware", "h100", "--out", "no/p.csv"],
            "there is no folder no for --out no/p.csv",
        ),
        (["score", "jobs.csv", "jobs.csv"], "has neither tok_s_gpu nor mem_gib"),
    ],
)
def test_bad_input_is_one_line_and_leaves_files_alone(folder, capsys, arguments, says):
    assert call(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith(f"labpkg {arguments[0]}: ")
    assert says in printed.err
    assert [path.name for path in folder.iterdir()] == ["jobs.csv"]
    assert (folder / "jobs.csv").read_text() == HEADER + "".join(ROWS)


def test_predictions_are_scored(folder, capsys):
    predict()
    capsys.readouterr()
    (folder / "m.csv").write_text(
        "tp,tok_s_gpu,mem_gib\n1,50000,30.5\n1,,\n8,20000,\n1,,\n"
    )
    assert call("score", "p.csv", "m.csv") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("4 rows, 2 cells (model, nodes)\ntok_s_gpu  ")
    assert "of 2 rows; predicted / measured" in printed.out
    assert "does not fit      precision 1.00, recall 1.00, F1 1.00" in printed.out
    assert printed.out.splitlines()[-1].startswith("L80 D8192 T4096      1      1")
    assert printed.err == "note: 1 row without a prediction: row 2\n"
    assert call("score", "p.csv", "m.csv", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tok_s_gpu"]["rows"] == 2
    assert found["mem_gib"]["rows"] == 1
    assert found["does_not_fit"]["f1"] == 1
    assert found["does_not_fit"]["true_positives"] == 1
    assert found["rank_correlation"] is None
    assert [cell["ran"] for cell in found["cells"]] == [2, 0]


def test_a_table_with_measurements_is_its_own_reference(folder, capsys):
    text = "tok_s_gpu,mem_gib,fits," + HEADER + "".join(f"50000,30,x,{r}" for r in ROWS)
    (folder / "jobs.csv").write_text(text)
    predict()
    capsys.readouterr()
    for reference in ("jobs.csv", "p.csv"):
        assert call("score", "p.csv", reference, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["tok_s_gpu"]["rows"] == 3
        assert found["tok_s_gpu"]["median"] > 0
        assert found["does_not_fit"]["false_positives"] == 1


def test_shuffled_measurements_are_refused(folder, capsys):
    predict()
    lines = [HEADER.strip() + ",tok_s_gpu", *(f"{row.strip()},9" for row in ROWS)]
    (folder / "m.csv").write_text("\n".join([lines[0], *lines[:0:-1]]))
    capsys.readouterr()
    assert call("score", "p.csv", "m.csv") == 2
    assert "row 1, column layers: '16' in p.csv, '80' in m.csv (4 of" in (
        capsys.readouterr().err
    )


def test_many_cells_are_left_to_json(folder, capsys):
    rows = [f"x,{n},2048,32,131072,4096,1,8,2,16,8,1\n" for n in range(1, 42)]
    (folder / "jobs.csv").write_text(HEADER + "".join(rows))
    (folder / "m.csv").write_text("tok_s_gpu\n" + "9\n" * len(rows))
    predict()
    assert call("score", "p.csv", "m.csv") == 0
    assert capsys.readouterr().out.endswith("--json lists each of the 41 cells\n")


def test_both_commands_say_what_they_read(capsys):
    for command, words in (
        ("predict", ("kv_heads=heads", "sp=(tp>1)", "GiB = 2^30 bytes")),
        ("score", ("blank if the job did not fit", "1.0737 GB")),
    ):
        with pytest.raises(SystemExit, match="0"):
            call(command, "--help")
        printed = " ".join(capsys.readouterr().out.split())
        assert all(word in printed for word in words)


def test_predicting_in_a_process_needs_no_torch(folder):
    code = (
        "import sys; from labpkg.__main__ import main\n"
        "code = main('predict jobs.csv --hardware h100 --out p.csv'.split())\n"
        "print(code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines()[-1] == "0 False"

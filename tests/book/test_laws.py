"""The page of the laws is what the stored run gives, and the run left nothing out."""

import ast
import json
import subprocess
import sys

import pytest

from scripts.laws import DATA, LAWS, PAGE, ROOT, page, record
from tests.parallelism.engines import ENGINES

STORED = json.loads(DATA.read_text())
REMEDY = "run `make laws` and commit what it writes"


def test_the_page_is_what_the_stored_run_gives():
    assert PAGE.read_text() == page(STORED), REMEDY


def test_every_engine_has_measured_every_law():
    rows = {(row["engine"], row["law"]) for row in STORED["rows"]}
    assert rows == {(engine, law) for engine in ENGINES for law in LAWS}, REMEDY
    assert len(STORED["rows"]) == len(rows)


def test_every_stored_deviation_keeps_the_law():
    for row in STORED["rows"]:
        difference = row["deviation"] - row["tolerance"]
        is_kept = difference > 0 if LAWS[row["law"]].is_lower_bound else difference <= 0
        assert is_kept, row
        assert row["cases"] > 0


def test_every_test_on_the_page_exists():
    names = {test for row in STORED["rows"] for test in row["tests"]}
    for file, _, function in (name.partition("::") for name in names):
        tree = ast.parse((ROOT / file).read_text())
        defined = {f.name for f in tree.body if isinstance(f, ast.FunctionDef)}
        assert function in defined, REMEDY


# ---- the machinery can fail --------------------------------------------------------

PLANTED = """
import pytest

@pytest.mark.parametrize("far", [{values}])
def test_output(law, far):
    law("engine", "output", far, 0.5, case=far)

@pytest.mark.parametrize("far", [3, 2])
def test_off(law, far):
    law("engine", "off", far, 1, case=far)
"""


def measure(folder, values, num_workers):
    """Run planted tests; return the exit code and the JSON file."""
    (folder / "test_planted.py").write_text(PLANTED.format(values=values))
    (folder / "pytest.ini").write_text("[pytest]\n")
    path = folder / "laws.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest"]
    command += [
        "-n",
        str(num_workers),
        "--rootdir",
        str(folder),
        "--laws",
        str(path),
        str(folder),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "passed" in result.stdout, result.stdout + result.stderr
    return result.returncode, path


def test_workers_measure_for_one_file(tmp_path):
    code, path = measure(tmp_path, "0.0, 0.123456, 0.1", num_workers=2)
    assert code == 0
    output, off = json.loads(path.read_text())["rows"]
    assert output == {
        "engine": "engine",
        "law": "output",
        "tests": ["test_planted.py::test_output"],
        "cases": 3,
        "deviation": 0.12,
        "tolerance": 0.5,
    }
    assert (off["deviation"], off["cases"]) == (2, 2)  # the least, for a lower bound


def test_a_broken_law_fails_and_stores_nothing(tmp_path):
    code, path = measure(tmp_path, "0.0, 0.6", num_workers=0)
    assert code == 1
    assert not path.exists()


def test_one_law_has_one_tolerance(tmp_path):
    measured = [("a::b", "engine", "output", 0.0, bound) for bound in (1, 2)]
    with pytest.raises(ValueError, match="a law of its own"):
        record(measured, "2.0", tmp_path / "laws.json")

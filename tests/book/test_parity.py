"""The page of the parity matrix is what the stored run gives, and none is left out."""

import json

import pytest

from labpkg.planning.layout import Layout
from scripts.parity import (
    DATA,
    ENGINES,
    PAGE,
    QUANTITIES,
    SIZES,
    main,
    measured,
    page,
)
from tests.parity import matrix
from tests.parity.matrix_results import Result

STORED = json.loads(DATA.read_text())
REMEDY = "run `make parity` and commit what it writes"
SETTING = matrix.Setting(base=Layout(dp=4), features=matrix.SETS["clipping"])


def test_the_page_is_what_the_stored_run_gives():
    assert PAGE.read_text() == page(STORED), REMEDY


def test_every_setting_has_been_trained():
    names = {features: name for name, features in matrix.SETS.items()}
    wanted = {
        (size, str(setting.base), names[setting.features])
        for size in SIZES
        for setting in matrix.whole(size)
    }
    rows = {(row["ranks"], row["layout"], row["set"]) for row in STORED["rows"]}
    assert rows == wanted, REMEDY
    assert len(STORED["rows"]) == len(wanted)
    engines = {engine for row in STORED["rows"] for engine in row["engines"]}
    assert engines == set(ENGINES)


def test_every_stored_deviation_is_within_its_bound():
    for row in STORED["rows"]:
        if row["refusal"] is None:
            assert row["deviations"].keys() == row["bounds"].keys() == set(QUANTITIES)
        for name, deviation in row["deviations"].items():
            assert deviation <= row["bounds"][name], row
            assert row["bf16"] or row["bounds"][name] == matrix.TOLERANCE


# ---- the machinery can fail --------------------------------------------------------


def result(far):
    deviations = dict.fromkeys(QUANTITIES, 1.23e-15) | {"norm": far}
    return Result(SETTING, None, deviations, dict.fromkeys(QUANTITIES, 1e-12))


def test_a_result_becomes_a_row():
    (row,) = measured([result(2e-15)])
    assert (row["layout"], row["set"], row["ranks"]) == ("dp4", "clipping", 4)
    assert row["engines"] == ["data parallel"]
    assert row["deviations"] == dict.fromkeys(QUANTITIES, 1.2e-15) | {"norm": 2e-15}


def test_a_deviation_above_its_bound_stores_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("scripts.parity.train", lambda: measured([result(1e-3)]))
    monkeypatch.setattr("scripts.parity.DATA", tmp_path / "parity.json")
    assert main([]) == 1
    assert "dp4: clipping: norm is 0.001 off" in capsys.readouterr().err
    assert not (tmp_path / "parity.json").exists()


@pytest.mark.parametrize("arguments", [["--pages"], ["--page", "again"]])
def test_other_arguments_are_refused(arguments, capsys):
    assert main(arguments) == 2
    assert "python -m scripts.parity" in capsys.readouterr().err

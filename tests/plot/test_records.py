"""`plot.recorded` draws a planted record, says when there is none, refuses others."""

import json

import pytest

import labpkg as lab

RECORD = {
    "name": "planted",
    "machine": {"gpus": "2 x Imagined", "cpu": "Abacus"},
    "versions": {"torch": "2.13.0", "labpkg": "0.1.0"},
    "date": "2026-01-02",
    "command": "labpkg bench planted --json",
    "other": "ignored",
    "rows": [
        {"config": "small", "variant": "torch", "wall_ratio": 1.0, "cpu_ratio": 1.0},
        {"config": "small", "variant": "labpkg", "wall_ratio": 0.98, "cpu_ratio": 0.9},
    ],
}


@pytest.fixture
def draw(tmp_path):
    from matplotlib import pyplot as plt

    def plant(record):
        text = record if isinstance(record, str) else json.dumps(record)
        (tmp_path / "recorded_planted.json").write_text(text)
        return lab.plot.recorded("planted", folder=tmp_path)

    yield plant
    plt.close("all")


def test_draws_ratios_with_their_origin_first_row_on_top(draw):
    ax = draw(RECORD)
    assert [bar.get_width() for bar in ax.patches] == [0.98, 1.0]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["small: labpkg", "small: torch"]
    title = ax.get_title(loc="left")
    for part in ("2 x Imagined", "torch 2.13.0", "2026-01-02", RECORD["command"]):
        assert part in title
    assert [line.get_linestyle() for line in ax.lines] == ["--"]  # the base row


def test_draws_values_in_their_unit_where_ratios_are_missing(draw):
    rows = [{"config": "a", "variant": "x", "value": 7, "unit": "tokens/s"}]
    ax = draw({**RECORD, "rows": rows})
    assert ax.patches[0].get_width() == 7
    assert ax.get_xlabel() == "tokens/s"
    assert not ax.lines


def test_draws_on_given_axes(tmp_path):
    from matplotlib.figure import Figure

    (tmp_path / "recorded_planted.json").write_text(json.dumps(RECORD))
    ax = Figure().subplots()
    assert lab.plot.recorded("planted", folder=tmp_path, ax=ax) is ax


def test_says_that_nothing_is_recorded_and_how_to_record(tmp_path, capsys):
    assert lab.plot.recorded("data_parallel", folder=tmp_path) is None
    text = capsys.readouterr().out
    assert "Nothing is recorded" in text
    assert "labpkg bench data_parallel --json" in text
    assert "book/data/recorded_data_parallel.json" in text


def test_the_default_folder_is_that_of_a_notebook(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no folder '\.\./data'"):
        lab.plot.recorded("planted")
    (tmp_path / "data").mkdir()
    (tmp_path / "part").mkdir()
    monkeypatch.chdir(tmp_path / "part")
    assert lab.plot.recorded("planted") is None
    assert "planted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "another"}, "name='planted'"),
        ({"rows": []}, "at least one row"),
        ({"rows": [{"variant": "x", "wall_ratio": 1}]}, "config and variant"),
        ({"rows": [*RECORD["rows"], {"config": "a", "variant": "x"}]}, "wall_ratio"),
        (
            {
                "rows": [
                    {"config": "a", "variant": "x", "value": 1, "unit": unit}
                    for unit in ("s", "bytes")
                ]
            },
            "one unit",
        ),
    ],
)
def test_refuses_a_record_it_cannot_draw(draw, change, message):
    with pytest.raises(ValueError, match=message):
        draw({**RECORD, **change})


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_refuses_another_file(draw, text):
    with pytest.raises(ValueError, match="record it again"):
        draw(text)


@pytest.mark.parametrize("key", ["machine", "versions", "date", "command", "rows"])
def test_names_what_is_missing(draw, key):
    with pytest.raises(ValueError, match=rf"missing: \['{key}'\]"):
        draw({k: v for k, v in RECORD.items() if k != key})

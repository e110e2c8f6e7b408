"""Functions of files are found, and called with what they take, before they run."""

import ast

import pytest

from labpkg.runs.target import find_function, parse_arguments

_FILE = """
raise SystemExit("reading must not run this")
def main(steps, lr=0.1, *, name, out="here"): ...
def free(**options): ...
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(_FILE)
    (tmp_path / "binary.py").write_bytes(b"\0")
    return tmp_path / "job.py"


def test_a_function_is_found_by_reading(job):
    path, function, parameters = find_function("job.py:main")
    assert (path, function) == (str(job.resolve()), "main")
    assert [p.arg for p in parameters.args] == ["steps", "lr"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("job.py:other", "job.py defines no function 'other'; it has: main, free"),
        ("job.py:", "'job.py:' is not FILE.py:FUNCTION"),
        (":main", "':main' is not FILE.py:FUNCTION"),
        ("binary.py:main", "null bytes"),
    ],
)
def test_what_cannot_be_found_is_named(job, target, message):
    with pytest.raises(ValueError, match=message):
        find_function(target)


def _parameters(name):
    nodes = ast.parse(_FILE).body
    return next(
        n.args for n in nodes if isinstance(n, ast.FunctionDef) and n.name == name
    )


def test_values_are_json_or_text():
    given = ["steps=100", "lr=1e-3", "name=a=b", 'out=["x", null]']
    assert parse_arguments(given, _parameters("main")) == {
        "steps": 100,
        "lr": 0.001,
        "name": "a=b",
        "out": ["x", None],
    }
    assert parse_arguments(["any=true"], _parameters("free")) == {"any": True}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["100"], "'100' is not NAME=VALUE; write e.g. steps=100"),
        (["steps=1", "steps=2"], "steps is given twice"),
        (["step=1"], "takes no 'step'; it takes: steps, name, lr, out"),
        (["steps=1"], "needs 'name'; give it as name=VALUE"),
        ([], "needs 'steps'"),
    ],
)
def test_what_the_function_cannot_be_called_with(given, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(given, _parameters("main"))

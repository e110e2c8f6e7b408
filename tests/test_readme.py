"""The commands of README.md exist, and its example runs as it is printed."""

import functools
import re
import shlex
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands() -> list[list[str]]:
    """Return every shell command, without comments."""
    lines = "".join(blocks("bash")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@functools.cache  # the same help is asked for by several commands
def run(*command: str) -> str:
    result = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    )
    return result.stdout


def test_the_first_commands_are_those_of_the_first_hour():
    assert commands()[:2] == [["make", "lab"], ["make", "test"]]


def test_every_make_target_exists():
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", README, re.M))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"lab", "notebook", "serve", "test-gpu", "help"} <= named
    assert named <= targets


def labpkg_calls() -> list[list[str]]:
    """Return the arguments of every call of labpkg, also as a module."""
    calls = []
    for words in commands():
        for marker in ("labpkg", ".venv/bin/labpkg"):
            if marker in words:
                calls.append(words[words.index(marker) + 1 :])
    return calls


@pytest.mark.skipif(
    find_spec("tyro") is None,
    reason="tyro is not installed: no options of `labpkg train` to read",
)
def test_every_command_and_option_of_labpkg_exists():
    calls = labpkg_calls()
    assert len(calls) >= 5
    for name, *arguments in calls:
        assert re.search(
            rf"^  {name} ", run(sys.executable, "-m", "labpkg", "-h"), re.M
        )
        usage = run(sys.executable, "-m", "labpkg", name, "--help")
        for option in (a for a in arguments if a.startswith("--")):
            assert option in usage, f"{name} {option}"


def test_every_file_that_is_linked_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.timeout(180)
def test_the_examples_run_as_they_are_printed(tmp_path):
    train, pipeline, plans = blocks("python")
    script = tmp_path / "example.py"
    script.write_text(
        f"{train}\n{pipeline}\n{plans}\n"
        "print(history[0], history[-1], *(loss.item() for loss in losses))\n"
    )
    printed = map(float, run(sys.executable, str(script)).split()[-4:])
    first, last, loss, same = printed
    assert first > 2.0
    assert last < 0.5
    assert loss == same > 4.0


@pytest.mark.timeout(180)
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("labpkg", "pyproject.toml", "README.md", "LICENSE"):
        run("cp", "-r", name, str(copy))
    run(sys.executable, "-m", "pip", "wheel", *options, str(copy))
    (wheel,) = tmp_path.glob("labpkg-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "labpkg").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    packed = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert packed == wanted
    assert any(name.endswith("licenses/LICENSE") for name in names)

    # In a folder of its own and without site-packages, the package imports.
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import labpkg; print(labpkg.__version__, labpkg.wire_bytes('send', 8, 2))"
    out = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, 'site'); {code}",
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert out.split()[1] in ("8", "8.0")

"""The built book, once for all tests of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """Build a book as `make book` does, into `target`/_build/html."""
    program = Path(sys.executable).with_name("jupyter-book")
    flags = ["-W", "-n", "--keep-going", "--path-output", str(target)]
    command = [str(program), "build", str(source), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=source)


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> Path:
    """Build the book with every warning as an error; return the folder of its pages."""
    target = tmp_path_factory.mktemp("book")
    result = build(ROOT, target)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return target / "_build" / "html"

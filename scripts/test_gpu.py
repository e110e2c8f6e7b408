"""Run the library's tests with the interpreter at hand; install nothing.

    python scripts/test_gpu.py [pytest arguments]

For a machine with GPUs and its own build of PyTorch. A test file that imports a package
which is not there is left out and named with what it misses. Tests that need more GPUs
than there are skip with the reason.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# These need the book's tools and a browser, not a GPU.
NOT_LIBRARY = ("tests/book", "tests/test_lab.py")


def missing_packages(path: Path) -> list[str]:
    """Return the packages that a test file imports and that are not there."""
    wanted = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            wanted |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            wanted.add(node.module.split(".")[0])
    local = {"labpkg", "scripts", *sys.stdlib_module_names}
    return sorted(n for n in wanted - local if importlib.util.find_spec(n) is None)


def main() -> int:
    """Print what is left out and run the rest; return pytest's exit code."""
    if importlib.util.find_spec("pytest") is None:
        sys.exit(f"{sys.executable} has no pytest; install it, or name another PYTHON")
    import torch

    num_gpus = torch.cuda.device_count()
    python = sys.version.split()[0]
    print(f"Python {python}, torch {torch.__version__}, {num_gpus} GPUs")
    ignored = [f"--ignore={name}" for name in NOT_LIBRARY]
    for path in sorted((ROOT / "tests").rglob("*.py")):
        missing = missing_packages(path)
        name = path.relative_to(ROOT)
        if missing and not str(name).startswith(NOT_LIBRARY):
            print(f"left out: {name} needs {', '.join(missing)}")
            ignored.append(f"--ignore={name}")
    options = ["-p", "no:cacheprovider", *ignored]
    if importlib.util.find_spec("pytest_timeout") is None:
        print("without pytest-timeout: no test has a time limit")
        options += ["-W", "ignore::pytest.PytestConfigWarning"]
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
    command = [sys.executable, "-m", "pytest", *options, *sys.argv[1:], "tests"]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())

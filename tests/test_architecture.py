"""The rules of CONTRIBUTING.md that a program can check; and the checks can fail."""

import subprocess
import sys
from pathlib import Path

import pytest

import labpkg
from scripts import code_rules
from scripts.code_rules import Module

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = code_rules.read_package(ROOT / "labpkg")


def tracked_files() -> list[Path]:
    """Return the files that git knows or would add, all files without git."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name]
    skipped = {".venv", "_build", "__pycache__"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not skipped & {*p.parts}]


def planted(path: str, source: str, exports: str = "{}") -> list[Module]:
    """Return a small package with one module that breaks a rule."""
    return [Module("__init__.py", f"_EXPORTS = {exports}"), Module(path, source)]


# ---- the package obeys -------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        code_rules.layer_violations,
        code_rules.dependency_violations,
        code_rules.communication_violations,
        code_rules.state_violations,
        code_rules.size_violations,
        code_rules.name_violations,
        code_rules.docstring_violations,
    ],
    ids=lambda rule: rule.__name__,
)
def test_the_package_obeys(rule):
    assert rule(PACKAGE) == []


def test_every_module_has_a_docstring_and_a_layer():
    for module in PACKAGE:
        assert module.source.lstrip().startswith('"""'), module.path
        assert module.path == "__init__.py" or module.part in code_rules.LAYERS, (
            f"{module.path} belongs to no layer"
        )


def test_no_file_names_a_machine():
    assert code_rules.text_violations(ROOT, tracked_files()) == []


# ---- the import is light -----------------------------------------------------------

IMPORT = """
import sys, time
before = set(sys.modules)
start = time.perf_counter()
import labpkg
seconds = time.perf_counter() - start
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
print(seconds, *sorted(loaded - set(sys.stdlib_module_names)))
"""


def test_the_import_is_fast_and_loads_nothing():
    seconds = []
    for _ in range(5):
        command = [sys.executable, "-c", IMPORT]
        printed = subprocess.run(command, check=True, capture_output=True, text=True)
        time_s, *loaded = printed.stdout.split()
        assert loaded == ["labpkg"]
        seconds.append(float(time_s))
    assert min(seconds) < 0.05


def test_planning_loads_no_torch():
    code = (
        "import sys, importlib, pkgutil, labpkg.planning as p\n"
        "for m in pkgutil.iter_modules(p.__path__, p.__name__ + '.'):\n"
        "    importlib.import_module(m.name)\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.split() == ["False", "False"]


def test_every_public_name_resolves():
    for name in labpkg.__all__:
        assert getattr(labpkg, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        labpkg.no_such_name  # noqa: B018


# ---- the rules can fail ------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("foundations/a.py", "from labpkg.processes import world"),
        ("foundations/a.py", "from ..processes.world import World"),
        ("planning/a.py", "import labpkg.foundations.data"),
        ("processes/a.py", "from labpkg.runs.trainer import Trainer"),
        ("parallelism/a.py", "from labpkg.parallelism.b import B"),
        ("parallelism/a.py", "from .b import B"),
        ("plot/a.py", "from labpkg import check"),
        ("doctor.py", "from labpkg.display import show"),
        ("runs/a.py", "import labpkg"),
        ("misc/a.py", "from labpkg.planning import cost"),
        ("foundations/a.py", "from labpkg import World"),
    ],
)
def test_a_wrong_import_is_found(path, source):
    package = planted(path, source, "{'World': 'processes.world'}")
    assert len(code_rules.layer_violations(package)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runs/a.py", "from labpkg.foundations.data import batches"),
        ("foundations/a.py", "from labpkg.planning.shapes import ModelShape"),
        ("foundations/a.py", "from .losses import cross_entropy"),
        ("parallelism/a.py", "from labpkg.parallelism.clipping import clip"),
        ("__main__.py", "from labpkg.doctor import doctor"),
        ("runs/a.py", "from labpkg import __version__"),
    ],
)
def test_a_right_import_passes(path, source):
    assert code_rules.layer_violations(planted(path, source)) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("planning/a.py", "import torch"),
        ("planning/a.py", "def f():\n    import numpy as np"),
        ("check/a.py", "from matplotlib import pyplot"),
        ("display.py", "import ipywidgets"),
    ],
)
def test_a_wrong_dependency_is_found(path, source):
    assert len(code_rules.dependency_violations(planted(path, source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist\ndist.all_reduce(x)",
        "from torch import distributed as d\nd.barrier()",
        "import torch\ntorch.distributed.all_gather_into_tensor(x, y)",
        "from torch.distributed import broadcast_object_list",
        "from torch.distributed._functional_collectives import all_reduce",
    ],
)
def test_communication_elsewhere_is_found(source):
    package = planted("parallelism/a.py", source)
    assert len(code_rules.communication_violations(package)) == 1
    allowed = planted("processes/collectives.py", source)
    assert code_rules.communication_violations(allowed) == []


def test_harmless_calls_are_no_communication():
    source = (
        "import torch.distributed as dist\nfrom labpkg.processes import collectives\n"
        "dist.get_rank()\ndist.init_process_group()\ncollectives.all_reduce(x)"
    )
    package = planted("parallelism/a.py", source)
    assert code_rules.communication_violations(package) == []


@pytest.mark.parametrize(
    "source", ["cache = {}", "_seen: list = []", "def f():\n    global x\n    x = 1"]
)
def test_module_state_is_found(source):
    assert len(code_rules.state_violations(planted("runs/a.py", source))) == 1


def test_constants_are_no_state():
    source = "_KEYS = ['a']\nTABLE: dict = {}\n__all__ = ['f']"
    assert code_rules.state_violations(planted("runs/a.py", source)) == []


def test_long_modules_and_functions_are_found():
    long_function = "def f():\n" + "    x = 1\n" * 80
    assert len(code_rules.size_violations(planted("runs/a.py", long_function))) == 1
    long_module = "x = 1\n" * 501
    assert len(code_rules.size_violations(planted("runs/a.py", long_module))) == 1
    fitting = "def f():\n" + "    x = 1\n" * 79 + "x = 1\n" * 420
    assert code_rules.size_violations(planted("runs/a.py", fitting)) == []


def test_a_name_that_is_a_module_is_found():
    package = planted("runs/trainer.py", "", "{'trainer': 'runs.trainer'}")
    assert code_rules.name_violations(package) == ["trainer is also a module"]


DOCUMENTED = '''
def f(a, *, b):
    """Do it.

    Args:
        a: The first.
        b: The second.

    Returns:
        A number.

    Raises:
        ValueError: if a is bad.
    """
    if a:
        raise ValueError("bad")
    return b
'''


@pytest.mark.parametrize(
    ("remove", "problem"),
    [
        ("        b: The second.\n", "Args lacks b"),
        ("    Returns:\n        A number.\n\n", "no section Returns"),
        ("    Raises:\n        ValueError: if a is bad.\n", "no section Raises"),
    ],
)
def test_a_missing_docstring_section_is_found(remove, problem):
    exports = "{'f': 'runs.a'}"
    assert (
        code_rules.docstring_violations(planted("runs/a.py", DOCUMENTED, exports)) == []
    )
    assert remove in DOCUMENTED
    broken = planted("runs/a.py", DOCUMENTED.replace(remove, ""), exports)
    (violation,) = code_rules.docstring_violations(broken)
    assert problem in violation


@pytest.mark.parametrize(
    "source",
    [
        "def f(): pass",
        "class f:\n    pass",
        'class f:\n    """Doc."""\n    def g(self): pass',
        'class f:\n    """Doc."""\n    def __init__(self, x): pass',
        '@dataclass\nclass f:\n    """Doc."""\n    x: int',
        "f = 1",
        "f: int = 1",
    ],
)
def test_missing_documentation_is_found(source):
    package = planted("runs/a.py", source, "{'f': 'runs.a'}")
    assert len(code_rules.docstring_violations(package)) == 1


def test_a_machine_path_is_found(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("fine\n/" + "home/alice/x\nhttps://a.org/root/b\n/home/you/x\n")
    (violation,) = code_rules.text_violations(tmp_path, [path])
    assert violation.startswith("a.md:2:")

"""The rules of the library's architecture, read from its source without importing it.

Each function returns the violations that it finds, as `path:line: what is wrong`. The
rules are those of CONTRIBUTING.md: layers, sizes, docstrings, where communication and
drawing may happen. tests/test_architecture.py applies them, and plants violations.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LAYERS = {
    "foundations": 0,
    "planning": 0,
    "processes": 1,
    "parallelism": 2,
    "runs": 3,
    "plot": 4,
    "check": 4,
    "bench": 4,
    "doctor": 4,
    "display": 4,
    "plan_command": 4,
    "table_commands": 4,
    "__main__": 4,
}
"""The layer of each folder or module directly under the package."""

STATE_OWNERS = ("processes/traffic.py",)
COMMUNICATORS = ("processes/collectives.py", "processes/transport.py")
SHARED_ENGINES = ("clipping",)
MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 80
_COMMUNICATION = re.compile(
    r"(all_reduce|reduce|broadcast|all_gather|gather|scatter|reduce_scatter|all_to_all|"
    r"send|recv|isend|irecv|batch_isend_irecv|barrier|monitored_barrier)"
    r"(_coalesced|_into_tensor|_tensor|_single|_object|_object_list)?"
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file of the package."""

    path: str
    """Relative to the package, such as `processes/mesh.py`."""
    source: str

    @property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return ast.parse(self.source)

    @property
    def name(self) -> str:
        """The dotted name inside the package, such as `processes.mesh`."""
        parts = Path(self.path).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def part(self) -> str:
        """The folder or module directly under the package."""
        return self.name.split(".")[0]


def read_package(folder: Path) -> list[Module]:
    """Read every source file below the package's folder."""
    paths = sorted(folder.rglob("*.py"))
    return [Module(str(p.relative_to(folder)), p.read_text()) for p in paths]


# ---- imports -----------------------------------------------------------------------


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """Yield line and dotted target of every import, relative ones resolved."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = module.path.endswith("__init__.py")
                parents = ["labpkg", *filter(None, module.name.split("."))]
                keep = len(parents) - node.level + is_package
                base = ".".join([*parents[:keep], *filter(None, [base])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def exports(package: list[Module]) -> dict[str, str]:
    """Return the table of public names of the package: name -> module."""
    root = next(module for module in package if module.path == "__init__.py")
    for node in root.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(t, ast.Name) and t.id == "_EXPORTS" for t in targets):
            assert isinstance(node, ast.Assign)
            return ast.literal_eval(node.value)
    raise ValueError("labpkg/__init__.py has no table _EXPORTS")


def layer_violations(package: list[Module]) -> list[str]:
    """Find imports that go upwards, sideways between engines or faces, or around."""
    public = exports(package)
    found = []
    for module in package:
        if module.path == "__init__.py":
            continue
        for line, target in imports(module):
            names = target.split(".")
            if names[0] != "labpkg":
                continue
            if len(names) > 1 and names[1] in public:
                names = ["labpkg", *public[names[1]].split(".")]
            reason = _forbidden(module, names[1:])
            if reason:
                found.append(f"{module.path}:{line}: imports {target}: {reason}")
    return found


def _forbidden(module: Module, target: list[str]) -> str | None:
    if target in (["__version__"], []):
        return None if target else "import the module that is needed"
    source, part = module.part, target[0]
    if part not in LAYERS or source not in LAYERS:
        return f"{part if part not in LAYERS else source} belongs to no layer"
    if source == part:
        siblings = len(target) > 1 and target[1] not in SHARED_ENGINES
        own = module.name.split(".")[1:2] == target[1:2]
        if source == "parallelism" and siblings and not own and "." in module.name:
            return "engines do not import each other"
        return None
    if LAYERS[part] > LAYERS[source]:
        return "imports go downwards only"
    if LAYERS[part] == LAYERS[source] == 0 and part != "planning":
        return "planning imports no other folder"
    if LAYERS[part] == LAYERS[source] == 4 and source != "__main__":
        return "only __main__ imports other faces"
    return None


def dependency_violations(package: list[Module]) -> list[str]:
    """Find other libraries in places that must do without them."""
    found = []
    for module in package:
        for line, target in imports(module):
            top = target.split(".")[0]
            place = f"{module.path}:{line}: imports {top}"
            foreign = top not in sys.stdlib_module_names and top != "labpkg"
            if module.part == "planning" and foreign:
                found.append(f"{place}, but planning uses the standard library only")
            if top in ("matplotlib", "ipywidgets") and module.part != "plot":
                found.append(f"{place}, which belongs to plot/")
    return found


def communication_violations(package: list[Module]) -> list[str]:
    """Find calls of torch.distributed that move data outside the two modules for it."""
    found = []
    for module in package:
        if module.path in COMMUNICATORS:
            continue
        aliases = {"torch.distributed"}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name == "torch.distributed" and alias.asname:
                        aliases.add(alias.asname)
            elif isinstance(node, ast.ImportFrom) and node.module == "torch":
                for alias in node.names:
                    if alias.name == "distributed":
                        aliases.add(alias.asname or "distributed")
            elif isinstance(node, ast.ImportFrom) and node.module:
                functional = node.module.startswith(
                    ("torch.distributed.nn", "torch.distributed._functional")
                )
                for alias in node.names:
                    direct = node.module.startswith("torch.distributed")
                    if functional or (direct and _COMMUNICATION.fullmatch(alias.name)):
                        found.append(f"{module.path}:{node.lineno}: {alias.name}")
        for node in ast.walk(module.tree):
            if (
                isinstance(node, ast.Attribute)
                and _COMMUNICATION.fullmatch(node.attr)
                and ast.unparse(node.value) in aliases
            ):
                found.append(f"{module.path}:{node.lineno}: {ast.unparse(node)}")
    return found


def state_violations(package: list[Module]) -> list[str]:
    """Find module-level state: `global`, and lower-case names bound to a container."""
    containers = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp
    found = []
    for module in package:
        if module.path in STATE_OWNERS:
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Global):
                names = ", ".join(node.names)
                found.append(f"{module.path}:{node.lineno}: global {names}")
        for node in module.tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(
                node.value, containers
            ):
                targets = (
                    node.targets if isinstance(node, ast.Assign) else [node.target]
                )
                for target in targets:
                    name = ast.unparse(target)
                    if not name.strip("_").isupper() and name != "__all__":
                        found.append(f"{module.path}:{node.lineno}: mutable {name}")
    return found


# ---- sizes and names ---------------------------------------------------------------


def size_violations(package: list[Module]) -> list[str]:
    """Find modules and functions that are too long to be read at once."""
    found = []
    for module in package:
        lines = module.source.count("\n")
        if lines > MAX_MODULE_LINES:
            found.append(f"{module.path}: {lines} lines, at most {MAX_MODULE_LINES}")
        for node in ast.walk(module.tree):
            if isinstance(node, Function):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    found.append(
                        f"{module.path}:{node.lineno}: {node.name} has {length} lines, "
                        f"at most {MAX_FUNCTION_LINES}"
                    )
    return found


def name_violations(package: list[Module]) -> list[str]:
    """Find public names that are also names of modules or folders.

    A module of bench/ is named after its command, so it may share the name of what it
    measures.
    """
    named = [module.name.split(".") for module in package if module.part != "bench"]
    modules = {part for parts in named for part in parts if part}
    return [f"{name} is also a module" for name in exports(package) if name in modules]


# ---- docstrings --------------------------------------------------------------------


def docstring_violations(package: list[Module]) -> list[str]:
    """Find public names without the docstring sections that they need."""
    by_name = {module.name: module for module in package}
    found = []
    for name, where in exports(package).items():
        definition = _definition(by_name, where, name)
        if definition is None:
            found.append(f"{where}: {name} is exported but not defined there")
            continue
        module, node = definition
        if isinstance(node, ast.AnnAssign):
            problems = _value_problems(module, node)
        elif isinstance(node, ast.ClassDef):
            problems = _class_problems(node)
        else:
            problems = _function_problems(node, "Returns")
        found += [f"{module.path}:{line}: {name}{text}" for line, text in problems]
    return found


def _definition(
    by_name: dict[str, Module], where: str, name: str
) -> tuple[Module, ast.ClassDef | ast.AnnAssign | Function] | None:
    """Find the definition of a name, also when its module re-exports it."""
    module = by_name.get(where)
    if module is None:
        return None
    for node in reversed(module.tree.body):  # overloads come before it
        if isinstance(node, ast.ClassDef | Function) and node.name == name:
            return module, node
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            return module, node
    for _, target in imports(module):
        origin, _, imported = target.removeprefix("labpkg.").rpartition(".")
        if imported == name and origin != where:
            return _definition(by_name, origin, name)
    return None


def _value_problems(module: Module, node: ast.AnnAssign) -> list[tuple[int, str]]:
    strings = {
        below.lineno
        for below in module.tree.body
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }
    if (node.end_lineno or node.lineno) + 1 in strings:
        return []
    return [(node.lineno, " has no string below it")]


def _function_problems(node: Function, *sections: str) -> Iterator[tuple[int, str]]:
    doc = ast.get_docstring(node)
    if not doc:
        yield node.lineno, " has no docstring"
        return
    undocumented = [
        name for name in _parameters(node) if not _mentions(doc, "Args", name)
    ]
    if undocumented:
        yield node.lineno, f": Args lacks {', '.join(undocumented)}"
    returns = node.returns is None or ast.unparse(node.returns) != "None"
    if (
        "Returns" in sections
        and returns
        and not re.search(r"^(Returns|Yields):", doc, re.M)
    ):
        yield node.lineno, ": no section Returns"
    if _raises(node) and not re.search(r"^Raises:", doc, re.M):
        yield node.lineno, ": raises, but has no section Raises"


def _class_problems(node: ast.ClassDef) -> Iterator[tuple[int, str]]:
    doc = ast.get_docstring(node)
    if not doc:
        yield node.lineno, " has no docstring"
        return
    for method in node.body:
        if not isinstance(method, Function):
            continue
        if method.name == "__init__":
            lacking = [p for p in _parameters(method) if not _mentions(doc, "Args", p)]
            if lacking:
                yield method.lineno, f": Args of the class lacks {', '.join(lacking)}"
        elif not method.name.startswith("_"):
            if any(ast.unparse(d).endswith("property") for d in method.decorator_list):
                if not ast.get_docstring(method):
                    yield method.lineno, f".{method.name} has no docstring"
            else:
                for line, text in _function_problems(method):
                    yield line, f".{method.name}{text}"
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        yield from _field_problems(node, doc)


def _field_problems(node: ast.ClassDef, doc: str) -> Iterator[tuple[int, str]]:
    """Find fields without a string below them or a line in the class docstring."""
    for field, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            name = ast.unparse(field.target)
            described = isinstance(below, ast.Expr) and isinstance(
                below.value, ast.Constant
            )
            listed = _mentions(doc, "Args", name) or _mentions(doc, "Attributes", name)
            if not name.startswith("_") and not described and not listed:
                yield field.lineno, f": the field {name} is not documented"


def _parameters(node: Function) -> list[str]:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    names = [a.arg for a in named if a.arg not in ("self", "cls")]
    # A method of *args and **kwargs alone passes them on: its first line says to what.
    catch_all = [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return [*names, *catch_all] if names else []


def _mentions(doc: str, section: str, name: str) -> bool:
    match = re.search(rf"^{section}:\n((?:[ ]+.*\n?|\n)*)", doc, re.M)
    listed = rf"^\s+(?:\*?\*?\w+, )*\*{{0,2}}{re.escape(name)}\b[^:\n]*:"
    return bool(match and re.search(listed, match.group(1), re.M))


def _explained(doc: str, name: str) -> bool:
    """Tell whether a parameter is listed under Args, or with its shape under Shape."""
    shape = re.search(rf"^Shape:\n(?:[ ]+.*\n)*?.*\b{re.escape(name)}\b", doc, re.M)
    return bool(shape) or _mentions(doc, "Args", name)


def _raises(node: Function) -> bool:
    """Tell whether the function itself raises an error of its own making."""
    stack = list(node.body)
    while stack:
        child = stack.pop()
        if isinstance(child, ast.Raise) and child.exc is not None:
            return True
        if not isinstance(child, Function | ast.ClassDef | ast.Lambda):
            stack += [c for c in ast.iter_child_nodes(child) if isinstance(c, ast.AST)]
    return False


# ---- text --------------------------------------------------------------------------

# Written in pieces, so that this file does not break its own rule.
_MACHINE_PATH = re.compile(r"(?<![\w.])/(wo" + r"rk|ro" + r"ot|Us" + r"ers)/\w[\w./-]*")
_HOME_PATH = re.compile(r"(?<![\w.])/ho" + r"me/(?!you/)\w[\w./-]*")


def text_violations(root: Path, files: list[Path]) -> list[str]:
    """Find paths of one machine in text files; tests may invent a home folder."""
    found = []
    for path in files:
        try:
            lines = path.read_text().splitlines()
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        name = path.relative_to(root)
        invented = name.parts[0] == "tests"
        patterns = [_MACHINE_PATH] if invented else [_MACHINE_PATH, _HOME_PATH]
        for number, line in enumerate(lines, 1):
            for pattern in patterns:
                if match := pattern.search(line):
                    found.append(f"{name}:{number}: names {match.group(0)}")
    return found

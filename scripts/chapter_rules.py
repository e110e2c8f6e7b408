"""The rules for a chapter, read from its notebook.

`chapter_violations` returns what is wrong, as `cell n: what`. The rules are those of
the chapter template (scripts/chapter_template.ipynb): its sections in order, stored
outputs, an assertion where a claim is made, exercises that are checked, figures that
can be read aloud. tests/book applies them, and plants violations.
"""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Callable, Iterator
from typing import Any

SECTIONS = (
    "Idea",
    "Mathematics",
    "From scratch",
    "With the library",
    "Experiment",
    "On real GPUs",
    "Myths",
    "Pitfalls",
    "Takeaways",
    "Exercises",
    "References",
)
OPTIONAL = {"book/foundations/setup": ("Mathematics", "From scratch")}
"""Sections that a chapter may leave out, since there is nothing to say in them."""

ASSERTED = ("From scratch", "With the library", "Experiment", "Myths", "Pitfalls")
ILLUSTRATED = ("Idea", "Experiment")
MAX_CELL_LINES = 40
MAX_MEDIAN_LINES = 10
NUM_EXERCISES = range(4, 7)
Cell = Any
Rule = Callable[[list[tuple[int, str, Cell]]], Iterator[str]]


def chapter_violations(
    notebook: Any, *, page: str, public: set[str], magics: set[str]
) -> list[str]:
    """Check one notebook against the chapter template.

    Args:
        notebook: The notebook, as nbformat reads it.
        page: Its path without suffix, such as `book/processes/ranks`.
        public: The names that labpkg exports.
        magics: The names of the registered magics of IPython.

    Returns:
        What is wrong; empty for a good chapter.
    """
    cells = list(located_cells(notebook))
    optional = OPTIONAL.get(page, ())
    found = list(section_problems(cells, optional))
    for rule in (
        output_problems,
        size_problems,
        assertion_problems,
        exercise_problems,
        figure_problems,
    ):
        found += rule(cells)
    found += definition_problems(cells, public)
    found += magic_problems(cells, magics)
    return found


def located_cells(notebook: Any) -> Iterator[tuple[int, str, Cell]]:
    """Yield number, section and cell; the section is the last `##` heading."""
    section = ""
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type == "markdown":
            headings = _headings(cell.source)
            section = headings[-1] if headings else section
        yield number, section, cell


def _headings(text: str) -> list[str]:
    prose = re.sub(r"^(```+|~~~+).*?^\1", "", text, flags=re.M | re.S)
    return [heading.strip() for heading in re.findall(r"^## (.+)$", prose, re.M)]


def _code(cells: list[tuple[int, str, Cell]]) -> Iterator[tuple[int, str, Cell]]:
    return (entry for entry in cells if entry[2].cell_type == "code")


def _python(cell: Cell) -> ast.Module:
    """Parse a code cell without its magics."""
    if cell.source.lstrip().startswith("%%"):
        return ast.Module([], [])
    lines = [
        re.sub(r"\S.*", "pass", line) if line.lstrip().startswith(("%", "!")) else line
        for line in cell.source.splitlines()
    ]
    return ast.parse("\n".join(lines))


def section_problems(
    cells: list[tuple[int, str, Cell]], optional: tuple[str, ...] = ()
) -> Iterator[str]:
    """Find a missing title or objectives, and sections that miss or stray."""
    texts = [cell.source for _, _, cell in cells if cell.cell_type == "markdown"]
    first = texts[0] if texts else ""
    if not re.match(r"# \S", first):
        yield "cell 1: the first cell begins with a title, `# ...`"
    if "{admonition} Objectives" not in first:
        yield "cell 1: the first cell has an admonition Objectives"
    headings = [heading for text in texts for heading in _headings(text)]
    for heading in headings:
        if heading not in SECTIONS:
            yield f"the section {heading!r} is not in the template; use ### inside one"
    known = [heading for heading in headings if heading in SECTIONS]
    for section in SECTIONS:
        if section not in known and section not in optional:
            yield f"the section {section!r} is missing"
    if known != sorted(set(known), key=SECTIONS.index):
        yield f"sections are out of order or repeated: {', '.join(known)}"


def output_problems(cells: list[tuple[int, str, Cell]]) -> Iterator[str]:
    """Find cells that were not executed in order, and errors or paths in outputs."""
    for expected, (number, _, cell) in enumerate(_code(cells), 1):
        if cell.execution_count != expected:
            yield f"cell {number}: not executed in order; run `make execute`"
        tags = cell.metadata.get("tags", [])
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in tags:
                yield f"cell {number}: ends in {output.ename}"
            match = _ABSOLUTE_PATH.search(str(output))
            if match:
                yield f"cell {number}: the output contains the path {match.group(0)}"


_ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/<])/(?:home|tmp|usr|opt|var|root|work|Users)/\w+"
)


def size_problems(cells: list[tuple[int, str, Cell]]) -> Iterator[str]:
    """Find cells that are too long, and a chapter whose cells mostly are."""
    lengths = {number: len(c.source.splitlines()) for number, _, c in _code(cells)}
    for number, length in lengths.items():
        if length > MAX_CELL_LINES:
            yield f"cell {number}: {length} lines, at most {MAX_CELL_LINES}"
    if lengths and statistics.median(lengths.values()) > MAX_MEDIAN_LINES:
        median = statistics.median(lengths.values())
        yield f"the median cell has {median} lines, at most {MAX_MEDIAN_LINES}"


def assertion_problems(cells: list[tuple[int, str, Cell]]) -> Iterator[str]:
    """Find sections that compute something and assert nothing."""
    for section in ASSERTED:
        code = [cell for _, where, cell in _code(cells) if where == section]
        if code and not any(_asserts(cell) for cell in code):
            yield f"the section {section!r} asserts nothing"
    boxes = sum(c.source.count("{admonition} Myth") for _, _, c in cells)
    if not boxes and any(section == "Myths" for _, section, _ in cells):
        yield "the section 'Myths' has no box: use {admonition} Myth: ..."


def _asserts(cell: Cell) -> bool:
    return any(isinstance(node, ast.Assert) for node in ast.walk(_python(cell)))


def exercise_problems(cells: list[tuple[int, str, Cell]]) -> Iterator[str]:
    """Find exercises without a solution that is executed and checked."""
    text = "\n".join(c.source for _, _, c in cells if c.cell_type == "markdown")
    exercises = re.findall(r"\{exercise(?:-start)?\}", text)
    solutions = re.findall(r"\{solution-start\}", text)
    checks = [
        number
        for number, section, cell in _code(cells)
        if section == "Exercises"
        and re.search(r"^assert lab\.check\.\w+\(", cell.source, re.M)
    ]
    if len(exercises) not in NUM_EXERCISES:
        few, many = NUM_EXERCISES[0], NUM_EXERCISES[-1]
        yield f"{len(exercises)} exercises, {few} to {many} are wanted"
    if not len(exercises) == len(solutions) == len(checks):
        yield (
            f"{len(exercises)} exercises, {len(solutions)} gated solutions and "
            f"{len(checks)} cells with `assert lab.check.<name>(...)`: as many of each "
            "are wanted"
        )


def figure_problems(cells: list[tuple[int, str, Cell]]) -> Iterator[str]:
    """Find sections without a figure, and figures without caption or spoken text."""
    for number, _, cell in _code(cells):
        if not _drawn(cell):
            continue
        settings = cell.metadata.get("mystnb", {})
        if not settings.get("figure", {}).get("caption"):
            yield f"cell {number}: no caption (metadata mystnb.figure.caption)"
        if not settings.get("image", {}).get("alt"):
            yield f"cell {number}: no alternative text (metadata mystnb.image.alt)"
    for section in ILLUSTRATED:
        code = [cell for _, where, cell in _code(cells) if where == section]
        players = any("<script" in str(cell.outputs) for cell in code)
        markdown = any("{figure}" in c.source for _, w, c in cells if w == section)
        if not players and not markdown and not any(_drawn(cell) for cell in code):
            yield f"the section {section!r} shows no figure"


def _drawn(cell: Cell) -> bool:
    kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
    return bool(kinds & {"image/png", "image/svg+xml"})


def definition_problems(
    cells: list[tuple[int, str, Cell]], public: set[str]
) -> Iterator[str]:
    """Find definitions of names that the library exports, outside `From scratch`."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for number, section, cell in _code(cells):
        for node in ast.walk(_python(cell)):
            scratch = section == "From scratch"
            if isinstance(node, kinds) and node.name in public and not scratch:
                yield f"cell {number}: defines {node.name}, which labpkg exports"


def magic_problems(
    cells: list[tuple[int, str, Cell]], magics: set[str]
) -> Iterator[str]:
    """Find unknown magics, which pass nbval silently, and `!`, which hides errors."""
    for number, _, cell in _code(cells):
        for line in cell.source.splitlines():
            match = re.match(r"\s*(%{1,2})(\w+)", line)
            if match and match.group(2) not in magics:
                yield f"cell {number}: the magic {match.group(0).strip()} is unknown"
            if line.lstrip().startswith("!"):
                yield f"cell {number}: `!` hides a failed command; use %%bash"

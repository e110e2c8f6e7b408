"""Every notebook obeys the chapter template, and the rules of the template can fail."""

import copy
import hashlib
import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

import labpkg
from scripts import notebooks
from scripts.chapter_rules import SECTIONS, chapter_violations, located_cells

from .conftest import ROOT

TEMPLATE = ROOT / "scripts" / "chapter_template.ipynb"
PUBLIC = set(labpkg.__all__)


@pytest.fixture(scope="module")
def magics() -> set[str]:
    registered = InteractiveShell().magics_manager.magics
    return {name for kind in registered.values() for name in kind}


def violations(notebook, magics, page="book/x/y"):
    return chapter_violations(notebook, page=page, public=PUBLIC, magics=magics)


@pytest.mark.parametrize(
    "path", notebooks.notebooks(), ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_chapter_obeys_the_template(path, magics):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    page = str(path.relative_to(ROOT).with_suffix(""))
    assert violations(notebook, magics, page) == []
    text = path.read_text()
    assert notebooks.scrub(text, notebooks.machine_traces()) == text


def test_pictures_are_not_scrubbed():
    trace = [(re.compile(r"\bvm\b"), "host")]
    picture = "data:image/png;base64," + "A/vm+" * 60
    assert notebooks.scrub(f"on vm: {picture} vm", trace) == f"on host: {picture} host"


def test_widgets_are_not_stored():
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1a"}}
    cells = [nbformat.v4.new_code_cell("1"), nbformat.v4.new_code_cell("2")]
    for cell in cells:
        cell.outputs = [nbformat.v4.new_output("display_data", data=view)]
    cells[1].metadata.tags = ["remove-output"]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {"a": 1}})
    stored = notebooks.normalise(notebook)
    assert [len(cell.outputs) for cell in stored.cells] == [1, 0]
    assert "widgets" not in stored.metadata


def test_the_template_obeys_itself(magics):
    assert violations(nbformat.read(TEMPLATE, as_version=4), magics) == []


def first_code(notebook, section):
    """Return the first code cell of a section."""
    found = located_cells(notebook)
    return next(c for _, s, c in found if s == section and c.cell_type == "code")


def break_outputs(notebook):
    first_code(notebook, "Pitfalls").execution_count = None


def break_with_error(notebook):
    error = nbformat.v4.new_output("error", ename="KeyError", evalue="", traceback=[])
    first_code(notebook, "Pitfalls").outputs.append(error)


def break_with_path(notebook):
    text = "see /" + "home/alice/x"
    output = nbformat.v4.new_output("stream", name="stdout", text=text)
    first_code(notebook, "Pitfalls").outputs.append(output)


def break_order(notebook):
    for cell in notebook.cells:
        cell.source = cell.source.replace("## Myths", "## X").replace(
            "## Pitfalls", "## Myths"
        )
        cell.source = cell.source.replace("## X", "## Pitfalls")


def break_figure(notebook):
    cell = first_code(notebook, "Idea")
    cell.outputs = []


def replace_source(section, source):
    def change(notebook):
        first_code(notebook, section).source = source

    change.__name__ = f"{section}: {source[:20]}"
    return change


def drop_metadata(key):
    def change(notebook):
        del first_code(notebook, "Idea").metadata["mystnb"][key]

    change.__name__ = f"drop {key}"
    return change


def replace_text(old, new):
    def change(notebook):
        before = json.dumps(notebook)
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
        assert json.dumps(notebook) != before

    change.__name__ = f"{old} -> {new}"
    return change


PLANTED = [
    (break_outputs, "not executed in order"),
    (break_with_error, "ends in KeyError"),
    (break_with_path, "the output contains the path"),
    (break_order, "out of order"),
    (break_figure, "shows no figure"),
    (drop_metadata("figure"), "no caption"),
    (drop_metadata("image"), "no alternative text"),
    (replace_source("Pitfalls", "x = 1\n" * 41), "at most 40"),
    (replace_source("Pitfalls", "empty = 0"), "asserts nothing"),
    (replace_source("Pitfalls", "def all_reduce(): assert 1"), "which labpkg exports"),
    (replace_source("Pitfalls", "%no_such_magic\nassert 1"), "is unknown"),
    (replace_source("Pitfalls", "!ls\nassert 1"), "hides a failed command"),
    (replace_source("Exercises", "assert True"), "as many of each"),
    (replace_text("# The mean", "The mean"), "begins with a title"),
    (replace_text("{admonition} Objectives", "{note} X"), "admonition Objectives"),
    (replace_text("## Takeaways", "## Summary"), "not in the template"),
    (replace_text("## Takeaways", "### Takeaways"), "'Takeaways' is missing"),
    (replace_text("{admonition} Myth", "{note} Myth"), "has no box"),
    (replace_text("{exercise}", "{note}"), "0 exercises"),
]


@pytest.mark.parametrize(
    ("plant", "message"), PLANTED, ids=lambda v: getattr(v, "__name__", "")
)
def test_a_planted_violation_is_found(plant, message, magics):
    notebook = nbformat.read(TEMPLATE, as_version=4)
    plant(notebook)
    found = violations(notebook, magics)
    assert any(message in text for text in found), found


def test_scratch_sections_may_define_names_of_the_library(magics):
    notebook = nbformat.read(TEMPLATE, as_version=4)
    first_code(notebook, "From scratch").source = "def all_reduce():\n    assert True"
    assert violations(notebook, magics) == []


def test_headings_in_code_blocks_are_no_sections(magics):
    notebook = nbformat.read(TEMPLATE, as_version=4)
    notebook.cells[2].source += "\n```text\n## Not a section\n```\n"
    assert violations(notebook, magics) == []
    assert len(SECTIONS) == 11


# ---- the table of contents ---------------------------------------------------------


@pytest.fixture
def small_book(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "index.md").write_text("# Index\n")
    shutil.copy2(TEMPLATE, tmp_path / "book" / "a.ipynb")
    toc = "format: jb-book\nroot: book/index\nparts:\n  - caption: One\n"
    toc += "    chapters:\n      - file: book/a\n"
    (tmp_path / "_toc.yml").write_text(toc)
    return tmp_path


def test_notebooks_are_found_in_reading_order(small_book):
    assert notebooks.notebooks(small_book) == [small_book / "book" / "a.ipynb"]
    assert notebooks.page_title(small_book / "book" / "a.ipynb").startswith("The mean")


def test_a_notebook_outside_the_table_of_contents_is_an_error(small_book):
    shutil.copy2(TEMPLATE, small_book / "book" / "b.ipynb")
    with pytest.raises(ValueError, match=r"missing from _toc.yml: book/b.ipynb"):
        notebooks.toc_files(small_book)


def test_a_page_that_does_not_exist_is_an_error(small_book):
    (small_book / "book" / "a.ipynb").unlink()
    with pytest.raises(ValueError, match="names book/a, but there is no such page"):
        notebooks.toc_files(small_book)


# ---- execution ---------------------------------------------------------------------

CELLS = [
    "import os, socket, sys\nprint(os.getcwd(), sys.prefix, socket.gethostname())",
    "1 + 1",
    "from matplotlib import pyplot as plt\n_ = plt.plot([1, 2])",
]


def test_execution_stores_outputs_without_traces_of_the_machine(tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    path = tmp_path / "book.ipynb"
    nbformat.write(notebook, path)
    ids = [cell.id for cell in notebook.cells]
    digests = []
    for _ in range(2):
        notebooks.execute(path, root=tmp_path)
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    stored = nbformat.read(path, as_version=4)
    assert [cell.id for cell in stored.cells] == ids
    assert stored.metadata == {
        "kernelspec": notebooks.KERNELSPEC,
        "language_info": {"name": "python"},
    }
    printed, two, figure = (copy.copy(cell.outputs[0]) for cell in stored.cells)
    assert printed["text"].split()[0] == "."
    assert printed["text"].split()[2] == "host"
    assert two["data"]["text/plain"] == "2"
    assert "image/png" in figure["data"]
    assert str(tmp_path) not in path.read_text()


def test_a_failing_cell_leaves_the_notebook_as_it_was(tmp_path):
    cell = nbformat.v4.new_code_cell("1 / 0")
    path = tmp_path / "book.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        notebooks.execute(path, root=tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("source", "passes"), [("assert True", 1), ("assert 0", 0)])
def test_a_notebook_fails_with_its_assertions(tmp_path, source, passes):
    cell = nbformat.v4.new_code_cell(source)
    path = tmp_path / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    recipe = (
        (ROOT / "Makefile").read_text().split("notebooks-test:")[1].split("\n\n")[0]
    )
    flags = [word for word in recipe.split() if word.startswith("--nbval")]
    assert "--nbval-lax" in flags
    command = [sys.executable, "-m", "pytest", "-q", *flags, str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode == 0) == bool(passes), result.stdout
    assert "1 passed" in result.stdout or "1 failed" in result.stdout

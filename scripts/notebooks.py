"""List, check and execute the pages of the book.

    notebooks.py list                print the notebooks of _toc.yml
    notebooks.py execute [FILE...]   run them (default: all) and store their outputs

Execution writes only what belongs to the content: outputs and stable cell ids. Machine
paths, host names, versions and times stay out, so that a second execution of an
unchanged notebook changes as little as its cells allow. So do widgets, for which a page
would fetch scripts from another host: tag their cells `remove-output`. Use no Output
widget, hence no `interact`: nbclient answers it on the channel on which it waits, which
can lose the wake-up and cost the whole limit of a cell. An Image widget can be redrawn.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

import yaml

_BASE64 = re.compile(r"([A-Za-z0-9+/=]{200,})")  # a picture may spell any name
ROOT = Path(__file__).resolve().parents[1]
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}


def toc_parts(root: Path = ROOT) -> dict[str, list[str]]:
    """Return the pages of `_toc.yml` by part, without suffix; the root's part is ""."""
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    parts = {"": [toc["root"]]}
    for part in toc.get("parts", []):
        parts[part["caption"]] = [chapter["file"] for chapter in part["chapters"]]
    return parts


def toc_files(root: Path = ROOT) -> list[Path]:
    """Return the files of all pages in reading order.

    Raises:
        ValueError: if `_toc.yml` names a page that does not exist, or if a notebook in
            book/ is missing from `_toc.yml`.
    """
    files = []
    for page in (page for pages in toc_parts(root).values() for page in pages):
        found = [f for f in (root / f"{page}.ipynb", root / f"{page}.md") if f.exists()]
        if not found:
            raise ValueError(
                f"_toc.yml names {page}, but there is no such page: add it"
            )
        files.append(found[0])
    unlisted = {
        path
        for path in (root / "book").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in path.parts
    } - set(files)
    if unlisted:
        names = ", ".join(sorted(str(path.relative_to(root)) for path in unlisted))
        raise ValueError(
            f"missing from _toc.yml: {names}; add a `- file:` line for each"
        )
    return files


def notebooks(root: Path = ROOT) -> list[Path]:
    """Return the notebooks of the book in reading order."""
    return [path for path in toc_files(root) if path.suffix == ".ipynb"]


def page_title(path: Path) -> str:
    """Return the first heading of a page."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join(
            "".join(c["source"]) for c in cells if c["cell_type"] == "markdown"
        )
    match = re.search(r"^# (.+)$", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"{path.name} has no title: begin it with a line `# Title`")
    return match.group(1).strip()


def scrub(value: Any, replacements: list[tuple[re.Pattern[str], str]]) -> Any:
    """Return a copy of a JSON value with the replacements made in every string."""
    if isinstance(value, str):
        parts = _BASE64.split(value)  # every second one is a match
        for i in range(0, len(parts), 2):
            for pattern, replacement in replacements:
                parts[i] = pattern.sub(replacement, parts[i])
        return "".join(parts)
    if isinstance(value, list):
        return [scrub(item, replacements) for item in value]
    if isinstance(value, dict):
        return {key: scrub(item, replacements) for key, item in value.items()}
    return value


def machine_traces(root: Path = ROOT) -> list[tuple[re.Pattern[str], str]]:
    """Return what names this machine, as pairs of pattern and replacement."""
    site = re.escape(f"{sys.prefix}/") + r"lib/python[\d.]+/site-packages/"
    return [
        (re.compile(site), ""),
        (re.compile(re.escape(f"{sys.base_prefix}/") + r"lib/python[\d.]+/"), ""),
        (re.compile(re.escape(f"{root}/")), ""),
        (re.compile(re.escape(str(root)) + r"\b"), "."),
        (re.compile(r"/tmp/ipykernel_\d+/"), "ipykernel/"),
        (re.compile(re.escape(str(Path.home())) + r"\b"), "~"),
        (
            re.compile(rf"(?<![\w.-]){re.escape(socket.gethostname())}(?![\w.-])"),
            "host",
        ),
    ]


def normalise(notebook: Any, root: Path = ROOT) -> Any:
    """Return the executed notebook without traces of the machine and the moment."""
    import nbformat

    traces = machine_traces(root)
    metadata: dict[str, Any] = {
        "kernelspec": KERNELSPEC,
        "language_info": {"name": "python"},
    }
    cells = []
    for cell in notebook.cells:
        cell = dict(cell, metadata={**cell.metadata})
        cell["metadata"].pop("execution", None)
        if cell["cell_type"] == "code":
            is_hidden = "remove-output" in cell["metadata"].get("tags", [])
            cell["outputs"] = [] if is_hidden else scrub(cell["outputs"], traces)
        cells.append(cell)
    return nbformat.from_dict(dict(notebook, metadata=metadata, cells=cells))


def execute(path: Path, root: Path = ROOT) -> None:
    """Run one notebook from its own folder and write it back with its outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        extra_arguments=["--log-level=ERROR"],
        timeout=300,
        kernel_name="python3",
        store_widget_state=False,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    nbformat.write(normalise(notebook, root), path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="List or execute the notebooks of the book."
    )
    parser.add_argument("command", choices=["list", "execute"])
    parser.add_argument("files", nargs="*", type=Path)
    arguments = parser.parse_args()
    try:
        found = notebooks()
    except ValueError as error:
        sys.exit(f"notebooks.py: {error}")
    if arguments.command == "list":
        print(*(path.relative_to(ROOT) for path in found), sep="\n")
        return
    for path in [file.resolve() for file in arguments.files] or found:
        start = time.perf_counter()
        execute(path)
        print(f"{path.relative_to(ROOT)}: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()

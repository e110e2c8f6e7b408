"""The rendered book: complete, self-contained, with every public name explained."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import labpkg
from scripts.chapter_map import draw
from scripts.notebooks import toc_files, toc_parts

from .conftest import ROOT, build

FETCHING = {"script": "src", "link": "href", "img": "src", "iframe": "src"}
FETCHING |= {"source": "src", "video": "src", "audio": "src", "object": "data"}


class Fetches(HTMLParser):
    """Collects what a browser would fetch from another host to show the page."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        address = attributes.get(FETCHING.get(tag, "")) or ""
        if re.match(r"(https?:)?//", address) and attributes.get("rel") != "canonical":
            self.found.append(address)


def external_fetches(folder: Path) -> list[str]:
    """Return the fetches of all pages and style sheets below a folder."""
    found = []
    for page in folder.rglob("*.html"):
        text = page.read_text()
        inline = re.findall(
            r"(?:@import|url\()\s*['\"]?((?:https?:)?//[^'\")\s]+)", text
        )
        found += [f"{page.name}: {a}" for a in [*Fetches(text).found, *inline]]
    for sheet in folder.rglob("*.css"):
        urls = re.findall(r"url\(\s*['\"]?((?:https?:)?//[^'\")]+)", sheet.read_text())
        found += [f"{sheet.name}: {url}" for url in urls]
    return found


def test_nothing_is_fetched_from_another_host(book):
    assert external_fetches(book) == []


def test_a_fetch_from_another_host_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<script src="https://a.org/x.js"></script><link href="//b.org/y.css">'
        '<a href="https://fine.org">link</a><style>@import "https://c.org/z";</style>'
    )
    (tmp_path / "b.css").write_text("@font-face { src: url('https://d.org/f.woff2') }")
    assert len(external_fetches(tmp_path)) == 4


def test_every_page_of_the_table_of_contents_is_built(book):
    pages = [page for part in toc_parts().values() for page in part]
    assert pages
    for page in pages:
        assert (book / f"{page}.html").exists(), page


def test_formulas_are_set_by_the_local_mathjax(book):
    page = (book / "book" / "notation.html").read_text()
    script = re.search(r'src="([^"]*mathjax/[^"?]+)', page)
    assert script is not None
    assert (book / "book" / script.group(1)).resolve().stat().st_size > 100_000


def test_every_public_name_is_in_the_api_reference(book):
    page = (book / "book" / "api.html").read_text()
    missing = [name for name in labpkg.__all__ if f'id="labpkg.{name}"' not in page]
    modules = {name for name in missing if f'id="module-labpkg.{name}"' in page}
    assert set(missing) == modules == {"bench", "check", "plot"}


def test_every_checker_and_figure_is_in_the_api_reference(book):
    page = (book / "book" / "api.html").read_text()
    for module in (labpkg.check, labpkg.plot):
        for name in module.__all__:
            assert f'id="{module.__name__}.{name}"' in page or name == "COLORS", name


def test_the_glossary_gives_terms_in_english_and_chinese():
    text = (ROOT / "book" / "notation.md").read_text()
    glossary = text.split("```{glossary}")[1].split("```")[0]
    terms = re.findall(r"^(\S.*)\n  (\S.*)", glossary, re.M)
    assert len(terms) >= 40
    for term, meaning in terms:
        chinese, _, english = meaning.partition("。")
        assert re.search(r"[\u4e00-\u9fff]", chinese), term
        assert len(english.split()) >= 3, term
    names = [term for term, _ in terms]
    assert names == sorted(names, key=str.lower)


def test_the_chapter_map_shows_the_table_of_contents(tmp_path):
    draw(tmp_path / "map.svg")
    committed = ROOT / "book" / "figures" / "chapter_map.svg"
    drawn = (tmp_path / "map.svg").read_text()
    assert drawn == committed.read_text(), "run `make figures` and commit the map"


def test_every_citation_key_has_an_identifier_or_a_place():
    entries = re.split(r"^@", (ROOT / "book/references.bib").read_text(), flags=re.M)[
        1:
    ]
    assert len(entries) >= 20
    for entry in entries:
        key = re.match(r"\w+\{(\w+),", entry)
        assert key is not None, entry[:40]
        year = re.search(r"year\s*=\s*\{(\d{4})\}", entry)
        assert year is not None, key.group(1)
        assert year.group(1) in key.group(1)
        place = r"(arXiv:\d{4}\.\d{4,5}|doi|journal|booktitle|publisher)"
        assert re.search(place, entry), key.group(1)


def test_a_warning_fails_the_build(tmp_path):
    for name in ("_config.yml", "book"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/planted\n")
    (tmp_path / "book" / "planted.md").write_text("# Title\n\n[](no_such_page.md)\n")
    result = build(tmp_path, tmp_path)
    assert result.returncode != 0
    assert "no_such_page" in result.stdout + result.stderr


def test_pages_are_listed_in_reading_order():
    files = toc_files()
    assert files[0].stem == "index"
    assert len(set(files)) == len(files)

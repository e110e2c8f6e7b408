"""Every page in Chromium: light and dark, wide and narrow, without a network."""

import pytest

from scripts import browser
from scripts.notebooks import toc_parts

from .conftest import ROOT

PAGES = [page for part in toc_parts(ROOT).values() for page in part]
WRONG = (
    "overflowing",
    "pale",
    "raw_formulas",
    "formula_errors",
    "broken_images",
    "stretched_images",
    "images_without_text",
)


@pytest.fixture(scope="module")
def chromium():
    if browser.find_chromium() is None:
        pytest.skip("no Chromium: install the package chromium, or set CHROMIUM")
    with browser.browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def address(book):
    with browser.serve(book) as address:
        yield address


def problems(view: browser.View) -> list[str]:
    """Return what is wrong with a page, in words."""
    facts = view.facts
    found = [f"{key}: {facts[key]}" for key in WRONG if facts[key]]
    if facts["overflow_px"] > 0:
        found.append(f"the page is {facts['overflow_px']} px wider than the window")
    if facts["mode"] != view.mode:
        found.append(f"the page is {facts['mode']}")
    return [f"{view.width} px, {view.mode}: {text}" for text in found + view.messages]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_legible_and_quiet(chromium, address, page):
    views = browser.look(chromium, address, f"{page}.html")
    assert len(views) == len(browser.WIDTHS) * len(browser.MODES)
    assert [text for view in views for text in problems(view)] == []


_STEP_PLAYERS = """() => [...document.querySelectorAll('.lab-player')].map(player => {
  const image = player.querySelector('img'), slider = player.querySelector('input');
  const seen = () => image.src + player.querySelector('output').textContent;
  const first = seen();
  slider.value = slider.max;
  slider.dispatchEvent(new Event('input'));
  const last = seen();
  player.querySelector('button').click();  // at the end: starts again
  return first !== last && seen() === first && slider.value === '0';
})"""


def test_every_player_steps_through_its_frames(chromium, address, book):
    pages = [
        page for page in PAGES if "lab-player" in (book / f"{page}.html").read_text()
    ]
    assert pages
    for page in pages:
        with chromium.new_context() as context:
            tab = context.new_page()
            tab.goto(f"{address}/{page}.html", wait_until="load")
            reacts = tab.evaluate(_STEP_PLAYERS)
            assert reacts, page
            assert all(reacts), page


PLANTED = """<!doctype html><html data-theme="light"><body><article>
<script>
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const page = document.documentElement;
  dark.onchange = () => page.dataset.theme = dark.matches ? 'dark' : 'light';
  console.error('planted');
  window.MathJax = {startup: {promise: Promise.resolve()}};
</script>
<p style="color: #eee; background: #fff">pale text</p>
<p style="width: 2000px">wide</p>
<span class="math">x^2</span>
<img src="missing.png" alt="">
<img width="90" height="30" alt="wide" src="data:image/gif;base64,
R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7">
<script src="http://192.0.2.1/x.js"></script>
</article></body></html>"""


def test_planted_faults_are_seen(chromium, tmp_path):
    (tmp_path / "page.html").write_text(PLANTED)
    with browser.serve(tmp_path) as address:
        view = browser.look(chromium, address, "page.html")[0]
    found = "\n".join(problems(view))
    for fault in (
        "pale: ['1.",
        "overflowing: ['P.",
        "px wider",
        "raw_formulas: ['x^2']",
        "broken_images: ['http://127",
        "stretched_images: ['data:",
        "images_without_text",
        "console error: planted",
        "status 404",
        "request to another host: http://192.0.2.1/x.js",
    ):
        assert fault in found, found

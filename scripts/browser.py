"""Look at the built book in Chromium: what a page does wrong, and how it looks.

    browser.py HTML_DIR PNG_DIR    pictures of each page: light, dark, wide, narrow

The pages are served on the loopback interface. Requests to any other host are refused
and reported, since the book must work without a network. Used by tests/book.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Error,
    Response,
    Route,
    sync_playwright,
)

MODES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
WIDTHS = (1280, 390)
# MathJax is done, where the page uses it, and all images are in.
_SETTLE = """async () => {
  if (document.querySelector('.math')) {
    while (!(window.MathJax && MathJax.startup && MathJax.startup.promise))
      await new Promise(resolve => setTimeout(resolve, 20));
    await MathJax.startup.promise;
  }
  for (const image of document.querySelectorAll('img')) {
    image.loading = 'eager';
    await image.decode().catch(() => null);
  }
}"""
_ARGUMENTS = [
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
# A colour as [r, g, b, alpha], luminance and contrast as WCAG 2 defines them.
_FACTS = """() => {
  const rgba = text => {
    const v = text.match(/[\\d.]+/g).map(Number);
    return v.length === 3 ? [...v, 1] : v;
  };
  const luminance = c => c.slice(0, 3)
    .map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const background = e => {
    for (; e; e = e.parentElement) {
      const c = rgba(getComputedStyle(e).backgroundColor);
      if (c[3] > 0.5) return c;
    }
    return [255, 255, 255, 1];
  };
  const contrast = e => {
    const a = luminance(rgba(getComputedStyle(e).color));
    const b = luminance(background(e));
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const ownText = e => [...e.childNodes]
    .filter(n => n.nodeType === 3).map(n => n.data).join('').trim();
  const all = selector => [...document.querySelectorAll(selector)];
  return {
    mode: document.documentElement.dataset.theme,
    overflow_px: document.documentElement.scrollWidth - window.innerWidth,
    overflowing: all('article *')
      .filter(e => e.getBoundingClientRect().right > window.innerWidth + 1)
      .filter(e => !e.closest('mjx-container, pre, table, .cell_output, .sr-only'))
      .map(e => `${e.tagName}.${e.className}`).slice(0, 5),
    pale: all('article *')
      .filter(e => e.checkVisibility() && !e.matches('.headerlink, .headerlink *'))
      .filter(e => ownText(e) && contrast(e) < 3)
      .map(e => `${contrast(e).toFixed(1)}: ${ownText(e).slice(0, 40)}`).slice(0, 5),
    raw_formulas: all('.math').filter(e => !e.querySelector('mjx-container'))
      .map(e => e.textContent.slice(0, 40)),
    formula_errors: all('mjx-merror').map(e => e.textContent),
    broken_images: all('img').filter(i => i.naturalWidth === 0).map(i => i.src),
    stretched_images: all('article img')
      .filter(i => i.naturalWidth && Math.abs(Math.log(
        i.width / i.height / i.naturalWidth * i.naturalHeight)) > 0.05)
      .map(i => i.src),
    images_without_text: all('article img').filter(i => !i.alt).map(i => i.src),
  };
}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One page in one width and one mode."""

    page: str
    width: int
    mode: str
    facts: dict
    """What a script in the page measured; see `_FACTS`."""
    messages: list[str]
    """Errors and warnings of the console, exceptions, failed or refused requests."""


def find_chromium() -> str | None:
    """Return the path of Chromium: `CHROMIUM`, or the first one on the PATH."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = (shutil.which(name) for name in names)
    return os.environ.get("CHROMIUM") or next(filter(None, found), None)


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Keep the terminal for the test."""


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on a free port of the loopback interface; yield its address."""
    handler = functools.partial(_QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a headless Chromium with a throw-away profile."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=find_chromium(), args=_ARGUMENTS, chromium_sandbox=False
        )
        try:
            yield chromium
        finally:
            chromium.close()


def look(
    chromium: Browser, address: str, page: str, *, png_folder: Path | None = None
) -> list[View]:
    """Open one page in each width and mode, with pictures of it in `png_folder`."""
    views = []
    for width in WIDTHS:
        messages: list[str] = []
        with chromium.new_context(viewport={"width": width, "height": 900}) as context:
            tab = context.new_page()
            context.route("**/*", functools.partial(_stay_here, address, messages))
            tab.on("console", functools.partial(_console, messages))
            tab.on("pageerror", functools.partial(_exception, messages))
            tab.on("response", functools.partial(_response, messages))
            tab.goto(f"{address}/{page}", wait_until="load")
            tab.evaluate(_SETTLE)
            tab.add_style_tag(content="* { transition: none !important }")
            for mode in MODES:
                tab.emulate_media(color_scheme=mode)
                tab.wait_for_function(
                    "mode => document.documentElement.dataset.theme === mode", arg=mode
                )
                facts = tab.evaluate(_FACTS)
                view = View(
                    page=page, width=width, mode=mode, facts=facts, messages=messages
                )
                views.append(view)
                if png_folder is not None:
                    tab.screenshot(path=png_folder / _png_name(view), full_page=True)
    return views


def _png_name(view: View) -> str:
    stem = view.page.removesuffix(".html").replace("/", "_")
    return f"{stem}_{view.mode}_{view.width}.png"


def _stay_here(address: str, messages: list[str], route: Route) -> None:
    url = route.request.url
    if url.startswith((f"{address}/", "data:", "blob:")):
        route.continue_()
    else:
        messages.append(f"request to another host: {url}")
        route.abort()


def _console(messages: list[str], message: ConsoleMessage) -> None:
    if message.type in ("error", "warning"):
        messages.append(f"console {message.type}: {message.text}")


def _exception(messages: list[str], error: Error) -> None:
    messages.append(f"exception: {error}")


def _response(messages: list[str], response: Response) -> None:
    if response.status >= 400:
        messages.append(f"status {response.status}: {response.url}")


def html_pages(folder: Path) -> list[str]:
    """Return the built pages of the book, relative to the folder of the build."""
    return sorted(str(p.relative_to(folder)) for p in (folder / "book").rglob("*.html"))


def main() -> None:
    """Write the screenshots."""
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    if find_chromium() is None:
        sys.exit(
            "browser.py: no Chromium; install the package chromium or set CHROMIUM"
        )
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with serve(folder) as address, browser() as chromium:
        for page in html_pages(folder):
            for view in look(chromium, address, page, png_folder=target):
                print(target / _png_name(view))


if __name__ == "__main__":
    main()

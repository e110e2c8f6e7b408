"""`lab.show`: plain in a terminal, highlighted in a notebook, legible in both modes."""

import functools
import re

import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets import Any

from labpkg import display
from labpkg.planning import cost


class Kernel(InteractiveShell):
    """Looks like the shell of a notebook."""

    kernel = Any()


@pytest.fixture
def shown(monkeypatch):
    """Act as a notebook; the list receives what is displayed."""
    bundles = []
    shell = Kernel()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    monkeypatch.setattr(
        "IPython.display.display", lambda bundle, raw: bundles.append(bundle)
    )
    return bundles


def test_a_terminal_gets_the_plain_source(capsys):
    display.show(cost.wire_bytes)
    out = capsys.readouterr().out
    assert out.startswith("def wire_bytes(")
    assert out.endswith("\n")
    assert "<" not in out.split('"""')[0]


def test_a_notebook_gets_coloured_source_and_plain_text(shown):
    display.show(cost.wire_bytes)
    (bundle,) = shown
    assert "labpkg.planning.cost.wire_bytes" in bundle["text/html"]
    assert 'class="lab-source"' in bundle["text/html"]
    assert bundle["text/plain"].startswith("def wire_bytes(")


def test_colours_are_legible_on_white_and_on_the_dark_page(shown):
    display.show(display)
    html = shown[0]["text/html"]
    colours = set(re.findall(r"[ \"]color: (#\w{6})", html, re.I))
    assert len(colours) >= 4
    for colour in colours:
        for page in ("#ffffff", "#121212"):
            assert contrast(colour, page) > 4, (colour, page)


def contrast(first: str, second: str) -> float:
    low, high = sorted(luminance(colour) for colour in (first, second))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
    ]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_methods_are_dedented_and_wrappers_are_opened(capsys):
    class Holder:
        @functools.cache  # noqa: B019
        def method(self):
            return 1

    display.show(Holder.method)
    assert capsys.readouterr().out.startswith("@functools.cache")
    display.show(functools.partial(cost.wire_bytes, "send"))
    assert capsys.readouterr().out.startswith("def wire_bytes(")


@pytest.mark.parametrize("thing", [3, len, "text"])
def test_what_has_no_source_is_refused_with_a_remedy(thing):
    with pytest.raises(TypeError, match="pass a function, a class or a module"):
        display.show(thing)

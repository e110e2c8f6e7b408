"""Show the library's own source, so that a chapter does not copy it.

`lab.show(lab.DataParallel)` gives the highlighted source in a notebook and prints it
everywhere else. What the reader sees is what runs: it is read with `inspect`. The
colours are written into the output and are legible on light and on dark pages, so that
a stored output needs no style sheet.

Chapters: all of them.
"""

from __future__ import annotations

import functools
import html
import inspect
import sys
import textwrap
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from pygments.formatter import Formatter

__all__ = ["show"]


def show(obj: Any) -> None:
    """Show the source of a function, class, method or module.

    In a notebook the source is highlighted and headed by its name and file; in a
    terminal, a script or a rank it is printed.

    Args:
        obj: What to show.

    Raises:
        TypeError: if `obj` has no Python source, such as a number or a built-in.
    """
    target = inspect.unwrap(obj) if callable(obj) else obj
    if isinstance(target, functools.partial):
        target = target.func
    try:
        source = textwrap.dedent(inspect.getsource(target)).rstrip() + "\n"
    except (TypeError, OSError) as error:
        raise TypeError(
            f"show needs an object with Python source, got {obj!r}; "
            "pass a function, a class or a module"
        ) from error
    if _in_notebook():
        _display(source, _title(target))
    else:
        print(source, end="")


def _title(target: Any) -> str:
    if inspect.ismodule(target):
        return target.__name__
    return f"{target.__module__}.{target.__qualname__}"


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and shell.has_trait("kernel")


def _display(source: str, title: str) -> None:
    from IPython.display import display
    from pygments import highlight
    from pygments.lexers import PythonLexer

    caption = f"<em>{html.escape(title)}</em>"
    code = highlight(source, PythonLexer(), _formatter())
    display({"text/html": caption + code, "text/plain": source}, raw=True)


@functools.cache
def _formatter() -> Formatter[str]:
    from pygments.formatters import HtmlFormatter
    from pygments.style import Style
    from pygments.token import Comment, Keyword, Name, Number, Operator, String

    class BothModes(Style):
        """Middle tones on no background: they stand out from white and from black."""

        styles: ClassVar = {
            Comment: "italic #7a7a7a",
            Keyword: "#377dc7",
            Operator.Word: "#377dc7",
            Name.Decorator: "#9d63c9",
            Name.Function: "#b5661f",
            Name.Class: "#b5661f",
            String: "#438847",
            Number: "#9d63c9",
        }

    return HtmlFormatter(
        style=BothModes, noclasses=True, nobackground=True, cssclass="lab-source"
    )

"""What `labpkg run FILE.py:FUNCTION NAME=VALUE` names, found without running the file.

Importing the file of a user may take seconds and may already communicate; reading its
syntax tree does neither, so a wrong name is answered before any rank is started.

Chapter: runs/beyond_one_machine.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def find_function(target: str) -> tuple[str, str, ast.arguments]:
    """Find a function of a file.

    Args:
        target: Such as "job.py:main".

    Returns:
        The path of the file, the name of the function, and its parameters.

    Raises:
        ValueError: If there is no such file or function, or the file cannot be read.
    """
    path, _, function = target.rpartition(":")
    if not path or not function.isidentifier():
        raise ValueError(f"{target!r} is not FILE.py:FUNCTION; write e.g. job.py:main")
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
    except OSError as error:
        raise ValueError(f"cannot read {path!r}: {error.strerror}") from None
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None
    except ValueError as error:  # such as a null byte
        raise ValueError(f"{path} is not Python: {error}") from None
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    parameters = {node.name: node.args for node in nodes}
    if function not in parameters:
        known = ", ".join(parameters) or "none"
        raise ValueError(f"{path} defines no function {function!r}; it has: {known}")
    return str(Path(path).resolve()), function, parameters[function]


def parse_arguments(given: Sequence[str], parameters: ast.arguments) -> dict[str, Any]:
    """Return what a function is called with.

    Args:
        given: Such as "steps=100"; a value is JSON or else text.
        parameters: Those of the function.

    Returns:
        Keyword arguments.

    Raises:
        ValueError: If one is unknown, comes twice, is missing, or is no pair.
    """
    values: dict[str, Any] = {}
    for argument in given:
        name, is_pair, text = argument.partition("=")
        if not is_pair:
            raise ValueError(f"{argument!r} is not NAME=VALUE; write e.g. steps=100")
        if name in values:
            raise ValueError(f"{name} is given twice; leave one out")
        values[name] = _parse_value(text)
    needed, optional = _names(parameters)
    unknown = [name for name in values if name not in needed + optional]
    if unknown and parameters.kwarg is None:
        known = ", ".join(needed + optional) or "none"
        raise ValueError(f"the function takes no {unknown[0]!r}; it takes: {known}")
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(
            f"the function needs {missing[0]!r}; give it as {missing[0]}=VALUE"
        )
    return values


def _names(parameters: ast.arguments) -> tuple[list[str], list[str]]:
    """Return the names of parameters without and with a default."""
    places = [p.arg for p in (*parameters.posonlyargs, *parameters.args)]
    num_needed = len(places) - len(parameters.defaults)
    needed, optional = places[:num_needed], places[num_needed:]
    for parameter, default in zip(
        parameters.kwonlyargs, parameters.kw_defaults, strict=True
    ):
        (needed if default is None else optional).append(parameter.arg)
    return needed, optional


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text

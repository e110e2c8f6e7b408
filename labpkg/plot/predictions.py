"""Predictions: a sum of terms as a bar, and predicted against measured numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from labpkg.planning.terms import Term, total
from labpkg.plot.appearance import axes_or_new, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNITS = MappingProxyType(
    {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "s": 1, "ms": 1e-3, "us": 1e-6}
)
_PALETTE = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"),
    *("#F0E442", "#999999", "#003F63", "#8A5F00"),
)
_OTHER, _REST = "other", "#BBBBBB"
_MARKS = ("o", "s", "^", "D", "v", "P")


def terms(
    bars: Mapping[str, Iterable[Term]],
    *,
    unit: str,
    limit: float | None = None,
    limit_label: str = "limit",
    smallest: float = 0.01,
    colors: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw predictions as stacked bars, one for each, a colour for each term.

    Args:
        bars: Terms, in bytes or seconds, by the label of their bar.
        unit: Of the axis: B, KiB, MiB, GiB, s, ms or us.
        limit: In bytes or seconds: a dashed line, such as the memory of a GPU.
        limit_label: What the line is.
        smallest: Terms that are a smaller part of the longest bar in every bar are
            drawn as one, `other`.
        colors: Of terms by name, where they must be the same in several figures.
        ax: Where to draw; a new figure without it.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no bar, a term is negative, or the unit is unknown.
    """
    given = {label: list(own) for label, own in bars.items()}
    _check_terms(given, unit)
    threshold = smallest * max(total(own) for own in given.values())
    rows = {label: _values(own) for label, own in given.items()}
    names = _names(rows, threshold)
    shades = _shades(names, colors or {})
    with style():
        ax = axes_or_new(ax, height=max(1.8, 0.9 + 0.4 * len(rows)))
        left = dict.fromkeys(rows, 0.0)
        for name in names:
            widths = [_width(row, name, names) / _UNITS[unit] for row in rows.values()]
            starts = list(left.values())
            ax.barh(list(rows), widths, left=starts, color=shades[name], label=name)
            left = {k: x + w for (k, x), w in zip(left.items(), widths, strict=True)}
        if limit is not None:
            ax.axvline(limit / _UNITS[unit], color="k", ls="--", label=limit_label)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(unit)
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return ax


def _check_terms(bars: Mapping[str, Sequence[Term]], unit: str) -> None:
    if unit not in _UNITS:
        raise ValueError(f"unit={unit!r} is unknown; choose one of {', '.join(_UNITS)}")
    if not bars:
        raise ValueError("there are no bars; give terms by the label of their bar")
    for label, own in bars.items():
        for term in own:
            if term.value < 0:
                raise ValueError(
                    f"{term.name}={term.value} of {label!r} is negative; a stacked bar "
                    "shows parts of a sum"
                )


def _values(own: Sequence[Term]) -> dict[str, float]:
    values: dict[str, float] = {}
    for term in own:
        values[term.name] = values.get(term.name, 0.0) + term.value
    return values


def _names(rows: Mapping[str, Mapping[str, float]], threshold: float) -> list[str]:
    """Return the terms to name, in order of appearance, and `other` if any is left."""
    seen = dict.fromkeys(name for row in rows.values() for name in row)
    large = [n for n in seen if max(r.get(n, 0.0) for r in rows.values()) >= threshold]
    rest = sum(row[name] for row in rows.values() for name in row if name not in large)
    return [*large, _OTHER] if rest > 0 else large


def _shades(names: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    free = itertools.cycle([c for c in _PALETTE if c not in given.values()])
    found = {_OTHER: _REST, **given}
    return {name: found.get(name) or next(free) for name in names}


def _width(row: Mapping[str, float], name: str, names: Sequence[str]) -> float:
    if name == _OTHER:
        return sum(value for other, value in row.items() if other not in names)
    return row.get(name, 0.0)


def predicted(
    groups: Mapping[str, Iterable[tuple[float, float]]],
    *,
    quantity: str = "tokens/s per GPU",
    ax: Axes | None = None,
) -> Axes:
    """Draw predicted against measured numbers, both logarithmic, a mark per group.

    The dashed line is where both are equal; on the dotted ones they differ by a factor
    of two.

    Args:
        groups: Pairs (predicted, measured), positive, by the name of their group.
        quantity: What the numbers are, with its unit.
        ax: Where to draw; a new figure without it.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no pair, or a number is not positive.
    """
    given = {name: list(pairs) for name, pairs in groups.items()}
    numbers = [number for pairs in given.values() for pair in pairs for number in pair]
    if not numbers or min(numbers) <= 0:
        raise ValueError(
            f"a logarithmic figure needs positive pairs, got {len(numbers) // 2} pairs "
            f"with smallest number {min(numbers, default=None)}; leave out what failed"
        )
    low, high = min(numbers) / 1.3, max(numbers) * 1.3
    with style():
        ax = axes_or_new(ax, height=3.6)
        for factor, dash in ((1, "--"), (2, ":"), (0.5, ":")):
            ax.plot([low, high], [low * factor, high * factor], "k", ls=dash, lw=1)
        for i, (name, pairs) in enumerate(given.items()):
            if pairs:
                y, x = zip(*pairs, strict=True)
                mark = _MARKS[i % len(_MARKS)]
                ax.plot(x, y, mark, ms=3, mew=0, alpha=0.6, label=name)
        ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        ax.set_aspect("equal")
        ax.set_xlabel(f"measured {quantity}")
        ax.set_ylabel(f"predicted {quantity}")
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, markerscale=2)
    return ax

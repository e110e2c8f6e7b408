"""What an optimizer sees: the contours of a function and the curvatures at a point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from labpkg.plot.appearance import axes_or_new, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

_GRID = 121  # points of each side
_LIGHT = "#C8C8C8"


def contours(
    surface: Callable[[Any, Any], Any] | Sequence[Sequence[float]],
    trajectories: Mapping[str, Sequence[Sequence[float]]] | None = None,
    *,
    ax: Axes | None = None,
    xlim: tuple[float, float] | None = None,
    ylim: tuple[float, float] | None = None,
    num_levels: int = 12,
) -> Axes:
    """Draw the contour lines of a function of two numbers, and paths across them.

    The levels are quantiles of the values in view: narrow valleys keep their lines.

    Args:
        surface: A function of two NumPy arrays, element by element; or the symmetric
            matrix A of the quadratic x^T A x / 2.
        trajectories: By name, the points (x, y) that an optimizer visited, the start
            first. Points that are not finite end a path.
        ax: Where to draw; a new figure of 6.4 x 3.2 inches without it.
        xlim: Of the picture; by default what the paths need, with the origin.
        ylim: As `xlim`.
        num_levels: Contour lines.

    Returns:
        The axes. A dot marks each point, a larger one the start.

    Raises:
        ValueError: If there is neither a path nor both limits, a path has no finite
            point (x, y), or the matrix is not symmetric 2 x 2.
    """
    paths = {name: _path(name, it) for name, it in (trajectories or {}).items()}
    xlim, ylim = (
        given or _limits(paths, column) for column, given in enumerate((xlim, ylim))
    )
    x, y = np.meshgrid(np.linspace(*xlim, _GRID), np.linspace(*ylim, _GRID))
    values = np.asarray(_function(surface)(x, y), dtype=float)
    shares = np.linspace(0, 1, num_levels + 2)[1:-1] ** 2  # closer near the minimum
    levels = np.unique(np.quantile(values, shares))
    with style():
        ax = axes_or_new(ax)
        ax.contour(x, y, values, levels=levels, colors=_LIGHT, linewidths=0.8)
        for name, path in paths.items():
            (line,) = ax.plot(*path.T, "o-", markersize=2.5, linewidth=1, label=name)
            ax.plot(*path[0], "o", color=line.get_color(), markersize=6)
        ax.set(xlim=xlim, ylim=ylim, xlabel="first parameter")
        ax.set_ylabel("second parameter")
        ax.grid(visible=False)
        if any(paths):  # one has a name
            ax.legend()
    return ax


def spectrum(
    eigenvalues: Sequence[float] | Mapping[str, Sequence[float]],
    *,
    ax: Axes | None = None,
    theory: float | None = None,
    theory_label: str = "theory",
) -> Axes:
    """Plot eigenvalues, the largest first, on a logarithmic axis.

    Args:
        eigenvalues: Real numbers, for example of a Hessian; or several sets by name.
        ax: Where to draw; a new figure of 6.4 x 3.2 inches without it.
        theory: A value that theory names, such as 2 / lr, drawn as a dashed line.
        theory_label: What the dashed line is, for the legend.

    Returns:
        The axes. A negative eigenvalue is drawn at its size, as a hollow dot; a zero
        has no place on this axis.

    Raises:
        ValueError: If a set is empty or no vector, or a number is not finite.
    """
    named = isinstance(eigenvalues, Mapping)
    sets = eigenvalues if isinstance(eigenvalues, Mapping) else {"": eigenvalues}
    arrays = {name: np.asarray(values, dtype=float) for name, values in sets.items()}
    if not arrays or any(
        not (a.ndim == 1 and a.size and np.isfinite(a).all()) for a in arrays.values()
    ):
        raise ValueError(
            "a spectrum needs a vector of eigenvalues in each set, not empty and all "
            f"finite, got shapes {[a.shape for a in arrays.values()]}; pass e.g. "
            "torch.linalg.eigvalsh(hessian)"
        )
    with style():
        ax = axes_or_new(ax)
        for index, (name, values) in enumerate(arrays.items()):
            values = values[np.argsort(-abs(values), kind="stable")]
            place, dots = np.arange(1, len(values) + 1), f"oC{index}"
            up, down = values > 0, values < 0
            ax.plot(place[up], values[up], dots, markersize=4, label=name or None)
            ax.plot(place[down], -values[down], dots, markersize=4, fillstyle="none")
        if theory is not None:
            ax.axhline(theory, color="black", linestyle="--", label=theory_label)
        ax.set(yscale="log", xlabel="number, the largest first", ylabel="eigenvalue")
        if named or theory is not None:
            ax.legend()
    return ax


def _path(name: str, points: Sequence[Sequence[float]]) -> NDArray[Any]:
    """Return the points before the first one that is not finite, (K, 2)."""
    path = np.asarray(points, dtype=float)
    if path.ndim == 2 and path.shape[1] == 2:
        finite = np.isfinite(path).all(axis=1)
        path = path[: len(path) if finite.all() else int(finite.argmin())]
        if len(path):
            return path
    raise ValueError(
        f"the trajectory {name!r} has shape {np.shape(points)}, or its start is not "
        "finite; pass points (x, y), the start first"
    )


def _limits(paths: Mapping[str, NDArray[Any]], column: int) -> tuple[float, float]:
    if not paths:
        raise ValueError(
            "without trajectories the picture has no limits; pass xlim=(-2, 2) and "
            "ylim=(-2, 2)"
        )
    seen = np.concatenate([path[:, column] for path in paths.values()])
    low, high = min(0.0, seen.min()), max(0.0, seen.max())
    margin = 0.15 * (high - low) or 1.0
    return low - margin, high + margin


def _function(surface: Any) -> Callable[[Any, Any], Any]:
    if callable(surface):
        return surface
    matrix = np.asarray(surface, dtype=float)
    if matrix.shape != (2, 2) or matrix[0, 1] != matrix[1, 0]:
        raise ValueError(
            f"a quadratic needs a symmetric 2 x 2 matrix, got {surface}; pass "
            "(A + A.T) / 2, or a function of x and y"
        )
    (a, b), (_, c) = matrix
    return lambda x, y: (a * x * x + 2 * b * x * y + c * y * y) / 2

"""Draw the map of the chapters from `_toc.yml` into book/figures/chapter_map.svg.

The file is committed, so that the page shows it everywhere; a test draws it again and
compares. Text is drawn as paths with a fixed salt: the same table of contents gives the
same bytes.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from labpkg.plot import COLORS
from scripts.notebooks import ROOT, page_title, toc_files, toc_parts

TARGET = ROOT / "book" / "figures" / "chapter_map.svg"
WIDTH, HEIGHT, GAP = 1.0, 0.62, 0.28
PART_COLORS = [COLORS[name] for name in ("idle", "dp", "tp", "pp", "cp", "ep")]


def box(ax: Axes, x: float, y: float, text: str, color: str) -> None:
    """Draw one chapter."""
    ax.add_patch(
        FancyBboxPatch(
            (x, y),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=to_rgba(color, 0.25),
            edgecolor=color,
            linewidth=1.2,
        )
    )
    lines = textwrap.fill(text, 17)
    ax.text(
        x + WIDTH / 2, y + HEIGHT / 2, lines, ha="center", va="center", fontsize=8.5
    )


def draw(path: Path = TARGET, root: Path = ROOT) -> None:
    """Draw the map of the book under `root` into `path`."""
    titles = {
        str(file.relative_to(root).with_suffix("")): page_title(file)
        for file in toc_files(root)
    }
    parts = toc_parts(root)
    parts = {name: parts[name] for name in parts if name not in ("", "Reference")}
    rows = max(len(pages) for pages in parts.values())
    settings: dict[Any, Any] = {"svg.hashsalt": "chapter map", "svg.fonttype": "path"}
    with matplotlib.rc_context(settings):
        size = (1.6 * len(parts), 0.5 + 0.95 * rows)
        fig, ax = plt.subplots(figsize=size, layout="constrained")
        for column, (name, pages) in enumerate(parts.items()):
            x = column * (WIDTH + GAP)
            color = PART_COLORS[column % len(PART_COLORS)]
            ax.text(x + WIDTH / 2, 0.2, name, ha="center", fontsize=10, weight="bold")
            for row, page in enumerate(pages):
                y = -(row + 1) * (HEIGHT + GAP) + GAP
                box(ax, x, y, titles[page], color)
                if row:
                    arrow(ax, (x + WIDTH / 2, y + HEIGHT + GAP), (0, -GAP))
            if column:
                arrow(ax, (x - GAP, -HEIGHT / 2), (GAP, 0))
        ax.set(xlim=(-0.05, len(parts) * (WIDTH + GAP) - GAP + 0.05))
        ax.set(ylim=(-rows * (HEIGHT + GAP) + GAP - 0.05, 0.45))
        ax.axis("off")
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, metadata={"Date": None})
        plt.close(fig)


def arrow(ax: Axes, start: tuple[float, float], step: tuple[float, float]) -> None:
    """Draw the arrow from one chapter to the next."""
    end = (start[0] + step[0], start[1] + step[1])
    style = {"arrowstyle": "->", "color": "#555555", "shrinkA": 2, "shrinkB": 2}
    ax.annotate("", end, start, arrowprops=style)


if __name__ == "__main__":
    draw()

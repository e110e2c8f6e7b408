"""A figure that is stepped through: frames, a slider and a play button.

Everything is inside one piece of HTML, so a player works in a notebook, in the static
page and without a network. (matplotlib's `to_jshtml` fetches its icons from another
host, names its parts at random and says nothing to a screen reader.)
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labpkg.plot.appearance import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS_PER_FRAME = 64  # a palette keeps a frame at some kilobytes
_PAGE = """\
<figure class="lab-player" data-key="{key}">
<img src="{first}" alt="{alt}" style="max-width: 100%; height: auto">
<div style="display: flex; gap: 0.6em; align-items: center">
<button type="button" aria-label="Play or pause" style="width: 2.4em">&#9654;</button>
<input type="range" min="0" max="{last}" value="0" step="1" aria-label="{slider}"
 style="flex: 1; min-width: 4em">
<output style="min-width: {width}ch">{label}</output>
</div>
<figcaption>{caption}</figcaption>
<script>
document.querySelectorAll('[data-key="{key}"]:not([data-ready])').forEach((player) => {{
  const frames = {frames}, labels = {labels};
  const part = (name) => player.querySelector(name);
  const image = part("img"), slider = part("input"), button = part("button");
  let timer = null;
  const stop = () => {{
    clearInterval(timer);
    timer = null;
    button.textContent = "\\u25b6";
  }};
  const show = (number) => {{
    slider.value = number;
    image.src = frames[number];
    part("output").textContent = labels[number];
    slider.setAttribute("aria-valuetext", labels[number]);
  }};
  const next = () => {{
    if (+slider.value === frames.length - 1) stop();
    else show(+slider.value + 1);
  }};
  slider.addEventListener("input", () => {{ stop(); show(+slider.value); }});
  button.addEventListener("click", () => {{
    if (timer) return stop();
    if (+slider.value === frames.length - 1) show(0);
    button.textContent = "\\u23f8";
    timer = setInterval(next, {interval_ms});
  }});
  player.dataset.ready = "yes";
  show(0);
}});
</script>
</figure>"""


@dataclass(frozen=True, slots=True)
class Player:
    """What `player` returns: shown by a notebook as the last value of a cell.

    Attributes:
        page: The HTML, with all frames inside.
        num_frames: How many there are.
    """

    page: str
    num_frames: int

    def __repr__(self) -> str:
        return f"Player({self.num_frames} frames)"

    def _repr_html_(self) -> str:
        return self.page


def player(
    draw: Callable[[Any, Axes], None],
    frames: Sequence[Any],
    *,
    label: Callable[[Any], str] = str,
    alt: str,
    caption: str = "",
    height: float = 3.2,
    interval_s: float = 0.4,
) -> Player:
    """Return a figure with a slider that works without a kernel.

    Every frame is drawn once, now, and stored as a picture.

    Args:
        draw: Called as draw(frame, ax) with empty axes; keep the limits of the axes
            equal from frame to frame.
        frames: One value for each position of the slider.
        label: Turns a frame into the text beside the slider.
        alt: What one sees, for those who do not.
        caption: The text below.
        height: Of the figure, 6.4 inches wide.
        interval_s: Seconds per frame while it plays.

    Returns:
        An object that a notebook shows.

    Raises:
        ValueError: If there are no frames or there is no alternative text.
    """
    if len(frames) == 0 or not alt.strip():
        raise ValueError(
            f"a player needs frames and an alternative text, got {len(frames)} frames "
            f"and alt={alt!r}; say in a sentence what the pictures show"
        )
    labels = [label(frame) for frame in frames]
    pictures = [_picture(draw, frame, height) for frame in frames]
    key = hashlib.sha256("".join([*pictures, *labels]).encode()).hexdigest()[:12]
    page = _PAGE.format(
        key=f"player-{key}",
        first=pictures[0],
        alt=html.escape(alt),
        last=len(frames) - 1,
        slider="Frame",
        width=max(map(len, labels)),
        label=html.escape(labels[0]),
        caption=html.escape(caption),
        frames=json.dumps(pictures),
        labels=json.dumps(labels).replace("</", "<\\/"),
        interval_ms=round(1000 * interval_s),
    )
    return Player(page, len(frames))


def _picture(draw: Callable[[Any, Axes], None], frame: Any, height: float) -> str:
    """Draw one frame and return it as a data URI."""
    from matplotlib import pyplot as plt

    with style():
        figure, ax = plt.subplots(figsize=(6.4, height))
        try:
            draw(frame, ax)
            png = _png(figure)
        finally:
            plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _png(figure: Figure) -> bytes:
    """Return a figure as a PNG with a small palette."""
    from PIL import Image

    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=150)
    image = Image.open(raw).convert("RGB").quantize(_COLORS_PER_FRAME)
    image.save(small, format="png", optimize=True)
    return small.getvalue()

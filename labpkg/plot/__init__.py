"""Figures of the book, one function for each kind: `lab.plot.<kind>(data, *, ax=None)`.

Each function draws on the given axes, or on a new figure of the book's size, and
returns the axes. Nothing changes matplotlib's global settings: `style()` applies the
book's settings inside a `with` block and restores the old ones, and each function uses
it. Theory is dashed, measurements are solid, axes carry units, and the colours of
`COLORS` mean the same on every page (Okabe and Ito's palette, which does not rely on
telling red from green). The background is white, which stays legible on a dark page.

Chapters: all of them; first used in parallelism/data_parallel.
"""

from labpkg.plot.appearance import COLORS, style
from labpkg.plot.attention_maps import attention
from labpkg.plot.bandwidths import bandwidth
from labpkg.plot.curves import loss
from labpkg.plot.landscapes import contours, spectrum
from labpkg.plot.latencies import time_by_size
from labpkg.plot.matrices import confusion
from labpkg.plot.meshes import mesh
from labpkg.plot.pieces import pieces
from labpkg.plot.players import player
from labpkg.plot.predictions import predicted, terms
from labpkg.plot.records import recorded
from labpkg.plot.schedules import pipeline, schedule, schedule_player
from labpkg.plot.timelines import timeline

__all__ = [
    "COLORS",
    "attention",
    "bandwidth",
    "confusion",
    "contours",
    "loss",
    "mesh",
    "pieces",
    "pipeline",
    "player",
    "predicted",
    "recorded",
    "schedule",
    "schedule_player",
    "spectrum",
    "style",
    "terms",
    "time_by_size",
    "timeline",
]

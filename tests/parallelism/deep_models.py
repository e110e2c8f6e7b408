"""Models that a pipeline of eight stages can cut, each with something that breaks one.

They are sequences of units: parts of other stages are frozen, are not used, have no
parameters, share a weight, or change the shape of what travels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

import labpkg as lab
from tests.parallelism.models import (
    GPT_CONFIG,
    VOCAB_SIZE,
    WIDTH,
    Branches,
    Case,
    draw_images,
    draw_tokens,
    draw_vectors,
)


class Chain(nn.Module):
    """Units in a dictionary, whose names are no numbers."""

    def __init__(self, **units: nn.Module) -> None:
        super().__init__()
        self.units = nn.ModuleDict(units)

    def pipeline_units(self) -> list[nn.Module]:
        return list(self.units.values())

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units.values():
            x = unit(x)
        return x


class Gain(nn.Module):
    """A number that every second unit shares, and one that nobody uses."""

    def __init__(self, gain: nn.Parameter) -> None:
        super().__init__()
        self.gain = gain
        self.never = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.gain)


def _frozen() -> nn.Module:
    """Return stages that learn nothing, or have nothing to learn, among others."""
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(5)]
    for i in (0, 2, 4):
        layers[i].requires_grad_(False)
    layers[3].weight.requires_grad_(False)
    return nn.Sequential(
        layers[0],
        nn.Tanh(),
        layers[1],
        nn.Tanh(),
        layers[2],
        layers[3],
        nn.Tanh(),
        nn.ReLU(),
        layers[4],
    )


def _odd() -> nn.Module:
    """Return layers that give another shape each, up to a single feature."""
    widths = (WIDTH, 1, 7, 3, 5)
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.PReLU()]
    return nn.Sequential(*layers)


def _convolution() -> nn.Module:
    """Return images, then vectors; the statistics of the norm are random buffers."""
    norm = nn.BatchNorm2d(4).eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        norm,
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.GroupNorm(1, 3),
        nn.Flatten(),
        nn.Linear(60, 7),
        nn.Tanh(),
        nn.Linear(7, WIDTH),
    )


def _tied() -> nn.Module:
    """Return an embedding that is the head too, and a gain of four stages."""
    embed, head = nn.Embedding(VOCAB_SIZE, WIDTH), nn.Linear(WIDTH, VOCAB_SIZE, False)
    head.weight = embed.weight
    gain = nn.Parameter(torch.rand(()) + 0.5)
    units: dict[str, nn.Module] = {"embed": embed}
    for i in range(3):
        units |= {f"gain{i}": Gain(gain), f"body{i}": nn.Linear(WIDTH, WIDTH)}
    return Chain(**units, last=Gain(gain), head=head)


def _branches() -> nn.Module:
    """Return units of which samples, and stages, leave out some parameters."""
    units = [unit for _ in range(4) for unit in (Branches(), nn.Tanh())]
    return nn.Sequential(*units)


def _mlp() -> nn.Module:
    return lab.MLP(WIDTH, 24, WIDTH, 24, WIDTH, WIDTH)


def _smooth() -> nn.Module:
    """Return layers in which no gradient is zero but for rounding."""
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    units = [unit for layer in layers for unit in (layer, nn.Tanh())]
    return nn.Sequential(*units, nn.Linear(WIDTH, WIDTH))


DEEP = {
    "deep_mlp": Case(_mlp, draw_vectors(WIDTH)),
    "deep_gpt": Case(
        lambda: lab.GPT(replace(GPT_CONFIG, num_layers=6)),
        draw_tokens,
        lab.cross_entropy,
    ),
}
"""The models of the book, with eight units or more."""

DEEP_UNTUNED = {
    "deep_frozen": Case(_frozen, draw_vectors(WIDTH)),
    "deep_odd": Case(_odd, draw_vectors(5)),
    "deep_convolution": Case(_convolution, draw_images),
    "deep_tied": Case(_tied, draw_tokens, lab.cross_entropy),
    "deep_branches": Case(_branches, draw_vectors(WIDTH)),
    "deep_bfloat16": Case(_smooth, draw_vectors(WIDTH), dtype=torch.bfloat16),
}
"""The models that nobody tuned a pipeline for."""

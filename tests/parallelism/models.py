"""Models that nobody tuned an engine for, and one batch of data for each step.

Each has something that breaks engines: weights that are used twice, weights that are
not used, buffers, sizes that divide by nothing. `CASES` says how to build one and what
to feed it; tests of every engine train them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import labpkg as lab

GLOBAL_BATCH_SIZE = 24  # shards over 2, 3 and 4 ranks, in 1 or 2 micro-batches
# Kernels round by the alignment of memory. In all models but `odd` parameters end at an
# even element, so flat buffers move them without changing a bit of what they compute.
# Two, three and four ranks can divide the width.
WIDTH = 12
VOCAB_SIZE = 12
LENGTH = 12  # T of the sequences that ranks may divide


class ConvWithBuffers(nn.Module):
    """The statistics of the norm are random buffers: ranks start from others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4).eval()
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        self.register_buffer("scale", torch.rand(1))
        self.out = nn.Linear(80, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        return self.out(y.flatten(1) * self.scale)


class Recurrent(nn.Module):
    """`nn.LSTM` keeps a list of its own weights beside `named_parameters`."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True)
        self.out = nn.Linear(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """The output weights are the embedding: backward reaches them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(tokens))))


class Branches(nn.Module):
    """`never` is used by nobody, `sometimes` only by samples with x[0] > 0."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(WIDTH, WIDTH)
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.never = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        if (x[:, 0] > 0).any():
            y = y + self.sometimes(y) * (x[:, :1] > 0)
        return y


class OneParameter(nn.Module):
    """A single parameter, held by the root module and called by no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Frozen(nn.Module):
    """A backbone without gradients, then a head that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(WIDTH, 24).requires_grad_(False)
        self.head = nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.backbone(x)))


class Block(nn.Module):
    """Layers in a dictionary, and numbers without a dimension beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(()))
        self.offset = nn.Parameter(torch.rand(()))
        up, down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.layers = nn.ModuleDict({"up": up, "down": down})

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers["down"](torch.relu(self.layers["up"](x)))
        return x + self.gain * y + self.offset


class Nested(nn.Module):
    """Modules in lists in dictionaries; `shared` is called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.shared = Block()
        self.stack = nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), Block())])

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x + self.shift)
        for part in self.stack:
            x = part(x)
        return self.shared(x)


class Sequences(nn.Module):
    """Layers over (B, T, D): a convolution over T, then norms, of which one is frozen.

    The sizes of the convolution are odd, `never` is used by nobody, and `enter` marks
    where the positions may be dealt out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 7, 3, padding=1)
        self.widen = nn.Linear(7, WIDTH)
        self.enter = nn.Identity()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.frozen = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.never = nn.RMSNorm(WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.transpose(1, 2)).transpose(1, 2)
        y = self.enter(self.widen(torch.tanh(y)))
        y = y + self.down(torch.relu(self.up(self.norm(y))))
        return self.out(self.frozen(y))


def _odd() -> nn.Module:
    """Return layers of 41 parameters in all, a prime."""
    return nn.Sequential(
        nn.Linear(WIDTH, 1), nn.Linear(1, 3), nn.PReLU(), nn.Linear(3, 5), nn.PReLU()
    )


def _odd_beside() -> nn.Module:
    """Return layers of odd sizes around two that ranks can divide."""
    return nn.Sequential(
        nn.Linear(WIDTH, 7),
        nn.PReLU(),
        nn.Linear(7, 24),
        nn.Tanh(),
        nn.Linear(24, 5),
        nn.PReLU(),
    )


GPT_CONFIG = lab.GPTConfig(
    num_layers=2,
    width=WIDTH,
    num_heads=12,
    sequence_length=LENGTH,
    vocab_size=VOCAB_SIZE,
)


def draw_vectors(
    num_outputs: int,
) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = _normal(generator, WIDTH)
        # Sorted by x[0]: the first ranks never take the branch of `Branches`.
        x[:, 0] = torch.linspace(-1, 1, GLOBAL_BATCH_SIZE, dtype=x.dtype)
        return x, _normal(generator, num_outputs)

    return draw


def draw_images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return _normal(generator, 1, 4, 5), _normal(generator, WIDTH)


def draw_sequences(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return _normal(generator, 5, 4), _normal(generator, WIDTH)


def draw_long_sequences(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return _normal(generator, LENGTH, 5), _normal(generator, LENGTH, WIDTH)


def draw_tokens(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = (2, GLOBAL_BATCH_SIZE, LENGTH)
    x, y = torch.randint(VOCAB_SIZE, shape, generator=generator, device="cpu")
    return x, y


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    shape = (GLOBAL_BATCH_SIZE, *shape)
    return torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")


def mean_squared(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean over all elements."""
    return ((output - target) ** 2).mean()


@dataclass(frozen=True)
class Case:
    """A model, its data and its loss, a mean over samples."""

    build: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor] = mean_squared
    dtype: torch.dtype = torch.float64

    def model(self, seed: int, dtype: torch.dtype | None = None) -> nn.Module:
        """Build the model from a seed."""
        torch.manual_seed(seed)
        return self.build().to(dtype or self.dtype)

    def batch(
        self, step: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the global batch of a step; the first dimension is the sample."""
        generator = torch.Generator(device="cpu").manual_seed(1000 + step)
        x, y = self.draw(generator)
        if x.is_floating_point():
            return x.to(dtype or self.dtype), y.to(dtype or self.dtype)
        return x, y


TUNED = {
    "mlp": Case(lambda: lab.MLP(WIDTH, 24, WIDTH), draw_vectors(WIDTH)),
    "gpt": Case(lambda: lab.GPT(GPT_CONFIG), draw_tokens, lab.cross_entropy),
}
"""The models of the book."""

UNTUNED = {
    "convolution": Case(ConvWithBuffers, draw_images),
    "recurrent": Case(Recurrent, draw_sequences),
    "tied": Case(Tied, draw_tokens, lab.cross_entropy),
    "branches": Case(Branches, draw_vectors(WIDTH)),
    "one_parameter": Case(OneParameter, draw_vectors(WIDTH)),
    "odd": Case(_odd, draw_vectors(5)),
    "frozen": Case(Frozen, draw_vectors(WIDTH)),
    "nested": Case(Nested, draw_vectors(WIDTH)),
    "bfloat16": Case(
        lambda: lab.MLP(WIDTH, 24, WIDTH), draw_vectors(WIDTH), dtype=torch.bfloat16
    ),
}
"""The models that nobody tuned for; the tenth, without parameters, is an error."""

DIVISIBLE = {
    "odd_beside": Case(_odd_beside, draw_vectors(5)),
    "sequences": Case(Sequences, draw_long_sequences),
    "sequences_bfloat16": Case(Sequences, draw_long_sequences, dtype=torch.bfloat16),
}
"""More models, for engines that divide layers."""


def without_parameters() -> nn.Module:
    """Return a model that every engine refuses."""
    return nn.Sequential(nn.ReLU(), nn.Flatten())

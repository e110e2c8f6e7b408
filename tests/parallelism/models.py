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

VOCAB_SIZE = 11


class ConvWithBuffers(nn.Module):
    """The statistics of the norm are random buffers: ranks start from others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3).eval()
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        self.register_buffer("scale", torch.rand(1))
        self.out = nn.Linear(60, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        return self.out(y.flatten(1) * self.scale)


class Recurrent(nn.Module):
    """`nn.LSTM` keeps a list of its own weights beside `named_parameters`."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, num_layers=2, batch_first=True)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """The output weights are the embedding: backward reaches them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, VOCAB_SIZE, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(tokens))))


class Branches(nn.Module):
    """`never` is used by nobody, `sometimes` only by samples with x[0] > 0."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 6)
        self.sometimes = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        if (x[:, 0] > 0).any():
            y = y + self.sometimes(y) * (x[:, :1] > 0)
        return y


class OneParameter(nn.Module):
    """A single parameter, held by the root module and called by no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Frozen(nn.Module):
    """A backbone without gradients, then a head that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(6, 7).requires_grad_(False)
        self.head = nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.backbone(x)))


class Block(nn.Module):
    """A layer with layers in a dictionary and a scale of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(()))
        self.layers = nn.ModuleDict(
            {"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.layers["down"](torch.relu(self.layers["up"](x)))


class Nested(nn.Module):
    """Modules in lists in dictionaries; `shared` is called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(6))
        self.shared = Block(6)
        self.stack = nn.ModuleList([nn.Sequential(Block(6), nn.LayerNorm(6))])

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x + self.shift)
        for part in self.stack:
            x = part(x)
        return self.shared(x)


def _odd() -> nn.Module:
    """Return layers of 37 parameters in all, a prime."""
    return nn.Sequential(
        nn.Linear(6, 1), nn.Linear(1, 5), nn.PReLU(), nn.Linear(5, 3), nn.PReLU()
    )


def _gpt() -> nn.Module:
    config = lab.GPTConfig(
        num_layers=2, width=8, num_heads=2, sequence_length=5, vocab_size=VOCAB_SIZE
    )
    return lab.GPT(config)


def _vectors(num_outputs: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = _normal(generator, 6)
        # Sorted by x[0]: the first ranks never take the branch of `Branches`.
        x[:, 0] = torch.linspace(-1, 1, GLOBAL_BATCH_SIZE, dtype=x.dtype)
        return x, _normal(generator, num_outputs)

    return draw


def _images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return _normal(generator, 1, 4, 5), _normal(generator, 4)


def _sequences(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return _normal(generator, 4, 3), _normal(generator, 2)


def _tokens(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = (2, GLOBAL_BATCH_SIZE, 5)
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
    "mlp": Case(lambda: lab.MLP(6, 11, 6), _vectors(6)),
    "gpt": Case(_gpt, _tokens, lab.cross_entropy),
}
"""The models of the book."""

UNTUNED = {
    "convolution": Case(ConvWithBuffers, _images),
    "recurrent": Case(Recurrent, _sequences),
    "tied": Case(Tied, _tokens, lab.cross_entropy),
    "branches": Case(Branches, _vectors(6)),
    "one_parameter": Case(OneParameter, _vectors(6)),
    "odd": Case(_odd, _vectors(3)),
    "frozen": Case(Frozen, _vectors(6)),
    "nested": Case(Nested, _vectors(6)),
    "bfloat16": Case(lambda: lab.MLP(6, 11, 6), _vectors(6), dtype=torch.bfloat16),
}
"""The models that nobody tuned for; the tenth, without parameters, is an error."""

CASES = TUNED | UNTUNED


def without_parameters() -> nn.Module:
    """Return a model that every engine refuses."""
    return nn.Sequential(nn.ReLU(), nn.Flatten())

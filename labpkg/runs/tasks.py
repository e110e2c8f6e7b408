"""What is trained on what: data, model, baseline and sample of a run.

A task holds the training data, a fixed part of the validation data, and the loss of a
counting model on that part, which a trained model must beat: add-one smoothed bigrams
for text, class frequencies for images.

Chapters: foundations/training_loop, runs/checkpointing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from labpkg.foundations.models import GPT, MLP, GPTConfig
from labpkg.foundations.tables import digits
from labpkg.foundations.text import ByteWindows, file_text, stdlib_text
from labpkg.runs.config import MODELS, TrainConfig

_MAX_VALIDATION = 512  # samples: 65 kB of text tell the loss to about 0.03 nats
_PROMPT = b"def "
_SAMPLE_TOKENS = 200
Generate = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The data of a run.

    Attributes:
        train: Training samples.
        validation: Validation samples, evenly spaced over all there are.
        unit: What is counted: "tokens" or "samples".
    """

    train: ByteWindows | TensorDataset
    validation: TensorDataset
    unit: str

    @property
    def fingerprint(self) -> str:
        """A checksum of the training data."""
        tensors = (
            (self.train.text,)
            if isinstance(self.train, ByteWindows)
            else self.train.tensors
        )
        checksum = 0
        for tensor in tensors:
            checksum = zlib.crc32(tensor.numpy().data, checksum)
        return f"{checksum:08x}"

    def baseline(self) -> float:
        """Return the validation loss of the counting model, in nats."""
        x, y = self.validation.tensors
        if isinstance(self.train, ByteWindows):
            return bigram_loss(self.train.text, x, y)
        counts = torch.bincount(self.train.tensors[1]).double() + 1
        return -(counts / counts.sum()).log()[y].mean().item()


def load_task(config: TrainConfig) -> Task:
    """Read the data of a run.

    Args:
        config: Names the data and, by the model, the length of its windows.

    Raises:
        ValueError: If the data cannot be read or is too short.
    """
    if config.data == "digits":
        return Task(train=digits(), validation=digits("test"), unit="samples")
    length = MODELS[config.model_name].sizes["sequence_length"]
    if config.data == "stdlib":
        parts = [
            stdlib_text(s, sequence_length=length) for s in ("train", "validation")
        ]
    else:
        parts = [
            file_text(config.data, s, sequence_length=length)
            for s in ("train", "validation")
        ]
    train, validation = parts
    count = min(len(validation), _MAX_VALIDATION)
    chosen = torch.arange(count, device="cpu") * len(validation) // count
    return Task(
        train=train, validation=TensorDataset(*validation[chosen]), unit="tokens"
    )


def build_model(config: TrainConfig) -> nn.Module:
    """Return the freshly initialized model of a run, on torch's default device.

    Args:
        config: Names the model.
    """
    sizes = MODELS[config.model_name].sizes
    return GPT(GPTConfig(**sizes)) if sizes else MLP(64, 32, 10)


def tensor_parallel_plan(config: TrainConfig) -> dict[str, str] | None:
    """Return how tensor parallelism cuts the model of a run; None for a known model.

    Args:
        config: Names the model.
    """
    if config.model_name == "mlp" and config.tp > 1:
        return {"0": "column", "2": "row"}
    return None


def bigram_loss(text: Tensor, x: Tensor, y: Tensor) -> float:
    """Return the loss of predicting each byte from the one before it, by counting.

    p(y | x) = (count(x y) + 1) / (count(x) + 256): add-one smoothing.

    Args:
        text: Training bytes, uint8.
        x: Bytes, int64.
        y: The byte after each of x, int64.

    Returns:
        Nats per byte.
    """
    counts = torch.ones(256 * 256, dtype=torch.int64, device=text.device)
    for start in range(0, len(text) - 1, 2**20):  # in parts: an int64 is 8 bytes
        part = text[start : start + 2**20 + 1].long()
        counts += torch.bincount(256 * part[:-1] + part[1:], minlength=256 * 256)
    rows = counts.view(256, 256).double()
    log_probabilities = (rows / rows.sum(1, keepdim=True)).log()
    return -log_probabilities[x, y].mean().item()


def sample_text(generate: Generate, *, device: torch.device, seed: int) -> str:
    """Return text that a language model writes after `def `.

    Args:
        generate: The method of a `GPT` or of its composition.
        device: Where the model is.
        seed: Chooses the sample.
    """
    prompt = torch.tensor([list(_PROMPT)], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    tokens = generate(
        prompt, num_tokens=_SAMPLE_TOKENS, temperature=0.8, generator=generator
    )
    return bytes(tokens[0].tolist()).decode(errors="replace")

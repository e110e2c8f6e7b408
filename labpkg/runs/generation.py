"""Text from a GPT whose parts take whole windows only.

A pipeline agrees on shapes before it moves anything, and sequence parallelism divides
the positions evenly: neither takes one more token at a time. Attention is causal, so
tokens that follow do not matter, and a prompt may be filled up to a whole window.

Chapter: planning/device_mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from labpkg.foundations.models import GPT, GPTConfig


class _Windows:
    """What `GPT.generate` needs of a GPT."""

    def __init__(self, logits: Callable[[Tensor], Tensor], config: GPTConfig) -> None:
        self._logits, self.config, self.blocks = logits, config, ()

    def __call__(self, tokens: Tensor, caches: None) -> Tensor:
        length = tokens.shape[1]
        window = F.pad(tokens, (0, self.config.sequence_length - length))
        return self._logits(window)[:, :length]


def generate_by_windows(
    logits: Callable[[Tensor], Tensor],
    config: GPTConfig,
    prompt: Tensor,
    **options: Any,
) -> Tensor:
    """Continue a prompt as `GPT.generate` does, each token by a whole window.

    Args:
        logits: What the model makes of tokens (B, T) with T the sequence length.
        config: Of the model.
        prompt: At least one token.
        options: Of `GPT.generate`.

    Shape: prompt (B, T) -> (B, T + num_tokens)

    Raises:
        ValueError: As `GPT.generate`.
    """
    windows: Any = _Windows(logits, config)
    return GPT.generate(windows, prompt, cache=False, **options)

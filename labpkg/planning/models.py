"""Shapes of published language models, by name.

The counted model has no biases (see `ModelShape`). Llama and Mistral have none either,
so that their published numbers of parameters are met exactly. GPT-2, GPT-3, MPT and
Megatron have 11 vectors of width D per layer and one at the end beside their matrices,
(11 L + 1) D numbers more, below 0.1 %, which a plan can neglect.

Standard library only. Chapter: planning/planner. References: Radford et al. 2019
(GPT-2); Brown et al. 2020, arXiv:2005.14165 (GPT-3); Touvron et al. 2023,
arXiv:2302.13971 and arXiv:2307.09288 (Llama, Llama 2); Grattafiori et al. 2024,
arXiv:2407.21783 (Llama 3 and 3.1); Jiang et al. 2023, arXiv:2310.06825 (Mistral);
MosaicML 2023, https://github.com/mosaicml/llm-foundry/tree/main/scripts/train/yamls/
pretrain (MPT); Korthikanti et al. 2022, arXiv:2205.05198, Table 3 (Megatron).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType

from labpkg.planning.shapes import ModelShape


def _gpt(
    layers: int, width: int, heads: int, *, vocab: int, sequence: int
) -> ModelShape:
    """Return a GPT: tied, four times as wide inside, learned positions."""
    return ModelShape(
        num_layers=layers,
        width=width,
        num_heads=heads,
        num_kv_heads=heads,
        ffn_width=4 * width,
        vocab_size=vocab,
        sequence_length=sequence,
        tied=True,
        gated_mlp=False,
    )


def _llama(
    layers: int,
    width: int,
    heads: tuple[int, int],
    ffn_width: int,
    *,
    vocab: int,
    sequence: int,
) -> ModelShape:
    """Return a Llama: untied, gated, rotary; `heads` of queries and of keys."""
    return ModelShape(
        num_layers=layers,
        width=width,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        ffn_width=ffn_width,
        vocab_size=vocab,
        sequence_length=sequence,
        tied=False,
        gated_mlp=True,
        learned_positions=False,
    )


_GPT = {"vocab": 50257, "sequence": 1024}
_MPT = {"vocab": 50368, "sequence": 2048}
_MEGATRON = {"vocab": 51200, "sequence": 2048}
_LLAMA = {"vocab": 32000, "sequence": 2048}
_LLAMA2 = {"vocab": 32000, "sequence": 4096}
_LLAMA3 = {"vocab": 128256, "sequence": 8192}

MODEL_SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {
        "gpt2": _gpt(12, 768, 12, **_GPT),
        "gpt2-medium": _gpt(24, 1024, 16, **_GPT),
        "gpt2-large": _gpt(36, 1280, 20, **_GPT),
        "gpt2-xl": _gpt(48, 1600, 25, **_GPT),
        "gpt3-175b": _gpt(96, 12288, 96, vocab=50257, sequence=2048),
        "llama-7b": _llama(32, 4096, (32, 32), 11008, **_LLAMA),
        "llama-13b": _llama(40, 5120, (40, 40), 13824, **_LLAMA),
        "llama-33b": _llama(60, 6656, (52, 52), 17920, **_LLAMA),
        "llama-65b": _llama(80, 8192, (64, 64), 22016, **_LLAMA),
        "llama2-7b": _llama(32, 4096, (32, 32), 11008, **_LLAMA2),
        "llama2-13b": _llama(40, 5120, (40, 40), 13824, **_LLAMA2),
        "llama2-70b": _llama(80, 8192, (64, 8), 28672, **_LLAMA2),
        "llama3-8b": _llama(32, 4096, (32, 8), 14336, **_LLAMA3),
        "llama3-70b": _llama(80, 8192, (64, 8), 28672, **_LLAMA3),
        "llama3-405b": _llama(126, 16384, (128, 8), 53248, **_LLAMA3),
        "mistral-7b": _llama(32, 4096, (32, 8), 14336, vocab=32000, sequence=8192),
        "mpt-125m": _gpt(12, 768, 12, **_MPT),
        "mpt-350m": _gpt(24, 1024, 16, **_MPT),
        "mpt-760m": _gpt(24, 1536, 12, **_MPT),
        "mpt-1b": _gpt(24, 2048, 16, **_MPT),
        "mpt-3b": _gpt(32, 2560, 20, **_MPT),
        "mpt-7b": _gpt(32, 4096, 32, **_MPT),
        "mpt-13b": _gpt(40, 5120, 40, **_MPT),
        "mpt-30b": _gpt(48, 7168, 56, **_MPT),
        "mpt-70b": _gpt(80, 8192, 64, **_MPT),
        "megatron-22b": _gpt(48, 6144, 64, **_MEGATRON),
        "megatron-175b": _gpt(96, 12288, 96, **_MEGATRON),
        "megatron-530b": _gpt(105, 20480, 128, **_MEGATRON),
        "megatron-1t": _gpt(128, 25600, 160, **_MEGATRON),
    }
)
"""What `find_model` knows, each with the length of its sequences in training."""

# Sizes that one Llama alone has; the first one had no 70B, so that means Llama 2.
_ALIASES = {
    "llama-8b": "llama3-8b",
    "llama-30b": "llama-33b",
    "llama-70b": "llama2-70b",
    "llama-405b": "llama3-405b",
    "gpt2-small": "gpt2",
    "gpt3": "gpt3-175b",
}


def find_model(name: str) -> ModelShape:
    """Return the shape of a published model.

    Args:
        name: A key of `MODEL_SHAPES` in any case, spaces and underscores for hyphens,
            or `llama-70b` (Llama 2), `llama-8b`, `llama-405b` (Llama 3), `gpt3`.

    Returns:
        The shape, with the length of its sequences in training; change a size with
        `dataclasses.replace`.

    Raises:
        ValueError: If the library does not know it.
    """
    wanted = re.sub(r"[\s_]+", "-", name.strip().lower())
    wanted = re.sub(r"^(llama|gpt)-(\d)(?=[-.]|$)", r"\1\2", wanted)  # llama-2-7b
    wanted = wanted.replace("llama3.1-", "llama3-")  # the same shapes
    found = MODEL_SHAPES.get(_ALIASES.get(wanted, wanted))
    if found is None:
        near = difflib.get_close_matches(wanted, MODEL_SHAPES, n=3, cutoff=0.4)
        raise ValueError(
            f"model {name!r} is unknown; choose one of "
            f"{', '.join(near or MODEL_SHAPES)}, or give its sizes"
        )
    return found

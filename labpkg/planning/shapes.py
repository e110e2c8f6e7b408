"""The shape of a Transformer language model, as the planner needs it.

A `ModelShape` holds the sizes that decide parameters, FLOPs, memory and
traffic; everything else follows by arithmetic. It is computed in microseconds, from
the standard library alone, so that a plan for a cluster can be made on any laptop.

Letters: D width, F feed-forward width, N heads, K key/value heads, H = D / N head
width, V vocabulary, T sequence length, L layers.

Chapters: foundations/transformer, planning/memory, planning/planner.
References: Radford et al. 2019 (GPT-2); Shazeer 2020, arXiv:2002.05202 (gated
feed-forward); Ainslie et al. 2023, arXiv:2305.13245 (grouped key/value heads).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral


def is_size(value: object) -> bool:
    """Return whether a value is a whole number above 0.

    Args:
        value: Whatever was given as a size.
    """
    return isinstance(value, int | Integral) and int(value) >= 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Describe a decoder-only Transformer without biases by its sizes.

    The counted model is the one of `labpkg.GPT`: learned positions, pre-norm blocks
    with one norm weight each, a final norm, no bias anywhere. With `gated_mlp` the
    feed-forward part has three matrices (gate, up, down) instead of two; with fewer
    `num_kv_heads` than `num_heads` keys and values are narrower. Rotary positions have
    no parameters: `learned_positions=False`.

    Args:
        num_layers: L, blocks.
        width: D, of the residual stream.
        num_heads: N, query heads; divides `width`.
        num_kv_heads: K, key and value heads; divides `num_heads`.
        ffn_width: F, hidden width of the feed-forward part.
        vocab_size: V, tokens in the vocabulary.
        sequence_length: T, positions.
        tied: whether the output matrix is the token embedding.
        gated_mlp: whether the feed-forward part has a gate matrix.
        learned_positions: whether each position has an embedding.

    Raises:
        ValueError: if a size is no whole number above 0 or does not divide, or a
            choice is neither true nor false.
    """

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    ffn_width: int
    vocab_size: int
    sequence_length: int
    tied: bool
    gated_mlp: bool
    learned_positions: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool":
                if value not in (True, False):
                    raise ValueError(
                        f"{field.name}={value!r} must be True or False; choose one"
                    )
            elif not is_size(value):
                raise ValueError(
                    f"{field.name}={value!r} must be a whole number above 0; choose one"
                )
        if self.width % self.num_heads:
            raise ValueError(
                f"width={self.width} is not divisible by num_heads={self.num_heads}; "
                f"choose a multiple of {self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads="
                f"{self.num_kv_heads}; each key/value head serves equally many queries"
            )

    @property
    def head_width(self) -> int:
        """H, the width of one attention head."""
        return self.width // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Count every trainable number, a tied matrix once.

        Embeddings V D, and T D if positions are learned; per block 2 D norm weights and
        its matrices; the final norm D, and V D more for an untied output.
        """
        positions = self.sequence_length if self.learned_positions else 0
        embeddings = (self.vocab_size + positions) * self.width
        output = 0 if self.tied else self.vocab_size * self.width
        block = self._matrix_elements_per_layer + 2 * self.width
        return embeddings + self.num_layers * block + self.width + output

    @property
    def flops_per_token(self) -> int:
        """Count the FLOPs of the matrix products, forward and backward, per token.

        A product with a matrix of n elements costs 2 n per token, and its backward
        twice that (gradients of both factors). Attention scores and the weighted sum
        cost 2 T D each in the forward pass. Convention: the full T x T square counts
        although the causal mask empties half of it, and nothing is recomputed. Element
        by element work (norms, GELU, softmax) and look-ups are left out.

        Reference:
            Chowdhery et al. 2022, PaLM (appendix B), arXiv:2204.02311.
        """
        matrices = self.num_layers * self._matrix_elements_per_layer
        output = self.vocab_size * self.width
        attention = self.num_layers * 4 * self.sequence_length * self.width
        return 3 * (2 * (matrices + output) + attention)

    @property
    def _matrix_elements_per_layer(self) -> int:
        keys_and_values = 2 * self.num_kv_heads * self.head_width
        attention = self.width * (self.width + keys_and_values) + self.width**2
        feed_forward = (3 if self.gated_mlp else 2) * self.width * self.ffn_width
        return attention + feed_forward

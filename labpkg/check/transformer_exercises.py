"""Checkers of exercises of foundations/transformer: the mask, heads, parameters.

Notation: T sequence, D width, N heads, H = D / N, F feed-forward, V vocabulary, L
layers; weights of layers are (out, in), as in `torch.nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from labpkg.check.attention_exercises import (
    OPEN,
    causal_weights,
    open_weights,
    past,
    random_tensor,
)
from labpkg.check.result import CheckResult, Exercise
from labpkg.planning.shapes import ModelShape


def causal_mask(fn: Callable[..., Any]) -> CheckResult:
    """Check `causal_mask(T)`: which positions each position may read.

    Row t is a query, column s a key; the entry is True where t may read s.

    Shape:
        T -> (T, T) bool

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _CAUSAL_MASK.check(fn)


def gpt_parameters(fn: Callable[..., Any]) -> CheckResult:
    """Check `gpt_parameters(L, D, F, V, T)`: the parameters of a `labpkg.GPT`.

    Token embedding and output share one matrix, positions are learned, and there is no
    bias anywhere.

    Args:
        fn: your function; it returns a number.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _GPT_PARAMETERS.check(fn)


def multi_head(fn: Callable[..., Any]) -> CheckResult:
    """Check `multi_head(x, wq, wk, wv, wo, N)`: causal attention with N heads.

    Head h has the columns h H to (h + 1) H of x wq^T, x wk^T and x wv^T. The outputs of
    the heads are joined in order and multiplied by wo^T.

    Shape:
        x (T, D), weights (D, D) -> (T, D)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _MULTI_HEAD.check(fn)


_CAUSAL_MASK = Exercise(
    name="causal_mask",
    arguments=("T",),
    reference=past,
    cases=[(T,) for T in (3, 2, 1, 4, 5, 8, 16, 33)],
    mistakes={
        "rows and columns are swapped: row t is the query, and it reads the columns "
        "s <= t": lambda T: past(T).T,
        "a position may read itself; without that row 0 has nothing to read": (
            lambda T: past(T).tril(-1)
        ),
        "this marks what is forbidden; True is where t may read s": lambda T: ~past(T),
        "every position may read every other: the future is open": (
            lambda T: torch.ones(T, T, device="cpu")
        ),
        "return True and False; this is what would be added to the scores": (
            lambda T: torch.zeros(T, T, device="cpu").masked_fill(~past(T), -torch.inf)
        ),
    },
    hint="entry (t, s) is s <= t: torch.ones(T, T).tril(), as booleans",
)


def _count(L: int, D: int, F: int, V: int, T: int) -> int:
    return ModelShape(
        num_layers=L,
        width=D,
        num_heads=1,
        num_kv_heads=1,
        ffn_width=F,
        vocab_size=V,
        sequence_length=T,
        tied=True,
        gated_mlp=False,
    ).num_parameters


_GPT_PARAMETERS = Exercise(
    name="gpt_parameters",
    arguments=("L", "D", "F", "V", "T"),
    reference=_count,
    cases=[
        (2, 6, 10, 31, 11),  # tells all the mistakes apart
        (2, 64, 256, 256, 64),
        (12, 768, 3072, 50257, 1024),
        (96, 12288, 49152, 50257, 2048),
        (3, 24, 40, 31, 10),
        (1, 1, 1, 1, 1),
        (6, 320, 1280, 256, 256),
        (32, 4096, 11008, 32000, 4096),
    ],
    mistakes={
        "the output matrix is the token embedding: count it once": (
            lambda L, D, F, V, T: _count(L, D, F, V, T) + V * D
        ),
        "the norms have weights: two norms of D in each block, and one before the "
        "output": lambda L, D, F, V, T: _count(L, D, F, V, T) - 2 * L * D - D,
        "one more norm, of D, comes before the output": (
            lambda L, D, F, V, T: _count(L, D, F, V, T) - D
        ),
        "positions have vectors too: T D": (
            lambda L, D, F, V, T: _count(L, D, F, V, T) - T * D
        ),
        "attention has four matrices of D^2: queries, keys, values and output": (
            lambda L, D, F, V, T: _count(L, D, F, V, T) - L * D * D
        ),
        "attention has more than one matrix: queries, keys, values and output, D^2 "
        "each": lambda L, D, F, V, T: _count(L, D, F, V, T) - 3 * L * D * D,
        "there are two feed-forward matrices, D F up and D F down": (
            lambda L, D, F, V, T: _count(L, D, F, V, T) - L * D * F
        ),
        "F is given; it need not be 4 D": (
            lambda L, D, F, V, T: _count(L, D, 4 * D, V, T)
        ),
        "12 L D^2 is the rule of thumb for the blocks; count the embeddings, the norms "
        "and the given F": lambda L, D, F, V, T: 12 * L * D * D,
        "a norm has a weight here, but no bias": (
            lambda L, D, F, V, T: _count(L, D, F, V, T) + 2 * L * D + D
        ),
        "no layer of this model has a bias": (
            lambda L, D, F, V, T: _count(L, D, F, V, T) + L * (7 * D + F) + D
        ),
    },
    hint=(
        "list the parts: vectors of tokens and positions; in each block attention's "
        "matrices, two of the feed-forward part and two norms; the norm before the "
        "output"
    ),
    rtol=1e-6,  # whole numbers, perhaps as floats
)


def _split(x: Tensor, N: int) -> Tensor:
    return x.unflatten(-1, (N, -1)).transpose(0, 1)  # (N, T, H)


def _heads(
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    N: int,
    split: Callable[[Tensor, int], Tensor] = _split,
    scale: float | None = None,
) -> Tensor:
    """Return what each head reads, (N, T, H)."""
    q, k, v = (split(x.double() @ w.double().T, N) for w in (wq, wk, wv))
    return causal_weights(q, k, scale=scale) @ v


def _joined(heads: Tensor, wo: Tensor) -> Tensor:
    return heads.transpose(0, 1).flatten(1) @ wo.double().T


def _multi_head(
    x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, N: int
) -> Tensor:
    return _joined(_heads(x, wq, wk, wv, N), wo)


def _viewed(x: Tensor, N: int) -> Tensor:
    return x.reshape(N, x.shape[0], -1)


def _untransposed(x: Tensor, N: int) -> Tensor:
    return x.unflatten(-1, (N, -1))  # (T, N, H): a position attends over its heads


def _interleaved(x: Tensor, N: int) -> Tensor:
    return x.unflatten(-1, (-1, N)).permute(2, 0, 1)  # head h: columns h, h + N, ...


def _layer(T: int, D: int, N: int, scale: float = 0.7) -> tuple[Any, ...]:
    weights = [random_tensor(D, D, seed=seed, scale=scale) for seed in range(4)]
    return (random_tensor(T, D, seed=9), *weights, N)


_MULTI_HEAD = Exercise(
    name="multi_head",
    arguments=("x", "wq", "wk", "wv", "wo", "N"),
    reference=_multi_head,
    cases=[
        _layer(3, 4, 2),
        _layer(5, 6, 3),
        _layer(6, 6, 2),
        _layer(1, 4, 2),
        _layer(4, 4, 1),
        _layer(4, 4, 4),
        _layer(9, 16, 4, 0.3),
        _layer(7, 12, 2, 2.0),
    ],
    mistakes={
        "reshape to (N, T, H) mixes positions and heads: split the last dim into "
        "(N, H), then transpose": (
            lambda x, q, k, v, o, N: _joined(_heads(x, q, k, v, N, _viewed), o)
        ),
        "the positions are the dim before the last: after the split into (N, H) "
        "transpose to (N, T, H)": lambda x, q, k, v, o, N: (
            _heads(x, q, k, v, N, _untransposed).flatten(1) @ o.double().T
        ),
        "all heads are one: split D into N heads of width H = D / N": (
            lambda x, q, k, v, o, N: _multi_head(x, q, k, v, o, 1)
        ),
        "the scale is 1 / sqrt(H), with the width of one head": (
            lambda x, q, k, v, o, N: _joined(
                _heads(x, q, k, v, N, scale=x.shape[-1] ** -0.5), o
            )
        ),
        "the heads are joined in the wrong order: back to (T, N, H) first, then "
        "flatten": (
            lambda x, q, k, v, o, N: (
                _heads(x, q, k, v, N).reshape(x.shape) @ o.double().T
            )
        ),
        "the output matrix wo is missing": (
            lambda x, q, k, v, o, N: (
                _heads(x, q, k, v, N).transpose(0, 1).reshape(x.shape)
            )
        ),
        "weights are (out, in): multiply by their transposes, x @ w.T": (
            lambda x, q, k, v, o, N: _multi_head(x, q.T, k.T, v.T, o.T, N)
        ),
        "wo is (out, in) too: multiply by its transpose": (
            lambda x, q, k, v, o, N: _multi_head(x, q, k, v, o.T, N)
        ),
        "head h has the columns h H to (h + 1) H, not every N-th": (
            lambda x, q, k, v, o, N: _joined(_heads(x, q, k, v, N, _interleaved), o)
        ),
        OPEN: lambda x, q, k, v, o, N: _joined(
            open_weights(_split(x @ q.T, N), _split(x @ k.T, N))
            @ _split(x @ v.T, N).double(),
            o,
        ),
    },
    hint=(
        "q, k, v = x @ w.T each (T, D), split to (N, T, H), causal attention per head, "
        "back to (T, D), times wo.T"
    ),
)

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from labpkg import check
from tests.check.laws import ExerciseLaws


def exercises_of(module: str) -> dict[str, Any]:
    return {
        name: checker
        for name, checker in vars(check).items()
        if getattr(checker, "__module__", "") == f"labpkg.check.{module}"
    }


ATTENTION = exercises_of("attention_exercises")
TRANSFORMER = exercises_of("transformer_exercises")
EXERCISES = ATTENTION | TRANSFORMER


def attention(q, k, v):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def multi_head(x, wq, wk, wv, wo, N, attend=attention):
    heads = zip(*(w.chunk(N, 0) for w in (wq, wk, wv)), strict=True)
    parts = [attend(x @ q.T, x @ k.T, x @ v.T) for q, k, v in heads]
    return torch.cat(parts, -1) @ wo.T


def merge_attention(outputs, log_sums):
    total = torch.logsumexp(log_sums, 0)
    return ((log_sums - total).exp()[..., None] * outputs).sum(0)


def attention_gradient(q, k, v, grad, attend=attention):
    leaves = [each.clone().requires_grad_() for each in (q, k, v)]
    return torch.autograd.grad(attend(*leaves), leaves, grad)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


RIGHT = [
    ("causal_mask", lambda T: torch.ones(T, T).tril()),
    ("causal_mask", lambda T: torch.arange(T)[:, None] >= torch.arange(T)),
    (
        "gpt_parameters",
        lambda L, D, F, V, T: D * (V + T + 1 + L * (4 * D + 2 * F + 2)),
    ),
    (
        "gpt_parameters",
        lambda L, D, F, V, T: float(D * (V + T + 1 + L * (4 * D + 2 * F + 2))),
    ),
    ("attention", attention),
    ("attention", sdpa),
    ("multi_head", multi_head),
    (
        "multi_head",
        lambda x, wq, wk, wv, wo, N: (
            sdpa(
                *(
                    (x @ w.T).unflatten(-1, (N, -1)).transpose(0, 1)
                    for w in (wq, wk, wv)
                )
            )
            .transpose(0, 1)
            .flatten(1)
            @ wo.T
        ),
    ),
    ("merge_attention", merge_attention),
    ("attention_gradient", attention_gradient),
    ("attention_gradient", lambda *case: list(attention_gradient(*case))),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message
    assert result.cases >= 8


def test_pieces_of_keys_merge_to_attention_over_all():
    q, k, v = torch.randn(3, 5, 4, dtype=torch.float64)
    scores = q @ k.T / 2
    pieces = [(scores[:, s], v[s]) for s in (slice(0, 2), slice(2, 5))]
    outputs = torch.stack([s.softmax(-1) @ values for s, values in pieces])
    log_sums = torch.stack([s.logsumexp(-1) for s, _ in pieces])
    torch.testing.assert_close(
        merge_attention(outputs, log_sums), scores.softmax(-1) @ v
    )


def full(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def unscaled(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


def softmax_twice(q, k, v):
    mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
    weights = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    for _ in range(2):
        weights = weights.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights @ v


def mask_last(q, k, v):
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return weights.tril() @ v


def mask_with_zero(q, k, v):
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).tril()
    return scores.softmax(-1) @ v


def over_queries(q, k, v):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-2) @ v


def viewed_heads(x, wq, wk, wv, wo, N):
    q, k, v = ((x @ w.T).view(N, x.shape[0], -1) for w in (wq, wk, wv))
    return sdpa(q, k, v).transpose(0, 1).flatten(1) @ wo.T


def joined_wrongly(x, wq, wk, wv, wo, N):
    q, k, v = ((x @ w.T).unflatten(-1, (N, -1)).transpose(0, 1) for w in (wq, wk, wv))
    return sdpa(q, k, v).reshape(x.shape) @ wo.T


def untransposed_heads(x, wq, wk, wv, wo, N):
    q, k, v = ((x @ w.T).unflatten(-1, (N, -1)) for w in (wq, wk, wv))
    return sdpa(q, k, v).flatten(1) @ wo.T


def naive_attention(q, k, v):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    powers = scores.masked_fill(future, -torch.inf).exp()
    return powers / powers.sum(-1, keepdim=True) @ v


def one_maximum(outputs, log_sums):
    weights = (log_sums - log_sums.max()).exp()[..., None]
    return (weights * outputs).sum(0) / weights.sum(0)


def diagonal_gradient(q, k, v, grad):
    T, H = q.shape
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    p = (q @ k.T / H**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    ds = p * (grad @ v.T)
    return ds @ k / H**0.5, ds.T @ q / H**0.5, p.T @ grad


def params(**off):
    """Return a count that is off by some parts."""

    def count(L, D, F, V, T):
        right = D * (V + T + 1 + L * (4 * D + 2 * F + 2))
        return right + sum(
            {"output": V * D, "norms": -2 * L * D - D, "positions": -T * D}[part] * n
            for part, n in off.items()
        )

    return count


WRONG = [
    ("causal_mask", lambda T: T, "returns its argument"),
    ("causal_mask", lambda T: torch.ones(T, T).triu(), "swapped"),
    ("causal_mask", lambda T: torch.ones(T, T).tril(-1), "may read itself"),
    ("causal_mask", lambda T: torch.ones(T, T).triu(1).bool(), "what is forbidden"),
    ("causal_mask", lambda T: torch.ones(T, T), "the future is open"),
    (
        "causal_mask",
        lambda T: torch.full((T, T), -torch.inf).triu(1),
        "added to the scores",
    ),
    ("causal_mask", lambda T: torch.eye(T), "s <= t"),
    ("gpt_parameters", lambda L, D, F, V, T: L, "returns its argument"),
    ("gpt_parameters", params(output=1), "count it once"),
    ("gpt_parameters", params(norms=1), "the norms have weights"),
    ("gpt_parameters", params(positions=1), "positions have vectors"),
    ("gpt_parameters", lambda L, D, F, V, T: 12 * L * D**2, "rule of thumb"),
    (
        "gpt_parameters",
        lambda L, D, F, V, T: D * (V + T + 1 + L * (12 * D + 2)),
        "need not be 4 D",
    ),
    (
        "gpt_parameters",
        lambda L, D, F, V, T: D * (V + T + 1 + L * (3 * D + 2 * F + 2)),
        "four matrices",
    ),
    ("attention", lambda q, k, v: v, "returns its argument"),
    ("attention", full, "the future is open"),
    ("attention", unscaled, "square root of H"),
    ("attention", softmax_twice, "myth E32"),
    ("attention", mask_last, "add up to less than 1"),
    ("attention", mask_with_zero, "a score of 0 is no mask"),
    ("attention", over_queries, "runs over the queries"),
    ("attention", naive_attention, "subtracts the maximum of each row"),
    ("attention", lambda q, k, v: attention(q, k, v)[0], "return a tensor of shape"),
    ("attention", lambda q, k, v: attention(q, k.T, v), "raises"),
    ("multi_head", lambda x, *rest: x, "returns its argument"),
    ("multi_head", viewed_heads, "mixes positions and heads"),
    ("multi_head", untransposed_heads, "transpose to (N, T, H)"),
    ("multi_head", joined_wrongly, "joined in the wrong order"),
    (
        "multi_head",
        lambda x, wq, wk, wv, wo, N: multi_head(x, wq, wk, wv, wo, 1),
        "all heads are one",
    ),
    (
        "multi_head",
        lambda x, wq, wk, wv, wo, N: multi_head(x, wq.T, wk.T, wv.T, wo.T, N),
        "multiply by their transposes",
    ),
    (
        "multi_head",
        lambda *case: multi_head(*case, attend=full),
        "the future is open",
    ),
    (
        "multi_head",
        lambda x, wq, wk, wv, wo, N: multi_head(x, wq, wk, wv, torch.eye(len(wo)), N),
        "wo is missing",
    ),
    ("merge_attention", lambda o, s: o, "returns its argument"),
    ("merge_attention", lambda o, s: o.mean(0), "do not count alike"),
    ("merge_attention", lambda o, s: o.sum(0), "weigh them"),
    (
        "merge_attention",
        lambda o, s: (s.exp()[..., None] * o).sum(0),
        "divide by their sum",
    ),
    (
        "merge_attention",
        lambda o, s: (s.exp()[..., None] * o).sum(0) / s.exp().sum(0)[..., None],
        "subtract the maximum over the pieces",
    ),
    ("merge_attention", one_maximum, "one maximum for all queries"),
    ("attention_gradient", lambda q, k, v, grad: q, "returns its argument"),
    ("attention_gradient", diagonal_gradient, "ties the keys of a row together"),
    (
        "attention_gradient",
        lambda *case: attention_gradient(*case, attend=full),
        "need the causal mask",
    ),
    (
        "attention_gradient",
        lambda *case: tuple(
            x * case[0].shape[-1] ** 0.5 if i < 2 else x
            for i, x in enumerate(attention_gradient(*case))
        ),
        "so are the gradients of q and k",
    ),
    (
        "attention_gradient",
        lambda *case: tuple(-x for x in attention_gradient(*case)),
        "go back one step at a time",
    ),
]


class TestAttention(ExerciseLaws):
    exercises, wrong = ATTENTION, [case for case in WRONG if case[0] in ATTENTION]


class TestTransformer(ExerciseLaws):
    exercises, wrong = TRANSFORMER, [case for case in WRONG if case[0] in TRANSFORMER]

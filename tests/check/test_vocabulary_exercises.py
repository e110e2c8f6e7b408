from typing import Any

import pytest
import torch
import torch.nn.functional as F

from labpkg import check
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {"chunked_cross_entropy": check.chunked_cross_entropy}


def in_pieces(h, W, targets, chunk):
    """Two passes over the vocabulary, nothing larger than a piece."""
    B, V = len(h), len(W)
    peak, total = h.new_full((B,), -torch.inf), h.new_zeros(B)
    for start in range(0, V, chunk):
        z = h @ W[start : start + chunk].T
        larger = torch.maximum(peak, z.amax(-1))
        total *= (peak - larger).exp()
        total += (z - larger[:, None]).exp().sum(-1)
        peak = larger
    lse = peak + total.log()
    grad_h, grad_W = torch.zeros_like(h), torch.zeros_like(W)
    for start in range(0, V, chunk):
        piece = W[start : start + chunk]
        r = (h @ piece.T - lse[:, None]).exp()
        rows = (targets >= start) & (targets < start + chunk)
        r[rows, targets[rows] - start] -= 1
        grad_h += r @ piece / B
        grad_W[start : start + chunk] = r.T @ h / B
    return (lse - (h * W[targets]).sum(-1)).mean(), grad_h, grad_W


def by_logaddexp(h, W, targets, chunk):
    pieces, lse = W.split(chunk), h.new_full((len(h),), -torch.inf)
    for w in pieces:
        lse = torch.logaddexp(lse, (h @ w.T).logsumexp(-1))
    grad_h, of_pieces = -W[targets] / len(h), []
    for w in pieces:
        p = (h @ w.T - lse[:, None]).exp() / len(h)
        grad_h += p @ w
        of_pieces.append(p.T @ h)
    grad_W = torch.cat(of_pieces).index_add(0, targets, -h / len(h))
    return (lse - (h * W[targets]).sum(-1)).mean(), grad_h, grad_W


@pytest.mark.parametrize("answer", [in_pieces, by_logaddexp])
def test_right_answers_pass(answer):
    result = check.chunked_cross_entropy(answer)
    assert result, result.message
    assert result.cases >= 8


def in_one_piece(h, W, targets, chunk):
    z = h @ W.T
    r = (z.softmax(-1) - F.one_hot(targets, len(W))) / len(h)
    return F.cross_entropy(z, targets), r @ W, r.T @ h


def collected_pieces(h, W, targets, chunk):
    p = torch.cat([h @ w.T for w in W.split(chunk)], -1).softmax(-1)
    r = (p - F.one_hot(targets, len(W))) / len(h)
    loss = -p.gather(-1, targets[:, None]).log().mean()
    return loss, r @ W, r.T @ h


def by_autograd(h, W, targets, chunk):
    h, W = h.clone().requires_grad_(), W.clone().requires_grad_()
    lse = h.new_full((len(h),), -torch.inf)
    for w in W.split(chunk):
        lse = torch.logaddexp(lse, (h @ w.T).logsumexp(-1))
    loss = (lse - (h * W[targets]).sum(-1)).mean()
    return loss, *torch.autograd.grad(loss, (h, W))


def without_the_rest(h, W, targets, chunk):
    full = len(W) // chunk * chunk
    lse = (h @ W[:full].T).logsumexp(-1)
    p = (h @ W[:full].T - lse[:, None]).exp()
    y = F.one_hot(targets, len(W))[:, :full]
    grad_W = torch.zeros_like(W)
    grad_W[:full] = (p - y).T @ h / len(h)
    loss = (lse - (h * W[targets]).sum(-1)).mean()
    return loss, (p - y) @ W[:full] / len(h), grad_W


def target_outside_of_the_piece(h, W, targets, chunk):
    p = (h @ W[:chunk].T).softmax(-1)
    p[torch.arange(len(h)), targets] -= 1
    return p


def changed(change):
    return lambda h, W, t, chunk: change(len(h), *in_pieces(h, W, t, chunk))


def softmax_of_pieces(h, W, targets, chunk):
    loss = in_pieces(h, W, targets, chunk)[0]
    p = torch.cat([(h @ w.T).softmax(-1) for w in W.split(chunk)], -1)
    r = (p - F.one_hot(targets, len(W))) / len(h)
    return loss, r @ W, r.T @ h


WRONG = [
    ("chunked_cross_entropy", lambda h, W, t, chunk: h, "returns its argument"),
    ("chunked_cross_entropy", in_one_piece, "never hold all logits (B, V)"),
    ("chunked_cross_entropy", collected_pieces, "exp(z - lse)"),
    ("chunked_cross_entropy", softmax_of_pieces, "normalise each piece by itself"),
    ("chunked_cross_entropy", by_autograd, "never hold all logits (B, V)"),
    ("chunked_cross_entropy", without_the_rest, "the last piece is shorter"),
    ("chunked_cross_entropy", target_outside_of_the_piece, "raises IndexError"),
    (
        "chunked_cross_entropy",
        changed(lambda B, loss, *grads: (loss, *(B * g for g in grads))),
        "gradients are divided by B too",
    ),
    (
        "chunked_cross_entropy",
        changed(lambda B, loss, *grads: (loss, *(-g for g in grads))),
        "the sign of the gradients",
    ),
    ("chunked_cross_entropy", changed(lambda B, loss, *grads: loss), "a tuple of 3"),
    ("chunked_cross_entropy", changed(lambda B, *all: (*all[:2],)), "a tuple of 3"),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_the_traceback_of_an_oversized_tensor_ends_at_the_readers_line():
    message = check.chunked_cross_entropy(in_one_piece).message
    report = message.splitlines()
    line = next(i for i, text in enumerate(report) if "MemoryLimitError" in text)
    code = [text for text in report[:line] if set(text) - set(" ^~")]
    assert code[-1].strip() == "z = h @ W.T"
    assert "tensor of 24 elements, shape (4, 6); this case allows 18" in report[line]
    assert "limits.py" not in message
    message = check.chunked_cross_entropy(target_outside_of_the_piece).message
    assert "p[torch.arange(len(h)), targets] -= 1" in message
    assert "limits.py" not in message
    assert (
        "which keeps what it meets" in check.chunked_cross_entropy(by_autograd).message
    )

"""The loss of classification and language modelling, with its gradient in closed form.

For logits z and class y the loss is -log softmax(z)[y] = log sum_j exp(z_j) - z_y and
its gradient is softmax(z) - onehot(y): the whole backward pass is one subtraction.
Contract: stable for every finite logit, one pass over the logits in each direction.
What is no logit is found on the CPU, at the price of a look at the losses and at one
row of logits: NaN raises, probabilities warn.
Notation: V classes, always the last dim; leading dims are free.

Chapter: foundations/cross_entropy.
References: Goodfellow, Bengio, Courville 2016, Deep Learning, section 6.2.2; Szegedy
et al. 2016, arXiv:1512.00567 (label smoothing).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return the cross-entropy between logits and class numbers.

    The gradient per position is (softmax(z) - q) times the weight of the position in
    the reduction, where q is the one-hot target, or its smoothed form (1 - e) onehot +
    e/V. Only the logits and the targets are kept for backward; softmax is computed
    again there, which costs less than keeping a second (..., V) tensor.

    It differs from `torch.nn.functional.cross_entropy` in three points: the classes
    are the *last* dim; the mean over zero counted targets is 0 with a zero gradient
    instead of nan, so that a rank with an empty shard can take part; and the loss of
    half-precision logits is float32.

    Logits are scores before softmax. Probabilities in their place give a loss that
    falls, but never below -log(e / (e + V - 1)): a `UserWarning` tells each line of
    code that passes them. Log-probabilities are fine, for softmax(log p) = p.

    A GPU would have to wait until an answer about values comes back. Therefore classes,
    NaN and probabilities are looked for on the CPU only; on a GPU a NaN logit gives a
    NaN loss and probabilities go unnoticed.

    Args:
        logits: scores before softmax, any floating dtype; -inf for a class that is
            impossible.
        targets: class numbers, int64.
        ignore_index: targets with this value count nowhere.
        label_smoothing: e in [0, 1], the part of the target spread over all classes.
        reduction: "mean" over counted targets, "sum", or "none".

    Returns:
        A scalar, or with "none" one loss per target (0 where ignored).

    Shape:
        logits (..., V), targets (...) -> () or (...)

    Raises:
        ValueError: for a wrong shape or dtype, a class out of range, logits that give
            NaN (at ignored positions too: their gradient would be NaN), or a wrong
            option.
    """
    check_options(label_smoothing, reduction)
    check_tensors(logits, targets, ignore_index)
    ignored = targets == ignore_index
    classes = targets.masked_fill(ignored, 0)
    losses = _CrossEntropy.apply(logits, classes, label_smoothing)
    if losses.device.type == "cpu":
        _check_losses(losses, logits)
        if _are_probabilities(logits):
            warnings.warn(_PROBABILITIES, stacklevel=2)
    losses = losses.masked_fill(ignored, 0.0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (~ignored).sum().clamp(min=1)


class _CrossEntropy(torch.autograd.Function):
    """One loss per position; backward is softmax minus target."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, smoothing: float) -> Tensor:
        ctx.save_for_backward(logits, classes)
        ctx.smoothing = smoothing
        scores = logits.to(_accumulation_dtype(logits))  # (..., V)
        peak = scores.amax(-1, keepdim=True)  # exp of what is left cannot overflow
        shifted = scores - peak
        target = shifted.gather(-1, classes.unsqueeze(-1)).squeeze(-1)  # (...)
        if smoothing:
            target = (1 - smoothing) * target + smoothing * shifted.mean(-1)
        return shifted.exp_().sum(-1).log_() - target

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        logits, classes = ctx.saved_tensors
        (grad_losses,) = grad_outputs
        gradient = torch.softmax(logits, -1, dtype=_accumulation_dtype(logits))
        if torch.is_grad_enabled():  # a second derivative needs softmax unchanged
            gradient = gradient.clone()
        minus_target = gradient.new_full((), ctx.smoothing - 1)
        index = classes.unsqueeze(-1)
        gradient.scatter_add_(-1, index, minus_target.expand(index.shape))
        if ctx.smoothing:
            gradient -= ctx.smoothing / logits.shape[-1]
        gradient.mul_(grad_losses.unsqueeze(-1))
        return gradient.to(logits.dtype), None, None


def _accumulation_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def check_options(label_smoothing: float, reduction: str) -> None:
    """Refuse options that `cross_entropy` does not have.

    Args:
        label_smoothing: of `cross_entropy`.
        reduction: of `cross_entropy`.

    Raises:
        ValueError: for a wrong one.
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(
            f"label_smoothing={label_smoothing} is a part of the target; choose a "
            "number from 0 to 1"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"reduction={reduction!r} is unknown; choose 'mean', 'sum' or 'none'"
        )


def check_tensors(
    logits: Tensor, targets: Tensor, ignore_index: int, *, num_shards: int = 1
) -> None:
    """Refuse tensors of which `cross_entropy` cannot make a loss.

    Args:
        logits: of `cross_entropy`, or a slice of their classes.
        targets: of `cross_entropy`.
        ignore_index: of `cross_entropy`.
        num_shards: how many slices there are.

    Raises:
        ValueError: for a wrong shape or dtype, or a class out of range.
    """
    if not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating point, got {logits.dtype}; call .float()"
        )
    if targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 class numbers, got {targets.dtype}; call .long(), "
            "or .argmax(-1) on one-hot rows"
        )
    if logits.dim() == 0 or logits.shape[-1] == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            "logits (..., V) and targets (...) must agree in the leading dims, got "
            f"{tuple(logits.shape)} and {tuple(targets.shape)}; the classes are the "
            "last dim of logits (movedim(1, -1) turns torch's layout into this one)"
        )
    if targets.device.type == "cpu":
        num_classes = logits.shape[-1] * num_shards
        counted = targets[targets != ignore_index]
        outside = counted[(counted < 0) | (counted >= num_classes)]
        if outside.numel():
            raise ValueError(
                f"target {outside[0].item()} is not a class of logits with V="
                f"{num_classes}; use 0 to {num_classes - 1}, or "
                f"ignore_index={ignore_index} for positions that do not count"
            )


def _check_losses(losses: Tensor, logits: Tensor) -> None:
    """Raise for the first NaN loss: (...) numbers tell what is wrong in (..., V)."""
    undefined = losses.isnan()
    if not undefined.any():
        return
    position = tuple(undefined.nonzero()[0].tolist())
    row = logits.detach()[position]  # (V,)
    no_number = row.isnan() | (row == torch.inf)
    if no_number.any():
        first = int(no_number.nonzero()[0])
        what = f"class {first} is {row[first].item()}"
    elif row.amax() == -torch.inf:
        what = "every class is -inf"
    else:
        what = f"class {int(row.argmin())} is -inf and is smoothed into the target"
    place = f"logits[{', '.join(map(str, position))}]" if position else "logits"
    raise ValueError(
        f"{place} give a NaN loss: {what}; look for what made it, e.g. a learning "
        "rate that is too large, 0/0, log(0) or a mask without a class left"
    )


_PROBABILITIES = (
    "cross_entropy got probabilities (every row is >= 0 and sums to 1) where logits "
    "belong, so softmax is applied twice and the loss cannot reach 0; pass the scores "
    "before softmax, or the logarithm of the probabilities"
)


def _are_probabilities(logits: Tensor) -> bool:
    """Whether all rows are >= 0 and sum to 1; for true logits one row is looked at."""
    if logits.numel() == 0 or logits.shape[-1] < 2:
        return False
    scores = logits.detach()
    first_row = scores[(0,) * (scores.dim() - 1)]
    return _sum_to_one(first_row) and _sum_to_one(scores)


def _sum_to_one(rows: Tensor) -> bool:
    if rows.amin() < 0:
        return False
    tolerance = max(1e-5, 4 * torch.finfo(rows.dtype).eps)  # of V rounded numbers
    sums = rows.sum(-1, dtype=_accumulation_dtype(rows))
    return bool(((sums - 1).abs() <= tolerance).all())

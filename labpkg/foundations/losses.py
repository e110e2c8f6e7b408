"""The loss of classification and language modelling, with its gradient in closed form.

For logits z and class y the loss is -log softmax(z)[y] = log sum_j exp(z_j) - z_y and
its gradient is softmax(z) - onehot(y): the whole backward pass is one subtraction.
Contract: stable for every finite logit, one pass over the logits in each direction.
Notation: V classes, always the last dim; leading dims are free.

Chapter: foundations/cross_entropy.
References: Goodfellow, Bengio, Courville 2016, Deep Learning, section 6.2.2; Szegedy
et al. 2016, arXiv:1512.00567 (label smoothing).
"""

from __future__ import annotations

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

    Args:
        logits: scores before softmax, any floating dtype.
        targets: class numbers, int64.
        ignore_index: targets with this value count nowhere.
        label_smoothing: e in [0, 1], the part of the target spread over all classes.
        reduction: "mean" over counted targets, "sum", or "none".

    Returns:
        A scalar, or with "none" one loss per target (0 where ignored).

    Shape:
        logits (..., V), targets (...) -> () or (...)

    Raises:
        ValueError: for a wrong shape or dtype, a class out of range (checked on the
            CPU only: a GPU would have to wait for the answer), or a wrong option.
    """
    _check_options(label_smoothing, reduction)
    _check_tensors(logits, targets, ignore_index)
    counted = targets != ignore_index
    classes = targets.masked_fill(~counted, 0)
    losses = _CrossEntropy.apply(logits, classes, counted, label_smoothing)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / counted.sum().clamp(min=1)


class _CrossEntropy(torch.autograd.Function):
    """One loss per position; backward is softmax minus target."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, classes: Tensor, counted: Tensor, smoothing: float
    ) -> Tensor:
        ctx.save_for_backward(logits, classes, counted)
        ctx.smoothing = smoothing
        scores = logits.to(_accumulation_dtype(logits))  # (..., V)
        peak = scores.amax(-1, keepdim=True)  # exp of what is left cannot overflow
        shifted = scores - peak
        target = shifted.gather(-1, classes.unsqueeze(-1)).squeeze(-1)  # (...)
        if smoothing:
            target = (1 - smoothing) * target + smoothing * shifted.mean(-1)
        losses = shifted.exp_().sum(-1).log_() - target
        return losses.masked_fill_(~counted, 0.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        logits, classes, counted = ctx.saved_tensors
        (grad_losses,) = grad_outputs
        gradient = torch.softmax(logits, -1, dtype=_accumulation_dtype(logits))
        if torch.is_grad_enabled():  # a second derivative needs softmax unchanged
            gradient = gradient.clone()
        minus_target = gradient.new_full((), ctx.smoothing - 1)
        index = classes.unsqueeze(-1)
        gradient.scatter_add_(-1, index, minus_target.expand(index.shape))
        if ctx.smoothing:
            gradient -= ctx.smoothing / logits.shape[-1]
        weight = grad_losses.masked_fill(~counted, 0.0).unsqueeze(-1)
        return gradient.mul_(weight).to(logits.dtype), None, None, None


def _accumulation_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _check_options(label_smoothing: float, reduction: str) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(
            f"label_smoothing={label_smoothing} is a part of the target; choose a "
            "number from 0 to 1"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"reduction={reduction!r} is unknown; choose 'mean', 'sum' or 'none'"
        )


def _check_tensors(logits: Tensor, targets: Tensor, ignore_index: int) -> None:
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
        counted = targets[targets != ignore_index]
        outside = counted[(counted < 0) | (counted >= logits.shape[-1])]
        if outside.numel():
            raise ValueError(
                f"target {outside[0].item()} is not a class of logits with V="
                f"{logits.shape[-1]}; use 0 to {logits.shape[-1] - 1}, or "
                f"ignore_index={ignore_index} for positions that do not count"
            )

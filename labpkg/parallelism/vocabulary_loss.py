"""The loss of logits whose classes are cut over an axis; they are never gathered.

-log softmax(z)[y] = log sum_j exp(z_j) - z_y needs three numbers of each position from
the other ranks: the largest logit, the sum of exponentials and the logit of the target.
All logits would be V.

Chapter: parallelism/tensor_parallel. Reference: Shoeybi et al. 2019, Megatron-LM,
arXiv:1909.08053, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from labpkg.foundations.losses import check_options, check_tensors
from labpkg.processes.in_place import all_reduce_


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    mesh: DeviceMesh,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return the cross-entropy of logits of which each rank holds 1/n of the classes.

    The same number, on every rank, as `cross_entropy` of the whole logits, and for each
    rank its slice of the gradient. Rank r has the classes from r V/n on: the output of
    a head that is cut by `column`. Probabilities in place of logits are not looked for.

    Args:
        logits: this rank's classes, any floating dtype.
        targets: class numbers of the whole vocabulary, int64, the same on every rank.
        mesh: The tensor-parallel axis.
        ignore_index: targets with this value count nowhere.
        label_smoothing: e in [0, 1], the part of the target spread over all classes.
        reduction: "mean" over counted targets, "sum", or "none".

    Returns:
        A scalar, or with "none" one loss per target (0 where ignored).

    Shape: logits (..., V/n), targets (...) -> () or (...)

    Raises:
        ValueError: As `cross_entropy`; on every rank.

    Communication: forward an all_reduce of one number for each target and one of two;
    they are float32, or float64 for such logits. Nothing backward.

    Reference: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
    """
    check_options(label_smoothing, reduction)
    check_tensors(logits, targets, ignore_index, num_shards=mesh.size())
    ignored = targets == ignore_index
    classes = targets.masked_fill(ignored, 0)
    losses = _VocabParallelCrossEntropy.apply(logits, classes, mesh, label_smoothing)
    if losses.device.type == "cpu":
        _check_losses(losses)
    losses = losses.masked_fill(ignored, 0.0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (~ignored).sum().clamp(min=1)


def _check_losses(losses: Tensor) -> None:
    undefined = losses.isnan().nonzero()
    if len(undefined):
        raise ValueError(
            f"the logits at {tuple(undefined[0].tolist())} give a NaN loss: on some "
            "rank one is NaN or inf, or no class is left, or one of -inf is smoothed "
            "into the target; look for what made it, e.g. a learning rate that is too "
            "large, 0/0, log(0) or a mask"
        )


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """One loss per position; backward is this rank's softmax minus target."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, classes: Tensor, mesh: DeviceMesh, smoothing: float
    ) -> Tensor:
        ctx.smoothing, ctx.num_classes = smoothing, logits.shape[-1] * mesh.size()
        own = classes - logits.shape[-1] * mesh.get_local_rank()
        elsewhere = (own < 0) | (own >= logits.shape[-1])
        index = own.masked_fill(elsewhere, 0).unsqueeze(-1)
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        peak = scores.amax(-1)  # (...)
        all_reduce_(peak, mesh, op="max").wait()
        shifted = scores - peak.unsqueeze(-1)  # (..., V/n)
        target = shifted.gather(-1, index).squeeze(-1).masked_fill(elsewhere, 0)
        if smoothing:
            spread = shifted.sum(-1) * (smoothing / ctx.num_classes)
            target = (1 - smoothing) * target + spread
        sums = torch.stack([shifted.exp_().sum(-1), target])  # (2, ...)
        all_reduce_(sums, mesh).wait()
        log_sum = sums[0].log_()
        ctx.save_for_backward(logits, index, elsewhere, log_sum + peak)
        return log_sum - sums[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        logits, index, elsewhere, log_total = ctx.saved_tensors
        gradient = logits.to(log_total.dtype) - log_total.unsqueeze(-1)
        gradient.exp_()  # this rank's part of softmax
        hit = torch.full_like(log_total, ctx.smoothing - 1).masked_fill_(elsewhere, 0)
        gradient.scatter_add_(-1, index, hit.unsqueeze(-1))
        if ctx.smoothing:
            gradient -= ctx.smoothing / ctx.num_classes
        gradient.mul_(grads[0].unsqueeze(-1))
        return gradient.to(logits.dtype), None, None, None

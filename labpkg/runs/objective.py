"""What a step minimises: the sum of losses over counted targets, whatever the cut.

A mean over the targets of one rank, of one pass or of one micro-batch is the mean over
all of them only if each has as many. Sums have no such condition: every part adds its
own, weighted by one over the number of targets that count in all parts together.

Chapter: planning/device_mesh.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from labpkg.foundations.losses import check_tensors, cross_entropy
from labpkg.parallelism.vocabulary_loss import vocab_parallel_cross_entropy

IGNORED = -100
LossFunction = Callable[[Tensor, Tensor], Tensor]


def num_counted(targets: Tensor) -> int:
    """Return how many targets count: classes other than -100, or rows.

    Args:
        targets: Class numbers (int64), or values with a row for each sample.
    """
    if targets.dtype != torch.int64:
        return len(targets)
    return int((targets != IGNORED).sum())


class Objective:
    """Sum the losses of the counted targets of one part, times a weight.

    The weight is set before each step, when all ranks know how many targets count.

    Args:
        loss_fn: (output, targets) -> the mean loss over the counted targets; None is
            the cross-entropy.
        vocabulary: The axis over which the classes are cut, or None.
    """

    def __init__(
        self, loss_fn: LossFunction | None, vocabulary: DeviceMesh | None = None
    ) -> None:
        self.loss_fn, self.vocabulary, self.weight = loss_fn, vocabulary, 1.0

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted sum; 0, with a gradient of zeros, where nothing counts.

        Args:
            output: Of the model.
            targets: One for each sample or position.
        """
        return self._sum(output, targets) * self.weight

    def _sum(self, output: Tensor, targets: Tensor) -> Tensor:
        if self.loss_fn is None:
            return self._sum_of_cross_entropies(output, targets)
        count = num_counted(targets)
        if count == 0:  # where a mean is nan
            return output[:0].sum()
        return self.loss_fn(output, targets) * count

    def _sum_of_cross_entropies(self, logits: Tensor, targets: Tensor) -> Tensor:
        axis = self.vocabulary
        num_shards = 1 if axis is None else axis.size()
        check_tensors(logits, targets, IGNORED, num_shards=num_shards)
        try:
            if axis is None:
                return cross_entropy(logits, targets, reduction="sum")
            return vocab_parallel_cross_entropy(logits, targets, axis, reduction="sum")
        except ValueError:
            # The tensors are in order, so a logit is nan or infinite. That concerns all
            # ranks, not only this one: they see it in the norm and skip the step.
            return logits.sum() * torch.nan

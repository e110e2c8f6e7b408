"""Scores from counts, so that what ranks have counted merges exactly.

A mean, a precision or an F1 is a ratio, and ratios of unequal shards do not average.
Contract: an object counts what one process sees; counts of ranks are merged by addition
through a `reduce` callable; the ratio is taken last. Ranks that saw nothing take part.
Notation: V classes; C[t, p] is the number of samples of class t predicted as p.

Chapter: foundations/training_loop. Reference: Manning, Raghavan, Schütze 2008,
Introduction to Information Retrieval, sections 8.3 and 13.6 (macro and micro averages).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Adds a tensor over ranks, such as `lambda x: all_reduce(x, mesh["dp"])`."""

_AVERAGES = ("macro", "micro", "weighted")


class RunningMean:
    """A mean over all that was added since the last question, by counts.

    Sums and counts are kept and merged, not means, so batches and shards of any size
    weigh right. Both stay on the device: a GPU is waited for when the mean is read.

    Args:
        reduce: adds a tensor over ranks; None is one process.
        device: where the means that are added live; None is torch's default device.
    """

    def __init__(
        self,
        *,
        reduce: Reduce | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._reduce = reduce
        self._totals = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, mean: Tensor | float, count: int) -> None:
        """Add a mean and the number of samples or tokens that it was taken over.

        Args:
            mean: one number; ignored when the count is 0, where it is often nan.
            count: at least 0.

        Raises:
            ValueError: for a negative count.
        """
        if count < 0:
            raise ValueError(f"count={count} must be at least 0; pass e.g. len(y)")
        if count:
            # In half precision mean * count overflows from 65504 on.
            value = mean.detach().double() if isinstance(mean, Tensor) else mean
            self._totals[0] += value * count
            self._totals[1] += count

    def read(self) -> tuple[float, int]:
        """Return mean and count over all ranks, and start again; every rank calls it.

        Returns:
            The mean and the number that it was taken over.

        Raises:
            ValueError: if no rank has added anything.

        Communication: one `reduce` of two numbers.
        """
        totals = self._totals if self._reduce is None else self._reduce(self._totals)
        total, count = totals.tolist()
        self._totals.zero_()
        if not count:
            raise ValueError("no rank has added anything; call add(mean, count) first")
        return total / count, int(count)


class ConfusionMatrix:
    """Counts of what was predicted for which class, and the scores that follow.

    Precision of class k is the part of its predictions that is right, recall the part
    of its samples that is found, and F1 the harmonic mean of both:
    P = C[k, k] / sum_t C[t, k], R = C[k, k] / sum_p C[k, p], F1 = 2 P R / (P + R).
    A ratio with denominator 0 is 0. Each score is equal to scikit-learn's with
    `labels=range(V)` and `zero_division=0`.

    Counting is one pass over the predictions. Scores are of what this object has
    counted: on several ranks, read those of `merged(reduce)`.

    Args:
        num_classes: V >= 2.
        device: where the counts live; None is torch's default device.

    Attributes:
        counts: C, int64: rows are targets, columns predictions.

    Shape:
        counts (V, V)

    Raises:
        ValueError: for fewer than two classes.
    """

    def __init__(
        self, num_classes: int, *, device: torch.device | str | None = None
    ) -> None:
        if num_classes < 2:
            raise ValueError(
                f"num_classes={num_classes} must be at least 2; a yes-or-no answer has "
                "2 classes"
            )
        self.counts = torch.zeros(
            num_classes, num_classes, dtype=torch.int64, device=device
        )

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count a batch, which may be empty.

        Args:
            predictions: class numbers, or floating-point scores whose largest wins.
            targets: class numbers.

        Shape:
            predictions (...) or (..., V), targets (...)

        Raises:
            ValueError: for shapes that do not fit, and, on the CPU only (a GPU would
                have to wait for the answer), for nan or a class out of range.
        """
        V = len(self.counts)
        if predictions.is_floating_point():
            predictions = _winners(predictions, targets, V)
        _check_classes(predictions, targets, V)
        cells = targets.detach().long() * V + predictions.detach().long()
        ones = torch.ones_like(cells).flatten()
        # In place on the device: bincount would wait for a GPU to know its own length.
        self.counts.view(-1).index_add_(0, cells.flatten(), ones)

    def merged(self, reduce: Reduce) -> ConfusionMatrix:
        """Return the matrix of all ranks; every rank calls it.

        This object keeps its own counts, and may go on counting.

        Args:
            reduce: adds a tensor over ranks and returns the sum, e.g.
                `lambda counts: lab.all_reduce(counts, mesh["dp"])`.

        Returns:
            A new matrix.

        Communication: one `reduce` of V x V integers.
        """
        whole = ConfusionMatrix(len(self.counts), device=self.counts.device)
        whole.counts = reduce(self.counts.clone())
        return whole

    def accuracy(self) -> float:
        """Return the part of all samples that is predicted right.

        Returns:
            A number from 0 to 1.

        Raises:
            ValueError: if nothing was counted.
        """
        right, _, _ = self._marginals()
        return (right.sum() / self.counts.sum()).item()

    def precision(
        self, *, average: str | None = None, positive: int | None = None
    ) -> Tensor:
        """Return the part of the predictions of a class that is right.

        Args:
            average: "macro" is the mean over all V classes, "weighted" the mean
                weighted by their samples, "micro" the ratio of the sums, which is the
                accuracy. None keeps the classes apart.
            positive: the one class to report, as in a yes-or-no task.

        Returns:
            float64, on the device of the counts.

        Shape:
            (V,), or () with `average` or `positive`

        Raises:
            ValueError: if nothing was counted, or for an unknown option.
        """
        right, predicted, _ = self._marginals()
        return self._score(right, predicted, average, positive)

    def recall(
        self, *, average: str | None = None, positive: int | None = None
    ) -> Tensor:
        """Return the part of the samples of a class that is found.

        Args:
            average: as in `precision`.
            positive: as in `precision`.

        Returns:
            float64, on the device of the counts.

        Shape:
            (V,), or () with `average` or `positive`

        Raises:
            ValueError: if nothing was counted, or for an unknown option.
        """
        right, _, actual = self._marginals()
        return self._score(right, actual, average, positive)

    def f1(self, *, average: str | None = None, positive: int | None = None) -> Tensor:
        """Return the harmonic mean of precision and recall of a class.

        An average is the average of the F1 of the classes, not the F1 of averages.

        Args:
            average: as in `precision`.
            positive: as in `precision`.

        Returns:
            float64, on the device of the counts.

        Shape:
            (V,), or () with `average` or `positive`

        Raises:
            ValueError: if nothing was counted, or for an unknown option.
        """
        right, predicted, actual = self._marginals()
        return self._score(2 * right, predicted + actual, average, positive)

    def _marginals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return per class: predicted right, predicted, and there at all."""
        if not self.counts.any():
            raise ValueError(
                "nothing was counted, so there is no score; call update, or on a rank "
                "with an empty shard read merged(reduce)"
            )
        counts = self.counts.double()  # exact up to 2**53 samples
        return counts.diagonal(), counts.sum(0), counts.sum(1)

    def _score(
        self, part: Tensor, whole: Tensor, average: str | None, positive: int | None
    ) -> Tensor:
        self._check_options(average, positive)
        if average == "micro":
            part, whole = part.sum(), whole.sum()
        score = torch.where(whole > 0, part / whole, 0.0)
        if average == "macro":
            return score.mean()
        if average == "weighted":
            samples = self.counts.sum(1).double()
            return (score * samples).sum() / samples.sum()
        return score if positive is None else score[positive]

    def _check_options(self, average: str | None, positive: int | None) -> None:
        if average is not None and positive is not None:
            raise ValueError(
                f"average={average!r} and positive={positive} exclude each other; an "
                "average has no positive class, so give one of them"
            )
        if average is not None and average not in _AVERAGES:
            raise ValueError(
                f"average={average!r} is unknown; choose {', '.join(_AVERAGES)}, or "
                "positive= for one class"
            )
        if positive is not None and not 0 <= positive < len(self.counts):
            raise ValueError(
                f"positive={positive} is not a class; choose 0 to "
                f"{len(self.counts) - 1}"
            )


def _winners(scores: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    if scores.shape != (*targets.shape, num_classes):
        raise ValueError(
            f"scores (..., {num_classes}) and targets (...) do not fit, got "
            f"{tuple(scores.shape)} and {tuple(targets.shape)}; one score per class is "
            "needed, or class numbers: (score > 0).long() for a single score"
        )
    best, winners = scores.detach().max(-1)
    if best.device.type == "cpu" and best.isnan().any():  # max passes nan on
        raise ValueError(
            "the scores hold nan, and no class is largest; look for the first nan in "
            "the model's output"
        )
    return winners


def _check_classes(predictions: Tensor, targets: Tensor, num_classes: int) -> None:
    if targets.is_floating_point() or predictions.shape != targets.shape:
        raise ValueError(
            "predictions and targets must be class numbers of one shape, got "
            f"{tuple(predictions.shape)} and {tuple(targets.shape)} of "
            f"{targets.dtype}; call .argmax(-1) on one-hot rows, .squeeze(-1) on "
            "columns, .long() on floats"
        )
    for name, classes in (("prediction", predictions), ("target", targets)):
        if classes.device.type != "cpu":
            continue
        outside = classes[(classes < 0) | (classes >= num_classes)]
        if outside.numel():
            raise ValueError(
                f"{name} {outside[0].item()} is not one of {num_classes} classes; use "
                f"0 to {num_classes - 1}, and leave out positions that do not count"
            )

"""Checkers of the exercises of the chapter foundations/training_loop about its data.

Notation: N rows, K columns, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def standardize(fn: Callable[..., Any]) -> CheckResult:
    """Check `standardize(train, test)`: both parts with the statistics of `train`.

    Subtract the mean of each column of train, divide by its standard deviation (over
    N, not N - 1), and by 1 where that is 0. Return (train, test).

    Shape:
        train (N, K), test (M, K) -> (N, K), (M, K)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _STANDARDIZE.check(fn)


def binary_scores(fn: Callable[..., Any]) -> CheckResult:
    """Check `binary_scores(predictions, targets)`: accuracy, precision, recall, F1.

    Class 1 is the positive one; a ratio without cases, 0/0, is 0.

    Shape:
        predictions (N,), targets (N,), 0 or 1 -> four numbers

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _BINARY_SCORES.check(fn)


def merged_statistics(fn: Callable[..., Any]) -> CheckResult:
    """Check `merged_statistics(counts, means, variances)` over the ranks.

    Rank r has counts[r] rows with these means and variances (over N, not N - 1). Those
    of a rank without rows are nan. Return mean and variance of all rows.

    Shape:
        counts (R,) int64, means (R, K), variances (R, K) -> (K,), (K,)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _MERGED_STATISTICS.check(fn)


def _random(*shape: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float64)
    return shift + scale * values


def _table(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


# ---- standardize --------------------------------------------------------------------

_Parts = tuple[Tensor, Tensor]


def _scaled(
    train: Tensor, test: Tensor, *, fit: Tensor | None = None, correction: int = 0
) -> _Parts:
    """Standardise both parts with the statistics of `fit`, by default of train."""
    fit = train if fit is None else fit
    mean, std = fit.mean(0), fit.std(0, correction=correction)
    std = torch.where(std == 0, 1.0, std)
    return (train - mean) / std, (test - mean) / std


def _scaled_to_one(train: Tensor, test: Tensor) -> _Parts:
    low, high = train.amin(0), train.amax(0)
    width = torch.where(high == low, 1.0, high - low)
    return (train - low) / width, (test - low) / width


def _with(
    shift: Callable[[Tensor], Tensor], divisor: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Tensor], _Parts]:
    """Return the answer that shifts and divides by these statistics of train."""
    return lambda train, test: (
        (train - shift(train)) / divisor(train),
        (test - shift(train)) / divisor(train),
    )


def _population_std(x: Tensor) -> Tensor:
    return x.std(0, correction=0)


_STANDARDIZE = Exercise(
    name="standardize",
    arguments=("train", "test"),
    reference=_scaled,
    cases=[
        (_table([1, 10], [3, 30], [5, 20]), _table([7, 40], [2, 20])),
        (_random(6, 3, seed=1, scale=2.0, shift=5.0), _random(2, 3, seed=2)),
        (_random(4, 1, seed=3), _random(1, 1, seed=4)),
        (_random(9, 2, seed=5, scale=1e-3), _random(3, 2, seed=6, scale=1e3)),
        (_random(3, 4, seed=7), _random(5, 4, seed=8, shift=100.0)),
        (_table([2, 1], [2, 3], [2, 5]), _table([2, 3], [7, 1])),  # constant in train
        (_table([4, 0]), _table([4, 1], [5, 0])),  # one row: every column is constant
        (_random(8, 2, seed=9, shift=1e8), _random(2, 2, seed=10, shift=1e8)),
    ],
    mistakes={
        "the test rows take part in the mean and the std; fit both on train "
        "alone": lambda a, b: _scaled(a, b, fit=torch.cat([a, b])),
        "the test part is scaled with its own mean and std; use those of "
        "train": lambda a, b: (_scaled(a, b)[0], _scaled(b, b)[1]),
        "the test part is unchanged; scale it with the mean and std of "
        "train": lambda a, b: (_scaled(a, b)[0], b),
        "train and test are swapped: the statistics come from train, and train is "
        "returned first": lambda a, b: _scaled(a, b, fit=b),
        "the test part is scaled with its own mean and std; use those of train, over N "
        "and not N - 1": lambda a, b: (
            _scaled(a, b, correction=1)[0],
            _scaled(b, b, correction=1)[1],
        ),
        "the test rows take part in the mean and the std, and that is over N - 1; fit "
        "both on train alone, over N": lambda a, b: _scaled(
            a, b, fit=torch.cat([a, b]), correction=1
        ),
        "one mean and one std for the whole table; each column has its own: "
        "mean(0), std(0)": lambda a, b: (
            (a - a.mean()) / a.std(correction=0),
            (b - a.mean()) / a.std(correction=0),
        ),
        "the std is over N here, not over N - 1: x.std(0, correction=0)": lambda a, b: (
            _scaled(a, b, correction=1)
        ),
        "divide by the standard deviation, not by the variance": _with(
            lambda x: x.mean(0), lambda x: x.var(0, correction=0)
        ),
        "after subtracting the mean, divide by the std": _with(
            lambda x: x.mean(0), lambda x: torch.ones_like(x[0])
        ),
        "subtract the mean before you divide": _with(
            lambda x: torch.zeros_like(x[0]), _population_std
        ),
        "this maps the smallest value to 0 and the largest to 1; subtract the mean "
        "and divide by the std": _scaled_to_one,
        "a column that is constant in train has the std 0; divide by 1 there": _with(
            lambda x: x.mean(0), _population_std
        ),
        "a small constant added to the std changes small columns and blows up "
        "constant ones; replace a std of 0 by 1": _with(
            lambda x: x.mean(0), lambda x: _population_std(x) + 1e-8
        ),
    },
    hint=(
        "mean and std of each column of train, over N; subtract and divide, in train "
        "and in test; a std of 0 counts as 1; subtract the mean before you square: "
        "mean(x^2) - mean(x)^2 loses the digits of a column far from 0"
    ),
)

# ---- binary_scores ------------------------------------------------------------------


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _confusion(predictions: Tensor, targets: Tensor) -> tuple[int, int, int, int]:
    """Return true positives, false positives, false negatives, true negatives."""
    pairs = 2 * targets + predictions
    tn, fp, fn, tp = torch.bincount(pairs, minlength=4).tolist()
    return tp, fp, fn, tn


def _scores(predictions: Tensor, targets: Tensor) -> tuple[float, ...]:
    tp, fp, fn, tn = _confusion(predictions, targets)
    return (
        _ratio(tp + tn, tp + fp + fn + tn),
        _ratio(tp, tp + fp),
        _ratio(tp, tp + fn),
        _ratio(2 * tp, 2 * tp + fp + fn),
    )


def _scores_with_f1(
    f1: Callable[[float, float], float],
) -> Callable[[Tensor, Tensor], tuple[float, ...]]:
    def scores(predictions: Tensor, targets: Tensor) -> tuple[float, ...]:
        accuracy, precision, recall, _ = _scores(predictions, targets)
        return accuracy, precision, recall, f1(precision, recall)

    return scores


def _scores_with_nan(predictions: Tensor, targets: Tensor) -> tuple[float, ...]:
    tp, fp, fn, tn = map(float, _confusion(predictions, targets))
    divide = lambda a, b: a / b if b else math.nan
    precision, recall = divide(tp, tp + fp), divide(tp, tp + fn)
    f1 = divide(2 * precision * recall, precision + recall)
    return (tp + tn) / len(targets), precision, recall, f1


def _hits_only(predictions: Tensor, targets: Tensor) -> tuple[float, ...]:
    tp = _confusion(predictions, targets)[0]
    return tp / len(targets), *_scores(predictions, targets)[1:]


def _jaccard(predictions: Tensor, targets: Tensor) -> tuple[float, ...]:
    tp, fp, fn, _ = _confusion(predictions, targets)
    return *_scores(predictions, targets)[:3], _ratio(tp, tp + fp + fn)


def _swapped(predictions: Tensor, targets: Tensor) -> tuple[float, ...]:
    accuracy, precision, recall, f1 = _scores(predictions, targets)
    return accuracy, recall, precision, f1


_BINARY_SCORES = Exercise(
    name="binary_scores",
    arguments=("predictions", "targets"),
    reference=_scores,
    cases=[
        (_integers(1, 1, 1, 0, 0, 0, 0), _integers(1, 0, 0, 1, 0, 0, 0)),
        (_integers(1, 0, 1, 0), _integers(1, 0, 0, 1)),
        (_integers(1, 1, 1, 1, 1, 0), _integers(1, 1, 1, 0, 1, 1)),
        (_integers(0, 1), _integers(0, 1)),
        (_integers(0, 1), _integers(1, 0)),
        (_integers(1), _integers(1)),
        (_integers(0, 0, 0), _integers(1, 0, 0)),  # says no to all
        (_integers(1, 1, 0), _integers(0, 0, 0)),  # there is no positive
        (_integers(0, 0), _integers(0, 0)),
        (_integers(*[1] * 9, *[0] * 31), _integers(*[0] * 5, *[1] * 8, *[0] * 27)),
    ],
    mistakes={
        "precision and recall are swapped: precision is the part of the *predicted* "
        "positives that is right": _swapped,
        "class 1 is the positive one; you count class 0": lambda p, t: _scores(
            1 - p, 1 - t
        ),
        "F1 is the harmonic mean, 2 P R / (P + R), not the arithmetic "
        "one": _scores_with_f1(lambda p, r: (p + r) / 2),
        "F1 is 2 P R / (P + R); the geometric mean is larger": _scores_with_f1(
            lambda p, r: math.sqrt(p * r)
        ),
        "F1 is 2 P R / (P + R); the 2 is missing": _scores_with_f1(
            lambda p, r: _ratio(p * r, p + r)
        ),
        "F1 is 2 TP / (2 TP + FP + FN); without the 2 it is "
        "another score, Jaccard's": _jaccard,
        "accuracy counts the true negatives too": _hits_only,
        "return parts of 1, not percent": lambda p, t: tuple(
            100 * score for score in _scores(p, t)
        ),
        "0/0 is nan; a score without cases counts as 0 here": _scores_with_nan,
    },
    hint=(
        "(TP + TN) / N, TP / (TP + FP), TP / (TP + FN), 2 TP / (2 TP + FP + FN), in "
        "this order, and 0 where the divisor is 0"
    ),
)

# ---- merged_statistics --------------------------------------------------------------


def _merged(counts: Tensor, means: Tensor, variances: Tensor) -> _Parts:
    filled = counts > 0
    c = counts[filled].double()[:, None]  # (R, 1)
    m, v = means[filled], variances[filled]  # (R, K)
    mean = (c * m).sum(0) / c.sum()
    return mean, (c * (v + (m - mean).square())).sum(0) / c.sum()


def _merged_with(
    variance: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor, Tensor], _Parts]:
    """Return the answer with the right mean and this variance of the filled ranks."""

    def merged(counts: Tensor, means: Tensor, variances: Tensor) -> _Parts:
        filled = counts > 0
        c = counts[filled].double()[:, None]
        mean = _merged(counts, means, variances)[0]
        return mean, variance(c, means[filled], variances[filled])

    return merged


def _between(c: Tensor, m: Tensor) -> Tensor:
    return (c * (m - (c * m).sum(0) / c.sum()).square()).sum(0) / c.sum()


def _unguarded(counts: Tensor, means: Tensor, variances: Tensor) -> _Parts:
    c = counts.double()[:, None]
    mean = (c * means).sum(0) / c.sum()
    return mean, (c * (variances + (means - mean).square())).sum(0) / c.sum()


def _ranks(*shards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the arguments that these shards give."""
    means = torch.stack([shard.mean(0) for shard in shards])
    return (
        _integers(*map(len, shards)),
        means,
        torch.stack([(shard - shard.mean(0)).square().mean(0) for shard in shards]),
    )


_MERGED_STATISTICS = Exercise(
    name="merged_statistics",
    arguments=("counts", "means", "variances"),
    reference=_merged,
    cases=[
        _ranks(_table([1], [2], [6]), _table([10], [14])),
        _ranks(_random(5, 2, seed=1), _random(3, 2, seed=2, shift=4.0)),
        _ranks(_random(4, 3, seed=3), _random(4, 3, seed=4), _random(4, 3, seed=5)),
        _ranks(_table([3, 1]), _table([5, 1]), _table([9, 1])),  # one row each
        _ranks(_random(7, 2, seed=6)),  # one rank
        _ranks(_random(9, 2, seed=7), _random(1, 2, seed=8, shift=30.0)),
        _ranks(_random(6, 2, seed=9), _random(0, 2, seed=0), _random(2, 2, seed=10)),
        _ranks(_random(6, 2, seed=11, shift=1e8), _random(3, 2, seed=12, shift=1e8)),
    ],
    mistakes={
        "ranks with more rows weigh more: multiply by the counts": lambda c, m, v: (
            m.nanmean(0),
            v.nanmean(0) + (m - m.nanmean(0)).square().nanmean(0),
        ),
        "a mean of means and of variances treats every rank alike, and leaves out "
        "that the means differ": lambda c, m, v: (m.nanmean(0), v.nanmean(0)),
        "the means of the ranks differ too: add the weighted mean of (their mean - the "
        "mean)^2": _merged_with(lambda c, m, v: (c * v).sum(0) / c.sum()),
        "the variances within the ranks are missing": _merged_with(
            lambda c, m, v: _between(c, m)
        ),
        "return the variance, not its root": _merged_with(
            lambda c, m, v: ((c * v).sum(0) / c.sum() + _between(c, m)).sqrt()
        ),
        "these variances are over N: divide by the sum of the counts, not by one "
        "less": _merged_with(
            lambda c, m, v: (
                ((c * v).sum(0) / c.sum() + _between(c, m)) * c.sum() / (c.sum() - 1)
            )
        ),
        "0 x nan is nan: leave out the ranks without rows": _unguarded,
    },
    hint=(
        "mean = sum of counts x means / N; variance = sum of counts x (variances + "
        "(means - mean)^2) / N; leave out the ranks without rows; far from 0 a "
        "difference of squares loses all digits, and so does a share counts / N, which "
        "is float32: take counts.double()"
    ),
)

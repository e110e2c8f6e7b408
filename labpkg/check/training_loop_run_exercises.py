"""Checkers of the exercises of the chapter foundations/training_loop about its run.

Notation: N rows, K columns, P ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def early_stopping(fn: Callable[..., Any]) -> CheckResult:
    """Check `early_stopping(losses, patience)`: (best epoch, number of epochs run).

    Epochs count from 1. An epoch is an improvement if its loss is below all before it.
    Training stops after `patience` epochs in a row that are none, or at the end.

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _EARLY_STOPPING.check(fn)


def stage_speedup(fn: Callable[..., Any]) -> CheckResult:
    """Check `stage_speedup(seconds, is_parallel, num_ranks)`: Amdahl's law on stages.

    Stage i takes seconds[i] on one rank; P ranks divide that by P if is_parallel[i],
    and leave it as it is otherwise. Return how many times faster the whole becomes.

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Amdahl 1967, AFIPS.
    """
    return _STAGE_SPEEDUP.check(fn)


def whole_run(fn: Callable[..., Any]) -> CheckResult:
    """Check `whole_run(x, y, x_val, y_val, lr, patience, max_epochs)`.

    Standardise with the statistics of x. From w = 0, b = 0 take one step of gradient
    descent per epoch on the mean cross-entropy of p = sigmoid(x w + b). Stop when the
    validation loss had no new minimum for `patience` epochs. Return (best epoch, w, b)
    of the epoch with the smallest validation loss; epochs count from 1.

    Shape:
        x (N, K), y (N,) 0 or 1, x_val (M, K), y_val (M,) -> int, (K,), ()

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _WHOLE_RUN.check(fn)


# ---- stage_speedup ------------------------------------------------------------------


def _stage_sums(seconds: list[float], parallel: list[bool]) -> tuple[float, float]:
    """Return the seconds of the serial stages and of the parallel ones."""
    both = list(zip(seconds, parallel, strict=True))
    return sum(s for s, p in both if not p), sum(s for s, p in both if p)


def _speedup(seconds: list[float], parallel: list[bool], ranks: int) -> float:
    serial, divided = _stage_sums(seconds, parallel)
    return (serial + divided) / (serial + divided / ranks)


def _fraction(seconds: list[float], parallel: list[bool]) -> float:
    return _stage_sums(seconds, parallel)[1] / sum(seconds)


_STAGE_SPEEDUP = Exercise(
    name="stage_speedup",
    arguments=("seconds", "is_parallel", "num_ranks"),
    reference=_speedup,
    cases=[
        ([1.0, 2.0, 6.0, 1.0], [False, True, True, False], 8),
        ([5.0, 95.0], [False, True], 64),
        ([0.5, 3.0, 0.5], [False, True, False], 8),
        ([2.0, 2.0, 4.0], [True, False, True], 3),
        ([3.0, 1.0], [True, True], 5),  # all of it
        ([3.0, 1.0], [False, False], 5),  # nothing
        ([3.0, 1.0], [True, False], 1),  # one rank
        ([10.0, 0.1, 0.2], [True, False, True], 1024),
    ],
    mistakes={
        "that is the number of ranks; the stages that are not parallel keep their "
        "time": lambda s, p, n: float(n),
        "this is the time on P ranks; return the time on one rank divided by "
        "it": lambda s, p, n: sum(s) / _speedup(s, p, n),
        "the other way round: time on one rank divided by time on P "
        "ranks": lambda s, p, n: 1 / _speedup(s, p, n),
        "the parallel stages and the others are swapped": lambda s, p, n: _speedup(
            s, [not it for it in p], n
        ),
        "this is the parallel fraction f; the speed-up is 1 / ((1 - f) + f / "
        "P)": lambda s, p, n: _fraction(s, p),
        "this is the efficiency, speed-up / P": lambda s, p, n: _speedup(s, p, n) / n,
        "this is Gustafson's law, for a problem that grows with P; here the problem "
        "stays": lambda s, p, n: 1 + (n - 1) * _fraction(s, p),
        "the fraction is one of the seconds, not of the number of "
        "stages": lambda s, p, n: _speedup([1.0] * len(s), p, n),
        "a mean of the speed-ups of the stages is not the speed-up of the whole; add "
        "times": lambda s, p, n: sum(n if it else 1 for it in p) / len(p),
    },
    hint="sum of the seconds, divided by (serial seconds + parallel seconds / P)",
)

# ---- early_stopping -----------------------------------------------------------------


def _stop(
    losses: list[float],
    patience: int,
    *,
    improves: Callable[[float, float], bool] = lambda loss, best: loss < best,
    resets: bool = True,
) -> tuple[int, int]:
    """Return the best epoch and the last one that is run."""
    best, best_epoch, waited = math.inf, 0, 0
    for epoch, loss in enumerate(losses, 1):
        if improves(loss, best):
            best, best_epoch = loss, epoch
            waited = 0 if resets else waited
        else:
            waited += 1
        if waited == patience:
            return best_epoch, epoch
    return best_epoch, len(losses)


def _smallest(losses: list[float]) -> int:
    """Return the epoch of the smallest loss, leaving out nan."""
    return min(range(len(losses)), key=lambda i: (math.isnan(losses[i]), losses[i])) + 1


def _against_previous(losses: list[float], patience: int) -> tuple[int, int]:
    waited = 0
    for epoch in range(2, len(losses) + 1):
        waited = 0 if losses[epoch - 1] < losses[epoch - 2] else waited + 1
        if waited == patience:
            return _smallest(losses[:epoch]), epoch
    return _smallest(losses), len(losses)


_EARLY_STOPPING = Exercise(
    name="early_stopping",
    arguments=("losses", "patience"),
    reference=_stop,
    cases=[
        ([1.0, 0.8, 0.9, 0.85, 0.7, 0.75, 0.72, 0.71, 0.73, 0.74, 0.75, 0.5], 3),
        ([1.0, 0.8, 0.9, 0.85, 0.7, 0.75, 0.72, 0.71, 0.73, 0.74, 0.75, 0.5], 4),
        # It falls again, but not below the best:
        ([1.0, 0.9, 0.95, 0.94, 0.8, 0.85, 0.86, 0.7], 2),
        ([3.0, 2.0, 1.0], 2),  # the end comes first
        ([1.0, 2.0, 0.5], 1),
        ([1.0, 2.0, 3.0, 4.0], 2),
        ([0.5, 0.5, 0.5, 0.6, 0.7, 0.4], 2),  # equal is no improvement
        ([0.9, 1.1, 0.8, 1.1, 0.7, 1.1, 0.6], 2),
        ([0.5], 3),
        ([0.9, math.nan, 0.7, math.nan, math.nan, 0.1, 0.2, 0.3, 0.05], 2),
    ],
    mistakes={
        "the best epoch comes first, then the number of epochs run": lambda v, n: _stop(
            v, n
        )[::-1],
        "epochs count from 1: both numbers are one too small": lambda v, n: tuple(
            number - 1 for number in _stop(v, n)
        ),
        "the best epoch counts from 1 too; an index counts from 0": lambda v, n: (
            _stop(v, n)[0] - 1,
            _stop(v, n)[1],
        ),
        "one epoch too many: stop as soon as `patience` epochs brought no "
        "improvement": lambda v, n: _stop(v, n + 1),
        "one epoch too few: `patience` epochs without improvement are "
        "allowed": lambda v, n: _stop(v, n - 1) if n > 1 else (1, 1),
        "return the epoch with the smallest loss, not the last one": lambda v, n: (
            _stop(v, n)[1],
            _stop(v, n)[1],
        ),
        "compare with the best loss so far, not with the loss before": (
            _against_previous
        ),
        "an improvement starts the count again: `patience` epochs in a "
        "row": lambda v, n: _stop(v, n, resets=False),
        "an equal loss is no improvement: compare with <": lambda v, n: _stop(
            v, n, improves=lambda loss, best: loss <= best
        ),
        "nan is no improvement: ask `loss < best`, not `loss >= best`": lambda v, n: (
            _stop(v, n, improves=lambda loss, best: not loss >= best)
        ),
        "you look at all losses, which a run that stops does not see, and count epochs "
        "from 0": lambda v, n: (_smallest(v) - 1, len(v)),
        "you look at all losses; a run that stops never sees the later "
        "ones": lambda v, n: (_smallest(v), len(v)),
    },
    hint=(
        "keep the best loss, its epoch, and the number of epochs since then; stop "
        "when that number reaches patience"
    ),
)

# ---- whole_run ----------------------------------------------------------------------

_Run = tuple[int, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recipe:
    """A whole run; each field is a place where one can go wrong.

    Attributes:
        scale: (x, x_val) -> both as the model sees them.
        mean: Whether the gradient is that of the mean over N, not of the sum.
        bias: Whether b is trained.
        watches_training: Whether the training loss decides instead of the validation's.
        patient: Whether the run stops after `patience` epochs.
        late: How many epochs it stops too late.
        keeps_best: Whether the weights of the best epoch are returned, not the last.
        tests_first: Whether an epoch is evaluated before its step.
        first: The number of the first epoch.
    """

    scale: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    mean: bool = True
    bias: bool = True
    watches_training: bool = False
    patient: bool = True
    late: int = 0
    keeps_best: bool = True
    tests_first: bool = False
    first: int = 1

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        x_val: Tensor,
        y_val: Tensor,
        lr: float,
        patience: int,
        max_epochs: int,
    ) -> _Run:
        x, x_val = self.scale(x, x_val)
        watched = (x, y) if self.watches_training else (x_val, y_val)
        w, b = torch.zeros_like(x[0]), torch.zeros_like(x[0, 0])
        best, kept, waited = math.inf, (0, w, b), 0
        for epoch in range(self.first, self.first + max_epochs):
            error = (torch.sigmoid(x @ w + b) - y) / (len(y) if self.mean else 1)
            new_w = w - lr * x.T @ error
            new_b = b - lr * error.sum() if self.bias else b
            loss = _mean_loss(
                *watched, *((w, b) if self.tests_first else (new_w, new_b))
            )
            w, b = new_w, new_b
            waited += 1
            if loss < best:
                best, kept, waited = loss, (epoch, w, b), 0
            if self.patient and waited == patience + self.late:
                break
        return kept if self.keeps_best else (kept[0], w, b)


def _mean_loss(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> float:
    z = x @ w + b
    return torch.nn.functional.binary_cross_entropy_with_logits(z, y.to(z)).item()


def _fitted(
    fit: Tensor, x: Tensor, x_val: Tensor, correction: int = 0
) -> tuple[Tensor, Tensor]:
    mean, std = fit.mean(0), fit.std(0, correction=correction)
    return (x - mean) / std, (x_val - mean) / std


def _by_train(x: Tensor, x_val: Tensor) -> tuple[Tensor, Tensor]:
    return _fitted(x, x, x_val)


def _task(seed: int, lr: float, patience: int, max_epochs: int) -> tuple[Any, ...]:
    """Return few noisy rows of two classes: their validation loss turns up again."""
    N, K = 6, 2
    generator = torch.Generator("cpu").manual_seed(seed)
    options: Any = {"generator": generator, "device": "cpu"}
    y = torch.arange(2 * N, device="cpu") % 2
    x = torch.randn(2 * N, K, dtype=torch.float64, **options)
    x = (x + 0.7 * y[:, None]) * 3 + 5
    return x[:N], y[:N], x[N:], y[N:], lr, patience, max_epochs


_WHOLE_RUN = Exercise(
    name="whole_run",
    arguments=("x", "y", "x_val", "y_val", "lr", "patience", "max_epochs"),
    reference=_Recipe(scale=_by_train),
    cases=[
        _task(0, 0.5, 3, 40),
        _task(6, 0.5, 3, 40),
        _task(2, 0.5, 5, 40),
        _task(4, 0.5, 3, 40),
        _task(42, 12.0, 3, 40),  # the loss jumps: a lower one follows the stop
        _task(31, 12.0, 3, 40),  # and it follows at once
        _task(31, 0.5, 3, 40),  # the end comes first
        _task(3, 2.0, 1, 10),  # the first epoch is the best
    ],
    mistakes={
        "the validation rows take part in mean and std; fit both on x alone": _Recipe(
            scale=lambda x, v: _fitted(torch.cat([x, v]), x, v)
        ),
        "the validation rows are scaled with their own mean and std; use those of "
        "x": _Recipe(scale=lambda x, v: (_by_train(x, v)[0], _by_train(v, v)[1])),
        "the validation rows are not standardised; use the mean and std of x": _Recipe(
            scale=lambda x, v: (_by_train(x, v)[0], v)
        ),
        "the std is over N here, not over N - 1: x.std(0, correction=0)": _Recipe(
            scale=lambda x, v: _fitted(x, x, v, correction=1)
        ),
        "the rows are not standardised": _Recipe(scale=lambda x, v: (x, v)),
        "the loss is a mean over the rows of x, so its gradient is too: divide by "
        "N": _Recipe(scale=_by_train, mean=False),
        "b is trained too: its gradient is the mean of p - y": _Recipe(
            scale=_by_train, bias=False
        ),
        "the training loss decides here, and it hardly ever rises; watch the loss of "
        "x_val": _Recipe(scale=_by_train, watches_training=True),
        "the run never stops early: break when `patience` epochs brought no new "
        "minimum": _Recipe(scale=_by_train, patient=False),
        "one epoch too many: stop as soon as `patience` epochs brought no new "
        "minimum": _Recipe(scale=_by_train, late=1),
        "one epoch too few: `patience` epochs without a new minimum are "
        "allowed": _Recipe(scale=_by_train, late=-1),
        "these are the weights of the last epoch; keep a copy at each new minimum and "
        "return that": _Recipe(scale=_by_train, keeps_best=False),
        "the validation loss of an epoch is taken after its step": _Recipe(
            scale=_by_train, tests_first=True
        ),
        "epochs count from 1": _Recipe(scale=_by_train, first=0),
    },
    hint=(
        "per epoch: p = sigmoid(x w + b), w -= lr x.T (p - y) / N, b -= lr mean(p - "
        "y), then the mean validation loss; keep (epoch, copies of w and b) at each "
        "new minimum"
    ),
)

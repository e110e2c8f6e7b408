import math
from typing import Any

import pytest
import torch

from labpkg import check
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.training_loop_run_exercises"
}


def stage_speedup(seconds, is_parallel, num_ranks):
    f = sum(s for s, p in zip(seconds, is_parallel, strict=True) if p) / sum(seconds)
    return 1 / (1 - f + f / num_ranks)


def early_stopping(losses, patience):
    best_epoch = 1
    for epoch, loss in enumerate(losses, 1):
        if loss < losses[best_epoch - 1]:
            best_epoch = epoch
        if epoch - best_epoch == patience:
            return best_epoch, epoch
    return best_epoch, len(losses)


def whole_run(x, y, x_val, y_val, lr, patience, max_epochs):
    """Train the same model through autograd."""
    mean, std = x.mean(0), x.std(0, correction=0)
    model = torch.nn.Linear(x.shape[1], 1, dtype=x.dtype)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def loss_of(table, labels):
        logits = model((table - mean) / std).squeeze(1)
        return torch.nn.BCEWithLogitsLoss()(logits, labels.double())

    losses, kept = [], []
    for _ in range(max_epochs):
        optimizer.zero_grad()
        loss_of(x, y).backward()
        optimizer.step()
        losses.append(loss_of(x_val, y_val).item())
        kept.append((model.weight[0].clone(), model.bias[0].clone()))
        best, run = early_stopping(losses, patience)
        if run - best == patience:
            break
    return best, *kept[best - 1]


RIGHT = [
    ("stage_speedup", stage_speedup),
    ("early_stopping", early_stopping),
    ("early_stopping", lambda v, n: list(early_stopping(v, n))),
    ("whole_run", whole_run),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message
    assert result.cases >= 8


def swap(answer):
    return lambda *arguments: answer(*arguments)[::-1]


def counts_from_zero(losses, patience):
    return tuple(number - 1 for number in early_stopping(losses, patience))


def all_losses(losses, patience):
    return losses.index(min(losses)) + 1, len(losses)


def at_the_first_rise(losses, patience):
    for epoch in range(1, len(losses)):
        if losses[epoch] > losses[epoch - 1]:
            return epoch, epoch + 1
    return len(losses), len(losses)


def trapped_by_nan(losses, patience):
    best, best_epoch = math.inf, 0
    for epoch, loss in enumerate(losses, 1):
        if not loss >= best:
            best, best_epoch = loss, epoch
        if epoch - best_epoch == patience:
            return best_epoch, epoch
    return best_epoch, len(losses)


def last_weights(x, y, x_val, y_val, lr, patience, max_epochs):
    best = whole_run(x, y, x_val, y_val, lr, patience, max_epochs)[0]
    epochs = min(best + patience, max_epochs)
    return best, *whole_run(x, y, x, y, lr, epochs, epochs)[1:]


def with_patience(change):
    return lambda x, y, v, t, lr, patience, epochs: whole_run(
        x, y, v, t, lr, patience + change, epochs
    )


def without_patience(x, y, x_val, y_val, lr, patience, max_epochs):
    return whole_run(x, y, x_val, y_val, lr, max_epochs, max_epochs)


def watching_training(x, y, x_val, y_val, *rest):
    return whole_run(x, y, x, y, *rest)


WRONG = [
    ("stage_speedup", lambda s, p, n: s, "returns its argument"),
    ("stage_speedup", lambda s, p, n: n, "that is the number of ranks"),
    ("stage_speedup", lambda s, p, n: 1 / stage_speedup(s, p, n), "the other way"),
    (
        "stage_speedup",
        lambda s, p, n: stage_speedup(s, [not it for it in p], n),
        "swapped",
    ),
    (
        "stage_speedup",
        lambda s, p, n: sum(t / n if it else t for t, it in zip(s, p, strict=True)),
        "this is the time on P ranks",
    ),
    ("stage_speedup", lambda s, p, n: 2 * stage_speedup(s, p, n), "sum of the seconds"),
    ("early_stopping", lambda v, n: v, "returns its argument"),
    ("early_stopping", all_losses, "you look at all losses"),
    ("early_stopping", swap(early_stopping), "the best epoch comes first"),
    ("early_stopping", counts_from_zero, "epochs count from 1"),
    ("early_stopping", lambda v, n: early_stopping(v, n + 1), "one epoch too many"),
    ("early_stopping", trapped_by_nan, "nan is no improvement"),
    ("early_stopping", at_the_first_rise, "keep the best loss"),
    ("early_stopping", lambda v, n: early_stopping(v, n)[0], "return a tuple of 2"),
    ("whole_run", lambda x, *rest: x, "returns its argument"),
    ("whole_run", last_weights, "weights of the last epoch"),
    ("whole_run", without_patience, "never stops early"),
    ("whole_run", with_patience(+1), "one epoch too many"),
    ("whole_run", with_patience(-1), "one epoch too few"),
    ("whole_run", watching_training, "the training loss decides here"),
    (
        "whole_run",
        lambda x, y, v, t, lr, *rest: whole_run(x, y, v, t, 2 * lr, *rest),
        "per epoch: p = sigmoid",
    ),
    (
        "whole_run",
        lambda x, y, v, t, lr, *rest: whole_run(x, y, v, t, lr * len(y), *rest),
        "divide by N",
    ),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG

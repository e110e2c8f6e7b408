"""Checkers of the last exercises of the chapter parallelism/pipeline: a whole step.

One computes the gradients of a pipeline, the other the time of any schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise

Orders = Sequence[Sequence[str]]


def micro_batch_gradients(fn: Callable[..., Any]) -> CheckResult:
    """Check `micro_batch_gradients(x, y, weights, num_micro_batches)`.

    Stage s computes tanh(h W_s) from what the stage before sends; the loss is the mean
    over the samples of the batch of half the squared distance to `y`.

    Args:
        fn: your function; it returns a list with the gradient for each weight.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Shape:
        x (B, D_0), y (B, D_P), weights[s] (D_s, D_{s+1}); M divides B.
    """
    return _MICRO_BATCH_GRADIENTS.check(fn)


def step_time(fn: Callable[..., Any]) -> CheckResult:
    """Check `step_time(orders, forward_s, backward_s, transfer_s)`: when a step ends.

    `orders[s]` is what stage s does, in order: texts such as `F3` and `B3`. An action
    starts when its stage is free and what it needs is there; a message arrives
    `transfer_s` after the action that made it, and holds up nobody.

    Args:
        fn: your function; it returns seconds, infinity if stages wait for ever.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _STEP_TIME.check(fn)


def _gradients(
    x: Tensor, y: Tensor, weights: Sequence[Tensor], num_micro_batches: int
) -> list[Tensor]:
    """Return the gradients, with the numbers of the batch that are differentiated."""
    return _backward(x, y, weights)


def _backward(
    x: Tensor, y: Tensor, weights: Sequence[Tensor], *, slope: bool = True
) -> list[Tensor]:
    """Go through the whole batch at once, by hand."""
    inputs = [x]
    for W in weights:
        inputs.append(torch.tanh(inputs[-1] @ W))
    delta, grads = (inputs[-1] - y) / len(x), []
    for s in reversed(range(len(weights))):
        z = delta * (1 - inputs[s + 1] ** 2) if slope else delta
        grads.append(inputs[s].T @ z)
        delta = z @ weights[s].T
    return grads[::-1]


def _pieces(x: Tensor, y: Tensor, weights: Sequence[Tensor], M: int) -> list[Any]:
    return [
        _backward(xs, ys, weights)
        for xs, ys in zip(x.chunk(M), y.chunk(M), strict=True)
    ]


def _summed(
    x: Tensor, y: Tensor, weights: Sequence[Tensor], num_micro_batches: int
) -> list[Tensor]:
    pieces = _pieces(x, y, weights, num_micro_batches)
    return [torch.stack(each).sum(0) for each in zip(*pieces, strict=True)]


def _last_piece(
    x: Tensor, y: Tensor, weights: Sequence[Tensor], num_micro_batches: int
) -> list[Tensor]:
    return _pieces(x, y, weights, num_micro_batches)[-1]


def _last_piece_scaled(
    x: Tensor, y: Tensor, weights: Sequence[Tensor], num_micro_batches: int
) -> list[Tensor]:
    last = _last_piece(x, y, weights, num_micro_batches)
    return [g / num_micro_batches for g in last]


def _no_messages(
    x: Tensor, y: Tensor, weights: Sequence[Tensor], num_micro_batches: int
) -> list[Tensor]:
    *before, last = _backward(x, y, weights)
    return [torch.zeros_like(g) for g in before] + [last]


def _total(
    x: Tensor, y: Tensor, weights: Sequence[Tensor], num_micro_batches: int
) -> list[Tensor]:
    return [g * len(x) for g in _backward(x, y, weights)]


def _transposed(
    x: Tensor, y: Tensor, weights: Sequence[Tensor], num_micro_batches: int
) -> list[Tensor]:
    return [g.T for g in _backward(x, y, weights)]


def _batch(num_samples: int, widths: Sequence[int], num_micro_batches: int) -> Any:
    generator = torch.Generator().manual_seed(num_samples + sum(widths))
    draw = lambda *shape: torch.randn(
        *shape, generator=generator, dtype=torch.float64, device="cpu"
    )
    weights = [draw(a, b) / a**0.5 for a, b in pairwise(widths)]
    x, y = draw(num_samples, widths[0]), draw(num_samples, widths[-1])
    return x, y, weights, num_micro_batches


_MICRO_BATCH_GRADIENTS = Exercise(
    name="micro_batch_gradients",
    arguments=("x", "y", "weights", "num_micro_batches"),
    reference=_gradients,
    cases=[
        _batch(6, (3, 2, 5), 3),  # all mistakes differ here
        _batch(6, (3, 4, 2), 1),
        _batch(6, (2, 3), 6),
        _batch(12, (5, 4, 3, 2), 3),
        _batch(8, (1, 6, 1, 6), 4),
        _batch(32, (8, 8, 8, 8, 8), 8),
    ],
    mistakes={
        "this adds up means of micro-batches; each of them counts 1 / M": _summed,
        "this keeps only the last micro-batch: add up over all of them": _last_piece,
        "this keeps only the last micro-batch, with the weight it has in the mean": (
            _last_piece_scaled
        ),
        "the stages before the last get nothing: send them the gradient of what they "
        "have sent": _no_messages,
        "the derivative of tanh is missing": lambda x, y, weights, M: _backward(
            x, y, weights, slope=False
        ),
        "this is the gradient of the sum over samples, not of the mean": _total,
        "the loss is half of the squared distance": lambda x, y, weights, M: [
            2 * g for g in _backward(x, y, weights)
        ],
        "the loss is the mean over samples; the squares of one sample are added": (
            lambda x, y, weights, M: [g / y.shape[1] for g in _backward(x, y, weights)]
        ),
        "the sign is turned: a gradient points uphill": lambda x, y, weights, M: [
            -g for g in _backward(x, y, weights)
        ],
        "these are in the order of backward; return them in that of the weights": (
            lambda x, y, weights, M: _backward(x, y, weights)[::-1]
        ),
        "these are transposed: a gradient has the shape of its weight": _transposed,
    },
    hint="for each micro-batch keep the input and the output of each stage; then go "
    "through the stages from the last, with the gradient of what each has sent",
    rtol=1e-8,
    atol=1e-12,
)


def _finish(
    orders: Orders,
    forward_s: float,
    backward_s: float,
    transfer_s: float,
    *,
    waits: str = "FB",
    passes: float = math.inf,
    loss_travels: bool = False,
    sender_waits: bool = False,
) -> float:
    """Let stages go on as long as one can; `waits` are the kinds that need messages."""
    last, end = len(orders) - 1, dict[tuple[int, str], float]()
    clocks, places, moved = [0.0] * len(orders), [0] * len(orders), True
    while moved and passes > 0:
        moved, passes = False, passes - 1
        for s, order in enumerate(orders):
            while places[s] < len(order):
                action = order[places[s]]
                needs = _needed(s, action, last) if action[0] in waits else None
                if needs is not None:
                    if needs not in end:
                        break
                    is_message = needs[0] != s or loss_travels
                    ready = end[needs] + transfer_s * is_message
                    clocks[s] = max(clocks[s], ready)
                clocks[s] += forward_s if action[0] == "F" else backward_s
                end[s, action] = clocks[s]
                after = s + 1 if action[0] == "F" else s - 1
                if sender_waits and 0 <= after <= last:
                    clocks[s] += transfer_s
                places[s] += 1
                moved = True
    stuck = any(at < len(order) for at, order in zip(places, orders, strict=True))
    return math.inf if stuck else max(clocks)


def _needed(stage: int, action: str, last: int) -> tuple[int, str] | None:
    if action[0] == "F":
        return (stage - 1, action) if stage else None
    return (stage + 1, action) if stage < last else (last, "F" + action[1:])


def _never_stuck(*case: Any) -> float:
    time_s = _finish(*case)
    return 0.0 if time_s == math.inf else time_s


def _all_work(
    orders: Orders, forward_s: float, backward_s: float, transfer_s: float
) -> float:
    time_s = {"F": forward_s, "B": backward_s}
    return sum(time_s[action[0]] for order in orders for action in order)


def _one_stage(orders: Orders, *times: float) -> float:
    return _all_work(orders, *times) / len(orders)


def _at_once(orders: Orders, forward_s: float, backward_s: float, _: float) -> float:
    return _finish(orders, forward_s, backward_s, 0.0)


def _words(*lines: str) -> list[list[str]]:
    return [line.split() for line in lines]


_GPIPE = "F0 F1 F2 B0 B1 B2"
_BY_TURNS = "F0 B0 F1 B1"

_STEP_TIME = Exercise(
    name="step_time",
    arguments=("orders", "forward_s", "backward_s", "transfer_s"),
    reference=_finish,
    cases=[
        (_words(_GPIPE, _GPIPE), 1.0, 2.0, 0.25),
        (_words("F0 B0"), 1.0, 2.0, 0.25),
        (_words("F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2"), 1.0, 2.0, 0.0),
        (_words(_BY_TURNS, _BY_TURNS, _BY_TURNS), 1.0, 2.0, 0.5),
        (_words("F0 F1 B1 B0", "F0 F1 B1 B0"), 0.5, 3.0, 4.0),
        (_words("F0 F1 B0 B1", "F1 F0 B0 B1"), 1.0, 1.0, 0.125),
        (_words(_BY_TURNS, "F1 F0 B1 B0"), 1.0, 2.0, 0.25),
        (_words("F0 F1 B0 B1", "B0 F0 F1 B1"), 1.0, 2.0, 0.25),
        (_words(_GPIPE, _GPIPE, _GPIPE, _GPIPE), 0.25, 0.5, 0.125),
    ],
    mistakes={
        "a stage that waits must be looked at again: go over all stages until nobody "
        "moves": lambda *case: _finish(*case, passes=1),
        "forward needs the activations of the stage before": lambda *case: _finish(
            *case, waits="B"
        ),
        "backward needs a gradient, from the stage after or from the loss": (
            lambda *case: _finish(*case, waits="F")
        ),
        "a message is on its way for transfer_s": _at_once,
        "the last stage has its own loss: that is no message": lambda *case: _finish(
            *case, loss_travels=True
        ),
        "a message holds up nobody: its sender goes on at once": lambda *case: _finish(
            *case, sender_waits=True
        ),
        "stages work at the same time: take the latest end, not the sum": _all_work,
        "this is the work of one stage; it also waits": _one_stage,
        "stages that wait for ever end at infinity": _never_stuck,
    },
    hint="while somebody can go on: an action starts at the later of two times, when "
    "its stage is free and when its message is there",
)

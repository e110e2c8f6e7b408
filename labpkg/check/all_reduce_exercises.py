"""Checkers of the two all-reduces of processes/collectives that the reader writes.

The ring is a function on a list of tensors, one for each rank. Halving and doubling
runs on real ranks: a `World` calls the reader's function, counts its messages and says
of each rank what it did; a deadlock is a wrong answer like others.

Notation: n ranks, S bytes of the tensor.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise
from labpkg.processes.diagnosis import RankError
from labpkg.processes.traffic import count_comms
from labpkg.processes.world import World

_LIMIT_S = 10


def ring_all_reduce(fn: Callable[..., Any]) -> CheckResult:
    """Check `ring_all_reduce(inputs)`: the sum on every rank, by the steps of a ring.

    Each input is cut by `tensor_split(n)`; piece j starts at rank j and travels to the
    right, collecting ((x_j + x_j+1) + x_j+2) + ...; then the finished pieces go round.
    One case tells this order from others by its rounding.

    Shape:
        n tensors (K,) -> n tensors (K,), for any K

    Args:
        fn: your function; it returns a list of tensors.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _RING.check(fn)


def halving_doubling(fn: Callable[..., Any]) -> CheckResult:
    """Check `halving_doubling(x)`: an all-reduce on real ranks, few bytes, few steps.

    Every rank calls the function with its vector and gets the sum. It may use
    `labpkg.send`, `recv` and `sendrecv`: 2 log2 n messages, 2 (n - 1) / n S bytes.
    There are 2, 4 or 8 ranks, and the length is a multiple of that.

    Shape:
        x (K,) -> (K,), on every rank

    Args:
        fn: your function; it returns a tensor.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _HALVING.check(partial(_on_ranks, fn) if callable(fn) else fn)


def _ranks(*rows: list[float]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.float32, device="cpu") for row in rows]


def _random(n: int, numel: int) -> tuple[list[Tensor]]:
    generator = torch.Generator("cpu").manual_seed(n * numel)
    draw = lambda: torch.randint(-9, 10, (numel,), generator=generator, device="cpu")
    return ([draw().float() for _ in range(n)],)


def _ring(
    inputs: list[Tensor],
    *,
    num_adds: int | None = None,
    num_copies: int | None = None,
    turn: int = 1,
) -> list[Tensor]:
    """Return what each rank holds after some steps of the two rounds of a ring."""
    n = len(inputs)
    held = [list(x.clone().tensor_split(n)) for x in inputs]
    for s in range(n - 1 if num_adds is None else num_adds):
        for r in range(n):
            j = (r - turn * s) % n
            held[(r + turn) % n][j] = held[(r + turn) % n][j] + held[r][j]
    for s in range(n - 1 if num_copies is None else num_copies):
        for r in range(n):
            j = (r + turn * (1 - s)) % n
            held[(r + turn) % n][j] = held[r][j]
    return [torch.cat(pieces) for pieces in held]


def _in_rank_order(inputs: list[Tensor]) -> list[Tensor]:
    total = inputs[0]
    for x in inputs[1:]:
        total = total + x
    return [total for _ in inputs]


def _without_the_rest(inputs: list[Tensor]) -> list[Tensor]:
    """Reduce only n pieces of floor(K / n) elements."""
    n = len(inputs)
    even = len(inputs[0]) // n * n
    sums = _ring([x[:even] for x in inputs])
    return [torch.cat([s, x[even:]]) for s, x in zip(sums, inputs, strict=True)]


_RING = Exercise(
    name="ring_all_reduce",
    arguments=("inputs",),
    reference=_ring,
    cases=[
        (_ranks([1, 2, 3], [10, 20, 30], [100, 200, 300]),),
        (_ranks([1, 2], [10, 20]),),
        _random(4, 8),
        (_ranks([1, 2, 3, 4, 5], [10, 20, 30, 40, 50], [100, 200, 300, 400, 500]),),
        _random(4, 3),
        (_ranks([7, 8, 9]),),
        (_ranks([1e8, 1e8, 1e8], [1, 1, 1], [-1e8, -1e8, -1e8]),),
        (_ranks([1e8] * 4, [1] * 4, [-1e8] * 4, [3] * 4),),
        _random(5, 7),
        _random(3, 1),
        _random(8, 24),
        _random(6, 13),
    ],
    mistakes={
        "only half: after n - 1 steps each rank has one finished piece; n - 1 more "
        "steps send the finished pieces round": partial(_ring, num_copies=0),
        "the second round has n - 1 steps too; the last piece has not arrived": (
            lambda inputs: _ring(inputs, num_copies=max(len(inputs) - 2, 0))
        ),
        "the first round has n - 1 steps, one for each rank that a piece has yet to "
        "meet": lambda inputs: _ring(inputs, num_adds=max(len(inputs) - 2, 0)),
        "n steps are one too many: the own part is added twice": lambda inputs: _ring(
            inputs, num_adds=len(inputs)
        ),
        "uneven pieces: with K not divisible by n the rest is never sent; cut with "
        "tensor_split": _without_the_rest,
        "elements are missing: with K not divisible by n the pieces differ by one; cut "
        "with tensor_split": lambda inputs: _ring(
            [x[: len(x) // len(inputs) * len(inputs)] for x in inputs]
        ),
        "the right sum, added in another order: on a ring piece j starts at rank j, so "
        "its first term is x_j": _in_rank_order,
        "this ring turns the other way: rank r sends to rank r + 1": partial(
            _ring, turn=-1
        ),
        "this is the mean; an all-reduce by sum does not divide": lambda inputs: [
            x / len(inputs) for x in _ring(inputs)
        ],
    },
    hint="step s: rank r sends piece r - s to rank r + 1, which adds it to its own",
)


def _on_ranks(fn: Callable[[Tensor], Any], n: int, num_elements: int) -> list[str]:
    """Run the reader's function on real ranks; return what each of them did."""
    with contextlib.redirect_stdout(io.StringIO()), World(n, device="cpu") as world:
        try:
            job = _observe, fn, num_elements
            return world.run(*job, timeout_s=_LIMIT_S, show=None)
        except RankError as error:
            summary = str(error).splitlines()[0].partition(": ")[2]
            hung = re.search(
                r"the run did not end within .*; it (waited in \w+)", summary
            )
            texts = {**error.others, error.rank: hung[1] if hung else summary}
            return [texts[rank] for rank in range(n)]


def _observe(fn: Callable[[Tensor], Any], num_elements: int) -> str:
    n, rank = dist.get_world_size(), dist.get_rank()
    steps = torch.arange(1, num_elements + 1, dtype=torch.float64, device="cpu")
    x = steps + 1000.0 * rank
    given = x.clone()
    with count_comms() as log:
        got = fn(x)
    swaps, sends, recvs = (log["world", op] for op in ("sendrecv", "send", "recv"))
    all_of = log["world"]
    num_other = all_of.calls - swaps.calls - sends.calls - recvs.calls
    text = f"{_verdict(got, given, n * steps + 500.0 * n * (n - 1))}, "
    text += f"{swaps.calls + sends.calls} messages, {all_of.wire_bytes:.0f} bytes"
    if num_other:
        text += f", {num_other} collectives"
    if not torch.equal(x, given):
        text += ", x is changed"
    return text


def _verdict(got: Any, x: Tensor, total: Tensor) -> str:
    if not isinstance(got, Tensor):
        return f"a {type(got).__name__}"
    if got.shape != x.shape:
        return f"a tensor of shape {tuple(got.shape)}"
    if torch.equal(got, total):
        return "the sum"
    return "x itself" if torch.equal(got, x) else "not the sum"


def _texts(
    verdict: str, messages: Callable[[int], int], tensors: Callable[[int], float]
) -> Callable[[int, int], list[str]]:
    """Return what `_on_ranks` says if each rank sends so many messages and tensors."""
    return lambda n, K: (
        [f"{verdict}, {messages(n)} messages, {8 * K * tensors(n):.0f} bytes"] * n
    )


def _log2(n: int) -> int:
    return n.bit_length() - 1


_both_ways: Callable[[int], float] = lambda n: 2 * (n - 1) / n
_HALVING = Exercise(
    name="halving_doubling",
    arguments=("n", "num_elements"),
    reference=_texts("the sum", lambda n: 2 * _log2(n), _both_ways),
    cases=[(2, 2), (4, 4), (2, 10), (4, 12), (8, 8), (8, 40)],
    mistakes={
        "the function returns its argument unchanged; nothing was sent": _texts(
            "x itself", lambda n: 0, lambda n: 0
        ),
        "the function returns nothing; end it with a return statement": _texts(
            "a NoneType", lambda n: 0, lambda n: 0
        ),
        "the right bytes in too many messages: this is a ring; halve the part that you "
        "own, with partners n/2, n/4, ..., 1 away": _texts(
            "the sum", lambda n: 2 * (n - 1), _both_ways
        ),
        "every message carries the whole tensor: this is recursive doubling; send only "
        "the half that your partner will own": _texts("the sum", _log2, _log2),
        "the halving is done, and each rank has one finished piece; go the same way "
        "back, and double the part that is finished": _texts(
            "not the sum", _log2, lambda n: (n - 1) / n
        ),
        "all ranks wait in send, since each waits for a receiver: use sendrecv": (
            lambda n, K: ["waited in send"] * n
        ),
        "all ranks wait in recv, and nobody sends: use sendrecv": (
            lambda n, K: ["waited in recv"] * n
        ),
        "this calls the library's all-reduce; make it from sendrecv": lambda n, K: [
            f"{text}, 1 collectives"
            for text in _texts("the sum", lambda n: 0, _both_ways)(n, K)
        ],
        "this asks torch.distributed itself, past the count; use lab.sendrecv": (
            lambda n, K: [
                f"{text}, x is changed"
                for text in _texts("the sum", lambda n: 0, lambda n: 0)(n, K)
            ]
        ),
        "right, but x belongs to the caller: work on x.clone()": lambda n, K: [
            f"{text}, x is changed"
            for text in _texts("the sum", lambda n: 2 * _log2(n), _both_ways)(n, K)
        ],
    },
    hint="what each rank did is shown in rank order; to see a traceback, run the "
    "function by lab.World(n).run",
)

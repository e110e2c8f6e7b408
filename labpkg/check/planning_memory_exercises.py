"""Checkers of the exercises of the chapter planning/memory: what is alive at once.

Notation: P stages, M micro-batches, L layers, V vocabulary. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labpkg.check.result import CheckResult, Exercise


def peak_of_lifetimes(fn: Callable[..., Any]) -> CheckResult:
    """Check `peak_of_lifetimes(lifetimes)`: the most bytes that are alive at once.

    A lifetime is `(first, last, num_bytes)`: a tensor that operation `first` makes and
    operation `last` uses for the last time; it is alive during both.

    Args:
        fn: your function; it returns a number of bytes, 0 without a tensor.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _PEAK_OF_LIFETIMES.check(fn)


def largest_micro_batch(fn: Callable[..., Any]) -> CheckResult:
    """Check `largest_micro_batch(memory, state, per_sequence, num_sequences)`.

    A rank has `num_sequences` in a step and takes them in micro-batches of equal size,
    one after the other. Beside its state it holds the activations of one micro-batch.

    Args:
        fn: your function; it returns the sequences of the largest micro-batch that
            fits, 0 if not even one sequence does.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _LARGEST_MICRO_BATCH.check(fn)


def best_interval(fn: Callable[..., Any]) -> CheckResult:
    """Check `best_interval(num_layers, block, entry)`: where to keep activations.

    Forward keeps the entry of every k-th layer, the first one's too. Backward computes
    the layers between two of them again, so that all blocks of one such piece are alive
    beside all the entries. The pieces have k layers, the last one may have fewer.

    Args:
        fn: your function; it returns the k with the smallest peak, of several the
            smallest.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Chen et al. 2016, arXiv:1604.06174.
    """
    return _BEST_INTERVAL.check(fn)


def stage_bytes(fn: Callable[..., Any]) -> CheckResult:
    """Check `stage_bytes(states, activations, num_micro_batches)` under 1F1B.

    Stage s of P holds its state, `states[s]` bytes, and `activations[s]` bytes for each
    micro-batch between its forward and its backward.

    Args:
        fn: your function; it returns a list: the peak of each stage.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Narayanan et al. 2021, arXiv:2006.09503.
    """
    return _STAGE_BYTES.check(fn)


def logit_pieces(fn: Callable[..., Any]) -> CheckResult:
    """Check `logit_pieces(num_tokens, vocab_size, itemsize, memory)`.

    The loss is computed piece by piece along the tokens. For a piece the logits and
    their gradient are alive, V numbers for each token in both.

    Args:
        fn: your function; it returns the fewest pieces, as equal as possible, of which
            even the largest fits into `memory`; 0 if one token does not.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _LOGIT_PIECES.check(fn)


Lifetimes = Sequence[tuple[int, int, int]]


def _alive(lifetimes: Lifetimes, at: int) -> int:
    return sum(size for first, last, size in lifetimes if first <= at <= last)


def _peak(lifetimes: Lifetimes) -> int:
    return max((_alive(lifetimes, first) for first, _, _ in lifetimes), default=0)


def _half_open(lifetimes: Lifetimes) -> int:
    return _peak([(first, last - 1, size) for first, last, size in lifetimes])


_PEAK_OF_LIFETIMES = Exercise(
    name="peak_of_lifetimes",
    arguments=("lifetimes",),
    reference=_peak,
    cases=[
        ([(0, 3, 4), (1, 2, 10), (2, 3, 1)],),
        ([(0, 1, 5), (1, 2, 7), (3, 3, 9)],),
        ([(0, 9, 1), (2, 4, 8), (5, 7, 8), (6, 6, 2)],),
        ([(4, 4, 3), (0, 0, 2)],),
        ([(i, 9 - i, 10) for i in range(5)],),
        ([(7, 9, 3), (1, 8, 2), (0, 2, 6)],),
        ([(0, 10**12, 1), (10**11, 10**12, 4)],),
        ([],),
    ],
    mistakes={
        "this adds all tensors, but some die before others are born": (
            lambda lifetimes: sum(size for _, _, size in lifetimes)
        ),
        "a tensor is alive during its last operation, too": _half_open,
        "this is the largest tensor; others are alive beside it": (
            lambda lifetimes: max((size for _, _, size in lifetimes), default=0)
        ),
        "this counts tensors; add their bytes": lambda lifetimes: _peak(
            [(first, last, 1) for first, last, _ in lifetimes]
        ),
    },
    hint="the total only grows where a tensor is born: look at those moments",
)


def _micro_batch(memory: int, state: int, per_sequence: int, num: int) -> int:
    sizes = [b for b in range(1, num + 1) if num % b == 0]
    return max((b for b in sizes if state + b * per_sequence <= memory), default=0)


def _not_a_divisor(memory: int, state: int, per_sequence: int, num: int) -> int:
    return max(0, min(num, (memory - state) // per_sequence))


def _at_least_one(memory: int, state: int, per_sequence: int, num: int) -> int:
    return max(1, _micro_batch(memory, state, per_sequence, num))


_LARGEST_MICRO_BATCH = Exercise(
    name="largest_micro_batch",
    arguments=("memory", "state", "per_sequence", "num_sequences"),
    reference=_micro_batch,
    cases=[
        (100, 40, 10, 12),
        (100, 40, 7, 12),
        (100, 40, 10, 7),
        (100, 40, 20, 64),
        (1000, 40, 10, 8),
        (100, 95, 10, 8),
        (100, 120, 10, 8),
        (80 * 10**9, 60 * 10**9, 3 * 10**9, 256),
    ],
    mistakes={
        "micro-batches have equal sizes: the size divides num_sequences": (
            _not_a_divisor
        ),
        "the state is in the same memory": lambda memory, state, per, num: _micro_batch(
            memory, 0, per, num
        ),
        "at most the memory: it may be full": lambda memory, state, per, num: (
            _micro_batch(memory - 1, state, per, num)
        ),
        "not even one sequence fits: return 0": _at_least_one,
        "this is the number of micro-batches": lambda memory, state, per, num: (
            num // _at_least_one(memory, state, per, num)
        ),
    },
    hint="try every size that divides num_sequences: state + size * per_sequence must "
    "be at most the memory",
)


def _interval_peak(num_layers: int, block: int, entry: int, k: int) -> int:
    return -(-num_layers // k) * entry + k * block


def _interval(num_layers: int, block: int, entry: int) -> int:
    sizes = range(1, num_layers + 1)
    return min(sizes, key=lambda k: _interval_peak(num_layers, block, entry, k))


def _rounded_root(num_layers: int, block: int, entry: int) -> int:
    return max(1, min(num_layers, round((num_layers * entry / block) ** 0.5)))


def _by_number_of_pieces(num_layers: int, block: int, entry: int) -> int:
    return -(-num_layers // _interval(num_layers, block, entry))


_BEST_INTERVAL = Exercise(
    name="best_interval",
    arguments=("num_layers", "block", "entry"),
    reference=_interval,
    cases=[
        (40, 4, 1),
        (16, 2, 2),
        (24, 16, 1),
        (7, 4, 3),
        (50, 5, 4),
        (1, 9, 1),
        (96, 34, 2),
        (100, 1, 100),
    ],
    mistakes={
        "this is the number of pieces; return the layers of one": _by_number_of_pieces,
        "sqrt(L entry / block) is where the peak is flat; compare the whole numbers, "
        "the number of pieces is rounded up": _rounded_root,
        "entries are smaller than blocks: sqrt(L) is right only where both are equal": (
            lambda num_layers, block, entry: round(num_layers**0.5)
        ),
        "block and entry have changed places": lambda num_layers, block, entry: (
            _interval(num_layers, entry, block)
        ),
        "this is the smallest peak; return the k that has it": lambda L, block, entry: (
            _interval_peak(L, block, entry, _interval(L, block, entry))
        ),
        "keeping every entry leaves one block alive, but all the entries": (
            lambda num_layers, block, entry: 1
        ),
    },
    hint="with k layers in a piece, ceil(L / k) entries and k blocks are alive",
)


def _stages(
    states: Sequence[int], activations: Sequence[int], num_micro_batches: int
) -> list[int]:
    P = len(states)
    return [
        states[s] + min(P - s, num_micro_batches) * activations[s] for s in range(P)
    ]


def _as_gpipe(
    states: Sequence[int], activations: Sequence[int], num_micro_batches: int
) -> list[int]:
    pairs = zip(states, activations, strict=True)
    return [state + num_micro_batches * kept for state, kept in pairs]


def _unlimited(
    states: Sequence[int], activations: Sequence[int], num_micro_batches: int
) -> list[int]:
    return _stages(states, activations, len(states))


def _reversed(
    states: Sequence[int], activations: Sequence[int], num_micro_batches: int
) -> list[int]:
    M = num_micro_batches
    pairs = enumerate(zip(states, activations, strict=True))
    return [state + min(s + 1, M) * kept for s, (state, kept) in pairs]


def _one_fewer(
    states: Sequence[int], activations: Sequence[int], num_micro_batches: int
) -> list[int]:
    peaks = _stages(states, activations, num_micro_batches)
    return [peak - kept for peak, kept in zip(peaks, activations, strict=True)]


_STAGE_BYTES = Exercise(
    name="stage_bytes",
    arguments=("states", "activations", "num_micro_batches"),
    reference=_stages,
    cases=[
        ([10, 10, 10, 10], [1, 1, 1, 1], 8),
        ([40, 30, 30, 50], [3, 2, 2, 7], 8),
        ([40, 30, 30, 50], [3, 2, 2, 7], 2),
        ([5, 5], [1, 9], 1),
        ([9, 8, 7], [0, 10**9, 2], 64),
        ([7], [3], 6),
        ([0, 0, 0], [4, 5, 6], 3),
        ([100 - s for s in range(16)], [s + 1 for s in range(16)], 12),
    ],
    mistakes={
        "1F1B: a stage starts backward as soon as it can, and does not keep all M": (
            _as_gpipe
        ),
        "there are no more micro-batches in flight than there are": _unlimited,
        "the first stage keeps the most: its micro-batches come back last": _reversed,
        "the micro-batch at work is alive as well: P - s, not P - s - 1": _one_fewer,
        "the states are missing": lambda states, activations, M: _stages(
            [0] * len(states), activations, M
        ),
        "one number for each stage": lambda *case: max(_stages(*case)),
    },
    hint="stage s has done P - s forwards when its first backward begins",
)


def _piece_bytes(num_tokens: int, vocab: int, itemsize: int, pieces: int) -> int:
    return 2 * -(-num_tokens // pieces) * vocab * itemsize


def _pieces(num_tokens: int, vocab_size: int, itemsize: int, memory: int) -> int:
    longest = memory // (2 * vocab_size * itemsize)  # tokens of a piece
    return -(-num_tokens // longest) if longest else 0


def _by_bytes(num_tokens: int, vocab_size: int, itemsize: int, memory: int) -> int:
    return -(-_piece_bytes(num_tokens, vocab_size, itemsize, 1) // memory)


def _rounded_down(num_tokens: int, vocab_size: int, itemsize: int, memory: int) -> int:
    return _piece_bytes(num_tokens, vocab_size, itemsize, 1) // memory


_LOGIT_PIECES = Exercise(
    name="logit_pieces",
    arguments=("num_tokens", "vocab_size", "itemsize", "memory"),
    reference=_pieces,
    cases=[
        (1000, 50, 4, 100_000),
        (1000, 50, 4, 90_000),
        (1000, 50, 4, 399_999),
        (1000, 50, 4, 400_000),
        (10, 100, 4, 2_500),
        (7, 100, 2, 799),
        (8192, 131_072, 4, 2**30),
        (4096, 32_000, 2, 2**20),
        (5, 1000, 4, 3_999),
    ],
    mistakes={
        "the gradient of the logits is as large as they are, and alive beside them": (
            lambda tokens, vocab, itemsize, memory: _pieces(
                tokens, vocab, itemsize, 2 * memory
            )
        ),
        "a token is not divided: how many whole tokens fit into the memory?": _by_bytes,
        "then the largest piece is too large: round up": _rounded_down,
        "one token does not fit: return 0": lambda tokens, vocab, itemsize, memory: (
            _pieces(tokens, vocab, itemsize, memory) or tokens
        ),
        "these are the tokens of a piece": lambda tokens, vocab, itemsize, memory: (
            memory // (2 * vocab * itemsize)
        ),
    },
    hint="first the most tokens whose logits and gradient fit, then the pieces",
)

"""How long communication takes, before it happens: latency and bandwidth.

A message of S bytes takes alpha + S beta. An algorithm that needs R rounds, one after
the other, and moves c S bytes through the busiest link takes R alpha + c S beta. So
each algorithm is two numbers; which one is fastest depends on n and on S beta / alpha.

Contract: S is the payload in bytes, n the ranks; times are in seconds; a link can send
and receive at once, and all ranks can use theirs at once. The formulas are the critical
paths of `labpkg.ring_all_reduce`, `tree_all_reduce` and `recursive_doubling_all_reduce`
and the bytes are those that `labpkg.count_comms` counts for them.

Standard library only. Chapter: processes/communication_cost. Reference: Thakur,
Rabenseifner, Gropp 2005, IJHPCA 19(1):49-66, doi:10.1177/1094342005051521.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class FitError(NamedTuple):
    """How far predictions are from measurements, relative to the measurements.

    Attributes:
        mean: Of the absolute relative errors; 0.1 is 10 %.
        max: The largest of them.
    """

    mean: float
    max: float


@dataclass(frozen=True, slots=True)
class AlphaBeta:
    """A link: a message of S bytes takes alpha + S beta seconds.

    Args:
        alpha_s: Seconds for a message of no bytes, the latency.
        beta_s_per_byte: Seconds for each byte, one over the bandwidth.

    Raises:
        ValueError: If a number is negative or not finite.

    Reference: Thakur et al. 2005, see the module.
    """

    alpha_s: float
    beta_s_per_byte: float

    def __post_init__(self) -> None:
        for value in (self.alpha_s, self.beta_s_per_byte):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"alpha_s={self.alpha_s} and beta_s_per_byte="
                    f"{self.beta_s_per_byte} must be finite and at least 0; give "
                    "seconds, and seconds per byte (1 / bandwidth)"
                )

    @property
    def half_bytes(self) -> float:
        """The size alpha / beta, half of whose time is latency and half is bytes."""
        if self.beta_s_per_byte == 0:
            return math.inf
        return self.alpha_s / self.beta_s_per_byte

    def time_s(self, num_bytes: float) -> float:
        """Return the seconds of one message.

        Args:
            num_bytes: Size of the message.
        """
        return self.alpha_s + num_bytes * self.beta_s_per_byte

    @classmethod
    def fit(cls, samples: Iterable[tuple[float, float]]) -> AlphaBeta:
        """Return the link that fits measurements best, by relative least squares.

        The sum of ((alpha + S beta) / t - 1)^2 is minimised over alpha, beta >= 0. With
        absolute errors the largest messages would decide alone, and alpha, thousands of
        times smaller than their times, would be what is left of their noise.

        Args:
            samples: Pairs (bytes, seconds) of at least two different sizes.

        Returns:
            The link; `error` says how good it is.

        Raises:
            ValueError: If all sizes are equal, a size is negative, or a time is not
                positive.
        """
        sizes, times = zip(*_checked(samples), strict=True)
        weights = [1 / seconds**2 for seconds in times]
        mean_size, mean_s = _mean(sizes, weights), _mean(times, weights)
        steps = [size - mean_size for size in sizes]
        beta = _dot(weights, steps, times) / _dot(weights, steps, steps)
        alpha = mean_s - beta * mean_size
        if alpha < 0:
            beta = _dot(weights, sizes, times) / _dot(weights, sizes, sizes)
            return cls(0.0, beta)
        return cls(alpha, beta) if beta >= 0 else cls(mean_s, 0.0)

    def error(self, samples: Iterable[tuple[float, float]]) -> FitError:
        """Return how far this link is from measurements.

        Args:
            samples: Pairs (bytes, seconds), for example some that were not fitted.

        Returns:
            The mean and the largest absolute value of predicted / measured - 1.

        Raises:
            ValueError: As `fit`, except that one size is enough.
        """
        samples = _checked(samples, num_sizes=1)
        errors = [abs(self.time_s(size) / seconds - 1) for size, seconds in samples]
        return FitError(math.fsum(errors) / len(errors), max(errors))


def _dot(*factors: Sequence[float]) -> float:
    return math.fsum(map(math.prod, zip(*factors, strict=True)))


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return _dot(values, weights) / math.fsum(weights)


def _checked(
    samples: Iterable[tuple[float, float]], num_sizes: int = 2
) -> list[tuple[float, float]]:
    samples = [(float(size), float(seconds)) for size, seconds in samples]
    for size, seconds in samples:
        if not (0 <= size < math.inf and 0 < seconds < math.inf):
            raise ValueError(
                f"the sample ({size} bytes, {seconds} s) needs at least 0 bytes and "
                "more than 0 s; leave out what could not be measured"
            )
    found = len({size for size, _ in samples})
    if found < num_sizes:
        raise ValueError(
            f"samples of at least {num_sizes} different sizes are needed, got {found}; "
            "measure small and large messages"
        )
    return samples


class _Cost(NamedTuple):
    """What an algorithm costs: rounds in a row, payloads through the busiest link."""

    rounds: int
    payloads: float


def _ring(n: int) -> _Cost:
    return _Cost(2 * (n - 1), 2 * (n - 1) / n)


def _tree(n: int) -> _Cost:
    rounds = 2 * (n - 1).bit_length()
    return _Cost(rounds, rounds)


def _recursive_doubling(n: int) -> _Cost:
    rounds = n.bit_length() - 1
    if n > 2**rounds:
        rounds += 2  # the ranks beyond the power of two hand over, and are told
    return _Cost(rounds, rounds)


_ALL_REDUCE = {
    "ring": _ring,
    "tree": _tree,
    "recursive_doubling": _recursive_doubling,
}


def _cost(algorithm: str, n: int) -> _Cost:
    if algorithm not in _ALL_REDUCE:
        known = ", ".join(_ALL_REDUCE)
        raise ValueError(f"algorithm={algorithm!r} is unknown; choose one of {known}")
    if n < 1:
        raise ValueError(f"n={n} is no number of ranks; choose at least 1")
    return _ALL_REDUCE[algorithm](n)


def _check_bytes(num_bytes: float) -> None:
    if not num_bytes >= 0:
        raise ValueError(
            f"num_bytes={num_bytes} must be at least 0; give the size of the tensor"
        )


def all_reduce_time(
    num_bytes: float, n: int, link: AlphaBeta, *, algorithm: str = "ring"
) -> float:
    """Return the seconds of an all-reduce of S bytes over n ranks.

    ring: 2 (n - 1) rounds with S / n bytes each. tree: 2 ceil(log2 n) rounds with S.
    recursive_doubling: log2 n rounds with S, or floor(log2 n) + 2 if n is no power of
    two. The ring has the fewest bytes and the most rounds.

    Args:
        num_bytes: S, bytes of the tensor.
        n: Ranks.
        link: Of each rank; along a ring that crosses links, the slowest.
        algorithm: `ring`, `tree` or `recursive_doubling`.

    Returns:
        Seconds; 0 for one rank. The additions themselves are not counted.

    Raises:
        ValueError: For an unknown `algorithm`, a negative size or n < 1.

    Reference: Thakur et al. 2005, see the module.
    """
    rounds, payloads = _cost(algorithm, n)
    _check_bytes(num_bytes)
    return rounds * link.alpha_s + payloads * num_bytes * link.beta_s_per_byte


def all_reduce_wire_bytes(
    num_bytes: float, n: int, *, algorithm: str = "ring"
) -> list[float]:
    """Return the bytes that each rank sends in an all-reduce of S bytes.

    On a ring every rank sends the same, 2 (n - 1) / n S, which no algorithm can
    undercut on average. A tree sends as much in all, but its root sends
    ceil(log2 n) S. In recursive doubling each rank sends log2 n S.

    Args:
        num_bytes: S, bytes of the tensor.
        n: Ranks.
        algorithm: `ring`, `tree` or `recursive_doubling`.

    Returns:
        A list of n sizes in rank order. For a ring the pieces are taken to be equal,
        as they are if n divides the number of elements.

    Raises:
        ValueError: As `all_reduce_time`.
    """
    cost = _cost(algorithm, n)
    _check_bytes(num_bytes)
    if algorithm == "ring":
        return [cost.payloads * num_bytes] * n
    copies = _copies_on_tree if algorithm == "tree" else _copies_when_doubling
    return [float(copies(rank, n) * num_bytes) for rank in range(n)]


def _copies_on_tree(rank: int, n: int) -> int:
    # Children are 1, 2, 4, ... ranks above, up to the rank's own lowest bit.
    lowest = rank & -rank if rank else n
    steps = range((lowest - 1).bit_length())
    return (rank > 0) + sum(rank + 2**k < n for k in steps)


def _copies_when_doubling(rank: int, n: int) -> int:
    rounds = n.bit_length() - 1
    if rank >= 2**rounds:
        return 1  # handed over before the swaps
    return rounds + (rank + 2**rounds < n)


def crossover_bytes(
    n: int,
    link: AlphaBeta,
    *,
    small: str = "recursive_doubling",
    large: str = "ring",
) -> float:
    """Return the size from which one all-reduce is at least as fast as another.

    With times R alpha + c S beta, they are equal at

        S = (R_large - R_small) / (c_small - c_large) * alpha / beta.

    Args:
        n: Ranks.
        link: Of each rank.
        small: The algorithm for small tensors, as in `all_reduce_time`.
        large: The algorithm for large tensors.

    Returns:
        Bytes: 0 if `large` is as fast for all sizes, infinity if `small` is faster for
        all large ones.

    Raises:
        ValueError: For an unknown algorithm or n < 1.
    """
    few, many = _cost(small, n), _cost(large, n)
    more_alpha_s = (many.rounds - few.rounds) * link.alpha_s
    less_beta = (few.payloads - many.payloads) * link.beta_s_per_byte
    if more_alpha_s <= 0 and less_beta >= 0:
        return 0.0
    if less_beta <= 0:
        return math.inf
    return more_alpha_s / less_beta


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a machine: so many units of the level below, joined by a link.

    A machine is a list of levels, the innermost first: `[Level("node", 8, inside),
    Level("network", 4, between)]` are 4 nodes of 8 ranks. Ranks are numbered along the
    innermost level first.

    Args:
        name: What it is called.
        size: Units of the level below that it joins; ranks on the innermost level.
        link: Of each rank when all ranks use this level at once. Where k ranks share a
            network card, beta is k times that of the card.

    Raises:
        ValueError: For a size below 1.
    """

    name: str
    size: int
    link: AlphaBeta

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(
                f"the level {self.name!r} has size={self.size}; it joins at least 1"
            )


def level_between(levels: Sequence[Level], first: int, second: int) -> Level:
    """Return the level at which the messages of two ranks pass.

    Args:
        levels: The machine, the innermost level first.
        first: A rank.
        second: Another rank.

    Returns:
        The innermost level that joins both.

    Raises:
        ValueError: If a rank is none of the machine, or both are the same.
    """
    n = math.prod(level.size for level in levels)
    if first == second or not (0 <= first < n and 0 <= second < n):
        raise ValueError(
            f"ranks {first} and {second} must be two different ranks of a machine of "
            f"{n}; choose from 0 to {n - 1}"
        )
    for level in levels:
        first, second = first // level.size, second // level.size
        if first == second:
            return level
    raise AssertionError("the outermost level joins all ranks")


def hierarchical_all_reduce_time(num_bytes: float, levels: Sequence[Level]) -> float:
    """Return the seconds of an all-reduce that goes level by level, on rings.

    Ranks of a unit first reduce-scatter, so that each holds a share of the sum; the
    shares are reduced on the levels above; then the unit all-gathers. Hence each level
    runs an all-reduce of S divided by the sizes of the levels inside it, and the slow
    outer links carry the least.

    Args:
        num_bytes: S, bytes of the tensor.
        levels: The machine, the innermost level first.

    Returns:
        Seconds, with one level after the other.

    Raises:
        ValueError: For a negative size.
    """
    _check_bytes(num_bytes)
    total_s, share = 0.0, num_bytes
    for level in levels:
        total_s += all_reduce_time(share, level.size, level.link)
        share /= level.size
    return total_s

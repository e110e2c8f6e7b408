"""Speed-up, efficiency, Little's law, utilisation: what times are held against.

`DividedWork` describes a job by two numbers, the seconds that ranks repeat and the
seconds that they divide. Amdahl asks what n ranks gain on the same work (strong
scaling), Gustafson on n times the work (weak scaling); both are a property of one
object, and two measured times fix it.
Utilisation divides by what the hardware could do, under a convention that must be said:
`palm_flops_per_token` is one, `ModelShape.flops_per_token` another.

Letters: n ranks, N parameters, L layers, D width, T sequence length. Standard library
only.

Chapter: planning/measuring.
References: Amdahl 1967, AFIPS, doi:10.1145/1465482.1465560; Gustafson 1988,
doi:10.1145/42411.42415; Karp and Flatt 1990, doi:10.1145/78607.78614; Little 1961,
doi:10.1287/opre.9.3.383; Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from labpkg.planning.communication import AlphaBeta


@dataclass(frozen=True, kw_only=True, slots=True)
class DividedWork:
    """Describe a job by what its ranks repeat and what they divide.

    On n ranks the same work takes serial + divided / n seconds, and n times the work,
    whose repeated part does not grow, serial + divided. Communication is not in it: it
    grows with n, so that times far beyond the fitted n are a bound.

    Args:
        serial_s: Seconds that each rank spends whatever n is.
        divided_s: Seconds of one rank that n ranks share.

    Raises:
        ValueError: If a time is negative or not finite, or if both are 0.
    """

    serial_s: float
    divided_s: float

    def __post_init__(self) -> None:
        both = self.serial_s, self.divided_s
        if not all(0 <= seconds < math.inf for seconds in both) or not any(both):
            raise ValueError(
                f"serial_s={self.serial_s} and divided_s={self.divided_s} must be "
                "finite, not negative and not both 0; pass measured seconds"
            )

    @classmethod
    def fit(cls, seconds: Mapping[int, float]) -> DividedWork:
        """Return the job that fits times of the same work on several numbers of ranks.

        The relative errors of serial + divided / n are squared and added up. Two times
        are met exactly unless a part would be negative. If one of them is of 1 rank,
        the serial fraction is the one of Karp and Flatt, communication included.

        Args:
            seconds: Number of ranks -> seconds, at least two of them.

        Returns:
            The job with neither part negative.

        Raises:
            ValueError: If there are fewer than two numbers of ranks, or one below 1, or
                if a time is not positive.

        Reference: Karp and Flatt 1990, doi:10.1145/78607.78614.
        """
        if len(seconds) < 2:
            raise ValueError(
                f"a fit needs times on two numbers of ranks, got {dict(seconds)}; "
                "measure on one more"
            )
        for n, taken_s in seconds.items():
            _require_ranks(n)
            _require_positive(seconds=taken_s)
        line = AlphaBeta.fit((1 / n, seconds[n]) for n in seconds)  # straight in 1 / n
        return cls(serial_s=line.alpha_s, divided_s=line.beta_s_per_byte)

    @property
    def serial_fraction(self) -> float:
        """Part of the time on one rank that is repeated."""
        return self.serial_s / (self.serial_s + self.divided_s)

    @property
    def max_speedup(self) -> float:
        """The bound that no number of ranks passes on the same work."""
        return math.inf if self.serial_s == 0 else 1 / self.serial_fraction

    def time_s(self, n: int) -> float:
        """Return the seconds of the same work on n ranks.

        Args:
            n: Ranks, at least 1.
        """
        _require_ranks(n)
        return self.serial_s + self.divided_s / n

    def speedup(self, n: int) -> float:
        """Return how many times faster n ranks are on the same work (Amdahl).

        1 / (s + (1 - s) / n) with s the serial fraction; at most n, and at most 1 / s.

        Args:
            n: Ranks, at least 1.

        Reference: Amdahl 1967, doi:10.1145/1465482.1465560.
        """
        return self.time_s(1) / self.time_s(n)

    def scaled_speedup(self, n: int) -> float:
        """Return how many times more work n ranks do in the time of one (Gustafson).

        s + (1 - s) n: without a bound, because what is divided grows with n.

        Args:
            n: Ranks, at least 1.

        Reference: Gustafson 1988, doi:10.1145/42411.42415.
        """
        _require_ranks(n)
        return (self.serial_s + n * self.divided_s) / self.time_s(1)


def parallel_efficiency(one_s: float, many_s: float, n: int) -> float:
    """Return the part of n ranks' time that is worth something: T1 / (n Tn).

    At most 1 if the one rank runs the best program for the same work: n ranks that
    took less than T1 / n could be imitated by one that does their work in turns.

    Args:
        one_s: Seconds of one rank.
        many_s: Seconds of n ranks for the same work.
        n: Ranks, at least 1.

    Returns:
        E, 1 if nothing is repeated, waited for or communicated.

    Raises:
        ValueError: If a time is not positive, or n below 1.
    """
    _require_ranks(n)
    _require_positive(one_s=one_s, many_s=many_s)
    return one_s / (n * many_s)


def littles_law(throughput_per_s: float, latency_s: float) -> float:
    """Return how many requests are in flight on average: N = X R.

    It holds for any system in which as many come as go, whatever the order, the
    distribution of times, or the number of workers.

    Args:
        throughput_per_s: X, requests that are answered per second.
        latency_s: R, mean seconds from the arrival of a request to its answer.

    Returns:
        N, the mean number over time.

    Raises:
        ValueError: If one of them is not positive.

    Reference: Little 1961, doi:10.1287/opre.9.3.383.
    """
    _require_positive(throughput_per_s=throughput_per_s, latency_s=latency_s)
    return throughput_per_s * latency_s


def palm_flops_per_token(
    num_parameters: float, *, num_layers: int, width: int, sequence_length: int
) -> float:
    """Return 6 N + 12 L D T, the FLOPs of a token forward and backward.

    The convention of most published utilisations. All parameters count, also those
    that no token is multiplied with (a table that is looked up, norms), a tied table
    once; the attention scores count in full although a causal mask needs half of them;
    nothing is recomputed. `ModelShape.flops_per_token` counts matrix products alone.

    Args:
        num_parameters: N.
        num_layers: L.
        width: D.
        sequence_length: T.

    Returns:
        FLOPs.

    Raises:
        ValueError: If one of them is not positive.

    Reference: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    _require_positive(
        num_parameters=num_parameters,
        num_layers=num_layers,
        width=width,
        sequence_length=sequence_length,
    )
    return 6 * num_parameters + 12 * num_layers * width * sequence_length


def model_flops_utilization(
    tokens_per_s: float, *, flops_per_token: float, peak_flops: float
) -> float:
    """Return the MFU, the part of the hardware's peak that the model made use of.

    Tokens and peak are both of one GPU, or both of all. What is recomputed does not
    count: with it, it is the hardware's utilisation (HFU), 4/3 as high where forward
    is repeated as a whole.

    Args:
        tokens_per_s: Measured throughput.
        flops_per_token: Forward and backward, under a convention.
        peak_flops: FLOP/s of the hardware in the precision of the matrix products,
            dense.

    Returns:
        A fraction, 0.4 for 40 %.

    Raises:
        ValueError: If one of them is not positive.

    Reference: Chowdhery et al. 2022, arXiv:2204.02311, section 4.1.
    """
    _require_positive(
        tokens_per_s=tokens_per_s,
        flops_per_token=flops_per_token,
        peak_flops=peak_flops,
    )
    return tokens_per_s * flops_per_token / peak_flops


def _require_ranks(n: int) -> None:
    if n < 1:
        raise ValueError(f"n={n} ranks cannot work; choose at least 1")


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(
                f"{name}={value} must be positive and finite; pass a measured value"
            )

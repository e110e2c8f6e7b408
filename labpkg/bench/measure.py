"""One harness for all comparisons, made for machines that do other work as well.

All variants live in the same ranks, or all in one process without any, and take turns,
in an order that rotates. Each sample holds the wall time, the CPU-seconds of all ranks
and the share of the machine that other processes used meanwhile. Ratios are medians
over pairs: a variant and the base variant of the same round, both quiet.

    samples = bench.alternate({"old": old, "new": new}, num_rounds=9)
    rows = bench.compare(samples, base="old", config="what was measured")

How to read it: wall ratios of quiet samples are the claim. With fewer than `MIN_QUIET`
of them trust the CPU-seconds, which foreign load hardly moves but which do not see
waiting. Measure equal code, too: what differs by less than that is no finding.

Chapter: planning/measuring. Reference: Mytkowicz et al. 2009, Producing wrong data
without doing anything obviously wrong!, ASPLOS, doi:10.1145/1508244.1508275.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from labpkg.processes.collectives import all_reduce
from labpkg.processes.messages import barrier

QUIET_SHARE = 0.10
MIN_QUIET = 5

_STAT = Path("/proc/stat")  # Linux only


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One measurement of one variant, the same on every rank.

    Attributes:
        wall_s: Seconds per call, of the slowest rank.
        cpu_s: CPU-seconds per call, summed over the ranks.
        foreign_share: Part of the machine that other processes used; None where the
            system does not tell.
    """

    wall_s: float
    cpu_s: float
    foreign_share: float | None = None

    @property
    def is_quiet(self) -> bool:
        """Whether other processes left the machine alone, as far as is known."""
        return self.foreign_share is None or self.foreign_share <= QUIET_SHARE


def alternate(
    variants: Mapping[str, Callable[[], object]],
    *,
    num_rounds: int,
    max_rounds: int | None = None,
    warm_up: int = 2,
    sample_s: float = 0.5,
    settle: Callable[[], object] | None = None,
    cpu_clock: Callable[[], float] = time.process_time,
) -> dict[str, list[Sample]]:
    """Measure variants in turns: A B C, B C A, C A B and so on.

    Every rank calls it with the same variants in the same order. All variants are
    called equally often. Without ranks it measures this process.

    Args:
        variants: What to call, by name. The first one decides how many calls make a
            sample.
        num_rounds: Rounds to measure.
        max_rounds: On a busy machine go on, up to so many, until `num_rounds` of them
            were quiet; by default no more than `num_rounds`.
        warm_up: Calls of each variant that are not measured.
        sample_s: Least length of a sample in seconds; the system counts its load in
            steps of 10 ms. With 0 each sample is one call.
        settle: What to do after each sample, and not to measure: to wait for what a
            variant has only begun.
        cpu_clock: Seconds of work so far, of this rank with all that it started.

    Returns:
        The samples of each variant, one per round.

    Raises:
        ValueError: Without a variant or a round.
    """
    names = list(variants)
    if not names or num_rounds < 1:
        raise ValueError(
            f"{len(names)} variants in num_rounds={num_rounds} rounds are nothing to "
            "measure; choose at least one of each"
        )

    def take(name: str, num_calls: int) -> Sample:
        sample = _sample(variants[name], num_calls, cpu_clock)
        if settle is not None:
            settle()
        return sample

    for name in names * warm_up:
        take(name, 1)
    num_calls = 1
    if sample_s > 0:
        once_s = [take(name, 1).wall_s for name in names]
        num_calls = max(1, math.ceil(sample_s / once_s[0]))
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for i in range(max(num_rounds, max_rounds or 0)):
        if i >= num_rounds and _num_quiet(list(samples.values())) >= num_rounds:
            break
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(take(name, num_calls))
    return samples


def compare(
    samples: dict[str, list[Sample]], *, base: str, config: str
) -> list[dict[str, Any]]:
    """Turn samples into rows, one per variant, as ratios to the base variant.

    Args:
        samples: What `alternate` returned.
        base: The variant that gets ratio 1.
        config: What was measured.

    Returns:
        Rows with `config`, `variant`, `wall_ratio`, `cpu_ratio`, `samples` (the quiet
        pairs), `value` and `unit` (milliseconds per call). With fewer than `MIN_QUIET`
        quiet pairs the wall numbers are those of the `MIN_QUIET` quietest.

    Raises:
        ValueError: If the base is none of the variants.
    """
    if base not in samples:
        raise ValueError(
            f"base={base!r} was not measured; choose one of {', '.join(samples)}"
        )
    rows = []
    for name, own in samples.items():
        pairs = sorted(zip(own, samples[base], strict=True), key=_foreign_share)
        num_quiet = _num_quiet([own, samples[base]])
        best = pairs[: max(num_quiet, MIN_QUIET)]
        rows.append(
            {
                "config": config,
                "variant": name,
                "wall_ratio": statistics.median(a.wall_s / b.wall_s for a, b in best),
                "cpu_ratio": statistics.median(a.cpu_s / b.cpu_s for a, b in pairs),
                "samples": num_quiet,
                "value": statistics.median(a.wall_s for a, _ in best) * 1e3,
                "unit": "ms",
            }
        )
    return rows


def _num_quiet(columns: list[list[Sample]]) -> int:
    return sum(all(s.is_quiet for s in row) for row in zip(*columns, strict=True))


def _foreign_share(pair: tuple[Sample, Sample]) -> float:
    return max(sample.foreign_share or 0.0 for sample in pair)


def _sample(
    call: Callable[[], object], num_calls: int, cpu_clock: Callable[[], float]
) -> Sample:
    _meet()
    busy_s, cpu_s, start_s = _busy_s(), cpu_clock(), time.perf_counter()
    for _ in range(num_calls):
        call()
    _meet()
    wall_s = time.perf_counter() - start_s
    all_cpu_s = _over_ranks([cpu_clock() - cpu_s], "sum")[0]
    share = math.nan
    if busy_s is not None:
        foreign_s = (_busy_s() or 0.0) - busy_s - all_cpu_s
        share = max(0.0, foreign_s / (wall_s * (os.cpu_count() or 1)))
    # Ranks go on or stop together, so they must agree on every number.
    wall_s, share = _over_ranks([wall_s, share], "max")
    return Sample(
        wall_s=wall_s / num_calls,
        cpu_s=all_cpu_s / num_calls,
        foreign_share=None if math.isnan(share) else share,
    )


def _meet() -> None:
    """Return once the work of this device is done, and all ranks are here."""
    if torch.cuda.is_initialized():  # also where the default device is the CPU
        torch.cuda.synchronize()
    if dist.is_initialized():
        barrier()


def _over_ranks(values: list[float], op: str) -> list[float]:
    if not dist.is_initialized():
        return values
    return all_reduce(torch.tensor(values, dtype=torch.float64), op=op).tolist()


def _busy_s() -> float | None:
    """Return the seconds that all cores have worked so far, or None if unknown."""
    if not _STAT.exists():
        return None
    fields = [int(n) for n in _STAT.read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _, _, irq, softirq, steal = fields
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")

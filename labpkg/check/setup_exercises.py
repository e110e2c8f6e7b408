"""Checkers of the exercises of the chapter foundations/setup.

Notation: n ranks, c cores, G GPUs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from labpkg.check.result import CheckResult, Exercise


def threads_per_rank(fn: Callable[..., Any]) -> CheckResult:
    """Check `threads_per_rank(num_cores, num_ranks)`: as many as fit on the cores.

    The most threads that every rank of a machine may have without more threads than
    cores, and at least one.

    Args:
        fn: your function; it returns an int.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _THREADS_PER_RANK.check(fn)


def rank_variables(fn: Callable[..., Any]) -> CheckResult:
    """Check `rank_variables(rank, ranks_per_node, num_nodes)`: what a launcher sets.

    Ranks are numbered node by node.

    Args:
        fn: your function; it returns (WORLD_SIZE, GROUP_RANK, LOCAL_RANK), where
            GROUP_RANK is the number of the node.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _RANK_VARIABLES.check(fn)


def new_enough(fn: Callable[..., Any]) -> CheckResult:
    """Check `new_enough(found, oldest)`: is version `found` at least `oldest`?

    Versions are numbers separated by dots, as text. A missing number counts as 0, and
    what follows a `+` names the build and does not count.

    Args:
        fn: your function; it returns a bool.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _NEW_ENOUGH.check(fn)


def ranks_per_gpu(fn: Callable[..., Any]) -> CheckResult:
    """Check `ranks_per_gpu(num_ranks, num_gpus, asked)`: how a World places its ranks.

    With a GPU for each rank, rank r uses GPU r. Otherwise all ranks use the CPU, unless
    `asked` says that the GPU was asked for: then rank r uses GPU r % G.

    Args:
        fn: your function; it returns a list with the number of ranks on each GPU.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _RANKS_PER_GPU.check(fn)


def visible_gpus(fn: Callable[..., Any]) -> CheckResult:
    """Check `visible_gpus(value, num_gpus)`: what CUDA_VISIBLE_DEVICES leaves.

    `value` is the text of the variable, or None when it is not set; the machine's GPUs
    are numbered from 0. GPUs are numbered anew in the order of the list, which ends at
    the first number that is no GPU.

    Args:
        fn: your function; it returns the machine's numbers of cuda:0, cuda:1, ...

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _VISIBLE_GPUS.check(fn)


_THREADS_PER_RANK = Exercise(
    name="threads_per_rank",
    arguments=("num_cores", "num_ranks"),
    rtol=0.0,  # whole numbers
    reference=lambda c, n: max(1, c // n),
    cases=[
        (2, 6),
        (16, 2),
        (2, 2),
        (10, 4),
        (1, 1),
        (96, 8),
        (12, 1),
        (7, 8),
        (64, 6),
        (3, 2),
    ],
    mistakes={
        "this is PyTorch's default: each rank takes all cores, so n ranks have n "
        "threads per core": lambda c, n: c,
        "0 threads cannot work: with more ranks than cores each rank has one": (
            lambda c, n: c // n
        ),
        "rounded up, the threads of all ranks are more than the cores": (
            lambda c, n: -(-c // n)
        ),
        "a thread cannot be divided: round down with //": lambda c, n: max(1, c / n),
        "one thread is always safe, but leaves cores idle when there are more cores "
        "than ranks": lambda c, n: 1,
        "the cores are divided among the ranks, not the ranks among the cores": (
            lambda c, n: max(1, n // c)
        ),
    },
    hint="divide the cores among the ranks, round down, and leave at least one",
)

_RANK_VARIABLES = Exercise(
    name="rank_variables",
    arguments=("rank", "ranks_per_node", "num_nodes"),
    rtol=0.0,  # whole numbers
    reference=lambda r, k, nodes: (k * nodes, r // k, r % k),
    cases=[
        (5, 4, 2),
        (0, 4, 2),
        (3, 4, 2),
        (4, 4, 2),
        (7, 8, 1),
        (2, 1, 3),
        (0, 1, 1),
        (13, 8, 4),
        (17, 6, 3),
        (31, 8, 4),
    ],
    mistakes={
        "the order is (WORLD_SIZE, GROUP_RANK, LOCAL_RANK)": (
            lambda r, k, nodes: (k * nodes, r % k, r // k)
        ),
        "WORLD_SIZE counts the ranks of all nodes": lambda r, k, nodes: (
            k,
            r // k,
            r % k,
        ),
        "LOCAL_RANK starts again at 0 on each node: it chooses the GPU of a machine": (
            lambda r, k, nodes: (k * nodes, r // k, r)
        ),
        "ranks are numbered node by node, so neighbours share a node": (
            lambda r, k, nodes: (k * nodes, r % nodes, r // nodes)
        ),
        "all numbers start at 0": lambda r, k, nodes: (k * nodes, r // k + 1, r % k),
    },
    hint=(
        "ranks_per_node * num_nodes, and quotient and remainder of rank divided by "
        "ranks_per_node"
    ),
)


def _numbers(version: str, pattern: str = r"\d+") -> list[int]:
    return [int(number) for number in re.findall(pattern, version)]


def _public(version: str) -> str:
    return version.split("+")[0]


def _at_least(found: list[int], oldest: list[int]) -> bool:
    pairs = list(zip_longest(found, oldest, fillvalue=0))
    return [a for a, _ in pairs] >= [b for _, b in pairs]


def _decimal(version: str) -> float:
    return float(".".join(_public(version).split(".")[:2]))


_NEW_ENOUGH = Exercise(
    name="new_enough",
    arguments=("found", "oldest"),
    rtol=0.0,  # true or false
    reference=lambda f, o: _at_least(_numbers(_public(f)), _numbers(_public(o))),
    cases=[
        # Only two answers exist: each of the first eight tells one mistake from others.
        ("2.13.0+cpu", "2.11"),
        ("3.10", "3.10"),
        ("10.5", "9.5"),
        ("2.1", "2.5"),
        ("10.0", "9.5"),
        ("3.8", "3.10"),
        ("2.11", "2.11.0"),
        ("2.11+cu130", "2.11.1"),
        ("2.9.1", "2.11"),
        ("1.13.1", "2.0"),
        ("3.11.7", "3.11"),
        ("4", "3.11"),
    ],
    mistakes={
        "what follows a + names the build and is no part of the version": (
            lambda f, o: _at_least(_numbers(f), _numbers(o))
        ),
        "2.11 and 2.11.0 are the same version: a missing number counts as 0": (
            lambda f, o: _numbers(_public(f)) >= _numbers(_public(o))
        ),
        "3.10 is not the decimal number 3.1: compare the parts one by one": (
            lambda f, o: _decimal(f) >= _decimal(o)
        ),
        "a later part counts only if all before it are equal: 10.0 is newer than 9.5": (
            lambda f, o: all(
                a >= b
                for a, b in zip_longest(
                    _numbers(_public(f)), _numbers(_public(o)), fillvalue=0
                )
            )
        ),
        "only the first number is compared; 2.1 is older than 2.5": (
            lambda f, o: _numbers(f)[0] >= _numbers(o)[0]
        ),
        "as text '10' comes before '9' and '3.8' after '3.10': compare numbers": (
            lambda f, o: f >= o
        ),
        "the same version is new enough": lambda f, o: (
            not _at_least(_numbers(_public(o)), _numbers(_public(f)))
        ),
        "this asks whether `oldest` is at least `found`": lambda f, o: _at_least(
            _numbers(_public(o)), _numbers(_public(f))
        ),
    },
    hint="cut off the build, make lists of int, fill the shorter with 0, compare",
)


def _turns(n: int, G: int) -> list[int]:
    """Return how many of n ranks each of G GPUs has when they take turns."""
    return [len(range(gpu, n, G)) for gpu in range(G)]


_RANKS_PER_GPU = Exercise(
    name="ranks_per_gpu",
    arguments=("num_ranks", "num_gpus", "asked"),
    rtol=0.0,  # whole numbers
    reference=lambda n, G, asked: _turns(n, G) if n <= G or asked else [0] * G,
    cases=[
        (4, 4, False),
        (2, 0, False),
        (2, 1, False),
        (2, 1, True),
        (1, 1, False),
        (2, 4, False),
        (4, 2, False),
        (4, 3, True),
        (5, 2, True),
        (4, 8, True),
        (8, 8, True),
        (9, 8, False),
    ],
    mistakes={
        "with fewer GPUs than ranks the ranks use the CPU, unless the GPU was asked "
        "for": lambda n, G, asked: _turns(n, G),
        "with fewer GPUs than ranks no rank uses a GPU: a job runs on one kind of "
        "device": lambda n, G, asked: (
            _turns(n, G) if asked else [int(gpu < n) for gpu in range(G)]
        ),
        "NCCL needs one GPU per rank, but a request shares them: rank r uses GPU "
        "r % num_gpus": lambda n, G, asked: _turns(n, G) if n <= G else [0] * G,
        "a GPU for each rank is enough; more GPUs than ranks is fine, and so is no "
        "request": lambda n, G, asked: _turns(n, G) if n == G or asked else [0] * G,
        "ranks take turns, r % num_gpus, so no GPU is left out while another has "
        "two": lambda n, G, asked: (
            [min(n, -(-n // G) * (g + 1)) - min(n, -(-n // G) * g) for g in range(G)]
            if n <= G or asked
            else [0] * G
        ),
        "this puts every rank on GPU 0, as a script without set_device does": (
            lambda n, G, asked: ([n] + [0] * G)[:G] if n <= G or asked else [0] * G
        ),
    },
    hint=(
        "without a request and with more ranks than GPUs: zeros; otherwise count the "
        "ranks r with r % num_gpus == gpu"
    ),
)


def _visible(value: str | None, G: int) -> list[int]:
    if value is None:
        return list(range(G))
    visible = []
    for text in value.split(","):
        if not (text.isdigit() and int(text) < G):  # also "" and "-1"
            break
        visible.append(int(text))
    return visible


def _without_checks(value: str | None) -> list[int]:
    return _numbers(value or "", r"-?\d+")


_VISIBLE_GPUS = Exercise(
    name="visible_gpus",
    arguments=("value", "num_gpus"),
    rtol=0.0,  # whole numbers
    reference=_visible,
    cases=[
        ("2,0", 4),
        (None, 4),
        ("", 4),
        ("3", 4),
        ("-1", 4),
        ("0,1,2,3", 4),
        ("0,9,1", 4),
        ("1,-1,3", 4),
        (None, 0),
        ("0", 0),
        ("7,5,3,1", 8),
        ("12,11", 16),
    ],
    mistakes={
        "cuda:0 is the first of the list, not the smallest": (
            lambda v, G: sorted(_visible(v, G))
        ),
        "these are torch's numbers; return the machine's": (
            lambda v, G: list(range(len(_visible(v, G))))
        ),
        "not set is not empty: without the variable all GPUs are visible": (
            lambda v, G: _visible(v or "", G)
        ),
        "an empty text hides all GPUs; only a variable that is not set shows all": (
            lambda v, G: _visible(v or None, G)
        ),
        "-1 is no GPU: the list ends before it": lambda v, G: (
            _visible(v, G) if v is None or "-" not in v else _without_checks(v)
        ),
        "the list ends at the first number that is no GPU; what follows it is not "
        "visible either": lambda v, G: (
            _visible(v, G)
            if v is None
            else [g for g in _without_checks(v) if 0 <= g < G]
        ),
        "a number that the machine does not have ends the list": (
            lambda v, G: _visible(v, 10**6) if v is not None else list(range(G))
        ),
        "this is how many GPUs are visible; return which": (
            lambda v, G: len(_visible(v, G))
        ),
        "return numbers, not text": lambda v, G: [str(g) for g in _visible(v, G)],
        "a number can have two digits: split the text at the commas": (
            lambda v, G: (
                _visible(v, G)
                if v is None
                else _visible(",".join(c for c in v if c.isdigit()), G)
            )
        ),
    },
    hint=(
        "not set: all; otherwise the numbers between the commas, in their order, up to "
        "the first that is no GPU of the machine"
    ),
)

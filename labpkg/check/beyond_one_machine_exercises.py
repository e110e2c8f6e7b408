"""Checkers of the exercises of the chapter runs/beyond_one_machine.

Notation: m nodes, k ranks on each, S bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from labpkg.check.result import CheckResult, Exercise


def node_of(fn: Callable[..., Any]) -> CheckResult:
    """Check `node_of(rank, ranks_per_node)`: where a rank lives.

    `ranks_per_node[i]` is the number of ranks on node i; nodes may differ. Ranks are
    numbered node by node.

    Args:
        fn: your function; it returns the pair (node, local rank).

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _NODE_OF.check(fn)


def next_world(fn: Callable[..., Any]) -> CheckResult:
    """Check `next_world(num_waiting, min_nodes, max_nodes, ranks_per_node)`.

    Args:
        fn: your function; it returns the world size of the next round: 0 if too few
            nodes wait, and never more nodes than are allowed.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _NEXT_WORLD.check(fn)


def expand_hosts(fn: Callable[..., Any]) -> CheckResult:
    """Check `expand_hosts(hosts)`: the names behind Slurm's short form of them.

    Args:
        fn: your function; `node[0-2,7]` gives node0, node1, node2, node7 in a list, and
            leading zeros stay: `gpu[08-10]` gives gpu08, gpu09, gpu10.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _EXPAND_HOSTS.check(fn)


def repeated_steps(fn: Callable[..., Any]) -> CheckResult:
    """Check `repeated_steps(steps_done, checkpoint_every)`: the work done twice.

    `steps_done[i]` is how many steps of the run were complete, counted from its very
    start, when failure i came; every `checkpoint_every` steps the run is saved.

    Args:
        fn: your function; it returns the number of steps that are done again.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _REPEATED_STEPS.check(fn)


def bytes_leaving(fn: Callable[..., Any]) -> CheckResult:
    """Check `bytes_leaving(num_bytes, num_nodes, ranks_per_node, how)`.

    How many bytes one node sends to others in an all-reduce of `num_bytes`, if it is a
    "ring" through all ranks, node by node; "direct", each rank with each other one; or
    in "two levels", where only slices that are summed within the node leave it.

    Args:
        fn: your function; it returns bytes.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _BYTES_LEAVING.check(fn)


def _node_of(rank: int, sizes: Sequence[int]) -> tuple[int, int]:
    ends = list(accumulate(sizes))
    node = sum(end <= rank for end in ends)
    return node, rank - ends[node] + sizes[node]


_NODE_OF = Exercise(
    name="node_of",
    arguments=("rank", "ranks_per_node"),
    rtol=0.0,  # whole numbers
    reference=_node_of,
    cases=[
        (0, [2, 2]),
        (3, [2, 2]),
        (9, [8, 8]),
        (2, [2, 2]),
        (5, [2, 2, 2]),
        (4, [4, 1, 3]),
        (5, [4, 1, 3]),
        (7, [4, 1, 3]),
        (3, [4, 1, 3]),
        (1, [1, 1, 1]),
    ],
    mistakes={
        "this returns (local rank, node); the node comes first": (
            lambda rank, sizes: _node_of(rank, sizes)[::-1]
        ),
        "nodes may have different numbers of ranks; go through them one by one": (
            lambda rank, sizes: divmod(rank, sizes[0])
        ),
        "this deals ranks out like cards; launchers number them node by node": (
            lambda rank, sizes: (rank % len(sizes), rank // len(sizes))
        ),
        "the second number is the rank within its node, which starts from 0 again": (
            lambda rank, sizes: (_node_of(rank, sizes)[0], rank)
        ),
    },
    hint="subtract the ranks of each node until the rest fits into the next one",
)

_NEXT_WORLD = Exercise(
    name="next_world",
    arguments=("num_waiting", "min_nodes", "max_nodes", "ranks_per_node"),
    rtol=0.0,
    reference=lambda waiting, least, most, k: (
        k * min(waiting, most) if waiting >= least else 0
    ),
    cases=[
        (2, 1, 4, 2),
        (4, 1, 4, 2),
        (5, 1, 4, 2),
        (1, 1, 4, 8),
        (0, 1, 4, 8),
        (1, 2, 4, 8),
        (2, 2, 2, 8),
        (9, 3, 3, 1),
        (2, 3, 8, 4),
        (3, 3, 8, 4),
    ],
    mistakes={
        "nodes are counted; each brings ranks_per_node ranks": (
            lambda waiting, least, most, k: (
                min(waiting, most) if waiting >= least else 0
            )
        ),
        "more than max_nodes must wait outside": (
            lambda waiting, least, most, k: k * waiting if waiting >= least else 0
        ),
        "with fewer than min_nodes nothing starts: 0": (
            lambda waiting, least, most, k: k * min(waiting, most)
        ),
        "min_nodes are enough; the comparison must include them": (
            lambda waiting, least, most, k: (
                k * min(waiting, most) if waiting > least else 0
            )
        ),
        "the number of nodes changes with each round; do not wait for max_nodes": (
            lambda waiting, least, most, k: k * most if waiting >= most else 0
        ),
    },
    hint="as many nodes as wait, at most max_nodes; none if fewer than min_nodes",
)


def _expand(hosts: str, *, padded: bool = True, last: int = 1) -> list[str]:
    name, bracket, inside = hosts.removesuffix("]").partition("[")
    if not bracket:
        return hosts.split(",")
    names = []
    for part in inside.split(","):
        first, dash, end = part.partition("-")
        width = len(first) if padded else 0
        stop = int(end) + last if dash else int(first) + 1
        names += [f"{name}{i:0{width}d}" for i in range(int(first), stop)]
    return names


_EXPAND_HOSTS = Exercise(
    name="expand_hosts",
    arguments=("hosts",),
    reference=_expand,
    cases=[
        ("node[0-2]",),
        ("node[0-2,7]",),
        ("node5",),
        ("alpha,beta",),
        ("gpu[08-10]",),
        ("gpu[1,3,5-6]",),
        ("r1-n[001-003]",),
        ("n[9-11]",),
        ("x[0-0]",),
        ("a100-node[12,14-15,20]",),
    ],
    mistakes={
        "the end of a range belongs to it: 0-2 are three nodes": (
            lambda hosts: _expand(hosts, last=0)
        ),
        "leading zeros are part of the name: gpu08, not gpu8": (
            lambda hosts: _expand(hosts, padded=False)
        ),
        "only the first name; torchrun wants that one, but the task is all": (
            lambda hosts: _expand(hosts)[:1]
        ),
        "this returns their number; return their names": (
            lambda hosts: len(_expand(hosts))
        ),
        "each part of the list within brackets needs the name in front": (
            lambda hosts: hosts.replace("[", "").replace("]", "").split(",")
        ),
    },
    hint="split off the name before the bracket, then the list at its commas",
)

_REPEATED_STEPS = Exercise(
    name="repeated_steps",
    arguments=("steps_done", "checkpoint_every"),
    rtol=0.0,
    reference=lambda done, every: sum(step % every for step in done),
    cases=[
        ([13], 5),
        ([7], 5),
        ([10], 5),
        ([], 5),
        ([3], 10),
        ([6, 13], 5),
        ([7, 7, 7], 5),
        ([99], 100),
        ([1, 2, 3], 1),
        ([250, 251, 499], 100),
    ],
    mistakes={
        "this counts back to the start; a restarted run begins at its newest "
        "checkpoint": lambda done, every: sum(done),
        "this counts what was saved; what came after it is lost": (
            lambda done, every: sum(step // every * every for step in done)
        ),
        "this is the distance to the next checkpoint; the newest one counts": (
            lambda done, every: sum(-step % every for step in done)
        ),
        "a whole interval for each failure is the worst case, not what happened": (
            lambda done, every: every * len(done)
        ),
        "only the last failure; each of them costs steps": (
            lambda done, every: done[-1] % every if done else 0
        ),
    },
    hint="for each failure: the steps since the newest checkpoint",
)


def _leaving(S: float, m: int, k: int, how: str) -> float:
    share = {
        "ring": 2 * (m * k - 1) / (m * k) if m > 1 else 0,
        "direct": 2 * k * (m - 1) / m,
        "two levels": 2 * (m - 1) / m,
    }
    return S * share[how]


_BYTES_LEAVING = Exercise(
    name="bytes_leaving",
    arguments=("num_bytes", "num_nodes", "ranks_per_node", "how"),
    reference=_leaving,
    cases=[
        (1000.0, 2, 1, "ring"),
        (1000.0, 2, 1, "direct"),
        (1000.0, 2, 1, "two levels"),
        (1000.0, 2, 2, "ring"),
        (1000.0, 2, 2, "direct"),
        (1000.0, 2, 2, "two levels"),
        (8e6, 4, 8, "ring"),
        (8e6, 4, 8, "direct"),
        (8e6, 4, 8, "two levels"),
        (5.0, 1, 8, "ring"),
        (5.0, 1, 8, "direct"),
        (5.0, 1, 8, "two levels"),
    ],
    mistakes={
        "a rank on the same node is no other node: count only the partners that live "
        "elsewhere": lambda S, m, k, how: (
            S * k * 2 * (m * k - 1) / (m * k)
            if how == "direct"
            else _leaving(S, m, k, how)
        ),
        "this is what one rank sends; a node has ranks_per_node of them": (
            lambda S, m, k, how: (
                S * 2 * (m - 1) / m if how == "direct" else _leaving(S, m, k, how)
            )
        ),
        "in a ring one rank of each node has its successor on another node, not all": (
            lambda S, m, k, how: (
                k * _leaving(S, m, k, how) if how == "ring" else _leaving(S, m, k, how)
            )
        ),
        "an all-reduce has two halves: slices go out to be summed, sums come back": (
            lambda S, m, k, how: _leaving(S, m, k, how) / 2
        ),
        "with one node nothing leaves it": (
            lambda S, m, k, how: (
                S * 2 * (m * k - 1) / (m * k)
                if how == "ring"
                else _leaving(S, m, k, how)
            )
        ),
    },
    hint="ring: one link out of each node, 2 (n-1)/n S; direct: k (n-k) pairs, 2 S/n "
    "each; two levels: an all-reduce of S over the nodes alone",
)

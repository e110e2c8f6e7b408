import re
from typing import Any

import pytest

from labpkg.check import beyond_one_machine_exercises as module
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(module).items()
    if getattr(checker, "__module__", "") == module.__name__
    and not name.startswith("_")
}


def node_of(rank, ranks_per_node):
    node = 0
    while rank >= ranks_per_node[node]:
        rank -= ranks_per_node[node]
        node += 1
    return node, rank


def next_world(num_waiting, min_nodes, max_nodes, ranks_per_node):
    nodes = min(num_waiting, max_nodes)
    return nodes * ranks_per_node * (num_waiting >= min_nodes)


def expand_hosts(hosts):
    match = re.fullmatch(r"(.*)\[(.*)\]", hosts)
    if match is None:
        return hosts.split(",")
    names = []
    for part in match[2].split(","):
        first, last = (part.split("-") * 2)[:2]
        numbers = range(int(first), int(last) + 1)
        names += [match[1] + str(i).zfill(len(first)) for i in numbers]
    return names


def repeated_steps(steps_done, checkpoint_every):
    return sum(s - s // checkpoint_every * checkpoint_every for s in steps_done)


def bytes_leaving(num_bytes, num_nodes, ranks_per_node, how):
    n = num_nodes * ranks_per_node
    if num_nodes == 1:
        return 0.0
    if how == "ring":
        return 2 * num_bytes * (n - 1) / n
    if how == "direct":
        return ranks_per_node * (n - ranks_per_node) * 2 * num_bytes / n
    return 2 * num_bytes * (num_nodes - 1) / num_nodes


RIGHT = [node_of, next_world, expand_hosts, repeated_steps, bytes_leaving]


@pytest.mark.parametrize("answer", RIGHT)
def test_right_answers_pass(answer):
    result = EXERCISES[answer.__name__](answer)
    assert result, result.message
    assert result.cases >= 10


WRONG = [
    ("node_of", lambda rank, sizes: rank, "returns its argument"),
    ("node_of", lambda rank, sizes: divmod(rank, sizes[0]), "different numbers"),
    ("node_of", lambda r, s: (r % len(s), r // len(s)), "like cards"),
    ("node_of", lambda r, s: node_of(r, s)[::-1], "the node comes first"),
    ("next_world", lambda w, a, b, k: a, "returns its argument"),
    ("next_world", lambda w, a, b, k: w * k, "must wait outside"),
    ("next_world", lambda w, a, b, k: min(w, b) * k, "nothing starts"),
    ("next_world", lambda w, a, b, k: min(w, b), "each brings"),
    ("expand_hosts", lambda hosts: hosts, "returns its argument"),
    ("expand_hosts", lambda hosts: expand_hosts(hosts)[:1], "only the first"),
    (
        "expand_hosts",
        lambda hosts: [
            re.sub(r"(\D)0+(?=\d)", r"\1", it) for it in expand_hosts(hosts)
        ],
        "leading zeros",
    ),
    (
        "expand_hosts",
        lambda h: [*dict.fromkeys([*expand_hosts(h)[:-1], expand_hosts(h)[0]])],
        "the end of a range",
    ),
    ("repeated_steps", lambda done, every: done, "returns its argument"),
    ("repeated_steps", lambda done, every: sum(done), "back to the start"),
    (
        "repeated_steps",
        lambda done, every: sum(s // every * every for s in done),
        "what was saved",
    ),
    ("repeated_steps", lambda done, every: sum(-s % every for s in done), "the next"),
    ("bytes_leaving", lambda S, m, k, how: S, "returns its argument"),
    ("bytes_leaving", lambda S, m, k, how: S / m * 2 * (m - 1) / 2, "two halves"),
    (
        "bytes_leaving",
        lambda S, m, k, how: bytes_leaving(S, m, k, how) * (k if how == "ring" else 1),
        "one rank of each node",
    ),
    (
        "bytes_leaving",
        lambda S, m, k, how: bytes_leaving(
            S, m, k, "two levels" if how == "direct" else how
        ),
        "what one rank sends",
    ),
]


class TestLaws(ExerciseLaws):
    exercises = EXERCISES
    wrong = WRONG

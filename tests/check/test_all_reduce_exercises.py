import time

import torch
import torch.distributed as dist

import labpkg as lab
from labpkg import check
from labpkg.check import all_reduce_exercises
from tests.check.laws import ExerciseLaws

EXERCISES = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.all_reduce_exercises"
}


def ring(inputs):
    """Reduce-scatter, then all-gather, with all messages of a step at once."""
    n = len(inputs)
    held = [[piece.clone() for piece in x.tensor_split(n)] for x in inputs]
    for s in range(2 * (n - 1)):
        sent = [held[r][(r - s) % n].clone() for r in range(n)]
        for r in range(n):
            j = (r - 1 - s) % n
            held[r][j] = held[r][j] + sent[r - 1] if s < n - 1 else sent[r - 1]
    return [torch.cat(pieces) for pieces in held]


def halving_doubling(x):
    n, rank = dist.get_world_size(), dist.get_rank()
    x = x.clone()
    parts, distance = [x], n // 2
    while distance:
        low, high = parts[-1].chunk(2)
        mine, theirs = (high, low) if rank & distance else (low, high)
        swap = {"dst": rank ^ distance, "src": rank ^ distance}
        mine += lab.sendrecv(theirs, mine, **swap)
        parts.append(mine)
        distance //= 2
    for whole, mine in zip(parts[-2::-1], parts[:0:-1], strict=True):
        distance = distance * 2 or 1
        low, high = whole.chunk(2)
        theirs = low if rank & distance else high
        swap = {"dst": rank ^ distance, "src": rank ^ distance}
        theirs.copy_(lab.sendrecv(mine, theirs, **swap))
    return x


def test_right_answers_pass():
    assert check.ring_all_reduce(ring)
    assert check.halving_doubling(halving_doubling)


def test_the_library_adds_in_the_order_of_the_exercise(world4):
    (inputs,) = all_reduce_exercises._RING.cases[7]
    expected = ring(inputs)
    run = lambda: lab.ring_all_reduce(inputs[dist.get_rank()])
    found = world4.run(run)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], sum(inputs[1:], inputs[0]))


def both_send_first(x):
    partner = 1 ^ dist.get_rank()
    lab.send(x, partner)
    return lab.recv(x, partner)


def halving_only(x):
    n, rank = dist.get_world_size(), dist.get_rank()
    x, distance = x.clone(), n // 2
    mine = x
    while distance:
        low, high = mine.chunk(2)
        mine, theirs = (high, low) if rank & distance else (low, high)
        swap = {"dst": rank ^ distance, "src": rank ^ distance}
        mine += lab.sendrecv(theirs, mine, **swap)
        distance //= 2
    return x


def in_place(x):
    x.copy_(halving_doubling(x))
    return x


def crash(x):
    return lab.sendrecv(x, x, dst=dist.get_rank() + 1, src=dist.get_rank() - 1)


WRONG = [
    ("ring_all_reduce", lambda inputs: inputs, "returns its argument"),
    ("ring_all_reduce", lambda inputs: [sum(inputs)] * len(inputs), "another order"),
    (
        "ring_all_reduce",
        lambda inputs: [x / len(inputs) for x in ring(inputs)],
        "this is the mean",
    ),
    ("ring_all_reduce", lambda inputs: sum(inputs), "a list of 3, not a tensor"),
    (
        "ring_all_reduce",
        lambda inputs: [x.add_(1) for x in inputs],
        "changes its argument",
    ),
    (
        "ring_all_reduce",
        lambda inputs: ring([x[: len(x) // len(inputs) * len(inputs)] for x in inputs]),
        "elements are missing",
    ),
    (
        "ring_all_reduce",
        lambda inputs: ring(inputs[:1] * len(inputs)),
        "step s: rank r sends",
    ),
    ("halving_doubling", lambda x: x, "returns its argument"),
    ("halving_doubling", lambda x: None, "returns nothing"),
    ("halving_doubling", lab.ring_all_reduce, "this is a ring"),
    (
        "halving_doubling",
        lab.recursive_doubling_all_reduce,
        "this is recursive doubling",
    ),
    ("halving_doubling", lab.all_reduce, "the library's all-reduce"),
    ("halving_doubling", halving_only, "go the same way back"),
    ("halving_doubling", in_place, "work on x.clone()"),
    (
        "halving_doubling",
        lambda x: (dist.all_reduce(x), x)[1],
        "past the count",
    ),
    ("halving_doubling", crash, "to see a traceback"),
    ("halving_doubling", lambda x: x[:1], "what each rank did"),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_a_deadlock_is_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(
        all_reduce_exercises, "_LIMIT_S", 1
    )  # after all ranks have joined
    start = time.monotonic()
    result = check.halving_doubling(both_send_first)
    assert time.monotonic() - start < 12
    assert "all ranks wait in send" in result.hint
    receive_first = lambda x: lab.recv(x, 1 ^ dist.get_rank())
    assert "nobody sends" in check.halving_doubling(receive_first).hint


def test_a_crash_is_told_with_its_rank():
    message = check.halving_doubling(crash).message
    assert "ValueError: dst=2 is not a rank of axis" in message
    assert "expected ['the sum, 2 messages, 16 bytes'" in message

import math

import torch

from labpkg import check
from tests.check.laws import ExerciseLaws

EXERCISES = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.collectives_exercises"
}


def exchange(inputs):
    n = len(inputs)
    return list(torch.stack(inputs).view(n, n, -1).transpose(0, 1).flatten(1))


def broadcast_gradient(gradients, src):
    out = torch.zeros(len(gradients), len(gradients[0]))
    out[src] = sum(gradients)
    return list(out)


def first_mismatch(calls):
    for i in range(max(map(len, calls))):
        if any(own[i : i + 1] != calls[0][i : i + 1] for own in calls):
            return i
    return -1


def sent_bytes(algorithm, num_bytes, n, rank):
    if algorithm == "ring":
        return 2 * (n - 1) * num_bytes / n
    if algorithm == "doubling":
        return math.log2(n) * num_bytes
    messages = int(rank > 0)  # up
    for k in range(10):  # down: ranks below 2^k send to the rank 2^k above, reversed
        step = 2**k
        messages += rank % (2 * step) == 0 and rank + step < n
    return messages * num_bytes


def test_right_answers_pass():
    for answer in (exchange, broadcast_gradient, first_mismatch, sent_bytes):
        result = EXERCISES[answer.__name__](answer)
        assert result, result.message
        assert result.cases >= 10


def scaled(factor):
    return lambda g, src: [factor * x for x in broadcast_gradient(g, src)]


def only(name, wrong):
    return lambda algorithm, S, n, rank: (
        wrong(S, n, rank) if algorithm == name else sent_bytes(algorithm, S, n, rank)
    )


WRONG = [
    ("exchange", lambda inputs: inputs, "returns its argument"),
    ("exchange", lambda inputs: [torch.cat(inputs)] * len(inputs), "an all-gather"),
    (
        "exchange",
        lambda inputs: list(sum(inputs).chunk(len(inputs))),
        "a reduce-scatter",
    ),
    (
        "exchange",
        lambda inputs: exchange(inputs[::-1]),
        "in the order of the senders",
    ),
    ("exchange", lambda inputs: [x[None] for x in exchange(inputs)], "slice r of"),
    (
        "exchange",
        lambda inputs: list(torch.stack(inputs).view(len(inputs), len(inputs), -1).mT),
        "slice r of every rank",
    ),
    ("exchange", lambda inputs: exchange(inputs)[0], "a list of 2, not a tensor"),
    ("exchange", lambda inputs: [inputs[-1], *inputs[:-1]], "whole tensor of a"),
    ("broadcast_gradient", lambda g, src: g, "returns its argument"),
    ("broadcast_gradient", lambda g, src: [sum(g)] * len(g), "reached nobody"),
    (
        "broadcast_gradient",
        lambda g, src: [x * (r == src) for r, x in enumerate(g)],
        "as its cause",
    ),
    (
        "broadcast_gradient",
        lambda g, src: scaled(1 / len(g))(g, src),
        "not the mean",
    ),
    ("broadcast_gradient", lambda g, src: [g[src]] * len(g), "nothing is broadcast"),
    ("broadcast_gradient", lambda g, src: [sum(g)], "return zeros for"),
    (
        "broadcast_gradient",
        lambda g, src: broadcast_gradient(g, 0),
        "belongs to the rank src",
    ),
    ("first_mismatch", lambda calls: calls, "returns its argument"),
    (
        "first_mismatch",
        lambda calls: next(
            (i for i, row in enumerate(zip(*calls, strict=False)) if len({*row}) > 1),
            -1,
        ),
        "a list that has ended",
    ),
    (
        "first_mismatch",
        lambda calls: first_mismatch([sorted(own) for own in calls]),
        "in another order",
    ),
    ("first_mismatch", lambda calls: first_mismatch(calls[:2]), "all ranks, not only"),
    ("first_mismatch", lambda calls: any(own != calls[0] for own in calls), "position"),
    ("first_mismatch", lambda calls: "1", "a scalar, not a str"),
    ("sent_bytes", lambda algorithm, S, n, rank: S, "returns its argument"),
    ("sent_bytes", only("ring", lambda S, n, rank: (n - 1) * S / n), "round twice"),
    ("sent_bytes", only("ring", lambda S, n, rank: 2 * (n - 1) * S), "one of n pieces"),
    ("sent_bytes", only("ring", lambda S, n, rank: 2 * S * (n > 1)), "own piece"),
    ("sent_bytes", only("doubling", lambda S, n, rank: S * (n - 1)), "log2 n rounds"),
    (
        "sent_bytes",
        only("doubling", lambda S, n, rank: 2 * S * (n - 1) / n),
        "the whole tensor",
    ),
    ("sent_bytes", only("tree", lambda S, n, rank: S * (rank > 0)), "its children"),
    (
        "sent_bytes",
        only("tree", lambda S, n, rank: sent_bytes("tree", S, 16, rank)),
        "each has S / n",
    ),
    (
        "sent_bytes",
        only("tree", lambda S, n, rank: S * math.ceil(math.log2(n))),
        "different amounts",
    ),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_the_bytes_are_those_of_the_library(world4):
    import labpkg as lab

    def count():
        x = torch.zeros(100, device="cpu")
        found = []
        for reduce in (
            lab.ring_all_reduce,
            lab.tree_all_reduce,
            lab.recursive_doubling_all_reduce,
        ):
            with lab.count_comms() as log:
                reduce(x)
            found.append(log["world"].wire_bytes)
        return found

    for rank, found in enumerate(world4.run(count)):
        expected = [sent_bytes(it, 400, 4, rank) for it in ("ring", "tree", "doubling")]
        assert found == expected


def test_the_gradient_is_that_of_the_library(world4):
    import torch.distributed as dist

    import labpkg as lab

    def gradient():
        x = torch.ones(2, device="cpu", requires_grad=True)
        y = lab.broadcast(x, src=2)
        y.backward(torch.tensor([1.0, 10.0], device="cpu") * dist.get_rank())
        return x.grad

    given = [torch.tensor([1.0, 10.0]) * rank for rank in range(4)]
    expected = broadcast_gradient(given, 2)
    found = world4.run(gradient)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

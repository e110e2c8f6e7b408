"""The checkers of parallelism/zero on the sharded step: right and wrong answers."""

from typing import Any

import pytest
import torch

from labpkg import check
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.zero_step_exercises"
}


def clip_slices(slices, max_norm):
    """Let torch clip the joined vector."""
    whole = torch.nn.Parameter(torch.cat(slices))
    whole.grad = torch.cat(slices)
    torch.nn.utils.clip_grad_norm_([whole], max_norm)
    return list(whole.grad.split([len(s) for s in slices]))


def sharded_momentum(theta, gradients, velocities, lr, momentum):
    """Let torch take the step on the whole."""
    parameter = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.SGD([parameter], lr=lr, momentum=momentum)
    optimizer.state[parameter]["momentum_buffer"] = torch.cat(velocities)
    parameter.grad = sum(gradients) / len(gradients)
    optimizer.step()
    new = optimizer.state[parameter]["momentum_buffer"]
    return parameter.detach(), list(new.chunk(len(gradients)))


def reshard(pieces, n):
    """Divide the slices of the flat bucket at the ends of the parameters."""
    wholes = [torch.cat(of_ranks) for of_ranks in zip(*pieces, strict=True)]
    left = [len(whole) for whole in wholes]
    new = []
    for own in torch.cat(wholes).tensor_split(n):
        new.append([])
        for i in range(len(left)):
            piece, own = own[: left[i]], own[left[i] :]
            left[i] -= len(piece)
            new[-1].append(piece)
    return new


RIGHT = [
    ("clip_slices", clip_slices),
    ("sharded_momentum", sharded_momentum),
    ("reshard", reshard),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message
    assert result.cases >= 8


def by_own_norm(slices, max_norm):
    return [clip_slices([s], max_norm)[0] for s in slices]


def by_sum_of_norms(slices, max_norm):
    total = sum(s.norm() for s in slices)
    return [s * min(1.0, max_norm / total) for s in slices]


def by_square(slices, max_norm):
    total = sum((s**2).sum() for s in slices)
    return [s * min(1.0, max_norm / total) for s in slices]


def always(slices, max_norm):
    return [s * max_norm / torch.cat(slices).norm() for s in slices]


def with_own_gradient(theta, gradients, velocities, lr, momentum):
    n = len(gradients)
    own = [g.chunk(n)[r] for r, g in enumerate(gradients)]
    new = [momentum * v + g for v, g in zip(velocities, own, strict=True)]
    return theta - lr * torch.cat(new), new


def with_sum(theta, gradients, velocities, lr, momentum):
    larger = [len(gradients) * g for g in gradients]
    return sharded_momentum(theta, larger, velocities, lr, momentum)


def rank_0_only(theta, gradients, velocities, lr, momentum):
    new, states = sharded_momentum(theta, gradients, velocities, lr, momentum)
    return torch.cat([new[: len(states[0])], theta[len(states[0]) :]]), states


def theta_first(theta, gradients, velocities, lr, momentum):
    _, states = sharded_momentum(theta, gradients, velocities, lr, momentum)
    return theta - lr * torch.cat(velocities), states


def cut_theta(theta, gradients, velocities, lr, momentum):
    new, states = sharded_momentum(theta, gradients, velocities, lr, momentum)
    return list(new.chunk(len(states))), states


def damped(theta, gradients, velocities, lr, momentum):
    smaller = [(1 - momentum) * g for g in gradients]
    return sharded_momentum(theta, smaller, velocities, lr, momentum)


def wholes(pieces):
    return [torch.cat(of_ranks) for of_ranks in zip(*pieces, strict=True)]


def each_parameter_cut(pieces, n):
    return [[w.tensor_split(n)[r] for w in wholes(pieces)] for r in range(n)]


def each_piece_cut(pieces, n):
    cut = [[piece.tensor_split(n) for piece in own] for own in pieces]
    columns = range(len(pieces[0]))
    return [[torch.cat([own[i][r] for own in cut]) for i in columns] for r in range(n)]


def in_turn(pieces, n):
    whole = list(enumerate(wholes(pieces)))
    return [[w if i % n == r else w[:0] for i, w in whole] for r in range(n)]


def along_the_gradient(theta, gradients, velocities, lr, momentum):
    _, new = sharded_momentum(theta, gradients, velocities, lr, momentum)
    return theta - lr * sum(gradients) / len(gradients), new


def uphill(theta, gradients, velocities, lr, momentum):
    down, new = sharded_momentum(theta, gradients, velocities, lr, momentum)
    return 2 * theta - down, new


WRONG = [
    ("clip_slices", lambda slices, max_norm: slices, "returns its argument"),
    ("clip_slices", by_own_norm, "the factors differ"),
    ("clip_slices", by_sum_of_norms, "add the squares"),
    ("clip_slices", by_square, "the root is missing"),
    ("clip_slices", always, "left as it is"),
    ("clip_slices", lambda s, m: [x.clamp(-m, m) for x in s], "limits each element"),
    ("sharded_momentum", lambda theta, *rest: theta, "returns its argument"),
    ("sharded_momentum", with_own_gradient, "reduce-scatter first"),
    ("sharded_momentum", with_sum, "divide by n"),
    ("sharded_momentum", rank_0_only, "all-gather is missing"),
    ("sharded_momentum", theta_first, "update the velocity before theta"),
    ("sharded_momentum", along_the_gradient, "not along the gradient"),
    ("sharded_momentum", uphill, "minus lr v"),
    ("sharded_momentum", cut_theta, "join the slices of theta"),
    ("sharded_momentum", damped, "undamped"),
    ("reshard", lambda pieces, n: pieces, "returns its argument"),
    ("reshard", each_parameter_cut, "not each parameter by itself"),
    ("reshard", each_piece_cut, "join the pieces"),
    ("reshard", lambda p, n: torch.cat(wholes(p)).tensor_split(n), "once more"),
    ("reshard", lambda p, n: [wholes(p)] * n, "every rank gets all"),
    ("reshard", in_turn, "may lie on several ranks"),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_each_exercise_has_a_right_answer():
    assert {name for name, _ in RIGHT} == set(EXERCISES)

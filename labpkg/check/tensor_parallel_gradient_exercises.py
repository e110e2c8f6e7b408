"""Checkers of the exercises of parallelism/tensor_parallel that need a gradient.

What each of n ranks holds is given as a list, so that nothing is sent. Notation: B
samples, V classes, T tokens, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise

Shards = Sequence[Tensor]


def vocabulary_loss(fn: Callable[..., Any]) -> CheckResult:
    """Check `vocabulary_loss(logits, targets)`: cross-entropy of divided classes.

    Rank r holds the logits of classes r V/n to (r + 1) V/n - 1. The answer is the loss
    of each sample, and the gradient of the sum of all losses, divided alike.

    Shape:
        logits n x (B, V/n), targets (B,) int64 -> (B,) and n x (B, V/n)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _VOCABULARY_LOSS.check(fn)


def sequence_gradients(fn: Callable[..., Any]) -> CheckResult:
    """Check `sequence_gradients(xs, gain, ups, downs, grads)`: backward of one layer.

    The layer is y = relu((x * gain) U) W. Tokens of x and y are divided over the ranks,
    as are the columns of U and the rows of W; every rank holds the gain. The answer is
    what each rank has to hold: the gradients of its xs, of its copy of the gain, of its
    columns and of its rows.

    Shape:
        xs and grads n x (T/n, D), gain (D,), ups n x (D, F/n), downs n x (F/n, D)
        -> n x (T/n, D), n x (D,), n x (D, F/n), n x (F/n, D)

    Args:
        fn: your function; `grads` is the gradient of the loss with respect to y.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Korthikanti et al. 2022, arXiv:2205.05198.
    """
    return _SEQUENCE_GRADIENTS.check(fn)


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape) + 1000 * seed)
    return torch.randn(*shape, generator=generator, device="cpu")


# ---- vocabulary_loss ---------------------------------------------------------------

Answer = tuple[Tensor, list[Tensor]]


def _answer(
    logits: Shards, targets: Tensor, sums: Tensor | None = None, own: bool = False
) -> Answer:
    """Return the losses and their gradients; `sums` replaces the log-sum-exp (B,)."""
    z = torch.cat(list(logits), -1).double()
    sums = torch.logsumexp(z, -1) if sums is None else sums
    losses = sums - z.gather(-1, targets[:, None])[:, 0]
    onehot = torch.zeros_like(z).scatter(-1, targets[:, None], 1.0)
    n = len(logits)
    if own:
        p = torch.cat([torch.softmax(piece, -1) for piece in z.chunk(n, -1)], -1)
    else:
        p = (z - sums[:, None]).exp()
    return losses, list((p - onehot).chunk(n, -1))


def _unshifted(logits: Shards, targets: Tensor) -> Answer:
    """Each piece has its maximum taken away, and the sums are added as they are."""
    z = torch.stack(list(logits)).double()  # (n, B, V/n)
    peaks = z.amax(-1)
    sums = (z - peaks.unsqueeze(-1)).exp().sum((0, 2)).log()
    return _answer(logits, targets, sums + peaks.amax(0))


def _sum_of_logs(logits: Shards, targets: Tensor) -> Answer:
    """The log-sum-exps of the pieces are added."""
    sums = torch.stack([torch.logsumexp(piece.double(), -1) for piece in logits])
    return _answer(logits, targets, sums.sum(0))


def _lost_maximum(logits: Shards, targets: Tensor) -> Answer:
    z = torch.cat(list(logits), -1).double()
    return _answer(logits, targets, torch.logsumexp(z, -1) - z.amax(-1))


def _shifted_target(logits: Shards, targets: Tensor) -> Answer:
    """The logit of the target has lost the maximum of its piece, the sum none."""
    losses, gradients = _answer(logits, targets)
    peaks = torch.stack(list(logits)).double().amax(-1)  # (n, B)
    here = targets // logits[0].shape[-1]
    return losses + peaks.gather(0, here[None])[0], gradients


def _local_numbers(logits: Shards, targets: Tensor) -> Answer:
    """Each rank takes its classes for 0 to V/n - 1."""
    classes = torch.arange(logits[0].shape[-1], device=targets.device)
    onehot = (targets[:, None] == classes).double()
    z = torch.cat(list(logits), -1).double()
    found = torch.stack([(onehot * piece).sum(-1) for piece in logits]).sum(0)
    p = torch.softmax(z, -1).chunk(len(logits), -1)
    return torch.logsumexp(z, -1) - found, [piece - onehot for piece in p]


def _overflowing(logits: Shards, targets: Tensor) -> Answer:
    z = torch.cat(list(logits), -1)
    e = z.exp()
    losses = e.sum(-1).log() - z.gather(-1, targets[:, None])[:, 0]
    onehot = torch.zeros_like(z).scatter(-1, targets[:, None], 1.0)
    gradient = e / e.sum(-1, keepdim=True) - onehot
    return losses, list(gradient.chunk(len(logits), -1))


def _piece_losses(logits: Shards, targets: Tensor) -> Tensor:
    """Return the loss within each piece, with targets counted in it, (n, B)."""
    z = torch.stack(list(logits)).double()
    own = (targets % z.shape[-1]).expand(len(z), -1)
    return torch.logsumexp(z, -1) - z.gather(-1, own.unsqueeze(-1)).squeeze(-1)


def _every_target(logits: Shards, targets: Tensor) -> Answer:
    """Each rank takes a target, also one that is not its own."""
    z = torch.stack(list(logits)).double()
    own = (targets % z.shape[-1]).expand(len(z), -1)
    found = z.gather(-1, own.unsqueeze(-1)).squeeze(-1).sum(0)
    sums = torch.logsumexp(torch.cat(list(z), -1), -1)
    return sums - found, _answer(logits, targets)[1]


def _without_target(logits: Shards, targets: Tensor) -> Answer:
    z = torch.cat(list(logits), -1).double()
    return _answer(logits, targets)[0], list(torch.softmax(z, -1).chunk(len(logits), 1))


def _mean_gradient(logits: Shards, targets: Tensor) -> Answer:
    losses, gradients = _answer(logits, targets)
    return losses, [g / len(targets) for g in gradients]


def _mean_loss(logits: Shards, targets: Tensor) -> Answer:
    losses, gradients = _mean_gradient(logits, targets)
    return losses.mean(), gradients


def _loss_case(B: int, V: int, n: int, scale: float = 1.0) -> tuple:
    logits = scale * _random(B, V, seed=n)
    generator = torch.Generator("cpu").manual_seed(B + V + n)
    targets = torch.randint(V, (B,), generator=generator, device="cpu")
    targets[0] = V - 1  # on the last rank
    return list(logits.chunk(n, -1)), targets


def _known_case() -> tuple:
    """Return probabilities 1/2, 1/4 | 1/8, 1/8 and a target on either rank."""
    z = torch.tensor([[8.0, 4.0, 2.0, 2.0]] * 2, device="cpu").log()
    return list(z.chunk(2, -1)), torch.tensor([0, 3], device="cpu")


_VOCABULARY_LOSS = Exercise(
    name="vocabulary_loss",
    arguments=("logits", "targets"),
    reference=_answer,
    cases=[
        _known_case(),
        _loss_case(3, 6, 2),
        _loss_case(2, 8, 4),
        _loss_case(5, 9, 3, scale=5.0),
        _loss_case(4, 4, 4),
        _loss_case(3, 10, 1),
        _loss_case(3, 8, 2, scale=1000.0),
        _loss_case(4, 12, 3, scale=300.0),
    ],
    mistakes={
        "sums of exponentials add only if the same number was taken away on all "
        "ranks": _unshifted,
        "the exponential of a large logit is infinite: take something away first": (
            _overflowing
        ),
        "a rank that does not hold the target has nothing to say about it": (
            _every_target
        ),
        "softmax is over all classes, also in the gradient": lambda logits, targets: (
            _answer(logits, targets, own=True)
        ),
        "the classes of a rank are no classification of their own; what do the ranks "
        "add up?": lambda logits, targets: (
            _piece_losses(logits, targets).mean(0),
            _answer(logits, targets)[1],
        ),
        "the gradient knows the target as well": _without_target,
        "logarithms of sums do not add up to the logarithm of a sum": _sum_of_logs,
        "a maximum was taken away before exp; where is it given back?": _lost_maximum,
        "the sum has got its maximum back; has the logit of the target?": (
            _shifted_target
        ),
        "targets are numbers of all classes; which of them has a rank?": _local_numbers,
        "one loss for each sample, not their sum": (
            lambda *case: (_answer(*case)[0].sum(), _answer(*case)[1])
        ),
        "the gradient of the sum is asked, not of the mean": _mean_gradient,
        "one loss for each sample, and the gradient of their sum": _mean_loss,
        "the loss is not negative: which sign has the logit of the target?": (
            lambda *case: (-_answer(*case)[0], _answer(*case)[1])
        ),
        "join nothing: each rank has a piece of the gradient": (
            lambda *case: (_answer(*case)[0], torch.cat(_answer(*case)[1], -1))
        ),
    },
    hint="which numbers does every rank need from the others, for each sample?",
)


# ---- sequence_gradients ------------------------------------------------------------

Gradients = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def _backward(
    xs: Shards,
    gain: Tensor,
    ups: Shards,
    downs: Shards,
    grads: Shards,
    *,
    masked: bool = True,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the gradients of x * gain, whole (T, D), of ups and of downs."""
    h, g = torch.cat(list(xs)) * gain, torch.cat(list(grads))
    before = [h @ up for up in ups]
    after = [g @ down.T for down in downs]
    if masked:
        after = [a * (b > 0) for a, b in zip(after, before, strict=True)]
    d_h = torch.stack([a @ up.T for a, up in zip(after, ups, strict=True)]).sum(0)
    return d_h, [h.T @ a for a in after], [b.relu().T @ g for b in before]


def _layer(xs: Any, gain: Any, ups: Any, downs: Any, grads: Any) -> Gradients:
    d_h, d_ups, d_downs = _backward(xs, gain, ups, downs, grads)
    d_gain = (torch.cat(list(xs)) * d_h).sum(0)
    d_xs = list((d_h * gain).chunk(len(xs)))
    return d_xs, [d_gain] * len(xs), d_ups, d_downs


def _own_gain(xs: Any, gain: Any, ups: Any, downs: Any, grads: Any) -> Gradients:
    d_xs, _, d_ups, d_downs = _layer(xs, gain, ups, downs, grads)
    d_h = _backward(xs, gain, ups, downs, grads)[0].chunk(len(xs))
    own = [(x * d).sum(0) for x, d in zip(xs, d_h, strict=True)]
    return d_xs, own, d_ups, d_downs


def _one_gain(xs: Any, gain: Any, ups: Any, downs: Any, grads: Any) -> Any:
    d_xs, d_gain, d_ups, d_downs = _layer(xs, gain, ups, downs, grads)
    return d_xs, d_gain[0], d_ups, d_downs


def _by_rank(xs: Any, gain: Any, ups: Any, downs: Any, grads: Any) -> list[Any]:
    """Run each rank with its own tokens, columns and rows alone."""
    each = zip(xs, ups, downs, grads, strict=True)
    return [_layer([x], gain, [up], [down], [g]) for x, up, down, g in each]


def _own_tokens(xs: Any, gain: Any, ups: Any, downs: Any, grads: Any) -> Gradients:
    """The weights of a rank see its own tokens only."""
    d_xs, d_gain, *_ = _layer(xs, gain, ups, downs, grads)
    alone = _by_rank(xs, gain, ups, downs, grads)
    return d_xs, d_gain, [a[2][0] for a in alone], [a[3][0] for a in alone]


def _alone(xs: Any, gain: Any, ups: Any, downs: Any, grads: Any) -> Gradients:
    alone = _by_rank(xs, gain, ups, downs, grads)
    first, second, third, fourth = ([a[i][0] for a in alone] for i in range(4))
    return first, second, third, fourth


def _own_columns(xs: Any, gain: Any, ups: Any, downs: Any, grads: Any) -> Gradients:
    """The gradient of a token is what its own rank contributes to it."""
    _, _, d_ups, d_downs = _layer(xs, gain, ups, downs, grads)
    n = len(xs)
    parts = [
        _backward(xs, gain, [up], [down], grads)[0].chunk(n)[rank]
        for rank, (up, down) in enumerate(zip(ups, downs, strict=True))
    ]
    total = torch.stack([(x * d).sum(0) for x, d in zip(xs, parts, strict=True)]).sum(0)
    return [d * gain for d in parts], [total] * n, d_ups, d_downs


def _unmasked(xs: Any, gain: Any, ups: Any, downs: Any, grads: Any) -> Gradients:
    d_h, d_ups, d_downs = _backward(xs, gain, ups, downs, grads, masked=False)
    d_gain = (torch.cat(list(xs)) * d_h).sum(0)
    return list((d_h * gain).chunk(len(xs))), [d_gain] * len(xs), d_ups, d_downs


def _lost_gain(xs: Any, gain: Any, *rest: Any) -> tuple[Any, ...]:
    """Forward is repeated without the gain."""
    d_xs, *others = _layer(xs, torch.ones_like(gain), *rest)
    return [d * gain for d in d_xs], *others


def _times(factors: Callable[[int, Tensor], tuple]) -> Callable[..., list[Any]]:
    """Return the layer with its four answers multiplied."""

    def answer(xs: Any, gain: Any, *rest: Any) -> list[Any]:
        pairs = zip(_layer(xs, gain, *rest), factors(len(xs), gain), strict=True)
        return [[d * factor for d in ds] for ds, factor in pairs]

    return answer


def _before_relu(xs: Any, gain: Any, ups: Any, downs: Any, grads: Any) -> Gradients:
    d_xs, d_gain, d_ups, _ = _layer(xs, gain, ups, downs, grads)
    h, g = torch.cat(list(xs)) * gain, torch.cat(list(grads))
    return d_xs, d_gain, d_ups, [(h @ up).T @ g for up in ups]


def _whole_tokens(xs: Any, gain: Any, ups: Any, downs: Any, grads: Any) -> Gradients:
    d_xs, d_gain, d_ups, d_downs = _layer(xs, gain, ups, downs, grads)
    return [torch.cat(d_xs)] * len(xs), d_gain, d_ups, d_downs


def _layer_case(T: int, D: int, F: int, n: int, seed: int = 0) -> tuple:
    up, down = _random(D, F, seed=seed), _random(F, D, seed=seed + 1)
    x, grad = _random(T, D, seed=seed + 2), _random(T, D, seed=seed + 3)
    pieces = list(x.chunk(n)), list(grad.chunk(n))
    shards = list(up.chunk(n, 1)), list(down.chunk(n, 0))
    return pieces[0], 1 + 0.5 * _random(D, seed=seed + 4), *shards, pieces[1]


def _plain_case() -> tuple:
    """Return one token, one hidden unit and one number for each of two ranks."""
    pairs = ((1.0, 2.0), (1.0, 2.0), (5.0, 1.0), (1.0, 2.0))
    xs, ups, downs, grads = (
        [torch.tensor([[value]], device="cpu") for value in pair] for pair in pairs
    )
    return xs, torch.tensor([3.0], device="cpu"), ups, downs, grads


_SEQUENCE_GRADIENTS = Exercise(
    name="sequence_gradients",
    arguments=("xs", "gain", "ups", "downs", "grads"),
    reference=_layer,
    cases=[
        _plain_case(),
        _layer_case(4, 3, 6, 2),
        _layer_case(8, 2, 8, 4),
        _layer_case(6, 4, 3, 3),
        _layer_case(2, 5, 4, 2),
        _layer_case(3, 4, 8, 1),
        _layer_case(10, 3, 5, 5, seed=7),
        _layer_case(8, 6, 16, 2, seed=9),
    ],
    mistakes={
        "the gains are copies of one parameter; after this step they are none": (
            _own_gain
        ),
        "the gradient of the gain is too small; tokens are added, not averaged": (
            _times(lambda n, _: (1, 1 / n, 1, 1))
        ),
        "every rank holds a copy of the gain: a list of its gradients, one for each": (
            _one_gain
        ),
        "which tokens have gone through the columns of a rank?": _own_tokens,
        "each rank has computed alone; where do they exchange something?": _alone,
        "which ranks have used a token?": _own_columns,
        "relu has a gradient as well": _unmasked,
        "the gain stands between x and the product": (
            _times(lambda _, gain: (1 / gain, 1, 1, 1))
        ),
        "a rank keeps its own tokens": _whole_tokens,
        "what have the columns multiplied in forward, x or more?": _lost_gain,
        "by what is the gain multiplied?": _times(lambda _, gain: (1, gain, 1, 1)),
        "the ranks' terms are added, not averaged": (
            _times(lambda n, _: (1 / n, 1 / n, 1, 1))
        ),
        "what has come into the rows of a rank in forward?": _before_relu,
    },
    hint="go through forward from its end to its beginning; what is the reverse of "
    "each exchange?",
    rtol=1e-3,
    atol=1e-4,
)

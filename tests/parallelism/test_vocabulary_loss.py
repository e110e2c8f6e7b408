"""`vocab_parallel_cross_entropy` against `cross_entropy` of the whole logits."""

from contextlib import nullcontext

import pytest
import torch

import labpkg as lab
from labpkg.parallelism.vocabulary_loss import vocab_parallel_cross_entropy
from labpkg.processes import collectives

V = 12
OPTIONS = [
    {"ignore_index": ignore_index, "label_smoothing": smoothing, "reduction": reduction}
    for ignore_index in (-100, 3)
    for smoothing in (0.0, 0.3, 1.0)
    for reduction in ("mean", "sum", "none")
]


def logits_and_targets(shape=(3, 5), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(*shape, V, dtype=torch.float64, generator=generator)
    targets = torch.randint(V, shape, generator=generator)
    targets.view(-1)[::4] = 3
    return logits.to(dtype), targets


def both(logits, targets, options):
    """Return this rank's deviations of the loss and of its gradient."""
    mesh = lab.make_mesh(tp=torch.distributed.get_world_size())["tp"]
    logits.requires_grad_(True)
    whole = lab.cross_entropy(logits, targets, **options)
    weights = torch.rand(whole.shape, generator=torch.Generator().manual_seed(1))
    (whole * weights.to(whole)).sum().backward()
    assert logits.grad is not None
    expected = logits.grad.chunk(mesh.size(), -1)[mesh.get_local_rank()]
    part = logits.detach().chunk(mesh.size(), -1)[mesh.get_local_rank()]
    part.requires_grad_(True)
    loss = vocab_parallel_cross_entropy(part, targets, mesh, **options)
    (loss * weights.to(loss)).sum().backward()
    assert part.grad is not None
    assert (loss.dtype, part.grad.dtype) == (whole.dtype, part.dtype)
    pairs = ((loss, whole), (part.grad, expected))
    return [(a - b).abs().max().item() if a.numel() else 0.0 for a, b in pairs]


def test_it_equals_the_loss_of_whole_logits(world4):
    def run(is_off=False):
        logits, targets = logits_and_targets()
        with collectives.off() if is_off else nullcontext():
            return [both(logits.clone(), targets, options) for options in OPTIONS]

    for deviations in world4.run(run):
        assert max(map(max, deviations)) < 1e-12
    for deviations in world4.run(run, is_off=True):
        assert min(map(min, deviations)) > 1e-6


def test_it_is_stable_and_takes_what_cross_entropy_takes(world2):
    def run():
        found = []
        for large in (1e4, -1e4):
            logits, targets = logits_and_targets()
            found.append(both(logits + large, targets, {}))
        logits, targets = logits_and_targets()
        logits[..., : V // 2] = -torch.inf  # no class is left on the first rank
        found.append(both(logits, targets % (V // 2) + V // 2, {}))
        logits, targets = logits_and_targets()
        found.append(both(logits, torch.full_like(targets, -100), {}))  # none counts
        for shape in ((), (0,), (0, 4)):
            found.append(both(*logits_and_targets(shape), {}))
        return found

    for deviations in world2.run(run):
        assert max(map(max, deviations)) < 1e-12


def test_half_precision_gives_a_loss_in_single(world2):
    def run():
        return both(*logits_and_targets(dtype=torch.bfloat16), {})

    for loss, gradient in world2.run(run):
        assert loss < 1e-5
        assert gradient < 1e-3


def test_three_numbers_travel_for_each_target(world2):
    def run():
        mesh = lab.make_mesh(tp=2)["tp"]
        logits, targets = logits_and_targets()
        part = logits.chunk(2, -1)[mesh.get_local_rank()].requires_grad_(True)
        with lab.count_comms() as log:
            vocab_parallel_cross_entropy(part, targets, mesh).backward()
        return log["tp"].calls, log["tp", "all_reduce"].payload_bytes

    assert world2.run(run) == [(2, 3 * 15 * 8)] * 2


def test_bad_input_raises_on_every_rank(world2):
    def run():
        mesh = lab.make_mesh(tp=2)["tp"]
        logits, targets = logits_and_targets()
        part = logits.chunk(2, -1)[mesh.get_local_rank()].clone()
        spoiled = part.clone()
        if mesh.get_local_rank() == 1:
            spoiled[1, 2, 0] = torch.nan
        calls = {
            "target 12 is not a class of logits with V=12": (part, targets * 0 + V, {}),
            "must be int64": (part, targets.float(), {}),
            "must be floating point": (part.long(), targets, {}),
            "must agree": (part, targets[0], {}),
            "label_smoothing=2": (part, targets, {"label_smoothing": 2}),
            "reduction='all'": (part, targets, {"reduction": "all"}),
            "(1, 2) give a NaN loss": (spoiled, targets, {}),
            "give a NaN loss": (spoiled, targets * 0 - 100, {}),  # also if ignored
        }
        for message, (x, y, options) in calls.items():
            with pytest.raises(ValueError) as error:
                vocab_parallel_cross_entropy(x, y, mesh, **options)
            assert message in str(error.value)
        lab.barrier()

    world2.run(run)

"""Pieces: what is divided twice becomes whole again, a bucket at a time."""

import torch
from torch import nn

import labpkg as lab
from labpkg.processes.cuts import Cut, mark_cut
from labpkg.processes.pieces import (
    Announced,
    by_stage,
    gathered,
    in_order,
    is_divided,
    owner_of,
    shown,
    take,
    whole_shape,
)
from tests.parallelism.shards import cut_whole

WHOLE = {
    "a": torch.arange(24.0).view(8, 3),
    "b": torch.arange(5.0) + 100,
    "c": torch.arange(12.0).view(4, 3) + 200,
    "d": torch.arange(6.0).view(2, 3) + 300,
}


def divided():
    """Cut `a` and `c` over tp, slice `a` and `b` over dp; leave `d` whole."""
    mesh = lab.make_mesh(dp=2, tp=2)
    parameters = {}
    for name, whole in WHOLE.items():
        cut = Cut(mesh["tp"], 0, whole.shape, (len(whole),))
        p = nn.Parameter(cut.take(whole) if name in "ac" else whole.clone())
        if name in "ac":
            mark_cut(p, cut)
        parameters[name] = p
    cut_whole([parameters["a"], parameters["b"]], mesh["dp"])
    return parameters


def whole_again():
    parameters = divided()
    found, traffic = {}, []
    with lab.count_comms() as log:
        for name, whole in gathered(parameters, lambda owner: owner):
            found[name] = whole.clone()
            traffic.append((log["dp"].calls, log["tp"].calls))
    assert list(found) == in_order(parameters) == ["a", "b", "c", "d"]
    doubled = gathered(parameters, lambda owner: 2 * owner, dtype=torch.float64)
    zeros = gathered(parameters, lambda owner: None)
    return (
        found,
        dict(doubled),
        {name: tensor.clone() for name, tensor in zeros},
        traffic,
        {name: (whole_shape(p), is_divided(p)) for name, p in parameters.items()},
    )


def test_what_is_divided_twice_becomes_whole(world4):
    for found, doubled, zeros, traffic, known in world4.run(whole_again):
        for name, whole in WHOLE.items():
            assert torch.equal(found[name], whole)
            assert torch.equal(doubled[name], 2 * whole.to(doubled[name].dtype))
            assert torch.equal(zeros[name], torch.zeros_like(whole))
            assert known[name] == (whole.shape, name != "d")
        # Nothing is gathered before it is asked for.
        assert traffic == [(1, 1), (1, 1), (1, 2), (1, 2)]


def taken():
    parameters = divided()
    pieces = []
    for name, p in parameters.items():
        own, state = take(WHOLE[name], p, sliced=False), owner_of(p)
        part = take(WHOLE[name], p, sliced=True)
        pieces.append(torch.equal(own, p) and torch.equal(part.view_as(state), state))
        pieces.append(part.untyped_storage().nbytes() == part.nbytes)
    return pieces


def test_a_rank_takes_what_it_holds(world4):
    assert world4.run(taken) == [[True] * 8] * 4


def shown_to_all(is_alone):
    mesh = None if is_alone else lab.make_mesh(pp=2)["pp"]
    rank = 0 if mesh is None else mesh.get_local_rank()
    names = [["a", "b"], ["c"]][rank]
    mine = [(name, Announced(WHOLE[name].shape, torch.float32)) for name in names]
    told = by_stage(mine, mesh)
    with lab.count_comms() as log:
        # The strides of a stage's tensors are its own affair.
        turned = {name: WHOLE[name].transpose(0, -1).contiguous() for name in names}
        own = ((name, tensor.transpose(0, -1)) for name, tensor in turned.items())
        seen = {name: tensor.clone() for name, tensor in shown(own, told, mesh)}
    return seen, log["pp", "broadcast"].calls


def test_stages_show_what_they_have_to_all(world2):
    for seen, num_calls in world2.run(shown_to_all, is_alone=False):
        assert list(seen) == ["a", "b", "c"]
        assert all(torch.equal(tensor, WHOLE[name]) for name, tensor in seen.items())
        assert num_calls == 3
    seen, num_calls = world2.run(shown_to_all, is_alone=True)[1]
    assert (list(seen), num_calls) == (["a", "b"], 0)

"""Cuts: slices of whole tensors and back, and marks that stay in the process."""

import pickle

import torch
from torch import nn

import labpkg as lab
from labpkg.processes.cuts import Cut, Place, cut_of, mark_cut, mark_place, place_of

CASES = {
    "rows": (0, (8,)),
    "columns": (1, (4,)),
    "stacked": (0, (4, 4)),
    "stacked unequally": (0, (4, 2, 2)),
}
WHOLE = torch.arange(8.0 * 4).view(8, 4)


def taken_and_gathered():
    mesh = lab.make_mesh(tp=2)["tp"]
    found = {}
    for name, (dim, blocks) in CASES.items():
        cut = Cut(mesh, dim, WHOLE.shape, blocks)
        part = cut.take(WHOLE)
        with lab.count_comms() as log:
            whole = cut.gather(part)
        sent = log["tp", "all_gather"]
        found[name] = part, whole, (sent.calls, sent.payload_bytes)
        assert part.untyped_storage().nbytes() == part.nbytes  # no view of the whole
    return found


def test_a_rank_has_its_slice_of_every_block(world2):
    rows = {
        "rows": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "stacked": [[0, 1, 4, 5], [2, 3, 6, 7]],
        "stacked unequally": [[0, 1, 4, 6], [2, 3, 5, 7]],
    }
    for rank, found in enumerate(world2.run(taken_and_gathered)):
        for name, (part, whole, traffic) in found.items():
            if name == "columns":
                expected = WHOLE[:, 2 * rank : 2 * rank + 2]
            else:
                expected = WHOLE[rows[name][rank]]
            assert torch.equal(part, expected)
            assert torch.equal(whole, WHOLE)
            assert traffic == (1, WHOLE.nbytes)


def copies_of_marks():
    """Return whether marks are there, and whether copies that are saved have some."""
    mesh = lab.make_mesh(tp=2)["tp"]
    layer = nn.Linear(4, 4)
    mark_place(layer, Place(mesh))
    mark_cut(layer.weight, Cut(mesh, 0, layer.weight.shape, (4,)))
    mark_place(layer.weight, Place(mesh, counts=False, number=3))
    saved = pickle.loads(pickle.dumps(layer))
    marks = [cut_of(layer.weight), place_of(layer.weight), place_of(layer)]
    later = [cut_of(saved.weight), place_of(saved.weight), place_of(saved)]
    unmarked = [cut_of(layer.bias), place_of(layer.bias), place_of(nn.Linear(2, 2))]
    mark_cut(layer.weight, None)
    return [m is None for m in (*marks, *later, *unmarked, cut_of(layer.weight))]


def test_marks_stay_in_the_process(world2):
    expected = [False] * 3 + [True] * 7
    assert world2.run(copies_of_marks) == [expected] * 2

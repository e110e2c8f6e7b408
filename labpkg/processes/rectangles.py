"""Rectangles: where what a rank holds lies in the whole tensor.

Whatever the engines did to a tensor, a rank holds a few axis-aligned boxes of it. A
`Shard` is a range of the flat part, hence rows and two pieces of rows. A `Cut` moves a
box to where its block lies in the whole. So two layouts of one tensor have everything
in common that resharding needs: boxes of the same coordinates, which overlap or not.

Contract: the views share memory with what the rank holds, so they can be read to save
it and written to load it. Nothing is communicated.

Chapter: runs/checkpointing. Reference: PyTorch, torch.distributed.checkpoint, whose
`ChunkStorageMetadata` is such a box.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from labpkg.processes.cuts import Cut, cut_of
from labpkg.processes.flat import shard_of

Corner = tuple[int, ...]


class Rectangle(NamedTuple):
    """A box of a whole tensor that this rank holds.

    Attributes:
        offsets: Its first element in the whole, one number for each dim.
        sizes: Its shape.
        local: A view of that shape of what this rank holds.
    """

    offsets: Corner
    sizes: Corner
    local: Tensor


def rectangles(tensor: Tensor, held: Tensor, *, sliced: bool) -> list[Rectangle]:
    """Return the boxes of the whole that a rank holds, none of them empty.

    Args:
        tensor: Of a model; its marks tell how it is divided.
        held: What this rank has: the tensor itself, its owner, or a state of the owner.
        sliced: Also cut by its shard, as its gradient and state are. The parameters of
            stages 1 and 2 are not.
    """
    cut, shard = cut_of(tensor), shard_of(tensor) if sliced else None
    held = held.detach()
    if shard is None:
        boxes = [Rectangle((0,) * held.ndim, tuple(held.shape), held)]
    else:
        boxes, flat, first = [], held.view(-1), 0
        for offsets, sizes in boxes_of_range(shard.shape, shard.start, shard.stop):
            last = first + math.prod(sizes)
            boxes.append(Rectangle(offsets, sizes, flat[first:last].view(sizes)))
            first = last
    if cut is not None:
        boxes = [moved for box in boxes for moved in _in_whole(cut, box)]
    return [box for box in boxes if box.local.numel()]


def boxes_of_range(
    shape: Corner, start: int, stop: int
) -> Iterator[tuple[Corner, Corner]]:
    """Yield (offsets, sizes) of the boxes that a range of a flat tensor consists of.

    They come in the order of the elements: the end of a row, whole rows, the beginning
    of a row; where a row has several dims, its pieces are divided in the same way.

    Args:
        shape: Of the tensor.
        start: First element, of the flat tensor.
        stop: One after the last.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # inside of one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, stop - last * row)


def overlap(
    first: tuple[Corner, Corner], second: tuple[Corner, Corner]
) -> tuple[Corner, Corner] | None:
    """Return what two boxes of one tensor have in common, None if nothing.

    Args:
        first: Offsets and sizes.
        second: Likewise.
    """
    begins = tuple(map(max, first[0], second[0]))
    ends = [min(a + m, b + n) for a, m, b, n in zip(*first, *second, strict=True)]
    sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
    return (begins, sizes) if all(n > 0 for n in sizes) else None


def _in_row(
    shape: Corner, number: int, start: int, stop: int
) -> Iterator[tuple[Corner, Corner]]:
    for offsets, sizes in boxes_of_range(shape[1:], start, stop):
        yield (number, *offsets), (1, *sizes)


def _in_whole(cut: Cut, box: Rectangle) -> Iterator[Rectangle]:
    """Yield the pieces of a box of this rank's part, one for each block, moved."""
    n, rank, dim = cut.mesh.size(), cut.mesh.get_local_rank(), cut.dim
    begin = box.offsets[dim]
    in_part = in_whole = 0
    for length in cut.blocks:
        share = length // n
        first = max(begin, in_part)
        last = min(begin + box.sizes[dim], in_part + share)
        if first < last:
            moved = in_whole + rank * share + first - in_part
            yield Rectangle(
                (*box.offsets[:dim], moved, *box.offsets[dim + 1 :]),
                (*box.sizes[:dim], last - first, *box.sizes[dim + 1 :]),
                box.local.narrow(dim, first - begin, last - first),
            )
        in_part += share
        in_whole += length

"""Cuts: what this rank holds of a parameter that model parallelism divides.

Tensor parallelism cuts a parameter along one dim: a `Cut` says along which, and turns
the whole into this rank's slice and back. Pipeline parallelism gives whole parameters
to some ranks only: a `Place` says over which axis, and on which rank a parameter counts
that several hold. Engines leave these marks; whoever needs the whole model (norms,
checkpoints, tests) reads them and need not know the engine.

Chapters: parallelism/tensor_parallel, parallelism/pipeline. Reference: Shoeybi et al.
2019, Megatron-LM, arXiv:1909.08053.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.collectives import all_gather


@dataclass(frozen=True, eq=False, slots=True)
class Cut:
    """How the ranks of an axis divide one parameter along one dim.

    A fused layer stacks several matrices, such as queries, keys and values; each of its
    blocks is cut by itself, and a rank holds its slice of every block.

    Attributes:
        mesh: The axis.
        dim: The dim that is cut.
        shape: Shape of the whole parameter.
        blocks: Lengths along `dim` of the matrices that are stacked there; one, the
            whole length, for a plain layer. Each is a multiple of the axis size.
    """

    mesh: DeviceMesh
    dim: int
    shape: torch.Size
    blocks: tuple[int, ...]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # a model that was saved lies on no mesh

    def take(self, whole: Tensor) -> Tensor:
        """Return a copy of this rank's slice of a tensor of the whole shape."""
        n, rank = self.mesh.size(), self.mesh.get_local_rank()
        parts = [block.chunk(n, self.dim)[rank] for block in self._blocks_of(whole, 1)]
        return torch.cat(parts, self.dim).contiguous()

    def gather(self, part: Tensor) -> Tensor:
        """Return the whole, on every rank, of slices as `take` returns them.

        Communication: (n - 1) / n of the bytes of the whole per rank.
        """
        n = self.mesh.size()
        slices = all_gather(part.detach(), self.mesh, dim=self.dim).chunk(n, self.dim)
        blocks = zip(*(self._blocks_of(s, n) for s in slices), strict=True)
        return torch.cat([piece for block in blocks for piece in block], self.dim)

    def _blocks_of(self, tensor: Tensor, share: int) -> tuple[Tensor, ...]:
        return tensor.split([length // share for length in self.blocks], self.dim)


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """Over which axis the parameters of a model are dealt out, whole.

    Attributes:
        mesh: The axis.
        counts: Whether this rank's copy is the one that counts; the others of a tied
            parameter do not.
        number: Where the parameter stands among those of the whole model, as its
            `parameters()` yields them. Copies of a tied one share the number; what
            belongs to no model has none.
    """

    mesh: DeviceMesh
    counts: bool = True
    number: int | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


def cut_of(parameter: Tensor) -> Cut | None:
    """Return how a parameter is cut along a dim, or None."""
    return getattr(parameter, "_labpkg_cut", None)


def mark_cut(parameter: Tensor, cut: Cut | None) -> None:
    """Let `cut_of` find how a parameter is cut; None takes the mark away."""
    parameter._labpkg_cut = cut  # pyright: ignore[reportAttributeAccessIssue]


def place_of(owner: Tensor | nn.Module) -> Place | None:
    """Return over which axis a parameter, or a model, is dealt out, or None.

    A model has a mark of its own, because a rank may hold no parameter of it.
    """
    return getattr(owner, "_labpkg_place", None)


def mark_place(owner: Tensor | nn.Module, place: Place | None) -> None:
    """Let `place_of` find the axis of a parameter or model; None takes it away."""
    vars(owner)["_labpkg_place"] = place

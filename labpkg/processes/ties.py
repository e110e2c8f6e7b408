"""Ties: one parameter of a model, held as a copy by several ranks of an axis.

Copies stay equal if they start equal and every copy gets the sum of all gradients. The
holders of a tie exchange messages; the others of the axis take no part. All holders add
in the same order, so their sums are bitwise equal.

Chapter: parallelism/pipeline. Reference: Narayanan et al. 2021, arXiv:2104.04473,
section on embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.in_place import exchange_
from labpkg.processes.transport import Work


@dataclass(frozen=True, eq=False, slots=True)
class Tie:
    """A parameter and the ranks that hold a copy.

    Attributes:
        number: What the parameter is known by on all ranks.
        ranks: Who holds a copy; the first is its owner.
        parameter: The copy of this rank, or None.
    """

    number: int
    ranks: tuple[int, ...]
    parameter: Tensor | None

    def share(self, mesh: DeviceMesh) -> None:
        """Overwrite the copies with that of the owner.

        Args:
            mesh: The axis.

        Communication: the owner sends the parameter to each other holder.
        """
        if self.parameter is None:
            return
        owner, *others = self.ranks
        copy = self.parameter.detach().contiguous()
        if mesh.get_local_rank() == owner:
            messages = [(copy, rank, self.number) for rank in others]
            exchange_(messages, [], mesh).wait()
        else:
            exchange_([], [(copy, owner, self.number)], mesh).wait()
            with torch.no_grad():
                self.parameter.copy_(copy)

    def exchange(self, mesh: DeviceMesh) -> tuple[list[Tensor], Work]:
        """Start to swap gradients; a missing one counts as zero.

        Args:
            mesh: The axis.

        Returns:
            The gradients of all holders, to be read after the transfer, in the order
            of `ranks`, and the transfer.

        Communication: the gradient to each other holder.
        """
        parameter, rank = self.parameter, mesh.get_local_rank()
        assert parameter is not None
        own = parameter.grad
        own = torch.zeros_like(parameter) if own is None else own
        own = own.detach().contiguous()
        parts = [own if r == rank else torch.empty_like(own) for r in self.ranks]
        peers = [(i, r) for i, r in enumerate(self.ranks) if r != rank]
        outgoing = [(own, r, self.number) for _, r in peers]
        incoming = [(parts[i], r, self.number) for i, r in peers]
        return parts, exchange_(outgoing, incoming, mesh)


def sum_gradients(ties: Sequence[Tie], mesh: DeviceMesh) -> None:
    """Give every copy the sum of the gradients of all copies, bitwise the same.

    Args:
        ties: Those that some holder has a gradient for; the same on every rank.
        mesh: The axis.

    Communication: each holder sends its gradient to each other holder.
    """
    started = [(tie, *tie.exchange(mesh)) for tie in ties if tie.parameter is not None]
    for tie, parts, work in started:
        work.wait()
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        assert tie.parameter is not None
        if tie.parameter.grad is None:
            tie.parameter.grad = total
        else:  # in place, where a data-parallel engine may keep it
            tie.parameter.grad.detach().copy_(total)

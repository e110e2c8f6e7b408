"""Ties: one parameter of a model, held as a copy by several ranks of an axis.

Copies stay equal if they start equal and every copy gets the sum of all gradients. The
holders of a parameter exchange messages; the others of the axis take no part. All
holders add in the same order, so their sums are bitwise equal.

Chapter: parallelism/pipeline. Reference: Narayanan et al. 2021, arXiv:2104.04473
(embeddings of the first and the last stage).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.cuts import Place, mark_place
from labpkg.processes.flat import shard_of
from labpkg.processes.in_place import exchange_
from labpkg.processes.replicas import reduces_in_backward
from labpkg.processes.transport import Work

Numbers = Mapping[int, Mapping[str, int]]


@dataclass(eq=False, slots=True)
class _Tie:
    """A parameter that several ranks hold.

    Attributes:
        number: Where it stands in the model.
        ranks: Who holds a copy; the first is its owner.
        parameter: The copy of this rank, or None.
        before: The gradient that this copy had before the step, or None.
    """

    number: int
    ranks: tuple[int, ...]
    parameter: Tensor | None
    before: Tensor | None = None


class Ties:
    """The parameters of a model that several ranks of an axis hold.

    Making it marks each parameter of this rank with its `Place`.

    Args:
        modules: The stages of this rank, by number.
        numbers: For each stage of the model, where its parameters stand in the model,
            by name.
        rank_of: On which rank a stage is.
        mesh: The axis.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        numbers: Numbers,
        rank_of: Callable[[int], int],
        mesh: DeviceMesh,
    ) -> None:
        self._mesh, self._rank = mesh, mesh.get_local_rank()
        holders: dict[int, dict[int, None]] = {}
        for stage, own in numbers.items():
            for number in own.values():
                holders.setdefault(number, {})[rank_of(stage)] = None
        copies: dict[int, Tensor] = {}
        for stage, module in modules.items():
            for name, parameter in module.named_parameters(remove_duplicate=False):
                number = numbers[stage][name]
                copies[number] = parameter
                counts = next(iter(holders[number])) == self._rank
                mark_place(parameter, Place(mesh, counts, number))
        self._ties = [
            _Tie(number, tuple(ranks), copies.get(number))
            for number, ranks in sorted(holders.items())
            if len(ranks) > 1
        ]
        self._own = [tie for tie in self._ties if tie.parameter is not None]

    def share(self) -> None:
        """Overwrite the copies with those of the owners.

        Communication: each owner sends its parameter to each other holder.
        """
        for tie in self._own:
            assert tie.parameter is not None
            owner, *others = tie.ranks
            copy = tie.parameter.detach().clone(memory_format=torch.contiguous_format)
            if self._rank == owner:
                messages = [(copy, rank, tie.number) for rank in others]
                exchange_(messages, [], self._mesh).wait()
            else:
                exchange_([], [(copy, owner, tie.number)], self._mesh).wait()
                tie.parameter.detach().copy_(copy)

    def require_whole(self) -> None:
        """Refuse a copy whose gradient is cut before those of all copies are summed.

        Raises:
            ValueError: If ZeRO has cut one, or will do so in the next backward.
        """
        for tie in self._own:
            shard = None if tie.parameter is None else shard_of(tie.parameter)
            if tie.parameter is None or shard is None:
                continue
            is_slice = shard.local is tie.parameter  # what `fully_shard` leaves of it
            if is_slice or reduces_in_backward(tie.parameter):
                raise ValueError(
                    f"parameter {tie.number} of the model, {tuple(shard.shape)}, is "
                    f"tied between the ranks {list(tie.ranks)} of the pipeline, and "
                    "ZeRO cuts its gradient before they can sum it; call step under "
                    "ZeroOptimizer.no_sync() and then reduce_gradients(), use "
                    "DataParallel around the stages, or do not tie"
                )

    def put_aside(self) -> None:
        """Keep what was accumulated before: only what is new is summed."""
        for tie in self._own:
            assert tie.parameter is not None
            gradient, tie.parameter.grad = tie.parameter.grad, None
            # A copy: a data-parallel engine writes into the same memory again.
            tie.before = None if gradient is None else gradient.detach().clone()

    @property
    def used(self) -> list[bool]:
        """Whether the copy of this rank has a gradient, for each tied parameter."""
        return [
            tie.parameter is not None and tie.parameter.grad is not None
            for tie in self._ties
        ]

    def sum_gradients(self, num_users: list[float]) -> None:
        """Give every copy the sum of the gradients of all copies.

        A parameter that no rank has used keeps the gradient that it had, or none.

        Args:
            num_users: For each tied parameter, on how many ranks it was used.

        Communication: each holder sends its gradient to each other holder.
        """
        active = [tie for tie, n in zip(self._ties, num_users, strict=True) if n]
        started = [(tie, *self._exchange(tie)) for tie in active if tie in self._own]
        for tie, parts, work in started:
            work.wait()
            total = parts[0] + parts[1]
            for part in parts[2:]:
                total += part
            _set_gradient(tie, total)
        for tie in self._own:
            if tie.before is not None:
                _add_gradient(tie, tie.before)
                tie.before = None

    def _exchange(self, tie: _Tie) -> tuple[list[Tensor], Work]:
        """Start to swap gradients; return those of all holders, and the transfer."""
        parameter = tie.parameter
        assert parameter is not None
        own = parameter.grad
        own = torch.zeros_like(parameter) if own is None else own.detach()
        own = own.contiguous()
        parts = [own if r == self._rank else torch.empty_like(own) for r in tie.ranks]
        peers = [(i, r) for i, r in enumerate(tie.ranks) if r != self._rank]
        outgoing = [(own, r, tie.number) for _, r in peers]
        incoming = [(parts[i], r, tie.number) for i, r in peers]
        return parts, exchange_(outgoing, incoming, self._mesh)


def _set_gradient(tie: _Tie, gradient: Tensor) -> None:
    assert tie.parameter is not None
    if tie.parameter.grad is None:
        tie.parameter.grad = gradient
    else:  # in place, where a data-parallel engine may keep it
        tie.parameter.grad.detach().copy_(gradient)


def _add_gradient(tie: _Tie, gradient: Tensor) -> None:
    assert tie.parameter is not None
    if tie.parameter.grad is None:
        tie.parameter.grad = gradient
    else:
        tie.parameter.grad.detach().add_(gradient)

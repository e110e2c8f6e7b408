"""Regions of a tensor-parallel model: how activations enter and leave them.

Inside a region each rank of the axis computes a part of every layer; outside, all ranks
compute the same. The operators at the border are conjugate pairs: what one does
forward, its partner does backward.

    f            the same on all ranks            | all_reduce
    g            all_reduce                       | the same on all ranks
    f_sequence   all_gather along T               | reduce_scatter along T
    g_sequence   reduce_scatter along T           | all_gather along T
    join         all_gather                       | the own slice
    split        the own slice                    | all_gather

# Note [one computation]
A value outside a region is one value that every rank happens to hold, so its gradient
counts once: the backward of `join` takes a slice and adds nothing up. The collectives
of Note [adjoint] take the ranks' values for different ones; these operators are other
functions with the same forward.

Sequence parallelism stretches the region over norms and dropouts: their activations are
cut along T, dim 1 of (B, T, D), and f, g give way to the pair with `_sequence`. An
all_reduce is a reduce_scatter and an all_gather, so it moves the same bytes and keeps
1/n of the activations.

Chapter: parallelism/tensor_parallel. References: Shoeybi et al. 2019, Megatron-LM,
arXiv:1909.08053 (f and g); Korthikanti et al. 2022, Reducing Activation Recomputation
in Large Transformer Models, arXiv:2205.05198 (g and g-bar: the sequence pair).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.in_place import all_gather_, all_reduce_, reduce_scatter_
from labpkg.processes.transport import Work

SEQUENCE_DIM = 1


class _Pending(NamedTuple):
    """A tensor on its way: computation may go on until `wait` returns it."""

    work: Work
    finish: Callable[[], Tensor]

    def wait(self) -> Tensor:
        self.work.wait()
        return self.finish()


def _start_sum(x: Tensor, mesh: DeviceMesh) -> _Pending:
    """Start adding up `x` over the ranks, in its own memory where that is possible."""
    x = x.contiguous()
    return _Pending(all_reduce_(x, mesh), lambda: x)


def _start_join(x: Tensor, mesh: DeviceMesh, dim: int) -> _Pending:
    x, n = x.contiguous(), mesh.size()
    parts = x.new_empty((n, *x.shape))
    work = all_gather_(parts.view(-1), x.view(-1), mesh)
    dim = dim % x.ndim
    return _Pending(work, lambda: _owned(parts.movedim(0, dim).flatten(dim, dim + 1)))


def _start_sum_slice(x: Tensor, mesh: DeviceMesh, dim: int) -> _Pending:
    parts = x.unflatten(dim, (mesh.size(), -1)).movedim(dim, 0).contiguous()
    part = torch.empty_like(parts[0])
    work = reduce_scatter_(part.view(-1), parts.view(-1), mesh)
    return _Pending(work, lambda: part)


def _owned(x: Tensor) -> Tensor:
    """Return a view of memory that nobody else has as a tensor of its own.

    Autograd lets nobody change a view in place that comes out of one of our functions.
    """
    return x.data


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, mesh: DeviceMesh) -> Tensor:
    return _start_sum(x.clone(), mesh).wait()


def _join(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    return _start_join(x, mesh, dim).wait()


def _sum_slice(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    return _start_sum_slice(x, mesh, dim).wait()


def _slice(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    own = x.chunk(mesh.size(), dim)[mesh.get_local_rank()]
    return own.clone(memory_format=torch.contiguous_format)


class _Border(torch.autograd.Function):
    """One function forward and its conjugate backward; see Note [one computation]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable, conjugate: Callable) -> Tensor:
        ctx.conjugate = conjugate
        return forward(x.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        return ctx.conjugate(*grads), None, None


def f(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Enter a region with a value that all ranks hold.

    Args:
        x: The same on every rank.
        mesh: The tensor-parallel axis.

    Returns:
        `x`; its gradient is the sum of what the ranks' parts send back.

    Communication: nothing forward; an all_reduce of `x` backward.
    """
    return _Border.apply(x, _same, partial(_sum, mesh=mesh))


def g(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Leave a region by adding up the ranks' terms.

    Args:
        x: This rank's term.
        mesh: The tensor-parallel axis.

    Returns:
        The sum, the same on every rank.

    Communication: an all_reduce of `x` forward; nothing backward.
    """
    return _Border.apply(x, partial(_sum, mesh=mesh), _same)


def f_sequence(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Gather the slices of a sequence for layers that mix positions or are cut.

    Args:
        x: This rank's positions.
        mesh: The tensor-parallel axis.

    Shape: (B, T/n, ...) -> (B, T, ...)

    Raises:
        ValueError: If `x` has fewer than three dims.

    Communication: an all_gather of T positions forward; a reduce_scatter of them
    backward.
    """
    check_sequence(x)
    forward = partial(_join, mesh=mesh, dim=SEQUENCE_DIM)
    return _Border.apply(x, forward, partial(_sum_slice, mesh=mesh, dim=SEQUENCE_DIM))


def g_sequence(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Add up the ranks' terms and keep this rank's positions.

    Args:
        x: This rank's term of all positions.
        mesh: The tensor-parallel axis.

    Shape: (B, T, ...) -> (B, T/n, ...)

    Raises:
        ValueError: If `x` has fewer than three dims, or n does not divide T.

    Communication: a reduce_scatter of T positions forward; an all_gather of them
    backward.
    """
    check_sequence(x, mesh)
    forward = partial(_sum_slice, mesh=mesh, dim=SEQUENCE_DIM)
    return _Border.apply(x, forward, partial(_join, mesh=mesh, dim=SEQUENCE_DIM))


def join(x: Tensor, mesh: DeviceMesh, *, dim: int = -1) -> Tensor:
    """Leave a region by putting the ranks' slices side by side.

    Args:
        x: This rank's slice, as long on every rank.
        mesh: The tensor-parallel axis.
        dim: Where the slices go.

    Shape: (..., K/n, ...) -> (..., K, ...)

    Communication: an all_gather of the result forward; nothing backward.
    """
    forward = partial(_join, mesh=mesh, dim=dim)
    return _Border.apply(x, forward, partial(_slice, mesh=mesh, dim=dim))


def split(x: Tensor, mesh: DeviceMesh, *, dim: int = -1) -> Tensor:
    """Enter a region with this rank's slice of a value that all ranks hold.

    Args:
        x: The same on every rank.
        mesh: The tensor-parallel axis.
        dim: What is cut.

    Shape: (..., K, ...) -> (..., K/n, ...)

    Raises:
        ValueError: If n does not divide the dim.

    Communication: nothing forward; an all_gather of the gradient backward.
    """
    n = mesh.size()
    if x.shape[dim] % n:
        raise ValueError(
            f"dim {dim} of {tuple(x.shape)} is not divisible by the {n} ranks of the "
            f"axis; choose a multiple of {n}"
        )
    return _Border.apply(
        x, partial(_slice, mesh=mesh, dim=dim), partial(_join, mesh=mesh, dim=dim)
    )


def join_sequence(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Leave a region with all positions; see `join`.

    Args:
        x: This rank's positions.
        mesh: The tensor-parallel axis.

    Shape: (B, T/n, ...) -> (B, T, ...)

    Raises:
        ValueError: If `x` has fewer than three dims.
    """
    check_sequence(x)
    return join(x, mesh, dim=SEQUENCE_DIM)


def split_sequence(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Enter a region with this rank's positions; see `split`.

    Args:
        x: All positions, the same on every rank.
        mesh: The tensor-parallel axis.

    Shape: (B, T, ...) -> (B, T/n, ...)

    Raises:
        ValueError: If `x` has fewer than three dims, or n does not divide T.
    """
    check_sequence(x, mesh)
    return split(x, mesh, dim=SEQUENCE_DIM)


def check_sequence(x: Tensor, mesh: DeviceMesh | None = None) -> None:
    """Refuse activations without a sequence, or one that the ranks cannot divide.

    Args:
        x: Activations.
        mesh: The axis that is to divide T, if it is.

    Raises:
        ValueError: If they are not (B, T, ...), or T is not divisible.
    """
    if x.ndim < 3:
        raise ValueError(
            f"sequence parallelism cuts T of (B, T, ...), got {tuple(x.shape)}; give "
            "the activations three dims, or leave sequence_parallel out"
        )
    if mesh is not None and x.shape[SEQUENCE_DIM] % mesh.size():
        n, length = mesh.size(), x.shape[SEQUENCE_DIM]
        raise ValueError(
            f"a sequence of T={length} is not divisible by tp={n}; pad or crop it to a "
            f"multiple of {n}, such as {-(-length // n) * n}"
        )


class ColumnLinear(torch.autograd.Function):
    """y = f(x) W^T + b of this rank's rows of W, fused for the sake of time.

    Backward sends dx first and computes dW meanwhile. With a sequence, x is kept as
    the slice that it was and gathered again for dW, which hides behind dx.

    Call `apply(x, weight, bias, mesh, enters, is_sequence)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mesh: DeviceMesh,
        enters: bool,
        is_sequence: bool,
    ) -> Tensor:
        """Return this rank's features."""
        ctx.mesh, ctx.enters, ctx.is_sequence = mesh, enters, is_sequence
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        whole = _join(x, mesh, SEQUENCE_DIM) if is_sequence else x
        return _owned(F.linear(whole, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Return the gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad, mesh = grads[0], ctx.mesh
        rows = grad.reshape(-1, grad.shape[-1])  # (B T, out/n)
        gathering = dx = dw = pending = None
        if needs_weight and ctx.is_sequence:
            gathering = _start_join(x, mesh, SEQUENCE_DIM)
        if needs_x:
            dx = rows.mm(weight).view(*grad.shape[:-1], weight.shape[1])  # one term
            if ctx.is_sequence:
                pending = _start_sum_slice(dx, mesh, SEQUENCE_DIM)
            elif ctx.enters:
                pending = _start_sum(dx, mesh)
        if needs_weight:
            whole = x if gathering is None else gathering.wait()
            dw = rows.t().mm(whole.reshape(-1, whole.shape[-1]))
        db = rows.sum(0) if needs_bias else None
        return (pending.wait() if pending else dx), dw, db, None, None, None


class RowLinear(torch.autograd.Function):
    """y = g(x W^T) + b of this rank's columns of W; the bias is added once.

    Call `apply(x, weight, bias, mesh, is_sequence)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mesh: DeviceMesh,
        is_sequence: bool,
    ) -> Tensor:
        """Return all features: of all positions, or of this rank's."""
        ctx.mesh, ctx.is_sequence = mesh, is_sequence
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        term = F.linear(x, weight)
        if is_sequence:
            y = _sum_slice(term, mesh, SEQUENCE_DIM)
        else:
            y = _start_sum(term, mesh).wait()
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Return the gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad = grads[0]
        if ctx.is_sequence:  # of all positions: the bias has its whole gradient, too
            grad = _join(grad, ctx.mesh, SEQUENCE_DIM)
        rows = grad.reshape(-1, grad.shape[-1])  # (B T, out)
        dx = (
            rows.mm(weight).view(*grad.shape[:-1], weight.shape[1]) if needs_x else None
        )
        dw = rows.t().mm(x.reshape(-1, x.shape[-1])) if needs_weight else None
        db = rows.sum(0) if needs_bias else None
        return dx, dw, db, None, None

"""Data parallelism: replicate the model, shard the batch, average the gradients.

Three versions, each adding one idea: `average_gradients` (one all_reduce per parameter
after backward), `average_gradients_bucketed` (one per flat bucket: fewer latencies) and
`DataParallel` (buckets leave while backward still computes: hidden latencies).

Equal starts and equal averaged gradients keep the replicas equal, so parameters are
sent once, at the start, and never again; `check_every` lets the engine prove it.

Chapter: parallelism/data_parallel. Reference: Li et al. 2020, PyTorch Distributed,
PVLDB 13(12):3005-3018, arXiv:2006.15704.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.collectives import all_reduce
from labpkg.processes.flat import bucket_parameters, flat_views
from labpkg.processes.in_place import all_reduce_
from labpkg.processes.replicas import (
    GradientHook,
    broadcast_state,
    check_replicas,
    replica_parameters,
    require_device,
    require_same_model,
    take_parameters,
)
from labpkg.processes.transport import Work

_BUCKET_BYTES = 25 * 2**20
_REDUCE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def average_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Average every gradient over the ranks, one collective per parameter (naive).

    Call it between `backward()` and `optimizer.step()`. Every rank must have a gradient
    for the same parameters.

    Args:
        model: The replica of this rank.
        mesh: The data-parallel axis.

    Communication: one all_reduce per parameter, 2 (n - 1) / n of its bytes per rank.
    """
    for parameter in replica_parameters(model):
        if parameter.grad is not None:
            parameter.grad = all_reduce(parameter.grad, mesh, op="mean")


def average_gradients_bucketed(
    model: nn.Module, mesh: DeviceMesh, *, bucket_bytes: int = _BUCKET_BYTES
) -> None:
    """Average all gradients over the ranks, one collective per flat bucket.

    Adds to `average_gradients`: a collective costs a latency however small it is, and a
    model has many small parameters. Price: the gradients are copied in and out.

    Args:
        model: The replica of this rank.
        mesh: The data-parallel axis.
        bucket_bytes: Size at which a bucket is closed.

    Communication: the same bytes as `average_gradients` in fewer collectives.
    """
    gradients = [p.grad for p in replica_parameters(model) if p.grad is not None]
    for bucket in bucket_parameters(gradients, bucket_bytes):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        all_reduce_(flat, mesh, op="mean").wait()
        for gradient, mean in zip(
            bucket, flat_views(flat, [g.shape for g in bucket]), strict=True
        ):
            gradient.copy_(mean)


def mean_weight(count: float, mesh: DeviceMesh) -> float:
    """Return n * count / sum(count): the factor that makes a mean of means exact.

    Averaging over ranks gives every rank the same weight. With `count` samples (or
    tokens) on this rank, multiply its mean loss by this factor; the averaged gradient
    is then that of the mean over all samples. A rank without samples gets 0 and still
    takes part.

    Args:
        count: What this rank's mean was taken over; at least 0.
        mesh: The data-parallel axis.

    Returns:
        The factor; 1 when all counts are equal.

    Raises:
        ValueError: On every rank, if a count is negative or not finite, or all are 0.

    Communication: an all_reduce of two numbers.
    """
    device = mesh.device_type
    pair = torch.tensor([count, count < 0], dtype=torch.float64, device=device)
    total, num_negative = all_reduce(pair, mesh).tolist()
    if num_negative or not 0 < total < float("inf"):  # nor nan
        raise ValueError(
            f"count={count} on this rank, {total} in all: a mean needs counts of at "
            "least 0 and one sample in all; skip the step on every rank"
        )
    return mesh.size() * count / total


class _Bucket:
    """A flat gradient buffer: the elements of its parameters, then one flag for each.

    Gradients live in it, unless they travel in another dtype than their own.

    # Note [used flags]
    A parameter that took no part in any rank's backward must keep `grad is None`: an
    optimizer with weight decay would move it otherwise. Each rank sets the flags of the
    parameters that it used; the flags travel with the gradients, so all ranks agree
    without a further collective. A rank that used them all need not read the answer.
    """

    def __init__(
        self, parameters: list[Tensor], num_ranks: int, dtype: torch.dtype | None
    ) -> None:
        self.parameters, self.share = parameters, 1 / num_ranks
        num_elements = sum(p.numel() for p in parameters)
        size = num_elements + len(parameters)
        self.flat = parameters[0].detach().new_zeros(size, dtype=dtype)
        self.converts = self.flat.dtype != parameters[0].dtype
        self.wide = torch.promote_types(self.flat.dtype, parameters[0].dtype)
        self.views = flat_views(self.flat, [p.shape for p in parameters])
        self.flags = self.flat[num_elements:]
        self.ready: set[int] = set()
        self.unused: list[int] = []
        self.work: Work | None = None

    def hold(self, i: int) -> None:
        """Keep the gradient of parameter i where autograd will add to it."""
        if not self.converts:
            self._move(i, 1.0)

    def take(self, i: int) -> None:
        """Write this rank's share of the mean gradient of parameter i."""
        self._move(i, self.share)

    def _move(self, i: int, scale: float) -> None:
        gradient, view = self.parameters[i].grad, self.views[i]
        assert gradient is not None
        if gradient.data_ptr() == view.data_ptr():
            if scale != 1:
                view.mul_(scale)
            return
        # Scaling on the way in costs nothing; a mean by gloo is one more pass.
        torch.mul(gradient.detach().to(self.wide), scale, out=view)
        if not self.converts:
            self.parameters[i].grad = view

    def launch(self, mesh: DeviceMesh, *, deterministic: bool) -> None:
        """Start averaging; a parameter without a gradient counts as zero and unused."""
        late = [i for i in range(len(self.parameters)) if i not in self.ready]
        self.unused = [i for i in late if self.parameters[i].grad is None]
        self.flags.fill_(1)
        for i in late:
            if i in self.unused:
                self.views[i].zero_()
                self.flags[i] = 0
            else:  # accumulated under `no_sync`, and not used since
                self.take(i)
        self.work = all_reduce_(self.flat, mesh, deterministic=deterministic)

    def finish(self) -> None:
        """Wait, and give every parameter that some rank used its mean gradient."""
        assert self.work is not None
        self.work.wait()
        self.work = None
        self.ready.clear()
        for i in self.unused:
            if self.flags[i] != 0:
                self.parameters[i].grad = self.views[i].to(self.parameters[i].dtype)
        if self.converts:
            with torch.no_grad():
                for parameter, view in zip(self.parameters, self.views, strict=True):
                    if parameter.grad is not None:
                        parameter.grad.copy_(view)


class DataParallel(nn.Module):
    """Replicate a module over a mesh axis and average gradients during backward.

    Adds to `average_gradients_bucketed`: gradients live in the buckets (no copy out),
    and each bucket leaves as soon as its last gradient is ready, while backward goes on
    with earlier layers. At the end of `backward()` every gradient is the mean over the
    ranks; a parameter that no rank used has `grad is None`. `zero_grad` of either kind
    works. Every rank must reach at least one parameter in every backward pass (add
    `0 * p.sum()` to a loss that may reach none).

    Keep the wrapper and call it: the bare module has no engine once the wrapper is
    gone, and its backward then raises.

    Parameters and buffers are broadcast from rank 0 of the axis at construction. The
    wrapper adds nothing to the names in `state_dict`, `named_parameters` and the like.

    Args:
        module: The model; each rank may start from another seed.
        mesh: The data-parallel axis, such as `mesh["dp"]`.
        bucket_bytes: Size at which a bucket is closed. Small buckets start earlier,
            large ones pay fewer latencies.
        reduce_dtype: Floating dtype in which gradients travel and are summed; by
            default each parameter's own. bfloat16 halves the bytes of float32 and keeps
            8 bits of precision; float16 can overflow.
        deterministic: Sum in rank order on every backend. With a power of two ranks
            the gradients are bitwise those of one process that accumulates the ranks'
            shards in order, each loss divided by the number of ranks.
        broadcast_buffers: Overwrite buffers, such as running statistics, with those of
            rank 0 before the first training forward of a step; an averaging backward
            ends a step.
        check_every: Compare parameters over the ranks (`check_replicas`) before steps
            0, k, 2 k, ..., or never with 0.

    Raises:
        ValueError: If no parameter needs a gradient, if a parameter is sparse or has an
            engine already, if the model is not on one device of the mesh's kind, if an
            option is out of range, if the mesh has several axes, or if models differ.

    Communication: `data_parallel_bytes(module)` are all-reduced per optimizer step, 2
    (n - 1) / n of them per rank, with `no_sync` too. Buffers are broadcast once.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: DeviceMesh,
        *,
        bucket_bytes: int = _BUCKET_BYTES,
        reduce_dtype: torch.dtype | None = None,
        deterministic: bool = False,
        broadcast_buffers: bool = True,
        check_every: int = 0,
    ) -> None:
        super().__init__()
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes={bucket_bytes} is below 1; choose a size")
        if check_every < 0:
            raise ValueError(f"check_every={check_every} is below 0; 0 means never")
        require_device(module, mesh)
        parameters = take_parameters(module)
        _check_reduce_dtype(reduce_dtype, parameters)
        self.module, self._mesh = module, mesh
        self._known = {id(p): (p.dtype, p.device) for p in parameters}
        require_same_model(module, mesh)
        broadcast_state((*module.parameters(), *module.buffers()), mesh)
        self._buckets = [
            _Bucket(group, mesh.size(), reduce_dtype)
            for group in bucket_parameters(parameters, bucket_bytes)
        ]
        self._deterministic, self._check_every = deterministic, check_every
        self._broadcast_buffers = broadcast_buffers
        self._sync, self._in_backward, self._step_begins = True, False, True
        self._num_launched = self._num_steps = 0
        for number, bucket in enumerate(self._buckets):
            for i, parameter in enumerate(bucket.parameters):
                hook = GradientHook(self, number, i)
                parameter.register_post_accumulate_grad_hook(hook)
        self.register_load_state_dict_pre_hook(_expect_no_prefix)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module.

        Raises:
            RuntimeError: If the last backward pass broke off between two buckets, or if
                `check_every` finds replicas that differ.
            ValueError: If a parameter is another than at construction.
        """
        self._require_ended()
        for name, p in self.module.named_parameters():
            if p.requires_grad and self._known.get(id(p)) != (p.dtype, p.device):
                raise ValueError(
                    f"{name} was unfrozen, added, replaced, cast or moved after "
                    "DataParallel was made; wrap the model last"
                )
        # Not before every forward: a backward may still need buffers as they are.
        if self._step_begins and self.module.training and torch.is_grad_enabled():
            self._begin_step()
        return self.module(*args, **kwargs)

    def _require_ended(self) -> None:
        if self._in_backward:
            raise RuntimeError(
                "the last backward pass did not end, so ranks may disagree about what "
                "was reduced; restart from a checkpoint"
            )

    def _begin_step(self) -> None:
        self._step_begins = False
        if self._broadcast_buffers:
            broadcast_state(self.module.buffers(), self._mesh)
        if self._check_every and self._num_steps % self._check_every == 0:
            check_replicas(self.module, self._mesh, buffers=False)

    def __deepcopy__(self, memo: dict) -> DataParallel:
        raise TypeError("a copy averages nothing; copy its .module and wrap the copy")

    def accumulated(self, number: int, i: int) -> None:
        """Take a gradient that is complete; the hook of the parameter calls this.

        Args:
            number: Which bucket.
            i: Which of its parameters.
        """
        bucket = self._buckets[number]
        if not self._sync:
            bucket.hold(i)
            return
        self._mark_ready(bucket, i)
        bucket.take(i)
        self._launch_next(only_full=True)

    def _mark_ready(self, bucket: _Bucket, i: int) -> None:
        if i in bucket.ready:
            raise RuntimeError(
                "a parameter received its gradient twice in one backward pass, as "
                "reentrant checkpointing does; use checkpoint(..., use_reentrant=False)"
            )
        bucket.ready.add(i)
        if not self._in_backward:
            self._in_backward = True  # until the whole backward pass has ended
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _launch_next(self, *, only_full: bool) -> None:
        # Buckets leave in one order on every rank, whatever order gradients come in.
        for bucket in self._buckets[self._num_launched :]:
            if only_full and len(bucket.ready) < len(bucket.parameters):
                return
            bucket.launch(self._mesh, deterministic=self._deterministic)
            self._num_launched += 1

    def _finish(self) -> None:
        self._launch_next(only_full=False)
        for bucket in self._buckets:
            bucket.finish()
        self._num_launched, self._in_backward = 0, False
        self._num_steps, self._step_begins = self._num_steps + 1, True

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Only accumulate gradients inside the block; the next backward averages all.

        The forward pass may be inside or outside; what counts is `backward()`.
        """
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Average what was accumulated under `no_sync`, without a backward pass.

        For gradients to which something is added after the last backward, as stages of
        a `Pipeline` add those of tied parameters. Every rank must call it, one without
        gradients too; what is averaged already stays as it is.

        Raises:
            RuntimeError: If the last backward pass broke off.

        Communication: as a backward pass.
        """
        self._require_ended()
        self._finish()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # pyright: ignore
        """Return the module's own state_dict, without a prefix."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the module's own state_dict; `assign=True` is found by `forward`."""
        return self.module.load_state_dict(*args, **kwargs)

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Generator:
        """Yield the wrapper and the module, both under the wrapper's name.

        Args:
            memo: Modules that were met before.
            prefix: The wrapper's name.
            remove_duplicate: Yield a module that is used twice once.
        """
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
            yield from self.module.named_modules(memo, prefix, remove_duplicate)


def _expect_no_prefix(_: object, state: dict, prefix: str, *rest: object) -> None:
    """Let a module around the wrapper load what its `state_dict` returned."""
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}module.{key.removeprefix(prefix)}"] = state.pop(key)


def _check_reduce_dtype(dtype: torch.dtype | None, parameters: list[Tensor]) -> None:
    is_complex = any(p.is_complex() for p in parameters)
    if dtype is not None and (is_complex or dtype not in _REDUCE_DTYPES):
        raise ValueError(
            f"reduce_dtype={dtype} cannot carry {'complex ' * is_complex}gradients; "
            f"leave it out{'' if is_complex else ' or choose torch.bfloat16'}"
        )

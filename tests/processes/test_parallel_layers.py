"""Layers of which each rank holds a slice, alone and against torch's whole ones."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import labpkg as lab
from labpkg.processes import collectives, regions
from labpkg.processes.cuts import cut_of
from labpkg.processes.parallel_layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)

IN, OUT, B, T = 8, 12, 3, 4


def axis():
    torch.set_default_dtype(torch.float64)
    mesh = lab.make_mesh(tp=dist.get_world_size())["tp"]
    torch.manual_seed(mesh.get_local_rank())  # rank 0 draws what `whole_layer` draws
    return mesh


def whole_layer(kind, *args, **options):
    torch.manual_seed(0)
    return kind(*args, **options)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def deviation(layer, whole, *, x, whole_x, out, whole_out):
    """Return by how much y, dx and the gradients differ; `out`, `whole_out` pick.

    `x` is this rank's part of `whole_x`; `out` maps the whole output to this rank's.
    """
    found = []
    y, expected = layer(x), whole(whole_x)
    found.append(y - out(expected))
    weight = draw(*expected.shape)
    expected.backward(weight)
    y.backward(out(weight))
    if x.requires_grad:
        found.append(x.grad - whole_out(whole_x.grad))
    for p, q in zip(layer.parameters(), whole.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            cut = cut_of(p)
            found.append((cut.gather(p.grad) if cut else p.grad) - q.grad)
    return max(t.detach().abs().max().item() for t in found)


def test_column(world4):
    def run(is_off=False):
        found = []
        for bias in (True, False):
            for blocks in ((), (4, 8)):
                for gather, sequence in ((0, 0), (1, 0), (0, 1), (1, 1)):
                    mesh = axis()
                    layer = ColumnParallelLinear(
                        *(IN, OUT, mesh),
                        bias=bias,
                        blocks=blocks,
                        gather_output=bool(gather) and not blocks,
                        sequence_parallel=bool(sequence),
                    )
                    whole = whole_layer(nn.Linear, IN, OUT, bias)
                    whole_x = draw(B, T, IN).requires_grad_(True)
                    cut = collectives_slice(mesh) if sequence else lambda t: t
                    x = cut(whole_x).detach().clone().requires_grad_(True)

                    def own(t, blocks=blocks or (OUT,), mesh=mesh, layer=layer):
                        if layer.layout.gathers:
                            return t
                        rank = mesh.get_local_rank()
                        parts = [b.chunk(4, -1)[rank] for b in t.split(blocks, -1)]
                        return torch.cat(parts, -1)

                    with collectives.off() if is_off else nullcontext():
                        found.append(
                            deviation(
                                *(layer, whole),
                                x=x,
                                whole_x=whole_x,
                                out=own,
                                whole_out=cut,
                            )
                        )
        return found

    for deviations in world4.run(run):
        assert max(deviations) < 1e-12
    for deviations in world4.run(run, is_off=True):
        assert min(deviations) > 1e-3


def collectives_slice(mesh, dim=1):
    return lambda t: t.chunk(mesh.size(), dim)[mesh.get_local_rank()]


def test_row(world4):
    def run(is_off=False):
        found = []
        for bias in (True, False):
            for sequence in (False, True):
                mesh = axis()
                layer = RowParallelLinear(
                    IN, OUT, mesh, bias=bias, sequence_parallel=sequence
                )
                whole = whole_layer(nn.Linear, IN, OUT, bias)
                whole_x = draw(B, T, IN).requires_grad_(True)
                own = collectives_slice(mesh, -1)
                x = own(whole_x).detach().clone().requires_grad_(True)
                out = collectives_slice(mesh) if sequence else lambda t: t
                with collectives.off() if is_off else nullcontext():
                    found.append(
                        deviation(
                            *(layer, whole),
                            x=x,
                            whole_x=whole_x,
                            out=out,
                            whole_out=own,
                        )
                    )
        return found

    for deviations in world4.run(run):
        assert max(deviations) < 1e-12
    for deviations in world4.run(run, is_off=True):
        assert min(deviations) > 1e-3


def test_vocabulary(world4):
    def run(is_off=False):
        found = []
        tokens = torch.tensor([[0, 11, 5, 5], [2, 3, 4, 1]], dtype=torch.int32)
        for padding in (None, 5, -1):
            for sequence in (False, True):
                mesh = axis()
                layer = VocabParallelEmbedding(
                    12, 6, mesh, padding_idx=padding, sequence_parallel=sequence
                )
                whole = whole_layer(nn.Embedding, 12, 6, padding)
                out = collectives_slice(mesh) if sequence else lambda t: t
                with collectives.off() if is_off else nullcontext():
                    found.append(
                        deviation(
                            *(layer, whole),
                            x=tokens,
                            whole_x=tokens,
                            out=out,
                            whole_out=out,
                        )
                    )
        for bad in (12, -1):
            with lab.count_comms() as log, pytest.raises(IndexError):
                layer(torch.tensor([[0, 0, 0, bad]]))
            assert log["tp"].calls == 0
        return found

    for deviations in world4.run(run):
        assert max(deviations) < 1e-12
    for deviations in world4.run(run, is_off=True):
        assert min(deviations) > 1e-3


def test_any_leading_dims_and_strides(world2):
    def run():
        mesh, found = axis(), []
        column = ColumnParallelLinear(IN, OUT, mesh, gather_output=True)
        torch.manual_seed(mesh.get_local_rank())
        row = RowParallelLinear(IN, OUT, mesh)
        whole = whole_layer(nn.Linear, IN, OUT)
        xs = [draw(*shape) for shape in ((IN,), (0, IN), (5, IN), (2, 3, 4, IN))]
        for x in (*xs, xs[-1].transpose(0, 1)):
            own = collectives_slice(mesh, -1)(x)
            for layer, mine in ((column, x), (row, own)):
                y = layer(mine.requires_grad_(True))
                y.sum().backward()  # its gradient has strides of zero
                found.append((y - whole(x)).abs().sum().item())
        return max(found)

    assert max(world2.run(run)) < 1e-10


def test_what_is_frozen_costs_nothing(world2):
    def run():
        mesh, calls, kept = axis(), {}, []
        column = ColumnParallelLinear(IN, OUT, mesh)
        slices = ColumnParallelLinear(IN, OUT, mesh, sequence_parallel=True)
        row = RowParallelLinear(IN * 2, OUT, mesh)
        keep = saved_tensors_hooks(lambda t: kept.append(t.shape), lambda _: None)
        for name, layer in (("column", column), ("sequence", slices), ("row", row)):
            for x_needs, weight_needs in ((0, 0), (0, 1), (1, 0), (1, 1)):
                layer.weight.requires_grad_(bool(weight_needs))
                x = draw(B, T, IN).requires_grad_(bool(x_needs))
                kept.clear()
                with keep:
                    layer(x)
                assert len(kept) == x_needs + weight_needs  # weight, x
                assert (layer.weight.shape in kept) == x_needs
                y = layer(x)
                with lab.count_comms() as log:
                    y.sum().backward()
                assert (x.grad is not None) == x_needs
                key = name, x_needs, weight_needs
                calls[key] = log["tp"].calls
                with torch.no_grad():
                    assert not layer(x).requires_grad
        return calls

    for calls in world2.run(run):
        assert calls == {
            ("column", 0, 0): 0,
            ("column", 0, 1): 0,
            ("column", 1, 0): 1,
            ("column", 1, 1): 1,
            ("sequence", 0, 0): 0,
            ("sequence", 0, 1): 1,
            ("sequence", 1, 0): 1,
            ("sequence", 1, 1): 2,
            **{("row", x_needs, needs): 0 for x_needs in (0, 1) for needs in (0, 1)},
        }


class Events(TorchDispatchMode):
    """Writes down matrix products, and with `spy` the transfers between them."""

    def __init__(self):
        super().__init__()
        self.events = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) == "aten.mm.default":
            self.events.append(f"product {tuple(args[0].shape)}")
        return func(*args, **(kwargs or {}))

    def spy(self, name):
        transfer = getattr(regions, name)

        def started(*args, **options):
            self.events.append(f"start {name}")
            work = transfer(*args, **options)
            return Waited(work, name, self.events)

        setattr(regions, name, started)


class Waited:
    def __init__(self, work, name, events):
        self.work, self.name, self.events = work, name, events

    def wait(self):
        self.events.append(f"wait {self.name}")
        self.work.wait()


def test_products_run_while_gradients_travel(world2):
    def run(sequence):
        mesh = axis()
        layer = ColumnParallelLinear(
            IN, OUT, mesh, bias=False, sequence_parallel=sequence
        )
        y = layer(draw(B, T, IN).requires_grad_(True))
        events = Events()
        for name in ("all_reduce_", "all_gather_", "reduce_scatter_"):
            events.spy(name)
        with events:
            y.backward(torch.ones_like(y))
        return events.events

    dx, dw = f"product ({B * T}, 6)", f"product (6, {B * T})"
    expected = [dx, "start all_reduce_", dw, "wait all_reduce_"]
    assert world2.run(run, False)[0] == expected
    dx, dw = f"product ({2 * B * T}, 6)", f"product (6, {2 * B * T})"
    assert world2.run(run, True)[0] == [
        *("start all_gather_", dx, "start reduce_scatter_"),
        *("wait all_gather_", dw, "wait reduce_scatter_"),
    ]


def test_autocast_computes_in_half_precision(world2):
    def run(dtype):
        mesh, found = axis(), []
        column = ColumnParallelLinear(IN, OUT, mesh, gather_output=True, dtype=dtype)
        row = RowParallelLinear(OUT, IN, mesh, dtype=dtype)
        own = collectives_slice(mesh, -1)
        with torch.autocast("cpu", torch.bfloat16):
            y = column(draw(B, IN).to(dtype).requires_grad_(True))
            z = row(own(y))
        z.float().sum().backward()
        for p in (*column.parameters(), *row.parameters()):
            assert p.grad is not None
            found.append(p.grad.dtype)
        return y.dtype, z.dtype, *found

    bf16, single, double = torch.bfloat16, torch.float32, torch.float64
    assert world2.run(run, single)[0] == (bf16, bf16, *[single] * 4)
    assert world2.run(run, double)[0] == (double, double, *[double] * 4)


def test_a_layer_says_its_sizes_and_can_be_copied(world2):
    def run():
        layer = ColumnParallelLinear(IN, OUT, axis(), unit=3)
        twin = copy.deepcopy(layer)
        cut = cut_of(twin.weight)
        assert cut is not None
        assert cut.shape == (OUT, IN)
        assert twin.weight is not layer.weight
        assert torch.equal(twin(torch.ones(IN)), layer(torch.ones(IN)))
        return repr(layer), layer.weight.shape

    text = "ColumnParallelLinear(in_features=8, out_features=12, bias=True, tp=2)"
    assert world2.run(run) == [(text, (6, 8))] * 2


def test_bad_sizes_raise_before_communication(world2):
    def run():
        mesh = axis()
        calls = {
            "out_features=9 is not divisible by tp=2; choose a multiple of 2, such as "
            "10": lambda: ColumnParallelLinear(4, 9, mesh),
            "3 units of 4 is not divisible by tp=2; choose a multiple of 8, such as "
            "16": lambda: ColumnParallelLinear(4, 12, mesh, unit=4),
            "not the sum of blocks (4, 4)": lambda: ColumnParallelLinear(
                4, 12, mesh, blocks=(4, 4)
            ),
            "out_features=3 is not divisible": lambda: ColumnParallelLinear(
                4, 12, mesh, blocks=(3, 9)
            ),
            "in_features=9 is not divisible": lambda: RowParallelLinear(9, 4, mesh),
            "num_embeddings=9": lambda: VocabParallelEmbedding(9, 4, mesh),
            "takes all 8 features, got 4": lambda: ColumnParallelLinear(8, 4, mesh)(
                torch.ones(4)
            ),
            "this rank's 4 of 8 features, got 8": lambda: RowParallelLinear(8, 4, mesh)(
                torch.ones(8)
            ),
        }
        for message, call in calls.items():
            with pytest.raises(ValueError) as error:
                call()
            assert message in str(error.value)
        lab.barrier()

    world2.run(run)

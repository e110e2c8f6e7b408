"""Every collective: value, gradient, counted bytes, the off-switch, refusals."""

import pytest
import torch
import torch.distributed as dist

import labpkg as lab
from labpkg.planning.cost import wire_bytes
from labpkg.processes import collectives, in_place

N = 4


def rows(rank: int, num: int = N, width: int = 3) -> torch.Tensor:
    """Return the float64 rows that a rank contributes: known to every rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(
        num, width, dtype=torch.float64, generator=generator, device="cpu"
    )


def run_values() -> dict[str, torch.Tensor]:
    mesh = lab.make_mesh(dp=N)["dp"]
    rank = mesh.get_local_rank()
    x = rows(rank)
    out = {f"all_reduce {op}": lab.all_reduce(x, mesh, op=op) for op in ("sum", "mean")}
    for op in ("max", "min", "product"):
        out[f"all_reduce {op}"] = lab.all_reduce(x, mesh, op=op)
    for op in ("sum", "mean", "max"):
        out[f"reduce {op}"] = lab.reduce(x, mesh, dst=2, op=op)
        out[f"reduce_scatter {op}"] = lab.reduce_scatter(x, mesh, op=op)
    out["broadcast"] = lab.broadcast(x, mesh, src=3)
    out["all_gather 0"] = lab.all_gather(x, mesh)
    out["all_gather 1"] = lab.all_gather(x, mesh, dim=1)
    out["all_gather -1"] = lab.all_gather(x.T, mesh, dim=-1)
    out["reduce_scatter 1"] = lab.reduce_scatter(x.T, mesh, dim=1)
    out["all_to_all 0"] = lab.all_to_all(x, mesh)
    out["all_to_all 1"] = lab.all_to_all(x.T, mesh, dim=1)
    return out


def expected_values(rank: int) -> dict[str, torch.Tensor]:
    xs = [rows(r) for r in range(N)]
    stack, zero = torch.stack(xs), torch.zeros_like(xs[0])
    out = {
        "all_reduce sum": stack.sum(0),
        "all_reduce mean": stack.mean(0),
        "all_reduce max": stack.amax(0),
        "all_reduce min": stack.amin(0),
        "all_reduce product": stack.prod(0),
    }
    for op in ("sum", "mean", "max"):
        whole = out[f"all_reduce {op}"]
        out[f"reduce {op}"] = whole if rank == 2 else zero
        out[f"reduce_scatter {op}"] = whole[rank : rank + 1]
    out["broadcast"] = xs[3]
    out["all_gather 0"] = torch.cat(xs)
    out["all_gather 1"] = torch.cat(xs, 1)
    out["all_gather -1"] = torch.cat([x.T for x in xs], -1)
    out["reduce_scatter 1"] = stack.sum(0).T[:, rank : rank + 1]
    out["all_to_all 0"] = torch.stack([x[rank] for x in xs])
    out["all_to_all 1"] = torch.stack([x[rank] for x in xs]).T
    return out


def test_values_equal_one_process(world4):
    for rank, got in enumerate(world4.run(run_values)):
        want = expected_values(rank)
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-14, atol=1e-14)


def test_values_fail_without_communication(world4):
    def silent():
        with collectives.off():
            return run_values()

    for rank, got in enumerate(world4.run(silent)):
        for name, want in expected_values(rank).items():
            assert got[name].shape == want.shape, name
            if not (name == "broadcast" and rank == 3):
                same = torch.allclose(got[name], want, atol=1e-6)
                assert not same or (name.startswith("reduce ") and rank != 2), name


LINEAR = {
    "all_reduce sum": lambda x, m: lab.all_reduce(x, m),
    "all_reduce mean": lambda x, m: lab.all_reduce(x, m, op="mean"),
    "reduce sum": lambda x, m: lab.reduce(x, m, dst=1),
    "reduce mean": lambda x, m: lab.reduce(x, m, dst=1, op="mean"),
    "broadcast": lambda x, m: lab.broadcast(x, m, src=2),
    "all_gather": lambda x, m: lab.all_gather(x, m, dim=1),
    "reduce_scatter": lambda x, m: lab.reduce_scatter(x, m),
    "reduce_scatter mean": lambda x, m: lab.reduce_scatter(x, m, op="mean"),
    "all_to_all": lambda x, m: lab.all_to_all(x, m),
}


def inner_products() -> dict[str, tuple[float, float]]:
    """<A x, y> and <x, A^T y> over all ranks: equal iff backward is the transpose."""
    mesh = lab.make_mesh(dp=N)["dp"]
    rank = mesh.get_local_rank()
    found = {}
    for name, collective in LINEAR.items():
        x = rows(rank).requires_grad_()
        out = collective(x, mesh)
        y = torch.randn(
            out.shape,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(rank),
            device="cpu",
        )
        out.backward(y)
        forward, backward = (out.detach() * y).sum(), (x.detach() * x.grad).sum()
        pair = lab.all_reduce(torch.stack([forward, backward]))
        found[name] = tuple(pair.tolist())
    return found


def test_backward_is_the_transpose(world4):
    for forward, backward in world4.run(inner_products)[0].values():
        assert forward == pytest.approx(backward, rel=1e-12)
        assert abs(forward) > 1e-3


def count_everything():
    mesh = lab.make_mesh(dp=2, tp=2)
    x = torch.zeros(8, 4)  # 128 bytes
    with lab.count_comms() as log:
        lab.all_reduce(x, mesh["dp"])
        lab.reduce_scatter(x, mesh["dp"])
        lab.all_gather(x, mesh["tp"])
        lab.all_to_all(x)
        with lab.count_comms() as inner:
            lab.all_reduce(x.clone().requires_grad_(), mesh["dp"]).sum().backward()
        if dist.get_rank() == 0:
            lab.send(x, 1)
        elif dist.get_rank() == 1:
            lab.recv(x, 0)
    with lab.count_comms() as nothing, collectives.off():
        lab.all_reduce(x)
    return {
        "dp": log["dp"],
        "dp all_reduce": log["dp", "all_reduce"],
        "tp": log["tp"],
        "all_to_all": log["world", "all_to_all"],
        "send": log["world", "send"],
        "recv": log["world", "recv"],
        "cp": log["cp"],
        "inner": inner["dp"],
        "off": nothing["world"],
        "axes": log.axes,
        "text": str(log),
    }


def test_bytes_are_counted_by_axis(world4):
    ranks = world4.run(count_everything)
    got = ranks[0]
    # all_reduce three times (one is a backward pass) and reduce_scatter once
    assert got["dp"].calls == 4
    assert got["dp"].payload_bytes == 4 * 128
    assert got["dp"].wire_bytes == 3 * wire_bytes("all_reduce", 128, 2) + 64
    assert got["dp all_reduce"].calls == 3
    assert got["inner"].calls == 2
    assert (got["tp"].payload_bytes, got["tp"].wire_bytes) == (256, 128)
    assert got["all_to_all"].wire_bytes == 96
    assert (got["send"].calls, got["send"].payload_bytes) == (1, 128)
    assert ranks[1]["recv"].calls == 1
    assert ranks[1]["recv"].wire_bytes == 0
    for silent in ("cp", "off"):
        assert (got[silent].calls, got[silent].wire_bytes) == (0, 0)
    assert got["axes"] == ["dp", "tp", "world"]
    assert "all_to_all" in got["text"]


def test_broadcast_bytes_are_those_of_a_tree(world4):
    def sent():
        with lab.count_comms() as log:
            lab.broadcast(torch.zeros(10), src=1)
        return log["world"].wire_bytes

    # rank 1 is the root: it sends to 2 and 3, and 2 sends to 0
    assert world4.run(sent) == [0, 80, 40, 0]


def test_reduce_scatter_adds_in_rank_order(world4):
    """Bitwise the sequential sum ((g0 + g1) + g2) + g3, whatever arrives first."""

    def scatter(seed):
        g = torch.Generator(device="cpu").manual_seed(seed + dist.get_rank())
        return lab.reduce_scatter(torch.randn(4096, generator=g, device="cpu"))

    got = torch.cat(world4.run(scatter, 7))
    parts = [
        torch.randn(4096, generator=torch.Generator().manual_seed(7 + r))
        for r in range(N)
    ]
    assert torch.equal(got, ((parts[0] + parts[1]) + parts[2]) + parts[3])


def refusals():
    mesh = lab.make_mesh(dp=2, tp=2)
    x, messages = torch.ones(3, 3), []
    tries = [
        lambda: lab.all_reduce(x, mesh),
        lambda: lab.all_reduce(x, op="avg"),
        lambda: lab.all_reduce(x.int(), op="mean"),
        lambda: lab.all_reduce(torch.ones(999, dtype=torch.complex64), op="max"),
        lambda: lab.all_reduce(x.requires_grad_(), op="max"),
        lambda: lab.reduce_scatter(x.detach(), mesh["dp"]),
        lambda: lab.all_gather(x, dim=5),
        lambda: lab.all_gather(torch.tensor(1.0)),
        lambda: lab.broadcast(x, src=4),
        lambda: lab.send(x.detach(), dist.get_rank()),
        lambda: lab.send(torch.ones(1, requires_grad=True), 9),
        lambda: lab.send(torch.ones(1, requires_grad=True), (dist.get_rank() + 1) % 4),
        lambda: in_place.all_reduce_(torch.ones(4, 4).T[:2]),
        lambda: in_place.all_gather_(torch.ones(7), torch.ones(3)),
        lambda: in_place.reduce_scatter_(torch.ones(2, 1), torch.ones(8)),
    ]
    for attempt in tries:
        with pytest.raises(ValueError) as info:
            attempt()
        messages.append(str(info.value))
    return messages


def test_bad_input_is_refused_on_every_rank(world4):
    for messages in world4.run(refusals):
        wanted = (
            "takes one, such as mesh['dp']",
            "choose one of sum, mean",
            "convert to a float",
            "complex64: no backend offers it; choose sum or mean",
            "pass x.detach()",
            "choose a multiple of 2",
            "dim=5 does not exist",
            "x.reshape(1)",
            "choose 0 to 3",
            "this rank itself",
            "is not a rank",
            "carries no gradient",
            "not contiguous",
            "the slice of rank",
            "are not a flat tensor",
        )
        for message, part in zip(messages, wanted, strict=True):
            assert part in message


def test_no_process_group_is_named():
    with pytest.raises(RuntimeError, match=r"lab\.make_mesh"):
        lab.all_reduce(torch.ones(1))


def test_messages_and_objects(world4):
    def talk():
        rank = dist.get_rank()
        if rank % 2:
            lab.send(torch.full((2,), float(rank)), rank - 1, tag=3)
            got = None
        else:
            got = lab.recv(torch.empty(2), rank + 1, tag=3).tolist()
        lab.barrier()
        objects = lab.all_gather_object({"rank": rank, "pad": "x" * 10**rank})
        return got, [o["rank"] for o in objects], len(objects[3]["pad"])

    got = world4.run(talk)
    assert [g[0] for g in got] == [[1.0, 1.0], None, [3.0, 3.0], None]
    assert all(g[1:] == ([0, 1, 2, 3], 1000) for g in got)


def test_world_of_one_runs_the_same_lines():
    mesh = lab.make_mesh()["dp"]
    x = torch.arange(4.0, requires_grad=True)
    y = lab.all_gather(lab.reduce_scatter(lab.all_reduce(x, mesh), mesh), mesh)
    lab.all_to_all(lab.broadcast(y, mesh), mesh).sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(x.grad, torch.ones(4))
    dist.destroy_process_group()


@pytest.mark.parametrize("check", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize("op", ["sum", "mean", "max", "product"])
def test_deterministic_results_are_bitwise_those_of_one_process(check, op, world4):
    combine = {"max": torch.maximum, "product": torch.mul}.get(op, torch.add)

    def compare():
        rank, n = dist.get_rank(), dist.get_world_size()
        for numel in (1, 100, 103, 5001):  # by messages, and through shared memory
            g = torch.Generator("cpu").manual_seed(numel)
            every = torch.randn(n, numel, generator=g, device="cpu").unbind()
            expected = every[0]
            for version in every[1:]:
                expected = combine(expected, version)
            if op == "mean":
                expected = expected / n
            with lab.count_comms() as log:
                total = lab.all_reduce(every[rank], op=op, deterministic=True)
            assert torch.equal(total, expected)
            padded = -(-numel // n) * n
            assert log["world"].wire_bytes in (
                lab.wire_bytes("all_reduce", 4 * size, n) for size in (numel, padded)
            )
            even = numel // n * n
            own = lab.reduce_scatter(every[rank][:even], op=op, deterministic=True)
            assert torch.equal(own, expected[:even].view(n, -1)[rank])

    if check:
        with lab.World(4, device="cpu", check=True) as world:
            world.run(compare)
    else:
        world4.run(compare)

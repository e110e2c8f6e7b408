"""Replicas: equal starts, proof of equality, and averages of what was trained apart."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import labpkg as lab
from labpkg.processes.replicas import (
    _fingerprint,
    average_parameters,
    broadcast_state,
    check_replicas,
    require_device,
)


class Everything(nn.Module):
    """Tensors of many kinds: dtypes, no elements, one, frozen, NaN, integers, bools."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.narrow = nn.Parameter(torch.randn(7).bfloat16())
        self.wide = nn.Parameter(torch.randn((), dtype=torch.float64))
        self.complex = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("count", torch.randint(100, (3,)))
        self.register_buffer("mask", torch.rand(9) > 0.5)
        self.register_buffer("nan", torch.tensor([torch.nan, torch.inf]))


PARAMETERS = ["weight", "narrow", "wide", "complex", "empty", "frozen"]
NAMES = [*PARAMETERS, "mean", "count", "mask", "nan"]


def replica():
    mesh = lab.make_mesh(dp=dist.get_world_size())["dp"]
    torch.manual_seed(dist.get_rank())
    return Everything(), mesh


def tensors_of(model):
    return {n: t.detach() for n, t in model.state_dict().items()}


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def broadcast():
    model, mesh = replica()
    model.weight.data = model.weight.data.t().contiguous().t()  # not contiguous
    with lab.count_comms() as log:
        broadcast_state((*model.parameters(), *model.buffers()), mesh)
    return tensors_of(model), log["dp"].calls, model.weight.is_contiguous()


def test_broadcast_takes_rank_0_and_one_call_per_dtype(world2):
    torch.manual_seed(0)
    want = tensors_of(Everything())
    for found, calls, contiguous in world2.run(broadcast):
        assert calls == 6
        assert not contiguous
        for name in NAMES:
            assert torch.equal(bits(found[name]), bits(want[name])), name


# ---- the proof ---------------------------------------------------------------------


def equal_replicas():
    model, mesh = replica()
    broadcast_state((*model.parameters(), *model.buffers()), mesh)
    before = tensors_of(model)
    check_replicas(model, mesh)
    assert all(torch.equal(bits(before[n]), bits(t)) for n, t in before.items())
    return True


def test_equal_replicas_pass_with_all_kinds_of_tensors(world2):
    assert world2.run(equal_replicas) == [True, True]


def flip_one_bit_of_each():
    messages = {}
    for name in (name for name in NAMES if name != "empty"):
        model, mesh = replica()
        broadcast_state((*model.parameters(), *model.buffers()), mesh)
        if mesh.get_local_rank() == 2:
            bits(model.state_dict()[name])[-1] ^= 1
        with pytest.raises(RuntimeError) as error:
            check_replicas(model, mesh)
        messages[name] = str(error.value)
    return messages


def test_one_flipped_bit_is_named_with_its_rank(world4):
    for messages in world4.run(flip_one_bit_of_each):
        assert len(messages) == len(NAMES) - 1
        for name, message in messages.items():
            assert f"apart: rank 2 in {name} first (1 of 10 tensors" in message


def several_strays():
    model, mesh = replica()
    broadcast_state((*model.parameters(), *model.buffers()), mesh)
    with torch.no_grad():
        if mesh.get_local_rank() == 1:
            model.narrow[0] += 1
            model.mean += 1
        if mesh.get_local_rank() == 3:
            model.weight *= 2
    with pytest.raises(RuntimeError) as everything:
        check_replicas(model, mesh)
    with torch.no_grad():
        model.narrow.zero_()
        model.weight.zero_()
    check_replicas(model, mesh, buffers=False)
    return str(everything.value)


def test_each_stray_rank_is_named_with_its_first_tensor(world4):
    for message in world4.run(several_strays):
        assert "apart: rank 1 in narrow, rank 3 in weight first (3 of 10" in message


def no_majority():
    model, mesh = replica()
    with pytest.raises(RuntimeError, match="rank 0 in weight, rank 1 in weight first"):
        check_replicas(model, mesh)
    shapes = nn.Linear(2 + dist.get_rank(), 1)
    with pytest.raises(RuntimeError, match="rank 0 in weight, rank 1 in weight first"):
        check_replicas(shapes, mesh)
    same_zeros = nn.Module()
    same_zeros.register_buffer("zeros", torch.zeros(1 + dist.get_rank()))
    with pytest.raises(RuntimeError, match="rank 0 in zeros"):
        check_replicas(same_zeros, mesh)
    extra = nn.Module()
    if dist.get_rank():
        extra.register_buffer("more", torch.zeros(1))
    with pytest.raises(RuntimeError, match="rank 1 in more"):
        check_replicas(extra, mesh)
    check_replicas(nn.ReLU(), mesh)
    return True


def test_two_ranks_have_no_majority_and_models_may_differ_in_form(world2):
    assert world2.run(no_majority) == [True, True]


@given(
    numel=st.integers(1, 40),
    place=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]),
)
def test_a_fingerprint_changes_with_every_bit(numel, place, dtype):
    size = numel * dtype.itemsize
    data = torch.arange(size, dtype=torch.uint8)
    before = _fingerprint(data.view(dtype))
    data[place % size] ^= 1 << (place % 8)
    assert _fingerprint(data.view(dtype)) != before


def test_a_fingerprint_sees_places_signs_and_chunks():
    x = torch.randn(2**21 + 3)  # more than one chunk, and half a word
    found = {_fingerprint(x)}
    x[:2] *= -1
    found.add(_fingerprint(x))
    words = x[:-1].view(torch.int64)
    words[[5, 6]] = words[[6, 5]]
    found.add(_fingerprint(x))
    words[[7, 2**19 + 7]] = words[[2**19 + 7, 7]]  # the same place of another chunk
    found.add(_fingerprint(x))
    x[-1] += 1
    found.add(_fingerprint(x))
    assert len(found) == 5
    assert _fingerprint(x) == _fingerprint(x.clone())
    assert _fingerprint(torch.zeros(1)) != _fingerprint(-torch.zeros(1))


def test_changes_of_many_words_never_cancel():
    torch.manual_seed(0)
    prints = set()
    for _ in range(300):  # signs alone: changes of the highest bits
        x = torch.ones(8) * (torch.rand(8) > 0.5).float().mul(2).sub(1)
        prints.add((_fingerprint(x), tuple(x.tolist())))
    assert len({p for p, _ in prints}) == len({x for _, x in prints})


# ---- averages ----------------------------------------------------------------------


def averaged():
    model, mesh = replica()
    with lab.count_comms() as log:
        average_parameters(model, mesh)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    average_parameters(model, mesh)  # a mean of equals is no change
    for name in NAMES:
        assert torch.equal(bits(before[name]), bits(model.state_dict()[name])), name
    return tensors_of(model), {p.requires_grad for p in model.parameters()}, log["dp"]


def test_average_of_parameters_and_buffers(world4):
    models = []
    for rank in range(4):
        torch.manual_seed(rank)
        models.append(tensors_of(Everything()))
    for rank, (found, requires_grad, log) in enumerate(world4.run(averaged)):
        for name in ("weight", "narrow", "wide", "complex", "mean"):
            wide = torch.promote_types(found[name].dtype, torch.float64)
            want = torch.stack([m[name].to(wide) for m in models]).mean(0)
            want = want.to(found[name].dtype)
            assert torch.allclose(found[name], want, rtol=1e-6, atol=1e-6), name
        for name in ("count", "mask", "nan"):
            assert torch.equal(bits(found[name]), bits(models[0][name])), name
        assert torch.equal(found["frozen"], models[rank]["frozen"])
        assert requires_grad == {True, False}
        # float32: weight, mean, nan; bf16 as float32; float64; complex64; int64; bool
        assert log.payload_bytes == 4 * (15 + 4 + 2) + 4 * 7 + 8 + 16 + 24 + 9


def local_sgd(num_local, num_rounds):
    mesh = lab.make_mesh(dp=2)["dp"]
    torch.manual_seed(0)
    model = lab.MLP(4, 5, 2).double()
    opt = lab.SGD(model.parameters(), lr=0.1)
    sent = 0
    for step in range(num_local * num_rounds):
        g = torch.Generator(device="cpu").manual_seed(2 * step + mesh.get_local_rank())
        x = torch.randn(3, 4, generator=g, dtype=torch.float64)
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
        with lab.count_comms() as log:
            if (step + 1) % num_local == 0:
                average_parameters(model, mesh)
                check_replicas(model, mesh)
        sent += log["dp", "all_reduce"].payload_bytes
    return model.state_dict(), sent


def gradients_averaged(num_steps):
    torch.manual_seed(0)
    model = lab.MLP(4, 5, 2).double()
    opt = lab.SGD(model.parameters(), lr=0.1)
    for step in range(num_steps):
        opt.zero_grad()
        for rank in range(2):
            g = torch.Generator().manual_seed(2 * step + rank)
            x = torch.randn(3, 4, generator=g, dtype=torch.float64)
            (model(x).square().mean() / 2).backward()
        opt.step()
    return model.state_dict()


def test_local_sgd_of_one_step_is_data_parallelism_and_of_many_is_not(world2):
    want = gradients_averaged(6)
    size = sum(t.nbytes for t in want.values())
    for num_local, sent, is_same in ((1, 6 * size, True), (3, 2 * size, False)):
        for found, counted in world2.run(local_sgd, num_local, 6 // num_local):
            worst = max(float((found[n] - want[n]).abs().max()) for n in want)
            assert (worst < 1e-12) == is_same
            assert counted == sent


def refused():
    mesh = lab.make_mesh(dp=2)
    with pytest.raises(ValueError, match="takes one, such as"):
        average_parameters(nn.Linear(2, 2), mesh)
    with pytest.raises(ValueError, match="takes one, such as"):
        require_device(nn.Linear(2, 2), mesh)
    with pytest.raises(ValueError, match="takes one, such as"):
        check_replicas(nn.Linear(2, 2), mesh)
    with (
        lab.count_comms() as log,
        pytest.raises(ValueError, match=r"weight lies on meta, but .* one of cpu"),
    ):
        average_parameters(nn.Linear(2, 2, device="meta"), mesh["dp"])
    buffered = nn.BatchNorm1d(3)
    buffered.running_var = buffered.running_var.to("meta")
    assert log["dp"].calls == 0
    with pytest.raises(ValueError, match="running_var lies on meta"):
        require_device(buffered, mesh["dp"])
    cut = lab.fully_shard(nn.Linear(2, 2), mesh["dp"])
    with lab.count_comms() as log:
        for function in (average_parameters, check_replicas):
            with pytest.raises(ValueError, match="no replicas to average or compare"):
                function(cut, mesh["dp"])
    assert log["dp"].calls == 0
    return True


def test_bad_input_is_refused_before_communication(world2):
    assert world2.run(refused) == [True, True]

"""`clip_grad_norm` is torch's norm of the whole gradient, however it is cut."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import labpkg as lab
from labpkg.parallelism.clipping import clip_grad_norm
from labpkg.parallelism.fsdp import fully_shard
from labpkg.parallelism.whole import (
    full_gradients,
    full_state_dict,
    load_full_state_dict,
)
from labpkg.parallelism.zero import ZeroOptimizer
from labpkg.processes.collectives import off
from labpkg.processes.flat import shard_of
from tests.parallelism.layouts import (
    LAYOUTS,
    laid_out,
    optimizer_for,
    whole_chain,
)
from tests.parallelism.shards import cut_in_place, cut_whole

SIZES = (5, 7, 3)
WORLDS = (2, 3, 4)


@pytest.fixture(params=WORLDS)
def world(request):
    if request.param == 3:
        with lab.World(3, device="cpu") as three:
            yield three
    else:
        yield request.getfixturevalue(f"world{request.param}")


def model_with_gradients(dtype=torch.float64, scale=1.0, with_extras=True):
    """Build the same model and gradients everywhere; one parameter has none."""
    generator = torch.Generator("cpu").manual_seed(1)
    torch.manual_seed(1)
    model = lab.MLP(*SIZES).to(dtype)
    if with_extras:
        nothing, ones = torch.zeros(0, 2, dtype=dtype), torch.ones(2, dtype=dtype)
        model.register_parameter("empty", nn.Parameter(nothing))
        model.register_parameter("unused", nn.Parameter(ones))
    for name, p in model.named_parameters():
        if name != "unused":
            random = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = (scale * random).to(dtype)
    return model


def clipped_by_torch(max_norm, dtype=torch.float64, scale=1.0):
    model = model_with_gradients(dtype, scale)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm, {n: p.grad for n, p in model.named_parameters()}


def pieces(model, whole):
    """Return this rank's gradients beside the same pieces of `whole`."""
    pairs = []
    for name, p in model.named_parameters():
        shard = shard_of(p)
        owner, reference = p, whole[name]
        if shard is not None:
            owner = shard.local
            if reference is not None:
                reference = reference.reshape(-1)[shard.start : shard.stop]
        pairs.append((owner.grad, reference))
    return pairs


def cut_by(kind, model, mesh):
    parameters = list(model.parameters())
    if kind == "stage 2":
        cut_whole(parameters, mesh)
    elif kind == "stage 3":
        cut_in_place(model, mesh)
    elif kind == "mixed":
        cut_whole(parameters[1:3], mesh)


def clipped(kind, max_norm, dtype=torch.float64, scale=1.0):
    mesh = lab.make_mesh(dp=torch.distributed.get_world_size())["dp"]
    model = model_with_gradients(dtype, scale)
    cut_by(kind, model, mesh)
    with lab.count_comms() as log:
        norm = clip_grad_norm(model, max_norm)
    _, whole = clipped_by_torch(max_norm, dtype, scale)
    return norm, pieces(model, whole), log["dp"].calls, log["dp"].payload_bytes


KINDS = ("replicated", "mixed", "stage 2", "stage 3")


def clipped_each_way():
    return {(kind, m): clipped(kind, m) for kind in KINDS for m in (0.5, 1e3)}


def test_norm_and_gradients_are_those_of_one_process(world):
    for results in world.run(clipped_each_way):
        for (kind, max_norm), (norm, pairs, calls, payload) in results.items():
            expected, _ = clipped_by_torch(max_norm)
            torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
            for gradient, reference in pairs:
                torch.testing.assert_close(gradient, reference, rtol=1e-13, atol=0)
            is_cut = kind != "replicated"
            assert (calls, payload) == (is_cut, 8 * is_cut)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_are_taken_in_float32_at_least(world2, dtype):
    model = model_with_gradients(dtype, 100.0)  # squares overflow float16
    gradients = [p.grad.double() for p in model.parameters() if p.grad is not None]
    exact = torch.cat([g.flatten() for g in gradients]).norm()
    for norm, pairs, _, _ in world2.run(clipped, "stage 3", 1.0, dtype, 100.0):
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
        assert all(a is b is None or a.dtype == b.dtype == dtype for a, b in pairs)


def with_one_bad_element(bad):
    mesh = lab.make_mesh(dp=2)["dp"]
    model = model_with_gradients()
    cut_in_place(model, mesh)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if mesh.get_local_rank() == 0:
        max(gradients, key=len)[0] = bad
    return clip_grad_norm(model, 1.0).item()


def test_a_norm_that_is_not_finite_is_seen_by_every_rank(world2):
    assert world2.run(with_one_bad_element, -math.inf) == [math.inf] * 2
    assert all(math.isnan(norm) for norm in world2.run(with_one_bad_element, math.nan))


def one_rank_has_no_gradient():
    mesh = lab.make_mesh(dp=2)["dp"]
    model = model_with_gradients()
    cut_in_place(model, mesh)
    if mesh.get_local_rank() == 1:
        for p in model.parameters():
            p.grad = None
    squares = sum(
        p.grad.square().sum() for p in model.parameters() if p.grad is not None
    )
    return float(squares) ** 0.5, clip_grad_norm(model, math.inf).item()


def test_a_rank_without_gradients_takes_part(world2):
    (own, norm), (nothing, other) = world2.run(one_rank_has_no_gradient)
    assert nothing == 0
    assert norm == other == pytest.approx(own, rel=1e-14)


def training_data(num_ranks, rank):
    generator = torch.Generator("cpu").manual_seed(3)
    x = torch.randn(24, 5, dtype=torch.float64, generator=generator)
    return x.tensor_split(num_ranks)[rank]


def train(model, optimizer, x, clip):
    norms = []
    for _ in range(3):
        model(x).square().mean().backward()
        norms.append(clip())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def trained_under(engine):
    torch.manual_seed(torch.distributed.get_rank())
    mesh = lab.make_mesh(dp=torch.distributed.get_world_size())["dp"]
    model = lab.MLP(*SIZES).double()
    load_full_state_dict(model, model_with_gradients(with_extras=False).state_dict())
    if engine == "DataParallel":
        model = lab.DataParallel(model, mesh)
    elif engine == "stage 3":
        model = fully_shard(model, mesh)
    optimizer = lab.SGD(model.parameters(), lr=0.5)
    if engine in ("stage 1", "stage 2"):
        stage = int(engine[-1])
        optimizer = ZeroOptimizer(
            model.parameters(), lab.SGD, mesh, stage=stage, bucket_bytes=64, lr=0.5
        )
    x = training_data(mesh.size(), mesh.get_local_rank())
    norms = train(model, optimizer, x, lambda: clip_grad_norm(model, 0.01))
    return norms, dict(full_state_dict(model))


@pytest.mark.parametrize("engine", ["DataParallel", "stage 1", "stage 2", "stage 3"])
def test_training_with_clipping_is_that_of_one_process(world4, engine):
    model = model_with_gradients(with_extras=False)
    model.zero_grad()
    optimizer = lab.SGD(model.parameters(), lr=0.5)
    clip = partial(torch.nn.utils.clip_grad_norm_, [*model.parameters()], 0.01)
    norms = train(model, optimizer, training_data(1, 0), clip)
    assert min(norms) > 0.01  # all steps are clipped
    for result in world4.run(trained_under, engine):
        torch.testing.assert_close(
            result, (norms, dict(model.state_dict())), rtol=1e-12, atol=1e-14
        )


def clipped_layouts(max_norm):
    """Return, by layout, the norm, the clipped gradients, and calls and bytes."""
    found = {}
    for layout, sizes in LAYOUTS.items():
        model, mesh = laid_out(layout, sizes, seed=0)
        engine = optimizer_for(layout, model, mesh, lab.SGD, lr=0.1)  # it may reduce
        loss = model(0)
        if loss.requires_grad:
            loss.backward()
        with lab.count_comms() as log:
            norm = clip_grad_norm(model, max_norm)
        traffic = [(log[a].calls, log[a].payload_bytes) for a in ("dp", "tp", "pp")]
        again = clip_grad_norm(engine.param_groups[0]["params"], math.inf)
        found[layout] = norm, full_gradients(model), traffic, again
    return found


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_cuts_stages_and_slices_count_each_element_once(world4, max_norm):
    model = whole_chain()
    model(0).backward()
    matrices = [p for p in model.parameters() if p.grad is not None and p.ndim > 1]
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    of_matrices = torch.nn.utils.get_total_norm([p.grad for p in matrices])
    for rank, found in enumerate(world4.run(clipped_layouts, max_norm)):
        has_cuts = rank >= 2  # the first of two stages has none
        for norm, gradients, _, again in found.values():
            torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
            torch.testing.assert_close(again, of_matrices, rtol=1e-13, atol=0)
            for name, p in model.named_parameters():
                torch.testing.assert_close(gradients[name], p.grad, rtol=1e-13, atol=0)
        assert {layout: traffic for layout, (*_, traffic, _) in found.items()} == {
            "tp": [(0, 0), (1, 8), (0, 0)],
            "pp": [(0, 0), (0, 0), (1, 8)],
            "pp tp": [(0, 0), (has_cuts, 8 * has_cuts), (1, 8)],
            "tp stage 1": [(1, 16), (1, 8), (0, 0)],  # slices of cuts, and of the rest
            "tp stage 2": [(1, 16), (1, 8), (0, 0)],
            "tp stage 3": [(1, 16), (1, 8), (0, 0)],
            "pp stage 2": [(1, 8), (0, 0), (1, 8)],
            "pp stage 3": [(1, 8), (0, 0), (1, 8)],
        }


def without_communication():
    with off():
        return clipped("stage 3", 0.5)[0]


def test_it_does_not_work_without_communication(world2):
    expected, _ = clipped_by_torch(0.5)
    for norm in world2.run(without_communication):
        assert abs(norm - expected) > 1e-2 * expected


@pytest.mark.parametrize("max_norm", [0.5, 1e3, math.inf])
def test_one_process_needs_no_mesh(max_norm):
    expected, gradients = clipped_by_torch(max_norm)
    model = model_with_gradients()
    norm = clip_grad_norm(model, max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-14, atol=0)


def test_what_it_takes():
    model = model_with_gradients()
    norm = clip_grad_norm(model, math.inf)
    assert torch.equal(clip_grad_norm(iter(model.parameters()), math.inf), norm)
    last = [*model.parameters()][-1]
    assert last.grad is not None
    torch.testing.assert_close(clip_grad_norm(last, math.inf), last.grad.norm())
    complex_one = nn.Parameter(torch.zeros(2, dtype=torch.complex128))
    complex_one.grad = torch.tensor([3j, 4], dtype=torch.complex128)
    assert clip_grad_norm(complex_one, 1.0).item() == 5
    unused = nn.Parameter(torch.zeros(2))
    assert clip_grad_norm(unused, 1.0).item() == 0


@pytest.mark.parametrize("max_norm", [0, -1.0, math.nan])
def test_bad_norms_raise(max_norm):
    with pytest.raises(ValueError, match=r"max_norm=.* must be above 0"):
        clip_grad_norm(model_with_gradients(), max_norm)


def test_no_parameters_raise():
    with pytest.raises(ValueError, match="there are no parameters"):
        clip_grad_norm(nn.ReLU(), 1.0)
    parameters = lab.MLP(2, 2).parameters()
    list(parameters)
    with pytest.raises(ValueError, match="an iterator can be read only once"):
        clip_grad_norm(parameters, 1.0)

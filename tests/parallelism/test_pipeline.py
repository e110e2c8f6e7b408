"""`Pipeline` beyond the laws of every engine, which are in test_laws.py."""

import copy
import gc
import re
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import labpkg as lab
from labpkg.parallelism import pipeline
from labpkg.parallelism.pipeline import Pipeline
from labpkg.parallelism.zero import ZeroOptimizer
from labpkg.planning.actions import Schedule
from labpkg.planning.cost import data_parallel_bytes
from labpkg.planning.model_parallel import pipeline_bytes
from labpkg.planning.schedules import gpipe, interleaved, one_f_one_b, zero_bubble
from labpkg.processes.cuts import place_of
from labpkg.processes.mail import OrderedMailbox
from labpkg.processes.messages import all_gather_object
from labpkg.processes.stages import split_stages
from labpkg.processes.traffic import off

TOLERANCE = 1e-12
M = 6
SCHEDULES = {
    "gpipe": lambda n: gpipe(n, M),
    "1f1b": lambda n: one_f_one_b(n, M),
    "interleaved": lambda n: interleaved(n, M, num_virtual_stages=2),
    "h1": lambda n: zero_bubble(n, M, variant="h1"),
    "v": lambda n: zero_bubble(n, M, variant="v"),
}


def mean_squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def start(seed: int = 0) -> tuple:
    """Return rank and axis on ranks whose random numbers differ."""
    torch.set_default_dtype(torch.float64)
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(100 * seed + rank)
    return rank, lab.make_mesh(pp=n)["pp"]


def make(model: nn.Module, schedule: Schedule, mesh, **options) -> Pipeline:
    stages = split_stages(model, schedule.num_stages)
    own = [stages[s] for s in schedule.stages_of(mesh.get_local_rank())]
    return Pipeline(own, schedule, mesh, **({"loss_fn": mean_squared} | options))


def assembled(model: nn.Module, pipe: Pipeline) -> nn.Module:
    """Return one process's model with the weights of all stages."""
    reference, state = copy.deepcopy(model), {}
    for part in all_gather_object(pipe.state_dict(), pipe.mesh):
        state |= part
    reference.load_state_dict(state)  # strict: the names are those of the model
    reference.zero_grad()
    return reference


def deviation(pipe: Pipeline, reference: nn.Module) -> float:
    """Return how far gradients are from those of one process; None must be None."""
    wanted = dict(reference.named_parameters(remove_duplicate=False))
    worst = 0.0
    for name, parameter in pipe.named_parameters():
        gradient, want = parameter.grad, wanted[name].grad
        assert (gradient is None) == (want is None), name
        if gradient is not None and want is not None:
            worst = max(worst, (gradient - want).abs().max().item())
    return worst


def tower(num_layers: int = 8) -> nn.Sequential:
    layers = [(nn.Linear(6, 6), nn.Tanh()) for _ in range(num_layers)]
    return nn.Sequential(*(module for pair in layers for module in pair))


def gpt() -> lab.GPT:
    sizes = {"width": 8, "num_heads": 2, "vocab_size": 11, "sequence_length": 5}
    return lab.GPT(lab.GPTConfig(num_layers=6, **sizes))


def batch(rows: int = 2 * M) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x, y = (torch.randn(rows, 6, generator=generator) for _ in range(2))
    return x, y


def tokens() -> tuple[Tensor, Tensor]:
    x = torch.randint(11, (2 * M, 5), generator=torch.Generator().manual_seed(7))
    return x, x.roll(1, 1)


# ---- equal to one process ----------------------------------------------------------


def train_gpt(name: str) -> dict:
    """Take two steps without zero_grad between them; the first and last unit share."""
    _, mesh = start()
    schedule, model = SCHEDULES[name](mesh.size()), gpt()
    pipe = make(model, schedule, mesh, loss_fn=lab.cross_entropy)
    reference, (x, y) = assembled(model, pipe), tokens()
    for _ in range(2):
        loss = pipe.step(x, y)
        want = lab.cross_entropy(reference(x), y)
        want.backward()
    copies = [p for p in pipe.parameters() if p.shape == (11, 8)]
    found = {
        "gradients": deviation(pipe, reference),
        "loss": (loss - want).abs().item(),
        "evaluate": (pipe.evaluate(x, y) - want).abs().item(),
        "output": (pipe(x) - reference(x)).abs().max().item(),
        "copies": [(p.detach(), p.grad) for p in copies],
        "counts": sum(place.counts for p in copies if (place := place_of(p))),
    }
    pipe.zero_grad()
    with off():
        found["loss in silence"] = (pipe.step(x, y) - want).abs().item()
    found["gradients in silence"] = deviation(pipe, reference)
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_tied_weights_two_steps_and_ranks_of_different_seeds(world4, name):
    ranks = world4.run(train_gpt, name)
    for found in ranks:
        for key in ("gradients", "loss", "evaluate", "output"):
            assert found[key] <= TOLERANCE, key
    copies = [pair for found in ranks for pair in found["copies"]]
    assert len(copies) == (1 if name == "v" else 2)  # one object where both are
    for weight, gradient in copies:
        assert torch.equal(weight, copies[0][0])
        assert torch.equal(gradient, copies[0][1])
    assert sum(found["counts"] for found in ranks) == 1
    for key in ("loss in silence", "gradients in silence"):
        assert max(found[key] for found in ranks) > 1000 * TOLERANCE


class Shared(nn.Module):
    """One unit at four places, and weights that some ranks do not use."""

    def __init__(self):
        super().__init__()
        self.unit = nn.Linear(6, 6)
        self.others = nn.ModuleList(Unused() for _ in range(4))

    def pipeline_units(self):
        return [unit for other in self.others for unit in (self.unit, other)]

    def forward(self, x):
        for unit in self.pipeline_units():
            x = unit(x)
        return x


class Quiet(nn.Module):
    """Uses a layer, but does not train it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x + self.layer(x).detach()


def used_once() -> nn.Module:
    """The last stage has a copy that only the first one gives a gradient."""
    first = nn.Linear(6, 6)
    return nn.Sequential(first, *tower(4), Quiet(first))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)

    def forward(self, x):
        return self.used(x).tanh()


def train(
    build, name: str, *, num_steps: int = 1, recompute: bool = False
) -> tuple[float, float]:
    _, mesh = start()
    schedule, model = SCHEDULES[name](mesh.size()), build()
    pipe = make(model, schedule, mesh, recompute=recompute)
    reference, (x, y) = assembled(model, pipe), batch()
    for _ in range(num_steps):
        x = -2 * x
        loss = pipe.step(x, y)
        want = mean_squared(reference(x), y)
        want.backward()
    return deviation(pipe, reference), (loss - want).abs().item()


def frozen_start() -> nn.Module:
    model = tower()
    model[:9].requires_grad_(False)
    return model


def in_place() -> nn.Module:
    """Every stage begins with an operation in place."""
    pairs = [(nn.ELU(inplace=True), nn.Linear(6, 6, bias=False)) for _ in range(8)]
    first = nn.Linear(6, 6), nn.Linear(6, 6)
    return nn.Sequential(*first, *(module for pair in pairs for module in pair))


def without_parameters() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), *(nn.Tanh() for _ in range(8)))


def convolution() -> nn.Module:
    body = [nn.Conv1d(2, 2, 3, padding=1) for _ in range(6)]
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)), *body, nn.Tanh(), nn.Flatten(), nn.Linear(6, 6)
    )


def all_models(name: str) -> dict:
    models = [Shared, frozen_start, without_parameters, convolution, in_place]
    models += [checkpointed, used_once]
    found = {build.__name__: train(build, name, num_steps=2) for build in models}
    for build in (tower, Shared, checkpointed):
        found[f"{build.__name__} again"] = train(build, name, recompute=True)
    return found


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "h1", "v"])
def test_models_that_nobody_tuned(world2, name):
    for found in world2.run(all_models, name):
        for key, pair in found.items():
            assert max(pair) <= TOLERANCE, (key, pair)


class Checkpointed(nn.Module):
    """Recomputes itself in backward, and maps a layer over rows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        inner = lambda x: torch.vmap(self.second)(self.first(x).tanh())
        return checkpoint(inner, x, use_reentrant=False)


def checkpointed() -> nn.Module:
    return nn.Sequential(*(Checkpointed() for _ in range(4)))


BY_HAND = """
0F1 0F0 0F2 0I1 0W1 0B2 0B0 0F3 0F5 0F4 0B5 0B4 0B3
1F1 1B1 1F2 1F0 1B0 1B2 1F3 1F5 1B5 1F4 1I4 1B3 1W4
"""


def by_hand() -> dict:
    """Forwards out of order, and both kinds of backward on a stage."""
    _, mesh = start()
    SCHEDULES["by hand"] = lambda n: Schedule.parse(BY_HAND)
    model = tower()
    pipe = make(model, SCHEDULES["by hand"](2), mesh)
    reference, (x, _) = assembled(model, pipe), batch()
    output = (pipe(x) - reference(x)).abs().max().item()
    found = {build.__name__: train(build, "by hand") for build in (tower, Shared)}
    return found | {"output": (output,)}


def test_a_schedule_made_by_hand(world2):
    for found in world2.run(by_hand):
        for key, pair in found.items():
            assert max(pair) <= TOLERANCE, (key, pair)


class Deaf(nn.Linear):
    def forward(self, input):
        return super().forward(input.detach())


def without_a_way_back() -> list[Tensor | None]:
    _, mesh = start()
    model, schedule = nn.Sequential(nn.Linear(6, 6), Deaf(6, 6)), one_f_one_b(2, M)
    pipe = make(model, schedule, mesh)
    pipe.step(*batch())
    return [p.grad for p in pipe.parameters()]


def test_a_stage_that_does_not_use_its_input_returns_zeros(world2):
    first, second = world2.run(without_a_way_back)
    assert not any(gradient.any() for gradient in first)
    assert all(gradient.all() for gradient in second)


def first_unit_in_place() -> tuple[Tensor, Tensor]:
    _, mesh = start()
    model = nn.Sequential(nn.ELU(inplace=True), nn.Linear(6, 6))
    pipe, (x, y) = make(model, one_f_one_b(2, M), mesh), batch()
    pipe.step(x, y)
    return x, batch()[0]


def test_the_trial_for_shapes_leaves_the_batch_as_it_is(world2):
    (once, before), (untouched, _) = world2.run(first_unit_in_place)
    assert torch.equal(once, nn.functional.elu(before))  # by the step, on stage 0
    assert torch.equal(untouched, before)


def one_rank() -> dict:
    return {name: train(tower, name) for name in SCHEDULES}


def test_one_rank_runs_the_same_lines():
    with lab.World(1, device="cpu") as world:
        for pair in world.run(one_rank)[0].values():
            assert max(pair) <= TOLERANCE


def plain_modules() -> dict:
    """Stages of another origin: their names clash, so they get a prefix."""
    _, mesh = start()
    schedule = interleaved(2, M, num_virtual_stages=2)
    stages = [nn.Linear(6, 6), nn.Linear(6, 6)]
    pipe = Pipeline(stages, schedule, mesh, loss_fn=mean_squared)
    state, (x, y) = {}, batch()
    for part in all_gather_object(pipe.state_dict(), mesh):
        state |= part
    reference = nn.ModuleDict(
        {"stages": nn.ModuleList(nn.Linear(6, 6) for _ in "1234")}
    )
    reference.load_state_dict(state)
    out = x
    for layer in reference["stages"]:
        out = layer(out)
    mean_squared(out, y).backward()
    pipe.step(x, y)
    found = deviation(pipe, reference)
    own = {name: torch.zeros_like(value) for name, value in pipe.state_dict().items()}
    pipe.load_state_dict(own)
    assert all(not p.any() for p in pipe.parameters())
    with pytest.raises(RuntimeError, match="no stage of this rank has"):
        pipe.load_state_dict(state)
    return {"deviation": found, "names": sorted(pipe.state_dict())}


def test_stages_of_another_origin(world2):
    ranks = world2.run(plain_modules)
    for rank, found in enumerate(ranks):
        assert found["deviation"] <= TOLERANCE
        names = [
            f"stages.{s}.{n}" for s in (rank, rank + 2) for n in ("bias", "weight")
        ]
        assert found["names"] == names


class Versioned(nn.Linear):
    """A layer that has changed, and is told which version it loads."""

    _version = 3
    loaded = None

    def _load_from_state_dict(self, *args):  # pyright: ignore
        self.loaded = args[2].get("version")
        super()._load_from_state_dict(*args)


def versions():
    """What layers are told when they load what was saved."""
    _, mesh = start()
    schedule = interleaved(2, M, num_virtual_stages=2)
    model = nn.Sequential(*(Versioned(6, 6) for _ in "1234"))
    cut = make(model, schedule, mesh)
    whole = lab.full_state_dict(cut)
    other = Pipeline([Versioned(6, 6) for _ in "12"], schedule, mesh, loss_fn=nn.L1Loss)
    metadata = [dict(vars(s)["_metadata"]) for s in (whole, model.state_dict())]
    told = [metadata[0] == metadata[1]]
    for pipe in (cut, other):
        layers = [layer for layer in pipe.modules() if isinstance(layer, Versioned)]
        pipe.load_state_dict(pipe.state_dict())
        told += [layer.loaded for layer in layers]
        pipe.load_state_dict(dict(pipe.state_dict()))  # nothing tells it any more
        told += [layer.loaded for layer in layers]
    lab.load_full_state_dict(cut, whole)
    return told + [layer.loaded for layer in cut.modules() if hasattr(layer, "loaded")]


def test_layers_learn_which_version_they_load(world2):
    want = [True, *[3, 3, None, None] * 2, 3, 3]
    assert world2.run(versions) == [want] * 2


# ---- what is sent ------------------------------------------------------------------


def sent_bytes(name: str) -> dict:
    rank, mesh = start()
    schedule = SCHEDULES[name](mesh.size())
    x, y = batch()
    found = {}
    for build in (tower, frozen_start):
        pipe = make(build(), schedule, mesh)
        pipe.step(x, y)  # agrees on shapes
        with lab.count_comms() as log:
            pipe.step(x, y)
        found[build.__name__] = log["pp", "send"].payload_bytes
        with lab.count_comms() as log:
            pipe.evaluate(x, y)
        found[f"{build.__name__} forward"] = log["pp", "send"].payload_bytes
        # Whether all ranks make the same call, but not shapes, which are known.
        assert log["pp", "all_gather"].calls == 1
        assert log["pp", "all_gather"].payload_bytes == 8 * mesh.size()
    formula = pipeline_bytes(schedule, rank, activation_bytes=2 * 6 * 8)
    return {"found": found, "formula": formula}


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "v"])
def test_bytes_equal_the_formula(world4, name):
    ranks = world4.run(sent_bytes, name)
    found, formula = [r["found"] for r in ranks], [r["formula"] for r in ranks]
    assert [f["tower"] for f in found] == formula
    # Nothing is sent back to stages that have nothing to train.
    totals = {key: sum(f[key] for f in found) for key in found[0]}
    assert totals["tower forward"] == sum(formula) / 2
    assert totals["frozen_start forward"] < totals["frozen_start"] < sum(formula)


def with_data_parallel(name: str) -> dict:
    """Two pipelines side by side; each stage reduces once per step."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(dist.get_rank())
    mesh = lab.make_mesh(pp=2, dp=2)
    schedule, dp = SCHEDULES[name](2), mesh["dp"].get_local_rank()
    found = {}
    for build in (tower, convolution, Shared):
        model = build()
        stages = split_stages(model, schedule.num_stages)
        own = [stages[s] for s in schedule.stages_of(mesh["pp"].get_local_rank())]
        if build is Shared:  # stages of one rank share a parameter
            own = lab.DataParallel(nn.ModuleList(own), mesh["dp"])
        else:
            own = [lab.DataParallel(stage, mesh["dp"]) for stage in own]
        pipe = Pipeline(own, schedule, mesh["pp"], loss_fn=mean_squared)
        reference, (x, y) = assembled(model, pipe), batch(4 * M)
        for _ in range(2):
            x = -2 * x  # a gradient that is there already is another one
            with lab.count_comms() as log:
                pipe.step(x.chunk(2)[dp], y.chunk(2)[dp])
            mean_squared(reference(x), y).backward()
        calls = log["dp", "all_reduce"]
        engines = own if isinstance(own, list) else [own]
        wanted = sum(data_parallel_bytes(engine) for engine in engines)
        assert calls.payload_bytes == wanted, build
        found[build.__name__] = deviation(pipe, reference)
    return found


@pytest.mark.parametrize("name", ["1f1b", "h1", "v"])
def test_data_parallel_stages_reduce_once(world4, name):
    for found in world4.run(with_data_parallel, name):
        assert max(found.values()) <= TOLERANCE, found


def in_order(name: str) -> tuple[float, float]:
    """Move messages as for NCCL: no tags, in batches, one per tick."""
    pipeline.uses_gloo = lambda group, device: False  # in this process only
    kinds = set()
    close = OrderedMailbox.close
    OrderedMailbox.close = lambda self: (kinds.add(type(self)), close(self))[1]
    found = train(tower, name, num_steps=2)
    assert kinds == {OrderedMailbox}
    return found


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "v"])
def test_batches_of_ticks(world4, name):
    for pair in world4.run(in_order, name):
        assert max(pair) <= TOLERANCE


# ---- memory, time, random numbers --------------------------------------------------


class Kept(torch.autograd.Function):
    """Count the graphs that are alive."""

    @staticmethod
    def forward(ctx, x, alive):
        ctx.token = Token()
        alive.add(ctx.token)
        return x * 2

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0] * 2, None


class Token:
    pass


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.alive, self.peak = weakref.WeakSet(), 0

    def forward(self, x):
        y = Kept.apply(x * self.weight, self.alive)
        self.peak = max(self.peak, len(self.alive))
        return y


def count_alive() -> dict:
    gc.disable()  # what a cycle keeps does not count as freed
    rank, mesh = start()
    found = {}
    for name in ("gpipe", "1f1b"):
        for recompute in (False, True):
            layers = [Counting() for _ in range(mesh.size())]
            schedule = SCHEDULES[name](mesh.size())
            pipe = Pipeline(
                layers[rank], schedule, mesh, loss_fn=mean_squared, recompute=recompute
            )
            pipe.step(*batch())
            counter = layers[rank]
            found[name, recompute] = counter.peak, len(counter.alive)
    gc.enable()
    return found


def test_activations_live_as_long_as_the_schedule_says(world4):
    ranks = world4.run(count_alive)
    for name in ("gpipe", "1f1b"):
        peaks = SCHEDULES[name](4).peak_in_flight
        assert [found[name, False] for found in ranks] == [(peak, 0) for peak in peaks]
        assert [found[name, True] for found in ranks] == [(1, 0)] * 4


def random_numbers() -> dict:
    """Dropout and running statistics, with and without running forward twice."""
    rank, mesh = start()
    found = {}
    for recompute in (False, True):
        torch.manual_seed(rank)
        model = nn.Sequential(
            nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 6)
        )
        schedule = gpipe(2, M)
        pipe = make(model, schedule, mesh, recompute=recompute)
        torch.manual_seed(rank)
        pipe.step(*batch())
        norms = [m for m in pipe.modules() if isinstance(m, nn.BatchNorm1d)]
        found[recompute] = (
            [p.grad for p in pipe.parameters()],
            [int(norm.num_batches_tracked) for norm in norms],
            torch.rand(3),
        )
    return found


def test_recomputation_repeats_random_numbers(world2):
    ranks = world2.run(random_numbers)
    for found in ranks:
        for once, again in zip(found[False][0], found[True][0], strict=True):
            assert torch.equal(once, again)
        assert torch.equal(found[False][2], found[True][2])
    # The trial for shapes leaves nothing behind; the last stage runs F once more.
    assert [n for found in ranks for n in found[False][1]] == [M]


class Sleep(nn.Module):
    """Work that other processes on this machine cannot take time from."""

    def forward(self, x):
        time.sleep(0.01)
        return x


def measure() -> tuple:
    _, mesh = start()
    stage = nn.Sequential(Sleep(), nn.Linear(6, 6))
    schedule = one_f_one_b(mesh.size(), M)
    pipe = Pipeline(stage, schedule, mesh, loss_fn=mean_squared, record=True)
    with pytest.raises(ValueError, match="no step has been measured"):
        _ = pipe.timeline
    pipe.step(*batch())
    return schedule, pipe.timeline


def test_timeline(world2):
    ranks = world2.run(measure)
    schedule, timeline = ranks[0]
    assert timeline == ranks[1][1]
    actions = tuple(tuple(span.action for span in own) for own in timeline.spans)
    assert actions == schedule.ranks
    ends = {span.action: span.end_s for own in timeline.spans for span in own}
    for own in timeline.spans:
        for action, start_s, end_s in own:
            if action.kind == "F":
                assert end_s - start_s >= 0.01
            before = action.stage + (-1 if action.kind == "F" else 1)
            if action._replace(stage=before) in ends:
                assert ends[action._replace(stage=before)] <= start_s
    assert timeline.makespan_s >= 0.01 * (M + 1)


class Precise(nn.Linear):
    """Stays out of autocast, forward and so backward."""

    def forward(self, input):
        with torch.autocast("cpu", enabled=False):
            return super().forward(input)


def precise() -> nn.Module:
    return nn.Sequential(*(Precise(6, 6) for _ in range(4)))


def half_precision(build) -> list:
    """Casts of weights that run without gradients must not be kept."""
    _, mesh = start()
    torch.set_default_dtype(torch.float32)
    found = []
    for name in ("gpipe", "h1"):
        for recompute in (False, True):
            schedule, model = SCHEDULES[name](mesh.size()), build()
            pipe = make(model, schedule, mesh, recompute=recompute)
            reference, (x, y) = assembled(model, pipe), batch()
            x, y = x.float(), y.float()
            with torch.autocast("cpu", torch.bfloat16):
                pipe.step(x, y)
                loss = mean_squared(reference(x), y)
            loss.backward()
            for p in pipe.parameters():
                assert p.grad is not None
                assert p.grad.dtype == torch.float32
            found.append(deviation(pipe, reference))
            want = mean_squared(reference(x), y)
            found.append((pipe.step(x, y) - want).abs().item())  # other dtypes travel
    return found


@pytest.mark.parametrize(("build", "tolerance"), [(tower, 2e-3), (precise, 1e-6)])
def test_autocast(world2, build, tolerance):
    for found in world2.run(half_precision, build):
        assert max(found) <= tolerance


# ---- errors ------------------------------------------------------------------------


class Wrong(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what, self.weight = what, nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.what(x * self.weight)


def errors() -> tuple[float, float]:
    rank, mesh = start()
    n = mesh.size()
    schedule = one_f_one_b(n, M)
    x, y = batch()

    def build(schedule=schedule, model=None, **options):
        return make(model or tower(), schedule, mesh, **options)

    def stage(schedule=schedule, module=None, loss_fn=mean_squared):
        module = module or nn.Linear(6, 6)
        return Pipeline(module, schedule, mesh, loss_fn=loss_fn)

    def break_tie():
        twin = gpt()
        stages, others = split_stages(twin, 4), split_stages(copy.deepcopy(twin), 4)
        v = zero_bubble(2, M, variant="v")
        own = [(stages if s < 2 else others)[s] for s in v.stages_of(rank)]
        return Pipeline(own, v, mesh, loss_fn=lab.cross_entropy)

    def cut_tie():
        pipe = make(gpt(), schedule, mesh, loss_fn=lab.cross_entropy)
        dp = lab.make_mesh(pp=n)["dp"]
        optimizer = ZeroOptimizer(pipe.parameters(), lab.SGD, dp, stage=1, lr=0.1)
        return pipe.step(*tokens()), optimizer

    def returns(what, at=1):
        return stage(module=Wrong(what if rank == at else lambda x: x)).step(x, y)

    def differ():
        return stage(one_f_one_b(n, M + rank))

    unfit = nn.Linear(6 + rank, 6)
    cases = {
        "schedule is one for 3 ranks": lambda: build(one_f_one_b(3, M)),
        "has another schedule than rank 0": differ,
        "2 modules for the stages": lambda: stage(module=nn.ModuleList([unfit, unfit])),
        "rank 1 of the pipeline: 2 modules": lambda: stage(
            module=nn.ModuleList([nn.Linear(6, 6) for _ in range(1 + rank)])
        ),
        "lies on meta": lambda: stage(
            module=nn.Linear(6, 6, device="meta" if rank else "cpu")
        ),
        "pass stage s of one split_stages": lambda: build(model=tower(8 + rank)),
        "two tensors on this rank": break_tie,
        "differ in shape, dtype or requires_grad": lambda: build(
            model=gpt().requires_grad_(rank == 0)
        ),
        "makes sparse gradients": lambda: stage(
            module=nn.Sequential(nn.Embedding(3, 6, sparse=rank == 1))
        ),
        "ZeRO cuts its gradient before": cut_tie,
        "not divisible into 6": lambda: build().step(x[1:], y[1:]),
        "y of shape .* is not divisible": lambda: build().step(x, y[:-1]),
        "y has 6 rows on cpu, x has 12": lambda: build().step(x, y[:6]),
        "stage 1 does not take .2, 6. float64, which stage 0 returns": lambda: stage(
            module=unfit
        ).step(x, y),
        "stage 0 does not take .2, 5.": lambda: build().step(x[:, :5], y),
        "stage 1 returns tuple": lambda: returns(lambda x: (x, x)),
        "loss_fn does not take .2, 3.": lambda: returns(lambda x: x[:, :3]),
        "stage 0 does not take .*RuntimeError: refused": lambda: returns(refuse, at=0),
        "loss_fn returns float": lambda: stage(loss_fn=lambda x, y: 1.0).step(x, y),
        "loss_fn returns .2, 6. float64": lambda: stage(
            loss_fn=lambda x, y: x - y
        ).step(x, y),
        "the last stage returns .. float64": lambda: returns_sum(x),
        "a step needs gradients": lambda: torch.no_grad()(stage().step)(x, y),
    }

    def returns_sum(x):
        return stage(module=Wrong(torch.sum if rank else lambda x: x))(x)

    for pattern, case in cases.items():
        with pytest.raises(ValueError) as error:
            case()
        assert re.search(pattern, str(error.value)), (pattern, error.value)
    two = lab.make_mesh(pp=2)
    with pytest.raises(ValueError, match="has 4 axes"):
        Pipeline(nn.Linear(6, 6), schedule, two, loss_fn=mean_squared)
    return train(tower, "1f1b")  # and all ranks still agree


def other_calls() -> tuple[float, float]:
    """Ranks that make different calls, with shapes that are known and that are not."""
    rank, mesh = start()
    schedule = one_f_one_b(2, M)
    x, y = batch()
    pipe = make(gpt(), schedule, mesh, loss_fn=lab.cross_entropy)
    pipe.evaluate(*tokens())
    axis = lab.make_mesh(pp=2)["dp"]
    options = {"stage": 1, "lr": 0.1}
    optimizer = ZeroOptimizer(pipe.parameters(), lab.SGD, axis, **options)
    with pytest.raises(ValueError, match="ZeRO cuts its gradient before"):
        pipe.step(*tokens())
    del optimizer
    model = frozen_start()
    pipe = make(model, schedule, mesh)
    for rows in (M, 2 * M):
        pipe.step(x[:rows], y[:rows])

    def step(**options):
        kept = {name: getattr(pipe, name) for name in options}
        for name, value in options.items():
            setattr(pipe, name, value)
        try:
            return pipe.step(x, y)
        finally:
            for name, value in kept.items():
                setattr(pipe, name, value)

    def sample(rows):
        return torch.ones(rows, 6), torch.ones(rows, 6)

    before = [p.grad for p in pipe.parameters()]
    before = [None if g is None else g.clone() for g in before]
    cases = {
        r"rank 1 .*\(12, 6\).*, but rank 0 .*\(6, 6\)": lambda: pipe.step(
            *sample(M + M * rank)
        ),
        r"rank 1 .*\(24, 6\).*, but rank 0 .*\(12, 6\)": lambda: pipe.step(
            *sample(2 * M + 2 * M * rank)
        ),
        "rank 1 .*float32.*, but rank 0 .*float64": lambda: pipe.evaluate(
            x.float() if rank else x, y
        ),
        "rank 1 of the pipeline: x of shape .11, 6. is not": lambda: pipe.step(
            x[rank:], y[rank:]
        ),
        "rank 1 .*y=None": lambda: pipe(x) if rank else pipe.evaluate(x, y),
        "rank 1 .*backward=False": lambda: (pipe.evaluate if rank else pipe.step)(x, y),
        "rank 1 .*record=True": lambda: step(record=rank == 1),
        "rank 1 .*training=False": lambda: step(training=rank == 0),
        "rank 0 of the pipeline: a step needs gradients": lambda: (
            torch.set_grad_enabled(rank == 1)(pipe.step)(x, y)
        ),
        "rank 0 .*: x needs a gradient": lambda: pipe.step(
            x.clone().requires_grad_(rank == 0), y
        ),
        "rank 0 .*: y needs a gradient": lambda: pipe.step(
            x, y.clone().requires_grad_()
        ),
    }
    for pattern, case in cases.items():
        with pytest.raises(ValueError) as error:
            case()
        assert re.search(pattern, str(error.value)), (pattern, error.value)
    if rank == 0:
        next(pipe.parameters()).requires_grad_()
    with pytest.raises(ValueError, match="stage 0 was frozen when the pipeline was"):
        pipe.step(x, y)
    for p, gradient in zip(pipe.parameters(), before, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(p.grad, gradient)
    return train(tower, "1f1b")


def test_ranks_that_make_different_calls_all_raise(world2):
    for pair in world2.run(other_calls):
        assert max(pair) <= TOLERANCE


class Penalty(nn.Linear):
    """Differentiates itself in forward."""

    def forward(self, input):
        with torch.enable_grad():
            x = input.detach().requires_grad_()
            (slope,) = torch.autograd.grad(super().forward(x).tanh().sum(), x)
        return input + slope + super().forward(input)


def penalized() -> nn.Module:
    return nn.Sequential(Penalty(6, 6), Penalty(6, 6))


def test_backward_inside_forward_cannot_be_split(world2):
    for pair in world2.run(train, penalized, "1f1b"):
        assert max(pair) <= TOLERANCE
    with pytest.raises(lab.RankError, match="use a schedule without I and W"):
        world2.run(train, penalized, "h1")


def recompute_in_place() -> None:
    train(in_place, "gpipe", recompute=True)


def test_an_input_that_changes_cannot_run_again(world2):
    with pytest.raises(lab.RankError, match="changes its input in place"):
        world2.run(recompute_in_place)


def refuse(x):
    raise RuntimeError("refused")


def test_bad_input_raises_on_every_rank(world2):
    for pair in world2.run(errors):
        assert max(pair) <= TOLERANCE


def fail_later() -> None:
    rank, mesh = start()
    calls = []

    def third_time(x):
        calls.append(x)
        if rank == 1 and len(calls) == 3:
            raise ArithmeticError("stage 1 is tired")
        return x

    pipe = Pipeline(Wrong(third_time), one_f_one_b(2, M), mesh, loss_fn=mean_squared)
    pipe.step(*batch())


def test_an_error_in_a_stage_names_its_rank(world2):
    began = time.monotonic()
    with pytest.raises(lab.RankError, match="stage 1 is tired") as error:
        world2.run(fail_later)
    assert error.value.rank == 1
    assert time.monotonic() - began < 30


def fewer_rows(x: Tensor) -> Tensor:
    return x[x[:, 0] < 2]


def half_as_precise(x: Tensor) -> Tensor:
    return x if x.max() < 2 else x.float()


def depends_on_values(what) -> None:
    rank, mesh = start()
    module = Wrong(what if rank == 0 else lambda x: x)
    pipe = Pipeline(module, one_f_one_b(2, M), mesh, loss_fn=mean_squared)
    x, y = batch()
    pipe.step(x.clamp(max=1), y)
    x[3, 0] = 5
    pipe.step(x, y)


@pytest.mark.parametrize("what", [fewer_rows, half_as_precise])
def test_a_shape_that_depends_on_values_is_refused(world2, what):
    with pytest.raises(lab.RankError, match="a shape may depend on shapes only"):
        world2.run(depends_on_values, what)

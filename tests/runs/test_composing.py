"""Composed engines train, evaluate and continue prompts as one process does.

The whole matrix of engines and features is in `tests/parity`. Here is what a step
promises besides: sizes and counts that differ by rank, one reduction, skipped steps,
loss scales, and refusals on every rank.
"""

import math

import pytest
import torch
from torch import nn

import labpkg as lab
from labpkg.planning.layout import Layout
from labpkg.processes.collectives import count_comms
from labpkg.runs.composing import compose
from labpkg.runs.loss_scale import LossScale

CONFIG = lab.GPTConfig(
    num_layers=2, width=16, num_heads=4, sequence_length=8, vocab_size=32
)
MAX_NORM, NUM_STEPS = 0.3, 2
LAYOUTS = [
    Layout(dp=2, tp=2, sequence_parallel=True, zero=1, grad_accum_steps=3),
    Layout(dp=4, zero=3, recompute=True),
    Layout(dp=2, tp=2, zero=2, recompute=True),
    Layout(pp=2, dp=2, grad_accum_steps=2),
    Layout(pp=2, tp=2, schedule="interleaved", recompute=True),
]
IDS = [str(layout) for layout in LAYOUTS]


def gpt():
    return lab.GPT(CONFIG)


def batches(size):
    """Return (step, x or y, sample, position); targets of which some do not count."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    shape = (NUM_STEPS, 2, size, CONFIG.sequence_length)
    data = torch.randint(32, shape, generator=generator, device="cpu")
    data[:, 1, : size // 3, 2:] = -100  # most on the first ranks and micro-batches
    return data


def mine(mesh, *tensors):
    n, rank = mesh["dp"].size(), mesh["dp"].get_local_rank()
    return tuple(t.tensor_split(n)[rank] for t in tensors)


MESHES = {}  # of a rank; their groups take as long as a step


def mesh_of(layout):
    sizes = {"pp": layout.pp, "dp": layout.dp, "tp": layout.tp}
    key = tuple(sizes.values())
    if key not in MESHES:
        MESHES[key] = lab.make_mesh(**sizes)
    return MESHES[key]


def alone(size):
    """Train in one process without any engine."""
    torch.manual_seed(0)
    model = gpt().double()
    optimizer = lab.AdamW(model.parameters(), lr=1e-2)
    reports = []
    for x, y in batches(size):
        loss = lab.cross_entropy(model(x), y)
        loss.backward()
        norm = lab.clip_grad_norm(model, MAX_NORM).item()
        optimizer.step()
        optimizer.zero_grad()
        reports.append((loss.item(), int((y != -100).sum()), norm))
    x, y = batches(size)[0, :, :3]
    with torch.no_grad():
        return {
            "reports": reports,
            "state": model.state_dict(),
            "evaluation": lab.cross_entropy(model(x), y).item(),
            "logits": model(x),
            "greedy": model.generate(x[:2, :3], num_tokens=7, temperature=0),
            "sampled": model.generate(
                x[:2, :3], num_tokens=2, generator=torch.Generator().manual_seed(3)
            ),
        }


def composed(layout, size):
    """Do the same as `alone` under a layout."""
    options = {"precision": "fp64", "max_grad_norm": MAX_NORM}
    trained = compose(gpt, layout, mesh=mesh_of(layout), lr=7.0, **options)
    mesh, reports = trained.mesh, []
    for x, y in batches(size):
        report = trained.train_step(*mine(mesh, x, y), lr=1e-2)
        reports.append((report.loss, report.count, report.grad_norm))
        assert report.skipped is None
    x, y = batches(size)[0, :, :3]
    generator = torch.Generator().manual_seed(3)
    logits = trained.forward(mine(mesh, x)[0])
    return {
        "reports": reports,
        "state": lab.full_state_dict(trained.model),
        "evaluation": trained.evaluate(*mine(mesh, x, y)),
        "logits": lab.all_gather(logits, mesh["dp"]) if layout.dp == 1 else logits,
        "rank": mesh["dp"].get_local_rank(),
        "greedy": trained.generate(x[:2, :3], num_tokens=7, temperature=0),
        "sampled": trained.generate(x[:2, :3], num_tokens=2, generator=generator),
        "num_parameters": trained.num_parameters,
        "training": trained.model.training,
    }


def size_for(layout):
    """Choose a batch that ranks, passes and micro-batches cut unevenly, if they may."""
    return 16 if layout.is_pipeline else 11


def everything():
    return {str(layout): composed(layout, size_for(layout)) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def ranks(world4):
    return world4.run(everything)


@pytest.fixture(scope="module")
def references():
    return {size: alone(size) for size in {size_for(layout) for layout in LAYOUTS}}


@pytest.fixture(scope="module")
def one_rank():
    """Return what one rank does, to be compared with several."""

    def runs():
        first = started([Layout(zero=1)])
        ours = half(Layout())
        return first[0], ours, half_by_torch(len(ours[0]))

    with lab.World(1, device="cpu") as world:
        return world.run(runs)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_steps_are_those_of_one_process(ranks, references, layout):
    want = references[size_for(layout)]
    assert min(norm for *_, norm in want["reports"]) > MAX_NORM
    for rank in ranks:
        got = rank[str(layout)]
        assert got["reports"] == ranks[0][str(layout)]["reports"]  # bitwise
        for ours, theirs in zip(got["reports"], want["reports"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-12)
        assert got["state"].keys() == want["state"].keys()
        for name, value in want["state"].items():
            distance = (got["state"][name] - value).norm()
            assert distance <= 1e-12 * value.norm(), name
        assert got["num_parameters"] == CONFIG.shape.num_parameters


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_whole_logits_and_text_on_every_rank(ranks, references, layout):
    want = references[size_for(layout)]
    for rank in ranks:
        got = rank[str(layout)]
        # Three samples: some of four ranks have none.
        logits = want["logits"].tensor_split(layout.dp)[got["rank"]]
        torch.testing.assert_close(got["logits"], logits, rtol=1e-10, atol=1e-12)
        loss, count = got["evaluation"]
        counted = int((batches(size_for(layout))[0, 1, :3] != -100).sum())
        assert (loss, count) == (pytest.approx(want["evaluation"], rel=1e-12), counted)
        assert torch.equal(got["greedy"], want["greedy"])
        assert torch.equal(got["sampled"], want["sampled"])
        assert got["training"]


def started(layouts):
    """Return the first values under each layout, and how many lie on this rank."""
    found = []
    for layout in layouts:
        trained = compose(gpt, layout, on_meta=True)
        num_own = sum(p.numel() for p in trained.model.parameters())
        found.append((lab.full_state_dict(trained.model), num_own))
    return found


def test_all_layouts_start_alike_from_meta(world4, one_rank):
    layouts = [
        Layout(tp=4),
        Layout(dp=2, tp=2, zero=3),
        Layout(pp=2, dp=2, zero=2, schedule="zb-v"),
        Layout(pp=4),
    ]
    want, whole = one_rank[0]
    assert whole == CONFIG.shape.num_parameters
    for rank in world4.run(started, layouts):
        for layout, (state, num_own) in zip(layouts, rank, strict=True):
            assert state.keys() == want.keys(), layout
            for name, value in want.items():
                assert torch.equal(state[name], value), (layout, name)
            assert num_own < whole, layout


def reduced_bytes():
    """Return what a step sends over dp with one pass and with two, by engine."""
    found = {}
    data = batches(16)[0]
    for layout in (
        Layout(dp=4),
        Layout(dp=4, zero=2),
        Layout(pp=2, dp=2),
        Layout(pp=2, dp=2, zero=1),
    ):
        for passes in (1, 2):
            layout = Layout(
                **{name: getattr(layout, name) for name in ("pp", "dp", "zero")},
                num_micro_batches=2 if layout.pp > 1 else None,
                grad_accum_steps=passes,
            )
            trained = compose(gpt, layout, mesh=mesh_of(layout))
            x, y = mine(trained.mesh, *data)
            trained.train_step(x, y)  # the first one also agrees on shapes
            with count_comms() as log:
                trained.train_step(x, y)
            parameters = list(trained.model.parameters())
            found[layout.pp, layout.zero, passes] = (
                log["dp"].payload_bytes,
                lab.data_parallel_bytes(trained.model),
                4 * sum(p.numel() for p in parameters),
                len(parameters),
            )
    return found


def test_gradients_are_reduced_once_per_step(world4):
    for found in world4.run(reduced_bytes):
        for (_, zero, _), (payload, replicated, weights, number) in found.items():
            loss, norm = 4, 8
            if zero:  # gradients there, weights back, and a flag for each parameter
                assert payload == 2 * weights + number + loss + norm
            else:
                assert payload == replicated + loss


def digits(dropout=0.0, *, has_norm=False, frozen=0):
    def build():
        torch.manual_seed(5)
        layers = [nn.Linear(8, 16), nn.Dropout(dropout), nn.ReLU(), nn.Linear(16, 4)]
        layers += [nn.BatchNorm1d(4)] * has_norm
        for layer in layers[:frozen]:
            layer.requires_grad_(False)
        return nn.Sequential(*layers)

    return build


def samples(seed=0):
    generator = torch.Generator(device="cpu").manual_seed(seed)
    x = torch.randn(16, 8, generator=generator, device="cpu")
    return x, torch.randint(4, (16,), generator=generator, device="cpu")


PLAN = {"0": "column", "3": "row"}
SKIPS = [
    Layout(dp=4),
    Layout(dp=2, tp=2, zero=1),
    Layout(dp=4, zero=3),
    Layout(pp=2, dp=2, zero=2),
    Layout(pp=2, dp=2),
    Layout(pp=2, tp=2),
]


def skip_one(layout, loss_fn):
    """Take a good step, a step of which one rank's samples are bad, a good step."""
    build = digits(has_norm=True)
    mesh = mesh_of(layout)
    trained = compose(build, layout, mesh=mesh, plan=PLAN, loss_fn=loss_fn)
    x, y = samples()
    bad = x.clone()
    bad[-1, 0] = torch.nan  # on the last rank of dp
    first = trained.train_step(*mine(trained.mesh, x, y))
    before = full_state(trained)
    report = trained.train_step(*mine(trained.mesh, bad, y), lr=9.0)
    same = equal(before, full_state(trained))
    nothing = trained.train_step(*mine(trained.mesh, x, torch.full_like(y, -100)))
    same = equal(before, full_state(trained)) and same
    after = trained.train_step(*mine(trained.mesh, x, y))
    moved = not equal(before, full_state(trained))
    return first, report, nothing, after, same, moved


def full_state(trained):
    whole = [lab.full_state_dict(part) for part in (trained.model, trained.optimizer)]
    return *whole, [buffer.clone() for buffer in trained.model.buffers()]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def mean_loss(output, targets):
    return nn.functional.cross_entropy(output, targets)


def test_a_step_is_skipped_by_all_ranks(world4):
    jobs = [(layout, None) for layout in SKIPS]
    jobs += [(layout, mean_loss) for layout in SKIPS[2:4]]
    ranks = world4.run(lambda: [skip_one(*job) for job in jobs])
    for (layout, _), results in zip(jobs, zip(*ranks, strict=True), strict=True):
        for first, bad, nothing, after, same, moved in results:
            assert (first.skipped, after.skipped) == (None, None), layout
            assert bad.skipped == "the norm of the gradient is nan", layout
            assert (math.isnan(bad.grad_norm), bad.count) == (True, 16), layout
            assert (nothing.skipped, nothing.count) == ("no target counts", 0), layout
            assert (same, moved) == (True, True), layout
            assert (first, after) == (results[0][0], results[0][3]), layout


def half_frozen():
    """Train with a stage that has no gradients."""
    layout = Layout(pp=2, dp=2)
    build, mesh = digits(frozen=2), mesh_of(layout)
    trained = compose(build, layout, mesh=mesh, precision="fp16")
    return trained.train_step(*mine(mesh, *samples()))


def half(layout, good_steps=4):
    """Train until so many steps were good."""
    options = {"optimizer": torch.optim.SGD, "lr": 1e-2, "max_grad_norm": math.inf}
    options |= {"plan": PLAN, "precision": "fp16", "mesh": mesh_of(layout)}
    trained = compose(digits(), layout, **options)
    # Of a scale of 2^24 gradients overflow; growing again is seen soon.
    trained.loss_scale = LossScale(2.0**24, growth_interval=3)
    x, y = mine(trained.mesh, *samples())
    reports = []
    while sum(report.skipped is None for report in reports) < good_steps:
        reports.append(trained.train_step(x, y))
        assert len(reports) < 20
    scale = trained.loss_scale.value
    return reports, scale, lab.full_state_dict(trained.model)


def half_by_torch(steps):
    torch.manual_seed(0)
    model, (x, y) = digits()(), samples()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
    norms = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.float16):
            output = model(x)
        scaler.scale(nn.functional.cross_entropy(output.float(), y)).backward()
        scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), math.inf).item())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return norms, scaler.get_scale(), model.state_dict()


def test_fp16_follows_torch_in_one_process(one_rank):
    _, (reports, scale, state), (norms, their_scale, expected) = one_rank
    overflowed = [not math.isfinite(norm) for norm in norms]
    assert [report.skipped is not None for report in reports] == overflowed
    assert overflowed[0]
    assert "at a loss scale of 1.67772e+07" in reports[0].skipped
    for report, norm in zip(reports, norms, strict=True):
        if report.skipped is None:
            assert report.grad_norm == pytest.approx(norm, rel=1e-5)
    assert scale == their_scale
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)


def test_fp16_agrees_on_all_ranks(world4, one_rank):
    _, _, expected = one_rank[1]
    layouts = SKIPS[1:5]
    ranks = world4.run(lambda: [half_frozen(), *map(half, layouts)])
    first, *_ = (rank.pop(0) for rank in ranks)
    assert first.skipped is None
    assert 0 < first.grad_norm < math.inf
    for layout, results in zip(layouts, zip(*ranks, strict=True), strict=True):
        reports, _, state = results[0]
        assert reports[0].skipped is not None, layout
        assert len({str(rank[:2]) for rank in results}) == 1, layout
        # Scales are others, for each rank has a share of the samples.
        for name, value in expected.items():
            assert (state[name] - value).norm() < 1e-3 * value.norm(), (layout, name)


def dropout_norms(layouts):
    found = []
    for layout in layouts:
        build, mesh = digits(dropout=0.5), mesh_of(layout)
        trained = compose(build, layout, mesh=mesh, precision="fp64")
        report = trained.train_step(*mine(trained.mesh, *samples()))
        found.append((report.loss, report.grad_norm))
    return found


def test_recomputation_repeats_dropout(world4):
    pairs = [
        Layout(**options, recompute=recompute)
        for options in ({"dp": 4}, {"dp": 4, "zero": 3}, {"pp": 2, "dp": 2})
        for recompute in (False, True)
    ]
    for found in world4.run(dropout_norms, pairs):
        for kept, again in zip(found[::2], found[1::2], strict=True):
            assert again == pytest.approx(kept, rel=1e-12)


def refusals():
    """Return what each wrong call says on this rank."""
    rank = torch.distributed.get_rank()
    tokens = batches(16)[0]

    def train(layout, *data, build=gpt, **options):
        compose(build, layout, **options).train_step(*data)

    other = lab.make_mesh(dp=4)
    untied = lambda heads: (
        lambda: lab.GPT(
            lab.GPTConfig(
                num_layers=2, width=16, num_heads=heads, sequence_length=8, tied=False
            )
        )
    )
    calls = {
        "world": lambda: compose(gpt, Layout(dp=2)),
        "mesh": lambda: compose(gpt, Layout(dp=2, tp=2), mesh=other),
        "precision": lambda: compose(gpt, Layout(dp=4), precision="fp8"),
        "norm": lambda: compose(gpt, Layout(dp=4), max_grad_norm=0.0),
        "plan": lambda: compose(digits(), Layout(dp=2, tp=2)),
        "heads": lambda: compose(untied(2), Layout(tp=4)),
        "units": lambda: compose(lambda: nn.Sequential(nn.Linear(2, 2)), Layout(pp=4)),
        "no units": lambda: compose(lambda: nn.Linear(2, 2), Layout(pp=4)),
        "blocks": lambda: compose(
            lambda: nn.Linear(2, 2), Layout(dp=4, recompute=True)
        ),
        "tied": lambda: compose(gpt, Layout(pp=2, dp=2, zero=3)),
        "empty stage": lambda: compose(
            lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
            Layout(pp=2, dp=2, zero=1),
        ),
        "option": lambda: compose(gpt, Layout(pp=2, dp=2), lr=-1.0),
        "pieces": lambda: train(
            Layout(pp=2, dp=2, grad_accum_steps=2), *tokens[:, : 12 if rank else 16]
        ),
        "rows": lambda: train(Layout(dp=4), tokens[0], tokens[1, : 16 - rank]),
        "peers": lambda: train(
            Layout(dp=2, tp=2), *tokens.roll(int(rank == 3), dims=1)
        ),
        # Over both places together the same samples: none may cancel out.
        "swapped": lambda: train(
            Layout(dp=2, tp=2), *tokens.roll(int(rank in (1, 2)), dims=1)
        ),
        "prompt": lambda: compose(gpt, Layout(dp=2, tp=2)).generate(
            tokens[0] + rank % 2, num_tokens=1
        ),
        "sequence": lambda: train(
            Layout(dp=2, tp=2, sequence_parallel=True), *tokens[..., :7]
        ),
        "text": lambda: compose(digits(), Layout(pp=2, dp=2)).generate(
            tokens[0], num_tokens=1
        ),
    }
    says = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            says[name] = str(error)
    return says


SAYS = {
    "world": "pp=1 * dp=2 * cp=1 * tp=1 = 2, but there are 4 ranks",
    "mesh": "the layout wants {'pp': 1, 'dp': 2, 'tp': 2}",
    "precision": "precision='fp8'; choose one of",
    "norm": "max_grad_norm=0.0 must be above 0",
    "plan": "tp=2 cuts layers of Sequential, but no plan says which",
    "heads": "qkv: out_features=48",
    "units": "num_stages=4 of a model with 1 units",
    "no units": "Linear has no units to cut between",
    "blocks": "recompute=True, but Linear has no blocks",
    "tied": "zero=3 slices parameters, but stages of the pipeline (pp=2) share one",
    "empty stage": "0 trainable elements cannot be cut over 2 ranks",
    "option": "lr=-1.0 must be a finite number",
    "pieces": "12 samples are not divisible into 4 micro-batches in each of 2 passes",
    "rows": "rank 1: x has 16 samples on cpu and y 15",
    "peers": "ranks of pp or tp were given other samples than their peers",
    "swapped": "ranks of pp or tp were given other samples than their peers",
    "prompt": "ranks of pp or tp were given other samples than their peers",
    "sequence": "a sequence of T=7 is not divisible by tp=2",
    "text": "the divided model cannot continue prompts",
}


def test_what_cannot_be_composed_is_refused_on_every_rank(world4):
    for says in world4.run(refusals):
        assert set(says) == set(SAYS)
        for name, text in SAYS.items():
            assert text in says[name], (name, says[name])


def regression(layouts):
    """Train on float targets with a loss of the user's, some ranks without samples."""
    x, _ = samples()
    y = x @ torch.ones(8, 4)
    found = []
    for layout in layouts:
        options = {"loss_fn": nn.functional.mse_loss, "precision": "fp64"}
        mesh = mesh_of(layout)
        trained = compose(digits(), layout, mesh=mesh, plan=PLAN, **options)
        size = 8 if layout.is_pipeline else 3
        first = trained.train_step(*mine(trained.mesh, x[:size], y[:size]))
        loss, count = trained.evaluate(*mine(trained.mesh, x[:3], y[:3]))
        found.append((size, first.loss, first.grad_norm, loss, count))
    return found


def regression_alone(size):
    """Do the same in this process, without any engine."""
    x, _ = samples()
    x, y = x.double(), (x @ torch.ones(8, 4)).double()
    with torch.random.fork_rng():
        model = digits()().double()
    loss = nn.functional.mse_loss(model(x[:size]), y[:size])
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    after = nn.functional.mse_loss(model(x[:3]), y[:3])
    return [loss.item(), norm.item(), after.item(), 3]


def test_a_loss_of_the_user_has_a_row_for_each_sample(world4):
    layouts = [
        Layout(dp=4),
        Layout(dp=4, zero=3),
        Layout(pp=2, tp=2),
        Layout(pp=2, dp=2),
    ]
    expected = {size: regression_alone(size) for size in (3, 8)}
    for found in world4.run(regression, layouts):
        for size, *rest in found:
            assert rest == pytest.approx(expected[size], rel=1e-12)

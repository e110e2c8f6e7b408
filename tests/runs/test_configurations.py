"""Random configurations end in a run, or in a ValueError on every rank; none hangs.

What numbers alone refuse never reaches a rank. The others train one step of a tiny
model, many in one job: a rank that refuses later than the others, or sends what they do
not expect, would stop the ones that follow. The first loss is that of one process.
"""

import functools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import labpkg as lab
from labpkg.planning.layout import SCHEDULES
from labpkg.runs.composing import compose
from labpkg.runs.config import TrainConfig

NUM_RANKS, NUM_TOGETHER = 4, 10
AXES = [(pp, dp, tp) for pp in (1, 2, 4) for dp in (1, 2, 4) for tp in (1, 2, 4)]
FITTING = [axes for axes in AXES if math.prod(axes) == NUM_RANKS]
TOLERANCES = {"fp64": 1e-6, "fp32": 1e-4, "bf16": 0.1, "fp16": 0.1}


@st.composite
def options(draw):
    """Draw options of a TrainConfig; most fit the number of ranks."""
    some = lambda *values: draw(st.sampled_from(values))
    pp, dp, tp = draw(
        st.sampled_from([*3 * FITTING, (1, None, 1), (2, None, 1), (3, 1, 1)])
    )
    is_pipeline = pp > 1 or some(False, False, False, True)
    return {
        "pp": pp,
        "dp": dp,
        "tp": tp,
        "zero": some(0, 0, 1, 2, 3, 3),
        "schedule": some(None, *SCHEDULES) if is_pipeline else some(None, None, "fifo"),
        "num_micro_batches": some(None, 1, 2, 3, 4)
        if is_pipeline
        else some(None, None, 2),
        "num_virtual_stages": some(1, 2, 2, 3),
        "sequence_parallel": tp > 1 and some(False, True),
        "grad_accum": some(1, 1, 2, 3),
        "recompute": some(False, True),
        "global_batch_size": some(3, 8, 8, 16, 16, 24),
        "clip": some(None, 1.0, 0.01),
        "precision": some(*TOLERANCES),
    }


@st.composite
def models(draw):
    """Draw a model; not every one can be cut."""
    some = lambda *values: draw(st.sampled_from(values))
    if some(0, 0, 0, 1):
        return {"widths": [8] * some(2, 5, 9)}
    num_heads = some(4, 4, 4, 3)
    return {
        "num_layers": some(1, 2, 6),
        "width": 4 * num_heads,
        "num_heads": num_heads,
        "sequence_length": some(8, 8, 6),
        "vocab_size": some(32, 32, 30),
        "tied": some(False, True),
    }


def build(sizes):
    if "widths" in sizes:
        return lab.MLP(*sizes["widths"])
    return lab.GPT(lab.GPTConfig(**sizes))


def batch(sizes, num_samples):
    generator = torch.Generator("cpu").manual_seed(0)
    if "widths" in sizes:
        x = torch.rand(num_samples, 8, generator=generator)
        return x, torch.randint(8, (num_samples,), generator=generator)
    shape = num_samples, sizes["sequence_length"]
    tokens = torch.randint(sizes["vocab_size"], (2, *shape), generator=generator)
    return tokens[0], tokens[1].masked_fill(tokens[1] % 5 == 0, -100)


def loss_alone(sizes, num_samples):
    torch.manual_seed(0)
    x, y = batch(sizes, num_samples)
    return lab.cross_entropy(build(sizes)(x), y).item()


@functools.cache
def mesh_of(pp, dp, tp):
    return lab.make_mesh(pp=pp, dp=dp, tp=tp)


def train(config, sizes):
    """Return the loss of a step and after it, and the norm, or what was refused."""
    try:
        layout = config.layout
        composition = compose(
            lambda: build(sizes),
            layout,
            mesh=mesh_of(layout.pp, layout.dp, layout.tp),
            precision=config.precision,
            max_grad_norm=config.clip or math.inf,
            lr=1e-3,
        )
        rank = composition.mesh["dp"].get_local_rank()
        whole = batch(sizes, config.global_batch_size)
        x, y = (t.tensor_split(layout.dp)[rank] for t in whole)
        report = composition.train_step(x, y)
        return report.loss, composition.evaluate(x, y)[0], report.grad_norm
    except ValueError as error:
        return str(error)


def train_all(jobs):
    found = []
    for config, sizes in jobs:
        try:
            found.append(train(config, sizes))
        except Exception as error:
            error.add_note(f"in {config} {sizes}")
            raise
    return found


def accepted(values):
    """Return a config for 4 ranks, or None if numbers alone refuse it."""
    try:
        config = TrainConfig(data="digits", steps=1, **values)
        return config.resolved(dp=config.dp_of(NUM_RANKS), device="cpu")
    except ValueError:
        return None


def check(world, drawn):
    """Train what is accepted; return how many ran, and were refused on the ranks."""
    jobs = [(accepted(values), sizes) for values, sizes in drawn]
    jobs = [(config, sizes) for config, sizes in jobs if config is not None]
    num_run = num_refused = 0
    ranks = world.run(train_all, jobs, timeout_s=120) if jobs else []
    for (config, sizes), found in zip(jobs, zip(*ranks, strict=True), strict=True):
        assert len(set(found)) == 1, (config, sizes, found)  # the same on every rank
        if isinstance(found[0], str):
            assert found[0]
            num_refused += 1
            continue
        want = loss_alone(sizes, config.global_batch_size)
        loss, after, norm = found[0]
        tolerance = TOLERANCES[config.precision]
        assert loss == pytest.approx(want, rel=tolerance), (config, sizes)
        assert math.isfinite(after), (config, sizes)
        assert norm > 0, (config, sizes)
        num_run += 1
    return num_run, num_refused


lists_of_jobs = st.lists(
    st.tuples(options(), models()), min_size=NUM_TOGETHER, max_size=NUM_TOGETHER
)
one_world = {
    "deadline": None,
    "suppress_health_check": [
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
    ],
}


def test_a_hundred_random_configurations(world4):
    counts = []

    @settings(max_examples=100 // NUM_TOGETHER, derandomize=True, **one_world)
    @given(drawn=lists_of_jobs)
    def run(drawn):
        counts.append(check(world4, drawn))

    run()
    num_run, num_refused = map(sum, zip(*counts, strict=True))
    assert num_run >= 20  # otherwise the strategy has become useless
    assert num_refused >= 5


@pytest.mark.soak
@pytest.mark.timeout(3600)
@settings(max_examples=1000 // NUM_TOGETHER, **one_world)
@given(drawn=lists_of_jobs)
def test_a_thousand_random_configurations(world4, drawn):
    check(world4, drawn)


def test_ranks_that_end_differently_are_noticed(world2):
    def train_otherwise(jobs):
        return [torch.distributed.get_rank() for _ in jobs]

    class World:
        def run(self, function, jobs, **options):
            return world2.run(train_otherwise, jobs)

    values = {"dp": 4, "global_batch_size": 4, "precision": "fp32"}
    with pytest.raises(AssertionError, match="tied"):
        check(World(), [(values, {"tied": False})])

"""What planning predicts is what engines hold and send, to the byte.

Each job is described once, as a `Configuration`, predicted from that alone, and run: on
2 and 4 real ranks, and as single ranks of a fake process group of 1024, whose
collectives return at once. A pipeline cannot be played like that, since its ranks tell
each other shapes; there a stage is taken out and its other axes are played.

Moments of AdamW, gradients and weights are float32: what half precision adds is
arithmetic of the same functions, and published runs are held against it elsewhere.
"""

import gc
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import labpkg as lab
from labpkg.bench.memory import LiveBytes
from labpkg.foundations.models import Block, Embedding, Head
from labpkg.planning.configuration import Configuration
from labpkg.planning.cost import wire_bytes
from labpkg.planning.layout import Layout
from labpkg.planning.memory import layer_activation_bytes, state_bytes
from labpkg.planning.model_parallel import pipeline_bytes
from labpkg.planning.network import step_traffic
from labpkg.planning.stages import StageShare, stage_elements
from labpkg.processes import collectives
from labpkg.processes.stages import split_stages
from labpkg.runs.composing import compose

CONFIG = lab.GPTConfig(
    num_layers=4, width=16, num_heads=4, sequence_length=8, vocab_size=32
)
UNTIED = replace(CONFIG, tied=False)
OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")


def job(config=CONFIG, **division):
    """Return a job that fills its ranks; two sequences in a micro-batch."""
    n = 1
    for axis in ("dp", "tp", "pp"):
        n *= division.get(axis, 1)
    division.setdefault("grad_accum_steps", 4 if division.get("pp", 1) > 1 else 1)
    division.setdefault("sequence_parallel", False)
    return Configuration(
        model=config.shape,
        gpus_per_node=n,
        micro_batch_size=2,
        precision="fp32",
        **division,
    )


def layout_of(job):
    """Return the layout with which `compose` runs a job."""
    in_pipeline = job.pp > 1
    return Layout(
        pp=job.pp,
        dp=job.dp,
        tp=job.tp,
        zero=job.zero,
        schedule=job.schedule if in_pipeline else None,
        num_micro_batches=job.grad_accum_steps if in_pipeline else None,
        num_virtual_stages=max(job.num_virtual_stages, 2),
        sequence_parallel=job.cuts_sequence,
        grad_accum_steps=1 if in_pipeline else job.grad_accum_steps,
        recompute=job.recompute == "full",
    )


def share_of(module):
    """Return what a module, the whole GPT or its part on this rank, consists of."""
    kinds = Counter(type(part) for part in module.modules())
    return StageShare(kinds[Block], bool(kinds[Embedding]), bool(kinds[Head]))


def gpt_of(job):
    s = job.model
    return lab.GPTConfig(
        num_layers=s.num_layers,
        width=s.width,
        num_heads=s.num_heads,
        sequence_length=s.sequence_length,
        vocab_size=s.vocab_size,
        tied=s.tied,
    )


def samples(job):
    size = job.micro_batch_size * job.grad_accum_steps
    x = torch.arange(size * job.model.sequence_length) % job.model.vocab_size
    return x.view(size, -1), x.view(size, -1)


@settings(max_examples=15, deadline=None)
@given(
    num_layers=st.integers(1, 6),
    heads=st.sampled_from([1, 2, 4]),
    vocab_size=st.integers(3, 50),
    tied=st.booleans(),
    data=st.data(),
)
def test_stages_have_the_predicted_parameters(
    num_layers, heads, vocab_size, tied, data
):
    config = lab.GPTConfig(
        num_layers=num_layers,
        width=8,
        num_heads=heads,
        sequence_length=5,
        vocab_size=vocab_size,
        tied=tied,
    )
    model = lab.GPT(config)
    assert config.shape.num_parameters == sum(p.numel() for p in model.parameters())
    num_stages = data.draw(st.integers(1, num_layers + 2))
    for stage in split_stages(model, num_stages):
        held = sum(p.numel() for p in stage.parameters())
        assert held == stage_elements(share_of(stage), config.shape)


REAL = {
    2: [
        job(UNTIED, dp=2, zero=1),
        job(dp=2, zero=2, grad_accum_steps=3),
        job(UNTIED, tp=2, sequence_parallel=True),
        job(UNTIED, pp=2, schedule="interleaved", num_virtual_stages=2),
        job(pp=2, schedule="zb-v"),
    ],
    4: [
        job(dp=4),
        job(UNTIED, dp=4, zero=3, recompute="full"),
        job(tp=4, grad_accum_steps=2),
        job(pp=4, schedule="gpipe"),
        job(dp=2, tp=2, zero=1),
        job(pp=2, dp=2, zero=2),
        job(pp=2, tp=2, sequence_parallel=True),
    ],
}
CASES = [(n, i) for n, jobs in REAL.items() for i in range(len(jobs))]
IDS = [f"{n} ranks {layout_of(REAL[n][i])}" for n, i in CASES]
MESHES = {}  # of a rank; their groups take as long as a step


def sizes_of(job):
    return {"pp": job.pp, "dp": job.dp, "tp": job.tp}


def mesh_of(job):
    sizes = sizes_of(job)
    if str(sizes) not in MESHES:
        MESHES[str(sizes)] = lab.make_mesh(**sizes)
    return MESHES[str(sizes)]


def measured(jobs):
    """Train each job for two steps; return what the second one held and sent."""
    return [measured_one(job) for job in jobs]


def measured_one(job):
    layout, config, held = layout_of(job), gpt_of(job), []
    sizes, mesh = sizes_of(job), mesh_of(job)
    x, y = samples(job)
    with LiveBytes() as live:
        trained = compose(lambda: lab.GPT(config), layout, mesh=mesh)
        trained.train_step(x, y)
        look = lambda loss, norm: held.append(what_is_held(trained, live))
        trained.skip_rules.append(look)
        with lab.count_comms() as log:
            trained.train_step(x, y)
    axes = [axis for axis, n in sizes.items() if n > 1]
    sent = {(axis, op): log[axis, op] for axis in axes for op in OPS}
    return share_of(trained.model), held[0], sent


def what_is_held(trained, live):
    """Return bytes before the update: weights, moments, all that is alive; tensors."""
    kept = list(trained.model.parameters())
    optimizer = getattr(trained.optimizer, "inner", trained.optimizer)
    moments = [m for own in optimizer.state.values() for m in own.values()]
    moments = sum(m.nbytes for m in moments if torch.is_tensor(m) and m.dim())
    gc.collect()
    return sum(p.nbytes for p in kept), moments, live.now, len(kept)


@pytest.fixture(scope="module")
def found(world2, world4):
    worlds = {2: world2, 4: world4}
    return {n: worlds[n].run(measured, jobs) for n, jobs in REAL.items()}


@pytest.mark.parametrize(("n", "i"), CASES, ids=IDS)
def test_ranks_hold_the_predicted_state(found, n, i):
    job = REAL[n][i]
    batch = sum(t.nbytes for t in samples(job))
    for share, (weights, moments, alive, num_tensors), _ in (of[i] for of in found[n]):
        elements = stage_elements(share, job.model, tp=job.tp)
        state = state_bytes(elements, precision="fp32", zero=job.zero, n=job.dp)
        assert (weights, moments) == (state.weights, state.optimizer)
        flags = 0 if job.zero else 4 * num_tensors  # lie in the buckets of gradients
        rest = alive - sum(state) - flags
        assert 0 <= rest <= batch + 64  # and some scalars


@pytest.mark.parametrize(("n", "i"), CASES, ids=IDS)
def test_ranks_send_the_predicted_bytes(found, n, i):
    job = REAL[n][i]
    for rank, (share, (*_, num_tensors), sent) in enumerate(of[i] for of in found[n]):
        stage = rank // (job.tp * job.dp)
        predicted = payloads(job, stage, share, num_tensors) + control(job, share)
        counted = {key: count.payload_bytes for key, count in sent.items()}
        assert counted == {key: predicted[key] for key in counted}
        for (axis, op), count in sent.items():
            on_wire = wire_bytes(op, count.payload_bytes, sizes_of(job)[axis])
            assert count.wire_bytes == pytest.approx(on_wire)


DATA_PARALLEL = [(n, i) for n, i in CASES if REAL[n][i].dp > 1]


@pytest.mark.parametrize(("n", "i"), DATA_PARALLEL)
def test_the_planner_knows_what_the_fullest_rank_sends_over_dp(found, n, i):
    job, planned = REAL[n][i], Counter()
    # Stage 2 of the engine keeps whole sums over the passes and reduces once.
    num_passes = job.grad_accum_steps if job.zero == 3 else 1
    for axis, phase, op, nbytes, calls in step_traffic(job):
        if axis == "dp":
            planned[op] += nbytes * calls * (num_passes if phase == "pass" else 1)
    counted = Counter()
    for _, (*_, num_tensors), sent in (of[i] for of in found[n]):
        for op in planned:
            flags = 4 * num_tensors + 4 if op == "all_reduce" else 0
            counted[op] = max(counted[op], sent["dp", op].payload_bytes - flags)
    assert counted == planned


def payloads(job, stage, share, num_tensors):
    """Return the payload of each axis and collective on a rank of a stage.

    `step_traffic`, from which times are predicted, gives a layer, an end and a border.
    """
    sent, M = Counter(), job.grad_accum_steps
    for axis, phase, op, nbytes, calls in step_traffic(job):
        if phase == "layer":
            sent[axis, op] += share.num_layers * M * calls * nbytes
        elif phase == "ends":  # of three calls the output has two
            ends = share.embedding * (calls // 2) + share.head * (calls - calls // 2)
            sent[axis, op] += ends * M * nbytes
        elif phase == "border":
            plan = layout_of(job).make_schedule()
            tied = 4 * job.model.vocab_size * job.model.width * job.model.tied
            sent[axis, op] += pipeline_bytes(
                plan, stage, activation_bytes=int(nbytes), tied_bytes=tied // job.tp
            )
    if job.dp > 1:
        sent.update(gradients_and_weights(job, share, num_tensors))
    if job.cuts_sequence:
        # This GPT adds up embeddings on each rank, where others scatter the sums, and
        # norms see slices of the sequence, so that their gradients are added up.
        tokens = job.micro_batch_size * job.model.sequence_length
        stream = 4 * M * tokens * job.model.width
        sent["tp", "reduce_scatter"] -= stream * share.embedding
        sent["tp", "all_reduce"] += stream * share.embedding
        norms = 2 * share.num_layers + share.head
        sent["tp", "all_reduce"] += 4 * M * job.model.width * norms
    return sent


def gradients_and_weights(job, share, num_tensors):
    """Return what dp sends for the parameters of a rank, with a flag for each."""
    nbytes = 4 * stage_elements(share, job.model, tp=job.tp)
    if job.zero == 0:
        return {("dp", "all_reduce"): nbytes + 4 * num_tensors}
    passes = job.grad_accum_steps if job.zero == 3 else 1
    return {
        ("dp", "all_gather"): (2 * passes if job.zero == 3 else 1) * nbytes,
        ("dp", "reduce_scatter"): passes * nbytes,
        ("dp", "all_reduce"): passes * num_tensors,
    }


def control(job, share):
    """Return the payload of the numbers by which ranks agree on a step."""
    sent, M = Counter(), job.grad_accum_steps
    loss, norm = 4, 8
    sent["dp", "all_reduce"] = loss + norm * (job.zero > 0)
    if job.zero and job.tp > 1:
        sent["dp", "all_reduce"] += norm  # whole and divided parameters apart
    if job.tp > 1:
        tokens = M * job.micro_batch_size * job.model.sequence_length
        # Of the loss three numbers for each token, where logits stay divided.
        sent["tp", "all_reduce"] = norm + 3 * 4 * tokens * share.head
    if job.pp > 1:
        # Which rank used its copy; of zb-v one rank has both.
        tied = job.model.tied and job.schedule != "zb-v"
        sent["pp", "all_reduce"] = loss + norm + 4 * tied
        sent["pp", "all_gather"] = 8 * job.pp
    return sent


KEPT = [
    job(tp=2),
    job(tp=2, sequence_parallel=True),
    job(dp=2),
    job(dp=2, recompute="full"),
    job(tp=2, recompute="full"),
]


def kept_by_a_layer(jobs):
    """Return what forward leaves alive with five layers, less what it does with 4."""
    return [kept(job, num_layers=5) - kept(job, num_layers=4) for job in jobs]


def kept(job, num_layers):
    config = replace(CONFIG, num_layers=num_layers)
    with LiveBytes() as live:
        trained = compose(lambda: lab.GPT(config), layout_of(job), mesh=mesh_of(job))
        before = live.now
        logits = trained.model(samples(job)[0])
        assert logits.requires_grad
        return live.now - before


def test_a_layer_keeps_the_predicted_activations(world2):
    predicted = [layer_activation_bytes(job) for job in KEPT]
    assert world2.run(kept_by_a_layer, KEPT) == [predicted] * 2


# --- a rank of 1024 -----------------------------------------------------------------

WIDE = lab.GPTConfig(
    num_layers=4, width=64, num_heads=32, sequence_length=32, vocab_size=96, tied=False
)
N = 1024
PLAYED = [
    (0, job(WIDE, dp=N)),
    (1023, job(WIDE, dp=N, zero=1)),
    (500, job(WIDE, dp=N, zero=2)),
    (700, job(WIDE, dp=N, zero=3)),
    (37, job(WIDE, dp=32, tp=32, zero=1)),
    (1000, job(WIDE, dp=64, tp=16, zero=3, sequence_parallel=True)),
    (300, job(WIDE, pp=4, dp=16, tp=16, zero=2, grad_accum_steps=1)),
    (1023, job(WIDE, pp=4, dp=64, tp=4, grad_accum_steps=1)),
]


def played_one(job):
    """Return what this rank holds and sends in a step."""
    mesh = lab.make_mesh(**sizes_of(job))
    stage = mesh["pp"].get_local_rank()
    with collectives.off():  # of objects there is only garbage
        model, optimizer = divided(job, mesh, stage)
    share = share_of(model)
    shape = (job.micro_batch_size, job.model.sequence_length)
    x = torch.zeros(shape, dtype=torch.int64)
    if not share.embedding:  # the activations that another rank would send
        x = torch.zeros(*shape, job.model.width, requires_grad=True)
    with lab.count_comms() as log:
        model(x).sum().backward()
        optimizer.step()
    inner = getattr(optimizer, "inner", optimizer)
    moments = [m for own in inner.state.values() for m in own.values()]
    held = (
        sum(p.numel() for p in model.parameters()),
        sum(m.numel() for m in moments if torch.is_tensor(m) and m.dim()) // 2,
    )
    sent = {(a, op): log[a, op].payload_bytes for a in ("dp", "tp") for op in OPS}
    return stage, share, held, len(list(model.parameters())), sent


def divided(job, mesh, stage):
    model, sequence = lab.GPT(gpt_of(job)), job.cuts_sequence
    if job.tp > 1:
        plan = lab.gpt_tensor_parallel_plan(model.config, sequence_parallel=sequence)
        lab.apply_tensor_parallel(model, mesh["tp"], plan, sequence_parallel=sequence)
    model = split_stages(model, job.pp)[stage] if job.pp > 1 else model
    if job.zero == 0:
        model = lab.DataParallel(model, mesh["dp"])
    if job.zero == 3:
        model = lab.fully_shard(model, mesh["dp"])
    if job.zero in (1, 2):
        parameters = model.parameters()
        return model, lab.ZeroOptimizer(
            parameters, lab.AdamW, mesh["dp"], stage=job.zero, lr=1e-3
        )
    return model, lab.AdamW(model.parameters(), lr=1e-3)


@pytest.fixture(scope="module")
def found_at_1024(fake_world):
    return [fake_world(rank, N, played_one, job) for rank, job in PLAYED]


PLAYED_IDS = [f"rank {rank} of {layout_of(job)}" for rank, job in PLAYED]


@pytest.mark.parametrize("i", range(len(PLAYED)), ids=PLAYED_IDS)
def test_a_rank_of_1024_holds_the_predicted_state(found_at_1024, i):
    (rank, job), (_, share, held, *_) = PLAYED[i], found_at_1024[i]
    own = rank // job.tp % job.dp  # on the axis dp
    elements = stage_elements(share, job.model, tp=job.tp)
    parts = [elements]  # what is cut into slices: one bucket, or unit by unit
    if job.zero == 3:
        layer = stage_elements(StageShare(1), job.model, tp=job.tp)
        parts = [layer] * share.num_layers
        parts.append(elements - sum(parts))
    cut = sum(part // job.dp + (own < part % job.dp) for part in parts)
    assert held == (cut if job.zero == 3 else elements, cut if job.zero else elements)
    # The prediction is that of an even cut: a slice is off by less than an element.
    state = state_bytes(elements, precision="fp32", zero=job.zero, n=job.dp)
    for counted, predicted in zip(
        held, (state.weights / 4, state.optimizer / 8), strict=True
    ):
        assert abs(counted - predicted) < len(parts)


@pytest.mark.parametrize("i", range(len(PLAYED)), ids=PLAYED_IDS)
def test_a_rank_of_1024_sends_the_predicted_bytes(found_at_1024, i):
    (_, job), (stage, share, _, num_tensors, sent) = PLAYED[i], found_at_1024[i]
    predicted = payloads(job, stage, share, num_tensors)
    if job.tp > 1 and share.head:  # each rank wants whole logits here
        tokens = job.micro_batch_size * job.model.sequence_length
        predicted["tp", "all_gather"] += 4 * tokens * job.model.vocab_size
    assert sent == {key: predicted[key] for key in sent}
    assert sum(sent.values()) > 0

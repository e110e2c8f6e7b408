"""The planner finds the best of all jobs that fit, or says what would help."""

import re
import time
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labpkg.planning.configuration import RECOMPUTE, Configuration
from labpkg.planning.divisions import Task
from labpkg.planning.estimates import estimate
from labpkg.planning.hardware import find_hardware
from labpkg.planning.memory import peak_memory
from labpkg.planning.models import find_model
from labpkg.planning.neighbours import schedule_choices
from labpkg.planning.planner import _fill, _Search, plan
from labpkg.planning.shapes import ModelShape
from labpkg.planning.step_time import step_time
from tests.planning.orders import few

H100 = find_hardware("h100")
SMALL = ModelShape(
    num_layers=8,
    width=1024,
    num_heads=8,
    num_kv_heads=4,
    ffn_width=4096,
    vocab_size=32000,
    sequence_length=1024,
    tied=False,
    gated_mlp=True,
    learned_positions=False,
)
MEMORY = st.sampled_from([4, 6, 9, 15, 80]).map(lambda size: size * 2**30)
WORLDS = st.sampled_from([1, 2, 3, 4, 6, 8, 16])
SEQUENCES = st.sampled_from([6, 8, 12])


def _machine(memory):
    return replace(H100, memory_bytes=memory, gpus_per_node=min(8, 2**20))


def _plans(world, sequences, memory=H100.memory_bytes, **options):
    options = {"num_plans": 10**6, "spare_memory": 0, **options}
    return plan(SMALL, _machine(memory), world, sequences * 1024, **options)


def _found(*arguments, **options):
    try:
        return _plans(*arguments, **options)
    except ValueError as refusal:
        if not re.match(r"no (way to divide this job fits|dp x tp)", str(refusal)):
            raise
        return []


def _every_job(world, sequences):
    """Yield each job that `Configuration` accepts, by trying all numbers."""
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    batches = [n for n in range(1, sequences + 1) if sequences % n == 0]
    schedules = [("1f1b", 1), ("gpipe", 1), ("zb-h1", 1), ("zb-v", 2)]
    schedules += [("interleaved", v) for v in (2, 4, 8)]
    per_node = min(8, world)
    for dp, tp, pp, size in product(sizes, sizes, sizes, batches):
        passes, rest = divmod(sequences, dp * size)
        if dp * tp * pp != world or rest or pp > 8:
            continue
        for zero, how, (name, v) in product(range(4), RECOMPUTE, schedules):
            if (pp == 1 and name != "1f1b") or (pp > 1 and pp * v > 8):
                continue
            try:
                yield Configuration(
                    model=SMALL,
                    nodes=world // per_node,
                    gpus_per_node=per_node,
                    dp=dp,
                    tp=tp,
                    pp=pp,
                    micro_batch_size=size,
                    grad_accum_steps=passes,
                    zero=zero,
                    recompute=how,
                    schedule=name,
                    num_virtual_stages=v,
                )
            except ValueError:
                continue  # tp = 3 and the like


def _axes(job):
    return job.dp, job.tp, job.pp


@few(8)
@given(world=WORLDS, sequences=SEQUENCES, memory=MEMORY)
def test_the_search_finds_what_trying_everything_finds(world, sequences, memory):
    best = {}
    for job in _every_job(world, sequences):
        own = estimate(job, _machine(memory))
        if own.fits:
            axes = _axes(job)
            best[axes] = min(best.get(axes, float("inf")), own.step_s)
    found = _found(world, sequences, memory)
    steps = {_axes(p.configuration): p.estimate.step_s for p in found}
    assert steps == pytest.approx(best)
    assert [p.estimate.step_s for p in found] == sorted(steps.values())


@few(8)
@given(world=WORLDS, sequences=SEQUENCES, memory=MEMORY, num_plans=st.integers(1, 9))
def test_every_plan_is_possible(world, sequences, memory, num_plans):
    plans = _found(world, sequences, memory, num_plans=num_plans, variants=2)
    assert len(plans) <= num_plans
    assert [p.place for p in plans] == list(range(1, len(plans) + 1))
    for p in plans:
        job = p.configuration
        assert job.dp * job.tp * job.pp * job.cp == world == job.world_size
        assert job.tokens_per_step == sequences * 1024
        assert p.estimate.memory_bytes <= p.estimate.usable_bytes <= memory
        assert p.estimate == estimate(job, p.estimate.hardware)
    steps = [p.estimate.step_s for p in plans]
    assert steps == sorted(steps)
    axes = [_axes(p.configuration) for p in plans]
    assert all(axes.count(each) <= 2 for each in axes)


@few(8)
@given(world=WORLDS, sequences=SEQUENCES, memory=MEMORY, most=st.integers(1, 20))
def test_a_shorter_list_is_the_head_of_a_longer_one(world, sequences, memory, most):
    plans = _found(world, sequences, memory)
    assert _found(world, sequences, memory, num_plans=most) == plans[:most]


@few(8)
@given(world=WORLDS, sequences=SEQUENCES, memory=MEMORY)
def test_more_memory_never_hurts(world, sequences, memory):
    few_plans = _found(world, sequences, memory)
    plans = _found(world, sequences, 2 * memory)
    before = {_axes(p.configuration): p.estimate.step_s for p in few_plans}
    after = {_axes(p.configuration): p.estimate.step_s for p in plans}
    assert before.keys() <= after.keys()
    assert all(after[axes] <= before[axes] for axes in before)


@few(8)
@given(
    pp=st.sampled_from([1, 2, 4, 5, 8]),
    passes=st.integers(1, 12),
    times=st.integers(2, 8),
    recompute=st.sampled_from(RECOMPUTE),
)
def test_single_sequences_need_no_more(pp, passes, times, recompute):
    gpipe = {"schedule": "gpipe", "num_virtual_stages": 1}
    for schedule in [*schedule_choices(8, pp), *[gpipe] * (pp > 1)]:
        job = Configuration(
            model=SMALL,
            gpus_per_node=2 * pp,
            dp=2,
            pp=pp,
            grad_accum_steps=passes * times,
            recompute=recompute,
            **schedule,
        )
        many = replace(job, micro_batch_size=times, grad_accum_steps=passes)
        single_bytes, bytes_ = (peak_memory(j).num_bytes for j in (job, many))
        assert single_bytes <= bytes_


def test_no_step_undercuts_its_bound():
    task = Task(
        model=find_model("llama2-7b"),
        hardware=H100,
        world_size=32,
        tokens_per_step=96 * 4096,
        precision="bf16",
        max_cp=2,
        spare_memory=0.0,
        fixed={},
    )
    search = _Search(task, num_plans=1, variants=1)
    shares = []
    for family in list(task.families())[::5]:
        for choices in family:
            step_s = step_time(task.job(choices), H100).seconds
            least_s = search._least_s(choices, _fill(choices))
            assert search._family_s(family) <= least_s * (1 + 1e-9)
            shares.append(least_s / step_s)
    assert 0.95 < max(shares) <= 1


@pytest.mark.parametrize(
    "fixed",
    [
        {"tp": 2},
        {"dp": 4, "zero": 1},
        {"pp": 4, "schedule": "gpipe"},
        {"pp": 2, "schedule": "interleaved", "num_virtual_stages": 3},
        {"micro_batch_size": 3, "recompute": "selective"},
        {"sequence_parallel": False, "tp": 4},
        {"fused_loss": True, "zero": 1},
        {"grad_accum_steps": 12},
    ],
)
def test_what_is_fixed_is_not_chosen(fixed):
    plans = _plans(8, 24, variants=100, **fixed)
    assert len(plans) > 1
    for p in plans:
        chosen = {name: getattr(p.configuration, name) for name in fixed}
        assert chosen == fixed


def test_sequences_are_divided_on_request_only():
    whole, divided = _plans(8, 2), _plans(8, 2, max_cp=4)
    assert {p.configuration.cp for p in whole} == {1}
    assert {p.configuration.cp for p in divided} == {1, 2, 4}
    assert {p.configuration.cp for p in _plans(8, 2, cp=2)} == {2}


def test_names_stand_for_models_and_machines():
    named = plan("llama3-8b", "h100", 8, 2**20, sequence_length=4096, num_plans=1)
    job = named[0].configuration
    assert (job.model.num_layers, job.model.sequence_length) == (32, 4096)
    assert named[0].estimate.hardware == H100


def test_sixteen_thousand_gpus_are_planned_in_seconds():
    start = time.process_time()
    plans = plan("llama3-405b", "h100", 16384, 2**24)
    assert time.process_time() - start < 5
    assert len(plans) == 10


def test_memory_is_left_free_on_request():
    best = _plans(8, 12)[0].estimate
    memory = best.memory_bytes / 0.95 / (best.usable_bytes / H100.memory_bytes)
    tight = _plans(8, 12, memory)
    roomy = _plans(8, 12, memory, spare_memory=0.2)
    assert tight[0].configuration == best.configuration
    assert "Tight: 95%" in tight[0].explain()
    for p in roomy:
        assert p.estimate.memory_bytes <= 0.8 * p.estimate.usable_bytes
        assert "Tight:" not in p.explain()


def test_a_tenth_of_the_memory_is_free_by_default():
    plans = plan("llama2-70b", "h100", 64, 2**22, variants=50, num_plans=50)
    shares = [p.estimate.memory_bytes / p.estimate.usable_bytes for p in plans]
    assert 0.8 < max(shares) <= 0.9


# ---- refusals ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (("lama3-8b", "h100", 8, 2**22), {}, "llama3-8b"),
        (("llama3-8b", "h10", 8, 2**22), {}, "h100"),
        (("llama3-8b", "h100", 0, 2**22), {}, "world_size=0"),
        (("llama3-8b", "h100", 12, 2**22), {}, "gpus_per_node=8; choose 8 or 16"),
        (("llama3-8b", "h100", 8, 5000), {}, "8192; choose 8192"),
        (("llama3-8b", "h100", 8, 20000), {}, "choose 16384 or 24576"),
        (("llama3-8b", "h100", 8, 2**22), {"num_plans": 0}, "num_plans=0"),
        (("llama3-8b", "h100", 8, 2**22), {"variants": 0}, "variants=0"),
        (("llama3-8b", "h100", 8, 2**22), {"max_cp": 0}, "max_cp=0"),
        (("llama3-8b", "h100", 8, 2**22), {"spare_memory": 10}, "choose 0.1"),
        (("llama3-8b", "h100", 8, 2**22), {"precision": "fp8"}, "bf16, fp16, fp32"),
        (("llama3-8b", "h100", 8, 2**22), {"ep": 2}, "ep=2 cannot be fixed"),
        (("llama3-8b", "h100", 8, 2**22), {"tp": 3}, "; choose other values than tp=3"),
        (("llama3-8b", "h100", 8, 2**13), {"tp": 16, "pp": 1}, "=16, pp=1 divides"),
        (("llama3-8b", "h100", 8, 2**13), {"dp": 8}, "8, or tokens_per_step=65536"),
        (("llama3-8b", "h100", 8, 2**22), {"tp": True}, "tp=True must be"),
        (("llama3-8b", "h100", 8, 2**22), {"sequence_parallel": 1}, "True or False"),
        (("llama3-8b", "h100", 8, 2**22), {"fused_loss": 1}, "fused_loss=1 must be Tr"),
        (("llama3-8b", "h100", 8, 2**22), {"zero": 4}, "0, 1, 2 or 3"),
        (("llama3-8b", "h100", 8, 2**22), {"schedule": "1b1f"}, "gpipe, 1f1b"),
        (("llama3-8b", "h100", 8, 2**22), {"recompute": "all"}, "selective, full"),
        (("llama3-8b", "h100", 7, 2**22), {"pp": 1}, "tokens_per_step=57344"),
    ],
)
def test_what_cannot_be_is_refused(arguments, options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        plan(*arguments, **options)


def test_a_refusal_names_what_would_help():
    with pytest.raises(ValueError, match=r"needs 2\d\d\.\d GiB") as refusal:
        plan("llama2-70b", "h100", 4, 2**22)
    enough = int(re.findall(r"world_size=(\d+)", str(refusal.value))[0])
    assert plan("llama2-70b", "h100", enough, 2**22)
    gib = int(re.findall(r"GPUs with (\d+) GiB", str(refusal.value))[0])
    roomy = replace(H100, memory_bytes=(gib + 1) / 0.95 * 2**30)
    assert plan("llama2-70b", roomy, 4, 2**22)


def test_a_refusal_proposes_to_divide_long_sequences():
    T, tokens = 2**20, 2**26
    with pytest.raises(ValueError, match=r"max_cp=64, which divides"):
        plan("llama3-8b", "h100", 64, tokens, sequence_length=T, tp=1)
    assert plan("llama3-8b", "h100", 64, tokens, sequence_length=T, tp=1, max_cp=64)


def test_uneven_feed_forward_parts_are_not_cut():
    model = replace(SMALL, ffn_width=4098)
    plans = plan(model, "h100", 8, 8 * 1024, num_plans=99)
    assert {p.configuration.tp for p in plans} == {1, 2}


def test_a_refusal_keeps_to_what_was_fixed():
    with pytest.raises(ValueError, match=r"leanest .* passes of size 4\)"):
        plan("llama2-70b", "h100", 8, 2**22, micro_batch_size=4)


def test_a_refusal_says_what_would_just_fit():
    needed = min(p.estimate.memory_bytes for p in _plans(1, 6, variants=100))
    memory = 1.1 * needed
    assert _plans(1, 6, memory)
    with pytest.raises(ValueError, match=r"choose .*spare_memory=0, which may crash"):
        _plans(1, 6, memory, spare_memory=0.3)


def test_a_refusal_blames_what_was_fixed():
    with pytest.raises(ValueError, match="other values than tp=1, pp=1, zero=0"):
        plan("llama2-70b", "h100", 64, 2**22, tp=1, pp=1, zero=0)

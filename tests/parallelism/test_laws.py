"""The laws that every engine obeys; `make laws` writes what they measure."""

import pytest
import torch

from tests.parallelism import laws
from tests.parallelism.engines import ENGINES
from tests.parallelism.laws import CASES, TOLERANCE, Runs, deviation

BFLOAT16_TOLERANCE = 2.0**-5  # four units in the last place

SIZES = [(engine, n) for engine, kind in ENGINES.items() for n in kind.meshes]


def on(places):
    """Return parameters: what holds on 3 and 4 ranks rarely fails on 2."""
    rare = pytest.mark.soak
    return [pytest.param(*p, marks=rare if p[1] == 2 else ()) for p in places]


every_engine = pytest.mark.parametrize(("engine", "world_size"), on(SIZES))


def pairs(engine, world_size, runs, *, in_order=False):
    """Yield each run with its traces: of all ranks, of one process."""
    ranks = laws.trained(engine, world_size).traces
    reference = ENGINES[engine].reference(world_size, in_order=in_order)
    for run in runs:
        yield run, ranks[run], laws.train_alone(run.alone, reference)


def runs_of_the_book(engine):
    return [run for run in Runs(engine).plain if run.case in ENGINES[engine].tuned]


def furthest(part, traces, want) -> float:
    return max(deviation(getattr(t, part), getattr(want, part)) for t in traces)


@every_engine
def test_output_is_that_of_one_process(engine, world_size, law):
    for run, ranks, alone in pairs(engine, world_size, runs_of_the_book(engine)):
        output = ENGINES[engine].assemble([trace.output for trace in ranks])
        far = deviation({"": output}, {"": alone.output})
        law(engine, "output", far, TOLERANCE, case=run)


@every_engine
def test_gradients_are_those_of_one_process(engine, world_size, law):
    for run, ranks, alone in pairs(engine, world_size, runs_of_the_book(engine)):
        far = furthest("gradients", ranks, alone)
        law(engine, "gradients", far, TOLERANCE, case=run)


@every_engine
def test_parameters_after_five_steps(engine, world_size, law):
    for run, ranks, alone in pairs(engine, world_size, runs_of_the_book(engine)):
        law(engine, "parameters", furthest("end", ranks, alone), TOLERANCE, case=run)
        assert furthest("end", ranks, ranks[0]) == 0


def test_seeds_make_other_models():
    for case in CASES.values():
        model, other = (case.model(laws.SEED + r).state_dict() for r in (0, 1))
        assert deviation(other, model) > 1e-3


@every_engine
def test_other_seeds_change_nothing(engine, world_size, law):
    for run, ranks, alone in pairs(engine, world_size, Runs(engine).plain):
        law(engine, "seeds", furthest("start", ranks, alone), 0, case=run)


@every_engine
def test_deviates_without_communication(engine, world_size, law):
    for run, ranks, alone in pairs(engine, world_size, Runs(engine).silent):
        closest = min(deviation(t.gradients, alone.gradients) for t in ranks)
        law(engine, "off", closest, 1000 * TOLERANCE, case=run)
        assert not any(any(trace.counted.values()) for trace in ranks)


@every_engine
def test_counted_bytes_are_predicted(engine, world_size, law):
    runs = (*Runs(engine).counted, *Runs(engine).of_two_passes)
    for run, ranks, alone in pairs(engine, world_size, runs):
        for trace in ranks:
            differences = [
                abs(counted - trace.predicted.get(key, 0))
                for key, counted in trace.counted.items()
            ]
            law(engine, "bytes", max(differences), 0, case=run)
        assert furthest("end", ranks, alone) <= TOLERANCE


@every_engine
def test_bad_input_raises_on_every_rank(engine, world_size, law):
    ranks = laws.trained(engine, world_size).refusals
    for problem in ranks[0]:
        num_accepting = sum(not is_refused[problem] for is_refused in ranks)
        law(engine, "bad_input", num_accepting, 0, case=problem)


UNTUNED = [(*place, case) for place in SIZES for case in ENGINES[place[0]].untuned]


@pytest.mark.parametrize(("engine", "world_size", "case"), on(UNTUNED))
def test_models_nobody_tuned_for(engine, world_size, case, law):
    runs = (run for run in Runs(engine).plain if run.case == case)
    for run, ranks, alone in pairs(engine, world_size, runs):
        for part in ("gradients", "end"):
            far = furthest(part, ranks, alone)
            if CASES[case].dtype == torch.bfloat16:
                law(engine, "bfloat16", far, BFLOAT16_TOLERANCE, case=run)
            else:
                law(engine, "models", far, TOLERANCE, case=run)


EXACT = [place for place in SIZES if place[1] in laws.EXACT_SIZES]


@pytest.mark.parametrize(("engine", "world_size"), on(EXACT))
def test_sums_in_order_are_bitwise(engine, world_size, law):
    runs = Runs(engine).in_order
    for run, ranks, alone in pairs(engine, world_size, runs, in_order=True):
        # torch rounds bfloat16 `add(alpha=...)` otherwise in the last few elements of a
        # tensor, so an optimizer of slices may differ in them.
        is_rough = CASES[run.case].dtype == torch.bfloat16
        for part in ("gradients",) if is_rough else ("gradients", "end"):
            far = furthest(part, ranks, alone)
            law(engine, "bitwise", far, 0, case=run)

"""The laws that every engine obeys; `make laws` writes what they measure."""

import pytest

from labpkg import World
from tests.parallelism import laws
from tests.parallelism.engines import ENGINES
from tests.parallelism.laws import RUNS, TOLERANCE, deviation
from tests.parallelism.models import CASES, TUNED, UNTUNED

BFLOAT16_TOLERANCE = 2.0**-5  # four units in the last place

every_size = pytest.mark.parametrize("world_size", [2, 3, 4])
every_engine = pytest.mark.parametrize("engine", ENGINES)


def pairs(engine, world_size, runs, *, num_shards=1):
    """Yield each run with its traces: of all ranks, of one process."""
    ranks = laws.trained(engine, world_size)
    alone = laws.trained_alone(num_shards)
    for run in runs:
        yield run, ranks[run], alone[run.alone]


def runs_of_the_book():
    return [run for run in RUNS if run.case in TUNED]


def furthest(part, traces, want) -> float:
    return max(deviation(getattr(t, part), getattr(want, part)) for t in traces)


@every_size
@every_engine
def test_output_is_that_of_one_process(engine, world_size, law):
    for run, ranks, alone in pairs(engine, world_size, runs_of_the_book()):
        output = ENGINES[engine].assemble([trace.output for trace in ranks])
        far = deviation({"": output}, {"": alone.output})
        law(engine, "output", far, TOLERANCE, case=run)


@every_size
@every_engine
def test_gradients_are_those_of_one_process(engine, world_size, law):
    for run, ranks, alone in pairs(engine, world_size, runs_of_the_book()):
        far = furthest("gradients", ranks, alone)
        law(engine, "gradients", far, TOLERANCE, case=run)


@every_size
@every_engine
def test_parameters_after_five_steps(engine, world_size, law):
    for run, ranks, alone in pairs(engine, world_size, runs_of_the_book()):
        law(engine, "parameters", furthest("end", ranks, alone), TOLERANCE, case=run)
        assert furthest("end", ranks, ranks[0]) == 0


@every_size
@every_engine
def test_other_seeds_change_nothing(engine, world_size, law):
    for case in CASES.values():
        model, other = (case.model(laws.SEED + r).state_dict() for r in (0, 1))
        assert deviation(other, model) > 1e-3
    for run, ranks, alone in pairs(engine, world_size, RUNS):
        law(engine, "seeds", furthest("start", ranks, alone), 0, case=run)


@every_size
@every_engine
def test_deviates_without_communication(engine, world_size, law):
    for run, ranks, alone in pairs(engine, world_size, laws.SILENT_RUNS):
        closest = min(deviation(t.gradients, alone.gradients) for t in ranks)
        law(engine, "off", closest, 1000 * TOLERANCE, case=run)
        assert not any(any(trace.counted.values()) for trace in ranks)


@every_size
@every_engine
def test_counted_bytes_are_predicted(engine, world_size, law):
    cases = {run.case for run in laws.RUNS_OF_TWO_PASSES}
    runs = (run for run in RUNS if run.case in cases)
    for run, ranks, alone in pairs(
        engine, world_size, (*runs, *laws.RUNS_OF_TWO_PASSES)
    ):
        for trace in ranks:
            differences = [
                abs(counted - trace.predicted.get(key, 0))
                for key, counted in trace.counted.items()
            ]
            law(engine, "bytes", max(differences), 0, case=run)
        assert furthest("end", ranks, alone) <= TOLERANCE


@every_size
@every_engine
def test_bad_input_raises_on_every_rank(engine, world_size, law):
    with World(world_size, device="cpu") as world:
        ranks = world.run(laws.refusals, engine)
    for problem in ranks[0]:
        num_accepting = sum(not is_refused[problem] for is_refused in ranks)
        law(engine, "bad_input", num_accepting, 0, case=problem)


@pytest.mark.parametrize("case", UNTUNED)
@every_size
@every_engine
def test_models_nobody_tuned_for(engine, world_size, case, law):
    runs = (run for run in RUNS if run.case == case)
    for run, ranks, alone in pairs(engine, world_size, runs):
        for part in ("gradients", "end"):
            far = furthest(part, ranks, alone)
            if case == "bfloat16":
                law(engine, "bfloat16", far, BFLOAT16_TOLERANCE, case=run)
            else:
                law(engine, "models", far, TOLERANCE, case=run)


@pytest.mark.parametrize("world_size", laws.EXACT_SIZES)
@every_engine
def test_sums_in_rank_order_are_bitwise(engine, world_size, law):
    runs = laws.ORDERED_RUNS
    for run, ranks, alone in pairs(engine, world_size, runs, num_shards=world_size):
        # torch rounds bfloat16 `add(alpha=...)` otherwise in the last few elements of a
        # tensor, so an optimizer of slices may differ in them.
        parts = ("gradients",) if run.case == "bfloat16" else ("gradients", "end")
        for part in parts:
            far = furthest(part, ranks, alone)
            law(engine, "bitwise", far, 0, case=run)

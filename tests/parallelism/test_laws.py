"""The laws that every engine obeys; `make laws` writes what they measure."""

import pytest
import torch

from labpkg import World
from tests.parallelism import laws
from tests.parallelism.engines import ENGINES
from tests.parallelism.laws import OPTIMIZERS, TOLERANCE, Run, deviation
from tests.parallelism.models import CASES, TUNED, UNTUNED

BFLOAT16_TOLERANCE = 2.0**-5  # four units in the last place

every_size = pytest.mark.parametrize("world_size", [2, 3, 4])
every_engine = pytest.mark.parametrize("engine", ENGINES)


def runs_of(cases, **options) -> tuple[Run, ...]:
    return tuple(
        Run(case=case, optimizer=optimizer, **options)
        for case in cases
        for optimizer in OPTIMIZERS
    )


def pairs(engine, world_size, cases):
    """Yield each run of these cases with its traces: of all ranks, of one process."""
    runs = runs_of(cases)
    ranks, alone = laws.trained(engine, world_size, runs), laws.trained_alone(runs)
    for run in runs:
        yield run, ranks[run], alone[run]


def furthest(part, traces, want) -> float:
    return max(deviation(getattr(t, part), getattr(want, part)) for t in traces)


@every_size
@every_engine
def test_the_output_is_that_of_one_process(engine, world_size, law):
    for run, ranks, alone in pairs(engine, world_size, TUNED):
        output = ENGINES[engine].assemble([trace.output for trace in ranks])
        far = deviation({"": output}, {"": alone.output})
        law(engine, "output", far, TOLERANCE, case=run)


@every_size
@every_engine
def test_every_gradient_is_that_of_one_process(engine, world_size, law):
    for run, ranks, alone in pairs(engine, world_size, TUNED):
        far = furthest("gradients", ranks, alone)
        law(engine, "gradients", far, TOLERANCE, case=run)


@every_size
@every_engine
def test_parameters_are_those_of_one_process_after_five_steps(engine, world_size, law):
    for run, ranks, alone in pairs(engine, world_size, TUNED):
        far = furthest("end", ranks, alone)
        law(engine, "parameters", far, TOLERANCE, case=run)
        assert furthest("end", ranks, ranks[0]) == 0


@every_size
@every_engine
def test_other_seeds_on_other_ranks_change_nothing(engine, world_size, law):
    for case in (*TUNED, *UNTUNED):
        model, other = (CASES[case].model(laws.SEED + r).state_dict() for r in (0, 1))
        assert deviation(other, model) > 1e-3
    for cases in (TUNED, UNTUNED):
        for run, ranks, alone in pairs(engine, world_size, cases):
            law(engine, "seeds", furthest("start", ranks, alone), 0, case=run)


@every_size
@every_engine
def test_without_communication_it_deviates(engine, world_size, law):
    runs = runs_of(TUNED, is_silent=True, seed_stride=0)
    ranks, alone = laws.trained(engine, world_size, runs), laws.trained_alone(runs)
    for run in runs:
        closest = min(deviation(t.gradients, alone[run].gradients) for t in ranks[run])
        law(engine, "off", closest, 1000 * TOLERANCE, case=run)
        assert not any(any(trace.counted.values()) for trace in ranks[run])


@pytest.mark.parametrize("num_passes", [1, 2])
@every_size
@every_engine
def test_counted_bytes_are_the_predicted_ones(engine, world_size, num_passes, law):
    cases = (*TUNED, "tied", "frozen", "odd", "convolution")
    runs = tuple(
        Run(case=case, optimizer="AdamW", num_passes=num_passes) for case in cases
    )
    ranks, alone = laws.trained(engine, world_size, runs), laws.trained_alone(runs)
    for run in runs:
        for trace in ranks[run]:
            differences = [
                abs(counted - trace.predicted.get(key, 0))
                for key, counted in trace.counted.items()
            ]
            law(engine, "bytes", max(differences), 0, case=run)
        assert furthest("end", ranks[run], alone[run]) <= TOLERANCE


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
def test_models_that_nobody_tuned_for(engine, world_size, case, law):
    for run, ranks, alone in pairs(engine, world_size, UNTUNED):
        for part in ("gradients", "end") if run.case == case else ():
            far = furthest(part, ranks, alone)
            if case == "bfloat16":
                law(engine, "bfloat16", far, BFLOAT16_TOLERANCE, case=run)
            else:
                law(engine, "models", far, TOLERANCE, case=run)


@pytest.mark.parametrize("world_size", [2, 4])
@every_engine
def test_sums_in_rank_order_are_bitwise_equal(engine, world_size, law):
    options = {"deterministic": True}
    runs = runs_of((*TUNED, *UNTUNED), **options)
    runs += runs_of(TUNED, dtype=torch.float32, **options)
    ranks = laws.trained(engine, world_size, runs)
    alone = laws.trained_alone(runs, num_shards=world_size)
    for run in runs:
        for part in ("gradients", "end"):
            far = furthest(part, ranks[run], alone[run])
            law(engine, "bitwise", far, 0, case=run)

"""A part of the parity matrix: every engine with every feature; `make parity` runs all.

`matrix.covering()` picks products of engines with many features at once, so that few
runs meet every pair; each run is compared in full.
"""

import math

import pytest

import labpkg as lab
from labpkg.planning.layout import SCHEDULES, Layout
from tests.parity import matrix, matrix_results
from tests.parity.matrix import FEATURES, SETS, Setting
from tests.parity.matrix_results import Result, measure

OF_FOUR = matrix.covering()
UNTIED = Setting(  # stages that are sliced share no weight
    base=Layout(pp=2, dp=2, zero=3, schedule="zb-v", num_micro_batches=4),
    features=SETS["all, untied"],
)
ON_META = {"pp": 2, "dp": 2, "tp": 2, "num_micro_batches": 4, "zero": 2}
OF_EIGHT = [
    Setting(
        base=Layout(**ON_META, schedule="zb-v", sequence_parallel=True),
        features=SETS["all"],
    ),
]
REFUSED = [
    setting
    for setting in matrix.whole(4, ["tied", "uneven samples"])
    if setting.impossible and setting.base.schedule == "1f1b"
]


@pytest.fixture(scope="module")
def results(world4):
    found = measure(world4, [*OF_FOUR, UNTIED, *REFUSED])
    with lab.World(8, device="cpu") as world8:
        found += measure(world8, OF_EIGHT)
    return {result.setting: result for result in found}


@pytest.mark.parametrize("setting", [*OF_FOUR, UNTIED, *OF_EIGHT], ids=str)
def test_a_layout_trains_as_one_process(results, setting):
    assert results[setting].refusal is None
    assert results[setting].problem is None


@pytest.mark.parametrize("setting", REFUSED, ids=str)
def test_the_impossible_is_refused_on_every_rank(results, setting):
    assert results[setting].problem is None
    assert setting.impossible in results[setting].refusal


def test_every_engine_meets_every_feature():
    settings = [*OF_FOUR, *REFUSED]
    pairs = {pair for setting in settings for pair in matrix.pairs(setting)}
    engines = {f"pipeline {name}" for name in SCHEDULES} | {"data parallel", "tensor"}
    engines |= {"sequence parallel", "zero 1", "zero 2", "zero 3"}
    impossible = {
        (engine, "uneven samples") for engine in engines if "pipeline" in engine
    }
    wanted = {(engine, feature) for engine in engines for feature in FEATURES}
    assert wanted - impossible <= pairs
    assert not any(setting.impossible for setting in OF_FOUR)


def test_the_whole_matrix_is_what_it_says():
    layouts = {n: matrix.layouts(n) for n in (4, 8)}
    assert {n: len(found) for n, found in layouts.items()} == {4: 49, 8: 120}
    for n, found in layouts.items():
        assert {layout.world_size for layout in found} == {n}
        assert len(set(map(str, found))) == len(found)  # the tables tell them apart
        assert len(set.union(*map(matrix.engines, found))) == 11


# ---- the machinery can fail --------------------------------------------------------


def test_another_run_than_that_of_the_process_is_noticed(world2):
    """Ranks clip gradients, or count the targets of other batches; the process not."""
    base = Layout(dp=2)
    for name in ("clipping", "uneven samples", "tied"):
        trained = Setting(base=base, features=SETS[name])
        other = Setting(base=base)
        ranks = world2.run(matrix.train_all, [trained])
        try:
            result = matrix_results.compare(other, [traces[0] for traces in ranks])
        except AssertionError:
            assert name != "clipping"  # other counts, or other names
            continue
        assert result.problem is not None
        assert result.deviations["output"] == 0
        assert result.deviations["gradients"] > 1e-3


@pytest.mark.parametrize("far", [1.1e-12, math.nan, math.inf])
def test_a_deviation_above_its_bound_is_a_problem(far):
    names = matrix_results.QUANTITIES
    setting, bounds = Setting(base=Layout(dp=4)), dict.fromkeys(names, 1e-12)
    fine = dict.fromkeys(names, 1e-12)
    assert Result(setting, None, fine, bounds).problem is None
    for name in names:
        problem = Result(setting, None, fine | {name: far}, bounds).problem
        assert f"dp4: none: {name} is" in problem


def test_refusals_that_nobody_expects_are_problems():
    possible = Setting(base=Layout(dp=4))
    assert "expected refusal None" in Result(possible, "no").problem
    impossible = Setting(base=Layout(pp=4), features=SETS["uneven samples"])
    assert "got None" in Result(impossible, None).problem
    assert "got 'no'" in Result(impossible, "no").problem

"""The form of the answer; how fast something is says `labpkg bench` itself."""

import dataclasses
import itertools
import json
import time

import pytest
import torch

import labpkg as lab
from labpkg import bench
from labpkg.bench import (
    collectives,
    cross_entropy,
    data_loading,
    data_parallel,
    faults,
    optimizers,
    pipeline,
    steps,
    tensor_parallel,
    train,
    zero,
)
from labpkg.processes import transport

# On one of two ranks that has no more of anything than stage 3.
WEIGHTS_AND_STATE = steps.SMALL.shape.num_parameters * (4 + 8) / 2
ROW = {"config", "variant", "wall_ratio", "cpu_ratio", "samples", "value", "unit"}


def planted(*, quick):
    print("a World announces itself")
    row = {"wall_ratio": 1.25, "cpu_ratio": None, "samples": 3, "unit": "ms"}
    return [
        {"config": "one", "variant": "peer", "value": 10.0, **row},
        {"config": "one", "variant": "labpkg", "value": 8.0, **row},
        {"config": "two", "variant": "labpkg:quick", "value": float(quick), **row},
    ]


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'speed'.*data_parallel, .*train"):
        bench.run("speed")


@pytest.mark.parametrize("quick", [False, True])
def test_report_has_the_form_of_its_contract(monkeypatch, capsys, quick):
    monkeypatch.setattr(train, "rows", planted)
    report = bench.run("train", quick=quick)
    assert json.loads(json.dumps(report)) == report
    keys = {"name", "machine", "versions", "date", "command", "rows"}
    assert set(report) == keys
    assert report["name"] == "train"
    assert report["rows"] == planted(quick=quick)
    assert {"cpu", "cores", "gpus"} <= set(report["machine"])
    assert capsys.readouterr().err == "a World announces itself\n"


def test_report_prints_as_one_table_per_configuration(monkeypatch):
    monkeypatch.setattr(train, "rows", planted)
    lines = str(bench.run("train", quick=True)).splitlines()
    assert lines[0].startswith("train on system ")
    assert lines[2] == "one"
    assert lines[4].split() == ["peer", "1.250", "-", "3", "10.000", "ms"]
    assert lines[7] == "two"
    assert len({len(line) for line in lines[3:6]}) == 1


@pytest.mark.parametrize("module", [cross_entropy, train, data_loading, optimizers])
def test_quick_rows(module):
    rows = module.rows(quick=True)
    assert all(set(row) == ROW for row in rows)
    assert all(row["wall_ratio"] > 0 and row["cpu_ratio"] > 0 for row in rows)
    assert all(row["value"] > 0 and row["unit"] == "ms" for row in rows)
    for config in {row["config"] for row in rows}:
        variants = [row["variant"] for row in rows if row["config"] == config]
        assert variants[0] == module.BASE
        assert "labpkg" in variants
        assert len(variants) == len(set(variants))
    for row in rows:
        if row["variant"] == module.BASE:
            assert (row["wall_ratio"], row["cpu_ratio"]) == (1.0, 1.0)


def tables(rows, *bases):
    """Return variant -> row of each table, whose bases come in turns."""
    found = {}
    for row in rows:
        found.setdefault(row["config"], {})[row["variant"]] = row
    assert sum(map(len, found.values())) == len(rows)
    for table, base in zip(found.values(), itertools.cycle(bases), strict=False):
        assert next(iter(table)) == base
        assert (table[base]["wall_ratio"], table[base]["cpu_ratio"]) == (1.0, 1.0)
        for row in table.values():
            assert min(row["wall_ratio"], row["cpu_ratio"], row["value"]) > 0
            assert row["unit"] == "ms"
    return list(found.values())


def test_quick_rows_of_data_parallel():
    rows = data_parallel.rows(quick=True)
    assert all(set(row) == ROW for row in rows)
    found = tables(rows, data_parallel.BASE, data_parallel.BASE_BF16)
    assert len(found) == 4
    for full, half in (found[:2], found[2:]):
        assert {"labpkg", "labpkg:messages", data_parallel.LIMIT} < set(full)
        assert {"labpkg:bfloat16", "labpkg:bfloat16:messages"} < set(half)


def test_quick_rows_of_zero():
    rows = zero.rows(quick=True)
    assert all(set(row) == ROW | {"peak_bytes"} for row in rows)
    stages, freed, kept = tables(rows, zero.BASE, zero.FREED, zero.KEPT)
    assert {f"labpkg:stage {s}" for s in (1, 2)} < set(stages)
    assert {f"labpkg:stage {s}:messages" for s in (1, 2)} < set(stages)
    assert set(freed) == {zero.FREED, "labpkg:stage 3", "labpkg:stage 3:messages"}
    assert {"labpkg:stage 3, kept", "labpkg:stage 3, kept:messages"} < set(kept)
    for table in (stages, freed, kept):
        assert all(row["peak_bytes"] > WEIGHTS_AND_STATE for row in table.values())


def test_quick_rows_of_tensor_parallel():
    rows = tensor_parallel.rows(quick=True)
    assert all(set(row) == ROW for row in rows)
    bases = tensor_parallel.BASE, tensor_parallel.BASE_SEQUENCE
    found = tables(rows, *bases)
    assert len(found) == 4
    for whole, sequence in (found[:2], found[2:]):
        assert {"labpkg", "labpkg:fused"} < set(whole)
        ours = {"labpkg:sequence parallel", "labpkg:fused, sequence parallel"}
        assert ours < set(sequence)


def test_matrices_for_queries_keys_and_values_compute_what_one_does():
    fused = lab.GPT(steps.SMALL)
    tokens = torch.randint(256, (2, 8))
    want = fused(tokens)
    assert torch.allclose(tensor_parallel._split(fused)(tokens), want, atol=1e-5)


def test_quick_rows_of_pipeline():
    rows = pipeline.rows(quick=True)
    assert all(set(row) == ROW for row in rows)
    bases = [pipeline._by_torch(name) for name in pipeline._TORCH]
    everything, *pairs = tables(rows, pipeline.BASE, *bases)
    ours = [f"labpkg:{name}" for name in pipeline._TORCH]
    assert set(everything) == {pipeline.DEFAULT, *bases, *ours}
    assert [[*pair] for pair in pairs] == [
        [*pair] for pair in zip(bases, ours, strict=True)
    ]


def test_a_mesh_of_messages_has_no_shared_memory(world2):
    def run():
        mesh, x = steps.mesh_of_messages(), torch.ones(8)
        whole = lab.make_mesh(dp=2)["dp"]
        channels = [transport._shared(m.get_group(), x) for m in (whole, mesh)]
        return [channel is not None for channel in channels], mesh.mesh_dim_names

    assert world2.run(run) == [([True, False], ("dp",))] * 2


def test_a_variant_that_trains_differently_is_no_result():
    losses = {"peer": 2.0, "labpkg": 2.0, "limit": 1.0}
    steps.check_losses(losses, base="peer", limit="limit")
    with pytest.raises(RuntimeError, match="labpkg ends with loss"):
        steps.check_losses({**losses, "labpkg": 2.1}, base="peer", limit="limit")


def test_matrix_products_are_those_of_the_model():
    from torch.utils.flop_counter import FlopCounterMode

    from labpkg.foundations.models import GPTConfig

    config = GPTConfig(num_layers=2, width=32, num_heads=2, sequence_length=16)
    products = train._matrix_products(config.shape, 3)
    with FlopCounterMode(display=False) as counter:
        products()
    assert counter.get_total_flops() == 3 * 16 * config.shape.flops_per_token


def test_a_report_is_a_record_that_can_be_drawn(monkeypatch, tmp_path):
    from matplotlib import pyplot as plt

    monkeypatch.setattr(train, "rows", planted)
    report = bench.run("train")
    (tmp_path / "recorded_train.json").write_text(json.dumps(report))
    ax = lab.plot.recorded("train", folder=tmp_path)
    assert report["command"] in ax.get_title(loc="left")
    plt.close("all")


def test_collectives_say_their_bus_bandwidth(monkeypatch):
    rows = collectives.rows(quick=True)
    assert {row["collective"] for row in rows} == set(collectives.COLLECTIVES)
    for row in rows:
        sent = lab.wire_bytes(row["collective"], row["num_bytes"], 2)
        assert row["bus_gb_per_s"] * row["value"] * 1e6 == pytest.approx(sent)
        assert ROW | {"collective", "num_bytes", "bus_gb_per_s"} == set(row)
    variants = [row["variant"] for row in rows if row["collective"] == "all_gather"]
    assert variants[:3] == [collectives.BASE, "labpkg", "labpkg:messages"]
    monkeypatch.setattr(collectives, "rows", lambda *, quick: rows)
    header = str(bench.run("collectives", quick=True)).splitlines()[3]
    assert header.split()[-1] == "bus_gb_per_s"


def test_a_collective_that_returns_something_else_is_no_result():
    import torch

    right = {collectives.BASE: torch.ones(3), "labpkg": torch.ones(3)}
    collectives._check(right)
    with pytest.raises(RuntimeError, match="labpkg:ring returns"):
        collectives._check({**right, "labpkg:ring": torch.zeros(3)})


def test_faults_are_measured_against_the_time_that_is_wanted(monkeypatch):
    names = ["sys.exit", "infinite loop in C"]
    monkeypatch.setattr(faults, "FAULTS", {name: faults.FAULTS[name] for name in names})
    rows = faults.rows(quick=True)
    assert all(set(row) == ROW for row in rows)
    variants = [(row["config"].split(":")[0], row["variant"]) for row in rows]
    assert variants == [
        ("a rank fails", "sys.exit"),
        ("a rank hangs", "infinite loop in C"),
        ("an interrupt", "infinite loop in C"),
        ("the kernel is killed", "SIGKILL"),
    ]
    assert all(0 < row["wall_ratio"] < 2 for row in rows)
    assert rows[1]["value"] / rows[1]["wall_ratio"] == pytest.approx(2.5)


def test_a_fault_that_is_reported_otherwise_is_no_result(monkeypatch, world4):
    fault = dataclasses.replace(faults.FAULTS["sys.exit"], says="SystemExit: 4")
    monkeypatch.setitem(faults.FAULTS, "sys.exit", fault)
    with pytest.raises(RuntimeError, match=r"rank 2 is reported as rank 2: SystemExit"):
        faults.measure(world4, "sys.exit", guilty=2)
    with pytest.raises(RuntimeError, match=r"'sleep' of rank 9 is not noticed"):
        faults.measure(world4, "sleep", guilty=9)  # nobody
    with pytest.raises(ValueError, match=r"'sys.exit' is no hang; .*SIGSTOP, sleep"):
        faults.kill_kernel("sys.exit")


def test_a_kernel_that_starts_no_ranks_is_no_result(monkeypatch):
    monkeypatch.setattr(faults, "_KERNEL", "import time; time.sleep(60)")
    monkeypatch.setattr(faults, "_START_S", 0.2)
    start_s = time.monotonic()
    with pytest.raises(RuntimeError, match="started no ranks"):
        faults.kill_kernel()
    assert time.monotonic() - start_s < 30  # it did not wait for that kernel

"""That rates are work over time, and that what is measured can be planned with."""

import json
import time

import pytest

from labpkg.bench import hardware
from labpkg.planning.hardware import HARDWARE, find_hardware, hardware_json


def row(field, value, unit, key=None, config="CPU"):
    return {"config": config, "field": field, "key": key, "value": value, "unit": unit}


def rows(config="CPU", bf16=400.0, fp32=50.0):
    return [
        row("gpus_per_node", 2.0, "", config=config),
        row("peak_flops", bf16, "GFLOP/s", "bf16"),
        row("peak_flops", 300.0, "GFLOP/s", "fp16"),
        row("peak_flops", fp32, "GFLOP/s", "fp32"),
        row("memory_bytes_per_s", 20.0, "GB/s"),
        row("memory_bytes", 8.0, "GB"),
        row("node_latency_s", 77.0, "us"),
        row("node_bytes_per_s", 4.0, "GB/s"),
    ]


def test_rates_are_work_over_time(world2):
    def with_planted_times():
        hardware._seconds = lambda call, quick: hardware._Measured(0.01, 5)
        hardware._all_reduce_s = lambda num_bytes, quick: hardware._Measured(
            10e-6 + num_bytes / 2e9, 5
        )
        return hardware._measure(quick=True)

    found = world2.run(with_planted_times)[0]
    values = {
        (row["field"], row["key"]): row["value"] * hardware._UNITS[row["unit"]]
        for row in found
    }
    product = 2 * 256**3 / 0.01
    assert values.pop(("gpus_per_node", None)) == 2
    for precision in ("bf16", "fp16", "fp32"):
        assert values.pop(("peak_flops", precision)) == pytest.approx(product)
    copied = values.pop(("memory_bytes_per_s", None))
    assert copied == pytest.approx(2 * 2**20 / 0.01)
    # Two ranks on a ring: two steps, and each sends the tensor once.
    assert values.pop(("node_latency_s", None)) == pytest.approx(5e-6, rel=1e-3)
    rate = values.pop(("node_bytes_per_s", None))
    assert rate == pytest.approx(2**20 / (10e-6 + 2**20 / 2e9))
    assert 2e8 < values.pop(("memory_bytes", None)) < 1e14
    assert not values


def test_a_rank_has_its_part_of_the_memory_of_a_cpu(monkeypatch):
    class Memory:
        total = 12.0

    monkeypatch.setattr(hardware.psutil, "virtual_memory", Memory)
    assert hardware._capacity(3, on_gpu=False) == 4


def test_as_many_bytes_are_moved_as_are_divided_by_the_time(monkeypatch):
    held = []

    def plant(call, quick):
        held.append([cell.cell_contents.nbytes for cell in call.__closure__])
        return hardware._Measured(2.0)

    monkeypatch.setattr(hardware, "_seconds", plant)
    assert hardware._copy(4096, quick=True).value == 4096
    hardware._all_reduce_s(1024, quick=True)
    assert held == [[4096, 4096], [1024]]


def test_times_are_in_seconds():
    assert 0.01 < hardware._seconds(lambda: time.sleep(0.01), quick=True).value < 1


def test_this_machine_is_an_entry(world2, tmp_path):
    found = world2.run(hardware._measure, True)[0]
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"rows": found, **hardware.summary(found)}))
    entry = find_hardware(str(path))
    assert entry.name == "this machine (CPU, one thread per rank)"
    assert entry.gpus_per_node == 2
    assert 1e7 < entry.peak_flops["fp32"] < 1e14
    assert 1e6 < entry.node_bytes_per_s < 1e13


def test_unknown_processor_has_its_best_product_as_peak():
    entry = hardware._entry(rows())
    assert not entry.power_limited
    assert entry.peak_flops == {"bf16": 400e9, "fp16": 300e9, "fp32": 50e9}
    assert entry.matmul_fraction == 1
    assert entry.memory_bytes == 8e9
    assert entry.node_latency_s == pytest.approx(77e-6)
    assert "nominal peak is unknown" in entry.sources["peak_flops"]
    assert "assumed" in entry.sources["network_bytes_per_s"]


@pytest.mark.parametrize(
    ("torch_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("A100-SXM4-80GB", "a100-80gb"),  # of old drivers
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_known_gpu_keeps_its_nominal_peak(torch_name, name):
    peak = HARDWARE[name].peak_flops
    entry = hardware._entry(rows(torch_name, bf16=peak["bf16"] / 2e9))
    assert entry.peak_flops == peak
    assert entry.matmul_fraction == pytest.approx(0.5)
    assert entry.power_limited is HARDWARE[name].power_limited
    assert set(entry.sources) == set(HARDWARE[name].sources)
    above = hardware._entry(rows(torch_name, bf16=peak["bf16"] / 0.5e9))
    assert above.matmul_fraction == 1


@pytest.mark.parametrize(
    "relative",
    ["NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"],
)
def test_relatives_and_slices_of_a_known_gpu_are_unknown(relative):
    assert hardware._entry(rows(relative)).peak_flops["bf16"] == 400e9


@pytest.mark.parametrize(
    ("num_gpus", "device", "asked"),
    [
        (0, None, (2, None)),
        (0, "cuda", (2, "cuda")),  # World says that there is none
        (1, None, (1, "cuda")),
        (8, "cuda", (8, "cuda")),
        (8, "cpu", (2, "cpu")),
    ],
)
def test_all_gpus_are_measured_or_two_ranks(monkeypatch, num_gpus, device, asked):
    class Planted:
        def __init__(self, world_size, *, device, timeout_s):
            assert (world_size, device) == asked

        __enter__ = lambda self: self
        __exit__ = lambda self, *error: None
        run = lambda self, fn, quick: [rows(), None][: asked[0]]

    monkeypatch.setattr(hardware, "World", Planted)
    monkeypatch.setattr(hardware.torch.cuda, "device_count", lambda: num_gpus)
    assert hardware.measure_hardware(quick=True, device=device).memory_bytes == 8e9


def test_one_gpu_alone_sends_nothing():
    entry = hardware._entry(rows()[:-2])
    assert entry.node_bytes_per_s == entry.memory_bytes_per_s / 2
    for name in ("node_bytes_per_s", "node_latency_s"):
        assert "one GPU sends nothing" in entry.sources[name]
    assert json.loads(hardware_json(entry))["gpus_per_node"] == 2

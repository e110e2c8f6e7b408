import dataclasses
import json
import pickle
from types import MappingProxyType

import pytest

from labpkg.planning.hardware import (
    HARDWARE,
    PRECISIONS,
    Hardware,
    find_hardware,
    hardware_json,
)

# Bus bandwidth in GB/s of 256 MB on nodes of 8 H100: all-gather, reduce-scatter.
# Tazi et al. 2025, The Ultra-Scale Playbook, Hugging Face, Apache-2.0.
MEASURED = {
    1: (249.85, 249.73),
    2: (184.61, 181.55),
    4: (118.97, 115.76),
    8: (69.0, 68.55),
    16: (54.97, 54.52),
    32: (27.97, 27.94),
    64: (11.04, 11.07),
}


@pytest.mark.parametrize("entry", HARDWARE.values(), ids=lambda entry: entry.name)
def test_every_number_has_a_source(entry):
    numbers = {field.name for field in dataclasses.fields(Hardware)}
    assert set(entry.sources) == numbers - {"name", "sources"}
    assert all(len(source) > 20 for source in entry.sources.values())
    assert set(entry.peak_flops) == set(PRECISIONS)


def test_peaks_are_clock_times_units():
    # Tensor cores, multiply-adds of each per clock, clock in Hz.
    for name, cores, width, clock in (
        ("a100-80gb", 432, 256, 1410e6),
        ("a100-40gb", 432, 256, 1410e6),
        ("h100", 528, 512, 1830e6),
        ("h200", 528, 512, 1830e6),
        ("mi300x", 1216, 256, 2100e6),
    ):
        peak = HARDWARE[name].peak_flops
        assert peak["bf16"] == pytest.approx(2 * cores * width * clock, rel=1e-3)
        assert peak["fp16"] == peak["bf16"] > 7 * peak["fp32"]


def test_peaks_are_half_of_what_datasheets_list_with_sparsity():
    listed = {"a100-80gb": 624, "h100": 1979, "h100-pcie": 1513, "h100-nvl": 1671}
    for name, tera in {**listed, "h200": 1979, "b200": 4500, "mi300x": 2615}.items():
        assert HARDWARE[name].peak_flops["bf16"] == pytest.approx(tera * 5e11, rel=1e-3)


def test_memory_moves_two_bits_per_wire_and_clock():
    for name, wires, clock in (
        ("a100-40gb", 5120, 1215e6),
        ("a100-80gb", 5120, 1593e6),
        ("h100", 5120, 2619e6),
        ("h100-pcie", 5120, 1593e6),
        ("h100-nvl", 6016, 2619e6),
        ("h200", 6144, 3201e6),
        ("b200", 7680, 3996e6),
        ("mi300x", 8192, 2600e6),
    ):
        rate = 2 * wires * clock / 8
        assert HARDWARE[name].memory_bytes_per_s == pytest.approx(rate, rel=0.025)


def test_single_precision_peaks_are_clock_times_units():
    for name, lanes, clock in (
        ("a100-80gb", 6912, 1410e6),
        ("h100", 16896, 1980e6),
        ("h100-pcie", 14592, 1755e6),
        ("h100-nvl", 16896, 1785e6),
        ("h200", 16896, 1980e6),
        ("mi300x", 304 * 128, 2100e6),
    ):
        peak = HARDWARE[name].peak_flops["fp32"]
        assert peak == pytest.approx(2 * lanes * clock, rel=0.01)


def test_best_products_are_those_measured():
    for name, tera in (
        ("a100-80gb", 271.2),
        ("h100", 794.5),
        ("h100-pcie", 495.93),
        ("b200", 1745),
        ("mi300x", 668.4),
    ):
        entry = HARDWARE[name]
        reached = entry.peak_flops["bf16"] * entry.matmul_fraction
        assert reached == pytest.approx(tera * 1e12, rel=2e-3)


def test_gpus_of_700_watts_are_limited_by_power():
    limited = {name for name, entry in HARDWARE.items() if entry.power_limited}
    assert limited == {"h100", "h200", "b200", "mi300x"}


def test_collectives_reach_most_of_the_links_and_no_more():
    # In one direction: of a GPU in its node, of all network cards of a node.
    for name, node, network in (
        ("a100-80gb", 300e9, 200e9),
        ("a100-40gb", 300e9, 200e9),
        ("h100", 450e9, 400e9),
        ("h200", 450e9, 400e9),
        ("b200", 900e9, 400e9),
        ("mi300x", 448e9, 400e9),
    ):
        entry = HARDWARE[name]
        assert 0.65 < entry.node_bytes_per_s / node < 0.85
        assert 0.75 < entry.network_rate(2) / network < 0.85
        assert 1e-6 < entry.node_latency_s < 1e-5 < entry.network_latency_s < 1e-4
    for name in ("h100-pcie", "h100-nvl"):
        assert HARDWARE[name].network_rate(2) < HARDWARE[name].node_bytes_per_s < 63e9


def test_memory_is_a_little_less_than_its_name_in_gib():
    for name, named in (
        ("a100-40gb", 40),
        ("a100-80gb", 80),
        ("h100", 80),
        ("h100-pcie", 80),
        ("h100-nvl", 94),
        ("h200", 141),
        ("b200", 180),
        ("mi300x", 192),
    ):
        assert 0.98 < HARDWARE[name].memory_bytes / (named * 2**30) < 1


@pytest.mark.parametrize("nodes", MEASURED)
def test_latency_explains_why_bus_bandwidth_falls_with_nodes(nodes):
    h100, n, size = HARDWARE["h100"], 8 * nodes, 256e6
    sent = (n - 1) / n * size
    predicted_s = (n - 1) * h100.network_latency_s + sent / h100.network_rate(nodes)
    for measured in MEASURED[nodes]:
        assert predicted_s / (sent / (measured * 1e9)) == pytest.approx(1, abs=0.22)


def test_network_rate_is_that_of_the_largest_count_not_above():
    table = {2: 4e9, 8: 2e9}
    entry = dataclasses.replace(HARDWARE["h100"], network_bytes_per_s=table)
    rates = [entry.network_rate(nodes) for nodes in (1, 2, 7, 8, 4096)]
    assert rates == [4e9, 4e9, 4e9, 2e9, 2e9]
    with pytest.raises(ValueError, match="nodes=0 must be at least 1"):
        entry.network_rate(0)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("h100", "h100"),
        ("H100", "h100"),
        (" h100_SXM ", "h100"),
        ("H100 80GB", "h100"),
        ("a100", "a100-80gb"),
        ("A100 40GB", "a100-40gb"),
        ("a100_80gb", "a100-80gb"),
        ("MI300X", "mi300x"),
    ],
)
def test_names_are_found_however_they_are_spelled(name, found):
    assert find_hardware(name) is HARDWARE[found]


def test_unknown_name_lists_the_nearest():
    with pytest.raises(ValueError, match=r"'h10O' is unknown.*h100.*NAME\.json") as e:
        find_hardware("h10O")
    assert "laptop" not in str(e.value)
    with pytest.raises(ValueError, match=r"a100-40gb, .*laptop"):
        find_hardware("~")


@pytest.mark.parametrize("entry", HARDWARE.values(), ids=lambda entry: entry.name)
def test_file_gives_the_entry_back(entry, tmp_path):
    path = tmp_path / "Mine.JSON"
    path.write_text(hardware_json(entry))
    assert find_hardware(str(path)) == entry
    path.write_text(json.dumps({"hardware": json.loads(hardware_json(entry))}))
    assert find_hardware(str(path)) == entry


def test_file_gives_an_entry_with_read_only_tables_back(tmp_path):
    h100, path = HARDWARE["h100"], tmp_path / "mine.json"
    frozen = dataclasses.replace(h100, peak_flops=MappingProxyType(h100.peak_flops))
    path.write_text(hardware_json(frozen))
    assert find_hardware(str(path)) == h100


def test_entry_is_a_key_and_travels():
    entry = HARDWARE["h100"]
    copy = pickle.loads(pickle.dumps(entry))
    assert copy == entry
    assert hash(copy) == hash(entry)
    assert dataclasses.replace(entry, peak_flops={**entry.peak_flops, "bf16": 1.0}) != (
        entry
    )


def test_the_list_cannot_be_changed():
    with pytest.raises(TypeError):
        HARDWARE["mine"] = HARDWARE["h100"]  # pyright: ignore[reportIndexIssue]
    with pytest.raises(dataclasses.FrozenInstanceError):
        HARDWARE["h100"].name = "mine"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_bytes": 0}, r"memory_bytes=0 of 'h100' must be a positive"),
        ({"memory_bytes": -1.0}, "must be a positive, finite"),
        ({"node_bytes_per_s": float("nan")}, "node_bytes_per_s=nan"),
        ({"memory_bytes_per_s": float("inf")}, "memory_bytes_per_s=inf"),
        ({"network_latency_s": "38 us"}, "network_latency_s='38 us'"),
        ({"gpus_per_node": 7.5}, r"gpus_per_node=7\.5 .* whole number"),
        ({"gpus_per_node": 8.0}, r"gpus_per_node=8\.0 .* whole number"),
        ({"power_limited": "no"}, "power_limited='no' of 'h100'; give true or false"),
        ({"matmul_fraction": 1.01}, r"matmul_fraction=1\.01 .* is above 1"),
        ({"matmul_fraction": 80}, r"matmul_fraction=80 .* give 0\.8"),
        ({"peak_flops": {"bf16": 1e12}}, "has no fp16, fp32"),
        (
            {"peak_flops": {"bf16": 1e12, "fp16": 0, "fp32": 1}},
            r"peak_flops\['fp16'\]=0",
        ),
        ({"peak_flops": 1e15}, r"peak_flops=.* of 'h100' must map"),
        ({"network_bytes_per_s": {}}, "needs bytes/s by number of nodes"),
        ({"network_bytes_per_s": {0: 1e9}}, "needs bytes/s by number of nodes"),
        ({"network_bytes_per_s": {"2": 1e9}}, "needs bytes/s by number of nodes"),
        ({"sources": "a datasheet"}, "sources='a datasheet' .* must map"),
        ({"network_bytes_per_s": {2: -1e9}}, r"network_bytes_per_s\[2\]=-1"),
    ],
)
def test_impossible_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HARDWARE["h100"], **changes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"name": "x"}',
        '{"hardware": null}',
        hardware_json(HARDWARE["h100"]).replace('"2":', '"two":'),
        hardware_json(HARDWARE["h100"]).replace('"name":', '"Name":'),
        hardware_json(HARDWARE["h100"]).replace("0.803", "-0.803"),
        hardware_json(HARDWARE["h100"]).replace("0.803", '"80 %"'),
    ],
)
def test_broken_file_is_named_with_the_keys_it_needs(text, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"mine\.json describes no hardware.*keys name"
    ):
        find_hardware(str(path))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*none\.json"):
        find_hardware(str(tmp_path / "none.json"))

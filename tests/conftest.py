"""Fixtures of all tests: warm worlds, and functions that travel to ranks by value."""

from __future__ import annotations

import gc
import signal
import sys
from pathlib import Path

import cloudpickle
import pytest
import torch

import labpkg as lab
from scripts.laws import LAWS, record


def pytest_addoption(parser):
    text = "store what the laws of every engine measure in this JSON file"
    parser.addoption("--laws", type=Path, metavar="PATH", help=text)


def pytest_configure(config):
    # With xdist the reports of all workers arrive at the process that started them.
    if config.option.laws and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Measurements(config.option.laws))
    # A job in the background ignores SIGINT, and so would everything that it starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # As a rank computes. Threads of several workers wait for each other, which takes
    # ten times as long where tensors are small.
    torch.set_num_threads(1)
    # The long repetitions run when they are asked for: `pytest -m soak`.
    if not config.option.markexpr:
        config.option.markexpr = "not soak"


def pytest_collection_modifyitems(items):
    # By reference, every fresh rank would import the test module, and pytest with it.
    for module in {getattr(item, "module", None) for item in items} - {None}:
        cloudpickle.register_pickle_by_value(module)


def pytest_collection_finish():
    # What was imported stays: no collection has to look at its 300,000 objects again.
    # Tests of leaks collect often, and each would take 0.2 s.
    gc.collect()
    gc.freeze()


class Measurements:
    """Collects what tests measured, and stores it after a run without failure."""

    def __init__(self, path):
        self.path, self.rows = path, []

    def pytest_runtest_logreport(self, report):
        for name, value in report.user_properties if report.when == "call" else ():
            if name == "law":
                self.rows.append((report.nodeid.partition("[")[0], *value))

    def pytest_sessionfinish(self, exitstatus):
        if exitstatus == 0:
            record(self.rows, torch.__version__.partition("+")[0], self.path)


@pytest.fixture
def law(record_property):
    """Return a function that asserts a bound of a law in `LAWS`, and records it."""

    def check(engine, name, deviation, tolerance, *, case):
        record_property("law", (engine, name, float(deviation), float(tolerance)))
        if LAWS[name].is_lower_bound:
            assert deviation > tolerance, case
        else:
            assert deviation <= tolerance, case

    return check


# Exactness is tested on the CPU, on every machine; GPUs have tests of their own.
@pytest.fixture(scope="session")
def world2():
    with lab.World(2, device="cpu") as world:
        yield world


@pytest.fixture(scope="session")
def world4():
    with lab.World(4, device="cpu") as world:
        yield world


@pytest.fixture(scope="session")
def fake_world():
    """Return `play(rank, world_size, fn, *args)`: fn on one rank, without the others.

    Collectives return at once, with tensors of the right sizes that mean nothing.
    """
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with lab.World(1, device="cpu") as world:
        yield lambda *args: world.run(as_rank, *args)[0]


def as_rank(rank, world_size, fn, *args):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():  # the real group, or that of another play
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group(
        "fake", rank=rank, world_size=world_size, store=FakeStore()
    )
    return fn(*args)

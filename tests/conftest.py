"""Fixtures of all tests: warm worlds, and functions that travel to ranks by value."""

from __future__ import annotations

import signal

import cloudpickle
import pytest

import labpkg as lab


def pytest_configure(config):
    # A job in the background ignores SIGINT, and so would everything that it starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The long repetitions run when they are asked for: `pytest -m soak`.
    if not config.option.markexpr:
        config.option.markexpr = "not soak"


def pytest_collection_modifyitems(items):
    # By reference, every fresh rank would import the test module, and pytest with it.
    for module in {getattr(item, "module", None) for item in items} - {None}:
        cloudpickle.register_pickle_by_value(module)


# Exactness is tested on the CPU, on every machine; GPUs have tests of their own.
@pytest.fixture(scope="session")
def world2():
    with lab.World(2, device="cpu") as world:
        yield world


@pytest.fixture(scope="session")
def world4():
    with lab.World(4, device="cpu") as world:
        yield world

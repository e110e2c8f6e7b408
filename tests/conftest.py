"""Fixtures of all tests: warm worlds, and functions that travel to ranks by value."""

from __future__ import annotations

import cloudpickle
import pytest

import labpkg as lab


def pytest_configure(config):
    # The long repetitions run when they are asked for: `pytest -m soak`.
    if not config.option.markexpr:
        config.option.markexpr = "not soak"


def pytest_collection_modifyitems(items):
    # By reference, every fresh rank would import the test module, and pytest with it.
    for module in {getattr(item, "module", None) for item in items} - {None}:
        cloudpickle.register_pickle_by_value(module)


@pytest.fixture(scope="session")
def world2():
    with lab.World(2) as world:
        yield world


@pytest.fixture(scope="session")
def world4():
    with lab.World(4) as world:
        yield world

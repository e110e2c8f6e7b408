"""What the tests of runs share."""

import pytest

from tests.runs.launcher import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()

"""The fork server starts with its own environment and leaves that of the launcher."""

import os
import signal

from labpkg.runs import preload


def test_the_server_is_deaf_to_ctrl_c_and_has_one_thread(monkeypatch):
    seen = {}

    def ensure_running():
        seen["handler"] = signal.getsignal(signal.SIGINT)
        seen["threads"] = os.environ["OMP_NUM_THREADS"]

    monkeypatch.setattr(preload.forkserver, "ensure_running", ensure_running)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    before, handler = dict(os.environ), signal.getsignal(signal.SIGINT)
    preload.start_fork_server()
    assert seen == {"handler": signal.SIG_IGN, "threads": "1"}
    assert dict(os.environ) == before
    assert signal.getsignal(signal.SIGINT) is handler

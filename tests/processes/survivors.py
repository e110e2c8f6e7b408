"""Which processes still run; for tests that expect none."""

from __future__ import annotations

import contextlib
import os
import time

import psutil


def started_with(variable):
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.pid != os.getpid() and variable in process.environ():
                yield process.pid


def gone(pids, limit_s):
    deadline = time.monotonic() + limit_s
    while left := [pid for pid in pids if is_running(pid)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.02)
    return []


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""A process that launches jobs for all tests: its fork server is slow to start."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

_SERVER = """
import importlib, json, sys
for line in sys.stdin:
    module, args = json.loads(line)
    print(json.dumps(importlib.import_module(module).main(*args)), flush=True)
"""


class Launcher:
    """Calls `main` of modules, and keeps what they write.

    Args:
        folder: Where it works; modules are found there.

    Attributes:
        temporary: Where it puts temporary files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.temporary = folder, folder / "temporary"
        self.temporary.mkdir()
        self._stderr = (folder / "stderr").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, "TMPDIR": str(self.temporary)},
        )

    def call(self, name: str, source: str, *args: Any, limit_s: float) -> Any:
        """Return what `main(*args)` of a module returns, and what went to stderr."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        (self.folder / f"{name}.py").write_text(source)
        start = os.fstat(self._stderr.fileno()).st_size
        self._process.stdin.write(json.dumps([name, args]) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        answer = self._process.stdout.readline() if ready else ""
        self._stderr.seek(start)
        stderr = self._stderr.read()
        assert answer, f"no answer within {limit_s} s:\n{stderr}"
        return json.loads(answer), stderr

    def close(self) -> None:
        """End the process, and with it its fork server and ranks."""
        try:
            self._process.communicate(timeout=30)  # the end of its input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._stderr.close()

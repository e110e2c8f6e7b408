"""A job on two nodes of which one will die: bash torchrun.sh elastic_job.py OUT.

A round may begin before the second node is there; then the ranks wait, and the agent
starts them anew when it comes. The ranks of node 1 stop before step 8, as if it were a
long one, and wait for their end: what a failure interrupts is the same each time.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import labpkg as lab


def train(out: Path, *callbacks: lab.Callback) -> lab.TrainResult:
    """Train the digits for 40 steps, and save every 5; go on where `out` ends."""
    options = {"data": "digits", "precision": "fp64", "device": "cpu", "steps": 40}
    options |= {"global_batch_size": 16, "checkpoint_every": 5, "resume": "auto"}
    return lab.Trainer(lab.TrainConfig(**options, out=out), callbacks).run()


class StopBefore(lab.Callback):
    """Do nothing more when so many steps are done."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def before_step(self, run: Any) -> None:
        """Wait for the end."""
        while run.step == self.steps:
            signal.pause()


if __name__ == "__main__":
    out = Path(sys.argv[1])
    is_first = not any(out.glob("checkpoints/step_*"))
    if is_first and os.environ["GROUP_WORLD_SIZE"] == "1":
        signal.pause()  # until the agent ends this rank
    faults = [StopBefore(7)] if os.environ["NODE"] == "1" else []
    result = train(out, *faults)
    if os.environ["RANK"] == "0":
        print(json.dumps({"ranks": result.num_ranks, "from": result.resumed_from}))

"""A job that was killed and started again ends with the weights of one that was not.

Jobs run in a process of their own: the launcher starts a fork server. A busy machine
needs long to start that; the jobs themselves take seconds.
"""

import os
import random

import pytest
import torch

_JOBS = """
import os, signal
from pathlib import Path
import torch
import torch.distributed as dist
import labpkg as lab
from labpkg.runs.callbacks import Callback
from labpkg.runs.config import TrainConfig
from labpkg.runs.faults import LossSpike, Preemption, SkippedSteps
from labpkg.runs.launch import launch
from labpkg.runs.trainer import Trainer

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Kill(Callback):
    "End one rank of the first attempt: before a step, or inside a save."

    def __init__(self, rank, step, flush):
        self.rank, self.step, self.flush = rank, step, flush

    def on_start(self, run):
        run.config.out.mkdir(parents=True, exist_ok=True)
        (run.config.out / f"start_{run.step}").touch()
        is_due = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        self.is_due = is_due and dist.get_rank() == self.rank
        if self.is_due and self.flush is not None:
            fsync = os.fsync
            def flush(fd):
                self.flush -= 1
                if self.flush < 0:
                    (run.config.out / "died_saving").touch()
                    die()
                fsync(fd)
            os.fsync = flush

    def before_step(self, run):
        if self.is_due and run.step + 1 == self.step:
            die()

    def on_end(self, run):
        state = lab.full_state_dict(run.composition.model)
        if run.is_first:
            torch.save(state, run.config.out / "weights.pt")

def job(out, steps, every, kill):
    config = TrainConfig(data="digits", global_batch_size=16, out=Path(out),
                         steps=steps, checkpoint_every=every)
    callbacks = Preemption(), SkippedSteps(), LossSpike(), Kill(*kill)
    return Trainer(config, callbacks).run().steps

def main(folder, steps, every, kills):
    return [
        launch(job, f"{folder}/{name}", steps, every, kill, num_ranks=2, max_restarts=1)
        for name, kill in kills.items()
    ]
"""


def _run(launcher, folder, steps, every, kills, limit_s):
    """Run jobs by name; return the weights that each ended with."""
    args = str(folder), steps, every, kills
    done, _ = launcher.call("kills", _JOBS, *args, limit_s=limit_s)
    assert done == [[steps] * 2] * len(kills)
    return {name: torch.load(folder / name / "weights.pt") for name in kills}


def _assert_equal(weights, whole):
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def _starts(folder):
    """The steps from which attempts of a job started."""
    return sorted(int(path.name[6:]) for path in folder.glob("start_*"))


@pytest.mark.timeout(300)
def test_a_killed_job_ends_with_the_weights_of_one_that_was_not(tmp_path, launcher):
    kills = {"whole": (0, 0, None), "training": (1, 7, None), "saving": (0, 0, 5)}
    weights = _run(launcher, tmp_path, 12, 4, kills, limit_s=280)
    assert _starts(tmp_path / "whole") == [0]
    assert _starts(tmp_path / "training") == [0, 4]
    assert (tmp_path / "saving" / "died_saving").exists()
    assert len(_starts(tmp_path / "saving")) == 2
    for name in ("training", "saving"):
        _assert_equal(weights[name], weights["whole"])


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_random_points(tmp_path, launcher, seed):
    draw = random.Random(seed)
    kills: dict[str, tuple] = {"whole": (0, 0, None)}
    for number in range(5):
        rank = draw.randrange(2)
        kills[f"step{number}"] = (rank, draw.randint(1, 200), None)
        kills[f"save{number}"] = (0, 0, draw.randrange(30))
    weights = _run(launcher, tmp_path, 200, 20, kills, limit_s=800)
    for name in kills:
        _assert_equal(weights[name], weights["whole"])
        died = os.path.exists(tmp_path / name / "died_saving")
        assert died == name.startswith("save")

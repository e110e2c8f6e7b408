"""The command line: `labpkg COMMAND`, also `python -m labpkg COMMAND`.

A mistake of the user is answered in one line with the remedy and exit code 2; a failure
of a rank with its traceback and exit code 1; Ctrl-C with one line and exit code 130. A
run that was asked to stop, and has saved its state, ends with exit code 75: the same
command with --resume goes on. To torchrun any code but 0 is a failure: a torchrun that
got the signal itself ends, and one on another node that has restarts left goes on with
the nodes that remain.
Stand-alone, `train` and `run` start their ranks; in a process where RANK is set
(torchrun, Slurm, mpirun) they are a rank and join the others.

Chapters: foundations/setup, parallelism/data_parallel.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from labpkg import __version__
from labpkg.runs.config import TrainConfig

if TYPE_CHECKING:
    from labpkg.runs.result import TrainResult

_BAD_INPUT, _FAILED, _INTERRUPTED = 2, 1, 130
_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions(TrainConfig):
    """Train a small model; without options on all GPUs, else on two CPU ranks.

    Args:
        max_restarts: Restarts after a rank has failed, each from the newest checkpoint.
        json: Print the result as JSON.
    """

    max_restarts: int = 0
    json: bool = False

    def __post_init__(self) -> None:
        # Validated by `config`, whose error is one line and not the parser's box.
        pass

    def config(self) -> TrainConfig:
        """Return the part that describes the run.

        Raises:
            ValueError: If a value is not possible.
        """
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts={self.max_restarts} is below 0; choose 0")
        return TrainConfig(
            **{f.name: getattr(self, f.name) for f in fields(TrainConfig)}
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: The arguments after the program's name; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, *rest = arguments or ["--help"]
    if command not in _COMMANDS:
        return _top_level(command)
    try:
        return _COMMANDS[command](rest)
    except (ValueError, OSError) as error:
        _complain(command, error)
        return _BAD_INPUT
    except KeyboardInterrupt as interrupt:
        _complain(command, " ".join(["interrupted", *map(str, interrupt.args)]))
        return _INTERRUPTED


def _top_level(command: str) -> int:
    if command in ("--version", "-V"):
        print(f"labpkg {__version__}")
        return 0
    known = ", ".join(_COMMANDS)
    if command not in ("--help", "-h"):
        _complain(command, f"there is no such command; choose one of {known}")
        return _BAD_INPUT
    print("usage: labpkg COMMAND [OPTIONS]; COMMAND --help says more\n")
    for name, run in _COMMANDS.items():
        print(f"  {name:8} {(run.__doc__ or '').splitlines()[0]}")
    return 0


def _complain(command: str, what: object) -> None:
    print(f"labpkg {command}: {what}", file=sys.stderr)


# train -----------------------------------------------------------------------------


def _train(argv: list[str]) -> int:
    """Train a small GPT on the source of Python's library (the main job)."""
    started = time.time()
    options = _parse_train(argv)
    config = options.config()
    if "RANK" in os.environ:
        from labpkg.runs.trainer import train

        result = _as_rank("train", train, config)
        is_first = os.environ["RANK"] == "0"
    else:
        result = _launch_train(config, options.max_restarts)
        is_first = True
    if is_first:
        _print_result(result, started, options.json)
    return _STOPPED if result.stopped is not None else 0


def _parse_train(argv: list[str]) -> TrainOptions:
    try:
        import tyro
    except ImportError:
        raise ValueError(
            "reading options needs tyro, which is not installed; run: "
            f"{sys.executable} -m pip install tyro"
        ) from None
    return tyro.cli(
        TrainOptions,
        args=_complete_resume(argv),
        prog="labpkg train",
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _complete_resume(argv: list[str]) -> list[str]:
    """Let `--resume` stand alone for `--resume newest`."""
    completed = []
    for argument, following in zip(argv, [*argv[1:], "--"], strict=True):
        completed.append(argument)
        if argument == "--resume" and following.startswith("--"):
            completed.append("newest")
    return completed


def _launch_train(config: TrainConfig, max_restarts: int) -> TrainResult:
    from labpkg.runs.preload import start_fork_server

    start_fork_server()  # first: it imports torch while this process does the same
    from labpkg.runs.checkpoint import newest_checkpoint
    from labpkg.runs.start import clean_up_after, set_aside
    from labpkg.runs.trainer import check_config, train

    config = check_config(config)
    for note in set_aside(config):  # see Note [once per job] there
        print(note, file=sys.stderr)
    folder = config.out / "checkpoints"
    try:
        try:
            num_ranks = config.layout.world_size
            return _launch(
                "train", train, config, num_ranks=num_ranks, max_restarts=max_restarts
            )[0]
        finally:
            clean_up_after(config)
    except KeyboardInterrupt:
        newest, _ = newest_checkpoint(folder)
        if newest is None:
            raise
        hint = f"(newest checkpoint {newest}; the same command with --resume goes on)"
        raise KeyboardInterrupt(hint) from None


def _print_result(result: TrainResult, started: float, as_json: bool) -> None:
    first = result.first_step_time
    first_step_s = None if first is None else first - started
    if as_json:
        print(json.dumps({**asdict(result), "first_step_s": first_step_s}))
    else:
        when = (
            "" if first_step_s is None else f" First step after {first_step_s:.1f} s."
        )
        print(f"{result}{when}")


# run -------------------------------------------------------------------------------


def _run(argv: list[str]) -> int:
    """Run a function of a file on several ranks: labpkg run FILE.py:FUNCTION."""
    parser = argparse.ArgumentParser(prog="labpkg run", description=_run.__doc__)
    parser.add_argument("target", metavar="FILE.py:FUNCTION")
    parser.add_argument(
        "arguments", metavar="NAME=VALUE", nargs="*", help="what it is called with"
    )
    parser.add_argument("--nproc", type=int, help="ranks; all GPUs, else 2")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where ranks run")
    parser.add_argument("--max-restarts", type=int, default=0, help="after a failure")
    parser.add_argument("--json", action="store_true", help="print values as JSON")
    options = parser.parse_intermixed_args(argv)
    from labpkg.runs.target import find_function, parse_arguments

    path, function, parameters = find_function(options.target)
    given = parse_arguments(options.arguments, parameters)
    call = (path, function, options.device, given)
    if "RANK" in os.environ:
        from labpkg.runs.joining import call_in_file

        values = [_as_rank("run", call_in_file, *call)]
        first = int(os.environ["RANK"])
    else:
        values = _launch_run(call, options)
        first = 0
    if options.json:
        print(json.dumps([json.loads(value) for value in values]))
        return 0
    for rank, value in enumerate(values, first):
        if value != "null":
            print(f"[{rank}] {value}")
    return 0


def _launch_run(call: tuple, options: argparse.Namespace) -> list[str]:
    from labpkg.runs.preload import start_fork_server

    start_fork_server()
    import torch

    from labpkg.processes.mesh import choose_placement
    from labpkg.runs.joining import call_in_file

    num_gpus = 0 if options.device == "cpu" else torch.cuda.device_count()
    num_ranks = options.nproc if options.nproc is not None else num_gpus or 2
    choose_placement(num_ranks, device=options.device)
    restarts = options.max_restarts
    return _launch(
        "run", call_in_file, *call, num_ranks=num_ranks, max_restarts=restarts
    )


# doctor and bench ------------------------------------------------------------------


def _doctor(argv: list[str]) -> int:
    """Say whether this machine can run the main job, and what to repair."""
    parser = argparse.ArgumentParser(prog="labpkg doctor", description=_doctor.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    from labpkg import doctor

    return doctor.main(json=options.json)


def _bench(argv: list[str]) -> int:
    """Measure a part of the library against its peers: labpkg bench NAME."""
    parser = argparse.ArgumentParser(prog="labpkg bench", description=_bench.__doc__)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    from labpkg import bench

    report = bench.run(options.name, quick=options.quick)
    print(json.dumps(report) if options.json else report)
    return 0


# tables of jobs --------------------------------------------------------------------


def _plan(argv: list[str]) -> int:
    """Choose how a training job is divided: labpkg plan --world-size N."""
    from labpkg import plan_command

    return plan_command.run(argv)


def _predict(argv: list[str]) -> int:
    """Predict speed and memory of jobs: labpkg predict CONFIGS.csv --out PRED.csv."""
    from labpkg import table_commands

    return table_commands.predict(argv)


def _score(argv: list[str]) -> int:
    """Score predictions: labpkg score PRED.csv MEASURED.csv."""
    from labpkg import table_commands

    return table_commands.score(argv)


# ranks -----------------------------------------------------------------------------


def _launch(command: str, function: Callable[..., Any], *args: Any, **how: Any) -> list:
    from labpkg.runs.launch import JobFailed, launch

    try:
        return launch(function, *args, **how)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # a progress bar that was killed leaves its line open
        raise
    except SystemExit as end:
        print(file=sys.stderr)
        _complain(command, f"ended by {signal.Signals(int(end.code or 0) - 128).name}")
        raise
    except JobFailed as error:
        print(file=sys.stderr)
        if error.refusal and command == "train":
            _complain(command, error.refusal)
            raise SystemExit(_BAD_INPUT) from None
        print(error.details, end="", file=sys.stderr)
        _complain(command, error)
        raise SystemExit(_FAILED) from None


def _as_rank(command: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:
        from labpkg.runs.launch import is_refusal

        refused = command == "train" and is_refusal(error)
        if refused:
            _complain(command, error)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # Peers may be stuck in a collective: leaving the group would wait for them.
        os._exit(_BAD_INPUT if refused else _FAILED)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "run": _run,
    "doctor": _doctor,
    "bench": _bench,
    "plan": _plan,
    "predict": _predict,
    "score": _score,
}

if __name__ == "__main__":
    sys.exit(main())

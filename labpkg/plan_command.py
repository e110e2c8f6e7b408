"""`labpkg plan`: the fastest ways to divide a training job, as a table or JSON.

Chapter: planning/planner.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from labpkg.planning.configuration import PRECISIONS
from labpkg.planning.divisions import CHOICES
from labpkg.planning.models import find_model
from labpkg.planning.planner import plan
from labpkg.planning.plans import MEMORY_ERROR, Plan, format_plans
from labpkg.planning.shapes import ModelShape

_TOKENS_PER_STEP = 2**22  # about what models of 10 to 100 billion parameters train with
_SIZES = {
    "layers": ("num_layers", "blocks"),
    "width": ("width", "of the residual stream"),
    "heads": ("num_heads", "query heads"),
    "vocab": ("vocab_size", "tokens of the vocabulary"),
    "kv-heads": ("num_kv_heads", "key and value heads; as many as heads"),
    "ffn": ("ffn_width", "hidden width of the feed-forward part; 4 x width"),
}


def run(argv: list[str]) -> int:
    """Print the plans for the options of a command line.

    Args:
        argv: The options.

    Returns:
        0.

    Raises:
        ValueError: If an option is impossible, or nothing fits.
    """
    options = _parser().parse_args(argv)
    model = _model(options)
    plans = plan(
        model,
        options.hardware,
        options.world_size,
        _near(_TOKENS_PER_STEP, model.sequence_length)
        if options.tokens_per_step is None
        else options.tokens_per_step,
        precision=options.precision,
        max_cp=options.max_cp,
        num_plans=options.top,
        variants=options.variants,
        spare_memory=options.spare_memory,
        **_fixed(options.fix),
    )
    place = options.explain
    if place is not None and not 1 <= place <= len(plans):
        raise ValueError(
            f"--explain {place} is no plan of the {len(plans)} found; choose 1 to "
            f"{len(plans)}"
        )
    if options.json:
        print(json.dumps([each.as_dict() for each in plans]))
        return 0
    print(_title(plans[0]), format_plans(plans), sep="\n")
    if place is not None:
        print(f"\nPlan {place}: {plans[place - 1].explain()}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="labpkg plan",
        description="Print the fastest ways to divide a training job that fit.",
    )
    parser.add_argument("--model", help="such as llama-70b; or give its sizes")
    for name, (_, meaning) in _SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=meaning)
    parser.add_argument("--tied", action="store_true", help="output is the embedding")
    parser.add_argument("--gated-mlp", action="store_true", help="SwiGLU")
    parser.add_argument("--sequence-length", type=int, help="tokens of a sequence")
    parser.add_argument("--world-size", type=int, required=True, help="GPUs")
    parser.add_argument(
        "--hardware", default="h100", help="a name, or FILE.json; h100 by default"
    )
    parser.add_argument(
        "--tokens-per-step", type=int, help="of all GPUs; about 4 million by default"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--max-cp", type=int, default=1, help="ranks of a sequence")
    parser.add_argument(
        "--fix",
        metavar="NAME=VALUE",
        nargs="+",
        default=[],
        help="what is not to be chosen, such as tp=8 zero=1 recompute=full; of "
        + ", ".join(CHOICES),
    )
    parser.add_argument("--top", type=int, default=10, help="plans to print")
    parser.add_argument(
        "--variants", type=int, default=1, help="plans with the same axes"
    )
    parser.add_argument(
        "--spare-memory",
        type=float,
        default=MEMORY_ERROR,
        help="share of the usable memory to leave free; 0.1 by default",
    )
    parser.add_argument(
        "--explain",
        metavar="#",
        type=int,
        nargs="?",
        const=1,
        help="every term of a plan, and why its neighbours lost; by default of plan 1",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _model(options: argparse.Namespace) -> ModelShape:
    """Return the named model, or the one of the given sizes."""
    given = {
        field: getattr(options, name.replace("-", "_"))
        for name, (field, _) in _SIZES.items()
    }
    given = {field: size for field, size in given.items() if size is not None}
    length = options.sequence_length
    if options.model is not None:
        if given or options.tied or options.gated_mlp:
            raise ValueError(
                f"--model {options.model} has its own sizes; leave out those you gave, "
                "or the name"
            )
        named = find_model(options.model)
        return named if length is None else replace(named, sequence_length=length)
    needed = ("num_layers", "width", "num_heads", "vocab_size")
    missing = [name for name, (field, _) in _SIZES.items() if field in needed]
    missing = [name for name in missing if _SIZES[name][0] not in given]
    missing += ["sequence-length"] * (length is None)
    if missing:
        raise ValueError(
            f"without --model its sizes are needed; give --{', --'.join(missing)}, or "
            "--model llama-70b"
        )
    return ModelShape(
        **{
            "num_kv_heads": given["num_heads"],
            "ffn_width": 4 * given["width"],
            **given,
        },
        sequence_length=length,
        tied=options.tied,
        gated_mlp=options.gated_mlp,
        learned_positions=not options.gated_mlp,
    )


def _near(tokens: int, sequence_length: int) -> int:
    return max(1, tokens // sequence_length) * sequence_length


def _fixed(pairs: list[str]) -> dict[str, Any]:
    """Read `tp=8` and the like: whole numbers, true and false, or words."""
    fixed: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not text:
            raise ValueError(f"--fix {pair} is no NAME=VALUE; write it as in tp=8")
        field = name.replace("-", "_")
        if field not in CHOICES or field in fixed:
            problem = "is there twice" if field in fixed else "names no choice"
            raise ValueError(
                f"--fix {pair} {problem}; choose one value for each of "
                f"{', '.join(CHOICES)}"
            )
        words = {"true": True, "false": False}
        fixed[field] = int(text) if text.isdecimal() else words.get(text.lower(), text)
    return fixed


def _title(best: Plan) -> str:
    job = best.configuration
    size = job.model.num_parameters
    unit, word = (1e9, "billion") if size >= 1e9 else (1e6, "million")
    return (
        f"{size / unit:.3g} {word} parameters, sequences of "
        f"{job.model.sequence_length:,} tokens, {job.tokens_per_step:,} tokens a step "
        f"on {job.world_size:,} x {best.estimate.hardware.name}:"
    )

"""`labpkg plan`, as a user types it."""

import json

import pytest
import torch

from labpkg import __main__ as command_line
from labpkg.foundations.models import GPT, GPTConfig
from labpkg.planning.planner import plan
from labpkg.planning.plans import format_plans
from labpkg.runs.composing import compose

_SMALL = (
    *("--layers", 4, "--width", 128, "--heads", 4, "--vocab", 256, "--tied"),
    *("--sequence-length", 128, "--tokens-per-step", 8 * 128),
)


def _labpkg(capsys, *arguments):
    code = command_line.main(["plan", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_plans_are_a_table(capsys):
    code, out, _ = _labpkg(
        capsys, *("--model", "llama-70b", "--world-size", 64, "--top", 3)
    )
    plans = plan("llama2-70b", "h100", 64, 2**22, num_plans=3)
    title, table = out.split("\n", 1)
    assert code == 0
    assert table.strip("\n") == format_plans(plans)
    assert title.startswith("69 billion parameters, sequences of 4,096 tokens")


def test_plans_are_json(capsys):
    code, out, _ = _labpkg(
        capsys, *("--world-size", 8, *_SMALL, "--json", "--fix", "tp=2", "zero=1")
    )
    values = json.loads(out)
    assert code == 0
    assert {v["configuration"]["tp"] for v in values} == {2}
    assert {v["configuration"]["zero"] for v in values} == {1}
    assert values[0]["configuration"]["model"]["learned_positions"] is True
    assert [v["place"] for v in values] == list(range(1, len(values) + 1))


def test_a_plan_is_explained(capsys):
    _, best, _ = _labpkg(capsys, "--world-size", 4, *_SMALL, "--explain")
    _, out, _ = _labpkg(capsys, "--world-size", 4, *_SMALL, "--explain", 2)
    assert best.split("Plan 1:")[0] == out.split("Plan 2:")[0]  # the table
    for part in ("Time of a step", "Memory of the fullest rank", "Neighbours"):
        assert out.count(part) == best.count(part) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "llama-70c", "--world-size", 8), "llama-70c"),
        (("--world-size", 8), "give --layers, --width, --heads, --vocab"),
        (("--model", "gpt2", "--layers", 3, "--world-size", 8), "leave out those"),
        (("--model", "gpt2", "--hardware", "h101", "--world-size", 8), "h101"),
        (("--model", "gpt2", "--world-size", 8, "--fix", "tp"), "as in tp=8"),
        (("--model", "gpt2", "--world-size", 8, "--fix", "ep=2"), "ep=2"),
        (("--world-size", 8, *_SMALL, "--fix", "precision=fp16"), "names no choice"),
        (("--world-size", 8, *_SMALL, "--fix", "tp=2", "tp=4"), "is there twice"),
        (("--world-size", 8, *_SMALL, "--fix", "tp=x"), "tp='x' must be an integer"),
        (("--model", "gpt2", "--world-size", 8, "--tokens-per-step", 0), "step=0 must"),
        (("--model", "gpt2", "--world-size", 13), "gpus_per_node=8; choose 8 or 16"),
        (("--model", "gpt2", "--world-size", 1, "--explain", 9), "choose 1 to 1"),
        (("--model", "llama-70b", "--world-size", 1), "no way to divide this job"),
    ],
)
def test_mistakes_are_answered_in_a_line(capsys, arguments, says):
    code, out, err = _labpkg(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("labpkg plan: ")
    assert says in err


def test_the_main_job_takes_the_line_of_a_plan():
    shape = GPTConfig(num_layers=4, width=128, num_heads=4, sequence_length=128).shape
    plans = plan(shape, "h100", 4, 16 * 128, variants=8, num_plans=50, zero=1)
    assert len({each.configuration.schedule for each in plans}) > 1
    for each in plans:
        words = each.command().split()
        config = command_line._parse_train(words[2:]).config()
        assert config.layout == each.layout()
        assert config.global_batch_size == 16


def _train(layouts):
    config = GPTConfig(num_layers=2, width=32, num_heads=4, sequence_length=16)
    generator = torch.Generator(device="cpu").manual_seed(0)
    tokens = torch.randint(256, (4, 17), generator=generator, device="cpu")
    losses = []
    for layout in layouts:
        trained = compose(lambda: GPT(config), layout, lr=1e-2)
        own = tokens.tensor_split(layout.dp)[trained.mesh["dp"].get_local_rank()]
        steps = [trained.train_step(own[:, :-1], own[:, 1:]) for _ in range(3)]
        losses.append([step.loss for step in steps])
    return losses


def test_engines_run_the_plans(world2):
    shape = GPTConfig(num_layers=2, width=32, num_heads=4, sequence_length=16).shape
    plans = plan(shape, "h100", 2, 4 * 16, num_plans=3)
    assert {_axes(p) for p in plans} == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}
    first, *others = world2.run(_train, [p.layout() for p in plans])[0]
    assert first[-1] < first[0]
    for losses in others:
        assert losses == pytest.approx(first, rel=1e-4)


def _axes(plan):
    job = plan.configuration
    return job.dp, job.tp, job.pp

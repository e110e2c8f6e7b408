"""The parity matrix: every layout with every feature, against one plain process.

A `Setting` is a layout and the features that it is trained with. Ranks train it with
`lab.compose`; `alone`, which knows no engine, trains the same model on whole batches.
Both give a `Trace`; `matrix_results` says how far these are apart.

Dropout has no reference but itself: the modules of `_Dropping` remember which elements
they kept, and the plain process drops the same ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import labpkg as lab
from labpkg.foundations.models import Block, FeedForward
from labpkg.parallelism.tensor_parallel import gpt_tensor_parallel_plan
from labpkg.planning.layout import SCHEDULES, Layout
from labpkg.runs.composing import compose
from labpkg.runs.composition import Composition

NUM_STEPS = 5
BATCH, WIDTH, LENGTH, VOCABULARY = 16, 16, 8, 32
LR, WEIGHT_DECAY, MAX_NORM, MOMENTUM, DROPPED = 1e-2, 0.1, 0.3, 0.9, 0.2
TOLERANCE = 1e-12

FEATURES: Mapping[str, str] = {
    "accumulation": "gradients of two passes in a step",
    "clipping": "gradients clipped to a norm that every step exceeds",
    "tied": "the output matrix is the token embedding, also across stages",
    "uneven tokens": "a third of the targets do not count, nor any of some ranks",
    "uneven samples": "ranks have different numbers of samples, in a step some none",
    "recomputation": "blocks, or stages, run forward again in backward",
    "dropout": "in both branches of a block and between the two layers of its MLP",
    "bf16": "autocast to bfloat16",
}
# A plan that names dropouts leaves the loss on slices of the vocabulary out.
ALL = frozenset(FEATURES) - {"uneven samples", "dropout", "bf16"}
SETS: Mapping[str, frozenset[str]] = {
    "none": frozenset(),
    **{name: frozenset({name}) for name in FEATURES},
    "all": ALL,
    "all, dropout": ALL | {"dropout"},
    "all, bf16": ALL | {"bf16"},
    "all, untied": (ALL | {"dropout"}) - {"tied"},
}
_OF_MANY = ("all", "all, dropout", "all, bf16")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, and how.

    Attributes:
        base: The layout without features.
        features: Names in `FEATURES`.
    """

    base: Layout
    features: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.base}: {', '.join(sorted(self.features)) or 'none'}"

    @property
    def layout(self) -> Layout:
        """The layout with those features that are its own."""
        return replace(
            self.base,
            grad_accum_steps=2 if "accumulation" in self.features else 1,
            recompute="recomputation" in self.features,
        )

    @property
    def on_meta(self) -> bool:
        """Whether no rank builds the whole model."""
        return self.base.world_size > 4

    @property
    def num_layers(self) -> int:
        """Two, or so many that every stage has a unit, of which GPT has two more."""
        if not self.base.is_pipeline:
            return 2
        return max(2, self.base.make_schedule().num_stages - 2)

    @property
    def config(self) -> lab.GPTConfig:
        """The model."""
        return lab.GPTConfig(
            num_layers=self.num_layers,
            width=WIDTH,
            num_heads=4,
            sequence_length=LENGTH,
            vocab_size=VOCABULARY,
            tied="tied" in self.features,
        )

    @property
    def is_rough(self) -> bool:
        """Whether rounding decides."""
        return "bf16" in self.features

    @property
    def impossible(self) -> str | None:
        """The rule that this setting breaks, a part of the message of its refusal."""
        if self.base.is_pipeline and "uneven samples" in self.features:
            return "samples are not divisible into"
        if self.base.is_pipeline and self.base.zero == 3 and "tied" in self.features:
            return "zero=3 slices parameters, but stages"
        return None


def layouts(world_size: int) -> list[Layout]:
    """Return every product of engines on so many ranks."""
    found = []
    for pp, dp, tp in product((1, 2, 4), (1, 2, 4, 8), (1, 2, 4)):
        if pp * dp * tp != world_size:
            continue
        schedules = list(SCHEDULES) if pp > 1 else [None]
        stages = (0, 1, 2, 3) if dp > 1 else (0,)
        sequence = (False, True) if tp > 1 else (False,)
        for schedule, zero, is_sequence in product(schedules, stages, sequence):
            found.append(
                Layout(
                    pp=pp,
                    dp=dp,
                    tp=tp,
                    zero=zero,
                    schedule=schedule,
                    num_micro_batches=(4 if dp < 4 else 2) if pp > 1 else None,
                    sequence_parallel=is_sequence,
                )
            )
    return found


def engines(layout: Layout) -> set[str]:
    """Return the names of the engines that a layout composes."""
    found = {"data parallel"} if layout.dp > 1 and not layout.zero else set()
    if layout.tp > 1:
        found.add("sequence parallel" if layout.sequence_parallel else "tensor")
    if layout.zero:
        found.add(f"zero {layout.zero}")
    if layout.is_pipeline:
        found.add(f"pipeline {layout.schedule}")
    return found


def whole(world_size: int, sets: Iterable[str] | None = None) -> list[Setting]:
    """Return every layout of so many ranks with every set of features.

    Args:
        world_size: Ranks.
        sets: Names in `SETS`; None is all that tell something, on more than 4 ranks
            those of many features.
    """
    found = []
    for layout in layouts(world_size):
        names = sets or (SETS if world_size <= 4 else ("uneven samples", *_OF_MANY))
        if sets is None:
            names = [name for name in names if name != "all, untied"]
            if layout.is_pipeline and layout.zero == 3:  # no weights may be tied
                names = [name for name in names if name not in _OF_MANY]
                names.append("all, untied")
        found += [Setting(base=layout, features=SETS[name]) for name in names]
    return found


def pairs(setting: Setting) -> set[tuple[str, str]]:
    """Return each engine of a setting with each of its features."""
    return set(product(engines(setting.base), setting.features))


def covering() -> list[Setting]:
    """Return few settings on 4 ranks in which every engine meets every feature."""
    sets = ("all, dropout", "all, bf16", "uneven samples")
    candidates = [it for it in whole(4, sets) if it.impossible is None]
    candidates.sort(key=lambda setting: -setting.base.pp)  # of these are the most
    missing = {pair for setting in candidates for pair in pairs(setting)}
    chosen = []
    while missing:
        best = max(candidates, key=lambda setting: len(pairs(setting) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


# ---- the model and its batches -----------------------------------------------------


class _Dropping(nn.Module):
    """Dropout that remembers what it kept, or keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.told: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.told is not None:
            return x * self.told / (1 - DROPPED)
        mask = F.dropout(torch.ones_like(x), DROPPED)
        kept = mask != 0
        # What runs forward again must keep the same, and is then remembered once.
        if not any(torch.equal(kept, other) for other in self.kept):
            self.kept.append(kept)
        return x * kept / (1 - DROPPED)


class _DroppingMLP(FeedForward):
    inner: _Dropping

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.inner(F.gelu(self.up(x))))


class _DroppingBlock(Block):
    drop: _Dropping
    drop_mlp: _Dropping

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x), cache))
        return x + self.drop_mlp(self.mlp(self.mlp_norm(x)))


def build(setting: Setting) -> tuple[lab.GPT, dict[str, _Dropping]]:
    """Return a model, and its dropouts by name."""
    model = lab.GPT(setting.config)
    if "dropout" in setting.features:
        for block in model.blocks:
            assert isinstance(block, Block)
            block.__class__ = _DroppingBlock
            block.mlp.__class__ = _DroppingMLP
            block.drop, block.drop_mlp = _Dropping(), _Dropping()
            block.mlp.inner = _Dropping()
    modules = model.named_modules()
    return model, {name: m for name, m in modules if isinstance(m, _Dropping)}


def _plan(setting: Setting) -> dict[str, str] | None:
    """Return a plan that cuts random numbers where activations are cut, if needed."""
    is_sequence = setting.base.sequence_parallel
    if setting.base.tp == 1 or "dropout" not in setting.features:
        return None
    plan = gpt_tensor_parallel_plan(setting.config, sequence_parallel=is_sequence)
    plan["blocks.*.mlp.inner"] = "dropout"
    if is_sequence:
        plan["blocks.*.drop"] = plan["blocks.*.drop_mlp"] = "dropout"
    return plan


def batch(setting: Setting, step: int) -> tuple[Tensor, Tensor]:
    """Return the global batch of a step."""
    generator = torch.Generator("cpu").manual_seed(step)
    draw = functools.partial(torch.randint, generator=generator, device="cpu")
    x, y = draw(VOCABULARY, (2, BATCH, LENGTH))
    if "uneven tokens" in setting.features:
        y = y.masked_fill(draw(3, y.shape) == 0, -100)
        y[: BATCH // 4] = -100  # all that the first of four ranks has
    if "uneven samples" in setting.features:
        num_samples = (11, 13, 3, 16, 9)[step]
        x, y = x[:num_samples], y[:num_samples]
    return x, y


# ---- what is seen of a run ---------------------------------------------------------


@dataclass
class Trace:
    """What one rank, or one process alone, shows of a run.

    Attributes:
        start: Parameters before the first step.
        output: What the model makes of this place's samples, in evaluation.
        evaluated: Its loss there, and the number of targets.
        gradients: Of the first step, after clipping.
        losses: Of each step.
        counts: Targets that count, in each step.
        norms: Of the gradient in each step, before clipping.
        end: Parameters after the last step.
        kept: By step and dropout, what was kept by this rank.
        place: Of the rank on pp, dp, tp.
    """

    start: dict[str, Tensor]
    output: Tensor
    evaluated: tuple[float, int]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    end: dict[str, Tensor] = field(default_factory=dict)
    kept: list[dict[str, Tensor]] = field(default_factory=list)
    place: tuple[int, int, int] = (0, 0, 0)


def train_all(settings: Sequence[Setting]) -> list[Trace | str]:
    """Train one setting after the other on this rank; a refusal is its message."""
    traces: list[Trace | str] = []
    for setting in settings:
        try:
            traces.append(_train(setting))
        except ValueError as error:
            traces.append(str(error))
        except Exception as error:
            error.add_note(f"in {setting}")
            raise
    return traces


@functools.cache  # the groups of a mesh take as long as a short run
def _mesh(pp: int, dp: int, tp: int) -> Any:
    return lab.make_mesh(pp=pp, dp=dp, tp=tp)


def _train(setting: Setting) -> Trace:
    base = setting.base
    mesh = _mesh(base.pp, base.dp, base.tp)
    torch.manual_seed(1000 + torch.distributed.get_rank())  # compose has its own seed
    dropouts: dict[str, _Dropping] = {}

    def make() -> nn.Module:
        model, found = build(setting)
        dropouts.update(found)
        return model

    composition = compose(
        make,
        setting.layout,
        mesh=mesh,
        plan=_plan(setting),
        **_optimizer(setting),
        weight_decay=WEIGHT_DECAY,
        precision="bf16" if setting.is_rough else "fp64",
        on_meta=setting.on_meta,
        max_grad_norm=MAX_NORM if "clipping" in setting.features else math.inf,
    )
    place = tuple(mesh[axis].get_local_rank() for axis in ("pp", "dp", "tp"))
    part = lambda t: t.tensor_split(base.dp)[place[1]]
    x, y = map(part, batch(setting, 0))
    trace = Trace(
        lab.full_state_dict(composition.model),
        composition.forward(x),
        composition.evaluate(x, y),
        place=place,
    )
    with _seen_gradients(composition, trace):
        for step in range(NUM_STEPS):
            x, y = map(part, batch(setting, step))
            report = composition.train_step(x, y)
            assert report.skipped is None, report.skipped
            trace.losses.append(report.loss)
            trace.counts.append(report.count)
            trace.norms.append(report.grad_norm)
            trace.kept.append(
                _take_kept(dropouts, len(x), was_tried=base.is_pipeline and step == 0)
            )
    trace.end = lab.full_state_dict(composition.model)
    return trace


def _optimizer(setting: Setting) -> dict[str, Any]:
    """AdamW; but where rounding decides, what does not divide by a gradient's size."""
    if setting.is_rough:
        return {"optimizer": lab.SGD, "lr": LR, "momentum": MOMENTUM}
    return {"optimizer": lab.AdamW, "lr": LR}


@contextmanager
def _seen_gradients(composition: Composition, trace: Trace) -> Iterator[None]:
    """Note the whole gradients of the first step, right before they are used."""

    def note(*_: Any) -> None:
        if not trace.gradients:
            gradients = lab.full_gradients(composition.model)
            trace.gradients = {
                k: g.clone() for k, g in gradients.items() if g is not None
            }

    hook = composition.optimizer.register_step_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()


def _take_kept(
    dropouts: Mapping[str, _Dropping], num_samples: int, *, was_tried: bool
) -> dict[str, Tensor]:
    """Return what each dropout of this rank has kept in a step, for all samples."""
    found = {}
    for name, dropout in dropouts.items():
        kept, dropout.kept = dropout.kept, []
        if not kept:
            continue  # another rank has this stage
        if was_tried and sum(map(len, kept)) > num_samples:
            kept = kept[1:]  # a pipeline tries its stages to learn shapes
        found[name] = torch.cat(kept)
        assert len(found[name]) == num_samples, f"{name} has dropped others again"
    return found


# ---- one plain process -------------------------------------------------------------


def alone(
    setting: Setting,
    start: Mapping[str, Tensor],
    kept: Sequence[Mapping[str, Tensor]],
    *,
    is_rough: bool = False,
) -> Trace:
    """Train whole batches without any engine.

    Args:
        setting: What is trained.
        start: The initial parameters.
        kept: By step, what each dropout keeps.
        is_rough: Compute in bfloat16, otherwise in float64.
    """
    model, dropouts = build(setting)
    model = model.float() if is_rough else model.double()
    model.load_state_dict(dict(start))
    cast = torch.autocast("cpu", torch.bfloat16, enabled=is_rough)
    optimizer = _plain_optimizer(setting, model)
    x, y = batch(setting, 0)
    with torch.no_grad(), cast:
        output = model.eval()(x)
        loss = _loss(output, y)
    trace = Trace(dict(start), output, (loss.item(), _count(y)))
    model.train()
    for step in range(NUM_STEPS):
        for name, dropout in dropouts.items():
            dropout.told = kept[step][name]
        x, y = batch(setting, step)
        with cast:
            loss = _loss(model(x), y)
        loss.backward()
        limit = MAX_NORM if "clipping" in setting.features else math.inf
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        if step == 0:
            named = model.named_parameters()
            trace.gradients = {k: p.grad.clone() for k, p in named}
        trace.losses.append(loss.item())
        trace.counts.append(_count(y))
        trace.norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    trace.end = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return trace


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _count(targets: Tensor) -> int:
    return int((targets != -100).sum())


def _plain_optimizer(setting: Setting, model: nn.Module) -> torch.optim.Optimizer:
    """Return torch's own optimizer; only matrices decay."""
    parameters = list(model.parameters())
    groups = [
        {
            "params": [p for p in parameters if p.dim() > 1],
            "weight_decay": WEIGHT_DECAY,
        },
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if setting.is_rough:
        return torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)
    return torch.optim.AdamW(groups, lr=LR)

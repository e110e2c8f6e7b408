"""How long one training step takes, as a sum of terms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from labpkg.planning.configuration import Configuration
from labpkg.planning.constants import FITTED, Constants
from labpkg.planning.hardware import Hardware
from labpkg.planning.network import (
    ITEMSIZE,
    AxisPlace,
    Traffic,
    collective_s,
    place_axis,
    step_traffic,
)
from labpkg.planning.stages import stage_elements, stage_shares, stages_per_rank
from labpkg.planning.terms import Term, total

LOGIT_BYTES = 30
STATE_BYTES = 16


@dataclass(frozen=True)
class StepTime:
    terms: tuple[Term, ...]

    @property
    def seconds(self) -> float:
        return total(self.terms)


class Work(NamedTuple):
    products: float
    passes: float
    tp: float
    cp: float
    again: float
    host: float

    @property
    def gpu(self):
        return self.products + self.passes + self.tp + self.cp + self.again

    @property
    def seconds(self):
        return max(self.gpu, self.host)

    def plus(self, other, n=1):
        return Work(*(a + n * b for a, b in zip(self, other)))


ZERO = Work(0, 0, 0, 0, 0, 0)


def _product_s(tokens, k, n, job, hw, c):
    rate = hw.peak_flops[job.precision] * hw.matmul_fraction * c.matmul_efficiency
    item = ITEMSIZE[job.precision]
    num = item * (tokens * k + k * n + tokens * n)
    return 2 * tokens * k * n / rate + num / hw.memory_bytes_per_s


def layer_work(job, hw, c, per_call):
    m = job.model
    D, F, H = m.width, m.ffn_width, m.head_width
    t = job.micro_batch_size * m.sequence_length / job.cp
    kv = max(m.num_kv_heads / job.tp, 1) * H
    rate = hw.peak_flops[job.precision] * hw.matmul_fraction * c.matmul_efficiency
    p = _product_s(t, D, D / job.tp + 2 * kv, job, hw, c)
    p += _product_s(t, D / job.tp, D, job, hw, c)
    p += (2 if m.gated_mlp else 1) * _product_s(t, D, F / job.tp, job, hw, c)
    p += _product_s(t, F / job.tp, D, job, hw, c)
    att = 4 * t * m.sequence_length * D / job.tp / rate
    fwd = p + att
    s = job.tp if job.cuts_sequence else 1
    item = ITEMSIZE[job.precision]
    el = c.activation_passes * item * t * (D / s + F / job.tp) / hw.memory_bytes_per_s
    tp = per_call["tp", "layer"]
    again = {"none": 0, "selective": att, "full": fwd + el / 3}[job.recompute]
    host = c.launch_s * (2 if job.tp > 1 else 1)
    if job.tp > 1 and job.pp > 1 and job.nodes > 1:
        host += c.pipeline_wait * hw.network_latency_s * job.tp * 10
    return Work(3 * fwd, el, tp, per_call["cp", "layer"], again, host)


def head_work(job, hw, c, per_call):
    m = job.model
    t = job.micro_batch_size * m.sequence_length / job.cp
    p = 3 * _product_s(t, m.width, m.vocab_size / job.tp, job, hw, c)
    el = LOGIT_BYTES * t * m.vocab_size / job.tp / hw.memory_bytes_per_s
    return Work(p, el, per_call["tp", "ends"], 0, 0, 0)


def step_time(job: Configuration, hw: Hardware, c: Constants = FITTED) -> StepTime:
    per = {
        ("tp", "layer"): 0.0,
        ("tp", "ends"): 0.0,
        ("cp", "layer"): 0.0,
        ("pp", "border"): 0.0,
        ("dp", "step"): 0.0,
        ("dp", "pass"): 0.0,
    }
    places = {a: place_axis(job, a) for a in ("tp", "cp", "dp", "pp")}
    for tr in step_traffic(job):
        per[tr.axis, tr.phase] += tr.calls * collective_s(
            tr.op, tr.payload_bytes, places[tr.axis], hw
        )
    layer, head = layer_work(job, hw, c, per), head_work(job, hw, c, per)
    P, M, v = job.pp, job.grad_accum_steps, stages_per_rank(job)
    shares = stage_shares(job.model, P * v)
    ranks = [ZERO] * P
    for s, share in enumerate(shares):
        r = s % P if job.schedule != "zb-v" else min(s, 2 * P - 1 - s)
        ranks[r] = ranks[r].plus(layer, share.num_layers)
        if share.head:
            ranks[r] = ranks[r].plus(head)
    slow = max(ranks, key=lambda w: w.seconds)
    held = max(stage_elements(sh, job.model, tp=job.tp) for sh in shares) * v
    fill = {"1f1b": 1, "gpipe": 1, "interleaved": 1 / v, "zb-h1": 1 / 3, "zb-v": 1 / 6}[
        job.schedule
    ]
    bubble = fill * (math.fsum(w.seconds for w in ranks) - slow.seconds)
    transfer = per["pp", "border"] * (M * v * (P - 1) / P + (P - 1))
    wait = max(0.0, slow.seconds - slow.gpu)
    n = job.dp * job.cp
    state = held / (n if job.zero else 1)
    opt = c.optimizer_passes * STATE_BYTES * state / hw.memory_bytes_per_s
    last = slow.seconds * 2 / 3
    sync = max(0.0, per["dp", "step"] - c.overlap * last)
    gathers = (
        M * max(0.0, per["dp", "pass"] - 0.8 * slow.seconds) if job.zero == 3 else 0
    )
    T = lambda n, x: Term(n, x, "", "")
    return StepTime(
        (
            T("matrix products", M * slow.products),
            T("passes", M * slow.passes),
            T("tensor parallel", M * slow.tp),
            T("context parallel", M * slow.cp),
            T("recomputation", M * slow.again),
            T("host", M * wait),
            T("bubble", bubble),
            T("messages", transfer),
            T("gradients", sync + gathers),
            T("optimizer", opt),
        )
    )

"""The fit of the memory constants, on planted measurements."""

from dataclasses import replace

import numpy as np
import pytest

from labpkg.planning.configuration import Configuration
from labpkg.planning.constants import FITTED
from labpkg.planning.hardware import find_hardware
from labpkg.planning.memory import peak_memory, usable_bytes
from scripts.calibrate_memory import NAMES, Table, fit
from scripts.published_runs import PLAYBOOK_MODELS, Run

PLANTED = replace(FITTED, activation_copies=1.25, gathered_inputs=0.6, logit_copies=1.8)


def runs(constants=FITTED):
    """Jobs of all kinds with the peaks that the constants predict."""
    found = []
    for model in PLAYBOOK_MODELS.values():
        for dp, tp, pp, how in (
            (8, 1, 1, {"zero": 3}),
            (8, 1, 1, {"zero": 3, "recompute": "full"}),
            (1, 8, 1, {"micro_batch_size": 4}),
            (1, 2, 4, {"grad_accum_steps": 8}),
            (1, 2, 4, {"grad_accum_steps": 8, "schedule": "zb-h1"}),
            (2, 2, 2, {"grad_accum_steps": 8, "schedule": "gpipe"}),
            (1, 1, 8, {"recompute": "full", "schedule": "zb-v"}),
        ):
            c = Configuration(model=model, dp=dp, tp=tp, pp=pp, **how)
            peak = peak_memory(c, constants).num_bytes
            ran = peak <= usable_bytes(find_hardware("h100"), constants)
            found.append(Run("a", "h100", c, 1.0 if ran else None, peak))
    return found


def test_columns_add_up_to_the_peaks():
    planted = runs(PLANTED)
    peaks = Table(planted).peaks([getattr(PLANTED, name) for name in NAMES])
    assert peaks == pytest.approx([run.memory_bytes for run in planted])


def test_the_fit_finds_planted_constants():
    table = Table(runs(PLANTED))
    fitted = fit(table, np.ones(len(table.runs), bool), Table(runs(PLANTED)[2:3]))
    expected = [getattr(PLANTED, name) for name in NAMES]
    assert fitted.values == pytest.approx(expected, rel=0.02)


def test_runs_that_fitted_hold_the_constants_down():
    table = Table(runs(PLANTED))
    tight = Table([r for r in runs(PLANTED) if r.memory_bytes > 78e9][:1])
    assert len(tight.runs) == 1
    free = fit(table, np.ones(len(table.runs), bool), Table(runs(PLANTED)[2:3]))
    held = fit(table, np.ones(len(table.runs), bool), tight)
    assert tight.peaks(held.values) < tight.peaks(free.values)

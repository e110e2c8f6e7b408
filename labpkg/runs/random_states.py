"""The random generators of a rank: torch's, Python's and NumPy's.

Chapter: runs/checkpointing.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of the random generators of this process."""
    version, numbers, gauss = random.getstate()
    generator = np.random.get_state(legacy=False)
    assert isinstance(generator, dict)
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "python": (version, torch.tensor(numbers), gauss),
        "numpy": _with_tensors(generator),
    }
    if torch.cuda.is_initialized():  # else asking would take memory of a GPU
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Continue with a state that `random_state` returned.

    Args:
        state: That of another device is left out.
    """
    torch.set_rng_state(state["cpu"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    np.random.set_state(_with_arrays(state["numpy"]))
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def _with_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tensors(v) for key, v in value.items()}
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def _with_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_arrays(v) for key, v in value.items()}
    return value.numpy() if isinstance(value, torch.Tensor) else value

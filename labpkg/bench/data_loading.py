"""`batches` with workers against torch's `DataLoader` doing the same work.

Both shift the images of a batch in two worker processes and bring them to the device.
torch's fastest form asks the data set for a whole batch at a time; its default asks for
one sample after the other and joins them.

Chapter: processes/data_loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from labpkg.bench.measure import Sample, alternate, compare
from labpkg.foundations.data import batches
from labpkg.foundations.tables import digits
from labpkg.foundations.transforms import augment
from labpkg.processes.world import World

BASE = "torch:batches"
_B, _NUM_WORKERS = 256, 2
_FOREVER = 10**9


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure loaders on one rank, without a model.

    Args:
        quick: Few rounds: the form of the answer.

    Returns:
        Rows as in `labpkg.bench.run`, milliseconds per batch of 256 digits.
    """
    with World(1, timeout_s=None) as world:
        samples = world.run(_measure, quick)[0]
        label = f"{_B} shifted digits, {_NUM_WORKERS} workers, {world.device}"
    return compare(samples, base=BASE, config=label)


def _measure(quick: bool) -> dict[str, list[Sample]]:
    data = digits()
    streams: dict[str, Iterator[Any]] = {
        BASE: _torch(data, whole=True),
        "torch:samples": _torch(data, whole=False),
        "labpkg": _own(data, num_workers=_NUM_WORKERS),
        "labpkg:no workers": _own(data, num_workers=0),
    }
    calls: dict[str, Callable[[], object]] = {
        name: stream.__next__ for name, stream in streams.items()
    }
    rounds, most = (2, 2) if quick else (15, 45)
    sample_s = 0.01 if quick else 0.5
    return alternate(calls, num_rounds=rounds, max_rounds=most, sample_s=sample_s)


def _shifted(columns: tuple[Tensor, ...], positions: Tensor) -> tuple[Tensor, ...]:
    x, y = columns
    return augment(x.unflatten(1, (8, 8)), positions, seed=0), y


def _own(data: TensorDataset, *, num_workers: int) -> Iterator[tuple[Tensor, ...]]:
    return batches(
        data,
        global_batch_size=_B,
        steps=_FOREVER,
        seed=0,
        transform=_shifted,
        num_workers=num_workers,
    )


def _torch(data: TensorDataset, *, whole: bool) -> Iterator[list[Tensor]]:
    def order() -> Iterator[Any]:
        generator = torch.Generator("cpu").manual_seed(0)
        while True:
            permutation = torch.randperm(len(data), generator=generator, device="cpu")
            yield from permutation.split(_B) if whole else permutation.tolist()

    def joined(samples: Any) -> tuple[Tensor, ...]:
        if not whole:
            samples = [torch.stack(column) for column in zip(*samples, strict=True)]
        return _shifted(tuple(samples), torch.arange(len(samples[0]), device="cpu"))

    device = torch.get_default_device()
    with torch.device("cpu"):
        loader = DataLoader(
            data,
            batch_size=None if whole else _B,
            sampler=order(),  # pyright: ignore[reportArgumentType]
            collate_fn=joined,
            num_workers=_NUM_WORKERS,
            pin_memory=device.type == "cuda",
            multiprocessing_context="fork",
        )
        stream = iter(loader)
    for columns in stream:
        yield [column.to(device, non_blocking=True) for column in columns]

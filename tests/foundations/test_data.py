import time
from dataclasses import dataclass
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

import labpkg as lab
from labpkg.foundations.data import batches


@dataclass
class Axis:
    """The part of a device mesh that `batches` reads."""

    rank: int
    num_ranks: int

    def size(self) -> int:
        return self.num_ranks

    def get_local_rank(self) -> int:
        return self.rank


class Squares(Dataset):
    """A dataset that only answers one sample at a time."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((2,), float(index)), index**2


def numbers(num_samples: int) -> TensorDataset:
    return TensorDataset(torch.arange(num_samples))


def concatenated(pieces) -> list[int]:
    return list(chain.from_iterable(pieces))


def drawn(data, **options) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches(data, **options)]


@settings(deadline=None)
@given(
    num_samples=st.integers(1, 40),
    batch=st.integers(1, 50),
    num_ranks=st.integers(1, 9),
    steps=st.one_of(st.none(), st.integers(0, 7)),
    seed=st.integers(0, 2**40),
)
def test_ranks_together_see_the_batches_of_one_process(
    num_samples, batch, num_ranks, steps, seed
):
    data = numbers(num_samples)
    options = {"global_batch_size": batch, "steps": steps, "seed": seed}
    whole = drawn(data, **options)
    parts = [drawn(data, **options, shard=Axis(r, num_ranks)) for r in range(num_ranks)]
    assert [concatenated(pieces) for pieces in zip(*parts, strict=True)] == whole
    for pieces in zip(*parts, strict=True):
        sizes = [len(piece) for piece in pieces]
        assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(
    num_samples=st.integers(1, 30),
    batch=st.integers(1, 40),
    steps=st.integers(1, 8),
    start=st.integers(0, 8),
)
def test_a_resumed_run_sees_the_rest(num_samples, batch, steps, start):
    data, start = numbers(num_samples), min(start, steps)
    options = {"global_batch_size": batch, "steps": steps, "seed": 5}
    assert drawn(data, **options)[start:] == drawn(data, **options, start_step=start)


@pytest.mark.parametrize("batch", [1, 4, 10, 25])
def test_each_epoch_uses_each_sample_once(batch):
    steps = -(-30 // batch)
    order = concatenated(
        drawn(numbers(10), global_batch_size=batch, steps=steps, seed=1)
    )
    epochs = [order[i : i + 10] for i in range(0, 30, 10)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_without_steps_it_is_one_epoch_with_a_smaller_last_batch():
    epoch = drawn(numbers(10), global_batch_size=4, seed=0)
    assert [len(batch) for batch in epoch] == [4, 4, 2]
    assert sorted(concatenated(epoch)) == list(range(10))


def test_the_seed_decides():
    options = {"global_batch_size": 50, "steps": 1}
    first = drawn(numbers(50), **options, seed=1)
    torch.manual_seed(99)
    assert drawn(numbers(50), **options, seed=1) == first
    assert drawn(numbers(50), **options, seed=2) != first


def test_late_start_is_not_replayed():
    start = 10**12
    stream = batches(
        numbers(100_000),
        global_batch_size=64,
        steps=start + 1,
        seed=0,
        start_step=start,
    )
    began = time.process_time()
    assert len(next(stream)[0]) == 64
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_dataset_of_single_samples_works(rank):
    options = {"global_batch_size": 2, "steps": 3, "seed": 0, "shard": Axis(rank, 3)}
    for (x, y), (i,) in zip(
        batches(Squares(7), **options), batches(numbers(7), **options), strict=True
    ):
        assert x.shape == (len(i), 2)
        assert torch.equal(x[:, 0], i.float())
        assert torch.equal(y, i**2)


class Single(Squares):
    """A dataset whose samples are what a function makes of a number."""

    def __init__(self, sample) -> None:
        super().__init__(7)
        self.sample = sample

    def __getitem__(self, index: int):
        return self.sample(index)


@pytest.mark.parametrize(
    ("sample", "name"),
    [
        (lambda i: torch.full((4,), float(i)), "Tensor"),
        (lambda i: {"x": torch.tensor(i), "y": i}, "dict"),
        (lambda i: float(i), "float"),
        (lambda i: (torch.tensor(i), "label"), "tuple"),
        (lambda i: (i, {"y": i}), "tuple"),
    ],
)
@pytest.mark.parametrize("shard", [None, Axis(0, 2)], ids=["whole", "empty"])
def test_samples_that_are_no_tuples_of_tensors_are_refused(sample, name, shard):
    stream = batches(Single(sample), global_batch_size=1, shard=shard, seed=0)
    with pytest.raises(TypeError, match=rf"Single has a {name} .*return \(x, y\)"):
        next(stream)


def test_tensors_arrive_on_the_default_device():
    stream = batches(numbers(8), global_batch_size=2, seed=0)
    assert next(stream)[0].device.type == "cpu"
    with torch.device("meta"):
        assert next(stream)[0].device.type == "meta"


def test_bad_batches_raise_at_the_call():
    with pytest.raises(ValueError, match="the dataset is empty"):
        batches(numbers(0), global_batch_size=1, seed=0)
    for bad in (0, -4, 64 / 3, "8"):
        with pytest.raises(ValueError, match=r"global_batch_size=.* must be a whole"):
            batches(numbers(3), global_batch_size=bad, seed=0)
    with pytest.raises(ValueError, match="seed=-1 must be"):
        batches(numbers(3), global_batch_size=1, seed=-1)
    with pytest.raises(ValueError, match=r"steps=2\.5 must be a whole number"):
        batches(numbers(3), global_batch_size=1, seed=0, steps=2.5)
    with pytest.raises(ValueError, match="start_step=4 is not in the run of 3 steps"):
        batches(numbers(3), global_batch_size=1, seed=0, start_step=4)


# ---- transforms --------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [None, 4])
def test_a_transform_sees_the_same_positions_on_any_number_of_ranks(num_ranks, steps):
    # Samples are their own numbers: the order that positions count is visible.
    options = {"global_batch_size": 4, "seed": 3, "steps": steps}
    whole = concatenated(drawn(numbers(10), **options))

    def with_positions(columns, positions):
        assert positions.dtype == torch.int64
        return (*columns, positions)

    parts = [
        batches(
            numbers(10),
            **options,
            shard=Axis(rank, num_ranks),
            transform=with_positions,
        )
        for rank in range(num_ranks)
    ]
    pairs = [
        pair
        for pieces in zip(*parts, strict=True)
        for samples, positions in pieces
        for pair in zip(samples.tolist(), positions.tolist(), strict=True)
    ]
    assert pairs == [(sample, i) for i, sample in enumerate(whole)]


def test_a_resumed_run_transforms_alike():
    options = {"global_batch_size": 4, "steps": 5, "seed": 3}
    transform = lambda columns, positions: (columns[0] * 100 + positions,)
    whole = drawn(numbers(10), **options, transform=transform)
    rest = drawn(numbers(10), **options, start_step=3, transform=transform)
    assert whole[3:] == rest


def test_a_transform_works_on_the_default_device():
    seen = []

    def look(columns, positions):
        seen.append((columns[0].device.type, positions.device.type))
        return columns

    with torch.device("meta"):
        next(batches(numbers(8), global_batch_size=2, seed=0, transform=look))
    assert seen == [("meta", "cpu")]


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        (lambda columns, _: columns[0], TypeError, r"a Tensor.* return \(x, y\)"),
        (lambda columns, _: None, TypeError, "returned a NoneType"),
        (lambda columns, _: (columns[0].tolist(),), TypeError, "tuple of tensors"),
        (lambda columns, _: (columns[0][1:],), ValueError, r"\(1,\)\] of 2 samples"),
        (lambda columns, _: (columns[0].sum(),), ValueError, "keep the first dim"),
    ],
)
def test_a_transform_of_another_kind_is_refused(transform, error, message):
    stream = batches(numbers(8), global_batch_size=2, seed=0, transform=transform)
    with pytest.raises(error, match=message):
        next(stream)


def _whole_mesh():
    mesh = lab.make_mesh(dp=2)
    try:
        batches(numbers(8), global_batch_size=2, seed=0, shard=mesh)
    except ValueError as error:
        return str(error)


def test_a_mesh_of_several_axes_is_refused(world2):
    assert all("several axes" in message for message in world2.run(_whole_mesh))

"""What is fitted is the same over any ranks; what is random depends on the position."""

import itertools

import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch import nn

import labpkg as lab
from labpkg.foundations.transforms import Standardize, augment


def samples(num_samples: int = 37, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return features of very different size, the last one constant."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_samples, 5, generator=generator, dtype=dtype)
    x = x * torch.tensor([1, 1e-4, 1e5, 1, 0]) + torch.tensor([0, 3, -2, 1e4, 0.1])
    return x.to(dtype)


def test_it_is_scikit_learns_scaler():
    x = samples()
    standardize, scaler = Standardize(x), StandardScaler().fit(x.numpy())
    assert standardize.std[-1] == 1
    fresh = samples(5) + 0.3
    expected = torch.from_numpy(scaler.transform(fresh.numpy()))
    torch.testing.assert_close(standardize(fresh), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_samples_end_with_mean_0_and_deviation_1(dtype):
    x = samples(400, dtype)
    y = Standardize(x)(x)
    assert y.dtype == dtype
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9  # 1e4 +- 1 in float32
    assert y.mean(0).abs().max() < tolerance
    assert (y[:, :-1].std(0, correction=0) - 1).abs().max() < tolerance
    assert y[:, -1].abs().max() < tolerance


def test_no_digits_are_lost_to_a_large_mean():
    x = torch.tensor([[1e8 - 1], [1e8 + 1]], dtype=torch.float64)
    assert Standardize(x).std.item() == 1.0  # a mean of squares: 0 or 1.414
    x[:, 0] += torch.tensor([0.25, -0.25])
    assert Standardize(x).std.item() == 0.75


@pytest.mark.parametrize("num_samples", [37, 41, 53, 101])
def test_a_constant_is_constant_although_its_mean_is_rounded(num_samples):
    x = torch.full((num_samples, 1), 3.3, dtype=torch.float64)
    standardize = Standardize(x)
    assert standardize.mean != 3.3
    assert standardize.std == 1


def test_a_deviation_too_small_for_its_dtype_does_not_divide_by_zero():
    x = torch.zeros(1000, 1, dtype=torch.float16)
    x[0] = 6e-8
    assert Standardize(x)(x).isfinite().all()


def test_images_keep_their_shape():
    x = samples(8).view(2, 4, 5)
    standardize = Standardize(x)
    assert standardize.mean.shape == (4, 5)
    torch.testing.assert_close(standardize.mean, x.mean(0))
    assert standardize(x[:1]).shape == (1, 4, 5)


def test_a_checkpoint_carries_the_fit():
    x = samples(dtype=torch.float32)
    trained = nn.Sequential(Standardize(x), nn.Linear(5, 2))
    loaded = nn.Sequential(Standardize(torch.zeros(1, 5)), nn.Linear(5, 2))
    assert not torch.equal(loaded(x), trained(x))
    loaded.load_state_dict(trained.state_dict())
    assert torch.equal(loaded(x), trained(x))
    assert {name for name, _ in trained.named_parameters()} == {"1.weight", "1.bias"}


def _fit(x, borders):
    mesh = lab.make_mesh(dp=len(borders) - 1)["dp"]
    rank = mesh.get_local_rank()
    shard = x[borders[rank] : borders[rank + 1]]
    fitted = Standardize(shard, reduce=lambda sums: lab.all_reduce(sums, mesh))
    return fitted.mean, fitted.std


def test_ranks_with_uneven_and_empty_shards_fit_what_one_process_fits(world4):
    x = samples()
    whole = Standardize(x)
    for mean, std in world4.run(_fit, x, [0, 20, 20, 36, 37]):
        torch.testing.assert_close(mean, whole.mean, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(std, whole.std, atol=1e-12, rtol=1e-12)


def _refusal(x, borders):
    try:
        _fit(x, borders)
    except ValueError as error:
        return str(error)


def test_every_rank_refuses_what_one_rank_holds(world2):
    x = samples()
    x[0, 3] = float("nan")
    for message in world2.run(_refusal, x, [0, 5, 37]):
        assert "feature 3 holds nan or infinity" in message
    for message in world2.run(_refusal, x, [0, 0, 0]):
        assert "no sample on any rank" in message


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 3), "no sample on any rank"),
        (torch.zeros(3), r"of shape \(3,\); call .*unsqueeze\(1\)"),
        (torch.zeros(3, 2, dtype=torch.uint8), r"got torch\.uint8 .* call \.float\(\)"),
        (torch.tensor([[1.0, float("inf")]]), "feature 1 holds nan or infinity"),
    ],
)
def test_what_cannot_be_fitted_raises(x, message):
    with pytest.raises(ValueError, match=message):
        Standardize(x)


@pytest.mark.parametrize("shape", [(5,), (2, 4), (2, 1), (2, 5, 5)])
def test_other_features_raise(shape):
    with pytest.raises(ValueError, match="do not fit a mean of shape"):
        Standardize(samples())(torch.zeros(shape))


# ---- augmentation ------------------------------------------------------------------


def images(num_images: int) -> torch.Tensor:
    return torch.arange(1.0, 1 + 20 * num_images).view(num_images, 4, 5)


def shifted(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Shift by slices: the slow and obvious way."""
    new = torch.zeros_like(image)
    for row, column in itertools.product(range(4), range(5)):
        source = row - down, column - right
        if 0 <= source[0] < 4 and 0 <= source[1] < 5:
            new[row, column] = image[source]
    return new


@pytest.mark.parametrize("max_shift", [0, 1, 2])
def test_each_shift_is_one_of_all_and_all_are_equally_likely(max_shift):
    num_images = 400 * (2 * max_shift + 1) ** 2
    image = images(1)[0]
    moves = range(-max_shift, max_shift + 1)
    all_shifts = torch.stack(
        [shifted(image, *m) for m in itertools.product(moves, moves)]
    )
    found = augment(
        image.expand(num_images, 4, 5),
        torch.arange(num_images),
        max_shift=max_shift,
        seed=0,
    )
    which = (found[:, None] == all_shifts).flatten(2).all(-1)
    assert which.sum(1).eq(1).all()
    counts = which.sum(0)  # 400 each; a binomial deviation is at most 20
    assert counts.min() > 400 - 100
    assert counts.max() < 400 + 100


def test_the_shift_depends_on_seed_and_position_only():
    x, positions = images(50), torch.arange(50)
    whole = augment(x, positions, seed=1)
    torch.manual_seed(99)
    order = torch.randperm(50)
    assert torch.equal(augment(x[order], positions[order], seed=1), whole[order])
    assert not torch.equal(augment(x, positions, seed=2), whole)
    assert not torch.equal(augment(x, positions + 50, seed=1), whole)


def test_the_shifts_never_change():
    # The first 32 bits of what SplitMix64 draws from the seed 0, as published.
    drawn = (0xE220A839, 0x6E789E6A, 0x06C45D18)
    expected = [shifted(images(1)[0], 1 - b % 3, 1 - b // 3 % 3) for b in drawn]
    found = augment(images(1).expand(3, 4, 5), torch.arange(3), seed=0)
    assert torch.equal(found, torch.stack(expected))


def test_neighbouring_seeds_do_not_repeat_each_others_shifts():
    x, positions = images(1).expand(500, 4, 5), torch.arange(500)
    first = augment(x, positions, seed=0)
    for offset in (-1, 0, 1):
        second = augment(x, positions + 1 + offset, seed=1)
        equal = (first == second).flatten(1).all(1).float().mean().item()
        assert equal < 0.2  # by chance 1 in 9


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_any_number_of_ranks_sees_the_same_images_bitwise(num_ranks):
    data = torch.utils.data.TensorDataset(images(7), torch.arange(7))

    def transform(columns, positions):
        return augment(columns[0], positions, seed=0), columns[1]

    def stream(rank, size):
        return lab.batches(
            data,
            global_batch_size=4,
            shard=Shard(rank, size),
            steps=5,
            seed=0,
            transform=transform,
        )

    whole = list(stream(0, 1))
    parts = zip(*(stream(rank, num_ranks) for rank in range(num_ranks)), strict=True)
    for (x, y), pieces in zip(whole, parts, strict=True):
        assert torch.equal(torch.cat([piece[0] for piece in pieces]), x)
        assert torch.equal(torch.cat([piece[1] for piece in pieces]), y)
    first, later = whole[0], whole[2]  # a sample of the first epoch, and of the second
    same = {int(y) for y in first[1]} & {int(y) for y in later[1]}
    assert same
    assert any(
        not torch.equal(first[0][first[1] == y], later[0][later[1] == y]) for y in same
    )


class Shard:
    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks

    def size(self) -> int:
        return self.num_ranks

    def get_local_rank(self) -> int:
        return self.rank


def test_an_empty_batch_and_other_dtypes_pass():
    nothing = augment(images(0), torch.arange(0), seed=0)
    assert nothing.shape == (0, 4, 5)
    pixels = images(3).to(torch.uint8)
    assert augment(pixels, torch.arange(3), seed=0).dtype == torch.uint8


@pytest.mark.parametrize(
    ("shape", "num_positions", "options", "message"),
    [
        ((3, 20), 3, {"seed": 0}, r"got \(3, 20\) and \(3,\); x\.unflatten"),
        ((3, 4, 5), 2, {"seed": 0}, r"got \(3, 4, 5\) and \(2,\)"),
        ((3, 4, 5), 3, {"seed": 0, "max_shift": 4}, "max_shift=4 must be from 0 to 3"),
        ((3, 4, 5), 3, {"seed": 0, "max_shift": -1}, "max_shift=-1 must be from 0"),
        ((3, 4, 5), 3, {"seed": -1}, "seed=-1 at least 0"),
    ],
)
def test_bad_images_and_numbers_raise(shape, num_positions, options, message):
    with pytest.raises(ValueError, match=message):
        augment(torch.zeros(shape), torch.arange(num_positions), **options)

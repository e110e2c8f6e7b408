"""The map of attention says which position reads from which."""

import pytest
import torch
from matplotlib import pyplot as plt

from labpkg import plot


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def causal(T: int) -> torch.Tensor:
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return torch.zeros(T, T).masked_fill(future, -torch.inf).softmax(-1)


def test_rows_are_queries_and_the_first_is_on_top():
    weights = causal(3).requires_grad_()
    ax = plot.attention(weights)
    (image,) = ax.get_images()
    torch.testing.assert_close(
        torch.tensor(image.get_array().tolist()), weights.detach()
    )
    assert image.get_clim() == (0, 1)
    assert ax.get_ylabel().startswith("query")
    assert ax.get_xlabel().startswith("key")
    assert ax.get_ylim()[0] > ax.get_ylim()[1]


def test_tokens_name_both_axes_and_are_visible():
    _, given = plt.subplots()
    ax = plot.attention(causal(4), tokens="a \n\t", ax=given)
    assert ax is given
    for ticks in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [label.get_text() for label in ticks] == ["a", "␣", "↵", "⇥"]
    ax.figure.canvas.draw()  # a missing glyph would warn, and a warning is an error


def test_the_figure_grows_with_the_positions_up_to_a_page():
    heights = [
        plot.attention(causal(T)).figure.get_size_inches()[1] for T in (3, 16, 64)
    ]
    assert heights[0] == pytest.approx(3.2)
    assert heights[0] < heights[1] < heights[2] == pytest.approx(5.6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_half_precision_may_miss_one(dtype):
    weights = torch.full((48, 48), 1 / 48, dtype=dtype)
    assert weights.double().sum(1)[0] != 1
    plot.attention(weights)


@pytest.mark.parametrize(
    ("weights", "tokens", "message"),
    [
        (torch.ones(2, 3) / 3, None, r"got shape \(2, 3\)"),
        (torch.ones(1, 2, 2) / 2, None, r"such as weights\[0, 0\]"),
        (torch.ones(0, 0), None, r"got shape \(0, 0\)"),
        (torch.ones(2, 2), None, "sums go from 2 to 2"),
        (torch.tensor([[2.0, -1.0], [0.5, 0.5]]), None, "must be a distribution"),
        (torch.full((2, 2), torch.nan), None, "must be a distribution"),
        (torch.eye(2), "abc", "3 tokens for 2 positions"),
    ],
)
def test_what_is_no_map_is_refused(weights, tokens, message):
    with pytest.raises(ValueError, match=message):
        plot.attention(weights, tokens=tokens)

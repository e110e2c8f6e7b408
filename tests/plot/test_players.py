"""Players: complete in one piece of HTML, the same for the same frames, readable."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from labpkg import plot


def draw(frame, ax):
    ax.plot([0, frame], [0, 1])
    ax.set(xlim=(0, 3), ylim=(0, 1))


def make(frames=(1, 2, 3), **options):
    options = {"alt": "A line that turns", **options}
    return plot.player(draw, frames, **options)


@pytest.fixture(scope="module")
def player():
    return make()  # a picture takes 0.1 s


def pictures(page):
    return json.loads(re.search(r"frames = (\[.*?\]), labels", page).group(1))


def test_the_page_holds_every_frame_and_fetches_nothing(player):
    page = player._repr_html_()
    found = pictures(page)
    assert len(set(found)) == 3
    for uri in found:
        image = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
        assert image.size == (960, 480)
    assert not re.search(r"https?://|src=\"//", page)


def test_the_same_frames_give_the_same_page(player):
    assert make().page == player.page
    assert player.page != make((1, 2, 2.5)).page


def test_texts_are_escaped():
    page = make(
        alt='<a "b">', caption="1 < 2", label=lambda frame: f"</script>{frame}"
    ).page
    assert 'alt="&lt;a &quot;b&quot;&gt;"' in page
    assert "1 &lt; 2" in page
    assert page.count("</script>") == 1


def test_figures_are_closed():
    from matplotlib import pyplot as plt

    before = plt.get_fignums()
    make()
    with pytest.raises(ZeroDivisionError):
        plot.player(lambda frame, ax: 1 / 0, [1], alt="nothing")
    assert plt.get_fignums() == before


@pytest.mark.parametrize("wrong", [{"frames": ()}, {"alt": " "}])
def test_a_player_needs_frames_and_words(wrong):
    with pytest.raises(ValueError, match="say in a sentence"):
        make(**wrong)

"""Colours of pictures in words."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldmcli.data import shapes
from ldmcli.maths.colour_words import COLOUR_WORDS, colour_words

TWEMOJI = {"#DD2E44": "red", "#F4900C": "orange", "#FFCC4D": "yellow", "#78B159": "green", "#55ACEE": "blue"}
TWEMOJI |= {"#AA8ED6": "purple", "#F4ABBA": "pink", "#C1694F": "brown", "#31373D": "black", "#E6E7E8": "white"}
TWEMOJI |= {"#99AAB5": "gray", "#662113": "brown"}


def disc(colour: str, background="white", outline=None) -> np.ndarray:
    image = Image.new("RGB", (64, 64), background)
    ImageDraw.Draw(image).ellipse((8, 8, 56, 56), colour, outline, 2)
    return np.asarray(image)


@pytest.mark.parametrize("colour, word", TWEMOJI.items())
@pytest.mark.parametrize("background", ["white", "black", "#2040c0"])
def test_a_colour_has_its_name_on_any_background(colour, word, background):
    assert colour_words(disc(colour, background)) == [word]


@pytest.mark.parametrize("background", shapes.BACKGROUNDS.values())
def test_shapes_have_the_colours_of_their_captions(background):
    for name, colour in shapes.COLOURS.items():
        if colour != background:
            assert colour_words(disc(colour, background)) == [name]


def test_outlines_do_not_count_and_white_inside_of_them_does():
    assert colour_words(disc("#DD2E44", outline="black")) == ["red"]
    assert colour_words(disc("white", outline="black")) == ["white"]


def test_words_come_by_their_share_three_at_most_and_small_parts_not_at_all():
    stripes = np.full((64, 64, 3), 255, np.uint8)
    shares = {(220, 30, 30): 22, (30, 160, 60): 16, (40, 80, 240): 12, (250, 230, 40): 10, (0, 0, 0): 4}
    stripes[:] = np.repeat(np.array(list(shares), np.uint8), list(shares.values()), axis=0)[:, None]
    assert colour_words(stripes) == ["red", "green", "blue"]
    stripes[:30], stripes[30:58], stripes[58:] = (220, 30, 30), (30, 160, 60), (40, 80, 240)
    assert colour_words(stripes) == ["red", "green"]


def test_a_photograph_counts_to_its_border_and_an_empty_picture_has_no_colour():
    gradient = np.zeros((40, 60, 3), np.uint8)
    gradient[..., 2] = np.linspace(90, 255, 60).astype(np.uint8)
    assert colour_words(gradient) == ["blue"]
    assert colour_words(np.full((64, 64, 3), 255, np.uint8)) == []


def test_any_pixels_give_known_words_and_are_left_as_they_are():
    for k in range(20):
        pixels = np.random.default_rng(k).integers(0, 256, (9 + k, 30 - k, 3), dtype=np.uint8)
        before = pixels.copy()
        assert set(colour_words(pixels)) <= set(COLOUR_WORDS) and (pixels == before).all()

"""The dominant colours of a picture in words: a function of its pixels alone."""

import numpy as np
from scipy import ndimage

# the eleven basic colour terms of English (Berlin and Kay, 1969) and cyan
COLOUR_WORDS = tuple("black white gray red orange yellow green cyan blue purple pink brown".split())
MOST = 3  # words of a picture
LEAST_SHARE = 0.15  # of what is no background
FLAT = 12  # levels, of 255, by which pixels of one flat background differ at most
_HUES = ((15, "red"), (37, "orange"), (68, "yellow"), (168, "green"), (192, "cyan"), (258, "blue"), (300, "purple"))


def colour_words(pixels: np.ndarray) -> list[str]:
    """Up to three of COLOUR_WORDS, the most frequent first, that each fill at least LEAST_SHARE of a picture.

    pixels: uint8 (h, w, 3). A flat background (most of the border has its colour) does not count, and neither do the
    pixels beside it, where outlines are and colours mix. [] for a picture of nothing else.
    """
    shown = _foreground(pixels)
    inner = ndimage.binary_erosion(shown, iterations=max(1, min(pixels.shape[:2]) // 32), border_value=1)
    seen = pixels[inner if inner.sum() >= shown.sum() / 4 else shown]
    if not len(seen):
        return []
    counts = np.bincount(_named(seen), minlength=len(COLOUR_WORDS))
    order = np.argsort(-counts, kind="stable")[:MOST]
    return [COLOUR_WORDS[k] for k in order if counts[k] >= max(LEAST_SHARE * len(seen), 1)]


def _foreground(pixels: np.ndarray) -> np.ndarray:
    """bool (h, w): False where a flat background that touches the border is seen."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).astype(np.int16)
    ground = np.median(border, axis=0)
    if (np.abs(border - ground).max(axis=1) <= FLAT).mean() <= 0.5:
        return np.ones(pixels.shape[:2], bool)
    regions, _ = ndimage.label(np.abs(pixels.astype(np.int16) - ground).max(axis=2) <= FLAT)
    outside = np.unique(np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]]))
    return ~np.isin(regions, outside[outside > 0])


def _named(pixels: np.ndarray) -> np.ndarray:
    """The number in COLOUR_WORDS of each pixel, uint8 (n, 3) → int (n,), by hue, lightness and saturation."""
    rgb = pixels.astype(np.float64) / 255
    high, low = rgb.max(axis=1), rgb.min(axis=1)
    chroma, lightness = high - low, (high + low) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        saturation = np.nan_to_num(chroma / (1 - np.abs(2 * lightness - 1)))
        r, g, b = rgb.T
        sixths = np.select([high == r, high == g], [((g - b) / chroma) % 6, (b - r) / chroma + 2], (r - g) / chroma + 4)
    hue = 60 * np.nan_to_num(sixths)
    word = {name: k for k, name in enumerate(COLOUR_WORDS)}
    found = np.select([hue < end for end, _ in _HUES], [word[name] for _, name in _HUES], word["pink"])
    found = np.where(hue >= 340, word["red"], found)
    warm = (hue < 37) & (lightness > 0.12)
    found = np.where(((hue < 12) | (hue >= 300)) & (lightness > 0.6), word["pink"], found)
    found = np.where((hue >= 300) & (hue < 340) & (lightness < 0.35), word["purple"], found)
    found = np.where(warm & (hue >= 8) & ((lightness < 0.42) | (saturation < 0.6)), word["brown"], found)
    grey = (chroma < 0.1) | (saturation < 0.18)
    found = np.where(grey, word["gray"], found)
    found = np.where(grey & (lightness > 0.85) | (lightness > 0.94), word["white"], found)
    return np.where(grey & (lightness < 0.25) | (lightness < 0.12), word["black"], found)

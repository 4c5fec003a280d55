"""Random holes for the training of inpainting, in the manner of LaMa (Suvorov et al. 2022, "wide masks").

That paper draws chains of thick strokes and rectangles of any aspect. The numbers here are ours, given as shares of
the picture's short side, so that a mask looks alike at every size:

- a mask is of strokes (45 %), boxes (30 %) or both (25 %);
- strokes: 1 … 4 chains, each of 2 … 7 segments, 0.08 … 0.45 long, each turned from the one before by up to 1.9 rad
  either way; one thickness a chain, 0.06 … 0.28; joints and ends are round;
- boxes: 1 … 4, each side 0.12 … 0.55 of the picture's side along it, anywhere inside the picture; sides are rounded to
  whole pixels.

Numbers of things are uniform over the counts named, lengths uniform over their range. A mask whose holes cover less
than 4 % or more than 75 % of the picture is drawn again.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ldmcli.maths import rng

KINDS = {"strokes": 0.45, "boxes": 0.30, "both": 0.25}  # probability
CHAINS, SEGMENTS, BOXES = (1, 4), (2, 7), (1, 4)  # at least, at most
LENGTH, THICKNESS, SIDE = (0.08, 0.45), (0.06, 0.28), (0.12, 0.55)  # shares of a side
TURN = 1.9  # radians, either way
SHARE = (0.04, 0.75)  # of the picture that holes cover
ATTEMPTS = 100


def mask_kind(*key: *rng.Key) -> str:
    """Which of `KINDS` the mask of a key is made of."""
    u = (rng.key(*key, "mask kind") >> 10) * 2.0**-53
    for name, probability in KINDS.items():
        u -= probability
        if u < 0:
            return name
    return name


def random_mask(height: int, width: int, *key: *rng.Key) -> np.ndarray:
    """bool (height, width), True = hole: a function of size and key (a seed, then whatever names the draw) alone.

    Between 4 % and 75 % of the pixels are holes, at any size from a few pixels on.
    """
    kind = mask_kind(*key)
    for attempt in range(ATTEMPTS):
        draw = np.random.Generator(np.random.PCG64(rng.key(*key, "mask", attempt)))
        image = Image.new("L", (width, height))
        canvas = ImageDraw.Draw(image)
        if kind != "boxes":
            for _ in range(draw.integers(*CHAINS, endpoint=True)):
                _chain(canvas, height, width, draw)
        if kind != "strokes":
            for _ in range(draw.integers(*BOXES, endpoint=True)):
                _box(canvas, height, width, draw)
        mask = np.asarray(image) > 0
        if SHARE[0] <= mask.mean() <= SHARE[1]:
            return mask
    mask = np.zeros((height, width), bool)  # next to impossible: half of both sides
    mask[height // 4 : height // 4 + max(height // 2, 1), width // 4 : width // 4 + max(width // 2, 1)] = True
    return mask


def _chain(canvas: ImageDraw.ImageDraw, height: int, width: int, draw: np.random.Generator) -> None:
    """One chain of thick segments that starts anywhere in the picture and may leave it."""
    unit = min(height, width)
    x, y = draw.uniform(0, width), draw.uniform(0, height)
    thickness = max(draw.uniform(*THICKNESS) * unit, 1.0)
    direction = draw.uniform(0, 2 * math.pi)
    points = [(x, y)]
    for _ in range(draw.integers(*SEGMENTS, endpoint=True)):
        length = draw.uniform(*LENGTH) * unit
        x, y = x + length * math.cos(direction), y + length * math.sin(direction)
        points.append((x, y))
        direction += draw.uniform(-TURN, TURN)
    canvas.line(points, fill=255, width=max(round(thickness), 1))
    radius = thickness / 2
    for px, py in points:
        canvas.ellipse((px - radius, py - radius, px + radius, py + radius), fill=255)


def _box(canvas: ImageDraw.ImageDraw, height: int, width: int, draw: np.random.Generator) -> None:
    h, w = (max(round(draw.uniform(*SIDE) * side), 1) for side in (height, width))
    top, left = (int(draw.integers(0, room, endpoint=True)) for room in (height - h, width - w))
    canvas.rectangle((left, top, left + w - 1, top + h - 1), fill=255)


def masked_share(covered: Sequence[float]) -> dict[str, float]:
    """How much of the pictures holes cover: {"n", "mean", "std", "min", "p10", "median", "p90", "max"} over masks.

    covered: the share of each, 0 … 1. Raises ValueError for none.
    """
    shares = np.array(covered)
    if not len(shares):
        raise ValueError("masked_share: no masks")
    low, median, high = (float(value) for value in np.quantile(shares, (0.1, 0.5, 0.9)))
    return {
        "n": len(shares),
        "mean": float(shares.mean()),
        "std": float(shares.std()),
        "min": float(shares.min()),
        "p10": low,
        "median": median,
        "p90": high,
        "max": float(shares.max()),
    }

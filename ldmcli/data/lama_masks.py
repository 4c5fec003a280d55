"""Masks of LaMa (Suvorov et al. 2022), with which the paper's inpainting was trained and measured (Sec. 4.5, Tab. 7).

The numbers are those of LaMa's published configurations for evaluation, thin, medium and thick, at 256 and 512 px; the
way of drawing is that of its generator, so far as facts go: a mask is of strokes, or of boxes with probability 3 / 13.
Strokes are chains of 1 to 5 segments; the direction of a segment is 0.01 + {0, 1, 2, 3} rad from the vertical, to the
other side in every second chain; every segment has a width of its own. Chains start in the picture, and ends are kept
in it. Masks of more than half of the picture are drawn again. Numbers of pixels grow with the picture: those of 256 px
below 384 px a side, of 512 px above.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ldmcli.maths import rng

BOX_PROBABILITY = 0.3 / 1.3
MOST_COVERED = 0.5
SEGMENTS, DIRECTIONS = 5, 4
LEAST_LENGTH, LEAST_WIDTH = 10, 5  # px
ATTEMPTS = 100


@dataclass(frozen=True, kw_only=True)
class Strokes:
    """Numbers of a configuration, in pixels of its size. chains, boxes, sides: at least, at most; lengths, widths: how
    many whole numbers there are from `LEAST_LENGTH`, `LEAST_WIDTH` on. boxes: none in (0, 0)."""

    chains: tuple[int, int]
    widths: int
    lengths: int
    boxes: tuple[int, int] = (0, 0)
    sides: tuple[int, int] = (0, 0)
    margin: int = 0


KINDS: dict[str, dict[int, Strokes]] = {
    "lama-thin": {
        256: Strokes(chains=(4, 51), widths=10, lengths=40),
        512: Strokes(chains=(4, 71), widths=20, lengths=100),
    },
    "lama-medium": {
        256: Strokes(chains=(4, 6), widths=50, lengths=100, boxes=(1, 5), sides=(10, 50)),
        512: Strokes(chains=(4, 11), widths=100, lengths=200, boxes=(1, 5), sides=(30, 150)),
    },
    "lama-thick": {
        256: Strokes(chains=(1, 6), widths=100, lengths=200, boxes=(1, 3), sides=(30, 150), margin=10),
        512: Strokes(chains=(1, 6), widths=250, lengths=450, boxes=(1, 4), sides=(30, 300), margin=10),
    },
}


def lama_mask(kind: str, height: int, width: int, *key: *rng.Key) -> np.ndarray:
    """bool (height, width), True = hole: a function of kind (of `KINDS`), size and key alone."""
    side = 256 if min(height, width) < 384 else 512
    strokes, scale = KINDS[kind][side], min(height, width) / side
    for attempt in range(ATTEMPTS):
        draw = np.random.Generator(np.random.PCG64(rng.key(*key, kind, attempt)))
        image = Image.new("L", (width, height))
        canvas = ImageDraw.Draw(image)
        if strokes.boxes[1] and draw.random() < BOX_PROBABILITY:
            _boxes(canvas, strokes, scale, draw)
        else:
            _chains(canvas, strokes, scale, draw)
        mask = np.asarray(image) > 0
        if 0 < mask.mean() <= MOST_COVERED:
            break
    return mask


def _chains(canvas: ImageDraw.ImageDraw, strokes: Strokes, scale: float, draw: np.random.Generator) -> None:
    width, height = canvas.im.size
    for k in range(draw.integers(*strokes.chains, endpoint=True)):
        x, y = int(draw.integers(width)), int(draw.integers(height))
        for _ in range(draw.integers(1, SEGMENTS, endpoint=True)):
            angle = 0.01 + float(draw.integers(DIRECTIONS))
            length = scale * float(LEAST_LENGTH + draw.integers(strokes.lengths))
            thickness = max(scale * float(LEAST_WIDTH + draw.integers(strokes.widths)), 1.0)
            sideways = -math.sin(angle) if k % 2 == 0 else math.sin(angle)
            end = np.clip((x + length * sideways, y + length * math.cos(angle)), 0, (width, height))
            _segment(canvas, (x, y), (int(end[0]), int(end[1])), thickness)
            x, y = int(end[0]), int(end[1])


def _segment(canvas: ImageDraw.ImageDraw, start: tuple[int, int], end: tuple[int, int], thickness: float) -> None:
    """A thick line with round ends."""
    canvas.line((start, end), fill=255, width=max(round(thickness), 1))
    radius = thickness / 2
    for x, y in (start, end):
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)


def _boxes(canvas: ImageDraw.ImageDraw, strokes: Strokes, scale: float, draw: np.random.Generator) -> None:
    width, height = canvas.im.size
    margin = round(scale * strokes.margin)
    most = min(round(scale * strokes.sides[1]), height - 2 * margin, width - 2 * margin)
    least = min(max(round(scale * strokes.sides[0]), 1), most)
    for _ in range(draw.integers(*strokes.boxes, endpoint=True)):
        w, h = (int(draw.integers(least, most, endpoint=True)) for _ in range(2))
        left = int(draw.integers(margin, width - margin - w, endpoint=True))
        top = int(draw.integers(margin, height - margin - h, endpoint=True))
        canvas.rectangle((left, top, left + w - 1, top + h - 1), fill=255)

"""Cutting pictures and latents into overlapping tiles and putting results together again (Sec. 4.3.2).

All lengths are positions of the thing that is cut: pixels or latent positions.
"""

from math import ceil

import numpy as np
import torch
from torch import Tensor


def positions(length: int, tile: int, stride: int) -> list[int]:
    """Where tiles of `tile` positions begin so that all of `length` is covered, rising.

    Every `stride` positions; the last tile is moved back so that it ends with the length. The original leaves what
    does not fit uncovered. A length of at most one tile has one, at 0.
    """
    if length <= tile:
        return [0]
    count = ceil((length - tile) / stride) + 1
    return [min(k * stride, length - tile) for k in range(count)]


def even_positions(length: int, tile: int, overlap: int) -> list[int]:
    """As few tiles as overlap by at least `overlap`, spread evenly from end to end."""
    if length <= tile:
        return [0]
    count = ceil((length - tile) / (tile - overlap)) + 1
    return [round(k * (length - tile) / (count - 1)) for k in range(count)]


def edge_weights(height: int, width: int, low: float, high: float) -> Tensor:
    """The original's weight of a tile's positions, (height, width): the distance from the nearest edge as a share of
    the tile's side, on both axes the smaller, held between `low` and `high`."""
    y = torch.linspace(0, 1, height)[:, None]
    x = torch.linspace(0, 1, width)[None]
    nearest = torch.minimum(torch.minimum(y, 1 - y), torch.minimum(x, 1 - x))
    return nearest.clamp(low, high)


def smooth_weights(length: int, before: int, after: int) -> Tensor:
    """A tile's weight along one axis, (length,): 1 inside, falling over `before` and `after` positions towards the
    ends as a raised cosine, never 0. Two tiles that overlap by as much sum to 1 everywhere."""
    weight = torch.ones(length)
    for size, flip in ((before, False), (after, True)):
        if size:
            ramp = torch.sin((torch.arange(size) + 0.5) / size * torch.pi / 2) ** 2
            weight[slice(-size, None) if flip else slice(size)] *= ramp.flip(0) if flip else ramp
    return weight


def padded(image: np.ndarray, unit: int) -> np.ndarray:
    """(h, w, …) with both sides made multiples of `unit` by mirroring at the lower and right edge."""
    pads = [(0, -side % unit) for side in image.shape[:2]]
    while any(after for _, after in pads):  # a mirror is at most as long as the picture
        step = [(0, min(after, max(1, side - 1))) for (_, after), side in zip(pads, image.shape[:2])]
        mode = "reflect" if min(image.shape[:2]) > 1 else "edge"
        image = np.pad(image, [*step, *[(0, 0)] * (image.ndim - 2)], mode=mode)
        pads = [(0, after - done) for (_, after), (_, done) in zip(pads, step)]
    return image

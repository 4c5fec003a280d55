"""Cutting pictures and latents into overlapping tiles and putting results together again (Sec. 4.3.2).

Lengths count positions of the thing that is cut: pixels, or latent positions. Arithmetic only: what runs on a tile is
given as a function.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import torch
from torch import Tensor


def even_positions(length: int, tile: int, overlap: int, unit: int = 1) -> list[int]:
    """As few tiles as cover `length` and overlap by at least `overlap`, spread evenly, at multiples of `unit`.

    length and tile are multiples of the unit; overlap < tile.
    """
    if length <= tile:
        return [0]
    rest, stride = (length - tile) // unit, max(1, (tile - overlap) // unit)
    count = ceil(rest / stride) + 1
    return [k * rest // (count - 1) * unit for k in range(count)]


def ramp_weights(length: int, before: int, after: int) -> Tensor:
    """A tile's weight along one axis, (length,), where it overlaps its neighbours by `before` and `after` positions.

    Of an overlap the outer 3/8 have weight 0 (a network sees no surroundings there), the inner 3/8 weight 1, and a
    raised cosine lies between; those of two neighbours sum to 1.
    """
    weight = torch.ones(length)
    weight[:before] = _rising(before)
    weight[length - after :] *= _rising(after).flip(0)
    return weight


def _rising(overlap: int) -> Tensor:
    share = ((torch.arange(overlap) + 0.5) / max(1, overlap) * 4 - 1.5).clamp(0, 1)
    return torch.sin(share * torch.pi / 2) ** 2


@dataclass(frozen=True)
class TilePlan:
    """Tiles of `tile` = (h, w) positions at `corners` = [(top, left)], and a weight (h', w') for the result of each.

    A result is up / down times as large as its tile on both sides.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    corners: list[tuple[int, int]]
    weights: list[Tensor]
    up: int = 1
    down: int = 1

    def to(self, device: torch.device) -> "TilePlan":
        """The plan with its weights on a device, for results that lie there."""
        return replace(self, weights=[weight.to(device) for weight in self.weights])

    def scaled(self, length: int) -> int:
        """A length of the input in positions of the output."""
        return length * self.up // self.down

    def place(self, k: int) -> tuple[slice, slice]:
        """Rows and columns of the output that the result of tile k fills."""
        top, left = (self.scaled(start) for start in self.corners[k])
        height, width = self.weights[k].shape
        return slice(top, top + height), slice(left, left + width)

    def cut(self, x: Tensor, corner: tuple[int, int]) -> Tensor:
        """The tile at a corner of x (…, H, W)."""
        (top, left), (height, width) = corner, self.tile
        return x[..., top : top + height, left : left + width]


def overlapping_tiles(
    size: tuple[int, int], tile: int, overlap: int, *, unit: int = 1, up: int = 1, down: int = 1
) -> TilePlan:
    """Square tiles of at most `tile` with weights that leave no seam; corners at multiples of `unit`."""
    tile_size = (min(tile, size[0]), min(tile, size[1]))
    axes = []
    for length, side in zip(size, tile_size):
        starts = even_positions(length, side, overlap, unit)
        shared = [0, *(a + side - b for a, b in zip(starts, starts[1:])), 0]
        shared = [positions * up // down for positions in shared]
        weights = [ramp_weights(side * up // down, *ends) for ends in zip(shared, shared[1:])]
        axes.append(list(zip(starts, weights)))
    corners = [(top, left) for top, _ in axes[0] for left, _ in axes[1]]
    return TilePlan(size, tile_size, corners, [y[:, None] * x for _, y in axes[0] for _, x in axes[1]], up, down)


def blend(function: Callable[[int], Tensor], plan: TilePlan) -> Tensor:
    """Σ_k weight_k · function(k), divided by the sum of the weights: (B, c, H', W').

    function(k) is the result for tile k, (B, c, h', w').
    """
    total, covered = None, coverage(plan)
    for k, weight in enumerate(plan.weights):
        part = function(k)
        if total is None:
            total = part.new_zeros(*part.shape[:2], *covered.shape)
        total[(..., *plan.place(k))] += part * weight.to(part)
    assert total is not None
    return total / covered.to(total)


def coverage(plan: TilePlan) -> Tensor:
    """Sum of the weights at each position of the output, (H', W')."""
    covered = torch.zeros(*(plan.scaled(length) for length in plan.size), device=plan.weights[0].device)
    for k, weight in enumerate(plan.weights):
        covered[plan.place(k)] += weight
    return covered


def pad_reflect(image: np.ndarray, unit: int) -> np.ndarray:
    """(h, w, …) with both sides made multiples of `unit` by mirroring at the lower and right edge."""
    while any(side % unit for side in image.shape[:2]):  # a mirror image is at most as long as the picture
        after = [min(-side % unit, max(1, side - 1)) for side in image.shape[:2]]
        pads = [(0, length) for length in after] + [(0, 0)] * (image.ndim - 2)
        image = np.pad(image, pads, mode="reflect" if min(image.shape[:2]) > 1 else "edge")
    return image


def center_slices(size: tuple[int, int], inside: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the middle `inside` = (h, w) of `size` = (H, W)."""
    rows, columns = (slice((a - b) // 2, (a - b) // 2 + b) for a, b in zip(size, inside))
    return rows, columns


def center_corner(size: tuple[int, int], inside: tuple[int, int]) -> tuple[int, int]:
    """Row and column of `size` where its middle `inside` begins."""
    rows, columns = center_slices(size, inside)
    return rows.start, columns.start


def reframe_boxes(
    bbox: np.ndarray, inside: tuple[int, int], size: tuple[int, int], corner: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Boxes (n, 4), x, y, w, h as shares of a picture of `inside` = (h, w) px, as shares of one of `size` = (H, W) that
    holds it with its upper left pixel at `corner` = (row, column)."""
    if tuple(inside) == tuple(size):
        return bbox
    (height, width), (top, left) = size, corner
    pixels = bbox * np.array([inside[1], inside[0], inside[1], inside[0]]) + np.array([left, top, 0, 0])
    return pixels / np.array([width, height, width, height])


def pad_edge(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w, …) in the middle of `size`, its edges carried on."""
    pads = [(part.start, length - part.stop) for part, length in zip(center_slices(size, image.shape[:2]), size)]
    return np.pad(image, pads + [(0, 0)] * (image.ndim - 2), mode="edge")

"""Pictures of a data set that are nearly the same: saved again, mirrored, shifted by a pixel.

Each picture has a signature of 192 bytes, its means over 8 x 8 areas. Pairs of like signatures are looked at again, at
64 px, aligned as `maths.copies` aligns samples with training pictures.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ldmcli.maths.copies import COARSE, aligned_distance, coarse

COMPARED = 20_000  # pictures, of which each is compared with each
LOOKED_AT = 4_000  # pairs, the likest first
SIDE = 64  # px at which pairs are looked at
ALIKE, ROUNDING = 0.25, 3.0  # deviation of two signatures: share of the picture's own, and grey levels on top
NEAR = 0.06  # distance of a near copy (docs/experiments.md)
BLOCK = 512  # pictures compared at a time


@dataclass(frozen=True)
class NearPair:
    """Two pictures that are nearly the same, by number, first < second. how: "alike", "shifted" or "mirrored";
    distance: of `maths.copies.aligned_distance`, 0 = the same."""

    first: int
    second: int
    how: str
    distance: float


def signature(picture: Image.Image) -> np.ndarray:
    """uint8 (192,) of an RGB picture of any size."""
    return coarse(np.asarray(picture)).astype(np.uint8)


def near_pairs(signatures: np.ndarray, picture: Callable[[int], Image.Image]) -> list[NearPair]:
    """The pairs of near copies among pictures with these signatures, uint8 (n, 192), in order of pictures.

    picture: number → RGB picture; it is asked for those only whose signatures are like another's.
    """
    found = []
    for first, second in _like(signatures):
        a, b = picture(first), picture(second)
        side = min(SIDE, *a.size, *b.size)
        distance, (mirror, down, right) = aligned_distance(*(_square(one, side) for one in (a, b)))
        if distance < NEAR:
            how = "mirrored" if mirror else "shifted" if down or right else "alike"
            found.append(NearPair(first, second, how, distance))
    return found


def _square(picture: Image.Image, side: int) -> np.ndarray:
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX))


def _like(signatures: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of pictures whose signatures, one of them mirrored or not, are alike; `LOOKED_AT` at most.

    Memory: O(n) beside the pairs.
    """
    own = signatures.astype(np.float32)
    sides = own.reshape(-1, COARSE, COARSE, 3)
    mirror_images = np.ascontiguousarray(sides[:, :, ::-1]).reshape(own.shape)
    bound = np.square(ALIKE * own.std(1) + ROUNDING) * own.shape[1]
    squares = np.square(own).sum(1)
    pairs, likeness = [np.empty((0, 2), np.int64)], [np.empty(0, np.float32)]
    for start in range(0, len(own), BLOCK):
        part, others = slice(start, start + BLOCK), own[start:].T
        product = np.maximum(own[part] @ others, mirror_images[part] @ others)
        relative = (squares[part, None] + squares[start:] - 2 * product) / bound[part, None]
        i, j = np.nonzero(np.triu(relative < 1, 1))
        pairs.append(np.stack([i, j], 1) + start)
        likeness.append(relative[i, j])
    found, order = np.concatenate(pairs), np.argsort(np.concatenate(likeness), kind="stable")[:LOOKED_AT]
    return [(int(i), int(j)) for i, j in sorted(found[order].tolist())]

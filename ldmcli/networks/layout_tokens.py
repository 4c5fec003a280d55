"""Layouts as token sequences, as the published layout models read them (App. D.3; facts in the original's builder).

An object is three tokens: its category, and the grid points of its top left and bottom right corner (or two: category
and centre). Unused places hold the empty token, the last of the vocabulary; two tokens for the corners of the crop
end the sequence. Categories, grid points and the empty token share one set of numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np

WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Layout:
    """How layouts become tokens. slots: objects at most; crop: whether two tokens tell the crop; form: box | centre."""

    slots: int = 30
    vocabulary: int = 8192
    crop: bool = True
    form: str = "box"

    @property
    def grid(self) -> int:
        """Points a side: the square that the vocabulary has room for (90 of 8192)."""
        return isqrt(self.vocabulary)

    @property
    def empty(self) -> int:
        """The token of an unused place."""
        return self.vocabulary - 1

    @property
    def width(self) -> int:
        """Tokens an object."""
        return 3 if self.form == "box" else 2

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.slots * self.width + 2 * self.crop

    def points(self, xy: np.ndarray) -> np.ndarray:
        """Shares (n, 2) x, y in [0, 1] -> tokens (n,): the nearest grid point, halves to the even one."""
        x, y = np.rint(np.asarray(xy, np.float64).reshape(-1, 2).T * (self.grid - 1)).astype(np.int64)
        return y * self.grid + x

    def places(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Inverse of `points`: tokens (n,) -> shares (n, 2)."""
        tokens = np.asarray(tokens, np.int64)
        return np.stack([tokens % self.grid, tokens // self.grid], axis=-1) / (self.grid - 1)

    def tokens(
        self, bbox: np.ndarray, category: Sequence[int] | np.ndarray, *, crop=WHOLE, flip: bool = False
    ) -> np.ndarray:
        """Boxes (n, 4) x, y, w, h as shares of the whole picture, categories (n,) -> (length,) int64, in that order.

        The first `slots` objects count. Those that do not meet the crop are left out. With crop tokens, boxes are told
        in coordinates of the whole picture, else in those of the crop, and clipped to 0 … 1 there. flip mirrors boxes
        and crop. Categories must leave the empty token free.
        """
        boxes = _corners(np.asarray(bbox, np.float64).reshape(-1, 4)[: self.slots])
        kinds = np.asarray(category, np.int64).reshape(-1)[: self.slots]
        frame = _corners(np.asarray(crop, np.float64).reshape(1, 4))
        if flip:
            boxes, frame = _mirrored(boxes), _mirrored(frame)
        meets = (np.minimum(boxes, frame)[:, 2:] > np.maximum(boxes, frame)[:, :2]).all(axis=1)
        boxes, kinds = boxes[meets], kinds[meets]
        if not self.crop:
            boxes = (boxes - frame[:, [0, 1, 0, 1]]) / np.tile(frame[:, 2:] - frame[:, :2], 2)
        boxes = boxes.clip(0, 1)
        corners = (boxes[:, :2], boxes[:, 2:]) if self.form == "box" else ((boxes[:, :2] + boxes[:, 2:]) / 2,)
        out = np.full(self.length, self.empty, np.int64)
        told = np.stack([kinds, *(self.points(corner) for corner in corners)], axis=1)
        out[: told.size] = told.reshape(-1)
        if self.crop:
            out[-2:] = self.points(frame.reshape(2, 2))
        return out

    def read(self, tokens: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Inverse of `tokens`, up to the grid: (categories (n,), boxes (n, 4) xywh or centres (n, 2), crop xywh)."""
        tokens = np.asarray(tokens, np.int64)
        crop = None
        if self.crop:
            top, bottom = self.places(tokens[-2:])
            crop, tokens = np.concatenate([top, bottom - top]), tokens[:-2]
        told = tokens.reshape(-1, self.width)
        told = told[told[:, 0] != self.empty]
        where = self.places(told[:, 1:])
        if self.form == "centre":
            return told[:, 0], where[:, 0], crop
        return told[:, 0], np.concatenate([where[:, 0], where[:, 1] - where[:, 0]], axis=1), crop


def flagged(
    category: int,
    categories: int,
    *,
    group: bool = False,
    occluded: bool = False,
    depiction: bool = False,
    inside: bool = False,
) -> int:
    """The token of a category with the marks of OpenImages: group 1, occluded 2, depiction 4, inside 8."""
    return category + categories * (group + 2 * occluded + 4 * depiction + 8 * inside)


def _corners(bbox: np.ndarray) -> np.ndarray:
    return np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], axis=1)


def _mirrored(corners: np.ndarray) -> np.ndarray:
    return np.stack([1 - corners[:, 2], corners[:, 1], 1 - corners[:, 0], corners[:, 3]], axis=1)

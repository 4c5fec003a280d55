"""Boxes with categories as a condition: tokens through the transformer that text goes through (App. D.3, Tab. 17), and
planes beside z_t on which each box is painted where it lies.

Layout tokens, as the published models read them (the original's builder): an object is three tokens, its
category and the grid points of its top left and bottom right corner (or two, category and centre). Unused places hold
the empty token, the last of the vocabulary; two tokens for the corners of the crop end the sequence. Categories, grid
points and the empty token share one set of numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldmcli.core.errors import InputError
from ldmcli.core.settings import ConditionSettings
from ldmcli.networks.conditioning import Conditioner, Conditioning
from ldmcli.networks.names import hint, place_of
from ldmcli.networks.text_encoder import TextTransformer, pooled, vector_of_tokens
from ldmcli.networks.unet import sinusoidal_map

MAX_OBJECTS = 30
VOCABULARY = 8192
WHOLE = (0.0, 0.0, 1.0, 1.0)  # the crop that is all of the picture


@dataclass(frozen=True)
class Layout:
    """How layouts become tokens. slots: objects at most; crop: whether two tokens hold the crop; form: box | centre."""

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

        The first `slots` objects count. Those that do not meet the crop are left out. With crop tokens, boxes are given
        in coordinates of the whole picture, else in those of the crop, and clipped to 0 … 1 there. flip mirrors boxes
        and crop. Categories must leave the empty token free.
        """
        boxes = _corners(np.asarray(bbox, np.float64).reshape(-1, 4)[: self.slots])
        categories = np.asarray(category, np.int64).reshape(-1)[: self.slots]
        frame = _corners(np.asarray(crop, np.float64).reshape(1, 4))
        if flip:
            boxes, frame = _mirrored(boxes), _mirrored(frame)
        meets = (np.minimum(boxes, frame)[:, 2:] > np.maximum(boxes, frame)[:, :2]).all(axis=1)
        boxes, categories = boxes[meets], categories[meets]
        if not self.crop:
            boxes = (boxes - frame[:, [0, 1, 0, 1]]) / np.tile(frame[:, 2:] - frame[:, :2], 2)
        boxes = boxes.clip(0, 1)
        corners = (boxes[:, :2], boxes[:, 2:]) if self.form == "box" else ((boxes[:, :2] + boxes[:, 2:]) / 2,)
        out = np.full(self.length, self.empty, np.int64)
        objects = np.stack([categories, *(self.points(corner) for corner in corners)], axis=1)
        out[: objects.size] = objects.reshape(-1)
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
        objects = tokens.reshape(-1, self.width)
        objects = objects[objects[:, 0] != self.empty]
        where = self.places(objects[:, 1:])
        if self.form == "centre":
            return objects[:, 0], where[:, 0], crop
        return objects[:, 0], np.concatenate([where[:, 0], where[:, 1] - where[:, 0]], axis=1), crop


def _corners(bbox: np.ndarray) -> np.ndarray:
    return np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], axis=1)


def _mirrored(corners: np.ndarray) -> np.ndarray:
    return np.stack([1 - corners[:, 2], corners[:, 1], 1 - corners[:, 0], corners[:, 3]], axis=1)


class LayoutConditioner(Conditioner):
    """Layouts -> tokens. A layout is {"bbox": (n, 4) x, y, w, h as shares of the picture, "category": n names or
    indices}; the null is one without objects.

    spec: "categories" (names in order), "length" (tokens of a sequence: three an object and two of the crop),
    "vocabulary", "planes" (`BoxPlanes`; 0 or absent: tokens alone, as in the paper), "logits" where a converted
    transformer brings its unused head along.
    """

    guidance_rank = 1
    gives_tokens = True
    takes_size = True

    def __init__(self, settings: ConditionSettings, spec: dict[str, Any], tokenizer=None):
        super().__init__()
        self.names: list[str] = list(spec["categories"])
        self.layout = Layout(slots=(spec["length"] - 2) // 3, vocabulary=spec["vocabulary"])
        width = settings.context_dim
        self.encoder = TextTransformer(
            self.layout.vocabulary,
            width,
            settings.text_layers,
            self.layout.length,
            settings.text_heads,
            settings.text_head_channels,
            spec.get("logits", False),
            settings.embedding_std,
        )
        if settings.smooth_places:
            self._smooth_places(settings.embedding_std)
        self.pool = vector_of_tokens(width) if settings.text_pooled else None
        self.channels = spec.get("planes", 0)
        self.boxes = BoxPlanes(self.layout, len(self.names), self.channels) if self.channels else None

    @torch.no_grad()
    def _smooth_places(self, std: float) -> None:
        """Embeddings of grid points begin as random mixtures of waves over the grid, so that near points begin
        alike; those of numbers that are categories as well stay independent."""
        weight, grid = self.encoder.transformer.token_emb.weight, self.layout.grid
        waves = max(1, grid.bit_length() - 1)
        mixture = std * (2 / (4 * waves)) ** 0.5 * torch.randn(weight.shape[1], 4 * waves)
        codes = torch.einsum("wf,fp->pw", mixture, sinusoidal_map((grid, grid), waves)[0].flatten(1))
        weight[len(self.names) : grid**2] = codes[len(self.names) :]

    @staticmethod
    def gives_vector(settings: ConditionSettings) -> bool:
        """As settings say: the tokens, pooled."""
        return settings.text_pooled

    @staticmethod
    def learn(settings: ConditionSettings, most: int, names: Sequence[str]) -> dict[str, Any]:
        """Spec for layouts of `most` objects of named categories: places for them, at least 1 and at most 30.

        Raises InputError where there are more categories than tokens.
        """
        if len(names) >= VOCABULARY:
            raise InputError(f"{len(names):,} categories of objects; a layout's vocabulary has {VOCABULARY - 1:,}")
        return {
            "categories": list(names),
            "length": 3 * min(max(most, 1), MAX_OBJECTS) + 2,
            "vocabulary": VOCABULARY,
            "planes": settings.layout_planes,
        }

    def index(self, value: str | int) -> int:
        """A category: a number is its index; a text its name, "#" and its index, or, where no category is called by a
        number, its index. Raises InputError, naming categories."""
        if isinstance(value, str):
            found = place_of(value, self.names)
        else:
            found = int(value) if 0 <= int(value) < len(self.names) else None
        if found is None:
            raise InputError(
                f"category {str(value)!r}: no such category among {len(self.names)}; {hint(value, self.names)}"
            )
        return found

    def prepare(self, layouts: list[dict]) -> dict[str, Tensor]:
        """Layouts -> {"ids": (n, length) int64}; objects beyond the places that there are do not count.

        A layout with "crop" (x, y, w, h of the shown part, as shares of the whole picture) becomes the tokens of
        "whole", its boxes in the whole picture, and the corners of the crop, as the original's training crops."""
        rows = []
        for one in layouts:
            categories = [self.index(name) for name in one["category"]]
            cut = "crop" in one
            rows.append(
                self.layout.tokens(one["whole" if cut else "bbox"], categories, crop=one["crop"] if cut else WHOLE)
            )
        return {"ids": torch.from_numpy(np.stack(rows))}

    def example(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """A sequence."""
        return {"ids": torch.zeros(1, self.layout.length, dtype=torch.int64)}

    def null(self, n: int, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The empty layout, n times."""
        return self.prepare([{"bbox": np.zeros((0, 4)), "category": []}] * n)

    def forward(self, inputs: dict[str, Tensor], size: tuple[int, int]) -> Conditioning:
        """size: (h, w) of the latent that the boxes are painted at."""
        tokens = self.encoder(inputs["ids"])
        planes = None if self.boxes is None else self.boxes(inputs["ids"], size)
        return Conditioning(tokens, planes, self.pool(pooled(tokens)) if self.pool is not None else None)


class BoxPlanes(nn.Module):
    """Tokens of layouts (B, L) -> planes (B, channels, h, w): the sum over boxes of their coverage of each cell times
    a + u b + v c, with codes a, b, c learned for each category and (u, v) the cell's place in the box, -1 … 1.

    Attention has to learn from tokens which positions a pair of corners means; here a convolution sees it at once.
    Without objects all is 0.
    """

    def __init__(self, layout: Layout, categories: int, channels: int):
        super().__init__()
        self.layout, self.categories, self.channels = layout, categories, channels
        self.codes = nn.Embedding(categories, 3 * channels)

    def forward(self, ids: Tensor, size: tuple[int, int]) -> Tensor:
        grid = self.layout.grid
        objects = ids[:, : 3 * self.layout.slots].unflatten(1, (-1, 3))
        places = torch.stack([objects[..., 1:] % grid, objects[..., 1:] // grid], dim=-1)  # (B, slots, corner, x and y)
        frame = torch.stack([ids[:, -2:] % grid, ids[:, -2:] // grid], dim=-1)[:, None]
        # corners as shares of the crop in the last two tokens
        corners = (places - frame[:, :, :1]) / (frame[:, :, 1:] - frame[:, :, :1]).clamp(min=1)
        (rows, v), (columns, u) = (_along(corners[..., axis], side) for axis, side in ((1, size[0]), (0, size[1])))
        known = (objects[..., 0] < self.categories)[..., None, None]
        coverage = known * rows[..., :, None] * columns[..., None, :]  # (B, slots, h, w)
        weights = torch.stack([coverage, coverage * u[..., None, :], coverage * v[..., :, None]], dim=2)
        codes = self.codes(objects[..., 0].clamp(max=self.categories - 1)).unflatten(-1, (3, self.channels))
        return torch.einsum("bkphw,bkpc->bchw", weights.to(codes.dtype), codes)


def _along(ends: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Intervals (…, 2) in shares of a side -> (covered share of each of its cells (…, cells), the place of the cell's
    centre in the interval, -1 … 1)."""
    low, high = ends[..., :1] * cells, ends[..., 1:] * cells
    cell = torch.arange(cells, device=ends.device, dtype=ends.dtype)
    covered = (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).clamp(0, 1)
    place = (2 * (cell + 0.5) - low - high) / (high - low).clamp(min=1e-6)
    return covered, place.clamp(-1, 1)

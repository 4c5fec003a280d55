"""What rows tell the model: values of conditions, cut and mirrored as the pixels are, and checked before step 1."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldmcli.conditions import CONDITIONS
from ldmcli.core import console
from ldmcli.core.errors import InputError
from ldmcli.core.settings import DiffusionConfig
from ldmcli.data.augment import crop_and_flip
from ldmcli.data.boxes import are_shares
from ldmcli.data.decode import BadImage
from ldmcli.data.degradations import degrade
from ldmcli.data.masks import random_mask
from ldmcli.data.pictures import first_few
from ldmcli.data.rows import Room, parallel_map
from ldmcli.maths import rng

TABLED = ("text", "class")  # neither crops nor flips change them: prepared once for all rows


def check_columns(rows, kinds: Sequence[str]) -> None:
    """Raises InputError where the data lack what a condition is made of."""
    for kind in kinds:
        column = CONDITIONS[kind].column
        if not rows.has(column):
            article = "an" if column[0] in "aeiou" else "a"
            raise InputError(
                f"{rows.source}: --condition {kind} needs {article} {column} column, and there is none "
                f"(found: {', '.join(f'{k} = {v}' for k, v in rows.columns.items() if v)}); "
                f"name it with --{column}-column or train with --condition none"
            )


class ConditionSource:
    """Values of conditions for rows of a data set. Training rows (`training`) are cut, mirrored, degraded and masked
    by (seed, position); others stand in the middle, degraded and masked by (seed, row)."""

    def __init__(self, rows, config: DiffusionConfig, size: tuple[int, int], *, training: bool):
        self.rows, self.config, self.size, self.training = rows, config, size, training
        self._translate: np.ndarray | None = None
        self._boxes: dict[int, dict] = {}
        self._maps: dict[int, np.ndarray] = {}
        self._room: Room = rows.room

    @property
    def _fixed(self) -> bool:
        return not self.training or self.config.data.crop == "center"

    def values(self, kind: str, ids: Sequence[int], where: Sequence[int], pixels: np.ndarray | None = None) -> list:
        """Values (`Conditions.prepare`) of rows `ids` at positions `where` of the training. pixels: uint8 (n, H, W, 3),
        the rows cut and mirrored, where the caller has them."""
        if kind == "text":
            return [self.rows.caption(int(i)) for i in ids]
        if kind == "class":
            return [self.rows.label(int(i)) for i in ids]
        crops, mirrored = (
            crop_and_flip(self.config, np.asarray(where))
            if self.training
            else (np.full((len(ids), 2), 0.5), np.zeros(len(ids), bool))
        )
        if kind == "layout":
            return [self._layout(int(i), u, flip, at) for i, u, flip, at in zip(ids, crops, mirrored, where)]
        if kind == "map":
            maps = [self._map(int(i), u) for i, u in zip(ids, crops)]
            return [found[:, ::-1] if flip else found for found, flip in zip(maps, mirrored)]
        if pixels is None:
            pixels = np.stack([self._pixels(int(i), u, flip) for i, u, flip in zip(ids, crops, mirrored)])
        return [self._planes(kind, picture, int(at)) for picture, at in zip(pixels, where)]

    def _pixels(self, i: int, u, flip: bool) -> np.ndarray:
        crop = self.config.data.crop if self.training else "center"
        found = self.rows.pixels(i, self.size, crop, tuple(u))
        return found[:, ::-1] if flip else found

    def _layout(self, i: int, u, flip: bool, at: int) -> dict[str, Any]:
        """Boxes of a row in the order of its position: the original shuffles them, too."""
        found = dict(self.layout(i, u))
        if flip:
            found |= {name: _mirrored(found[name]) for name in ("bbox", "whole", "crop") if name in found}
        if self.training and len(found["category"]) > 1:
            order = rng.permutation(rng.key(self.config.train.seed, int(at), "objects"), 0, len(found["category"]))
            found |= {name: found[name][order] for name in ("bbox", "whole", "category") if name in found}
        return found

    def layout(self, i: int, u=(0.5, 0.5)) -> dict[str, Any]:
        """{"bbox": (n, 4) shares of the crop, "category": (n,) indices of the model's names} of a row. With
        condition.crop_tokens beside them "whole" (n, 4), shares of the whole picture, and "crop" (4,), where the crop
        lies in it."""
        if i in self._boxes:
            return self._boxes[i]
        found = self.rows.boxes(i, self.size, self.config.data.crop if self.training else "center", tuple(u))
        if self._translate is not None:
            category = self._translate[found["category"]]
            known = category >= 0
            found |= {"bbox": found["bbox"][known], "whole": found["whole"][known], "category": category[known]}
        if not self.config.condition.crop_tokens:
            found = {"bbox": found["bbox"], "category": found["category"]}
        if self._fixed:
            self._boxes[i] = found
        return found

    def tell_categories(self, names: list[str]) -> None:
        """The model's categories: those that it does not have are left out, and counted."""
        own = self.rows.category_names
        self._translate = np.array([names.index(name) if name in names else -1 for name in own], np.int64)
        self._boxes.clear()
        unknown = [name for name, k in zip(own, self._translate) if k < 0]
        if unknown:
            console.warn(
                f"{self.rows.source}, {self.rows.split}: objects of {len(unknown)} categories that the model "
                f"does not know are left out ({first_few(unknown)})"
            )

    def _map(self, i: int, u) -> np.ndarray:
        if i in self._maps:
            return self._maps[i]
        found = self.rows.map_pixels(i, self.size, self.config.data.crop if self.training else "center", tuple(u))
        if self._fixed and i not in self._maps and self._room.take(found.nbytes):
            self._maps[i] = found
        return found

    def _planes(self, kind: str, picture: np.ndarray, at: int) -> Any:
        key = (self.config.train.seed, at, "training" if self.training else "validation")
        if kind == "lowres":
            task = self.config.task
            return degrade(picture, task.scale, task.degradation, *key, "degrade")
        return picture, random_mask(*self.size, *key, "mask")


def _mirrored(boxes: np.ndarray) -> np.ndarray:
    """Boxes (…, 4) x, y, w, h as shares, left and right exchanged."""
    return np.stack([1 - boxes[..., 0] - boxes[..., 2], *np.moveaxis(boxes[..., 1:], -1, 0)], axis=-1)


# ------------------------------------------------------------------ checks


def look_at_boxes(rows) -> None:
    """Reads all boxes, says what is odd about them (outside of the picture, none at all), and finds out whether they
    are pixels or shares of the picture."""
    rows.boxes_are_shares = are_shares([rows.all_objects(i)["bbox"] for i in range(len(rows))])
    if rows.boxes_are_shares:
        console.say(f"{rows.source}, {rows.split}: boxes are taken as shares of the picture, none being above 1")
    found = [rows.objects(i) for i in range(len(rows))]
    empty = sum(not len(one["bbox"]) for one in found)
    if empty == len(found):
        raise InputError(f"{rows.source}, {rows.split}: no row has a box in {rows.columns.get('objects', 'objects')}")
    if empty:
        console.say(
            f"{rows.source}, {rows.split}: {empty} of {len(found)} rows have no objects; they stand for an empty scene"
        )
    outside = sum(
        _outside(one["bbox"], (1, 1) if rows.boxes_are_shares else rows.shape(i)) for i, one in enumerate(found)
    )
    if outside:
        console.warn(
            f"{rows.source}, {rows.split}: {outside} boxes reach beyond their picture or have no area; they "
            "are clipped, and left out where nothing remains"
        )


def _outside(bbox: np.ndarray, shape: tuple[int, int]) -> int:
    x, y, w, h = bbox.reshape(-1, 4).T
    slack = 0.01 * max(shape) if max(shape) > 1 else 0.01  # rounded corners are no news
    inside = (x >= -slack) & (y >= -slack) & (x + w <= shape[1] + slack) & (y + h <= shape[0] + slack)
    return int((~(inside & (w > 0) & (h > 0))).sum())


def look_at_maps(rows, indices: Sequence[int], workers: int) -> tuple[list[BadImage], np.ndarray]:
    """(maps among those of `indices` that are not as large as their picture, how often each class index occurs)."""
    bad: list[BadImage] = []
    seen = np.zeros(256, np.int64)
    for i, found in zip(indices, parallel_map(lambda i: _map_facts(rows, i), indices, workers or 1)):
        if isinstance(found, BadImage):
            found.index = i
            bad.append(found)
        else:
            seen += found
    return bad, seen


def with_fitting_maps(rows, bad: list[BadImage], skip_bad: bool):
    """The rows without those whose map was found `bad`. Raises InputError where they are not to be skipped."""
    if bad and (not skip_bad or len(bad) == len(rows)):
        raise InputError(
            f"{len(bad)} of {len(rows)} maps do not fit their picture: {first_few(bad)}; "
            "mend them, or leave such rows out with --skip-bad"
        )
    if bad:
        left_out = {error.index for error in bad}
        rows = rows.select([i for i in range(len(rows)) if i not in left_out])
        rows.notes.append(f"{len(bad)} rows whose map does not fit left out")
    return rows


def _map_facts(rows, i: int) -> np.ndarray | BadImage:
    try:
        found, shape = rows.map(i), rows.shape(i)
    except BadImage as error:
        return error
    if found.shape != tuple(shape):
        return BadImage(
            rows.name(i), f"its map is {found.shape[1]}x{found.shape[0]} px, the picture {shape[1]}x{shape[0]}"
        )
    return np.bincount(found.reshape(-1), minlength=256)


def map_names(rows) -> list[str]:
    """Names of a map's classes: the rows' own, or from id2label.json or classes.json beside the data; else none."""
    if own := getattr(rows, "map_names", None):
        return list(own)
    for name in ("id2label.json", "classes.json"):
        path = Path(rows.source) / name
        if path.is_file():
            try:
                return _names_in(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError):
                return []
    return []


def _names_in(found: Any) -> list[str]:
    if isinstance(found, dict) and isinstance(found.get("segmentation_classes"), list):
        found = found["segmentation_classes"]
    if isinstance(found, dict) and all(str(k).isdecimal() for k in found):
        numbers = {int(k): str(v) for k, v in found.items()}
        return [numbers.get(k, str(k)) for k in range(max(numbers, default=-1) + 1)]
    return [str(name) for name in found] if isinstance(found, list) else []

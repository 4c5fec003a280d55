"""The embedded shapes (`--data shapes`, shapes:2, shapes:3) under the interface of `Rows`."""

import hashlib
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from ldmcli.core.errors import UsageError
from ldmcli.core.settings import DataSettings
from ldmcli.data import shapes
from ldmcli.data.decode import BadImage, sanitise
from ldmcli.data.rows import Columns, Rows

SHAPES_SIZE = (64, 64)
PARAPHRASE = "paraphrase"  # a column of levels 2 and 3, for data.captions


class ShapeRows(Rows):
    """The embedded shapes; nothing is stored, every getter draws."""

    map_names = ("background", *shapes.SHAPES)

    def __init__(self, columns, ids, settings, *, source, split):
        super().__init__(columns, ids, settings, source=source, split=split)
        self.level = _level(settings.source)
        self._size = tuple(settings.size) if any(settings.size) else SHAPES_SIZE

    def spec(self, i: int) -> shapes.Spec:
        return shapes.spec(int(self._ids[i]), level=self.level, split=self.split)

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(shapes.render(self.spec(i), self._size))

    def shape(self, i: int) -> tuple[int, int]:
        return self._size

    def pixels(self, i: int, size, crop="center", u=(0.5, 0.5)) -> np.ndarray:
        return shapes.render(self.spec(i), tuple(size))

    def caption(self, i: int) -> str:
        return shapes.caption(self.spec(i))

    def words(self, i: int, column: str) -> list[str]:
        """The caption, the caption in another order, or the name of the shape that is the label."""
        if column == PARAPHRASE:
            return [text] if (text := shapes.paraphrase(self.spec(i))) else []
        return [self.caption(i) if column == "caption" else shapes.SHAPES[self.label(i)]]

    def cell(self, i: int, column: str) -> str:
        return "".join(self.words(i, column))

    def label(self, i: int) -> int:
        return self.spec(i).things[0].shape

    def all_objects(self, i: int) -> dict:
        spec = self.spec(i)
        return {
            "bbox": np.array(shapes.boxes(spec, self._size), np.float32),
            "category": np.array([thing.shape for thing in spec.things], np.int64),
        }

    def map(self, i: int) -> np.ndarray:
        return shapes.segment(self.spec(i), self._size)

    def map_pixels(self, i: int, size, crop="center", u=(0.5, 0.5)) -> np.ndarray:
        return shapes.segment(self.spec(i), tuple(size))

    def boxes(self, i: int, size, crop="center", u=(0.5, 0.5)) -> dict:
        found = self.objects(i)
        bbox = found["bbox"] / np.array([*self._size[::-1]] * 2, np.float32)
        return {**found, "bbox": bbox, "whole": bbox, "crop": np.array([0.0, 0.0, 1.0, 1.0])}

    def content_hash(self, i: int) -> str:
        """SHA-256 of what is drawn; sizes do not enter."""
        return hashlib.sha256(repr(self.spec(i)).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the level, the split, the rows taken and the way that pictures are drawn."""
        digest = hashlib.sha256(f"{self.level} {self.split}".encode() + self._ids.tobytes())
        for i in range(min(len(self), 64)):
            digest.update(f"{self.spec(i)} {self.caption(i)}".encode())
            digest.update(self.pixels(i, (32, 32)).tobytes())
        return digest.hexdigest()[:32]

    def preload(self, size, crop="center", **options) -> list[BadImage]:
        return []


def is_shapes(source: str) -> bool:
    """Whether a `--data` argument names the embedded shapes."""
    return source == "shapes" or source.startswith("shapes:")


def check_source(source: str) -> None:
    """Raises UsageError for a level of the embedded shapes that there is none of."""
    if is_shapes(source):
        _level(source)


def _level(source: str) -> int:
    level = source.partition(":")[2] or "1"
    if level not in ("1", "2", "3"):
        raise UsageError(f"--data {sanitise(source)}: the levels are shapes:1, shapes:2 and shapes:3")
    return int(level)


def _nothing_stored(row: int) -> Any:
    raise AssertionError("shapes are drawn, not read")


def shape_rows(settings: DataSettings, split: str) -> Rows:
    """Rows of the embedded shapes: data.limit or 12,000 to train on, 512 to validate on."""
    has_label = _level(settings.source) == 1
    roles = ("image", "caption", *(("label",) if has_label else ()), "objects", "map")
    columns = Columns(
        encoded=_nothing_stored,
        name="shape {}".format,
        caption=_nothing_stored,
        label=np.zeros(0) if has_label else None,
        objects=_nothing_stored,
        map=_nothing_stored,
        class_names=list(shapes.SHAPES),
        category_names=list(shapes.SHAPES),
        chosen={role: "drawn" for role in roles},
        cells={} if has_label else {PARAPHRASE: ()},
    )
    count = (settings.limit or shapes.TRAIN_ROWS) if split == "train" else shapes.VALIDATION_ROWS
    return ShapeRows(columns, np.arange(count), settings, source=settings.source, split=split)

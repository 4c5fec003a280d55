"""Rows of a data set as everything above sees them: pictures, captions, labels, boxes and maps by number."""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from ldmcli.core.errors import InputError
from ldmcli.core.launch import local_processes
from ldmcli.core.settings import DataSettings
from ldmcli.data.crops import crop_boxes, crop_corner, crop_map
from ldmcli.data.decode import BadImage, decode, probe, sanitise, scaled_size, to_size
from ldmcli.data.readers import memory_bytes

WORKERS = 4
ROLES = ("image", "caption", "label", "objects", "map")  # of columns


def evenly_spaced(count: int, n: int) -> list[int]:
    """n row numbers, evenly over `count` rows: classes keep their shares in sorted data. Above `count` they repeat."""
    return [k % count for k in range(n)] if n > count else [k * count // n for k in range(n)]


@dataclass
class Columns:
    """What rows are made of: a function of the row's number for each role; None where there is no such column."""

    encoded: Callable[[int], bytes]
    name: Callable[[int], str]
    caption: Callable[[int], str] | None = None
    label: np.ndarray | None = None
    objects: Callable[[int], dict] | None = None
    map: Callable[[int], bytes] | None = None
    class_names: list[str] = field(default_factory=list)
    category_names: list[str] | Callable[[], list[str]] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cells: Mapping[str, Sequence] = field(default_factory=dict)  # of every column, by its own name
    words: Callable[[str, int], list[str]] | None = None  # texts in a cell
    trouble: str = ""  # why labels cannot be used, said when they are

    def known_categories(self) -> list[str]:
        """Names of the objects' categories, found out when they are first used."""
        if callable(self.category_names):
            self.category_names = self.category_names()
        return self.category_names


class Room:
    """Bytes of memory in which a process may keep pictures. All that it reads shares one; any thread may take of it."""

    def __init__(self, size: int | None = None):
        """size: bytes; None = this process's part of an eighth of the machine's memory."""
        self.left = memory_bytes() // 8 // local_processes() if size is None else size
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Whether there is room for `size` bytes more, which are taken then."""
        with self._lock:
            fits = size <= self.left
            self.left -= size if fits else 0
        return fits

    def give_back(self, size: int) -> None:
        """`size` bytes that were taken are free again."""
        with self._lock:
            self.left += size


class Rows:
    """Rows of one split. `columns` says which column was taken for which role, `cells` names all; `notes` say what was
    left out; `validation_is_train` is True when the only row had to serve as both. Indices count 0 … len - 1. Getters
    that meet a picture which cannot be decoded raise BadImage.
    """

    def __init__(self, columns: Columns, ids: np.ndarray, settings: DataSettings, *, source: str, split: str):
        self._columns, self._ids, self._settings = columns, ids, settings
        self.source, self.split = source, split
        self.columns, self.notes = dict(columns.chosen), list(columns.notes)
        self.class_names, self.cells = columns.class_names, list(columns.cells)
        self.validation_is_train = False
        self.boxes_are_shares = False  # of the whole picture, instead of its pixels
        self._hashes: dict[int, str] = {}
        self.transparent_rows: set[int] = set()  # numbers of the data's rows that were decoded and have such pixels
        self._kept: dict[int, np.ndarray] = {}
        self._kept_as: tuple | None = None
        self.readable: set[int] = set()  # numbers of the data's rows that were decoded without a complaint
        self._room: Room | None = None

    @property
    def room(self) -> Room:
        """Where pictures are kept; rows that were selected from others share theirs."""
        if self._room is None:
            self._room = Room()
        return self._room

    @room.setter
    def room(self, room: Room) -> None:
        self._room = room

    def __len__(self) -> int:
        return len(self._ids)

    def has(self, role: str) -> bool:
        """Whether rows have a caption, label, objects or map; of any other name, whether there is such a column."""
        if role not in ROLES:
            return role in self._columns.cells
        return role == ROLES[0] or getattr(self._columns, role) is not None

    def cell(self, i: int, column: str) -> Any:
        """What stands in a column of the data, as it is there, for conditions of one's own."""
        return self._columns.cells[column][int(self._ids[i])]

    def words(self, i: int, column: str) -> list[str]:
        """Texts in a column, by its role or name: of a list all, of a class its name. Raises InputError for no text."""
        assert self._columns.words is not None, "`Rows.has` says whether there is such a column"
        return self._columns.words(self.columns.get(column, column), int(self._ids[i]))

    def name(self, i: int) -> str:
        """Path relative to the data folder, or "row 12"."""
        return self._columns.name(int(self._ids[i]))

    def image(self, i: int) -> Image.Image:
        """The whole picture, RGB, upright."""
        return self._decoded(i, self._encoded(i))

    def _decoded(self, i: int, content: bytes) -> Image.Image:
        picture = decode(content, name=self.name(i), **self._limits)
        if picture.info.get("transparent"):
            self.transparent_rows.add(int(self._ids[i]))
        return picture

    @property
    def transparent(self) -> int:
        """How many of the pictures that were decoded have transparent pixels."""
        return sum(int(row) in self.transparent_rows for row in self._ids) if self.transparent_rows else 0

    @property
    def _limits(self) -> dict:
        return {"max_pixels": self._settings.max_pixels, "background": self._settings.background}

    def shape(self, i: int) -> tuple[int, int]:
        """(height, width) of the whole picture in pixels, from its header."""
        return probe(self._encoded(i), name=self.name(i), max_pixels=self._settings.max_pixels)

    def _encoded(self, i: int) -> bytes:
        return _read(self._columns.encoded, int(self._ids[i]), self.name(i))

    def pixels(self, i: int, size: tuple[int, int], crop: str = "center", u=(0.5, 0.5)) -> np.ndarray:
        """uint8 (h, w, 3) at `size`: resized by data.resize and cropped in the middle, or ("random") at share u."""
        whole = self._kept.get(int(self._ids[i])) if self._kept_as == (tuple(size), crop) else None
        if whole is None and self._kept_as == (tuple(size), crop) and self.room.left > 0:
            whole = self._whole(self.image(i), size, crop)
            self._keep(i, whole)
        if whole is None or self._zooms(crop):
            picture = self.image(i) if whole is None else Image.fromarray(whole)
            return to_size(picture, size, crop, self._settings.resize, u)
        top, left = crop_corner(whole.shape, size, u) if crop == "random" else (0, 0)
        return whole[top : top + size[0], left : left + size[1]]

    def caption(self, i: int) -> str:
        """The caption as it stands in the data; "" where there is none."""
        return self._columns.caption(int(self._ids[i])) if self._columns.caption else ""

    def label(self, i: int) -> int:
        """Index into `class_names`. Raises InputError where the row has no label that names a class."""
        if self._columns.label is None:
            raise InputError(f"{sanitise(self.source)}: split {self.split} has no labels")
        label = int(self._columns.label[self._ids[i]])
        if label < 0:
            raise InputError(self._columns.trouble)
        return label

    @property
    def category_names(self) -> list[str]:
        """Names of the objects' categories. Raises InputError where a row's objects have none."""
        return self._columns.known_categories()

    def objects(self, i: int) -> dict:
        """{"bbox": float32 (n, 4) x, y, width, height in pixels of the whole picture, "category": int64 (n,)}, without
        those smaller than data.min_box_area."""
        found, least = self.all_objects(i), self._settings.min_box_area
        if not least:
            return found
        height, width = (1, 1) if self.boxes_are_shares else self.shape(i)
        large = found["bbox"][:, 2] * found["bbox"][:, 3] >= least * height * width
        return {name: values[large] for name, values in found.items()}

    def all_objects(self, i: int) -> dict:
        """`objects`, small ones as well."""
        if self._columns.objects is None:
            raise InputError(f"{sanitise(self.source)}: split {self.split} has no objects")
        return self._columns.objects(int(self._ids[i]))

    def map(self, i: int) -> np.ndarray:
        """Class map, uint8 (h, w), as large as the whole picture."""
        row = int(self._ids[i])
        return class_map(_read(self._columns.map, row, self.name(i)), self.name(i), self._settings.max_pixels)

    def map_pixels(self, i: int, size: tuple[int, int], crop: str = "center", u=(0.5, 0.5)) -> np.ndarray:
        """The class map, uint8 (h, w), cut as `pixels` cuts the picture; classes are picked, never mixed."""
        return crop_map(self.map(i), size, (0.5, 0.5) if crop == "center" else u)

    def boxes(self, i: int, size: tuple[int, int], crop: str = "center", u=(0.5, 0.5)) -> dict:
        """`objects` cut as `pixels` cuts the picture: "bbox" clipped, as shares (0 … 1) of the crop, and "whole", as
        shares of the whole picture; those that lie outside of the crop are dropped. "crop": x, y, w, h of the crop as
        shares of the picture."""
        u = (0.5, 0.5) if crop == "center" else u
        return crop_boxes(self.objects(i), self.shape(i), size, u, shares=self.boxes_are_shares)

    def content_hash(self, i: int) -> str:
        """SHA-256 of the encoded picture, hexadecimal."""
        row = int(self._ids[i])
        if row not in self._hashes:
            self._hashes[row] = hashlib.sha256(self._encoded(i)).hexdigest()
        return self._hashes[row]

    def hashes_of(self, indices: Sequence[int], workers: int = WORKERS) -> bytes:
        """SHA-256 of those encoded pictures, 32 bytes each; zeros where one cannot be read."""
        return b"".join(parallel_map(partial(_hash_or_zeros, self), indices, workers))

    def learn_hashes(self, indices: Sequence[int], hashes: bytes) -> None:
        """Takes over what `hashes_of` gave another process for those rows."""
        for place, i in enumerate(indices):
            if any(found := hashes[32 * place : 32 * (place + 1)]):
                self._hashes[int(self._ids[i])] = found.hex()

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any picture, caption or label of these rows, and with their order."""
        digest = hashlib.sha256()
        for i, row in enumerate(self._ids):
            label = "" if self._columns.label is None else int(self._columns.label[row])
            try:
                caption = self.caption(i)
            except InputError as error:  # refused where captions are used
                caption = str(error)
            digest.update(f"{self.content_hash(i)}\0{caption}\0{label}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:32]

    def select(self, indices: Sequence[int] | np.ndarray) -> "Rows":
        """These rows alone, in this order; what has been read already is shared."""
        ids = self._ids[np.asarray(indices, dtype=np.int64)]
        chosen = type(self)(self._columns, ids, self._settings, source=self.source, split=self.split)
        chosen.notes, chosen.validation_is_train = list(self.notes), self.validation_is_train
        chosen.boxes_are_shares = self.boxes_are_shares
        chosen._hashes, chosen._kept, chosen._kept_as = self._hashes, self._kept, self._kept_as
        chosen.readable, chosen.room, chosen.transparent_rows = self.readable, self.room, self.transparent_rows
        return chosen

    def preload(
        self, size: tuple[int, int], crop: str = "center", *, indices=None, progress=None, workers: int = WORKERS
    ) -> list[BadImage]:
        """Decodes rows and keeps them at `size` while there is room (with crop = "random" the resized whole, of which
        every crop can be cut); returns the bad ones. Other rows are kept when they are first read."""
        indices = range(len(self)) if indices is None else indices
        self.forget()
        self._kept_as = (tuple(size), crop)
        bad = []
        for i, picture in zip(indices, parallel_map(lambda i: self._prepared(i, size, crop), indices, workers)):
            if isinstance(picture, BadImage):
                bad.append(picture)
            else:
                self._keep(i, picture)
            if progress is not None:
                progress.advance(1)
        return bad

    def holds(self, i: int) -> bool:
        """Whether the picture is kept in memory."""
        return int(self._ids[i]) in self._kept

    def keep_when_read(self, size: tuple[int, int], crop: str) -> None:
        """Keeps pictures in memory from here on, when they are first read, while there is room."""
        self._kept_as = (tuple(size), crop)

    def _keep(self, i: int, picture: np.ndarray) -> None:
        row = int(self._ids[i])
        if row not in self._kept and self.room.take(picture.nbytes):
            self._kept[row] = picture

    def forget(self) -> None:
        """Keeps no pictures from here on; their memory is free for others."""
        self.room.give_back(sum(picture.nbytes for picture in self._kept.values()))
        self._kept, self._kept_as = {}, None

    def _zooms(self, crop: str) -> bool:
        """Whether crops are of several sizes: pictures are kept whole then, as they came."""
        return crop == "random" and self._settings.crop_min < 1

    def _prepared(self, i: int, size: tuple[int, int], crop: str) -> np.ndarray | BadImage:
        try:
            picture = self._looked_at(i)
        except BadImage as error:
            error.index = i
            return error
        return self._whole(picture, size, crop)

    def _looked_at(self, i: int) -> Image.Image:
        """The whole picture, after its map; what is read is hashed on the way. Raises BadImage."""
        content = self._encoded(i)
        if int(self._ids[i]) not in self._hashes:
            self._hashes[int(self._ids[i])] = hashlib.sha256(content).hexdigest()
        picture = self._decoded(i, content)
        if self.has("map"):
            self.map(i)
        return picture

    def unread(self, indices: Sequence[int]) -> list[int]:
        """Those of `indices` that have not been found `readable`."""
        return [i for i in indices if int(self._ids[i]) not in self.readable]

    def _whole(self, picture: Image.Image, size: tuple[int, int], crop: str) -> np.ndarray:
        """What is kept of a picture: every crop can be cut from it."""
        if self._zooms(crop):
            return np.asarray(picture)
        whole = scaled_size((picture.height, picture.width), size) if crop == "random" else size
        return to_size(picture, whole, "center", self._settings.resize)


def _hash_or_zeros(rows: Rows, i: int) -> bytes:
    try:
        return bytes.fromhex(rows.content_hash(i))
    except BadImage:
        return bytes(32)


def parallel_map(work: Callable, items: Iterable, workers: int, ahead: int = 256) -> Iterator:
    """Results in order, made in threads while the caller is busy; at most `ahead` of them, so that what nobody keeps is
    freed."""
    pool, waiting = ThreadPoolExecutor(max(workers, 1)), deque[Future]()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(encoded: Callable[[int], bytes] | None, row: int, name: str) -> bytes:
    assert encoded is not None, "`Rows.has` says whether there is such a column"
    try:
        return encoded(row)
    except OSError as error:
        raise BadImage(name, f"cannot be read ({error.strerror or error})") from None


def class_map(content: bytes, name: str, max_pixels: int) -> np.ndarray:
    """Class indices of a map: a palette or grey picture as it stands; colours are refused."""
    decode(content, name=f"map of {name}", max_pixels=max_pixels)  # the checks
    with Image.open(BytesIO(content)) as image:
        if image.mode not in ("L", "P", "1"):
            raise BadImage(name, f"its map is a picture of mode {image.mode}; a map holds class indices (L or P)")
        return np.array(image, dtype=np.uint8)

"""The rows of a data set that is too large to be looked at beforehand (`--streaming`), under the interface of `Rows`,
where row p is position p of the endless stream of a training.

What stands at a position is a function of the seed and of the number of rows in each part (`shards.Index`): files and
their parts come in an order by (seed, epoch), about a thousand rows of neighbouring parts are mixed (a window). So a
run goes on at any step by reading the parts of that step, and a process reads and decodes what it takes of each batch.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ldmcli.core.errors import InputError
from ldmcli.core.settings import DataSettings
from ldmcli.data.decode import BadImage, sanitise
from ldmcli.data.rows import ROLES, Room, Rows
from ldmcli.data.shards import Index, Shards, is_held_out, read_part
from ldmcli.maths import rng

HEAD_ROWS = 2048  # first positions, of which vocabulary, class names and latent scale are learned
WINDOW_ROWS = 1000  # that are mixed, at least


@dataclass(frozen=True)
class Windows:
    """An epoch of a stream: parts in their order, cut into windows. starts: the place in the epoch at which each window
    begins, and the end of the last; most: parts of a window."""

    parts: list[list[int]]
    starts: np.ndarray
    most: int


def windows_of(index: Index, seed: int, epoch: int) -> Windows:
    """Files in an order by (seed, epoch), and the parts of each in another; a window has WINDOW_ROWS rows or more, and
    where it can be the parts of one file. All rows where the data have fewer."""
    by_file: dict[int, list[int]] = {}
    for part, file in enumerate(index.files):
        by_file.setdefault(file, []).append(part)
    groups = list(by_file.values())
    parts: list[list[int]] = []
    rows = WINDOW_ROWS
    for k in rng.permutation(rng.key(seed, "files"), epoch, len(groups)):
        own = groups[k]
        order = rng.permutation(rng.key(seed, "parts", int(k)), epoch, len(own))
        for place in order:
            if rows >= WINDOW_ROWS:
                parts.append([])
                rows = 0
            parts[-1].append(own[place])
            rows += index.lengths[own[place]]
        rows = WINDOW_ROWS if rows >= WINDOW_ROWS // 2 else rows  # the next file begins its own
    if len(parts) > 1 and sum(index.lengths[part] for part in parts[-1]) < WINDOW_ROWS // 2:
        parts[-2:] = [parts[-2] + parts[-1]]
    sizes = [sum(index.lengths[part] for part in window) for window in parts]
    return Windows(parts, np.concatenate([[0], np.cumsum(sizes)]), max(map(len, parts)))


def spread(place: int, rows: int, batch: int) -> int:
    """The row of a window, parts one behind the other, that is taken at `place` of it.

    Batches are rows of a table that is filled column by column: each has rows of all parts, and a process, which takes
    neighbouring columns, finds its rows in neighbouring parts. Each row is taken at one place.
    """
    step, column = divmod(place, batch)
    steps = -(-rows // batch)
    full = rows - (steps - 1) * batch  # columns that reach into the last batch
    if column < full:
        return column * steps + step
    return full * steps + (column - full) * (steps - 1) + step


def rows_in_an_epoch(rows: "Rows | StreamedRows") -> int:
    """How many different training rows there are, which `len` does not say of a stream."""
    return rows.in_an_epoch() if isinstance(rows, StreamedRows) else len(rows)


class _Parts:
    """The parts that were read last, each read once however many threads ask."""

    @dataclass
    class _Part:
        lock: threading.Lock = field(default_factory=threading.Lock)
        rows: Rows | None = None

    def __init__(self, read: Callable[[int], Rows]):
        self._read, self._lock = read, threading.Lock()
        self._parts: OrderedDict[int, _Parts._Part] = OrderedDict()
        self.most = 2

    def get(self, part: int) -> Rows:
        """Its rows. Raises as the read."""
        with self._lock:
            found = self._parts.setdefault(part, self._Part())
            self._parts.move_to_end(part)
            while len(self._parts) > self.most:
                self._parts.popitem(last=False)
        with found.lock:
            if found.rows is None:
                found.rows = self._read(part)
            return found.rows


class StreamedRows:
    """Training rows of a stream. `len` counts the first positions, of which things are learned; getters take any.

    Where no validation split exists, a row below data.val_fraction of the range of its hash belongs to validation, and
    the next of its window stands in its place; so does it, with data.skip_bad, for a picture that cannot be decoded,
    which else ends with InputError. All processes see the same.
    """

    room = Room(0)  # pictures are not kept
    notes: list[str] = []

    def __init__(self, shards: Shards, index: Index, settings: DataSettings, *, seed: int, batch: int, divided: bool):
        """batch: positions that are taken together. divided: whether rows of validation have to be left out."""
        if settings.limit:
            index = index.limited(settings.limit)
        self._rows = sum(index.lengths)
        if not self._rows:
            raise InputError(f"{sanitise(settings.source)}: no train rows in the stream")
        self._index, self._settings, self._seed, self._batch, self._divided = index, settings, seed, batch, divided
        self._parts = _Parts(lambda part: read_part(shards, index, part))
        self._windows = lru_cache(maxsize=2)(lambda epoch: windows_of(index, seed, epoch))
        self._order = lru_cache(maxsize=256)(
            lambda part, epoch, count: rng.permutation(rng.key(seed, "rows", part), epoch, count)
        )
        self._replaced: dict[int, int] = {}  # positions of bad pictures: how far from there the row was found
        self.source, self.split = settings.source, "train"
        self.columns, self.class_names, self.fingerprint = dict(index.columns), index.class_names, index.fingerprint
        self.cells = index.cells

    def __len__(self) -> int:
        return HEAD_ROWS

    def in_an_epoch(self) -> int:
        """Rows of the stream; where rows of validation are left out of it, about so many."""
        return round(self._rows * (1 - self._settings.val_fraction)) if self._divided else self._rows

    def _candidates(self, position: int) -> Iterator[tuple[int, Rows, int]]:
        """(how far from its place, rows of a part, number in them) of what may stand at a position, best first."""
        epoch, place = divmod(position, self._rows)
        windows = self._windows(epoch)
        number = int(np.searchsorted(windows.starts, place, side="right")) - 1
        window, start = windows.parts[number], int(windows.starts[number])
        self._parts.most = 2 * windows.most
        ends = np.cumsum([self._index.lengths[part] for part in window])
        first = spread(place - start, int(ends[-1]), self._batch)
        for off in range(self._replaced.get(position, 0), int(ends[-1])):
            row = (first + off) % int(ends[-1])
            k = int(np.searchsorted(ends, row, side="right"))
            part, inside = window[k], row - int(ends[k]) + self._index.lengths[window[k]]
            rows = self._parts.get(part)
            count = min(len(rows), self._index.lengths[part])
            i = int(self._order(part, epoch, count)[inside % count])
            if not (self._divided and is_held_out(rows, i, self._settings)):
                yield off, rows, i
        raise InputError(f"{sanitise(self.source)}: no train rows that can be used near position {position}")

    def at(self, position: int) -> tuple[Rows, int]:
        """The row at a position: rows of a part, and its number in them."""
        return next(self._candidates(position))[1:]

    def has(self, role: str) -> bool:
        """Whether rows have a caption, label, objects or map; of any other name, whether there is such a column."""
        return role in self.columns if role in ROLES else role in self._index.cells

    def name(self, i: int) -> str:
        """What the data call the row at position i."""
        rows, row = self.at(i)
        return rows.name(row)

    def pixels(self, i: int, size, crop="center", u=(0.5, 0.5)) -> np.ndarray:
        """As `Rows.pixels`, for position i. Raises InputError for a picture that cannot be decoded."""
        failed = False
        for off, rows, row in self._candidates(i):
            try:
                found = rows.pixels(row, size, crop, u)
            except BadImage as error:
                if failed := self._settings.skip_bad:
                    continue
                raise InputError(
                    f"{error}; a stream is not checked beforehand: leave bad pictures out with --skip-bad"
                ) from error
            if failed:
                self._replaced[i] = off
            return found
        raise AssertionError("`_candidates` raises at its end")

    def caption(self, i: int) -> str:
        """As `Rows.caption`, for position i."""
        rows, row = self.at(i)
        return rows.caption(row)

    def label(self, i: int) -> int:
        """As `Rows.label`, for position i."""
        rows, row = self.at(i)
        return rows.label(row)

    def cell(self, i: int, column: str):
        """As `Rows.cell`, for position i."""
        rows, row = self.at(i)
        return rows.cell(row, column)

    def words(self, i: int, column: str) -> list[str]:
        """As `Rows.words`, for position i."""
        rows, row = self.at(i)
        return rows.words(row, column)

"""A stream under the interface of `Rows`: row p is position p of the endless stream, read in order as training asks."""

import hashlib
import threading
from collections import OrderedDict
from itertools import islice

from ldmcli.core.errors import InputError
from ldmcli.core.settings import DataSettings
from ldmcli.data.decode import BadImage
from ldmcli.data.rows import Room, Rows
from ldmcli.data.streaming import stream

HEAD_ROWS = 2048  # what vocabulary, class names, latent scale and fingerprint are learned from
KEPT_ROWS = 8192  # how far back a position can still be asked for
VALIDATION_ROWS = 512


class StreamedRows:
    """Training rows of a stream. `len` counts the head, which stays in memory; getters take any position.

    Reading is in order: a run that goes on at position p reads past what lies before it. Positions further back than
    8,192 rows are read again from the start. Pictures that cannot be decoded end with InputError, or with data.skip_bad
    are passed over, alike on all processes.
    """

    room = Room(0)  # what it keeps is counted in rows

    def __init__(self, settings: DataSettings, seed: int):
        self._settings, self._seed = settings, seed
        self._lock = threading.RLock()
        self._restart()
        self.head = [self._read_next() for _ in range(HEAD_ROWS)]
        first = self.head[0]
        self.source, self.split, self.columns, self.notes = first.source, first.split, first.columns, first.notes
        self.class_names = first.class_names

    def _restart(self) -> None:
        self._next, self._kept = 0, OrderedDict()
        self._iterator = stream(self._settings, "train", seed=self._seed)

    def _read_next(self) -> Rows:
        for row in self._iterator:
            try:
                row.image(0)
            except BadImage as error:
                if not self._settings.skip_bad:
                    raise InputError(
                        f"{error}; a stream is not checked beforehand: leave bad pictures out with --skip-bad"
                    ) from error
                continue
            self._kept[self._next] = row
            self._next += 1
            if len(self._kept) > KEPT_ROWS:
                self._kept.popitem(last=False)
            return row
        raise InputError(f"{self._settings.source}: the stream ended")

    def at(self, position: int) -> Rows:
        """The row at a position of the stream, as `Rows` of length 1."""
        with self._lock:
            if position < len(getattr(self, "head", ())):
                return self.head[position]
            if position < self._next and position not in self._kept:
                self._restart()
            while position >= self._next:
                self._read_next()
            return self._kept[position]

    def __len__(self) -> int:
        return len(self.head)

    def has(self, role: str) -> bool:
        """Whether rows have a caption, label, objects or map."""
        return self.head[0].has(role)

    def name(self, i: int) -> str:
        """What the stream calls the row."""
        return f"position {i} of the stream"

    def pixels(self, i: int, size, crop="center", u=(0.5, 0.5)):
        """As `Rows.pixels`, for position i."""
        return self.at(i).pixels(0, size, crop, u)

    def caption(self, i: int) -> str:
        """As `Rows.caption`, for position i."""
        return self.at(i).caption(0)

    def label(self, i: int) -> int:
        """As `Rows.label`, for position i."""
        return self.at(i).label(0)

    @property
    def fingerprint(self) -> str:
        """Of the first 64 rows: a stream is not read whole to know it."""
        digest = hashlib.sha256("".join(row.content_hash(0) for row in self.head[:64]).encode())
        return f"stream-{digest.hexdigest()[:25]}"


class StreamedValidation(StreamedRows):
    """The first rows of the validation stream, at most 512."""

    def __init__(self, settings: DataSettings):
        self.head = list(islice(stream(settings, "validation"), VALIDATION_ROWS))
        if not self.head:
            raise InputError(f"{settings.source}: no validation rows in the stream; raise data.val_fraction")
        first = self.head[0]
        self._lock = threading.RLock()
        self.source, self.split, self.columns, self.notes = first.source, first.split, first.columns, first.notes
        self.class_names = first.class_names

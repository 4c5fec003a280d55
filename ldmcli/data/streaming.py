"""Rows one after the other, for data sets that are too large to be reached by number (`--streaming`): `stream` gives
them in order, `StreamedRows` has the interface of `Rows`, where row p is position p of the endless stream.

Train is endless, epoch after epoch, mixed by (seed, epoch): wholly where rows can be reached by number, within a buffer
of 1,000 rows where they come from Parquet files or the hub. Validation is one pass, in order. Everything is the same
on every call, so a run goes on at position p by reading past what lies before it in its epoch.
"""

import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ldmcli.core.errors import InputError
from ldmcli.core.files import expanded
from ldmcli.core.settings import DataSettings
from ldmcli.data.batches import epoch_positions
from ldmcli.data.column_roles import choose_columns
from ldmcli.data.decode import BadImage, sanitise
from ldmcli.data.folder import split_of
from ldmcli.data.pictures import find
from ldmcli.data.readers import by_split, data_files, describe_features, load_hub, with_paths
from ldmcli.data.rows import Room, Rows
from ldmcli.data.shape_rows import is_shapes
from ldmcli.data.sources import existing_split, open_rows, rows_of, share_of, validation_split
from ldmcli.data.table import Table

HEAD_ROWS = 2048  # what vocabulary, class names, latent scale and fingerprint are learned from
KEPT_ROWS = 8192  # how far back a position can still be read
VALIDATION_ROWS = 512
SHUFFLE_BUFFER = 1000


def stream(settings: DataSettings, split: str = "train", start: int = 0, *, seed: int = 0) -> Iterator[Rows]:
    """Rows from position `start` on, each as `Rows` of length 1 (its index is 0). Rows that cannot be decoded are left
    to the caller. Without a validation split, rows are held out by hash as in `open_rows`, but none is added where the
    fraction gives none. Raises InputError when there are no rows."""
    one_pass = _epochs(settings, split)
    if one_pass is None:
        yield from _by_number(open_rows(settings, split=split), split, start, seed)
        return
    epoch = 0
    while True:
        count = 0
        for count, row in enumerate(one_pass([seed, epoch]), 1):
            if count > start:
                yield row
        if count == 0:
            raise InputError(f"{sanitise(settings.source)}: no {split} rows in the stream")
        if split != "train":
            return
        epoch += max(start // count, 1)
        start = start % count if start > count else 0


def _by_number(rows: Rows, split: str, start: int, seed: int) -> Iterator[Rows]:
    if split != "train":
        yield from (rows.select([i]) for i in range(start, len(rows)))
        return
    for position in itertools.count(start):
        yield rows.select(epoch_positions(position, 1, len(rows), seed)[0])


def _epochs(settings: DataSettings, split: str) -> Callable[[list[int]], Iterator[Rows]] | None:
    """A function of the key of an epoch that gives one pass of rows; None where rows can be reached by number."""
    parts = _parts(settings)
    if parts is None:
        return None
    wanted = existing_split(settings.split, list(parts), "--split", settings)
    held_out = validation_split(settings, list(parts), wanted)
    part = parts[held_out if split == "validation" and held_out else wanted]
    column_types, classes = describe_features(part.features)
    limit = settings.limit if split == "train" and settings.limit else None

    def one_pass(key: list[int]) -> Iterator[Rows]:
        values = itertools.islice(part.rows(), limit)
        for k, value in enumerate(shuffle_buffer(values, key) if split == "train" else values):
            row = _single(value, column_types, classes, settings, split, k, part.base)
            if held_out or (share_of(row.content_hash(0)) < settings.val_fraction) == (split == "validation"):
                yield row

    return one_pass


def shuffle_buffer(values: Iterable, key: list[int], buffer: int = SHUFFLE_BUFFER) -> Iterator:
    """The values in a random order by `key`: each leaves a buffer of the given size at a random moment."""
    draw = np.random.default_rng(key)
    held: list = []
    for value in values:
        if len(held) < buffer:
            held.append(value)
            continue
        k = int(draw.integers(buffer))
        held[k], value = value, held[k]
        yield value
    yield from (held[k] for k in draw.permutation(len(held)))


@contextmanager
def _naming(path: Path):
    """Turns the reader's complaints into one line with the file's name."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{sanitise(path)}: cannot be read as parquet ({sanitise(error)})") from None


class _LocalPart:
    """Parquet files read batch by batch."""

    def __init__(self, files: list[Path]):
        from datasets import Features
        from pyarrow import parquet

        self.files, self.base = files, files[0].parent
        with _naming(files[0]):
            self.features = Features.from_arrow_schema(parquet.read_schema(files[0]))

    def rows(self) -> Iterator[dict]:
        from pyarrow import parquet

        for path in self.files:
            with _naming(path), parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=256):
                    yield from batch.to_pylist()


class _HubPart:
    """A split of a hub data set, streamed by the datasets library with its pictures still encoded."""

    base = None

    def __init__(self, dataset):
        import datasets

        self.features = dataset.features or dataset._resolve_features().features
        for column in (c for c, feature in self.features.items() if isinstance(feature, datasets.Image)):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.dataset = dataset

    def rows(self) -> Iterator[dict]:
        return iter(self.dataset)


def _parts(settings: DataSettings) -> dict[str, "_LocalPart | _HubPart"] | None:
    path = expanded(Path(settings.source))
    if is_shapes(settings.source):
        return None
    if not path.exists():
        return {split_of(name) or name: _HubPart(part) for name, part in load_hub(settings, streaming=True).items()}
    is_saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    found = [] if is_saved else data_files(find(path)) if path.is_dir() else [path]
    if not found or any(one.suffix.lower() != ".parquet" for one in found):
        return None
    files = by_split(found, path) if path.is_dir() else {"train": found}
    return {name: _LocalPart(part) for name, part in files.items()}


def _single(value: dict, column_types, classes, settings: DataSettings, split: str, k: int, base: Path | None) -> Rows:
    table = Table(
        1, {column: [cell] for column, cell in value.items()}, column_types, classes, lambda _: f"streamed row {k}"
    )
    if base is not None:
        table = with_paths(table, base, settings.image_column)
    label = choose_columns(table, settings).get("label")
    if label is not None and label not in classes:
        table.column_types = {
            column: kind for column, kind in column_types.items() if column != label
        }  # its classes are unknown
    return rows_of(table, settings, split, classes.get(label or "", []))


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
        self._next = 0
        self._kept: OrderedDict[int, Rows] = OrderedDict()
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
        self.head = list(itertools.islice(stream(settings, "validation"), VALIDATION_ROWS))
        if not self.head:
            raise InputError(f"{settings.source}: no validation rows in the stream; raise data.val_fraction")
        first = self.head[0]
        self._lock = threading.RLock()
        self.source, self.split, self.columns, self.notes = first.source, first.split, first.columns, first.notes
        self.class_names = first.class_names

"""Rows: what training, sampling and evaluation see of a data set, whatever it is stored in.

`open_rows` opens anything that `--data` may name. Where a data set has no validation split, rows are held out by a
hash of their encoded picture: those below `data.val_fraction` of the range of the hash, at least one row and never
all; equal pictures fall on the same side, and adding rows moves no other row. With a single row it is both.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DataSettings
from ldmcli.data.batches import positions
from ldmcli.data.columns import choose_columns, label_names_of, make_columns
from ldmcli.data.decode import BadImage, shown
from ldmcli.data.folder import SPLITS, several
from ldmcli.data.rows import SHAPES_SIZE, WORKERS, Rows, in_threads, is_shapes, shape_rows
from ldmcli.data.tables import Table, by_split, data_files, describe_features, load_hub, open_tables

__all__ = ["Rows", "is_shapes", "open_rows", "stream", "usable", "verify"]

VALIDATION_NAMES = ("validation", "test")  # after `tables` has brought val, valid, dev, … to one name


def open_rows(settings: DataSettings, *, split: str = "train") -> Rows:
    """The training or validation rows of what `settings.source` names. Pictures are not decoded yet.

    Raises InputError: no such data, no picture column, a named column or split that is not there, labels outside
    their classes, no rows.
    """
    if split not in ("train", "validation"):
        raise UsageError(f"rows are opened for train or validation, not {split!r}")
    if is_shapes(settings.source):
        return shape_rows(settings, split)
    tables = open_tables(settings)
    wanted = _wanted_split(settings, list(tables))
    held_out = _validation_split(settings, list(tables), wanted)
    name = held_out if split == "validation" and held_out else wanted
    rows = _rows_of(tables[name], settings, name, label_names_of(tables, settings))
    if not len(rows):
        raise InputError(f"{shown(settings.source)}: split {name} has no rows")
    if not held_out:
        rows = _held_out(rows, settings, split)
    if split == "train" and settings.limit:
        rows = rows.select(range(min(settings.limit, len(rows))))
    return rows


def _wanted_split(settings: DataSettings, there: list[str]) -> str:
    return _existing(settings.split, there, "--split", settings)


def _validation_split(settings: DataSettings, there: list[str], wanted: str) -> str:
    if settings.val_split:
        return _existing(settings.val_split, there, "--val-split", settings)
    return next((name for name in VALIDATION_NAMES if name in there and name != wanted), "")


def _existing(name: str, there: list[str], option: str, settings: DataSettings) -> str:
    for candidate in (name, SPLITS.get(name.lower(), name)):
        if candidate in there:
            return candidate
    raise InputError(f"{option} {shown(name)}: {shown(settings.source)} has no such split; there are {several(there)}")


def _held_out(rows: Rows, settings: DataSettings, split: str) -> Rows:
    if len(rows) == 1:
        rows.validation_is_train = True
        return rows
    hashes = [int(value, 16) >> 192 for value in in_threads(rows.content_hash, range(len(rows)), WORKERS)]
    bound = _bound(rows, hashes, settings)
    inside = [i for i, value in enumerate(hashes) if (value < bound) == (split == "validation")]
    if not inside or len(inside) == len(rows):  # every picture is the same: hashes cannot part them
        inside = [0] if split == "validation" else list(range(1, len(rows)))
    chosen = rows.select(inside)
    chosen.split = split
    return chosen


def _bound(rows: Rows, hashes: list[int], settings: DataSettings) -> int:
    """Hashes below this are held out. It grows past val_fraction until at least one row that can be read is held
    out, and always leaves one."""
    order = sorted(range(len(rows)), key=hashes.__getitem__)
    count = sum(value < settings.val_fraction * (1 << 64) for value in hashes)
    if count <= 16:
        count = max(count, next((k + 1 for k, i in enumerate(order) if _readable(rows, i)), 1))
    return hashes[order[min(count, len(rows) - 1)]]


def _readable(rows: Rows, i: int) -> bool:
    try:
        rows.image(i)
    except BadImage:
        return False
    return True


def _rows_of(table: Table, settings: DataSettings, split: str, label_names: list[str]) -> Rows:
    columns = make_columns(table, settings, label_names)
    return Rows(columns, np.arange(table.length), settings, source=settings.source, split=split)


# --- checking ---------------------------------------------------------------------------------------------------------


def verify(rows: Rows, settings: DataSettings, *, indices=None, progress=None, workers: int | None = None):
    """Decodes every picture (or those of `indices`) and returns the bad ones as a list of BadImage. Small sets stay
    in memory at data.size. `progress` has `advance(n)`."""
    size = tuple(settings.size) if any(settings.size) else SHAPES_SIZE
    return rows.preload(size, settings.crop, indices=indices, progress=progress, workers=workers or WORKERS)


def usable(rows: Rows, settings: DataSettings, *, progress=None) -> tuple[Rows, list[BadImage]]:
    """(rows whose pictures can be read, the bad ones). Raises InputError when there are bad ones and data.skip_bad is
    off, or when nothing is left."""
    bad = verify(rows, settings, progress=progress, workers=settings.workers)
    if bad and not settings.skip_bad:
        raise InputError(f"{len(bad)} of {len(rows)} pictures cannot be read: {several(bad)}; "
                         "skip them with --skip-bad")
    if len(bad) == len(rows):
        raise InputError(f"{shown(rows.source)}: none of {len(rows)} pictures can be read ({several(bad)})")
    if bad:
        left_out = {error.index for error in bad}
        rows = rows.select([i for i in range(len(rows)) if i not in left_out])
        rows.notes.append(f"{len(bad)} pictures that cannot be read left out")
    return rows, bad


# --- streams ----------------------------------------------------------------------------------------------------------

SHUFFLE_BUFFER = 1000


def stream(settings: DataSettings, split: str = "train", start: int = 0, *, seed: int = 0) -> Iterator[Rows]:
    """Rows from position `start` on, each as `Rows` of length 1, the same on every call.

    Train: endless, epoch after epoch, mixed by (seed, epoch): wholly where rows can be reached by number, within a
    buffer of 1,000 where they come from Parquet files or the hub. Validation: one pass, in order. Reaching `start`
    costs reading what lies before it in its epoch. Rows that cannot be decoded are left to the caller.
    """
    source = _hub_stream(settings, split)
    if source is None:
        yield from _walk(open_rows(settings, split=split), split, start, seed)
        return
    epoch = 0
    while True:
        count = 0
        for one in source(seed * 1_000_003 + epoch):
            count += 1
            if count > start:
                yield one
        if count == 0:
            raise InputError(f"{shown(settings.source)}: no {split} rows in the stream")
        if split != "train":
            return
        epoch += 1 + max(start - count, 0) // count
        start = max(start - count, 0) % count


def _walk(rows: Rows, split: str, start: int, seed: int) -> Iterator[Rows]:
    if split != "train":
        yield from (rows.select([i]) for i in range(start, len(rows)))
        return
    for position in itertools.count(start):
        yield rows.select(positions(position, 1, len(rows), seed)[0])


def _hub_stream(settings: DataSettings, split: str):
    """A function of the shuffle's seed that gives one pass of rows; None where the rows can be reached by number."""
    parts = _streamed_splits(settings)
    if parts is None:
        return None
    import datasets

    wanted = _existing(settings.split, list(parts), "--split", settings)
    held_out = _validation_split(settings, list(parts), wanted)
    dataset = parts[held_out if split == "validation" and held_out else wanted]
    features = dataset.features or dataset._resolve_features().features
    kinds, classes = describe_features(features)
    for column in (c for c, feature in features.items() if isinstance(feature, datasets.Image)):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    if split == "train" and settings.limit:
        dataset = dataset.take(settings.limit)

    def one_pass(seed: int) -> Iterator[Rows]:
        mixed = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) if split == "train" else dataset
        for k, value in enumerate(mixed):
            row = _single(value, kinds, classes, settings, split, k)
            if held_out or _below(row, settings) == (split == "validation"):
                yield row

    return one_pass


def _streamed_splits(settings: DataSettings) -> dict | None:
    path = Path(settings.source).expanduser()
    if is_shapes(settings.source):
        return None
    if not path.exists():
        return {SPLITS.get(name, name): part for name, part in load_hub(settings, streaming=True).items()}
    found = data_files(path) if path.is_dir() and not (path / "state.json").exists() else [path]
    if not found or any(one.suffix.lower() != ".parquet" for one in found):
        return None
    import datasets

    files = by_split(found, path) if path.is_dir() else {"train": found}
    names = {name: [str(one) for one in part] for name, part in files.items()}
    return dict(datasets.load_dataset("parquet", data_files=names, streaming=True))


def _single(value: dict, kinds, classes, settings: DataSettings, split: str, k: int) -> Rows:
    table = Table(1, {column: [cell] for column, cell in value.items()}, kinds, classes, lambda _: f"streamed row {k}")
    label = choose_columns(table, settings).get("label")
    if label is not None and label not in classes:
        table.kinds = {column: kind for column, kind in kinds.items() if column != label}  # its classes are unknown
    return _rows_of(table, settings, split, classes.get(label or "", []))


def _below(row: Rows, settings: DataSettings) -> bool:
    return int(row.content_hash(0), 16) >> 192 < settings.val_fraction * (1 << 64)

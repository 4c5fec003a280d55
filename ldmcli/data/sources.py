"""Rows: what training, sampling and evaluation see of a data set, whatever it is stored in.

`open_rows` opens anything that `--data` may name. Where a data set has no validation split, rows are held out by a
hash of their encoded picture: those below `data.val_fraction` of the range of the hash, at least one row and never
all; equal pictures fall on the same side, and adding rows moves no other row. With a single row it is both.
"""

from collections.abc import Sequence

import numpy as np

from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DataSettings
from ldmcli.data.boxes import with_boxes
from ldmcli.data.column_roles import label_names_of, make_columns
from ldmcli.data.decode import BadImage, sanitise
from ldmcli.data.folder import split_of
from ldmcli.data.pictures import first_few
from ldmcli.data.readers import open_tables
from ldmcli.data.rows import WORKERS, Rows, evenly_spaced, parallel_map
from ldmcli.data.shape_rows import SHAPES_SIZE, is_shapes, shape_rows
from ldmcli.data.table import Table

VALIDATION_NAMES = ("validation", "test")  # after `tables` has brought val, valid, dev, … to one name


def open_rows(settings: DataSettings, *, split: str = "train") -> Rows:
    """The training or validation rows of what `settings.source` names. Pictures are not decoded yet.

    Raises InputError: no such data, no picture column, a named column or split that is not there, labels outside
    their classes, no rows.
    """
    rows, undivided = whole_rows(settings, split)
    return divided(rows, settings, split, held_out(rows, settings) if undivided else None)


def whole_rows(settings: DataSettings, split: str) -> tuple[Rows, bool]:
    """(rows, whether some of them have still to be held out: where the data have no validation split). Nothing of
    their pictures is read. Raises as `open_rows`."""
    if split not in ("train", "validation"):
        raise UsageError(f"rows are opened for train or validation, not {split!r}")
    if is_shapes(settings.source):
        return shape_rows(settings, split), False
    tables = open_tables(settings)
    wanted = existing_split(settings.split, list(tables), "--split", settings)
    other = validation_split(settings, list(tables), wanted)
    name = other if split == "validation" and other else wanted
    rows = rows_of(tables[name], settings, name, label_names_of(tables, settings))
    if not len(rows):
        raise InputError(f"{sanitise(settings.source)}: split {name} has no rows")
    return rows, not other


def divided(rows: Rows, settings: DataSettings, split: str, held: set[int] | None) -> Rows:
    """The rows of `split` among those of `whole_rows`. held: `held_out`, or None where there is nothing to divide."""
    if held is not None and len(rows) == 1:
        rows = rows.select([0])
        rows.validation_is_train = True
    elif held is not None:
        rows = rows.select([i for i in range(len(rows)) if (i in held) == (split == "validation")])
        rows.split = split
    rows = large_enough(with_boxes(rows, settings), settings)
    if split == "train" and settings.limit and not is_shapes(settings.source):
        # in folders a class follows the other: the first rows would be of some classes only
        rows = rows.select(evenly_spaced(len(rows), min(settings.limit, len(rows))))
    return rows


def large_enough(rows: Rows, settings: DataSettings) -> Rows:
    """The rows whose pictures have no side below data.min_side (App. E.3.4); what is left out is noted. Raises
    InputError where none is left."""
    if not settings.min_side:
        return rows
    sides = parallel_map(lambda i: _short_side(rows, i), range(len(rows)), WORKERS)
    kept = [i for i, side in enumerate(sides) if side is None or side >= settings.min_side]
    if not kept:
        raise InputError(
            f"{sanitise(rows.source)}, {rows.split}: all {len(rows)} pictures have a side below "
            f"{settings.min_side} px; lower data.min_side (--min-side)"
        )
    chosen = rows.select(kept)
    if len(kept) < len(rows):
        left_out = len(rows) - len(kept)
        chosen.notes.append(
            f"{left_out} of {len(rows)} {rows.split} rows, with a side below {settings.min_side} px, left out"
        )
    return chosen


def _short_side(rows: Rows, i: int) -> int | None:
    try:
        return min(rows.shape(i))
    except BadImage:
        return None  # left to the check of all pictures, which names it


def split_sizes(settings: DataSettings) -> dict[str, int]:
    """Rows of each split that is stored; {} for shapes, which has none."""
    return {} if is_shapes(settings.source) else {name: table.length for name, table in open_tables(settings).items()}


def validation_split(settings: DataSettings, there: list[str], wanted: str) -> str:
    if settings.val_split:
        return existing_split(settings.val_split, there, "--val-split", settings)
    return next((name for name in VALIDATION_NAMES if name in there and name != wanted), "")


def existing_split(name: str, there: list[str], option: str, settings: DataSettings) -> str:
    for candidate in (name, split_of(name)):
        if candidate in there:
            return candidate
    raise InputError(
        f"{option} {sanitise(name)}: {sanitise(settings.source)} has no such split; there are {first_few(there)}"
        f" (take one with {option} {sanitise(there[0])})"
    )


FEW = 16  # rows that are worth decoding to see whether a side has one that can be read


def held_out(rows: Rows, settings: DataSettings) -> set[int]:
    """Rows whose hash lies below val_fraction. Where that leaves a side without a row that can be read, the rows with
    the next hash join, or, when all that can be read are copies of one picture, one row alone is held out."""
    if len(rows) == 1:
        return set()  # it is both
    shares = list(parallel_map(lambda i: _share(rows, i), range(len(rows)), WORKERS))
    order = sorted(range(len(rows)), key=shares.__getitem__)
    held = {i for i in order if shares[i] < settings.val_fraction}
    if not _has_readable(rows, held):
        first = next((i for i in order if i not in held and _readable(rows, i)), order[-1])
        held |= {i for i in order if shares[i] == shares[first]}
    if not _has_readable(rows, set(order) - held):
        held = {next((i for i in order if _readable(rows, i)), order[0])}
    return held


def _has_readable(rows: Rows, side: set[int]) -> bool:
    return len(side) > FEW or any(_readable(rows, i) for i in side)


def share_of(content_hash: str) -> float:
    """Where a hash lies in its range, 0 … 1."""
    return (int(content_hash, 16) >> 192) / (1 << 64)


def _share(rows: Rows, i: int) -> float:
    try:
        return share_of(rows.content_hash(i))
    except BadImage:  # a file that is not there or closed to us: checking the training rows will name it
        return 1.0


def _readable(rows: Rows, i: int) -> bool:
    try:
        rows.image(i)
    except BadImage:
        return False
    if not rows.has("map"):  # else there is more to check
        rows.readable.add(i)
    return True


def rows_of(table: Table, settings: DataSettings, split: str, label_names: list[str]) -> Rows:
    columns = make_columns(table, settings, label_names)
    return Rows(columns, np.arange(table.length), settings, source=settings.source, split=split)


# --- checking ---------------------------------------------------------------------------------------------------------


def decode_all(rows: Rows, settings: DataSettings, *, indices=None, progress=None, workers: int | None = None):
    """Decodes every picture (or those of `indices`) and returns the bad ones as a list of BadImage. Small sets stay
    in memory at data.size. `progress` has `advance(n)`."""
    size = settings.size if any(settings.size) else SHAPES_SIZE
    return rows.preload(size, settings.crop, indices=indices, progress=progress, workers=workers or WORKERS)


def bad_maps(rows: Rows, indices: Sequence[int], workers: int) -> list[BadImage]:
    """What is wrong with the class maps of those rows; nothing where they have none, or are drawn."""
    if is_shapes(rows.source) or not rows.has("map"):
        return []
    return [error for error in parallel_map(lambda i: _bad_map(rows, i), indices, workers or WORKERS) if error]


def _bad_map(rows: Rows, i: int) -> BadImage | None:
    try:
        rows.map(i)
    except BadImage as error:
        error.index = i
        return error
    return None


def drop_unreadable(
    rows: Rows, settings: DataSettings, *, progress=None, bad: list[BadImage] | None = None
) -> tuple[Rows, list[BadImage]]:
    """(rows whose pictures can be read, the bad ones). bad: what `decode_all` found, where it has run already. Raises
    InputError when there are bad ones and data.skip_bad is off, or when nothing is left."""
    if bad is None:
        bad = decode_all(rows, settings, progress=progress, workers=settings.workers)
    if bad and not settings.skip_bad:
        raise InputError(
            f"{len(bad)} of {len(rows)} pictures cannot be read: {first_few(bad)}; skip them with --skip-bad"
        )
    if len(bad) == len(rows):
        raise InputError(f"{sanitise(rows.source)}: none of {len(rows)} pictures can be read ({first_few(bad)})")
    if bad:
        left_out = {error.index for error in bad}
        rows = rows.select([i for i in range(len(rows)) if i not in left_out])
        rows.notes.append(f"{len(bad)} pictures that cannot be read left out ({first_few(bad)})")
    rows.notes += [
        f"{rows.transparent} pictures of {rows.split} have transparent pixels, laid over "
        f"{settings.background} (data.background)"
    ] * bool(rows.transparent)
    return rows, bad

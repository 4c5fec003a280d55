"""Data sets in parts that are read one by one, for what is too large to be held or read whole (`--streaming`).

A part is a row group of a Parquet file, an archive, a shard of a hub data set, or all rows where they can be reached by
number. An `Index` says how many rows each has: it is made once, of headers alone, and whatever knows it knows where
each row lies.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ldmcli.core import files
from ldmcli.core.errors import InputError, ModelError
from ldmcli.core.files import expanded
from ldmcli.core.settings import DataSettings
from ldmcli.data.cache import cache_root
from ldmcli.data.column_roles import choose_columns, label_names_of, natural
from ldmcli.data.decode import BadImage, sanitise
from ldmcli.data.folder import split_of
from ldmcli.data.pictures import find
from ldmcli.data.readers import ArrowColumn, by_split, data_files, describe_features, hub_files, load_hub, with_paths
from ldmcli.data.rows import WORKERS, Rows, parallel_map
from ldmcli.data.shape_rows import is_shapes
from ldmcli.data.sources import existing_split, rows_of, share_of, validation_split, whole_rows
from ldmcli.data.table import Table, joined
from ldmcli.data.webdataset import read_archives

UNKNOWN_ROWS = 10_000  # of a hub shard, where nothing says how many it has


@dataclass(frozen=True)
class Index:
    """The parts of a data set, in order of the data: rows of each, the file that it lies in, its place in that file."""

    lengths: list[int]
    files: list[int]
    places: list[int]
    fingerprint: str  # changes with the name, the size or the rows of any file
    columns: dict[str, str]  # role → column
    cells: list[str]  # all columns
    class_names: list[str] = field(default_factory=list)

    def limited(self, count: int) -> "Index":
        """The index without what lies behind the first `count` rows."""
        ends = np.cumsum(self.lengths)
        kept = int(np.searchsorted(ends, count)) + 1
        lengths = self.lengths[:kept]
        if kept <= len(self.lengths):
            lengths[-1] -= max(int(ends[kept - 1]) - count, 0)
        return replace(self, lengths=lengths, files=self.files[:kept], places=self.places[:kept])


class Shards(Protocol):
    """The files of one split."""

    settings: DataSettings
    split: str

    def index(self) -> Index:
        """What headers and tables of contents say. Raises InputError where a file can't be read."""
        ...

    def table(self, index: Index, part: int) -> Table:
        """A part, its pictures still encoded. Raises InputError."""
        ...


def open_shards(settings: DataSettings, split: str) -> tuple[Shards, bool]:
    """(what holds the rows of `split`, train or validation; whether it holds those of both, which their hash tells
    apart). Raises as `open_rows`."""
    found = None if is_shapes(settings.source) else _splits(settings)
    if found is None:
        rows, undivided = whole_rows(settings, split)
        return NumberedRows(rows, settings), undivided
    wanted = existing_split(settings.split, list(found), "--split", settings)
    held_out = validation_split(settings, list(found), wanted)
    return found[held_out if split == "validation" and held_out else wanted], not held_out


def _splits(settings: DataSettings) -> dict[str, Shards] | None:
    path = expanded(Path(settings.source))
    if not path.exists():
        urls = hub_files(settings)
        if urls:
            return {
                split: ParquetShards(part, settings, split, features, base=None)
                for split, (part, features) in urls.items()
            }
        loaded = load_hub(settings, streaming=True)
        return {(s := split_of(name) or name): HubShards(part, settings, s) for name, part in loaded.items()}
    is_saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    found = [] if is_saved else data_files(find(path)) if path.is_dir() else [path]
    kinds = {one.suffix.lower() for one in found}
    if kinds not in ({".parquet"}, {".tar"}):
        return None
    parts = by_split(found, path) if path.is_dir() else {"train": found}
    if kinds == {".tar"}:
        return {split: ArchiveShards(part, settings, split) for split, part in parts.items()}
    return {split: ParquetShards(part, settings, split, None, base=part[0].parent) for split, part in parts.items()}


def _rows(table: Table, settings: DataSettings, split: str, class_names: list[str]) -> Rows:
    """Rows of a part. A label whose classes nothing names is none: other parts may have others."""
    label = choose_columns(table, settings).get("label")
    names = class_names or table.classes.get(label or "", [])
    if label is not None and not names:
        table.column_types = {column: kind for column, kind in table.column_types.items() if column != label}
    return rows_of(table, settings, split, names)


def _identity(paths: list) -> list[tuple[str, int]]:
    return [(path.name, path.stat().st_size) if isinstance(path, Path) else (str(path), 0) for path in paths]


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:25]


@contextmanager
def _naming(path: Path | str) -> Iterator[None]:
    """Turns the reader's complaints into one line with the file's name."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{sanitise(path)}: cannot be read as parquet ({sanitise(error)})") from None


class ParquetShards:
    """Parquet files here, or by their addresses; a part is a row group."""

    def __init__(self, paths: list, settings: DataSettings, split: str, features: Any, base: Path | None):
        self.paths, self.settings, self.split, self.base, self._features = paths, settings, split, base, features

    def index(self) -> Index:
        """Of the files' footers."""
        counts = list(parallel_map(self._groups, self.paths, WORKERS))
        sizes = [(k, place, rows) for k, groups in enumerate(counts) for place, rows in enumerate(groups) if rows]
        with _naming(self.paths[0]), _opened(self.paths[0]) as file:
            empty = self._table(file.schema_arrow.empty_table(), "")
        rows = _rows(empty, self.settings, self.split, [])
        return Index(
            [rows for _, _, rows in sizes],
            [k for k, _, _ in sizes],
            [place for _, place, _ in sizes],
            f"stream-{_digest([_identity(self.paths), counts])}",
            rows.columns,
            list(empty.columns),
            rows.class_names,
        )

    def table(self, index: Index, part: int) -> Table:
        """A row group."""
        path, place = self.paths[index.files[part]], index.places[part]
        with _naming(path), _opened(path) as file:
            return self._table(file.read_row_group(place), f"{Path(str(path)).name}, group {place}")

    def _groups(self, path: Path | str) -> list[int]:
        with _naming(path), _opened(path) as file:
            return [file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups)]

    def _table(self, table: Any, name: str) -> Table:
        from datasets import Features

        types, classes = describe_features(self._features or Features.from_arrow_schema(table.schema))
        there = [column for column in types if column in table.column_names]
        columns: dict[str, Sequence] = {column: ArrowColumn(table.column(column)) for column in there}
        made = Table(len(table), columns, types, classes, lambda i: f"{name}, row {i}")
        return made if self.base is None else with_paths(made, self.base, self.settings.image_column)


@contextmanager
def _opened(path: Path | str) -> Iterator[Any]:
    from pyarrow import parquet

    if isinstance(path, Path):
        with parquet.ParquetFile(path) as file:
            yield file
        return
    import fsspec

    with fsspec.open(path, "rb") as handle, parquet.ParquetFile(handle, pre_buffer=True) as file:
        yield file


class ArchiveShards:
    """Tar archives as WebDataset lays them out; a part is an archive. Nothing says how many rows one has but all of its
    headers, so the index is made once and kept in the cache."""

    def __init__(self, paths: list[Path], settings: DataSettings, split: str):
        self.paths, self.settings, self.split = paths, settings, split

    def index(self) -> Index:
        """Of the cache, or of all headers, labels and captions."""
        known = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in self.paths]
        root = cache_root(self.settings.cache_dir)
        columns = [getattr(self.settings, f"{role}_column") for role in ("image", "caption", "label", "objects", "map")]
        kept = root and root / "indices" / f"{_digest([known, self.settings.skip_bad, columns])}.json"
        if kept and kept.exists():
            with suppress(ModelError, TypeError):  # damaged, or of another version
                return Index(**files.read_json(kept))
        index = self._counted()
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(kept, asdict(index))
        return index

    def _counted(self) -> Index:
        lengths: dict[int, int] = {}  # by archive, of those that have rows
        columns: dict[str, str] = {}
        cells: dict[str, None] = {}
        names: set[str] = set()
        for k, path in enumerate(self.paths):
            table = read_archives([path], self.settings.skip_bad)
            if table.length:
                lengths[k] = table.length
                columns = {**choose_columns(table, self.settings), **columns}
                cells |= dict.fromkeys(table.columns)
                names.update(label_names_of({self.split: table}, self.settings))
        if not lengths:
            raise InputError(f"{sanitise(self.settings.source)}: split {self.split} has no rows")
        columns = {role: column for role, column in columns.items() if role != "label" or names}
        rows, mark = list(lengths.values()), f"stream-{_digest([_identity(self.paths), lengths])}"
        return Index(rows, list(lengths), [0] * len(rows), mark, columns, list(cells), natural(names))

    def table(self, index: Index, part: int) -> Table:
        """An archive; its pictures are read one by one."""
        path = self.paths[index.files[part]]
        table = read_archives([path], self.settings.skip_bad)
        return replace(table, name=lambda i: f"{path.name}:{table.name(i)}")


class NumberedRows:
    """Rows that can be reached by number, as one part."""

    def __init__(self, rows: Rows, settings: DataSettings):
        self.rows, self.settings, self.split = rows, settings, rows.split

    def index(self) -> Index:
        """Nothing is read."""
        mark = _digest([self.rows.source, self.rows.split, [self.rows.name(i) for i in range(len(self.rows))]])
        cells, names = self.rows.cells, self.rows.class_names
        return Index([len(self.rows)], [0], [0], f"stream-{mark}", self.rows.columns, cells, names)

    def table(self, index: Index, part: int) -> Table:
        """None: they are rows already."""
        raise AssertionError("`read_part` takes the rows")


class HubShards:
    """A split of a hub data set that is no Parquet, in the shards of the datasets library; one is read whole.

    Nothing says beforehand how many rows a shard has: all are taken to have equal parts of those of the split. What a
    shard has more is not seen, and of one that has fewer some rows are seen twice an epoch.
    """

    def __init__(self, dataset: Any, settings: DataSettings, split: str):
        import datasets

        self.settings, self.split = settings, split
        self.features = dataset.features or dataset._resolve_features().features
        for column in (c for c, feature in self.features.items() if isinstance(feature, datasets.Image)):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.dataset = dataset

    def index(self) -> Index:
        """Of what the hub says of the split."""
        count, info = self.dataset.num_shards, self.dataset.info
        stated = (info.splits or {}).get(str(self.dataset.split))
        each = -(-stated.num_examples // count) if stated and stated.num_examples else UNKNOWN_ROWS
        table = self._table(list(islice(self.dataset, 1)), 0)
        rows = _rows(table, self.settings, self.split, [])
        mark = f"stream-{_digest([self.settings.source, self.settings.config_name, self.split, count, each])}"
        everything, cells = range(count), list(self.features)
        return Index([each] * count, [*everything], [0] * count, mark, rows.columns, cells, rows.class_names)

    def table(self, index: Index, part: int) -> Table:
        """A whole shard."""
        shard = self.dataset.shard(self.dataset.num_shards, index.files[part])
        return self._table(list(islice(shard, index.lengths[part])), part)

    def _table(self, values: list[dict], part: int) -> Table:
        if not values:
            raise InputError(f"{sanitise(self.settings.source)}: no {self.split} rows in shard {part} of the stream")
        types, classes = describe_features(self.features)
        columns: dict[str, Sequence] = {c: [value.get(c) for value in values] for c in self.features}
        return Table(len(values), columns, types, classes, lambda i: f"shard {part}, row {i}")


def read_part(shards: Shards, index: Index, part: int) -> Rows:
    """All rows of a part; pictures are still encoded. Raises InputError."""
    if isinstance(shards, NumberedRows):
        return shards.rows
    return _part_rows(shards, index, shards.table(index, part))


def _part_rows(shards: Shards, index: Index, table: Table) -> Rows:
    return _rows(table, shards.settings, shards.split, index.class_names)


def is_held_out(rows: Rows, i: int, settings: DataSettings) -> bool:
    """Whether a row belongs to validation, where no split does: by its hash, as `sources.held_out` has it."""
    try:
        return share_of(rows.content_hash(i)) < settings.val_fraction
    except BadImage:  # it can't be read, which is said where it is used
        return False


def first_rows(shards: Shards, index: Index, divided: bool, split: str, count: int) -> Rows:
    """The first `count` rows of train or validation, in order of the data; of their parts nothing else is kept.
    divided: as `open_shards` says. Raises InputError where there are none."""
    wanted, settings = split == "validation", shards.settings

    def fitting(rows: Rows, length: int, most: int) -> list[int]:
        everything = range(min(length, len(rows)))
        return list(islice((i for i in everything if not divided or is_held_out(rows, i, settings) == wanted), most))

    if isinstance(shards, NumberedRows):
        found = shards.rows.select(fitting(shards.rows, index.lengths[0], count))
    else:
        taken: list[Table] = []
        for part, length in enumerate(index.lengths):
            table = shards.table(index, part)
            taken.append(table.select(fitting(_part_rows(shards, index, table), length, count)))
            count -= taken[-1].length
            if not count:
                break
        found = _part_rows(shards, index, joined(taken))
    if not len(found):
        more = "; raise data.val_fraction" if divided and wanted else ""
        raise InputError(f"{sanitise(settings.source)}: no {split} rows in the stream{more}")
    found.split = split
    return found

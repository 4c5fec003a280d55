"""What a `--data` argument names, opened as tables: one a split, columns by name, pictures still encoded.

Folders of pictures and CSV or JSON files are read by `folder`, tar archives (WebDataset) and Parquet or Arrow files
here, `save_to_disk` folders and hub data sets by the datasets library.
"""

import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ldmcli.core.config import did_you_mean, suggestions
from ldmcli.core.errors import InputError
from ldmcli.core.files import expanded
from ldmcli.core.settings import DataSettings
from ldmcli.data.decode import EXTENSIONS, BadImage, sanitise
from ldmcli.data.folder import scan, scan_table, split_of
from ldmcli.data.metadata import file_column
from ldmcli.data.pictures import DATA_FILES, TABLES, Found, find, first_few
from ldmcli.data.table import Table, typed_table
from ldmcli.data.webdataset import read_archives

TABLE_FILES = (*DATA_FILES, *TABLES)
T = TypeVar("T")
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?$")


def open_tables(settings: DataSettings) -> dict[str, Table]:
    """The splits of `settings.source`. Raises InputError when it is nothing that can be opened."""
    source = settings.source
    path = expanded(Path(source))
    if not path.exists():
        return _from_hub(settings)
    if path.is_file():
        return _from_files([path], settings)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _from_disk(path)
    found = find(path)
    files = data_files(found)
    if files:
        return {
            split: table
            for name, part in by_split(files, path).items()
            for split, table in _from_files(part, settings, name).items()
        }
    listings = scan(found, skip_bad=settings.skip_bad, image_column=settings.image_column)
    return {split: _listed(part) for split, part in listings.items()}


def data_files(found: Found) -> list[Path]:
    """Data files of a folder; none where it holds loose pictures, whose metadata and archives are another's matter.
    Raises InputError for a folder of both Parquet or Arrow files and pictures."""
    archives = [path for path in found.data if path.suffix.lower() == ".tar"]
    loose = {path.parent for path in found.pictures}
    shards = {path.with_suffix("") for path in archives} | loose
    # img2dataset writes what it knows of a shard beside it, 00000.parquet beside 00000.tar or 00000/
    columnar = [path for path in found.data if path not in archives and path.with_suffix("") not in shards]
    if found.pictures and columnar:
        raise InputError(
            f"{sanitise(found.root)}: holds both pictures ({len(found.pictures)}) and data files "
            f"({first_few(columnar)}); name the folder of one kind"
        )
    if found.pictures or found.metadata:
        return []
    return columnar or archives or [path for path in found.tables if path.suffix.lower() != ".json"]


def by_split(files: list[Path], root: Path) -> dict[str, list[Path]]:
    """Data files by the split that their name (`train-00000-of-00001.parquet`) or folder says; else train."""
    splits: dict[str, list[Path]] = {}
    for path in files:
        words = [*path.relative_to(root).parts[:-1], *re.split(r"[-_.]", path.stem)]
        named = [split for word in words if (split := split_of(word))]
        splits.setdefault(named[0] if named else "train", []).append(path)
    return splits


def _from_files(files: list[Path], settings: DataSettings, split: str = "train") -> dict[str, Table]:
    kinds = {path.suffix.lower() for path in files}
    if kinds == {".tar"}:
        return {split: read_archives(files, settings.skip_bad)}
    if kinds == {".parquet"} or kinds == {".arrow"}:
        table = _from_dataset(_read_columns(files, kinds.pop()[1:]))
        return {split: with_paths(table, files[0].parent, settings.image_column)}
    if len(files) == 1 and kinds & set(TABLES):
        listings = scan_table(files[0], skip_bad=settings.skip_bad, image_column=settings.image_column)
        return {own if split == "train" else split: _listed(part) for own, part in listings.items()}
    if kinds & set(EXTENSIONS):
        raise InputError(f"{sanitise(files[0])}: one picture; name the folder that it lies in")
    raise InputError(f"{first_few(files)}: not data files of one kind ({', '.join(TABLE_FILES)})")


# --- tables of our own ------------------------------------------------------------------------------------------------


def _listed(listing) -> Table:
    return typed_table(listing.columns, listing.names, listing.notes)


# --- tables of the datasets library ---------------------------------------------------------------------------------


def memory_bytes() -> int:
    """Memory of this machine or of its container, whichever is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def _read_columns(files: list[Path], file_format: str):
    """Parquet or Arrow files as a datasets.Dataset: in memory where they are small, so that no copy is kept that a
    changed file could differ from; else mapped from the library's cache."""
    import datasets

    try:
        if sum(path.stat().st_size for path in files) > memory_bytes() // 8:
            return datasets.load_dataset(file_format, data_files=[str(path) for path in files], split="train")
        tables = [_read_table(path, file_format) for path in files]
        import pyarrow

        whole = pyarrow.concat_tables(tables, promote_options="permissive")
        return datasets.Dataset(datasets.table.InMemoryTable(whole.replace_schema_metadata(tables[0].schema.metadata)))
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetGenerationError) as error:
        raise InputError(f"{first_few(files)}: cannot be read as {file_format} ({sanitise(error)})") from None


def _read_table(path: Path, file_format: str):
    import pyarrow
    from pyarrow import parquet

    if file_format == "parquet":
        return parquet.ParquetFile(path).read()
    with pyarrow.OSFile(os.fspath(path)) as file:
        try:
            return pyarrow.ipc.open_file(file).read_all()
        except pyarrow.ArrowInvalid:
            file.seek(0)
            return pyarrow.ipc.open_stream(file).read_all()


def _from_disk(path: Path) -> dict[str, Table]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{sanitise(path)}: not a complete save_to_disk folder ({sanitise(error)})") from None
    if isinstance(loaded, datasets.DatasetDict):
        return {split_of(name) or name: _from_dataset(part) for name, part in loaded.items()}
    return {"train": _from_dataset(loaded)}


def _from_hub(settings: DataSettings) -> dict[str, Table]:
    loaded = load_hub(settings)
    return {split_of(name) or name: _from_dataset(part) for name, part in loaded.items()}


def load_hub(settings: DataSettings, **options):
    """A hub data set as a datasets.DatasetDict (or its streaming kind). Raises InputError in one line."""
    source = settings.source
    _refuse_paths(source)
    import datasets

    return _asked(source, lambda: datasets.load_dataset(source, settings.config_name or None, **options))


def hub_files(settings: DataSettings) -> dict[str, tuple[list[str], Any]]:
    """The addresses of a hub data set's Parquet files and their features (None = as in the files), by split; {} where
    it is no Parquet. Raises as `load_hub`."""
    source = settings.source
    _refuse_paths(source)
    import datasets

    builder = _asked(source, lambda: datasets.load_dataset_builder(source, settings.config_name or None))
    found = {str(split): [str(one) for one in part] for split, part in (builder.config.data_files or {}).items()}
    if not found or any(not one.lower().endswith(".parquet") for part in found.values() for one in part):
        return {}
    return {split_of(name) or name: (part, builder.info.features) for name, part in found.items()}


def _asked(source: str, ask: Callable[[], T]) -> T:
    """What the datasets library gives. Raises InputError in one line."""
    _mind_the_network()
    try:
        return ask()
    except Exception as error:  # the library raises dozens of kinds; its first line says what happened
        near = did_you_mean(suggestions(source, ["shapes"]))
        first = sanitise(str(error).partition("\n")[0] or type(error).__name__, 160)
        raise InputError(
            f"--data {sanitise(source)}: no such folder here, and the hub does not give it ({first}){near}; "
            f"with a network, fetch it once: hf download --repo-type dataset {sanitise(source)}"
        ) from None


def _refuse_paths(source: str) -> None:
    if _looks_like_a_path(source):
        raise InputError(f"--data {sanitise(source)}: no such file or folder{_near_name(expanded(Path(source)))}")


def _looks_like_a_path(source: str) -> bool:
    path = Path(source)
    is_file_name = path.suffix.lower() in {*TABLE_FILES, *EXTENSIONS}
    below_a_folder = len(path.parts) > 1 and path.parent.is_dir()
    return source.startswith((".", "~", "/")) or is_file_name or below_a_folder or not _HUB_ID.match(source)


def _near_name(path: Path) -> str:
    """A hint when the folder that should hold `path` has something of nearly that name."""
    try:
        return did_you_mean([sanitise(name) for name in suggestions(path.name, os.listdir(path.parent))])
    except OSError:
        return ""


def _mind_the_network() -> None:
    """Turns the hub's own offline mode on when it does not answer within three seconds; its client would retry for
    half a minute. Data sets in the cache open either way."""
    import datasets
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return
    try:
        request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=3).close()
    except urllib.error.HTTPError:
        return  # an answer all the same
    except (OSError, ValueError) as error:
        if not isinstance(getattr(error, "reason", None), ssl.SSLError):  # its client may know other certificates
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _from_dataset(dataset) -> Table:
    """Any datasets.Dataset. Cells are read from its Arrow table: pictures stay encoded, and it is fast."""
    if dataset._indices is not None:
        dataset = dataset.flatten_indices()
    types, classes = describe_features(dataset.features)
    return Table(len(dataset), {c: ArrowColumn(dataset.data.column(c)) for c in dataset.features}, types, classes)


class ArrowColumn(Sequence):
    """A column of an Arrow table as a sequence of plain Python values."""

    def __init__(self, chunks):
        self._chunks = chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, i):
        return self._chunks[i].as_py() if not isinstance(i, slice) else self._chunks[i].to_pylist()

    def __iter__(self):
        for chunk in self._chunks.chunks:
            yield from chunk.to_pylist()


def describe_features(features) -> tuple[dict[str, str], dict[str, list[str]]]:
    """`column_types` and `classes` of a Table from a datasets library's features."""
    column_types = {column: column_type_of(feature) for column, feature in features.items()}
    classes = {}
    for column, feature in features.items():
        if column_types[column] == "class":
            classes[column] = list(feature.names)
        elif column_types[column] == "objects" and (names := category_names(feature)):
            classes[column] = names
    return column_types, classes


def column_type_of(feature) -> str:
    """What a datasets feature holds, in the words of `Table.column_types`."""
    import datasets

    if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"}):
        return "image"
    if isinstance(feature, datasets.ClassLabel):
        return "class"
    if isinstance(feature, datasets.Value):
        plain = feature.dtype
        known = (("string", "text"), ("int", "int"), ("binary", "bytes"), ("float", "number"))
        return next(
            (column_type for part, column_type in known if part in plain), "empty" if plain == "null" else "other"
        )
    if isinstance(feature, (datasets.List, datasets.LargeList)) and column_type_of(feature.feature) == "text":
        return "texts"
    inner = getattr(feature, "feature", feature)
    return "objects" if isinstance(inner, dict) and "bbox" in inner else "other"


def category_names(feature) -> list[str]:
    """Names of an objects column's categories; empty where the column does not name them."""
    inner = getattr(feature, "feature", feature)
    category = inner.get("category")
    return list(getattr(getattr(category, "feature", category), "names", None) or [])


# --- pictures by path -------------------------------------------------------------------------------------------------


class PathColumn(Sequence):
    """A column of paths, relative to the folder of the file that they stand in."""

    def __init__(self, values: Sequence, base: Path):
        self._values, self._base = values, base

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, i):
        text = self._values[i]
        path = Path(str(text).strip())
        whole = path if path.is_absolute() else self._base / path
        if not text or ".." in path.parts or not whole.resolve().is_relative_to(self._base.resolve()):
            raise BadImage(f"row {i}", f"the path {sanitise(text)!r} leads out of {sanitise(self._base)}")
        return whole


def with_paths(table: Table, base: Path, image_column: str = "") -> Table:
    """The table, with its column of paths as pictures where it holds no encoded ones. Raises InputError where the
    pictures are named by web addresses."""
    texts = [column for column, column_type in table.column_types.items() if column_type == "text"]
    if image_column not in texts and ({"image", "bytes"} & set(table.column_types.values()) or image_column):
        return table
    column = file_column(texts, image_column)
    firsts = {one: next((text for text in table.columns[one] if text), "") for one in texts}
    addresses = [one for one, text in firsts.items() if text.lower().startswith(("http://", "https://"))]
    if addresses and (column is None or column in addresses):
        raise InputError(
            f"column {sanitise(column or addresses[0])} holds addresses of pictures, not pictures; fetch "
            "them first (img2dataset does), then name the folder that they lie in"
        )
    if column is None:
        return table
    values = table.columns[column]
    return replace(
        table,
        columns={**table.columns, column: PathColumn(values, base)},
        column_types={**table.column_types, column: "image"},
        name=lambda i: str(values[i]),
    )

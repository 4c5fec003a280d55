"""Folders of plain image files, read so that nothing is lost on the way.

Captions and labels come from `metadata.csv` / `metadata.jsonl` (column `file_name`, relative to that file), from text
files beside the pictures (`cat.png`, `cat.txt`), or from class folders. A folder is a set of splits only when all of
its pictures lie in top-level folders called train, validation, test and the like; file names never say a split.
Hidden files, resource forks and files that are not pictures are passed over. Links and `file_name` entries that lead
out of the folder are refused.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ldmcli.core.errors import InputError
from ldmcli.data.decode import EXTENSIONS, shown

SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "eval": "validation", "test": "test", "testing": "test",
}  # fmt: skip
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.json")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path")
SHOWN_NAMES = 5


@dataclass
class Listing:
    """One split of a folder: `columns` maps names to lists of equal length. "image" (and every `*_file_name` column,
    under its short name) holds paths, the others what the metadata say. `names` are ids relative to the folder."""

    names: list[str] = field(default_factory=list)
    columns: dict[str, list] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def scan(root: Path, *, skip_bad: bool = False) -> dict[str, Listing]:
    """The splits of a folder, {"train": …} where it has none. Raises InputError: no pictures, pictures without a row
    or rows without a picture (with `skip_bad` they are left out and counted in `notes`), unreadable metadata."""
    walk = _walk(root)
    if walk.outside and not skip_bad:
        raise InputError(f"{several(walk.outside)}: links that lead out of {shown(root)}; "
                         "copy the pictures or leave them out with --skip-bad")
    if not walk.images and not walk.tables:
        raise InputError(f"{shown(root)}: no pictures in this folder")
    splits, bases = {}, _split_folders(root, walk)
    classes = {part for base in bases.values() for path in walk.images for part in _class_of(path, base)}
    for split, base in bases.items():
        part = _Walk(*([p for p in paths if base == root or base in p.parents] for paths in walk.lists()))
        splits[split] = _listing(root, part, skip_bad)
        if not part.tables and len(classes) > 1:
            _add_classes(splits[split], base)
        splits[split].notes += [f"{len(walk.outside)} links that lead out of the folder left out"] * bool(walk.outside)
    return splits


def scan_table(table: Path, *, skip_bad: bool = False) -> Listing:
    """A metadata file by itself, whatever its name: rows that name pictures relative to it."""
    return _with_metadata(table.parent, _Walk(tables=[table]), skip_bad)


@dataclass
class _Walk:
    images: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    outside: list[Path] = field(default_factory=list)

    def lists(self) -> tuple[list[Path], ...]:
        return self.images, self.tables, self.outside


def _walk(root: Path) -> _Walk:
    """Pictures and metadata files below `root`, in the order of their names."""
    walk, real_root = _Walk(), root.resolve()
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not _ignored(name))
        for name in sorted(n for n in names if not _ignored(n)):
            path = Path(folder, name)
            wanted = walk.tables if name in METADATA else walk.images
            if name in METADATA or path.suffix.lower() in EXTENSIONS:
                (wanted if _inside(path, real_root) else walk.outside).append(path)
        walk.outside += [Path(folder, name) for name in below if not _inside(Path(folder, name), real_root)]
    return walk


def _ignored(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _inside(path: Path, real_root: Path) -> bool:
    """Links are followed to their end; a link to nothing stays inside when its target would."""
    return not path.is_symlink() or path.resolve().is_relative_to(real_root)


def _split_folders(root: Path, walk: _Walk) -> dict[str, Path]:
    tops = {path.relative_to(root).parts[0] for path in walk.images}
    tops |= {p.relative_to(root).parts[0] for p in walk.tables if p.parent != root}
    is_split = all(name.lower() in SPLITS and (root / name).is_dir() for name in tops)
    if not is_split or any(path.parent == root for path in walk.tables):
        return {"train": root}
    named = {SPLITS[name.lower()]: root / name for name in sorted(tops)}
    if len(named) < len(tops):
        raise InputError(f"{shown(root)}: two folders for one split ({', '.join(sorted(tops))}); keep one of them")
    return named


def _listing(root: Path, walk: _Walk, skip_bad: bool) -> Listing:
    if walk.tables:
        return _with_metadata(root, walk, skip_bad)
    listing = Listing([_id(path, root) for path in walk.images], {"image": list(walk.images)})
    captions = [path.with_suffix(".txt") for path in walk.images]
    if any(path.is_file() for path in captions):
        _add_text_files(listing, captions, root, skip_bad)
    return listing


def _id(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _add_text_files(listing: Listing, captions: list[Path], root: Path, skip_bad: bool) -> None:
    lonely = [name for name, path in zip(listing.names, captions) if not path.is_file()]
    if lonely and not skip_bad:
        raise InputError(f"{len(lonely)} pictures have no text file beside them ({several(lonely)}); "
                         "leave them out with --skip-bad")
    kept = [k for k, path in enumerate(captions) if path.is_file()]
    listing.names = [listing.names[k] for k in kept]
    listing.columns["image"] = [listing.columns["image"][k] for k in kept]
    listing.columns["caption"] = [read_text(captions[k]).strip() for k in kept]
    listing.notes += [f"{len(lonely)} pictures without a text file left out"] * bool(lonely)


def _class_of(path: Path, base: Path) -> tuple[str, ...]:
    """The first-level folder of a picture below `base`; nothing for one that lies beside the folders."""
    return path.relative_to(base).parts[:-1][:1] if base in path.parents else ()


def _add_classes(listing: Listing, base: Path) -> None:
    """First-level folders as labels, where every picture lies in one."""
    labels = [_class_of(path, base) for path in listing.columns["image"]]
    if all(labels):
        listing.columns["label"] = [label[0] for label in labels]
    elif any(labels):
        listing.notes.append("pictures lie beside folders, so folders are not taken as classes")


def _with_metadata(root: Path, walk: _Walk, skip_bad: bool) -> Listing:
    rows: list[tuple[Path, dict]] = []
    named, missing = set(), []
    for table in walk.tables:
        for row in map(_named_file, read_rows(table)):
            paths = {_short(key): _resolve(row[key], table, root) for key in row if _is_path_column(key)}
            if "image" not in paths:
                raise InputError(f"{shown(_id(table, root))}: no column file_name; there are {several(row)}")
            named.update(paths.values())
            absent = [path for path in paths.values() if not (path.is_file() or path.is_symlink())]
            missing += [_id(path, root) for path in absent]
            if not absent:
                rows.append((paths["image"], {k: v for k, v in row.items() if not _is_path_column(k)} | paths))
    lonely = [_id(path, root) for path in walk.images if path not in named]
    notes = _partners(root, missing, lonely, skip_bad)
    if not rows:
        raise InputError(f"{shown(_id(walk.tables[0], root))}: no row with a picture")
    columns = {key: None for _, row in rows for key in row}
    return Listing([_id(path, root) for path, _ in rows], {c: [r.get(c) for _, r in rows] for c in columns}, notes)


def _partners(root: Path, missing: list[str], lonely: list[str], skip_bad: bool) -> list[str]:
    """Complains about rows without a picture and pictures without a row, or returns notes that count them."""
    told = []
    if missing:
        told.append(f"{len(missing)} rows name pictures that are absent ({several(missing)})")
    if lonely:
        told.append(f"{len(lonely)} pictures have no row in the metadata ({several(lonely)})")
    if told and not skip_bad:
        raise InputError(f"{shown(root)}: {'; '.join(told)}; leave them out with --skip-bad")
    return [f"{one}, left out" for one in told]


def _named_file(row: dict) -> dict:
    """The row with its picture under `file_name`, whatever usual name the column has."""
    key = next((name for name in FILE_COLUMNS if isinstance(row.get(name), str)), "file_name")
    return row if key == "file_name" else {"file_name" if k == key else k: v for k, v in row.items()}


def _is_path_column(key: str) -> bool:
    return key == "file_name" or key.endswith("_file_name")


def _short(key: str) -> str:
    return "image" if key == "file_name" else key.removesuffix("_file_name")


def _resolve(value: object, table: Path, root: Path) -> Path:
    """The file that a metadata entry names; entries that lead out of the folder are refused."""
    text = str(value).replace("\\", "/") if os.sep == "\\" else str(value)
    path = PurePosixPath(text)
    if not text or path.is_absolute() or ".." in path.parts or "\0" in text:
        raise InputError(f"{shown(_id(table, root))}: file_name {shown(text)!r} leads out of the folder; "
                         "name files relative to the metadata file")
    found = table.parent / path
    if not _inside(found, root.resolve()) or not found.parent.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{shown(_id(table, root))}: {shown(text)} is a link that leads out of the folder")
    return found


def several(names: Iterable) -> str:
    """The first few names, and how many more there are."""
    names = [shown(name, 80) for name in names]
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more



# --- text files -------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without BOM. Raises InputError that names the file and the first bad byte."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{shown(path)}: cannot be read ({error.strerror})") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        raise InputError(f"{shown(path)}: not UTF-8 text at byte {where} (0x{content[where]:02x}); "
                         "save the file as UTF-8") from None


def read_rows(path: Path) -> Iterator[dict]:
    """Rows of a .csv, .tsv, .jsonl or .json file. In CSV every field is text and stays so, `NA` and `null` too."""
    text = read_text(path)
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            yield from _csv_rows(text, path, "\t" if kind == ".tsv" else ",")
        elif kind == ".json" and text.lstrip().startswith("["):
            yield from (_object(row, path, k) for k, row in enumerate(json.loads(text), 1))
        else:
            yield from (_object(json.loads(line), path, k) for k, line in _lines(text))
    except json.JSONDecodeError as error:
        raise InputError(f"{shown(path)}: not valid JSON ({error.msg}, column {error.colno})") from None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, split at newlines only: JSON strings may hold U+2028 and the like."""
    return ((k, line) for k, line in enumerate(text.split("\n"), 1) if line.strip())


def _object(row: object, path: Path, line: int) -> dict:
    if not isinstance(row, dict):
        raise InputError(f"{shown(path)}: row {line} is not an object with named values")
    return row


def _csv_rows(text: str, path: Path, delimiter: str) -> Iterator[dict]:
    csv.field_size_limit(1 << 30)  # captions of megabytes are rare, but no reason to stop
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="", strict=True)
    try:
        for row in reader:
            if "" in row or None in row.values():
                raise InputError(f"{shown(path)}: line {reader.line_num} has "
                                 f"{'more' if '' in row else 'fewer'} fields than the header; quote commas")
            yield row
    except csv.Error as error:
        raise InputError(f"{shown(path)}: line {reader.line_num}: {error}") from None

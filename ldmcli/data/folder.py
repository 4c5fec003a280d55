"""Folders of plain image files, read so that nothing is lost on the way.

Captions and labels come from `metadata.csv`, `.tsv`, `.jsonl` or `.json` (column `file_name`, relative to that file or
to the folder), from text files beside the pictures (`cat.png`, `cat.txt`), or from class folders. Splits are top-level
folders called train, val2017, test and the like, or a column `split` of the metadata; file names never say one.
Links and `file_name` entries that lead out of the folder are refused. What is there and is not taken stands in `notes`.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ldmcli.core.errors import InputError
from ldmcli.data.annotations import Annotations, read_annotations
from ldmcli.data.decode import EXTENSIONS, sanitise
from ldmcli.data.metadata import file_column, holds_rows, read_rows, read_text
from ldmcli.data.pictures import TEXTS, Found, first_few, no_pictures

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
    "testing": "test",
}
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
CAPTIONS = ("caption", "text", "prompt", "description", "title")  # of JSON files beside pictures
_SPLIT_NAME = re.compile(rf"({'|'.join(SPLITS)})[-_ ]?((19|20)\d\d|set|data|split|images|imgs)?", re.IGNORECASE)
_HINTED = 3


def split_of(name: str) -> str | None:
    """train, validation or test for what people call them (Val, valid, train2017, test_set); None for other names."""
    match = _SPLIT_NAME.fullmatch(name)
    return SPLITS[match[1].lower()] if match else None


@dataclass
class Listing:
    """One split of a folder: `columns` maps names to lists of equal length. "image" (and every `*_file_name` column,
    under its short name) holds paths, the others what the metadata say. `names` are ids relative to the folder."""

    names: list[str] = field(default_factory=list)
    columns: dict[str, list] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def scan(found: Found, *, skip_bad: bool = False, image_column: str = "") -> dict[str, Listing]:
    """The splits of a folder, {"train": …} where it has none. Raises InputError: no pictures, pictures without a row
    or rows without a picture (with `skip_bad` they are left out and counted in `notes`), unreadable metadata."""
    root = found.root
    general = [path for path in found.metadata if path.suffix.lower() == ".json" and not holds_rows(path)]
    found.metadata = [path for path in found.metadata if path not in general]
    found.tables += general
    if found.outside and not skip_bad:
        raise InputError(
            f"{first_few(found.outside)}: links that lead out of {sanitise(root)}; "
            "copy the pictures or leave them out with --skip-bad"
        )
    if not found.pictures and not found.metadata:
        raise no_pictures(root, [*found.notes(), *_unused_tables(found)])
    bases, notes = _split_folders(found)
    notes += [f"{len(found.outside)} links that lead out of the folder left out"] * bool(found.outside)
    taken = [path for path in found.pictures if _base_of(path, bases)]
    listings = {}
    if found.metadata:
        covered = _covered(found, bases)
        rows = _Rows(root, taken, found.metadata, image_column)
        notes += rows.check(skip_bad, covered)
        listings = rows.listings({split: base for split, base in bases.items() if base in covered}, notes)
        bases = {split: base for split, base in bases.items() if base not in covered}
        notes += [f"{base.name}/ has no metadata" for base in bases.values()]
    annotations = (
        Annotations() if found.metadata else read_annotations(found, _foreign_tables(found, ".json"), split_of)
    )
    notes += [f"boxes or captions come from {found.names(annotations.files)}"] * bool(annotations.values)
    notes += [f"{found.names(annotations.large)}: too large to be read for annotations"] * bool(annotations.large)
    classes = _classes(found, taken, bases)
    for split, base in bases.items():
        listings[split] = _plain(root, [path for path in taken if base in path.parents], found, skip_bad)
        _add_annotations(listings[split], annotations)
        if len(classes) > 1:
            _add_classes(listings[split], base)
    if not listings:
        raise InputError(f"{sanitise(root)}: no row of the metadata names a picture of a split; {'; '.join(notes)}")
    for listing in listings.values():
        listing.notes = [*notes, *listing.notes, *found.notes(), *_unused_tables(found, annotations.files)]
    return listings


def scan_table(table: Path, *, skip_bad: bool = False, image_column: str = "") -> dict[str, Listing]:
    """A metadata file by itself, whatever its name: rows that name pictures relative to it."""
    rows = _Rows(table.parent, [], [table], image_column)
    notes = rows.check(skip_bad, set())
    listings = rows.listings({"train": table.parent}, notes)
    for listing in listings.values():
        listing.notes = list(notes)
    return listings


def _id(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


# --- splits and classes -----------------------------------------------------------------------------------------------


def _split_folders(found: Found) -> tuple[dict[str, Path], list[str]]:
    """Folders by split, and notes. Top-level folders are splits when all of them are called so, or when two splits are
    among them: what lies beside those is no training data."""
    root = found.root
    parts = [path.relative_to(root).parts for path in [*found.pictures, *found.metadata]]
    tops = sorted({one[0] for one in parts if len(one) > 1})
    loose = [path for path in found.pictures if path.parent == root]
    splits: dict[str, list[str]] = {}
    for name in tops:
        if split := split_of(name):
            splits.setdefault(split, []).append(name)
    others = [name for name in tops if not split_of(name)]
    if not splits or (others or loose) and len(splits) < 2:
        alone = [f"{name}/" for names in splits.values() for name in names]
        return {"train": root}, [f"{first_few(alone)} is no split: other pictures lie beside it"] * bool(alone)
    for names in splits.values():
        if len(names) > 1:
            raise InputError(f"{sanitise(root)}: two folders for one split ({', '.join(names)}); keep one of them")
    notes = []
    if others or loose:
        beside = [path for path in found.pictures if not split_of(path.relative_to(root).parts[0])]
        named = " and ".join(f"{name}/" for names in splits.values() for name in names)
        notes.append(
            f"{named} are taken as splits; {len(beside)} pictures beside them passed over ({found.names(beside)})"
        )
    return {split: root / names[0] for split, names in splits.items()}, notes


def _base_of(path: Path, bases: dict[str, Path]) -> Path | None:
    return next((base for base in bases.values() if base in path.parents), None)


def _covered(found: Found, bases: dict[str, Path]) -> set[Path]:
    """Splits whose pictures must have a row: those that metadata lie in or, where it lies above them, all."""
    above = any(_base_of(table, bases) is None for table in found.metadata)
    return {base for base in bases.values() if above or any(base in table.parents for table in found.metadata)}


def _class_of(path: Path, base: Path) -> tuple[str, ...]:
    """The first-level folder of a picture below `base`; nothing for one that lies beside the folders."""
    return path.relative_to(base).parts[:-1][:1] if base in path.parents else ()


def _classes(found: Found, pictures: list[Path], bases: dict[str, Path]) -> set[str]:
    """Names of class folders. Numbered folders with a parquet or stats file of their name are shards of img2dataset."""
    names = {part for base in bases.values() for path in pictures for part in _class_of(path, base)}
    shards = {path.name.partition(".")[0].removesuffix("_stats") for path in [*found.data, *found.tables]}
    return names if not names <= shards else set()


def _add_classes(listing: Listing, base: Path) -> None:
    """First-level folders as labels, where every picture lies in one."""
    labels = [_class_of(path, base) for path in listing.columns["image"]]
    if all(labels):
        listing.columns["label"] = [label[0] for label in labels]
    elif any(labels):
        listing.notes.append("pictures lie beside folders, so folders are not taken as classes")


# --- text beside pictures ---------------------------------------------------------------------------------------------


def _plain(root: Path, pictures: list[Path], found: Found, skip_bad: bool) -> Listing:
    """Pictures without a row in metadata, with the text or JSON files beside them."""
    listing = Listing([_id(path, root) for path in pictures], {"image": list(pictures)})
    beside = _beside(pictures, found.texts)
    if any(beside):
        _add_text_files(listing, beside, skip_bad)
        endings = Counter(path.suffix for path in beside if path)
        other = ", ".join(f"{count} {ending}" for ending, count in endings.items() if ending != ".txt")
        listing.notes += [f"captions come from text files beside the pictures ({other})"] * bool(other)
        taken = {path for path in beside if path}
        folders = {path.parent for path in taken}
        lonely = [path for path in found.texts if path.parent in folders and path not in taken]
        listing.notes += [
            f"{len(lonely)} text files belong to no picture, or to one that has another "
            f"({found.names(lonely)}), passed over"
        ] * bool(lonely)
    else:
        _add_json_files(listing, _beside(pictures, found.tables, (".json",)))
    return listing


def _beside(pictures: list[Path], texts: list[Path], endings: Sequence[str] = TEXTS) -> list[Path | None]:
    """For each picture the file of its name with one of the endings, the first of them where there are several."""
    by_name: dict[tuple[Path, str], Path] = {}
    for ending in reversed(endings):
        by_name |= {(path.parent, path.stem): path for path in texts if path.suffix.lower() == ending}
    return [by_name.get((path.parent, path.stem)) or by_name.get((path.parent, path.name)) for path in pictures]


def _add_text_files(listing: Listing, captions: list[Path | None], skip_bad: bool) -> None:
    lonely = [name for name, path in zip(listing.names, captions) if path is None]
    if lonely and not skip_bad:
        raise InputError(
            f"{len(lonely)} pictures have no text file beside them ({first_few(lonely)}); "
            "leave them out with --skip-bad"
        )
    kept = [(k, path) for k, path in enumerate(captions) if path is not None]
    listing.names = [listing.names[k] for k, _ in kept]
    listing.columns["image"] = [listing.columns["image"][k] for k, _ in kept]
    listing.columns["caption"] = [read_text(path).strip() for _, path in kept]
    listing.notes += [f"{len(lonely)} pictures without a text file left out ({first_few(lonely)})"] * bool(lonely)


def _add_json_files(listing: Listing, beside: list[Path | None]) -> None:
    """Captions from JSON files beside the pictures, where those have one."""
    found = [_json_caption(path) if path else None for path in beside]
    count = sum(text is not None for text in found)
    if count:
        listing.columns["caption"] = found
        lonely = [name for name, text in zip(listing.names, found) if text is None]
        without = f"; {len(lonely)} have none ({first_few(lonely)})" if lonely else ""
        listing.notes.append(f"captions come from {count} JSON files beside the pictures{without}")


def _add_annotations(listing: Listing, annotations: Annotations) -> None:
    """Columns from annotation files; pictures that they do not speak of have nothing there."""
    found = [annotations.values.get(path, {}) for path in listing.columns["image"]]
    for column in {key: None for one in found for key in one}:
        listing.columns.setdefault(column, [one.get(column) for one in found])
    lonely = [name for name, one in zip(listing.names, found) if not one]
    if annotations.values and lonely:
        listing.notes.append(f"{len(lonely)} pictures have no entry in the annotations ({first_few(lonely)})")


def _json_caption(path: Path) -> str | None:
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError):
        return None
    texts = (value.get(key) for key in CAPTIONS) if isinstance(value, dict) else ()
    return next((text for text in texts if isinstance(text, str)), None)


# --- metadata ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    picture: Path
    values: dict
    table: Path


class _Rows:
    """Rows of the metadata files of a folder, one a picture, and what has no partner."""

    def __init__(self, root: Path, pictures: list[Path], tables: list[Path], image_column: str):
        self.root, self.tables, self.pictures = root, tables, pictures
        self.missing: list[str] = []
        self.named: set[Path] = set()
        read = [row for table in tables for row in self._read(table, image_column)]
        self.rows, self.notes = _one_each(read, root)

    def _read(self, table: Path, image_column: str) -> Iterable[_Row]:
        for row in read_rows(table):
            key = file_column(row, image_column)
            columns = {} if key is None else {key if key == image_column else "image": key}
            columns |= {name.removesuffix("_file_name"): name for name in row if name.endswith("_file_name")}
            picture = next((short for short in columns if short in (key, "image")), None)
            if picture is None or not isinstance(row[columns[picture]], str):
                raise InputError(f"{sanitise(_id(table, self.root))}: no column file_name; there are {first_few(row)}")
            paths = {
                short: self._resolve(row[name], table)
                for short, name in columns.items()
                if short == picture or row[name]
            }
            self.named.update(paths.values())
            absent = [row[columns[short]] for short, path in paths.items() if not _there(path)]
            self.missing += [sanitise(one) for one in absent]
            if not absent:
                others = {name: value for name, value in row.items() if name not in columns.values()}
                yield _Row(paths[picture], others | paths, table)

    def _resolve(self, value: object, table: Path) -> Path:
        """The file that a metadata entry names; entries that lead out of the folder are refused."""
        text = str(value).strip()
        root, path = self.root.resolve(), PurePosixPath(text.replace("\\", "/") if os.sep == "\\" else text)
        where = sanitise(_id(table, self.root))
        if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
            raise InputError(
                f"{where}: {sanitise(text, 80)} is an address; fetch the pictures first (img2dataset does) "
                "and name their files"
            )
        if path.is_absolute() and root in Path(path).parents and ".." not in path.parts:
            path = PurePosixPath(Path(path).relative_to(root))
        if not text or path.is_absolute() or ".." in path.parts or "\0" in text:
            raise InputError(
                f"{where}: file_name {sanitise(text)!r} leads out of the folder; "
                "name files relative to the metadata file"
            )
        places = [table.parent / path, self.root / path]
        if not path.suffix:
            places += [one for one in self._by_stem.get(places[0], ())]
        found = next((place for place in places if _there(place)), places[0])
        if not _there(found):
            return found
        if (
            not found.parent.resolve().is_relative_to(root)
            or found.is_symlink()
            and not (found.resolve().is_relative_to(root))
        ):
            raise InputError(f"{where}: {sanitise(text)} is a link that leads out of the folder")
        return found

    @property
    def _by_stem(self) -> dict[Path, list[Path]]:
        """Pictures by their path without ending, where only one has it."""
        if not hasattr(self, "_stems"):
            counts = Counter(path.with_suffix("") for path in self.pictures)
            self._stems = {one: [path] for path in self.pictures if counts[one := path.with_suffix("")] == 1}
        return self._stems

    def check(self, skip_bad: bool, covered: set[Path]) -> list[str]:
        """Notes on what is left out. Raises InputError for rows without a picture and pictures without a row."""
        lonely = [
            _id(path, self.root)
            for path in self.pictures
            if path not in self.named and not covered.isdisjoint(path.parents)
        ]
        problems = []
        if self.missing:
            problems.append(
                f"{len(self.missing)} rows name pictures that are absent ({first_few(self.missing)}"
                f"{_hint(self.missing, lonely)})"
            )
        if lonely:
            problems.append(f"{len(lonely)} pictures have no row in the metadata ({first_few(lonely)})")
        if not self.rows:
            what = "; ".join(problems) or "no row with a picture"
            raise InputError(f"{sanitise(_id(self.tables[0], self.root))}: {what}")
        if problems and not skip_bad:
            raise InputError(f"{sanitise(self.root)}: {'; '.join(problems)}; leave them out with --skip-bad")
        return [*(f"{one}, left out" for one in problems), *self.notes]

    def listings(self, bases: dict[str, Path], notes: list[str]) -> dict[str, Listing]:
        """Rows by the folder that their picture lies in, or of a single folder by a column that states splits."""
        if len(bases) == 1 and self.root in bases.values():
            for name in SPLIT_COLUMNS:
                stated = [split_of(str(row.values.get(name, "")).strip()) for row in self.rows]
                if all(stated):
                    notes.append(f"column {name} tells the splits")
                    return {
                        str(split): self._listing([row for row, own in zip(self.rows, stated) if own == split])
                        for split in dict.fromkeys(stated)
                    }
        parts = {split: [row for row in self.rows if base in row.picture.parents] for split, base in bases.items()}
        return {split: self._listing(rows) for split, rows in parts.items() if rows}

    def _listing(self, rows: list[_Row]) -> Listing:
        columns = {key: None for row in rows for key in row.values}
        names = [_id(row.picture, self.root) for row in rows]
        return Listing(names, {key: [row.values.get(key) for row in rows] for key in columns})


def _there(path: Path) -> bool:
    try:
        return path.is_file() or path.is_symlink()
    except OSError:  # no file can be called so
        return False


def _hint(missing: list[str], lonely: list[str]) -> str:
    """Pictures that absent ones may mean: the same name in another case, in another folder, behind other slashes."""
    by_name = {PurePosixPath(name).name.lower(): name for name in reversed(lonely)}
    near = [by_name.get(name.replace("\\", "/").rpartition("/")[2].lower()) for name in missing[:_HINTED]]
    return f"; did you mean {', '.join(name for name in near if name)}?" if any(near) else ""


def _one_each(rows: list[_Row], root: Path) -> tuple[list[_Row], list[str]]:
    """One row a picture, with notes: of several files the nearest to the picture counts, of two in one folder the first
    by name, and of several rows in one file the first."""
    groups: dict[Path, list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.picture, []).append(row)
    kept: list[_Row] = []
    passed: Counter[tuple[Path, Path]] = Counter()
    repeated: dict[Path, list[tuple[Path, int]]] = {}
    for picture, group in groups.items():
        table = max((row.table for row in group), key=lambda path: len(path.parts))
        own = [row for row in group if row.table == table]
        passed.update((row.table, table) for row in group if row.table != table)
        kept.append(own[0])
        if len(own) > 1:
            repeated.setdefault(table, []).append((picture, len(own) - 1))
    notes = [
        f"{count} rows of {_id(other, root)} left out: {_id(table, root)} tells of the same pictures"
        for (other, table), count in passed.items()
    ]
    for table, several_rows in repeated.items():
        names = first_few(_id(picture, root) for picture, _ in several_rows)
        notes.append(
            f"{len(several_rows)} pictures have several rows in {_id(table, root)} ({names}); the first of "
            f"each is taken, {sum(count for _, count in several_rows)} others are left out"
        )
    return kept, notes


def _unused_tables(found: Found, used: Sequence[Path] = ()) -> list[str]:
    """Tables beside the pictures that nothing was read from, where they speak of pictures or look as if."""
    texts = {path for path in found.texts if path.suffix.lower() == ".txt"} - set(_beside(found.pictures, found.texts))
    unused = [
        path
        for path in (*_foreign_tables(found), *sorted(texts))
        if path not in used and (path.suffix.lower() not in (".json", ".txt") or _speaks_of_pictures(path))
    ]
    if not unused:
        return []
    name, ending = unused[0].relative_to(found.root).as_posix(), unused[0].suffix.lower()
    how = f"name it to take it (--data {sanitise(found.root / name)}), or call it metadata{ending}"
    if ending == ".txt":
        how = "call it metadata.csv where its first line names columns, as in file_name,caption"
    return [f"{len(unused)} tables are not read ({found.names(unused)}); {how}"]


def _foreign_tables(found: Found, ending: str = "") -> list[Path]:
    """Tables that belong to no single picture, and are no statistics of img2dataset."""
    beside = {path for path in _beside(found.pictures, found.tables, (".json",)) if path}
    return [
        path
        for path in found.tables
        if path not in beside and not path.stem.endswith("_stats") and path.suffix.lower().endswith(ending)
    ]


def _speaks_of_pictures(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(4096).lower()
    except OSError:
        return False
    return any(ending.encode() in head for ending in (*EXTENSIONS, "file_name"))

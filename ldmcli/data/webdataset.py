"""Tar archives as WebDataset lays them out, read as a table; nothing is extracted."""

import json
import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath

from ldmcli.core.errors import InputError
from ldmcli.data.decode import EXTENSIONS, sanitise
from ldmcli.data.pictures import UNREAD, first_few, is_hidden
from ldmcli.data.table import Table, TarEntry, typed_table

_TAR_TEXT = {"txt": "caption", "text": "caption", "caption": "caption", "cls": "label"}


def read_archives(archives: list[Path], skip_bad: bool) -> Table:
    """WebDataset archives: files that share a name up to the first dot of its last part are one row."""
    rows: dict[tuple[Path, str], dict] = {}
    unread: Counter[str] = Counter()
    for archive in archives:
        for key, extension, entry in _tar_entries(archive):
            _put(rows.setdefault((archive, key), {}), extension, entry)
            unread.update([ending] if (ending := f".{extension.rpartition('.')[2]}") in UNREAD else ())
    lonely = [key for (_, key), row in rows.items() if not isinstance(row.get("image"), TarEntry)]
    formats = f"; formats that are not read: {', '.join(f'{n} {ending}' for ending, n in unread.items())}"
    note = f"{len(lonely)} rows without a picture ({first_few(lonely)}{formats if unread else ''})"
    if lonely and not skip_bad:
        raise InputError(f"{sanitise(archives[0])}: {note}; leave them out with --skip-bad")
    kept = {key: row for key, row in rows.items() if isinstance(row.get("image"), TarEntry)}
    columns = {column: None for row in kept.values() for column in row}
    notes = [f"{note} left out"] * bool(lonely)
    many = len(archives) > 1
    names = [f"{archive.name}:{key}" if many else key for archive, key in kept]
    return typed_table({c: [row.get(c) for row in kept.values()] for c in columns}, names, notes)


def _tar_entries(archive: Path):
    """(row key, extension, entry) of each regular file. Entries that lead out of the archive or are no plain files
    are refused; nothing is extracted, so a small archive of a huge file costs no more than its header."""
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if member.isdir() or any(is_hidden(part) for part in name.parts if part not in (".", "..")):
                    continue
                if name.is_absolute() or ".." in name.parts or not member.isreg():
                    raise InputError(
                        f"{sanitise(archive)}: entry {sanitise(member.name)!r} is refused: "
                        "only plain files inside the archive are read"
                    )
                stem, _, extension = name.name.partition(".")
                yield str(name.parent / stem), extension.lower(), TarEntry(archive, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(
            f"{sanitise(archive)}: not an uncompressed tar archive, or cut off ({sanitise(error)})"
        ) from None


def _put(row: dict, extension: str, entry: TarEntry) -> None:
    last = extension.rpartition(".")[2]
    if f".{last}" in EXTENSIONS:
        prefix = extension.rpartition(".")[0]
        row["image" if not prefix else prefix] = entry
    elif extension == "json":
        row.update({key: value for key, value in _json_of(entry).items() if key not in row})
    elif extension in _TAR_TEXT:
        text = _text_of(entry).strip()
        row[_TAR_TEXT[extension]] = int(text) if extension == "cls" and text.lstrip("-").isdecimal() else text


def _text_of(entry: TarEntry) -> str:
    try:
        return entry.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{sanitise(entry.archive)}: text that is not UTF-8 at byte {entry.offset + error.start} of the archive"
        ) from None


def _json_of(entry: TarEntry) -> dict:
    try:
        value = json.loads(_text_of(entry))
    except json.JSONDecodeError as error:
        raise InputError(f"{sanitise(entry.archive)}: JSON at byte {entry.offset} is not valid ({error.msg})") from None
    return value if isinstance(value, dict) else {}

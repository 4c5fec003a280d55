"""Rows of metadata files (CSV, TSV, JSON, JSON lines) as people and their programs write them."""

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldmcli.core.errors import InputError
from ldmcli.data.decode import EXTENSIONS, sanitise
from ldmcli.data.pictures import first_few

FILE_COLUMNS = (
    "file_name",
    "filename",
    "file",
    "image",
    "image_path",
    "path",
    "filepath",
    "image_file",
    "image_filename",
    "image_name",
    "img",
    "img_path",
    "img_name",
    "picture",
    "photo",
    "fname",
)
DELIMITERS = ",;\t|"
_MARKS = (  # longest first: the mark of UTF-16 begins that of UTF-32
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 or 32 where it begins with their mark. Raises InputError that names the file
    and the first bad byte."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{sanitise(path)}: cannot be read ({error.strerror})") from None
    mark, encoding = next(((m, e) for m, e in _MARKS if content.startswith(m)), (b"", "utf-8"))
    try:
        return content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        where = error.start + len(mark)
        raise InputError(
            f"{sanitise(path)}: not {encoding.upper()} text at byte {where} (0x{content[where]:02x}); "
            "save the file as UTF-8"
        ) from None


def file_column(columns, wanted: str = "") -> str | None:
    """The column that names pictures: `wanted` where it is there, else a usual name, however it is spelled."""
    if wanted and wanted in columns:
        return wanted
    by_key = {_key(column): column for column in reversed(list(columns))}
    return next((by_key[key] for key in map(_key, FILE_COLUMNS) if key in by_key), None)


def _key(column: object) -> str:
    return "".join(sign for sign in str(column).lower() if sign.isalnum())


def read_rows(path: Path) -> Iterator[dict]:
    """Rows of a .csv, .tsv, .jsonl or .json file. In CSV every field is text and stays so, `NA` and `null` too.

    Raises InputError that names the file and the line.
    """
    text = read_text(path)
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            yield from _csv_rows(text, path, "\t" if kind == ".tsv" else "")
        elif kind == ".json" and (rows := _json_rows(text)) is not None:
            yield from (_object(row, path, k) for k, row in enumerate(rows, 1))
        else:
            yield from (_object(json.loads(line), path, k) for k, line in _lines(text))
    except json.JSONDecodeError as error:
        raise InputError(f"{sanitise(path)}: not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise InputError(f"{sanitise(path)}: JSON that is nested too deeply") from None


def holds_rows(path: Path) -> bool:
    """Whether a JSON file may describe pictures one by one; an object about the data set as a whole does not.
    Damaged files may: reading them says what is wrong."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return True
    return (
        not isinstance(value, dict)
        or _json_rows(text) is not None
        or file_column(value) is not None
        or any(key.endswith("_file_name") for key in value)
    )


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, split at newlines only: JSON strings may hold U+2028 and the like."""
    return ((k, line) for k, line in enumerate(text.split("\n"), 1) if line.strip())


def _object(row: object, path: Path, line: int) -> dict:
    if not isinstance(row, dict):
        raise InputError(f"{sanitise(path)}: row {line} is not an object with named values")
    return row


def _json_rows(text: str) -> list | None:
    """Rows of one JSON value: a list of objects, one object a picture under its name, or columns as pandas writes
    them. None where it is none of these, as with a line an object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        if text.lstrip().startswith("["):
            raise
        return None
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or not value:
        return None
    named = file_column(value)
    if named is not None and isinstance(value[named], (dict, list)):
        return _transposed(value, named)
    if all(Path(key).suffix.lower() in EXTENSIONS for key in value):
        return [
            {"file_name": key, **(one if isinstance(one, dict) else {"caption": one})} for key, one in value.items()
        ]
    return None


def _transposed(columns: dict[str, Any], named: str) -> list[dict]:
    """Rows of columns: lists of equal length, or dicts with the same keys."""
    keys = list(columns[named]) if isinstance(columns[named], dict) else range(len(columns[named]))
    rows = []
    for key in keys:
        row = {}
        for name, column in columns.items():
            if isinstance(column, dict):
                row[name] = column.get(key)
            elif isinstance(column, list):
                row[name] = column[key] if isinstance(key, int) and key < len(column) else None
        rows.append(row)
    return rows


def _csv_rows(text: str, path: Path, delimiter: str) -> Iterator[dict]:
    csv.field_size_limit(1 << 30)  # captions of megabytes are rare, but no reason to stop
    stated = text[:6].lower().startswith("sep=") and text[5:6] in ("\n", "\r")  # as spreadsheets begin some files
    if stated:
        delimiter, text = text[4], text[5:].lstrip("\r\n")
    delimiter = delimiter or _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        header = [name.strip() for name in next((row for row in reader if any(map(str.strip, row))), [])]
        _check_header(header, path)
        for fields in reader:
            if not any(map(str.strip, fields)):
                continue
            if len(fields) < len(header) or any(map(str.strip, fields[len(header) :])):
                raise InputError(
                    f"{sanitise(path)}: line {reader.line_num} has "
                    f"{'more' if len(fields) > len(header) else 'fewer'} fields than the header; "
                    "quote commas"
                )
            yield {name: field for name, field in zip(header, fields) if name}  # an index column has no name
    except csv.Error as error:
        raise InputError(f"{sanitise(path)}: line {reader.line_num}: {error}") from None


def _delimiter(text: str) -> str:
    """The sign that parts the header into the most names, one of which names files where there is such a sign."""
    first = next((line for line in text.splitlines() if line.strip()), "")

    def parts(sign: str) -> list[str]:
        try:
            return [name.strip() for name in next(csv.reader([first], delimiter=sign, skipinitialspace=True), [])]
        except csv.Error:
            return []

    return max(DELIMITERS, key=lambda sign: (file_column(parts(sign)) is not None, len(parts(sign))))


def _check_header(header: list[str], path: Path) -> None:
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise InputError(f"{sanitise(path)}: two columns called {first_few(twice)}; give each a name of its own")
    if any(Path(name).suffix.lower() in EXTENSIONS for name in header):
        raise InputError(
            f"{sanitise(path)}: begins with a picture ({first_few(header)}); its first line must name the "
            "columns, as in file_name,caption"
        )

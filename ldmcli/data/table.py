"""A table of a data set: columns by name with what they hold, pictures still encoded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class TarEntry:
    """A file inside an uncompressed archive."""

    archive: Path
    offset: int
    length: int

    def read(self) -> bytes:
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


@dataclass
class Table:
    """Columns of equal length. `column_types` says of each what it holds: image, bytes, text (numbers among them),
    texts (lists of text), class, int, number, objects, mixed (text and what is none), empty or other; `classes` the
    names of class columns. Values of image columns are bytes, paths, archive entries or a datasets dict of bytes and
    path. `name(i)` is what people call row i."""

    length: int
    columns: dict[str, Sequence]
    column_types: dict[str, str]
    classes: dict[str, list[str]] = field(default_factory=dict)
    name: Callable[[int], str] = "row {}".format
    notes: list[str] = field(default_factory=list)

    def select(self, rows: Sequence[int]) -> "Table":
        """These rows alone, in lists: of the others nothing is kept."""
        columns: dict[str, Sequence] = {name: [cells[i] for i in rows] for name, cells in self.columns.items()}
        names = [self.name(i) for i in rows]
        return Table(len(rows), columns, self.column_types, self.classes, names.__getitem__, self.notes)


def joined(tables: Sequence[Table]) -> Table:
    """Tables one below the other; a column that one lacks is empty there."""
    types = {name: kind for table in reversed(tables) for name, kind in table.column_types.items()}
    columns = {name: [cell for t in tables for cell in t.columns.get(name, [None] * t.length)] for name in types}
    names = [table.name(i) for table in tables for i in range(table.length)]
    notes = list(dict.fromkeys(note for table in tables for note in table.notes))
    return Table(len(names), dict(columns), types, tables[0].classes, names.__getitem__, notes)


def typed_table(columns: Mapping[str, Sequence], names: list[str], notes: list[str]) -> Table:
    """A table of plain values, whose types are found by looking at them."""
    column_types = {key: _column_type(values) for key, values in columns.items()}
    return Table(len(names), dict(columns), column_types, {}, names.__getitem__, notes)


def _column_type(values: Sequence) -> str:
    known = [value for value in values if not is_missing(value)]
    if not known:
        return "empty"
    for column_type, fits in (
        ("image", lambda v: isinstance(v, (Path, TarEntry))),
        ("int", lambda v: isinstance(v, int) and not isinstance(v, bool)),
        ("number", _is_number),
        ("text", lambda v: isinstance(v, str) or _is_number(v)),
        ("texts", lambda v: isinstance(v, str) or _is_number(v) or isinstance(v, list) and all(map(_is_text, v))),
    ):
        if all(map(fits, known)):
            return column_type
    return "objects" if any(map(_has_boxes, known)) else "mixed" if any(map(_is_text, known)) else "other"


def is_missing(value: object) -> bool:
    """None, and NaN, as which pandas and JSON write what is not there."""
    return value is None or isinstance(value, float) and value != value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _has_boxes(value: object) -> bool:
    one = value[0] if isinstance(value, list) and value else value
    return isinstance(one, dict) and "bbox" in one

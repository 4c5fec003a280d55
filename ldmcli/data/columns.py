"""Which column of a table plays which role, and what its cells mean."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ldmcli.core.config import did_you_mean, suggestions
from ldmcli.core.errors import InputError
from ldmcli.core.settings import DataSettings
from ldmcli.data.decode import BadImage, shown
from ldmcli.data.folder import several
from ldmcli.data.rows import Columns, class_map
from ldmcli.data.tables import Table, TarEntry

ROLES = {  # role: usual column names in order of preference, kinds of column that fit
    "image": (("image", "img", "picture", "photo", "pixel_values", "jpg", "png", "webp"), ("image", "bytes")),
    "caption": (("caption", "text", "prompt", "captions", "description", "title", "sentence"), ("text", "texts")),
    "label": (("label", "labels", "class", "category", "target", "fine_label", "cls"), ("class", "int", "text")),
    "objects": (("objects", "annotations", "boxes"), ("objects",)),
    "map": (("map", "segmentation", "label_map", "segmentation_map", "seg", "annotation"), ("image", "bytes")),
}


def choose_columns(table: Table, settings: DataSettings) -> dict[str, str]:
    """Role → column: the one the user names, else a usual name of a fitting kind, else the only one of a kind that
    serves nothing else (pictures and named classes). Raises InputError naming the columns that there are."""
    chosen: dict[str, str] = {}
    for role, (names, kinds) in ROLES.items():
        named = getattr(settings, f"{role}_column")
        fitting = [c for c, kind in table.kinds.items() if kind in kinds and c not in chosen.values()]
        by_case = {column.lower(): column for column in fitting}
        if named:
            chosen[role] = _named(role, named, table)
        elif usual := next((by_case[name] for name in names if name in by_case), None):
            chosen[role] = usual
        elif role == "image" and fitting:
            chosen[role] = fitting[0]
        elif role == "label" and len(only := [c for c in fitting if table.kinds[c] == "class"]) == 1:
            chosen[role] = only[0]
    if "image" not in chosen:
        raise InputError(f"{shown(settings.source)}: no column of pictures; there are {_column_list(table)}; "
                         "name it with --image-column")
    return chosen


def _named(role: str, column: str, table: Table) -> str:
    option = f"--{role}-column {shown(column)}"
    if column not in table.kinds:
        near = did_you_mean(suggestions(column, list(table.kinds)))
        raise InputError(f"{option}: no such column; there are {_column_list(table)}{near}")
    if table.kinds[column] not in ROLES[role][1]:
        raise InputError(f"{option}: holds {table.kinds[column]}, which cannot be a {role}; "
                         f"there are {_column_list(table)}")
    return column


def _column_list(table: Table) -> str:
    return ", ".join(f"{shown(column, 40)} ({kind})" for column, kind in table.kinds.items())


def make_columns(table: Table, settings: DataSettings, label_names: list[str]) -> Columns:
    """Getters over a table's chosen columns. Raises InputError for labels outside `label_names`."""
    chosen = choose_columns(table, settings)
    if "map" in chosen and not settings.map_column and not _is_map(table, chosen["map"], settings):
        del chosen["map"]
    made = Columns(_getter(table, chosen["image"], encoded_bytes), table.name, chosen=chosen, notes=list(table.notes))
    if "caption" in chosen:
        made.caption = _getter(table, chosen["caption"], _caption, remember=True)
    if "label" in chosen:
        made.label, made.class_names = _labels(table, chosen["label"], label_names, settings), label_names
    if "objects" in chosen:
        made.category_names = _category_names(table, chosen["objects"])
        made.objects = _objects_getter(table, chosen["objects"], made.category_names)
    if "map" in chosen:
        made.map = _getter(table, chosen["map"], encoded_bytes)
    return made


IN_MEMORY = 2_000_000  # rows up to which text is held as a list


def _getter(table: Table, column: str, convert: Callable, *, remember: bool = False) -> Callable:
    values = table.columns[column]
    if remember and table.length <= IN_MEMORY:
        values = list(values)
    return lambda i: convert(values[i])


def _is_map(table: Table, column: str, settings: DataSettings) -> bool:
    """Whether the first picture of a column that is called like a map holds class indices."""
    try:
        class_map(encoded_bytes(table.columns[column][0]), table.name(0), settings.max_pixels)
    except (BadImage, OSError, IndexError):
        return False
    return True


def encoded_bytes(value) -> bytes:
    """The encoded picture behind a cell: bytes, a path, an archive entry, or a datasets dict of bytes and path."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else Path(value["path"]) if value.get("path") else b""
    if isinstance(value, Path):
        return value.read_bytes()
    if isinstance(value, TarEntry):
        return value.read()
    return b"" if value is None else bytes(value)


def _caption(value) -> str:
    """Text as it stands; of several captions the first that is not empty; "" for none."""
    if isinstance(value, (list, tuple)):
        return next((text for text in value if text), "")
    return "" if value is None else str(value)


def _objects_getter(table: Table, column: str, names: list[str]) -> Callable[[int], dict]:
    values, index = table.columns[column], {name: k for k, name in enumerate(names)}

    def objects(i: int) -> dict:
        boxes, categories = _pairs(values[i])
        try:
            bbox = np.asarray(boxes, np.float32).reshape(len(boxes), 4)
            category = np.array([index[c] if isinstance(c, str) else int(c) for c in categories], np.int64)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{shown(table.name(i))}: objects need four numbers a box and a known category "
                             f"each ({shown(error)})") from None
        if len(category) != len(bbox) or ((category < 0) | (category >= max(len(names), 1))).any():
            raise InputError(f"{shown(table.name(i))}: {len(bbox)} boxes with categories {shown(categories)}; "
                             f"there must be one a box, in 0 … {len(names) - 1}")
        return {"bbox": bbox, "category": category}

    return objects


def _pairs(value) -> tuple[list, list]:
    """Boxes and categories of a cell: a dict of two lists, a list of dicts, or nothing."""
    if not value:
        return [], []
    if isinstance(value, dict):
        return value["bbox"], value["category"]
    return [one["bbox"] for one in value], [one["category"] for one in value]


def _category_names(table: Table, column: str) -> list[str]:
    """As the data state them, else the texts found, else the numbers 0 … largest."""
    if column in table.classes:
        return table.classes[column]
    return _named_values({category for value in table.columns[column] for category in _pairs(value)[1]})


def _named_values(values: set) -> list[str]:
    if values and all(isinstance(value, int) for value in values):
        return [str(k) for k in range(max(values) + 1)]
    return _natural({str(value) for value in values})


def _natural(names) -> list[str]:
    """Names in order: by number when all are whole numbers, else as text."""
    numeric = all(name.lstrip("-").isdecimal() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numeric else None)


def label_names_of(tables: dict[str, Table], settings: DataSettings) -> list[str]:
    """Class names over all splits: those the data state, else the texts found, else the numbers 0 … largest."""
    values: set = set()
    for table in tables.values():
        column = choose_columns(table, settings).get("label")
        if column in table.classes:
            return table.classes[column]
        if column is not None:
            values |= {value for value in table.columns[column] if value is not None}
    return _named_values(values)


def _labels(table: Table, column: str, names: list[str], settings: DataSettings) -> np.ndarray:
    index = {name: k for k, name in enumerate(names)} if table.kinds[column] == "text" else None
    found = np.empty(table.length, np.int64)
    for i, value in enumerate(table.columns[column]):
        found[i] = -1 if value is None else index.get(str(value), -1) if index is not None else int(value)
    wrong = np.flatnonzero((found < 0) | (found >= len(names)))
    if len(wrong):
        rows = several(f"{table.name(int(i))}: {table.columns[column][int(i)]}" for i in wrong[:6])
        raise InputError(f"{shown(settings.source)}: {len(wrong)} labels in column {shown(column)} lie outside "
                         f"0 … {len(names) - 1} ({rows})")
    return found

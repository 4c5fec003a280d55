"""Which column of a table plays which role, and what its cells mean."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldmcli.core.config import did_you_mean, suggestions
from ldmcli.core.errors import InputError
from ldmcli.core.settings import DataSettings
from ldmcli.data.decode import BadImage, sanitise
from ldmcli.data.pictures import first_few
from ldmcli.data.rows import Columns, class_map
from ldmcli.data.table import Table, TarEntry, is_missing

ROLES = {  # role: usual column names in order of preference, column types that fit
    "image": (("image", "img", "picture", "photo", "pixel_values", "jpg", "png", "webp"), ("image", "bytes")),
    # odd cells are text or refused where captions are used: they never make another column the caption
    "caption": (
        ("caption", "text", "prompt", "captions", "description", "title", "sentence"),
        ("text", "texts", "mixed", "int", "number", "empty", "objects", "other"),
    ),
    "label": (
        ("label", "labels", "class", "category", "target", "fine_label", "cls"),
        ("class", "int", "number", "text", "texts", "mixed"),
    ),
    "objects": (("objects", "annotations", "boxes"), ("objects",)),
    "map": (("map", "segmentation", "label_map", "segmentation_map", "seg", "annotation"), ("image", "bytes")),
}


def choose_columns(table: Table, settings: DataSettings) -> dict[str, str]:
    """Role → column: the one the user names, else a usual name of a fitting type, else the only one of a type that
    serves nothing else (pictures and named classes). Raises InputError naming the columns that there are."""
    chosen: dict[str, str] = {}
    for role, (names, fitting_types) in ROLES.items():
        named = getattr(settings, f"{role}_column")
        fitting = [
            c
            for c, column_type in table.column_types.items()
            if column_type in fitting_types and c not in chosen.values()
        ]
        by_case = {column.lower().strip(): column for column in reversed(fitting)}
        if named:
            chosen[role] = _named(role, named, table)
        elif usual := next((by_case[name] for name in names if name in by_case), None):
            chosen[role] = usual
        elif role == "image" and fitting:
            chosen[role] = fitting[0]
        elif role == "label" and len(only := [c for c in fitting if table.column_types[c] == "class"]) == 1:
            chosen[role] = only[0]
    if "image" not in chosen:
        raise InputError(
            f"{sanitise(settings.source)}: no column of pictures; there are {_column_list(table)}; "
            "name it with --image-column"
        )
    return chosen


def _named(role: str, column: str, table: Table) -> str:
    option = f"--{role}-column {sanitise(column)}"
    if column not in table.column_types:
        near = did_you_mean(suggestions(column, list(table.column_types)))
        raise InputError(f"{option}: no such column; there are {_column_list(table)}{near}")
    if table.column_types[column] not in ROLES[role][1]:
        raise InputError(
            f"{option}: holds {table.column_types[column]}, which cannot be a {role}; there are {_column_list(table)}"
        )
    return column


def _column_list(table: Table) -> str:
    return ", ".join(f"{sanitise(column, 40)} ({column_type})" for column, column_type in table.column_types.items())


def make_columns(table: Table, settings: DataSettings, label_names: list[str]) -> Columns:
    """Getters over a table's chosen columns. What is wrong with a label, caption or box is said when it is used."""
    chosen = choose_columns(table, settings)
    if "map" in chosen and not settings.map_column and not _is_map(table, chosen["map"], settings):
        del chosen["map"]
    image, words = _getter(table, chosen["image"], encoded_bytes), _words_getter(table)
    made = Columns(image, table.name, chosen=chosen, notes=list(table.notes), cells=table.columns, words=words)
    if "caption" in chosen:
        made.caption = _captions(table, chosen["caption"], made.notes)
    if "label" in chosen:
        made.label, made.class_names = _labels(table, chosen["label"], label_names), label_names
        made.trouble = _label_trouble(table, chosen["label"], made.label, settings)
        made.notes += _near_names(label_names)
    if "objects" in chosen:
        made.category_names = lambda: _category_names(table, chosen["objects"])
        made.objects = _objects_getter(table, chosen["objects"], made)
    if "map" in chosen:
        made.map = _getter(table, chosen["map"], encoded_bytes)
    return made


IN_MEMORY = 2_000_000  # rows up to which text is held as a list


def _getter(table: Table, column: str, convert: Callable) -> Callable:
    values = table.columns[column]
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


def _captions(table: Table, column: str, notes: list[str]) -> Callable[[int], str]:
    """The caption of a row; `notes` takes how many are empty, or have several of which the first is taken."""
    values = table.columns[column]
    if table.length <= IN_MEMORY:
        values = list(values)
        empty = sum(is_missing(value) or not value or isinstance(value, str) and not value.strip() for value in values)
        several_texts = sum(isinstance(value, (list, tuple)) and len(value) > 1 for value in values)
        listed = table.length > 1  # rows of a stream come one by one
        notes += [f"{empty} of {table.length} captions in column {sanitise(column)} are empty"] * (listed and empty > 0)
        notes += [
            f"{several_texts} rows have several captions in column {sanitise(column)}; the first with words is taken"
        ] * (listed and several_texts > 0)

    def caption(i: int) -> str:
        text = _caption(values[i])
        if text is None:
            raise InputError(
                f"{sanitise(table.name(i))}: {sanitise(values[i], 60)} in column {sanitise(column)} is no caption; "
                "write text there, or name another column with --caption-column"
            )
        return text

    return caption


def _caption(value) -> str | None:
    """Text as it stands, numbers as text; of several captions the first that is not empty; "" for none; None for what
    cannot be one."""
    if isinstance(value, (list, tuple)):
        texts = [_caption(_inner_text(one)) for one in value]
        return None if None in texts else next((text for text in texts if text and text.strip()), "")
    if is_missing(value):
        return ""
    return _encodable(str(value)) if isinstance(value, (str, int, float)) else None


def _words_getter(table: Table) -> Callable[[str, int], list[str]]:
    """The texts of a column in a row."""
    held: dict[str, Sequence] = {}  # cells of a table on disk take longer to find than to read

    def words(column: str, i: int) -> list[str]:
        if column not in held:
            small = table.length <= IN_MEMORY and table.column_types[column] not in ("image", "bytes")
            held[column] = list(table.columns[column]) if small else table.columns[column]
        return _words(table, column, i, held[column][i])

    return words


def _words(table: Table, column: str, i: int, value: Any) -> list[str]:
    """The texts in a cell that say something: of a class its name. Raises InputError for what is no text."""
    if table.column_types[column] == "class":
        names = table.classes.get(column, [])
        return [names[value]] if isinstance(value, int) and 0 <= value < len(names) else []
    texts = [_caption(_inner_text(one)) for one in (value if isinstance(value, (list, tuple)) else [value])]
    known = [text.strip() for text in texts if text is not None]
    if len(known) < len(texts):
        raise InputError(
            f"{sanitise(table.name(i))}: {sanitise(value, 60)} in column {sanitise(column)} is no text; "
            "leave that column out of data.captions"
        )
    return [text for text in known if text]


def _encodable(text: str) -> str:
    """The text with question marks for halves of characters, which JSON can hold and no file."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _inner_text(value):
    """The text of a caption that is an object of its own, as in annotations of COCO or Flickr."""
    keys = ("caption", "raw", "text", "sentence")
    return next((value[key] for key in keys if key in value), value) if isinstance(value, dict) else value


# --- boxes ------------------------------------------------------------------------------------------------------------

CATEGORY_KEYS = ("category", "categories", "category_name", "label", "labels", "class", "name", "category_id")


def _objects_getter(table: Table, column: str, columns: Columns) -> Callable[[int], dict]:
    values = table.columns[column]
    index: dict[str | None, int] = {}

    def objects(i: int) -> dict:
        if not index:
            index.update({name: k for k, name in enumerate(columns.known_categories())})
        boxes, categories = _pairs(table, column, i, values[i])
        names = _category_texts(table, column, i, categories)
        try:
            bbox = np.asarray(boxes, np.float32).reshape(len(boxes), 4)
        except (ValueError, TypeError):
            bbox = np.full((1, 4), np.nan)
        if not np.isfinite(bbox).all():
            raise _box_error(table, column, i, "bbox", boxes, "four numbers a box")
        return {"bbox": bbox, "category": np.array([index[name] for name in names], np.int64)}

    return objects


def _pairs(table: Table, column: str, i: int, value) -> tuple[list, list]:
    """Boxes and categories of a cell: a dict of two lists, one object, a list of objects, or nothing."""
    if is_missing(value) or not value:
        return [], []
    if isinstance(value, dict):
        boxes: Any = value.get("bbox")
        categories: Any = _category(value)
        if _is_numbers(boxes):
            boxes, categories = [boxes], [categories]
        for key, found in (("bbox", boxes), ("category", categories)):
            if not isinstance(found, (list, tuple)):
                raise _box_error(table, column, i, key, found, "a list, one entry a box")
    else:
        if not isinstance(value, (list, tuple)) or not all(isinstance(one, dict) for one in value):
            raise _box_error(table, column, i, "bbox", value, "objects with bbox and category")
        boxes, categories = [one.get("bbox") for one in value], [_category(one) for one in value]
    if len(boxes) != len(categories):
        raise _box_error(table, column, i, "category", categories, f"one a box, of which there are {len(boxes)}")
    return list(boxes), list(categories)


def _category(value: dict):
    return next((value[key] for key in CATEGORY_KEYS if not is_missing(value.get(key))), None)


def _is_numbers(value) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(isinstance(one, (int, float)) for one in value)


def _category_texts(table: Table, column: str, i: int, categories: list) -> list[str]:
    """Names of categories: a number is a name too, or the place of one where the data name their categories."""
    stated, found = table.classes.get(column), []
    for value in categories:
        name = _category(value) if isinstance(value, dict) else value
        text = _encodable(str(name).strip()) if isinstance(name, (str, int)) and not isinstance(name, bool) else ""
        if stated is not None and isinstance(name, int):
            text = stated[name] if 0 <= name < len(stated) else ""
        if not text or text == "-1" or stated is not None and text not in stated:
            raise _box_error(table, column, i, "category", categories, "the name or number of a category for each box")
        found.append(text)
    return found


def _box_error(table: Table, column: str, i: int, key: str, value, wanted: str) -> InputError:
    found = f"{sanitise(table.name(i))}: {key} in column {sanitise(column)} is {sanitise(value, 60)}"
    return InputError(f"{found}; it must be {wanted}")


def _category_names(table: Table, column: str) -> list[str]:
    """As the data state them, else the names and numbers found."""
    if column in table.classes:
        return table.classes[column]
    return natural(
        {
            name
            for i, value in enumerate(table.columns[column])
            for name in _category_texts(table, column, i, _pairs(table, column, i, value)[1])
        }
    )


# --- classes ----------------------------------------------------------------------------------------------------------


def natural(names) -> list[str]:
    """Names in order: by number when all are whole numbers, else as text."""
    numeric = all(name.lstrip("-").isdecimal() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numeric else None)


def label_names_of(tables: dict[str, Table], settings: DataSettings) -> list[str]:
    """Class names over all splits: those the data state, else the texts and numbers found. What marks a row without a
    label (nothing, -1) is none."""
    values: set[str] = set()
    for table in tables.values():
        column = choose_columns(table, settings).get("label")
        if column in table.classes:
            return table.classes[column]
        if column is not None:
            values |= {name for value in table.columns[column] if (name := _label_name(value)) is not None}
    return natural(values)


def _label_name(value) -> str | None:
    """The class that a cell names; None for what is no class: nothing, -1 in whatever form, and nested values."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if is_missing(value) or not isinstance(value, (str, int, float)):
        return None
    name = _encodable(str(value).strip())
    return None if not name or name == "-1" or name.startswith("-") and name[1:].isdecimal() else name


def _labels(table: Table, column: str, names: list[str]) -> np.ndarray:
    """int64 (rows,): indices into `names`; -1 where a row has no class among them."""
    if table.column_types[column] == "class":
        known = (-1 if value is None or not 0 <= value < len(names) else int(value) for value in table.columns[column])
    else:
        index: dict[str | None, int] = {name: k for k, name in enumerate(names)}
        known = (index.get(_label_name(value), -1) for value in table.columns[column])
    return np.fromiter(known, np.int64, table.length)


def _label_trouble(table: Table, column: str, labels: np.ndarray, settings: DataSettings) -> str:
    """What is said where classes are used and some rows have none; "" where all have."""
    wrong = np.flatnonzero(labels < 0)
    if not len(wrong):
        return ""
    rows = first_few(f"{table.name(int(i))}: {table.columns[column][int(i)]!r}" for i in wrong[:6])
    more = f", {len(wrong)} in all" if len(wrong) > 6 else ""
    return (
        f"{sanitise(settings.source)}: {len(wrong)} labels in column {sanitise(column)} name no class ({rows}{more}); "
        "label those rows, or take them out"
    )


def _near_names(names: list[str]) -> list[str]:
    """Notes on classes that differ in capitals or blanks alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(" ".join(name.lower().split()), []).append(name)
    near = [" and ".join(group) for group in groups.values() if len(group) > 1]
    return [f"classes that differ in capitals or blanks alone: {first_few(near)}"] * bool(near)

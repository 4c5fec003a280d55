"""Annotation files of COCO's kind beside pictures: boxes with categories, captions.

One JSON object with lists `images` (id, file_name), `annotations` (image_id; bbox and category_id, or caption) and
`categories` (id, name). Ids are ids: categories take their names from the file, whatever their numbers.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldmcli.core.errors import InputError
from ldmcli.data.metadata import read_text
from ldmcli.data.pictures import Found

MOST_BYTES = 1 << 28
MOST_FILES = 64  # more belong to single pictures, and to another program


@dataclass
class Annotations:
    """What annotation files say of pictures; `files` are those that were read, `large` those that were too large."""

    values: dict[Path, dict[str, list]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    large: list[Path] = field(default_factory=list)


def read_annotations(found: Found, tables: Sequence[Path], split_of) -> Annotations:
    """Annotations of the pictures of a folder, from those of `tables` that are annotation files. `split_of` gives the
    split that a word names."""
    result = Annotations()
    by_name: dict[str, list[Path]] = {}
    for path in found.pictures:
        by_name.setdefault(path.name, []).append(path)
    for table in tables if len(tables) <= MOST_FILES else ():
        if table.stat().st_size > MOST_BYTES:
            result.large.append(table)
        elif (document := _document(table)) is not None:
            result.files.append(table)
            _take(result.values, document, table, by_name, split_of)
    return result


def _document(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError, InputError):
        return None
    fits = isinstance(value, dict) and all(
        isinstance(value.get(key), list) and all(isinstance(one, dict) for one in value[key])
        for key in ("images", "annotations")
    )
    return value if fits and all("file_name" in one and "id" in one for one in value["images"]) else None


def _take(
    values: dict[Path, dict[str, list]], document: dict[str, Any], table: Path, by_name: dict[str, list[Path]], split_of
) -> None:
    categories = [one for one in document.get("categories") or () if isinstance(one, dict)]
    names = {one.get("id"): str(one.get("name", one.get("id"))) for one in categories}
    pictures = {
        one["id"]: picture
        for one in document["images"]
        if (picture := _picture(str(one["file_name"]), table, by_name, split_of)) is not None
    }
    boxed = any("bbox" in one for one in document["annotations"])
    for picture in pictures.values():
        values.setdefault(picture, {}).setdefault("objects" if boxed else "caption", [])
    for one in document["annotations"]:
        own = values.get(pictures.get(one.get("image_id"), table), {})
        if "bbox" in one and "objects" in own:
            category = one.get("category_id")
            own["objects"].append({"bbox": one["bbox"], "category": names.get(category, category)})
        elif isinstance(one.get("caption"), str):
            own.setdefault("caption", []).append(one["caption"].strip())


def _picture(name: str, table: Path, by_name: dict[str, list[Path]], split_of) -> Path | None:
    """The picture that an entry names: by the end of its path, then by the folder or the split of the file."""
    fitting = [path for path in by_name.get(name.rpartition("/")[2], ()) if path.as_posix().endswith(f"/{name}")]
    splits = {split_of(word) for word in re.split(r"[_.]", table.stem)} - {None}
    for near in (
        lambda path: table.parent in path.parents,
        lambda path: any(split_of(part) in splits for part in path.parts[:-1]),
    ):
        fitting = [path for path in fitting if near(path)] or fitting
    return fitting[0] if len(fitting) == 1 else None

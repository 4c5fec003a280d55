"""Masks of one's own for the measure of inpainting: a folder of pictures, by the images' names or in their order."""

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldmcli.conditions.masked import hole_in
from ldmcli.core.errors import InputError
from ldmcli.data.crops import crop_map

SUFFIXES = (".png", ".bmp", ".webp", ".tif", ".tiff", ".jpg", ".jpeg")
ENDINGS = ("", "_mask", "_mask000", "-mask")  # behind an image's name; LaMa's own files have the third
MIDDLE = (0.5, 0.5)


def folder_masks(folder: Path, rows: Any, ids: Sequence[int], size: tuple[int, int]) -> Callable[[int], np.ndarray]:
    """A function of a row's number: bool `size`, True = hole (white in the file), cut as the row's picture is.

    Masks are taken by name where all of `ids` have one of theirs, otherwise mask k is that of ids[k], in order of their
    names. Raises InputError for no folder, fewer masks than images, and masks of some of the names alone.
    """
    if not folder.is_dir():
        raise InputError(f"--masks {folder}: no such folder of masks")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    by_name = {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
    by_stem = {path.stem: path for path in files}
    found: dict[int, Path] = {}
    for i in ids:
        name = PurePosixPath(rows.name(i)).with_suffix("")
        names = [f"{one}{ending}" for one in (name.as_posix(), name.name) for ending in ENDINGS]
        path = next((place[one] for one in names for place in (by_name, by_stem) if one in place), None)
        if path is not None:
            found[i] = path
    lonely = [i for i in ids if i not in found]
    if found and lonely:
        raise InputError(f"--masks {folder}: none for {rows.name(lonely[0])} ({len(lonely)} of {len(ids)} have none)")
    if not found:
        if len(files) < len(ids):
            raise InputError(f"--masks {folder}: {len(files)} masks for {len(ids)} images, none by an image's name")
        found = dict(zip(ids, files))

    def mask(i: int) -> np.ndarray:
        hole = hole_in(found[i], str(found[i]))
        return crop_map(hole.astype(np.uint8), size, MIDDLE).astype(bool)

    return mask

"""Contact sheets: rows of equally sized pictures on one sheet."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldmcli.core import files
from ldmcli.core.outputs import MARK

GAP = 2


def grid(rows: Sequence[Sequence[np.ndarray]], enlarge_to: int = 0) -> np.ndarray:
    """uint8 sheet of rows of uint8 HWC pictures of one size, with white gaps; enlarged by whole factors to reach
    `enlarge_to` px of width where that is not 0."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            top, left = GAP + y * (height + GAP), GAP + x * (width + GAP)
            sheet[top : top + height, left : left + width] = picture
    factor = max(1, enlarge_to // sheet.shape[1])
    return sheet.repeat(factor, axis=0).repeat(factor, axis=1)


def in_rows(pictures: Sequence[np.ndarray], columns: int = 8) -> list[list[np.ndarray]]:
    """Pictures in reading order, `columns` a row."""
    return [list(pictures[i : i + columns]) for i in range(0, len(pictures), columns)]


def png_bytes(picture: np.ndarray) -> bytes:
    """A picture as PNG, marked as written by `ldm` (`core.outputs`)."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    buffer, info = io.BytesIO(), PngInfo()
    info.add_text(*MARK)
    Image.fromarray(picture).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def save_grid(path: Path, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """Writes a sheet as PNG, whole or not at all."""
    files.write_bytes(path, png_bytes(grid(rows)))

"""Conditions as pictures: boxes with names, class maps in colours, small and holed images, a legend."""

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np

HOLE = (160, 160, 160)


def colour(k: int) -> tuple[int, int, int]:
    """The colour of class k: hues a golden angle apart, so that neighbours differ; class 0 is dark."""
    if k == 0:
        return 45, 45, 55
    red, green, blue = colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.45 + 0.25 * (k % 3), 0.95 - 0.2 * (k // 3 % 3))
    return round(255 * red), round(255 * green), round(255 * blue)


def coloured(index: np.ndarray) -> np.ndarray:
    """Class map (H, W) -> uint8 (H, W, 3)."""
    return np.array([colour(k) for k in range(256)], np.uint8)[np.asarray(index, np.uint8)]


def box_pixels(bbox: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Box x, y, w, h as shares -> first and last pixel covered (x0, y0, x1, y1) in a picture of (height, width)."""
    height, width = size
    x0, y0 = (int(round(share * side)) for share, side in zip(bbox[:2], (width, height)))
    x1, y1 = (int(round((a + b) * side)) - 1 for a, b, side in zip(bbox[:2], bbox[2:], (width, height)))
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return x0, y0, min(max(x1, x0), width - 1), min(max(y1, y0), height - 1)


def boxed(picture: np.ndarray, layout: dict[str, Any], names: Sequence[str]) -> np.ndarray:
    """A copy of a uint8 picture (H, W, 3) with the boxes of a layout (shares) outlined and named; larger ones first."""
    from PIL import Image, ImageDraw

    sheet = Image.fromarray(np.ascontiguousarray(picture))
    draw = ImageDraw.Draw(sheet)
    bbox = np.asarray(layout["bbox"], np.float64).reshape(-1, 4)
    line = max(1, min(picture.shape[:2]) // 160)
    for k in np.argsort(-bbox[:, 2] * bbox[:, 3], kind="stable"):
        category = int(layout["category"][k])
        x0, y0, x1, y1 = box_pixels(bbox[k], picture.shape[:2])
        draw.rectangle((x0, y0, x1, y1), outline=colour(category + 1), width=line)
        text = names[category]
        where = (x0 + line + 1, y0 + line)
        if draw.textlength(text) <= x1 - x0 - line and y1 - y0 > 11:
            draw.rectangle((where[0], where[1] + 1, where[0] + draw.textlength(text), where[1] + 11), fill="white")
            draw.text(where, text, fill=tuple(part * 2 // 3 for part in colour(category + 1)))
    return np.asarray(sheet)


def enlarged(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (h, w, 3) at `size` (height, width), pixels repeated."""
    rows = np.arange(size[0]) * picture.shape[0] // size[0]
    columns = np.arange(size[1]) * picture.shape[1] // size[1]
    return picture[rows][:, columns]


def holed(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """A picture whose hole (H, W) is grey."""
    return np.where(hole[..., None], np.array(HOLE, np.uint8), picture)


def labelled(picture: np.ndarray, text: str) -> np.ndarray:
    """A picture below a line with its name, cut to its width."""
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", (picture.shape[1], picture.shape[0] + 13), "white")
    ImageDraw.Draw(sheet).text((1, 0), text, fill="black")
    sheet.paste(Image.fromarray(np.ascontiguousarray(picture)), (0, 13))
    return np.asarray(sheet)


def with_legend(picture: np.ndarray, classes: Sequence[tuple[int, str]]) -> np.ndarray:
    """A picture with the colours and names of classes (number, name) below it."""
    from PIL import Image, ImageDraw

    line, height, width = 14, *picture.shape[:2]
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    cells = [int(probe.textlength(f"{k} {name}")) + 26 for k, name in classes]
    width = max(width, *cells) if cells else width
    places, x, y = [], 4, height + 3
    for cell in cells:
        if x + cell > width and x > 4:
            x, y = 4, y + line
        places.append((x, y))
        x += cell
    sheet = Image.new("RGB", (width, (y + line) if cells else height), "white")
    sheet.paste(Image.fromarray(np.ascontiguousarray(picture)), (0, 0))
    draw = ImageDraw.Draw(sheet)
    for (x, y), (k, name) in zip(places, classes):
        draw.rectangle((x, y + 1, x + 9, y + 10), fill=colour(k), outline="black")
        draw.text((x + 13, y), f"{k} {name}", fill="black")
    return np.asarray(sheet)

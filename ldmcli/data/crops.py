"""Class maps and boxes cut as `decode.to_size` cuts the picture that they belong to.

u: where the crop lies, as shares (0 … 1) of the room that it has down and across, and then the zoom where it has one.
"""

from collections.abc import Sequence

import numpy as np

from ldmcli.data.decode import scaled_size


def crop_corner(scaled: Sequence[int], size: tuple[int, int], u: Sequence[float]) -> tuple[int, int]:
    """Row and column where a crop of `size` begins in a picture that was resized to `scaled`, (height, width) each."""
    top, left = (int(s * (a - b) + 0.5) for s, a, b in zip(u, scaled, size))
    return top, left


def crop_map(whole: np.ndarray, size: tuple[int, int], u: Sequence[float]) -> np.ndarray:
    """A class map, uint8 (H, W), cut to `size` = (h, w): classes are picked, never mixed."""
    height, width = scaled_size(whole.shape, size, *u[2:])
    top, left = crop_corner((height, width), size, u)
    rows = ((np.arange(size[0]) + top + 0.5) * whole.shape[0] / height).astype(int)
    columns = ((np.arange(size[1]) + left + 0.5) * whole.shape[1] / width).astype(int)
    return whole[rows][:, columns]


def crop_boxes(
    found: dict, shape: tuple[int, int], size: tuple[int, int], u: Sequence[float], *, shares: bool
) -> dict[str, np.ndarray]:
    """Boxes of a picture of `shape` = (H, W) in its crop of `size` = (h, w); those that lie outside are dropped.

    found: "bbox" (n, 4) x, y, w, h in pixels of the picture, or with `shares` as shares of it; "category" (n,).
    Result: "bbox" clipped, as shares of the crop; "whole", as shares of the picture; "category"; and "crop" (4,), x, y,
    w, h of the crop as shares of the picture.
    """
    height, width = scaled_size(shape, size, *u[2:])
    top, left = crop_corner((height, width), size, u)
    whole = (shape[1], shape[0]) * 2 if shares else (1, 1, 1, 1)
    x, y, w, h = found["bbox"].reshape(-1, 4).T * np.array(whole, np.float32)[:, None]
    edges = [(x * width / shape[1] - left) / size[1], (y * height / shape[0] - top) / size[0]]
    edges += [edges[0] + w * width / shape[1] / size[1], edges[1] + h * height / shape[0] / size[0]]
    x0, y0, x1, y1 = np.clip(edges, 0, 1)
    inside = (x1 > x0) & (y1 > y0)
    bbox = np.stack([x0, y0, x1 - x0, y1 - y0], axis=1).astype(np.float32)
    of_whole = np.stack([x, y, w, h], axis=1) / np.array([shape[1], shape[0]] * 2, np.float32)
    frame = np.array([left / width, top / height, size[1] / width, size[0] / height])
    return {"bbox": bbox[inside], "category": found["category"][inside], "whole": of_whole[inside], "crop": frame}

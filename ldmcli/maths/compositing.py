"""What is done to sampled pictures so that they agree with those they were made from (Sec. 4.4, 4.5): arrays in, arrays
out. A hole is True in a bool array (H, W)."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from ldmcli.maths.smooth_inpainting import push_pull_fill

SURE = 0.05  # share of known pixels around one, above which the difference there counts


def fill_smoothly(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) with holes filled by averages of what is known around them, coarser further inside.

    Known pixels stay. An image without any is returned as it is.
    """
    if hole.all() or not hole.any():
        return image
    return np.where(hole[..., None], _spread(image, hole).round().clip(0, 255).astype(np.uint8), image)


def _spread(values: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """`push_pull_fill` of float (H, W, 3)."""
    planes = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None]
    return push_pull_fill(planes, torch.from_numpy(unknown)[None])[0].permute(1, 2, 0).numpy()


def composite(image: np.ndarray, sampled: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """(1 - hole) image + hole sampled, (H, W, 3) in any range: what is known stays as it is to the last bit."""
    return np.where(hole[..., None], sampled, image)


def match_border(image: np.ndarray, sampled: np.ndarray, hole: np.ndarray, reach: int) -> np.ndarray:
    """`sampled` (H, W, 3) float, shifted inside the hole so that it meets `image` at the rim.

    What `sampled` and `image` differ by on known pixels, smoothed over about `reach` of them, is carried on into the
    hole: colours meet without a step, a drift in brightness goes, and the sampled texture stays sharp. The hole's old
    content is not looked at. 0: unchanged.
    """
    if reach <= 0 or hole.all() or not hole.any():
        return sampled
    known, sigma = (~hole).astype(np.float32), reach / 2
    weight = ndimage.gaussian_filter(known, sigma)
    offset = (image.astype(np.float32) - sampled) * known[..., None]
    offset = ndimage.gaussian_filter(offset, (sigma, sigma, 0)) / np.maximum(weight, 1e-6)[..., None]
    return np.where(hole[..., None], sampled + _spread(offset, weight < SURE), sampled)


def match_low_frequencies(sampled: np.ndarray, low: np.ndarray, sigma: float) -> np.ndarray:
    """uint8 (n, H, W, 3) whose low frequencies are those of the small pictures `low` (n, h, w, 3) that they enlarge.

    What blocks of H / h pixels differ by from the small picture, smoothed (Gaussian of `sigma` small pixels), is taken
    off: samplers drift in brightness and colour, which are known, while finer differences are what the model adds or
    removes. 0: unchanged.
    """
    if sigma <= 0:
        return sampled
    (height, width), scale = low.shape[1:3], sampled.shape[1] // low.shape[1]
    out = np.empty_like(sampled)
    for made, small, result in zip(sampled, low, out):
        blocks = made.reshape(height, scale, width, scale, 3).mean(axis=(1, 3), dtype=np.float32)
        shift = ndimage.gaussian_filter(small - blocks, (sigma, sigma, 0), mode="nearest")
        planes = torch.from_numpy(shift).permute(2, 0, 1)[None]
        planes = F.interpolate(planes, size=made.shape[:2], mode="bilinear", align_corners=False)
        result[:] = (made + planes[0].permute(1, 2, 0).numpy()).round().clip(0, 255)
    return out


def hole_windows(
    hole: np.ndarray, side: tuple[int, int], margin: tuple[int, int], unit: int
) -> list[tuple[slice, slice]]:
    """Rectangles (rows, columns) of the picture that hold all of its holes with surroundings: what is sampled anew.

    A hole gets `margin` on each side, at least `side` in all, moved into the picture and cut off at its edges; holes
    whose rectangles meet share one. Sides are multiples of `unit` unless the picture is smaller.
    """
    coarse = np.pad(hole, [(0, -length % unit) for length in hole.shape])
    rows, columns = (length // unit for length in coarse.shape)
    blocks = coarse.reshape(rows, unit, columns, unit).any(axis=(1, 3))
    labels, _ = ndimage.label(blocks, np.ones((3, 3)))
    boxes = [
        [(part.start * unit, min(part.stop * unit, length)) for part, length in zip(found, hole.shape)]
        for found in ndimage.find_objects(labels)
    ]

    def around(box: list[tuple[int, int]]) -> list[tuple[int, int]]:
        out = []
        for (start, stop), least, more, length in zip(box, side, margin, hole.shape):
            wanted = min(-(-max(least, stop - start + 2 * more) // unit) * unit, length)
            first = min(max((start + stop - wanted) // 2, 0), length - wanted)
            out.append((first, first + wanted))
        return out

    def meet(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> bool:
        return all(x[0] < y[1] and y[0] < x[1] for x, y in zip(a, b))

    merged: list[list[tuple[int, int]]] = []
    for box in boxes:
        while found := next((one for one in merged if meet(around(one), around(box))), None):
            merged.remove(found)
            box = [(min(x[0], y[0]), max(x[1], y[1])) for x, y in zip(found, box)]
        merged.append(box)
    return [(slice(*rows), slice(*columns)) for rows, columns in map(around, merged)]

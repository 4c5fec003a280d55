"""Rows of features as metrics read them: checked, kept in their own type, converted to float64 block by block.

Ten thousand rows of 2,048 numbers are 80 MB in float32; no metric makes a float64 copy of them all.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ldmcli.core.errors import InputError

Array = np.ndarray

BLOCK = 2**22  # numbers in a block of distances: 32 MiB
TILE = 1024  # rows that are converted at once


def numbers(value: Any, name: str, dtype: Any = np.float64) -> Array:
    """An array of a list, an array, a picture, or a tensor of any device and type; InputError for what is none.

    dtype: None = as it is.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    try:
        return np.asarray(value, dtype=dtype)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name}: {type(value).__name__} that is no array of numbers") from None


def rows_of(features: ArrayLike, name: str) -> Array:
    """(N, D) finite numbers, from a list, an array (also a memory-mapped one) or a tensor: float32 as it is, everything
    else as float64. Raises InputError for other shapes, NaN and Inf."""
    kept = isinstance(features, np.ndarray) and features.dtype in (np.float32, np.float64)
    rows = numbers(features, f"{name} features", None if kept else np.float64)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise InputError(f"{name} features have shape {rows.shape}: need (N, D), a row for each image")
    bad = sum(int((~np.isfinite(rows[part])).any(axis=1).sum()) for part in tiles(len(rows)))
    if bad:
        raise InputError(f"{name} features: NaN or Inf in {bad} of {len(rows)} rows")
    return rows


def pair_of(generated: ArrayLike, reference: ArrayLike) -> tuple[Array, Array]:
    """Both sets as `rows_of` gives them; InputError where their dimensions differ."""
    a, b = rows_of(generated, "generated"), rows_of(reference, "reference")
    if a.shape[1] != b.shape[1]:
        raise InputError(f"generated features have {a.shape[1]} dimensions, reference features {b.shape[1]}")
    return a, b


def need_two(n: int, name: str) -> None:
    """InputError for a set of fewer than two rows."""
    if n < 2:
        raise InputError(f"{name} has {n} image{'' if n == 1 else 's'}: a covariance needs at least 2")


def tiles(n: int) -> list[slice]:
    """Parts of n rows, of `TILE` each."""
    return [slice(start, min(start + TILE, n)) for start in range(0, n, TILE)]


def blocks(n: int, width: int) -> list[slice]:
    """Parts of n rows of `width` numbers each, `BLOCK` numbers a part or one row."""
    rows = max(1, BLOCK // max(1, width))
    return [slice(start, start + rows) for start in range(0, n, rows)]


def mean_of(rows: Array) -> Array:
    """(D,) float64."""
    return np.asarray(np.mean(rows, axis=0, dtype=np.float64))


def squared_distances(a: Array, b: Array) -> Array:
    """(len(a), len(b)) of float64 rows. From ‖a‖² + ‖b‖² − 2 a·b, and where that cancels, from the difference: equal
    rows give 0."""
    norms = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None]
    squared = norms - 2 * (a @ b.T)
    i, j = np.nonzero(squared < 1e-9 * norms)
    for start in range(0, len(i), 4096):
        part = slice(start, start + 4096)
        squared[i[part], j[part]] = ((a[i[part]] - b[j[part]]) ** 2).sum(axis=1)
    return squared


def distances_to_all(points: Array, rows: Array, centre: Array) -> Array:
    """(len(points), len(rows)) squared distances of a few points to all rows, which are converted tile by tile.

    centre: (D,), taken from both first: distances stay, cancellation in them goes.
    """
    near = points.astype(np.float64) - centre
    out = np.empty((len(points), len(rows)))
    for part in tiles(len(rows)):
        out[:, part] = squared_distances(near, rows[part].astype(np.float64) - centre)
    return out

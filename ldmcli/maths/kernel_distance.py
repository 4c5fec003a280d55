"""Kernel Inception Distance: the unbiased MMD² with the kernel (x·y/D + 1)³, in float64, over random subsets."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ldmcli.core.errors import InputError, UsageError
from ldmcli.maths.feature_rows import Array, blocks, pair_of, tiles


def kid(
    generated: ArrayLike, reference: ArrayLike, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Kernel Inception Distance (Bińkowski et al. 2018): mean and population deviation over random subsets of the
    unbiased MMD², which may be negative. generated, reference: (N, D) each.

    Kernel (x·y/D + 1)³; a subset of generated, then one of the reference rows, without replacement, from
    RandomState(seed): the subsets of torch-fidelity. InputError when a set is smaller than a subset.
    """
    a, b = pair_of(generated, reference)
    if subsets < 1 or subset_size < 2:
        raise UsageError(f"KID of {subsets} subsets of {subset_size}: need at least 1 of 2")
    if min(len(a), len(b)) < subset_size:
        raise InputError(
            f"KID takes subsets of {subset_size}, but there are {len(a)} generated and {len(b)} reference images; "
            f"choose a subset size of at most {min(len(a), len(b))}"
        )
    rng = np.random.RandomState(seed)
    drawn = [
        tuple(rng.choice(len(rows), subset_size, replace=False) for rows in (a, b))
        for _ in range(1 if len(a) == len(b) == subset_size else subsets)  # the whole sets are one subset
    ]
    products = len(a) ** 2 + len(b) ** 2 + len(a) * len(b)
    if products <= 3 * len(drawn) * subset_size**2:
        values = _of_one_pass(a, b, drawn)
    else:
        values = np.array([_of_one_pass(a[x], b[y], [(np.arange(subset_size),) * 2])[0] for x, y in drawn])
    return float(values.mean()), float(values.std())


def _of_one_pass(a: Array, b: Array, drawn: list) -> Array:
    """MMD² of each of the subsets, (ids into a, ids into b), from one pass over all pairs of rows."""
    size = len(drawn[0][0])
    x, y = np.zeros((len(a), len(drawn))), np.zeros((len(b), len(drawn)))
    for k, (first, second) in enumerate(drawn):
        x[first, k] = y[second, k] = 1
    within = size * (size - 1)
    return (_sums(a, a, x, x) + _sums(b, b, y, y)) / within - 2 * _sums(a, b, x, y) / size**2


def _sums(a: Array, b: Array, x: Array, y: Array) -> Array:
    """Sums of the kernel over the pairs that each column of x and y marks; of one set without the diagonal."""
    total = np.zeros(x.shape[1])
    for part in blocks(len(a), len(b)):
        total += (x[part] * (kernel_to_all(a[part], b, part.start if a is b else None) @ y)).sum(axis=0)
    return total


def kernel_to_all(points: Array, rows: Array, diagonal: int | None = None) -> Array:
    """(len(points), len(rows)) of the kernel, with rows converted tile by tile. diagonal: the points are the rows from
    this one on, and a row with itself gives 0."""
    near, out = points.astype(np.float64), np.empty((len(points), len(rows)))
    for part in tiles(len(rows)):
        out[:, part] = (near @ rows[part].astype(np.float64).T / rows.shape[1] + 1) ** 3
    if diagonal is not None:
        k = np.arange(len(points))
        out[k, diagonal + k] = 0
    return out


@dataclass(frozen=True)
class KernelErrors:
    """Squared standard errors of the MMD² of all rows: what each side adds. Both are at least 0."""

    generated: float
    reference: float


def mmd_errors(generated: Array, reference: Array) -> KernelErrors:
    """Variance of the unbiased MMD² of two sets, (N, D) each with N ≥ 3: jackknife variance of the U-statistic, less
    what it counts twice of the second-order term (Efron and Stein 1981), which is all there is between equal
    distributions."""
    n, m = len(generated), len(reference)
    xx, xx_squares = _row_sums(generated, generated)[::2]
    yy, yy_squares = _row_sums(reference, reference)[::2]
    xy, yx, xy_squares = _row_sums(generated, reference)
    cross = _second_order(xy / m, xy_squares / (n * m), yx / n) / (n * m)
    out = []
    for size, other, own, across, squares in ((n, m, xx, xy, xx_squares), (m, n, yy, yx, yy_squares)):
        left_out = (own.sum() - 2 * own) / ((size - 1) * (size - 2))
        left_out = left_out - 2 * (across.sum() - across) / ((size - 1) * other)
        jackknife = (size - 1) * float(left_out.var())
        rows = own / (size - 1)
        second = _second_order(rows, squares / (size * (size - 1)), rows) / size**2
        twice = 2 * (second + cross)
        out.append(max(jackknife - twice, twice))
    return KernelErrors(*out)


def _row_sums(a: Array, b: Array) -> tuple[Array, Array, float]:
    """Sums of the kernel by row and by column, and the sum of its squares."""
    rows, columns, squares = np.zeros(len(a)), np.zeros(len(b)), 0.0
    for part in blocks(len(a), len(b)):
        k = kernel_to_all(a[part], b, part.start if a is b else None)
        rows[part] = k.sum(axis=1)
        columns += k.sum(axis=0)
        squares += float((k**2).sum())
    return rows, columns, squares


def _second_order(rows: Array, mean_square: float, columns: Array) -> float:
    """Mean square of a kernel whose row and column means were taken away, at least 0."""
    return max(0.0, mean_square - float((rows**2).mean()) - float((columns**2).mean()) + float(rows.mean()) ** 2)

"""Kernel Inception Distance: the unbiased MMD² with the kernel (x·y/D + 1)³, in float64, over random subsets."""

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


def jackknife_variances(generated: Array, reference: Array) -> tuple[float, float]:
    """Variances of the unbiased MMD² of all rows, (N, D) each with N ≥ 3, that each set is the cause of: what leaving
    out a row of it changes (Efron and Stein 1981). Exact to first order; between equal distributions, where there is no
    first order, twice too large."""
    n, m = len(generated), len(reference)
    xy, yx = np.zeros(n), np.zeros(m)
    for part in blocks(n, m):
        k = kernel_to_all(generated[part], reference)
        xy[part] = k.sum(axis=1)
        yx += k.sum(axis=0)
    return _jackknife(generated, xy, m), _jackknife(reference, yx, n)


def _jackknife(rows: Array, across: Array, other: int) -> float:
    """across: (N,) sums of the kernel with the `other` rows of the other set."""
    n = len(rows)
    own = np.concatenate([kernel_to_all(rows[part], rows, part.start).sum(axis=1) for part in blocks(n, n)])
    left_out = (own.sum() - 2 * own) / ((n - 1) * (n - 2)) - 2 * (across.sum() - across) / ((n - 1) * other)
    return (n - 1) * float(left_out.var())

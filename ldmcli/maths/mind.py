"""MIND, the sliced Wasserstein distance of features (arXiv 2605.06797): usable with fewer images than dimensions."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike

from ldmcli.core.errors import UsageError
from ldmcli.maths.feature_rows import Array, blocks, need_two, pair_of, tiles


def mind(generated: ArrayLike, reference: ArrayLike, *, directions: int = 1000, seed: int = 2020) -> float:
    """3 D · mean over random unit directions of the squared Wasserstein-2 distance of the projected sets, at least 0.

    generated, reference: (N, D) each; the larger set is cut to random rows of it, as many as the smaller one has. A
    shift by Δ gives about 3 ‖Δ‖². Subset and directions are those that torch-fidelity draws with this seed; projections
    are float64. Raises InputError below two rows, UsageError below one direction.
    """
    a, b = pair_of(generated, reference)
    need_two(len(a), "the generated set")
    need_two(len(b), "the reference set")
    ids, along = drawn(len(a), len(b), a.shape[1], directions, seed)
    n = len(ids[0])
    total = 0.0
    for x, y in projected(a, b, ids, along):
        total += float(((np.sort(x, axis=1) - np.sort(y, axis=1)) ** 2).sum())
    return 3 * a.shape[1] * total / (directions * n)


def drawn(n1: int, n2: int, dimensions: int, directions: int, seed: int) -> tuple[tuple[Array, Array], Array]:
    """((rows of set 1, rows of set 2), unit directions (M, D) float64), all from one generator of the CPU."""
    if directions < 1:
        raise UsageError(f"MIND of {directions} directions: need at least 1")
    generator, n = torch.Generator().manual_seed(seed), min(n1, n2)
    first, second = (
        torch.randperm(size, generator=generator)[:n].numpy() if size > n else np.arange(n) for size in (n1, n2)
    )
    along = torch.randn(directions, dimensions, generator=generator)
    return (first, second), (along / along.norm(dim=1, keepdim=True)).double().numpy()


def projected(a: Array, b: Array, ids: tuple[Array, Array], along: Array) -> Iterator[tuple[Array, Array]]:
    """Projections (m, n) of both sets' rows `ids`, for m directions at a time."""
    for part in blocks(len(along), len(ids[0])):
        yield _onto(a, ids[0], along[part]), _onto(b, ids[1], along[part])


def _onto(rows: Array, ids: Array, along: Array) -> Array:
    out = np.empty((len(along), len(ids)))
    for part in tiles(len(ids)):
        out[:, part] = along @ rows[ids[part]].astype(np.float64).T
    return out

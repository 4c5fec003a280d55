"""Metrics of nearest neighbours in float64: precision and recall, density and coverage."""

import numpy as np
from numpy.typing import ArrayLike

from ldmcli.maths.feature_rows import Array, blocks, distances_to_all, mean_of, pair_of

NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)
NEAREST = 5  # of density and coverage (Naeem et al. 2020)


def precision_recall(
    generated: ArrayLike, reference: ArrayLike, k: int = NEIGHBOURS
) -> tuple[float, float] | tuple[None, None]:
    """Precision and recall (Kynkäänniemi et al. 2019, Eq. 2), in [0, 1], or None twice where a set has no k-th
    neighbour (n ≤ k). generated, reference: (N, D) each.

    Precision: share of generated rows within the k-neighbour ball of a reference row; recall the other way round.
    """
    a, b = pair_of(generated, reference)
    if min(len(a), len(b)) <= k:
        return None, None
    centre = mean_of(b)
    return _share_covered(a, b, squared_radii(b, k, centre), centre), _share_covered(
        b, a, squared_radii(a, k, centre), centre
    )


def density_coverage(
    generated: ArrayLike, reference: ArrayLike, k: int = NEAREST
) -> tuple[float, float] | tuple[None, None]:
    """Density (at least 0, 1 where the sets are alike) and coverage (in [0, 1]) of Naeem et al. 2020, Eq. 4 and 5, or
    None twice where a set has no k-th neighbour (n ≤ k). generated, reference: (N, D) each.

    The ball of a reference row reaches to its k-th neighbour in the reference, and its border is outside. Density: in
    how many balls a generated row lies, over k, on average. Coverage: share of balls in which one lies.
    """
    a, b = pair_of(generated, reference)
    if min(len(a), len(b)) <= k:
        return None, None
    centre = mean_of(b)
    squared = squared_radii(b, k, centre)
    inside = np.zeros(len(b), np.int64)
    for block in blocks(len(a), len(b)):
        inside += (distances_to_all(a[block], b, centre) < squared).sum(axis=0)
    return float(inside.sum() / (k * len(a))), float((inside > 0).mean())


def squared_radii(rows: Array, k: int, centre: Array) -> Array:
    """Squared distance of every row to its k-th neighbour, itself not counted, (N,)."""
    parts = [
        # entry k of a row that holds the zero distance to itself
        np.partition(distances_to_all(rows[block], rows, centre), k, axis=1)[:, k]
        for block in blocks(len(rows), len(rows))
    ]
    return np.concatenate(parts)


def _share_covered(points: Array, centres: Array, squared: Array, centre: Array) -> float:
    """Share of points that lie inside, or on, the ball of at least one centre."""
    covered = 0
    for block in blocks(len(points), len(centres)):
        covered += int((distances_to_all(points[block], centres, centre) <= squared).any(axis=1).sum())
    return covered / len(points)

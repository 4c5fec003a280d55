"""Standard errors and intervals of metrics of nearest neighbours, from random halves.

Both sets are cut into halves, and two halves of each are measured by themselves. They are independent, so a quarter of
the squared difference estimates the variance at the full sizes, on average over many cuts. (A jackknife does not: a
point that is left out changes balls around it only, and the variance comes out several times too large.)
"""

import math
from dataclasses import dataclass, field

import numpy as np

from ldmcli.maths.feature_rows import Array, blocks, distances_to_all, mean_of
from ldmcli.maths.uncertainty import Error, share_interval

CUTS = 24
FREEDOM = CUTS // 2  # degrees of freedom of their mean: cuts of one set are not independent


@dataclass
class Halves:
    """Means over points, or over balls, of two halves, (cuts, 2): of the `points`, of the `centres`, or of `both`."""

    covered: dict[str, Array] = field(default_factory=dict)  # share of points that lie in a ball
    depth: dict[str, Array] = field(default_factory=dict)  # balls that a point lies in
    hit: dict[str, Array] = field(default_factory=dict)  # share of balls in which a point lies; not by centres alone


def precision_recall_errors(
    generated: Array, reference: Array, values: tuple[float, float], k: int
) -> tuple[Error, Error]:
    """Errors of precision and recall, whose values these are, of sets of 2 k + 2 rows or more."""
    first, second = halves(generated, reference, k, strict=False), halves(reference, generated, k, strict=False)
    return (
        _share_error(values[0], first.covered, "points", len(generated)),
        _share_error(values[1], second.covered, "centres", len(reference)),
    )


def density_coverage_errors(
    generated: Array, reference: Array, values: tuple[float, float], k: int
) -> tuple[Error, Error]:
    """Errors of density and coverage, whose values these are, of sets of 2 k + 2 rows or more."""
    found = halves(generated, reference, k, strict=True)
    own, both = variance(found.depth["points"]) / k**2, variance(found.depth["both"]) / k**2
    density = Error(math.sqrt(own), math.sqrt(max(both - own, 0)), f"{CUTS} random halves", FREEDOM)
    return density, _share_error(values[1], found.hit, "points", len(reference))


def _share_error(share: float, found: dict[str, Array], own: str, n: int) -> Error:
    """own: what of `Halves` is the generated set; n: how many the share is of."""
    of_own = variance(found[own])
    total = max(variance(found["both"]), of_own)
    ends = share_interval(share, total, n, FREEDOM)
    return Error(math.sqrt(of_own), math.sqrt(total - of_own), f"{CUTS} random halves (Wilson)", FREEDOM, ends)


def variance(pairs: Array) -> float:
    """Of the whole, from values of two halves, (cuts, 2)."""
    return float(((pairs[:, 0] - pairs[:, 1]) ** 2).mean()) / 4


def halves(points: Array, centres: Array, k: int, strict: bool, cuts: int = CUTS) -> Halves:
    """Measures random halves, with distances computed once. strict: whether the border of a ball is outside."""
    n, m, inside = len(points), len(centres), np.less if strict else np.less_equal
    rng, middle = np.random.default_rng([n, m]), mean_of(centres)
    of_point, of_centre = (np.array([rng.permutation(size) % 2 for _ in range(cuts)]) for size in (n, m))
    radii, within = _radii(centres, k, middle, of_centre)
    # sums over points, (cut, half), of what lies in a ball and in how many; and the balls that are hit
    sums = {name: np.zeros((2, cuts, 2)) for name in ("points", "centres", "both")}
    hit = {name: np.zeros((cuts, 2, m), bool) for name in ("points", "both")}
    for part in blocks(n, m):
        squared = distances_to_all(points[part], centres, middle)
        whole = inside(squared, radii)
        for cut in range(cuts):
            left = inside(squared, within[cut])
            for half in (0, 1):
                mine, balls = of_point[cut, part] == half, of_centre[cut] == half
                depth = left[:, balls].sum(axis=1)
                for name, counts in (("points", whole[mine].sum(axis=1)), ("centres", depth), ("both", depth[mine])):
                    sums[name][:, cut, half] += (counts > 0).sum(), counts.sum()
                hit["points"][cut, half] |= whole[mine].any(axis=0)
                hit["both"][cut, half] |= left[mine].any(axis=0) & balls
    found, sizes = Halves(), np.stack([(of_point == half).sum(axis=1) for half in (0, 1)], axis=1)
    for name, (covered, deep) in sums.items():
        over = n if name == "centres" else sizes
        found.covered[name], found.depth[name] = covered / over, deep / over
    found.hit["points"] = hit["points"].mean(axis=2)
    found.hit["both"] = hit["both"].sum(axis=2) / np.stack([(of_centre == half).sum(axis=1) for half in (0, 1)], axis=1)
    return found


def _radii(centres: Array, k: int, middle: Array, half: Array) -> tuple[Array, Array]:
    """Squared distance of each centre to its k-th neighbour, (m,), and to its k-th one in its own half of each cut,
    (cuts, m). It is one of the 4 k + 12 nearest for all but one in thousands, which take the last of these."""
    m = len(centres)
    kept = min(4 * k + 13, m)  # with the centre itself
    radii, within = np.empty(m), np.empty((len(half), m))
    for part in blocks(m, m):
        squared = distances_to_all(centres[part], centres, middle)
        nearest = np.argpartition(squared, kept - 1, axis=1)[:, :kept]
        order = np.argsort(np.take_along_axis(squared, nearest, 1), axis=1, kind="stable")
        nearest = np.take_along_axis(nearest, order, 1)[:, 1:]
        distance = np.take_along_axis(squared, nearest, 1)
        radii[part] = distance[:, k - 1]
        for cut, label in enumerate(half):
            among = np.cumsum(label[nearest] == label[part, None], axis=1)
            place = np.minimum((among < k).sum(axis=1), kept - 2)
            within[cut, part] = distance[np.arange(len(distance)), place]
    return radii, within

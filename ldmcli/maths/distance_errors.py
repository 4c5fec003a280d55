"""Standard errors of distances of two sets of features, and the Fréchet distance at infinitely many images."""

import math
from dataclasses import dataclass

import numpy as np

from ldmcli.maths.feature_rows import Array, tiles
from ldmcli.maths.kernel_distance import jackknife_variances
from ldmcli.maths.metrics import centred_factor, factor_of, frechet_of
from ldmcli.maths.mind import drawn, projected
from ldmcli.maths.uncertainty import Error, quantile

# --- Fréchet distance --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """A Gaussian as its influence function needs it. rows: those that it is of, or some of them, (N, D), or None; n:
    how many it is of, None where nobody says."""

    mean: Array
    factor: Array  # F Fᵀ = Σ
    rows: Array | None
    n: int | None

    @classmethod
    def of_rows(cls, rows: Array) -> "Moments":
        mean, factor, _ = centred_factor(rows)
        return cls(mean, factor, rows, len(rows))

    @classmethod
    def of_statistics(cls, mu: Array, sigma: Array, rows: Array | None, n: int | None) -> "Moments":
        return cls(mu, factor_of(sigma), rows, n)


def frechet_error(generated: Moments, reference: Moments) -> Error:
    """Standard errors of the Fréchet distance at these sizes, by its influence function.

    The distance changes with μ₁ by 2 (μ₁ − μ₂) and with Σ₁ by I − T, where T = F₁⁺ᵀ (F₁ᵀ Σ₂ F₁)^½ F₁⁺ is the optimal
    transport from one Gaussian to the other (Dowson and Landau 1982), F₁⁺ a pseudo-inverse. With fewer rows than
    dimensions F₁ are the centred rows, and the value of each is read from the singular vectors.
    """
    left, values, right = np.linalg.svd(generated.factor.T @ reference.factor, full_matrices=False)
    sides = (generated, reference, left), (reference, generated, right.T)
    errors: list[float | None] = []
    for own, other, basis in sides:
        known = own.rows is not None and own.n is not None and len(own.rows) > 1
        errors.append(math.sqrt(_influence(own, other.mean, basis, values).var(ddof=1) / own.n) if known else None)
    left_out = (
        "" if errors[1] is not None else ", without that of the reference, of which only mean and covariance are known"
    )
    sizes = [own.n for own, _, _ in sides if own.n is not None]
    return Error(errors[0], errors[1], f"influence function{left_out}", min(sizes) - 1, squared=True)


def _influence(own: Moments, other_mean: Array, basis: Array, values: Array) -> Array:
    """(N,) change of the distance, but for a constant, as each row of `own` gets more weight."""
    assert own.rows is not None
    shift, n, d = own.mean - other_mean, *own.rows.shape
    of_rows = own.factor.shape == (d, n) and n <= d  # the factor is the centred rows themselves
    if not of_rows:
        basis = (own.factor / (own.factor**2).sum(axis=0)) @ basis
    out = np.empty(n)
    for part in tiles(n):
        centred = own.rows[part] - own.mean
        along = basis[part] * math.sqrt(n - 1) if of_rows else centred @ basis
        out[part] = (centred**2).sum(axis=1) + 2 * (centred @ shift) - (along**2) @ values
    return out


# --- KID and MIND ----------------------------------------------------------------------------------------------


def kid_error(generated: Array, reference: Array, subset_size: int, subsets: int, std: float) -> Error | None:
    """Standard errors of KID by the jackknife of the U-statistic of all rows, with what random subsets add.

    std: deviation over the subsets. None below three rows.
    """
    if min(len(generated), len(reference)) < 3:
        return None
    own, other = jackknife_variances(generated, reference)
    whole = len(generated) == len(reference) == subset_size
    drawing = 0.0 if whole else std**2 / subsets / 2
    errors = (math.sqrt(own + drawing), math.sqrt(other + drawing))
    method = "jackknife" if whole else f"jackknife, and the deviation of {subsets} subsets"
    return Error(*errors, method, min(len(generated), len(reference)) - 1)


def mind_error(generated: Array, reference: Array, directions: int, seed: int) -> Error:
    """Standard errors of MIND at these sizes: the mean over directions of the Kantorovich potentials of the projected
    sets, which say how the distance changes with the weight of each row."""
    ids, along = drawn(len(generated), len(reference), generated.shape[1], directions, seed)
    n = len(ids[0])
    influence = np.zeros((2, n))
    for x, y in projected(generated, reference, ids, along):
        order = np.argsort(x, axis=1), np.argsort(y, axis=1)
        x, y = np.take_along_axis(x, order[0], 1), np.take_along_axis(y, order[1], 1)
        for side, (own, other) in enumerate(((x, y), (y, x))):
            potential = np.zeros_like(own)
            # between two neighbours the transport jumps from one to the next: the mean of both
            np.cumsum(
                np.diff(own) * (own[:, 1:] + own[:, :-1] - other[:, 1:] - other[:, :-1]), axis=1, out=potential[:, 1:]
            )
            potential -= potential.mean(axis=1, keepdims=True)
            influence[side] += np.bincount(order[side].ravel(), potential.ravel(), n)
    scale = 3 * generated.shape[1] / directions
    errors = scale * np.sqrt(influence.var(axis=1, ddof=1) / n)
    return Error(float(errors[0]), float(errors[1]), "influence function", n - 1, squared=True)


# --- infinitely many images ------------------------------------------------------------------------------------

PARTS = (2, 3, 4)  # a set is cut into so many parts, and all but one are measured; of 2, one
MANY = 2**22  # numbers of a set, above which there are fewer parts: each costs as much as the distance itself
LEAST = 8  # rows of a set


@dataclass(frozen=True)
class Extrapolated:
    """The Fréchet distance at infinitely many rows: a line through its values at s · (n, m) rows, over 1/s, at 0.

    points: (rows generated, rows of the reference, mean distance of such subsets). r2: how much of the spread of the
    points the line explains. holds: whether the line can be trusted: below two rows a dimension subsets have singular
    covariances, the values bend, and the line ends above the truth, so that the interval reaches down to 0.
    """

    value: float
    interval: tuple[float, float]
    points: list[tuple[int, int, float]]
    r2: float
    holds: bool


def extrapolated_frechet(
    generated: Array, reference: Array | Moments, value: float, error: Error, seed: int = 0
) -> Extrapolated | None:
    """Extrapolates a distance, whose value and error at all rows are known. None where a set has too few rows.

    reference: rows, which become more with the generated ones, or a Gaussian that stays. The interval has the standard
    error of the distance, which is also that of the line's end to first order, and half of what a parabola through the
    same points says otherwise.
    """
    given = isinstance(reference, Moments)
    n, m = len(generated), (reference.n or 0) if isinstance(reference, Moments) else len(reference)
    if n < LEAST or (not given and m < LEAST):
        return None
    rng = np.random.default_rng([seed, n, m])
    shares, values, points = [1.0], [value], [(n, m, value)]
    for parts in PARTS if generated.size <= MANY else PARTS[:2]:
        first, second = rng.permutation(n) % parts, rng.permutation(m) % parts
        found, sizes = [], (0, 0)
        for part in range(parts):
            ids = [np.flatnonzero((label == part) == (parts == 2)) for label in (first, second)]
            own = Moments.of_rows(generated[ids[0]])
            other = reference if isinstance(reference, Moments) else Moments.of_rows(reference[ids[1]])
            found.append(frechet_of(own.mean, own.factor, other.mean, other.factor))
            sizes = len(ids[0]), m if given else len(ids[1])
        shares.append(sizes[0] / n)
        values.append(float(np.mean(found)))
        points.append((*sizes, values[-1]))
    return _line(np.array(shares), np.array(values), points, error, min(n, m or n) >= 2 * generated.shape[1])


def _line(shares: Array, values: Array, points: list, error: Error, holds: bool) -> Extrapolated:
    slope, end = np.polyfit(1 / shares, values, 1)
    bent = float(np.polyfit(1 / shares, values, 2)[-1])
    rest, spread = values - end - slope / shares, values - values.mean()
    total = float((spread**2).sum())
    r2 = 1 - float((rest**2).sum()) / total if total > 0 else 1.0
    half = quantile(error.freedom) * math.hypot(error.total, (bent - float(end)) / 2)
    low = float(end) - half if holds else 0.0
    return Extrapolated(float(end), (max(0.0, low), max(0.0, float(end) + half)), points, r2, holds)

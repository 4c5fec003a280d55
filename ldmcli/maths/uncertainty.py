"""How far chance moves a metric: standard errors and 95 % intervals, from the rows that the metric was computed of.

An `Error` has what each side adds by itself. What an interval covers: of a mean, a share, and a distance that depends
on the sizes of the sets, its expected value at these sizes; of KID, which does not, the value of the two populations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from ldmcli.maths.feature_rows import Array

CONFIDENCE = 0.95
GROUPS = 10  # of a delete-group jackknife
MOST_FACTOR = 2.0  # logarithm of how far beyond itself a squared distance may reach, where its error is larger than it


@dataclass(frozen=True)
class Error:
    """Standard errors of one value: `generated` and `reference` are what these sets add, None where that is not known.

    method: how they were found. freedom: degrees of freedom, for the t distribution. interval: where it is not value ±
    t · error. squared: whether the value is a squared distance, whose errors to both sides are unequal.
    """

    generated: float | None
    reference: float | None
    method: str
    freedom: float = math.inf
    interval: tuple[float, float] | None = None
    squared: bool = False

    @property
    def total(self) -> float:
        """Both together, as of independent sets."""
        return math.hypot(self.generated or 0.0, self.reference or 0.0)


def interval(value: float, error: Error, bounds: tuple[float, float] = (-math.inf, math.inf)) -> tuple[float, float]:
    """The 95 % interval of a value within the bounds of its metric.

    The error of a squared distance grows with its value, and one that came out small has an error that is too small, so
    to the right the interval is that of the logarithm, to the left that of the root (docs/experiments.md).
    """
    half = quantile(error.freedom) * error.total
    low, high = error.interval or (value - half, value + half)
    if error.squared and value > 0:
        root = math.sqrt(value)
        low = max(0.0, root - half / root / 2) ** 2
        high = max(high, value * math.exp(min(half / value, MOST_FACTOR)))
    return max(low, bounds[0]), min(high, bounds[1])


def quantile(freedom: float) -> float:
    """How many standard errors a 95 % interval reaches to each side."""
    return float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2)) if math.isfinite(freedom) else 1.959963985


def mean_error(values: Sequence[float]) -> Error | None:
    """Error of the mean of independent values, n − 1 degrees of freedom; None of fewer than two."""
    n = len(values)
    if n < 2:
        return None
    return Error(float(np.std(values, ddof=1)) / math.sqrt(n), None, "exact (t)", n - 1)


def share_interval(share: float, variance: float, n: int, freedom: float = math.inf) -> tuple[float, float]:
    """Wilson's interval (1927) of a share of n, for as many independent ones as would have this variance."""
    spread = share * (1 - share)
    size = spread / variance if variance > 0 and spread > 0 else float(n)
    z = quantile(freedom)
    middle = (share + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * math.sqrt(spread / size + z * z / (4 * size * size))
    return max(0.0, middle - half), min(1.0, middle + half)


# --- any metric ------------------------------------------------------------------------------------------------


def groups_of(n: int, groups: int = GROUPS, seed: int = 0) -> Array:
    """(n,) number of the random group, of nearly equal sizes, that each row belongs to."""
    return np.random.default_rng([seed, n]).permutation(n) % groups


def jackknife(n: int, without: Callable[[Array], Array], groups: int = GROUPS) -> Array:
    """Variances by the delete-group jackknife (Shao and Wu 1989), one for each of the values that `without` gives for
    the numbers of the rows that stay."""
    groups = min(groups, n)
    label = groups_of(n, groups)
    return group_variance(np.array([without(np.flatnonzero(label != g)) for g in range(groups)]))


def group_variance(values: Array) -> Array:
    """The same of the values without each group, (groups, …)."""
    return (len(values) - 1) / len(values) * ((values - values.mean(axis=0)) ** 2).sum(axis=0)

"""Errors and intervals: against brute force, closed forms, and how often they cover the truth."""

import math

import numpy as np
import pytest

from ldmcli.maths import uncertainty as un
from ldmcli.maths.distance_errors import Moments, extrapolated_frechet, frechet_error, kid_error, mind_error
from ldmcli.maths.kernel_distance import jackknife_variances, kid
from ldmcli.maths.metrics import frechet_from_features
from ldmcli.maths.mind import mind
from ldmcli.maths.neighbour_errors import density_coverage_errors, precision_recall_errors
from ldmcli.maths.neighbour_metrics import density_coverage, precision_recall

SETS = 100


def rng(seed=3):
    return np.random.default_rng(seed)


def frechet_errors_of(a, b):
    return frechet_error(Moments.of_rows(a), Moments.of_rows(b))


def leaving_one_out(function, n):
    """Variance by the jackknife, computed as it is defined."""
    values = np.array([function(np.delete(np.arange(n), i)) for i in range(n)])
    return (n - 1) * values.var()


def test_a_mean_has_the_interval_of_student():
    error = un.mean_error([1.0, 2.0, 4.0, 5.0])
    assert error.total == pytest.approx(math.sqrt(10 / 3) / 2)
    assert un.interval(3.0, error) == pytest.approx((3 - 3.182446 * error.total, 3 + 3.182446 * error.total), rel=1e-5)
    assert un.interval(3.0, error, (1.0, 3.5)) == (1.0, 3.5)
    assert un.mean_error([1.0]) is None


def test_the_interval_of_a_squared_distance_is_that_of_its_root_and_of_its_logarithm():
    half, error = 1.959964 * 0.5, un.Error(0.5, None, "", squared=True)
    assert un.interval(4.0, error) == pytest.approx(((2 - half / 4) ** 2, 4 * math.exp(half / 4)), rel=1e-6)
    assert un.interval(0.5, error) == pytest.approx((0.5 * (1 - half) ** 2, 0.5 * math.exp(2 * half)), rel=1e-6)
    assert un.interval(0.01, error, (0, math.inf)) == pytest.approx((0, 0.01 + half), rel=1e-6)
    assert un.interval(0.0, error, (0, math.inf)) == pytest.approx((0, half), rel=1e-6)


@pytest.mark.parametrize("share, ends", [(0.0, (0.0, 0.0370)), (0.05, (0.0215, 0.1118)), (1.0, (0.9630, 1.0))])
def test_a_share_of_a_hundred_has_the_interval_of_wilson(share, ends):
    assert un.share_interval(share, share * (1 - share) / 100, 100) == pytest.approx(ends, abs=1e-4)


def test_the_jackknife_of_a_mean_is_the_variance_of_the_mean():
    x = rng().normal(size=400)
    found = un.jackknife(400, lambda ids: np.array([x[ids].mean(), 2 * x[ids].mean()]), groups=400)
    assert found == pytest.approx([x.var(ddof=1) / 400, 4 * x.var(ddof=1) / 400], rel=1e-9)
    assert set(np.bincount(un.groups_of(95))) == {9, 10}


@pytest.mark.parametrize("n, d", [(120, 3), (40, 60)])
def test_the_influence_of_rows_on_a_frechet_distance_is_what_leaving_them_out_changes(n, d):
    a, b = 1 + 1.5 * rng().normal(size=(n, d)), rng(4).normal(size=(n + 5, d))
    error = frechet_errors_of(a, b)
    own = leaving_one_out(lambda ids: frechet_from_features(a[ids], b), n)
    other = leaving_one_out(lambda ids: frechet_from_features(a, b[ids]), n + 5)
    assert (error.generated**2, error.reference**2) == pytest.approx((own, other), rel=0.25)


def test_a_reference_of_statistics_alone_adds_an_error_where_some_of_its_rows_are_known():
    a, b = 1 + rng().normal(size=(300, 4)), rng(4).normal(size=(2000, 4))
    whole = frechet_errors_of(a, b)
    known = b.mean(axis=0), np.cov(b.T)
    some = frechet_error(Moments.of_rows(a), Moments.of_statistics(*known, b[:1000], 2000))
    none = frechet_error(Moments.of_rows(a), Moments.of_statistics(*known, None, None))
    assert some.generated == pytest.approx(whole.generated, rel=1e-9) == none.generated
    assert some.reference == pytest.approx(whole.reference, rel=0.15)
    assert none.reference is None and "without that of the reference" in none.method


def test_the_error_of_kid_is_what_leaving_rows_out_changes():
    a, b = 0.5 + rng().normal(size=(40, 3)), rng(4).normal(size=(30, 3))

    def unbiased(x, y):
        k = [(p @ q.T / 3 + 1) ** 3 for p, q in ((x, x), (y, y), (x, y))]
        inner = [(one.sum() - np.trace(one)) / (len(one) * (len(one) - 1)) for one in k[:2]]
        return sum(inner) - 2 * k[2].mean()

    assert kid(a[:30], b, subset_size=30) == (pytest.approx(unbiased(a[:30], b), rel=1e-9), 0.0)
    expected = [
        leaving_one_out(lambda ids: unbiased(a[ids], b), 40),
        leaving_one_out(lambda ids: unbiased(a, b[ids]), 30),
    ]
    assert jackknife_variances(a, b) == pytest.approx(expected, rel=1e-9)


def test_kid_of_one_pass_is_that_of_subset_by_subset():
    a, b = rng().normal(size=(60, 5)), 0.3 + rng(4).normal(size=(50, 5))
    random, values = np.random.RandomState(2020), []
    for _ in range(30):
        x, y = a[random.choice(60, 40, replace=False)], b[random.choice(50, 40, replace=False)]
        values.append(kid(x, y, subsets=1, subset_size=40)[0])
    assert kid(a, b, subsets=30, subset_size=40) == pytest.approx((np.mean(values), np.std(values)), rel=1e-9)
    values = [kid(a, b, subsets=1, subset_size=10)[0], kid(a, b, subsets=40, subset_size=10)[0]]  # either way
    assert all(map(math.isfinite, values))


def test_the_error_of_mind_is_what_leaving_out_groups_says():
    a, b = 1 + 1.3 * rng().normal(size=(200, 4)), rng(4).normal(size=(200, 4))
    error = mind_error(a, b, 50, 2020)
    one = math.sqrt(un.jackknife(200, lambda ids: np.array([mind(a[ids], b, directions=50)]), groups=40)[0])
    assert error.generated == pytest.approx(one, rel=0.35)


# --- how often the truth is covered ----------------------------------------------------------------------------


def pair(random, n, d, kind):
    a, b = random.normal(size=(2, n, d)) / np.sqrt(np.arange(1, d + 1))
    return (a, b) if kind == "equal" else (1.2 * a + 0.5 / math.sqrt(d), b)


def covered(find, truth=None, sets=SETS, **how):
    """(share of sets whose interval covers the truth, width in deviations of the value over sets). find: of a pair of
    sets, (value, ends). truth: None = the mean over sets."""
    random = rng(0)
    values, ends = zip(*(find(*pair(random, **how)) for _ in range(sets)))
    low, high = np.array(ends).T
    truth = np.mean(values) if truth is None else truth
    return ((low <= truth) & (truth <= high)).mean(), (high - low).mean() / np.std(values)


def of(value, error, bounds=(0, math.inf)):
    return value, un.interval(value, error, bounds)


def alike(a, b, which):
    """Precision, recall, density or coverage, with its interval."""
    names = ("precision", "recall", "density", "coverage")
    compute, errors, k = (
        (precision_recall, precision_recall_errors, 3) if which < 2 else (density_coverage, density_coverage_errors, 5)
    )
    values = compute(a, b, k)
    return of(values[which % 2], errors(a, b, values, k)[which % 2], (0, math.inf if names[which] == "density" else 1))


FOUND = {
    "fid": lambda a, b: of(frechet_from_features(a, b), frechet_errors_of(a, b)),
    "kid": lambda a, b: of(kid(a, b, subset_size=len(a))[0], kid_error(a, b, len(a), 100, 0.0), (-math.inf, math.inf)),
    "mind": lambda a, b: of(mind(a, b, directions=30), mind_error(a, b, 30, 2020)),
    "precision": lambda a, b: alike(a, b, 0),
    "recall": lambda a, b: alike(a, b, 1),
    "density": lambda a, b: alike(a, b, 2),
}


@pytest.mark.parametrize("kind", ["equal", "wider"])
@pytest.mark.parametrize("name, n, d", [*((name, 80, 6) for name in FOUND), ("fid", 24, 40), ("mind", 24, 40)])
def test_intervals_cover_the_expected_value_and_are_not_much_wider_than_they_need_to_be(name, kind, n, d):
    share, width = covered(FOUND[name], n=n, d=d, kind=kind, sets=50 if name in ("precision", "recall") else SETS)
    assert share >= 0.9
    assert width < 2 * 3.92


def test_the_interval_of_kid_covers_the_populations_value():
    share, _ = covered(FOUND["kid"], truth=0.0, n=60, d=5, kind="equal")
    assert share >= 0.9


def beyond(a, b):
    value = frechet_from_features(a, b)
    found = extrapolated_frechet(a, b, value, frechet_errors_of(a, b))
    return found.value, found.interval


@pytest.mark.parametrize("kind, truth", [("equal", 0.0), ("wider", 0.25 + 0.04 * (1 + 1 / 2 + 1 / 3 + 1 / 4))])
def test_the_extrapolated_distance_covers_that_of_the_populations_from_four_rows_a_dimension_on(kind, truth):
    for n in (16, 64):
        assert covered(beyond, truth=truth, n=n, d=4, kind=kind)[0] >= 0.9
    assert covered(FOUND["fid"], truth=truth, n=16, d=4, kind=kind)[0] < 0.9


def test_with_few_rows_a_dimension_the_extrapolated_distance_is_an_upper_bound():
    a, b = pair(rng(), 20, 30, "equal")
    found = extrapolated_frechet(a, b, frechet_from_features(a, b), frechet_errors_of(a, b))
    assert not found.holds and found.interval[0] == 0 < found.value < found.interval[1]
    assert [point[:2] for point in found.points] == [(20, 20), (10, 10), (14, 14), (15, 15)] and found.r2 > 0.9
    assert extrapolated_frechet(a[:7], b, 1.0, frechet_errors_of(a, b)) is None


def test_a_reference_that_stays_is_extrapolated_over_the_generated_rows_alone():
    a, b = pair(rng(), 200, 4, "equal")
    fixed = Moments.of_statistics(np.zeros(4), np.diag(1 / np.arange(1, 5)), None, None)
    value = frechet_from_features(a, b)
    found = extrapolated_frechet(a, fixed, value, frechet_error(Moments.of_rows(a), fixed))
    assert found.holds and {point[1] for point in found.points} == {0}

"""Metric numerics against closed forms, and against recorded values of independent implementations."""

import json
import math

import numpy as np
import pytest
from golden_cases import shared

from ldmcli.core.errors import InputError, UsageError
from ldmcli.maths import feature_rows
from ldmcli.maths import metrics as st

SETS = ("a", "b", "rank_deficient", "offset", "collapsed", "identical")
GAUSSIANS = (
    "diagonal",
    "commuting",
    "same_cov",
    "scaled_cov_by_4",
    "rank_one_orthogonal",
    "rank_one_45_degrees",
    "zero_cov",
)
PAIRS = tuple(f"{i:02d}" for i in range(12))


@pytest.fixture(scope="module")
def golden():
    return json.loads(shared("metrics", "golden.json").read_text())


@pytest.fixture(scope="module")
def features():
    from safetensors.numpy import load_file

    return load_file(shared("metrics", "features.safetensors"))


@pytest.fixture(scope="module")
def pairs():
    from safetensors.numpy import load_file

    return load_file(shared("metrics", "pairs.safetensors"))


def rng():
    return np.random.default_rng(3)


def spread(d, seed=0):
    """A covariance of full rank, (d, d)."""
    x = np.random.default_rng(seed).normal(size=(d, 2 * d))
    return x @ x.T / d


@pytest.mark.parametrize("name", SETS)
def test_fid_of_features_matches_the_recorded_exact_value(name, golden, features):
    exact = golden["features"][name]["fid"]["exact_float64_nuclear_norm"]
    value = st.frechet_from_features(features[f"{name}.1"], features[f"{name}.2"])
    assert value == pytest.approx(exact, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("name", SETS)
def test_fid_of_merged_batches_matches_the_recorded_exact_value(name, golden, features):
    moments = []
    for side in "12":
        rows = features[f"{name}.{side}"]
        parts = [st.Gaussian.empty(rows.shape[1]) for _ in range(2)]
        for i in range(0, len(rows), 37):
            parts[i // 37 % 2].update(rows[i : i + 37])
        parts[0].merge(parts[1])
        moments += [parts[0].mean, parts[0].covariance]
    exact = golden["features"][name]["fid"]["exact_float64_nuclear_norm"]
    assert st.frechet(*moments) == pytest.approx(exact, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("name", GAUSSIANS)
def test_frechet_distance_matches_the_closed_form_of_recorded_gaussians(name, golden):
    from safetensors.numpy import load_file

    arrays = load_file(shared("metrics", "gaussians.safetensors"))
    exact = next(row["exact"] for row in golden["gaussians"] if row["name"] == name)
    value = st.frechet(*(arrays[f"{name}.{part}"] for part in ("mu1", "sigma1", "mu2", "sigma2")))
    assert value == pytest.approx(exact, rel=1e-11)


@pytest.mark.parametrize("name", SETS)
def test_kid_matches_the_recorded_float64_value(name, golden, features):
    entry = golden["features"][name]["kid"]
    p = entry["params"]
    mean, std = st.kid(
        features[f"{name}.1"],
        features[f"{name}.2"],
        subsets=p["kid_subsets"],
        subset_size=p["kid_subset_size"],
        seed=p["rng_seed"],
    )
    bound = {"rel": 1e-6} if name == "offset" else {"abs": 1e-10}
    assert mean == pytest.approx(entry["torch_fidelity_float64"]["mean"], **bound)
    assert std == pytest.approx(entry["torch_fidelity_float64"]["std"], **bound)


@pytest.mark.parametrize("name", SETS)
def test_precision_and_recall_match_the_recorded_counts(name, golden, features):
    entry = golden["features"][name]["prc"]["scipy_cdist_float64"]
    generated, reference = features[f"{name}.1"], features[f"{name}.2"]
    precision, recall = st.precision_recall(generated, reference)
    assert round(precision * len(generated)) == round(entry["precision"] * len(generated))
    assert round(recall * len(reference)) == round(entry["recall"] * len(reference))


@pytest.mark.parametrize("name", ["logits_small", "logits_1008"])
@pytest.mark.parametrize("splits, shuffle", [(10, True), (10, False), (1, True)])
def test_inception_score_matches_the_recorded_value(name, splits, shuffle, golden, features):
    entry = golden["features"]["inception_score"][name][f"splits={splits},shuffle={shuffle},seed=2020"]
    mean, std = st.inception_score(features[name], splits=splits, shuffle=shuffle, seed=2020)
    assert mean == pytest.approx(entry["mean"], abs=1e-9)
    assert std == pytest.approx(entry["std"], abs=1e-9)


@pytest.mark.parametrize("name", PAIRS)
def test_psnr_and_ssim_match_the_recorded_values(name, golden, pairs):
    row = next(row for row in golden["images"]["rows"] if row["pair"] == name)
    values = st.image_metrics(pairs[f"{name}.a"], pairs[f"{name}.b"])
    psnr = row["psnr_skimage_range255"]
    assert values["psnr"] == (math.inf if psnr is None else pytest.approx(psnr, abs=1e-9))
    assert values["ssim"] == pytest.approx(row["ssim_wang_valid"], abs=1e-7)


def test_equal_covariances_leave_the_distance_of_the_means():
    sigma = spread(6)
    mu = rng().normal(size=6)
    assert st.frechet(mu, sigma, np.zeros(6), sigma) == pytest.approx(mu @ mu, rel=1e-12)


def test_diagonal_covariances_give_the_sum_of_squared_differences_of_deviations():
    a, b = rng().uniform(0.1, 4, size=(2, 8))
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert st.frechet(np.zeros(8), np.diag(a), np.zeros(8), np.diag(b)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("degrees", [0, 30, 90])
def test_rank_one_covariances_at_an_angle_follow_the_law_of_cosines(degrees):
    phi = math.radians(degrees)
    u, v = 2 * np.eye(5)[0], 3 * np.array([math.cos(phi), math.sin(phi), 0, 0, 0])
    value = st.frechet(np.zeros(5), np.outer(u, u), np.zeros(5), np.outer(v, v))
    assert value == pytest.approx(4 + 9 - 12 * abs(math.cos(phi)), rel=1e-12)


def test_frechet_distance_is_symmetric_and_does_not_see_a_rotation_or_the_order_of_rows():
    a, b = rng().normal(size=(40, 7)), 1 + 2 * rng().normal(size=(30, 7))
    rotation = np.linalg.qr(rng().normal(size=(7, 7)))[0]
    value = st.frechet_from_features(a, b)
    assert value > 1
    assert st.frechet_from_features(b, a) == pytest.approx(value, rel=1e-12)
    assert st.frechet_from_features(a @ rotation, b @ rotation) == pytest.approx(value, rel=1e-12)
    assert st.frechet_from_features(a[::-1], rng().permutation(b)) == pytest.approx(value, rel=1e-12)


def test_frechet_distance_grows_with_the_square_of_the_features_scale():
    a, b = rng().normal(size=(40, 7)), 1 + 2 * rng().normal(size=(30, 7))
    assert st.frechet_from_features(3 * a, 3 * b) == pytest.approx(9 * st.frechet_from_features(a, b), rel=1e-12)


@pytest.mark.parametrize("n", [5, 16, 200])
def test_features_and_their_moments_give_the_same_distance_below_and_above_full_rank(n):
    a, b = rng().normal(size=(n, 16)), 0.5 + rng().normal(size=(n + 3, 16))
    moments = [m for rows in (a, b) for m in (rows.mean(axis=0), np.cov(rows, rowvar=False))]
    assert st.frechet(*moments) == pytest.approx(st.frechet_from_features(a, b), rel=1e-11)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_streamed_moments_equal_those_of_all_rows_even_far_from_the_origin(size):
    rows = 1e4 + rng().normal(size=(100, 5))
    gaussian = st.Gaussian.empty(5)
    for i in range(0, 100, size):
        gaussian.update(rows[i : i + size])
    assert gaussian.n == 100
    np.testing.assert_allclose(gaussian.mean, rows.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(gaussian.covariance, np.cov(rows, rowvar=False), rtol=1e-8, atol=1e-9)


def test_merging_with_a_set_that_saw_nothing_changes_nothing():
    rows = rng().normal(size=(10, 3))
    gaussian, empty = st.Gaussian.empty(3), st.Gaussian.empty(3)
    gaussian.update(rows)
    gaussian.merge(empty)
    empty.merge(gaussian)
    for one in (gaussian, empty):
        assert one.n == 10
        np.testing.assert_allclose(one.covariance, np.cov(rows, rowvar=False), rtol=1e-12)


def test_kid_of_a_whole_set_is_the_unbiased_estimator_summed_by_hand():
    x, y = rng().normal(size=(4, 3)), rng().normal(size=(4, 3)) + 1
    k = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    within = sum(k(s[i], s[j]) for s in (x, y) for i in range(4) for j in range(4) if i != j) / 12
    across = sum(k(a, b) for a in x for b in y) / 16
    mean, std = st.kid(x, y, subsets=3, subset_size=4)
    assert mean == pytest.approx(within - 2 * across, rel=1e-12)
    assert std == pytest.approx(0, abs=1e-12)


def test_precision_counts_generated_and_recall_counts_reference_points():
    reference = np.arange(10.0)[:, None]
    generated = np.array([[4.0], [4.1], [4.2], [4.3], [100.0]])
    # Balls of the reference reach 2 to 3; those of the generated 0.2 to 0.3, but that at 100 reaches 95.9.
    precision, recall = st.precision_recall(generated, reference)
    assert precision == pytest.approx(4 / 5)
    assert recall == pytest.approx(6 / 10)  # 4 … 9: 4 is a generated point, 5 … 9 are within 95.9 of 100


def test_precision_and_recall_do_not_depend_on_the_size_of_blocks(monkeypatch):
    a, b = rng().normal(size=(60, 4)), 0.7 + rng().normal(size=(50, 4))
    whole = st.precision_recall(a, b)
    monkeypatch.setattr(feature_rows, "BLOCK", 130)
    monkeypatch.setattr(feature_rows, "TILE", 7)
    assert st.precision_recall(a, b) == whole
    assert 0 < whole[0] < 1


def test_precision_and_recall_are_absent_when_a_set_has_no_third_neighbour():
    rows = rng().normal(size=(9, 2))
    assert st.precision_recall(rows[:3], rows) == (None, None)
    assert st.precision_recall(rows[:4], rows)[0] is not None


def test_distances_between_equal_rows_are_exactly_zero():
    rows = 7 + rng().normal(size=(30, 50))
    assert (np.diagonal(feature_rows.squared_distances(rows, rows.copy())) == 0).all()


def test_inception_score_is_one_for_equal_logits_and_the_number_of_classes_for_sure_and_balanced_ones():
    assert st.inception_score(np.ones((20, 5)))[0] == pytest.approx(1, abs=1e-12)
    sure = 1e4 * np.eye(5)[np.arange(50) % 5]
    assert st.inception_score(sure, splits=1)[0] == pytest.approx(5, rel=1e-12)


def test_inception_score_does_not_mind_a_class_that_never_occurs():
    assert st.inception_score(1e4 * np.eye(5)[np.arange(40) % 2], splits=1)[0] == pytest.approx(2, rel=1e-12)


def test_precision_and_recall_do_not_see_where_the_origin_is():
    a, b = rng().normal(size=(60, 4)), 0.7 + rng().normal(size=(50, 4))
    assert st.precision_recall(a + 1e6, b + 1e6) == st.precision_recall(a, b)


def test_psnr_of_images_that_differ_by_a_constant():
    a = np.full((12, 12, 3), 100, np.uint8)
    assert st.psnr(a, a + 5) == pytest.approx(20 * math.log10(255 / 5), abs=1e-12)
    assert st.psnr(a, a) == math.inf


def test_ssim_of_two_flat_images_is_the_luminance_term():
    a, b = np.full((11, 11, 1), 50, np.uint8), np.full((11, 11, 1), 200, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert st.ssim(a, b) == pytest.approx((2 * 50 * 200 + c1) / (50**2 + 200**2 + c1), rel=1e-9)


def test_metrics_from_features_gives_what_was_asked_for():
    a, b, logits = rng().normal(size=(30, 4)), rng().normal(size=(25, 4)) + 1, rng().normal(size=(30, 6))
    everything = st.metrics_from_features(a, b, logits=logits, kid_subsets=2, kid_subset_size=20, seed=1)
    assert set(everything) == {
        "fid",
        "kid_mean",
        "kid_std",
        "precision",
        "recall",
        "is_mean",
        "is_std",
        "mind",
        "density",
        "coverage",
    }
    assert everything["fid"] == st.frechet_from_features(a, b)
    assert everything["kid_mean"] == st.kid(a, b, subsets=2, subset_size=20, seed=1)[0]
    assert everything["recall"] == st.precision_recall(a, b)[1]
    assert everything["is_mean"] == st.inception_score(logits, seed=1)[0]
    assert set(st.metrics_from_features(a, b, kid_subset_size=20)) == set(everything) - {"is_mean", "is_std"}
    assert st.metrics_from_features(a, b, ["fid"]) == {"fid": everything["fid"]}
    assert set(st.metrics_from_features(a, None, ["is"], logits=logits)) == {"is_mean", "is_std"}


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"metrics": ["fid", "sfid"]}, UsageError, "sfid"),
        ({"metrics": ["kid"]}, InputError, "subset size of at most 25"),
        ({"metrics": ["is"]}, InputError, "logits"),
        ({"metrics": ["fid"], "reference": None}, InputError, "reference"),
        ({"metrics": ["fid"], "generated": np.zeros((1, 4))}, InputError, "1 image:"),
        ({"metrics": ["fid"], "generated": np.zeros((0, 4))}, InputError, "0 images:"),
        ({"metrics": ["fid"], "generated": np.zeros((9, 5))}, InputError, "5 dimensions"),
        ({"metrics": ["fid"], "generated": np.full((9, 4), np.nan)}, InputError, "9 of 9"),
        ({"metrics": ["is"], "logits": np.zeros((9, 4))}, InputError, "9 images"),
    ],
)
def test_unusable_features_are_refused_with_a_reason(arguments, error, words):
    call = {"generated": rng().normal(size=(30, 4)), "reference": rng().normal(size=(25, 4)), **arguments}
    with pytest.raises(error, match=words):
        st.metrics_from_features(**call)


def test_a_covariance_of_one_row_is_refused():
    gaussian = st.Gaussian.empty(2)
    gaussian.update(np.ones((1, 2)))
    with pytest.raises(InputError, match="at least 2"):
        _ = gaussian.covariance


@pytest.mark.parametrize(
    "a, b, words",
    [
        (np.zeros((12, 12, 3)), np.zeros((12, 12, 3), np.uint8), "uint8"),
        (np.zeros((12, 12), np.uint8), np.zeros((12, 12), np.uint8), "H, W, C"),
        (np.zeros((12, 12, 3), np.uint8), np.zeros((12, 13, 3), np.uint8), "same size"),
        (np.zeros((10, 12, 3), np.uint8), np.zeros((10, 12, 3), np.uint8), "11 x 11"),
    ],
)
def test_unusable_images_are_refused_with_a_reason(a, b, words):
    with pytest.raises(InputError, match=words):
        st.image_metrics(a, b)

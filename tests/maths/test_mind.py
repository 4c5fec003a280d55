"""MIND, density and coverage against recorded values, closed forms and cases made by hand."""

import json

import numpy as np
import pytest
from golden_cases import shared

from ldmcli.core.errors import InputError, UsageError
from ldmcli.maths import feature_rows
from ldmcli.maths import metrics as st
from ldmcli.maths.mind import mind
from ldmcli.maths.neighbour_metrics import density_coverage

SETS = ("a", "b", "collapsed", "identical", "offset", "rank_deficient")


@pytest.fixture(scope="module")
def golden():
    return json.loads(shared("metrics", "golden_mind.json").read_text())["values"]


@pytest.fixture(scope="module")
def features():
    from safetensors.numpy import load_file

    return load_file(shared("metrics", "features.safetensors"))


def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize("name", SETS)
def test_mind_matches_the_recorded_float64_value(name, golden, features):
    value = mind(features[f"{name}.1"], features[f"{name}.2"])
    assert value == pytest.approx(golden[name]["seed2020_directions1000_float64"], rel=1e-11, abs=1e-15)


@pytest.mark.parametrize("seed, directions", [(2020, 64), (7, 64), (7, 1000)])
@pytest.mark.parametrize("name", [name for name in SETS if name != "offset"])
def test_mind_of_other_seeds_and_directions_matches_the_recorded_float32_value(
    name, seed, directions, golden, features
):
    value = mind(features[f"{name}.1"], features[f"{name}.2"], directions=directions, seed=seed)
    assert value == pytest.approx(golden[name][f"seed{seed}_directions{directions}"], rel=1e-5)


@pytest.mark.parametrize("n, d", [(200, 16), (40, 300)])
def test_a_shift_gives_three_times_its_squared_length(n, d):
    rows, shift = rng().normal(size=(n, d)), rng().normal(size=d)
    assert mind(rows + shift, rows, directions=20_000) == pytest.approx(3 * shift @ shift, rel=0.03)
    assert mind(rows, rows[::-1]) == 0


def test_mind_grows_with_the_square_of_the_scale_and_is_the_same_from_both_sides():
    a, b = rng().normal(size=(50, 6)), 1 + 2 * rng().normal(size=(50, 6))
    assert mind(3 * a, 3 * b) == pytest.approx(9 * mind(a, b), rel=1e-12)
    assert mind(a, b) == pytest.approx(mind(b, a), rel=1e-12)


def test_values_do_not_depend_on_the_size_of_blocks_nor_on_where_the_rows_lie(monkeypatch, tmp_path):
    a, b = (rng().normal(size=(n, 5)).astype(np.float32) for n in (60, 50))
    whole = st.metrics_from_features(a, b + 1, kid_subset_size=40)
    np.save(tmp_path / "a.npy", a)
    monkeypatch.setattr(feature_rows, "BLOCK", 130)
    monkeypatch.setattr(feature_rows, "TILE", 7)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    parts = st.metrics_from_features(mapped, b + 1, kid_subset_size=40)
    assert parts == {key: pytest.approx(value, rel=1e-12) for key, value in whole.items()}


def test_no_float64_copy_of_many_rows_is_made():
    tracemalloc = pytest.importorskip("tracemalloc")
    a, b = (rng().normal(size=(30_000, 64)).astype(np.float32) for _ in "ab")
    tracemalloc.start()
    st.metrics_from_features(a, b, ["fid", "kid", "mind"], kid_subsets=1, mind_directions=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < a.size * 8 + 2**25  # the kernel of one subset of KID takes 3 times 8 MB


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: mind(np.zeros((1, 4)), np.zeros((9, 4))), InputError, "generated set has 1 image:"),
        (lambda: mind(np.zeros((9, 4)), np.zeros((9, 4)), directions=0), UsageError, "0 directions"),
        (lambda: mind(np.zeros((9, 4)), np.zeros((9, 3))), InputError, "4 dimensions"),
        (lambda: st.metrics_from_features(np.zeros((9, 4)), None, ["mind", "dc"]), InputError, "mind, dc: compared"),
    ],
)
def test_unusable_arguments_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_density_counts_balls_and_coverage_the_balls_that_are_hit():
    reference = np.arange(10.0)[:, None]  # balls of k = 1 reach from x - 1 to x + 1, without these ends
    generated = np.array([[4.0], [4.5], [9.5], [100.0]])
    density, coverage = density_coverage(generated, reference, k=1)
    # 4 lies in the ball of 4 alone (its neighbours' balls end there), 4.5 in two, 9.5 in that of 9, 100 in none.
    assert density == pytest.approx((1 + 2 + 1 + 0) / 4)
    assert coverage == pytest.approx(3 / 10)


def test_density_and_coverage_of_equal_alike_and_far_sets():
    rows = rng().normal(size=(200, 4))
    assert density_coverage(rows, rows)[1] == 1.0
    assert density_coverage(rows + 100, rows) == (0.0, 0.0)
    assert density_coverage(rng().normal(size=(2000, 4))[1000:], rows)[0] == pytest.approx(1, abs=0.15)


def test_density_and_coverage_are_absent_when_a_set_has_no_fifth_neighbour():
    rows = rng().normal(size=(9, 2))
    assert density_coverage(rows[:5], rows) == density_coverage(rows, rows[:5]) == (None, None)
    assert density_coverage(rows[:6], rows)[0] is not None

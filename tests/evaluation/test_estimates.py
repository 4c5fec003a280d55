"""What stands beside numbers: intervals, floors, the extrapolated distance, and how two results compare."""

from types import SimpleNamespace

import numpy as np
import pytest
from measured import folder, npz, pictures, tiny_extractor

from ldmcli.evaluation import evaluate as module
from ldmcli.evaluation.estimates import add_of_sets, floor
from ldmcli.evaluation.evaluate import evaluate
from ldmcli.evaluation.features import FeatureSet
from ldmcli.evaluation.metrics import FEATURES, METRICS, FeatureSets, Metric
from ldmcli.evaluation.reference_statistics import Statistics
from ldmcli.evaluation.result import EvaluationResult, Scores

EXTRACTOR = SimpleNamespace(
    display="FD (eight)", title="eight", suffix="eight8", dim=8, protocol={"name": "eight", "weights_sha256": "0" * 64}
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_extractor(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(autouse=True)
def cheap(tiny, monkeypatch, tmp_path):
    """The tiny extractor in place of the real ones, and a cache of the test's own."""
    monkeypatch.setattr(module, "open_extractor", lambda name=None: tiny)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


def features(n, seed=0, shift=0.0, scale=1.0):
    rows = np.random.default_rng(seed).normal(size=(n, 8)).astype(np.float32) * scale + shift
    return FeatureSet(rows, rows.copy(), [f"{seed}-{i:05d}" for i in range(n)], {(64, 64)})


def estimates(name, generated, reference, metric=None):
    """What `evaluate` would say of a metric of sets: (estimates, metrics)."""
    metric, sets, result = metric or METRICS[name], FeatureSets(generated, reference, EXTRACTOR), EvaluationResult()
    add_of_sets(result, name, metric, sets, metric.compute(sets))
    return result.estimates, result.values


@pytest.mark.parametrize(
    "name, keys",
    [
        ("fid", ["fd_eight8"]),
        ("kid", ["kid_eight8_mean"]),
        ("mind", ["mind_eight8"]),
        ("is", ["is_eight8_mean"]),
        ("pr", ["precision_eight8", "recall_eight8"]),
        ("dc", ["density_eight8", "coverage_eight8"]),
    ],
)
def test_every_metric_of_sets_has_an_interval_that_shrinks_with_the_number_of_images(name, keys):
    widths = []
    for n in (40, 640):
        generated, reference = features(n, 1, 0.3), features(n, 2)
        values = METRICS[name].compute(FeatureSets(generated, reference, EXTRACTOR)).values
        found, _ = estimates(name, generated, reference)
        assert list(found) == keys
        for key, number in zip(keys, values.values()):
            low, high = found[key]["interval"]
            assert low <= number <= high and found[key]["network"] == "eight@000000000000" and found[key]["method"]
        widths.append(high - low)
        assert (found[key]["error_reference"] is None) == (name == "is")
    assert (1.4 if name == "dc" else 2.5) < widths[0] / widths[1] < 7  # about 4; of shares near 1 less


def test_a_metric_without_errors_of_its_own_is_measured_without_groups_of_images():
    spread = Metric(
        needs=FEATURES,
        compute=lambda sets: Scores({"spread": float(sets.generated.features.mean() - sets.reference.features.mean())}),
        label="spread",
    )
    found, _ = estimates("spread", features(400, 1), features(100, 2), spread)
    one = found["spread_eight8"]
    assert one["method"] == "jackknife of 10 groups" and one["floor"]["n_generated"] == 50
    assert one["error_generated"] == pytest.approx(1 / np.sqrt(8 * 400), rel=0.6)
    assert one["error_reference"] == pytest.approx(1 / np.sqrt(8 * 100), rel=0.6)
    few, _ = estimates("spread", features(9, 1), features(100, 2), spread)
    assert few["spread_eight8"]["interval"] is None and few["spread_eight8"]["method"] == ""


def test_the_floor_is_that_of_two_parts_of_the_reference_and_stands_beside_the_same_sizes():
    reference, generated = features(300, 2), features(80, 1, 0.4)
    one = estimates("mind", generated, reference)[0]["mind_eight8"]["floor"]
    assert (one["n_generated"], one["n_reference"], one["splits"]) == (80, 220, 5)
    assert one["value"] + 5 * one["std"] < one["here"]
    alike = estimates("mind", features(80, 3), reference)[0]["mind_eight8"]["floor"]
    assert alike["here"] == pytest.approx(alike["value"], rel=0.25)
    assert estimates("mind", generated, features(3, 2))[0]["mind_eight8"]["floor"] is None
    assert estimates("pr", generated, features(7, 2))[0]["recall_eight8"]["floor"] is None  # halves without neighbours
    assert estimates("is", generated, None)[0]["is_eight8_mean"]["floor"] is None


def test_the_order_of_files_does_not_change_the_floor():
    reference, generated = features(60, 2), features(40, 1)
    shuffled = [one.of(np.random.default_rng(4).permutation(len(one)).tolist()) for one in (generated, reference)]
    values = [
        floor(METRICS["fid"], FeatureSets(*sets, EXTRACTOR), {"fd": 1.0})["fd"]
        for sets in ((generated, reference), shuffled)
    ]
    assert values[0]["value"] == pytest.approx(values[1]["value"], rel=1e-9)
    assert values[0]["here"] == pytest.approx(values[1]["here"], rel=1e-9)


def test_the_extrapolated_distance_is_a_number_of_its_own_with_its_fit():
    found, values = estimates("fid", features(400, 1, 0.5), features(400, 2))
    beyond = found["fd_eight8"]["extrapolated"]
    assert values == {"fd_eight8_extrapolated": beyond["value"]}
    assert beyond["interval"][0] < 8 * 0.25 < beyond["interval"][1] and beyond["r2"] > 0.5
    assert beyond["points"][:2] == [[400, 400, beyond["points"][0][2]], [200, 200, beyond["points"][1][2]]]
    assert (beyond["of"], beyond["note"]) == ("both", "")
    few = estimates("fid", features(12, 1), features(400, 2))[0]["fd_eight8"]["extrapolated"]
    assert few["interval"][0] == 0 and "upper bound" in few["note"]


def test_a_reference_of_statistics_alone_has_neither_floor_nor_an_error_of_its_own():
    statistics = Statistics(mu=np.zeros(8), sigma=np.eye(8), n=5000, source="b.npz")
    one = estimates("fid", features(200, 1), statistics)[0]["fd_eight8"]
    assert one["floor"] is None and one["error_reference"] is None and one["error_generated"] > 0
    assert "mean and covariance" in one["method"] and one["extrapolated"]["of"] == "generated"


@pytest.mark.parametrize("n", [2, 3, 6])
def test_very_few_images_have_an_answer(n):
    for name in ("fid", "kid", "mind", "pr", "dc"):
        for one in estimates(name, features(n, 1), features(n, 2))[0].values():
            assert one["interval"] is None or one["interval"][0] <= one["interval"][1]


def test_means_over_images_have_the_interval_of_student_within_the_bounds_of_the_metric(tmp_path):
    made, real = pictures(12, 1), pictures(12, 2)
    made[:2] = real[:2]  # infinite PSNR
    result = evaluate(pairs=(npz(tmp_path / "a.npz", made), npz(tmp_path / "b.npz", real)), metrics=["psnr", "ssim"])
    low, high = result["estimates"]["psnr"]["interval"]
    assert high - low == pytest.approx(2 * 2.262157 * result["metrics"]["psnr_std"] / 3, rel=1e-5)
    assert result["estimates"]["psnr"]["method"] == "exact (t)" and result["estimates"]["psnr"]["floor"] is None
    assert result["estimates"]["ssim"]["interval"][1] <= 1 and list(result["estimates"]) == ["psnr", "ssim"]


def test_a_document_has_estimates_of_its_values_and_none_of_what_stands_beside(tmp_path):
    result = evaluate(images=folder(tmp_path / "a", pictures(30, 1)), data=npz(tmp_path / "b.npz", pictures(40, 2)))
    assert list(result["estimates"]) == ["fd_tiny8", "kid_tiny8_mean", "mind_tiny8"]
    assert {"fd_tiny8_extrapolated", "kid_tiny8_std"} < set(result["metrics"])
    assert "infinitely many" in result["labels"]["fd_tiny8_extrapolated"]

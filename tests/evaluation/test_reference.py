"""The reference of an evaluation: how many rows, statistics that are kept, and files with images beside statistics."""

import numpy as np
import pytest
import tiny as commands
from measured import Model, Rows, folder, npz, pictures, tiny_extractor

from ldmcli.core.errors import InputError, UsageError
from ldmcli.evaluation import evaluate as module
from ldmcli.evaluation import measure, reference_statistics, references
from ldmcli.evaluation.evaluate import evaluate
from ldmcli.evaluation.reference_statistics import gaussian

ALL_METRICS = ["fid", "kid", "is", "pr"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_extractor(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(autouse=True)
def cheap(tiny, monkeypatch, tmp_path):
    """A tiny extractor, ten rows as the bound on a reference, chunks of four, and a data set of 25 rows called made."""
    monkeypatch.setattr(module, "open_extractor", lambda name=None: tiny)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    for where in (references, measure):
        monkeypatch.setattr(where, "REFERENCE_LIMIT", 10)
    monkeypatch.setattr(reference_statistics, "KEPT", 10)
    monkeypatch.setattr(reference_statistics, "CHUNK", 4)
    monkeypatch.setattr(references, "open_reference", lambda settings, split: (Rows(pictures(25, 9)), 0))


@pytest.fixture
def generated(tmp_path):
    return folder(tmp_path / "a", pictures(12))


def numbers(found):
    return found["metrics"], found["n_reference"], found["reliable"]


@pytest.mark.parametrize("count, rows, warned", [(None, 10, True), ("all", 25, False), (7, 7, False), (15, 15, False)])
def test_the_reference_has_as_many_rows_as_asked_for(generated, tiny, count, rows, warned):
    found = evaluate(images=generated, data="made", reference_count=count, metrics=ALL_METRICS)
    assert found["n_reference"] == rows
    assert warned == any("10 of 25 rows" in text for text in found["warnings"])
    images = Rows(pictures(25, 9)).images[[k * 25 // rows for k in range(rows)]]
    known = [gaussian(tiny.features(each)) for each in (pictures(12), images)]
    expected = reference_statistics_distance(*known)
    assert found["metrics"]["fd_tiny8"] == pytest.approx(expected, rel=1e-8)
    assert found.get("reference_features", {"rows": rows})["rows"] == min(rows, 10)


def reference_statistics_distance(a, b):
    from ldmcli.maths.metrics import frechet

    return frechet(a.mean, a.covariance, b.mean, b.covariance)


@pytest.mark.parametrize("subject", ["images", "model"])
@pytest.mark.parametrize("count", [None, 7, "all"])
def test_saved_statistics_give_the_same_numbers_bit_for_bit(generated, tmp_path, subject, count):
    measured = {"images": generated} if subject == "images" else {"model": Model(()), "n": 12}
    how = {**measured, "metrics": ALL_METRICS}
    plain = evaluate(**how, data="made", reference_count=count)
    saving = evaluate(**how, data="made", reference_count=count, save_statistics=tmp_path / "stats.npz")
    known = evaluate(**how, data=tmp_path / "stats.npz")
    assert numbers(plain) == numbers(saving) == numbers(known)
    assert known["reference"]["of"] == plain["reference"] and saving["saved_statistics"].endswith("stats.npz")


def test_paired_evaluations_keep_the_statistics_of_the_originals(tmp_path):
    sides = [folder(tmp_path / name, pictures(9, seed)) for seed, name in enumerate("ab")]
    found = evaluate(pairs=sides, metrics=["fid"], save_statistics=tmp_path / "b.npz")
    assert evaluate(images=sides[0], data=tmp_path / "b.npz", metrics=["fid"])["metrics"] == found["metrics"]


def test_a_sample_set_with_statistics_is_used_for_what_each_part_gives(generated, tmp_path, tiny):
    """As the reference files of guided-diffusion: statistics of many images, and some of the images."""
    many, some = pictures(40, 3), pictures(40, 3)[:9]
    moments = gaussian(tiny.features(many))
    spatial = {"mu_s": np.zeros(4), "sigma_s": np.eye(4)}
    np.savez(tmp_path / "both.npz", arr_0=some, mu=moments.mean, sigma=moments.covariance, **spatial)
    found = evaluate(images=generated, data=tmp_path / "both.npz", metrics=["fid", "kid", "pr"])
    whole = evaluate(images=generated, data=npz(tmp_path / "many.npz", many))
    rows = evaluate(images=generated, data=npz(tmp_path / "some.npz", some), metrics=["kid", "pr"])
    assert found["metrics"]["fd_tiny8"] == pytest.approx(whole["metrics"]["fd_tiny8"], rel=1e-9)
    assert {key: found["metrics"][key] for key in rows["metrics"]} == rows["metrics"]
    assert found["reference_features"] == {"rows": 9}
    few = evaluate(images=generated, data=tmp_path / "both.npz", metrics=["kid"], reference_count=5)
    assert few["reference_features"] == {"rows": 5}


def test_statistics_of_another_network_beside_images_leave_the_images(generated, tmp_path):
    np.savez(tmp_path / "both.npz", arr_0=pictures(9, 3), mu=np.zeros(2048), sigma=np.eye(2048))
    found = evaluate(images=generated, data=tmp_path / "both.npz")
    assert found["n_reference"] == 9 and any("another network" in text for text in found["warnings"])
    assert numbers(found) == numbers(evaluate(images=generated, data=npz(tmp_path / "b.npz", pictures(9, 3))))


@pytest.mark.parametrize(
    "request_, error, words",
    [
        ({"reference_count": 26}, InputError, "25 rows, but --reference-count asks for 26"),
        ({"reference_count": 1}, UsageError, "from 2 on"),
        ({"reference_count": "some"}, UsageError, "from 2 on"),
        ({"save_statistics": "stats.txt"}, UsageError, "ends in .npz"),
        ({"save_statistics": "own.npz"}, UsageError, "not written by ldm"),
        ({"save_statistics": "broken.npz"}, UsageError, "not written by ldm"),
        ({"save_statistics": "data.npz", "data": "data.npz"}, UsageError, "is an input"),
        ({"save_statistics": "new.npz", "data": None, "metrics": ["is"]}, UsageError, "needs a reference"),
        ({"data": "moments.npz", "reference_count": 7}, UsageError, "statistics of 12 images"),
    ],
)
def test_what_has_no_sense_is_refused_before_anything_is_measured(
    generated, tmp_path, monkeypatch, request_, error, words
):
    monkeypatch.chdir(tmp_path)
    npz("own.npz", pictures(4))
    npz("data.npz", pictures(4))
    (tmp_path / "broken.npz").write_bytes(b"PK")
    np.savez("moments.npz", mu=np.zeros(8), sigma=np.eye(8), n=12)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")}
    with pytest.raises(error, match=words):
        evaluate(**{"images": generated, "data": "made", **request_})
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")} == before


def test_pairs_have_no_number_of_reference_rows(tmp_path):
    with pytest.raises(UsageError, match="one by one"):
        evaluate(pairs=("a", "b"), reference_count=4)


def test_statistics_are_replaced_by_later_ones(generated, tmp_path):
    for count in (4, 6):
        evaluate(images=generated, data="made", reference_count=count, save_statistics=tmp_path / "s.npz")
    assert evaluate(images=generated, data=tmp_path / "s.npz")["n_reference"] == 6


def test_the_command_takes_both_options(generated, tmp_path):
    reference = npz(tmp_path / "b.npz", pictures(9, 3))
    words = ("eval-fid", "--images", generated, "--json")
    first = commands.ldm(*words, "--data", reference, "--reference-count", 5, "--save-statistics", tmp_path / "s.npz")
    assert first.code == 0, first.stderr
    second = commands.ldm(*words, "--data", tmp_path / "s.npz")
    assert second.json["metrics"] == first.json["metrics"] and second.json["n_reference"] == 5
    assert commands.ldm(*words, "--data", reference, "--reference-count", "few").code == 2

"""Evaluation end to end on tiny sets: what is measured, what the result states, and what is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_cases import shared, squeezenet
from measured import Autoencoder, Model, Rows, folder, npz, pictures, tiny_extractor
from PIL import Image
from safetensors.torch import load_file

from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DataSettings
from ldmcli.data.rows import evenly_spaced
from ldmcli.evaluation import evaluate as module
from ldmcli.evaluation import extractors, features
from ldmcli.evaluation.compare import compare, lookup
from ldmcli.evaluation.evaluate import evaluate
from ldmcli.evaluation.metrics import reconstruction_metrics
from ldmcli.evaluation.reference_statistics import gaussian, write_statistics
from ldmcli.maths.metrics import frechet_from_features


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_extractor(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(autouse=True)
def cheap(tiny, monkeypatch, tmp_path):
    """The tiny extractor in place of the real ones, and a cache of the test's own."""
    monkeypatch.setattr(module, "open_extractor", lambda name=None: tiny)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows(monkeypatch):
    found = Rows(pictures(12, seed=9))
    monkeypatch.setattr(
        "ldmcli.evaluation.references.open_reference", lambda settings, split: (replace(found, split=split), 0)
    )
    return found


# --- sets ------------------------------------------------------------------------------------------------------


def test_a_set_against_itself_has_distance_zero_and_is_called_a_copy(tmp_path):
    generated = folder(tmp_path / "a", pictures(12))
    result = evaluate(images=generated, data=npz(tmp_path / "b.npz", pictures(12)))
    assert abs(result["metrics"]["fd_tiny8"]) < 1e-9
    assert any("12 generated images are exact copies" in text for text in result["warnings"])


def test_the_distance_is_that_of_the_features_and_carries_the_extractor_in_its_name(tmp_path, tiny):
    first, second = pictures(14, 1), pictures(11, 2)
    result = evaluate(images=folder(tmp_path / "a", first), data=npz(tmp_path / "b.npz", second))
    expected = frechet_from_features(tiny.features(first), tiny.features(second))
    keys = ["fd_tiny8", "fd_tiny8_extrapolated", "kid_tiny8_mean", "kid_tiny8_std", "mind_tiny8"]
    assert list(result["metrics"]) == keys
    assert result["metrics"]["fd_tiny8"] == pytest.approx(expected, rel=1e-9) and expected > 0
    assert result["labels"]["fd_tiny8"] == "FD (tiny)" and "fid" not in result["metrics"]
    assert (result["n_generated"], result["n_reference"], result["reliable"]) == (14, 11, True)
    assert result["extractor"] == tiny.protocol and result["covariance_divisor"] == "n - 1"


def test_a_folder_of_png_and_an_npz_give_the_same_numbers(tmp_path):
    images, other = pictures(12, 1), npz(tmp_path / "b.npz", pictures(12, 2))
    results = [
        evaluate(images=source, data=other, metrics=["fid", "kid", "pr", "is"])["metrics"]
        for source in (folder(tmp_path / "a", images), npz(tmp_path / "a.npz", images))
    ]
    assert results[0] == results[1]
    assert {"fd_tiny8", "kid_tiny8_mean", "precision_tiny8", "recall_tiny8", "is_tiny8_mean"} <= set(results[0])


def test_contact_sheets_and_hidden_files_are_not_measured(tmp_path):
    generated = folder(tmp_path / "a", pictures(4))
    Image.new("RGB", (99, 99)).save(generated / "grid.png")
    Image.new("RGB", (99, 99)).save(generated / ".hidden.png")
    assert evaluate(images=generated, data=npz(tmp_path / "b.npz", pictures(4, 1)))["n_generated"] == 4


def test_jpeg_on_one_side_mixed_sizes_and_duplicates_are_flagged(tmp_path):
    images = [*pictures(5, 1), *pictures(1, 2, size=24), pictures(5, 1)[0]]
    generated = folder(tmp_path / "a", images)
    Image.fromarray(images[0]).save(generated / "z.jpg")
    text = " | ".join(evaluate(images=generated, data=npz(tmp_path / "b.npz", pictures(6, 3)))["warnings"])
    assert "only the generated images are JPEG" in text
    assert "sizes differ: generated 16x16, 24x24, reference 16x16" in text
    assert "1 exact duplicates among the generated images" in text


def test_fewer_images_than_dimensions_are_unreliable_and_fewer_than_two_an_error(tmp_path):
    other = npz(tmp_path / "b.npz", pictures(6, 3))
    result = evaluate(images=folder(tmp_path / "a", pictures(5)), data=other)
    assert not result["reliable"] and any("5 generated images for 8 dimensions" in text for text in result["warnings"])
    with pytest.raises(InputError, match="1 generated image: a distribution needs at least 2"):
        evaluate(images=folder(tmp_path / "c", pictures(1)), data=other)
    with pytest.raises(InputError, match="5 images, but -n asks for 6"):
        evaluate(images=tmp_path / "a", data=other, n=6)


def test_precision_and_inception_score_of_too_few_images_are_null_with_a_reason(tmp_path):
    result = evaluate(
        images=folder(tmp_path / "a", pictures(3)), data=npz(tmp_path / "b.npz", pictures(9, 1)), metrics=["pr", "is"]
    )
    assert result["metrics"]["precision_tiny8"] is None and result["metrics"]["is_tiny8_mean"] is None
    text = " | ".join(result["warnings"])
    assert "no more than 3 images" in text and "3 images for 10 splits" in text


def test_the_size_of_kid_subsets_is_stated(tmp_path):
    result = evaluate(
        images=folder(tmp_path / "a", pictures(7)), data=npz(tmp_path / "b.npz", pictures(9, 1)), metrics=["kid"]
    )
    assert result["kid"]["subset_size"] == 7 and result["frechet"] is None


def test_pickled_and_misshapen_npz_files_are_refused(tmp_path):
    np.savez(tmp_path / "evil.npz", arr_0=np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "planes.npz", arr_0=np.zeros((4, 3, 16, 16), np.uint8))
    np.savez(tmp_path / "other.npz", images=np.zeros((4, 16, 16, 3), np.uint8))
    for name, words in (("evil", "arr_0 is"), ("planes", r"uint8 \(N, H, W, 3\)"), ("other", "no arr_0")):
        with pytest.raises(InputError, match=words):
            evaluate(images=tmp_path / f"{name}.npz", data=npz(tmp_path / "b.npz", pictures(4)))


# --- references ------------------------------------------------------------------------------------------------


def test_a_statistics_file_is_as_good_as_its_images(tmp_path, tiny):
    generated, reference = folder(tmp_path / "a", pictures(12)), pictures(15, 4)
    found = gaussian(tiny.features(reference))
    np.savez(tmp_path / "stats.npz", mu=found.mean, sigma=found.covariance, n=15)
    known = evaluate(images=generated, data=tmp_path / "stats.npz")
    direct = evaluate(images=generated, data=npz(tmp_path / "b.npz", reference))
    assert known["metrics"]["fd_tiny8"] == pytest.approx(direct["metrics"]["fd_tiny8"], rel=1e-9)
    assert known["n_reference"] == 15
    with pytest.raises(InputError, match="needs the images of the reference"):
        evaluate(images=generated, data=tmp_path / "stats.npz", metrics=["kid"])


def test_statistics_of_another_extractor_are_refused(tmp_path, tiny):
    generated = folder(tmp_path / "a", pictures(12))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(InputError, match="another extractor"):
        evaluate(images=generated, data=tmp_path / "wide.npz")
    changed = SimpleNamespace(protocol=tiny.protocol | {"resize": "box"})
    write_statistics(tmp_path / "box.npz", features.extract(pictures(12), tiny), changed, {})
    with pytest.raises(InputError, match=r"another extractor \(resize\)"):
        evaluate(images=generated, data=tmp_path / "box.npz")


def test_a_reference_is_computed_once_and_again_when_its_content_changes(tmp_path, rows, tiny, monkeypatch):
    generated, seen = folder(tmp_path / "a", pictures(10)), []
    found = tiny.features_and_logits
    monkeypatch.setattr(tiny, "features_and_logits", lambda images: seen.append(len(images)) or found(images))
    results, counts = [], []
    for _ in range(2):
        seen.clear()
        results.append(evaluate(images=generated, data="made"))
        counts.append(sum(seen))
    assert counts == [22, 10]
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["warnings"] == results[1]["warnings"]
    seen.clear()
    rows.images[3, 0, 0] ^= 1
    assert evaluate(images=generated, data="made")["reference"]["fingerprint"] != results[0]["reference"]["fingerprint"]
    assert sum(seen) == 22


def test_the_result_states_source_split_and_resize_of_the_reference(tmp_path, rows):
    stated = evaluate(images=folder(tmp_path / "a", pictures(10, size=20)), data="made", split="train")["reference"]
    assert (stated["source"], stated["split"], stated["rows"]) == ("made", "train", 12)
    assert "20x20" in stated["resize"] and "bicubic" in stated["resize"]


def test_a_data_set_in_a_folder_is_a_reference(tmp_path, monkeypatch):
    folder(tmp_path / "set" / "train", pictures(4))
    folder(tmp_path / "set" / "validation", pictures(9, 5))
    result = evaluate(images=folder(tmp_path / "a", pictures(10)), data=str(tmp_path / "set"))
    assert result["n_reference"] == 9 and np.isfinite(result["metrics"]["fd_tiny8"])


@pytest.mark.parametrize(
    ("there", "named", "counts"),
    [
        ({"train": 4, "validation": 9}, "validation", 9),
        ({"train": 4, "validation": 9}, "train", 4),
        ({"validation": 9}, "validation", 9),
        ({"train": 12, "test": 11}, "test", 11),
    ],
)
def test_a_named_split_is_measured_whole(there, named, counts, tmp_path):
    """All of it, though training on it would hold rows out."""
    for split, n in there.items():
        folder(tmp_path / "set" / split, pictures(n, n))
    data = DataSettings(source=str(tmp_path / "set"), split=named)
    result = evaluate(images=folder(tmp_path / "a", pictures(10)), data=data, split=named)
    assert result["n_reference"] == counts


# --- models ----------------------------------------------------------------------------------------------------


def test_prompts_are_spread_evenly_over_the_reference_and_each_sample_is_drawn_once(rows):
    model = Model(("text", "class"))
    result = evaluate(model=model, data="made", n=6, batch_size=4, seed=3, steps=7, guidance=2.0)
    assert [call["first"] for call in model.calls] == [0, 4] and model.calls[-1]["total"] == 6
    prompts = [[f"caption {i}" for i in rows] for rows in ((0, 2, 4, 6), (8, 10))]
    assert [call["prompts"] for call in model.calls] == prompts, "no prompt is read twice"
    assert model.calls[-1]["classes"] == ["one"] * 2
    assert model.calls[0]["steps"] == 7 and "sampler" not in model.calls[0]
    assert result["sampling"] == {
        "sampler": "dpm++",
        "steps": 7,
        "guidance": 2.0,
        "guidance_interval": (0.0, 1.0),
        "eta": 0.0,
        "temperature": 1.0,
        "spacing": "",
        "seed": 3,
    }
    assert result["generated"]["fingerprint"] == model.fingerprint and result["n_generated"] == 6


@pytest.mark.parametrize("kinds", [(), ("text",)])
def test_a_models_numbers_do_not_depend_on_the_batch_size(rows, kinds):
    one, many = (evaluate(model=Model(kinds), data="made", n=5, batch_size=b)["metrics"] for b in (1, 64))
    assert one == many


def test_rows_repeat_evenly_where_more_images_are_drawn_than_there_are_rows():
    assert evenly_spaced(3, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert evenly_spaced(10, 5) == [0, 2, 4, 6, 8]
    assert evenly_spaced(4, 4) == [0, 1, 2, 3]


def test_without_a_named_reference_the_models_own_data_is_taken(rows):
    result = evaluate(model=Model(), n=4)
    assert result["reference"]["source"] == "made" and result["n_reference"] == 12


def test_missing_weights_end_the_command_before_anything_is_drawn(rows, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "open_extractor", extractors.open_extractor)
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("LDM_OFFLINE", "1")
    model = Model()
    with pytest.raises(InputError, match="6726825d"):
        evaluate(model=model, data="made", features="inception")
    with pytest.raises(InputError, match="vgg16-397923af.pth"):
        evaluate(autoencoder=Autoencoder(), data="made", metrics=["lpips"])
    assert model.calls == []


# --- pairs and reconstructions ---------------------------------------------------------------------------------


def test_pairs_of_folders_have_the_recorded_psnr_and_ssim(tmp_path):
    arrays = load_file(shared("metrics", "pairs.safetensors"))
    recorded = json.loads(shared("metrics", "golden.json").read_text())["images"]["rows"][:8]
    sides = [folder(tmp_path / side, [arrays[f"{i:02d}.{side}"].numpy() for i in range(8)]) for side in "ab"]
    found = evaluate(pairs=sides)
    psnrs = [row["psnr_skimage_range255"] for row in recorded if row["psnr_skimage_range255"] is not None]
    assert found["metrics"]["psnr"] == pytest.approx(np.mean(psnrs), abs=1e-9)
    assert found["metrics"]["psnr_std"] == pytest.approx(np.std(psnrs), abs=1e-9)
    assert found["metrics"]["ssim"] == pytest.approx(np.mean([row["ssim_wang_valid"] for row in recorded]), abs=1e-7)
    assert found["metrics"].get("psnr_equal_images", 0) == 8 - len(psnrs)
    assert found["extractor"] is None and found["n_generated"] == 8


def test_pairs_share_their_relative_path_whatever_the_file_type(tmp_path):
    images = pictures(3)
    first, second = folder(tmp_path / "a", images), folder(tmp_path / "b", images, ".bmp")
    assert evaluate(pairs=(first, second), metrics=["psnr"])["metrics"]["psnr_equal_images"] == 3
    (second / "000001.bmp").rename(second / "other.bmp")
    with pytest.raises(InputError, match=r"000001.png: has no partner"):
        evaluate(pairs=(first, second), metrics=["psnr"])


def test_pairs_of_different_size_are_refused(tmp_path):
    first, second = folder(tmp_path / "a", pictures(2)), folder(tmp_path / "b", pictures(2, size=20))
    with pytest.raises(InputError, match="same size"):
        evaluate(pairs=(first, second), metrics=["psnr"])


def test_equal_images_have_infinite_psnr(tmp_path):
    first, second = folder(tmp_path / "a", pictures(2)), folder(tmp_path / "b", pictures(2))
    found = evaluate(pairs=(first, second), metrics=["psnr", "ssim"])["metrics"]
    assert found["psnr"] == float("inf") and found["psnr_equal_images"] == 2 and found["ssim"] == pytest.approx(1)


def test_reconstructions_are_measured_image_by_image_and_as_a_set(rows):
    rows.images = np.maximum(rows.images, 8)
    found = evaluate(autoencoder=Autoencoder(), data="made", n=6, size=(16, 16), batch_size=4)
    assert found["metrics"]["psnr"] == pytest.approx(20 * np.log10(255 / 8), abs=1e-6)
    assert found["metrics"]["psnr_std"] == pytest.approx(0, abs=1e-6)
    assert found["metrics"]["fd_tiny8"] > 0 and 0 < found["metrics"]["ssim"] < 1
    assert (found["n_generated"], found["n_reference"]) == (6, 6)
    assert found["generated"]["autoencoder"] == "a" * 64


class MeanDifference(torch.nn.BatchNorm2d):
    """Stands in for LPIPS; a module with buffers, as that is."""

    kind, origin = "mean", "none"

    def __init__(self):
        super().__init__(3)

    def forward(self, x, y):
        return (x - y).abs().mean((1, 2, 3), keepdim=True)


def test_lpips_of_pairs_is_a_mean_over_images_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("ldmcli.evaluation.evaluate.perceptual_net", lambda name: MeanDifference())
    a = [np.full((16, 16, 3), 100, np.uint8), np.full((20, 16, 3), 100, np.uint8)]
    b = [a[0] + np.uint8(51), a[1] + np.uint8(102)]
    found = evaluate(pairs=(folder(tmp_path / "a", a), folder(tmp_path / "b", b)), metrics=["lpips"])
    assert found["metrics"]["lpips_mean"] == pytest.approx((0.4 + 0.8) / 2)
    assert found["lpips"]["net"] == "mean"


def test_the_measure_during_training_is_that_of_the_command(rows, tiny):
    real = np.maximum(pictures(6), 8)
    found = reconstruction_metrics(real, real - 8, perceptual=MeanDifference(), extractor=tiny)
    assert found["psnr"] == pytest.approx(20 * np.log10(255 / 8), abs=1e-6)
    assert found["perceptual"] == pytest.approx(8 / 127.5, rel=1e-4)
    assert found["fd_tiny8"] == pytest.approx(frechet_from_features(tiny.features(real - 8), tiny.features(real)))
    assert set(found) == {"psnr", "ssim", "perceptual", "fd_tiny8"}
    assert set(reconstruction_metrics(real[:, :8, :8], real[:, :8, :8])) == {"psnr"}


# --- requests and comparisons ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_, words",
    [
        ({}, "measure one of"),
        ({"images": "a", "model": "b", "data": "c"}, "got model and images"),
        ({"images": "a"}, "name the reference"),
        ({"images": "a", "data": "b", "metrics": ["psnr"]}, "compares image with image"),
        ({"images": "a", "data": "b", "metrics": ["fdi"]}, "choose among fid"),
    ],
)
def test_requests_without_sense_are_refused(request_, words):
    with pytest.raises(UsageError, match=words):
        evaluate(**request_)


def test_metrics_are_found_by_their_short_names(tmp_path):
    result = evaluate(
        images=folder(tmp_path / "a", pictures(12)),
        data=npz(tmp_path / "b.npz", pictures(12, 1)),
        metrics=["fid", "kid", "pr"],
    )
    values = result["metrics"]
    assert lookup(result) == lookup(result, "fid") == lookup(result, "fd_tiny8") == ("fd_tiny8", values["fd_tiny8"])
    assert lookup(result, "kid")[0] == lookup(result, "kid_mean")[0] == "kid_tiny8_mean"
    assert lookup(result, "kid_std")[0] == "kid_tiny8_std" and lookup(result, "recall")[0] == "recall_tiny8"
    with pytest.raises(UsageError, match="psnr: not measured"):
        lookup(result, "psnr")


def test_a_comparison_names_what_got_worse_and_refuses_another_extractor(tmp_path):
    reference, generated = npz(tmp_path / "b.npz", pictures(12, 1)), folder(tmp_path / "a", pictures(12, 1) // 2)
    old = evaluate(images=reference, data=reference, metrics=["fid"])
    (tmp_path / "old.json").write_text(json.dumps(old))
    new = evaluate(images=generated, data=reference, metrics=["fid"], compare=tmp_path / "old.json")
    assert new["worse"] == ["fd_tiny8"] and new["compared"]["fd_tiny8"]["change"] > 0
    assert compare(old, new)["worse"] == [] and compare(old, old)["worse"] == []
    other = old | {"extractor": old["extractor"] | {"weights_sha256": "0"}}
    with pytest.raises(InputError, match="another extractor"):
        compare(new, other)
    with pytest.raises(InputError, match="not a readable result"):
        evaluate(images=generated, data=reference, compare=tmp_path / "b.npz")


def test_higher_is_better_for_psnr():
    old, new = {"metrics": {"psnr": 30.0, "lpips_vgg": 0.2}}, {"metrics": {"psnr": 29.0, "lpips_vgg": 0.1}}
    assert compare(new, old)["worse"] == ["psnr"] and compare(old, new)["worse"] == ["lpips_vgg"]


def test_another_sample_count_is_said_in_a_comparison():
    old = {"metrics": {"psnr": 30.0}, "n_generated": 5}
    assert compare(old | {"n_generated": 9}, old)["warnings"] == ["n_generated (5 then, 9 now)"]


def test_the_network_of_lpips_is_chosen_by_its_file(tmp_path):
    import tiny

    weights = squeezenet(tmp_path / "backbone.safetensors")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / name / "0.png")
    pair = ("eval-fid", "--pairs", tmp_path / "a", tmp_path / "b", "--metrics", "lpips", "--perceptual")
    ending = tiny.ldm(*pair, weights, "--json")
    assert ending.code == 0, ending.stderr
    assert ending.json["metrics"]["lpips_squeeze"] > 0.1
    assert tiny.ldm(*pair, tmp_path / "none.safetensors").code == 3

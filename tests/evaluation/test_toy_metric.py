"""A metric is an entry of `METRICS` and nothing else: a toy one is asked for, measured, compared and limited."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from ldmcli.cli.measure import METRICS_HELP
from ldmcli.evaluation.compare import compare, higher_is_better, read_key
from ldmcli.evaluation.metrics import IMAGES, METRICS, OF_EACH, PAIRS, Metric, report_title


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Brightness of each image, and the greatest difference of a pair, in grey levels."""
    brightness = Metric(
        needs=IMAGES,
        compute=lambda images: [float(image.mean()) for image in images],
        label="brightness (grey levels)",
        better="higher",
    )
    difference = Metric(
        needs=PAIRS,
        compute=lambda made, real: [float(np.abs(a * 1.0 - b).max()) for a, b in zip(made, real)],
        label="greatest difference",
    )
    monkeypatch.setitem(METRICS, "brightness", brightness)
    monkeypatch.setitem(METRICS, "difference", difference)


@pytest.fixture
def greys(tmp_path):
    """Two folders of grey pictures: 100 and 110, 103 and 109."""
    for name, levels in (("a", (100, 110)), ("b", (103, 109))):
        (tmp_path / name).mkdir()
        for k, level in enumerate(levels):
            Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(tmp_path / name / f"{k}.png")
    return tmp_path / "a", tmp_path / "b"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    run = tmp_path_factory.mktemp("toy") / "run"
    tiny.train_ldm(run, "none", data=("--data", "shapes", "--limit", 8, "--size", "16x16"), steps=1)
    return run


def test_images_need_no_reference_for_it(greys):
    ending = tiny.ldm("eval-fid", "--images", greys[0], "--metrics", "brightness", "--json")
    assert ending.code == 0, ending.stderr
    assert ending.json["metrics"] == {"brightness": 105, "brightness_std": 5}
    assert ending.json["labels"]["brightness_std"] == "brightness (grey levels), deviation over images"
    assert (ending.json["n_generated"], ending.json["extractor"]) == (2, None)


def test_samples_of_a_model_have_it(model):
    words = ("eval-fid", "--model", model, "--metrics", "brightness", "-n", 4, "--steps", 1)
    ending = tiny.ldm(*words)
    assert ending.code == 0, ending.stderr
    assert "brightness (grey levels)" in ending.stdout and "n = 4 measured" in ending.stdout
    assert 0 <= tiny.ldm(*words, "--json").json["metrics"]["brightness"] <= 255


def test_pairs_have_it_beside_the_others(greys):
    ending = tiny.ldm("eval-fid", "--pairs", *greys, "--metrics", "difference,psnr,brightness", "--json")
    assert ending.code == 0, ending.stderr
    values = ending.json["metrics"]
    assert list(values) == ["psnr", "psnr_std", "brightness", "brightness_std", "difference", "difference_std"]
    assert (values["difference"], values["brightness"]) == (2, 105)


@pytest.mark.parametrize("limit, code", [(104, 8), (105, 0)])
def test_a_limit_holds_for_it(greys, limit, code):
    words = ("eval-fid", "--images", greys[0], "--metrics", "brightness", "--fail-above", f"brightness={limit}")
    ending = tiny.ldm(*words)
    assert ending.code == code and ("brightness = 105 is above 104" in ending.stderr) == bool(code)


def test_a_misspelt_limit_is_refused_before_anything_is_measured(greys):
    ending = tiny.ldm("eval-fid", "--images", greys[0], "--fail-above", "brightnes=1")
    assert ending.code == 2 and "did you mean brightness?" in ending.line


@pytest.mark.parametrize("old, code", [(120, 8), (90, 0)])
def test_a_comparison_knows_which_way_it_is_better(greys, tmp_path, old, code):
    (tmp_path / "old.json").write_text(json.dumps({"metrics": {"brightness": old, "brightness_std": 0}}))
    words = ("eval-fid", "--images", greys[0], "--metrics", "brightness", "--compare", tmp_path / "old.json", "--json")
    ending = tiny.ldm(*words)
    assert ending.code == code, ending.stderr
    assert list(ending.json["compared"]) == ["brightness"]


def test_a_model_without_pairs_is_refused_a_metric_of_pairs(greys):
    ending = tiny.ldm("eval-fid", "--images", greys[0], "--data", "shapes", "--metrics", "difference")
    assert ending.code == 2 and "--metrics difference: compares image with image" in ending.line


def test_a_training_measures_as_before(tmp_path):
    tiny.train_ae(tmp_path / "ae", "--eval-every", 2, "--set", "train.eval_frechet=false", steps=2)
    assert {"psnr", "ssim"} <= tiny.state(tmp_path / "ae")["metrics"].keys()
    assert "brightness" not in tiny.state(tmp_path / "ae")["metrics"]


def test_a_report_calls_it_by_its_label():
    assert report_title("brightness") == ("brightness", METRICS["brightness"])


# --- the table itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, metric, beside",
    [
        ("fid_inception2048", "fid", False),
        ("fd_effnet_lite0_bicubic", "fid", True),
        ("kid_effnet_lite0_mean", "kid", False),
        ("kid_effnet_lite0_std", "kid", True),
        ("recall_effnet_lite0", "pr", False),
        ("is_tiny8_std", "is", True),
        ("psnr", "psnr", False),
        ("psnr_equal_images", "psnr", True),
        ("psnr_unguided", "psnr", False),
        ("ssim_smooth", "ssim", True),
        ("lpips_vgg_std", "lpips", True),
        ("layout_found", "layout", False),
        ("layout_found_shuffled", "layout", True),
        ("map_miou_real", "map", True),
    ],
)
def test_every_key_of_a_result_is_found_in_the_table(key, metric, beside):
    assert read_key(key) == (METRICS[metric], beside)


def test_more_is_better_where_the_table_says_so():
    better = {"psnr", "ssim", "precision_x", "recall_x", "is_x_mean", "layout_iou", "map_miou", "brightness"}
    assert all(map(higher_is_better, better))
    assert not any(map(higher_is_better, ("fid_x", "fd_x", "kid_x_mean", "lpips_vgg", "difference", "unheard_of")))
    old = {"metrics": {"precision_x": 0.5, "kid_x_mean": 0.5}}
    assert compare({"metrics": {"precision_x": 0.4, "kid_x_mean": 0.4}}, old)["worse"] == ["precision_x"]


def test_the_help_names_every_metric_that_comes_with_the_program():
    toys = {"brightness", "difference"}
    assert all(f"{name}" in METRICS_HELP for name in METRICS.keys() - toys)
    assert all(METRICS[name].needs in OF_EACH for name in toys)

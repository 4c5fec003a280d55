"""Inpainting as the paper measures it: kinds of masks and files, whole pictures, plain composites, parts by share."""

import numpy as np
import pytest
import tiny as commands
from measured import tiny_extractor
from PIL import Image

from ldmcli.evaluation import baselines
from ldmcli.evaluation import evaluate as module
from ldmcli.evaluation.measure import share_groups
from ldmcli.sampling.load import load


@pytest.fixture(scope="module")
def model(tiny_runs):
    return tiny_runs["inpaint"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_extractor(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(autouse=True)
def cheap(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "open_extractor", lambda name=None: tiny)
    monkeypatch.setattr(baselines, "has_biharmonic", lambda: False)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path):
    commands.noisy_images(tmp_path / "photos", 6)
    return tmp_path / "photos"


def evaluated(model, photos, *more, code=0):
    words = ("--data", photos, "--split", "all", "-n", 6, "--steps", 1, "--metrics", "fid,psnr", "--json")
    ending = commands.ldm("eval-fid", "--model", model, *words, *more)
    assert ending.code == code, ending.stderr
    return ending.json if code == 0 else ending.line


def masks(folder, names, sides):
    folder.mkdir()
    for name, side in zip(names, sides):
        mask = np.zeros((20, 20), np.uint8)
        mask[:side, :side] = 255
        Image.fromarray(mask).save(folder / f"{name}.png")
    return folder


SIDES = (4, 8, 10, 12, 13, 18)  # 4, 16, 25, 36, 42, 81 % of 20 x 20


def test_results_stand_for_all_and_for_each_share_of_the_mask(model, photos, tmp_path):
    stems = sorted(path.stem for path in photos.iterdir())
    found = evaluated(model, photos, "--masks", masks(tmp_path / "masks", stems, SIDES))
    parts = found["by_masked_share"]
    assert list(parts) == ["0-10 %", "10-20 %", "20-30 %", "30-40 %", "40-50 %", "50-100 %"]
    assert all(part["n"] == 1 and part["metrics"]["psnr_std"] == 0 for part in parts.values())
    assert found["metrics"]["psnr"] == pytest.approx(np.mean([part["metrics"]["psnr"] for part in parts.values()]))
    assert found["masked_share"]["max"] == pytest.approx(0.81) and found["masks"].endswith("masks")
    assert "psnr_smooth" in parts["0-10 %"]["metrics"], "plain methods as well"


def test_parts_of_two_or_more_have_a_distance(model, photos, tmp_path):
    stems = sorted(path.stem for path in photos.iterdir())
    found = evaluated(model, photos, "--masks", masks(tmp_path / "masks", stems, (4, 4, 4, 9, 9, 9)))
    assert {name: part["n"] for name, part in found["by_masked_share"].items()} == {"0-10 %": 3, "20-30 %": 3}
    assert all(part["metrics"]["fd_tiny8"] > 0 for part in found["by_masked_share"].values())
    shown = commands.ldm("eval-fid", "--model", model, "--data", photos, "--split", "all", "-n", 6, "--steps", 1)
    assert "masked" in shown.stdout and "±" in shown.stdout


def test_files_go_by_name_or_in_order(model, photos, tmp_path):
    stems = sorted(path.stem for path in photos.iterdir())
    named = evaluated(model, photos, "--masks", masks(tmp_path / "a", [f"{stem}_mask000" for stem in stems], SIDES))
    ordered = evaluated(model, photos, "--masks", masks(tmp_path / "b", list("uvwxyz"), SIDES))
    assert named["metrics"] == ordered["metrics"]
    assert "none for" in evaluated(model, photos, "--masks", masks(tmp_path / "c", stems[:3], SIDES), code=3)
    assert "2 masks for 6 images" in evaluated(model, photos, "--masks", masks(tmp_path / "d", "ab", SIDES), code=3)
    assert "no such folder" in evaluated(model, photos, "--masks", tmp_path / "none", code=3)


def test_kinds_of_masks_whole_pictures_and_plain_composites_are_asked_for_and_stated(model, photos):
    usual = evaluated(model, photos)
    seen = {}
    for words, stated in (
        (("--masks", "lama-thick"), {"masks": "lama-thick"}),
        (("--masks", "lama-thin"), {"masks": "lama-thin"}),
        (("--blend", 0), {"blend": 0}),
    ):
        found = evaluated(model, photos, *words)
        assert found["metrics"] != usual["metrics"] and {name: found[name] for name in stated} == stated
        seen[words] = found["metrics"]["psnr"]
    assert len(set(seen.values())) == 3 and usual["masks"] == "own" and "blend" not in usual
    assert evaluated(model, photos, "--whole")["whole"] is True


def test_whole_pictures_are_one_window(model, monkeypatch):
    from ldmcli.sampling import inpainting

    loaded, sizes = load(model), []
    found = inpainting.draw_images
    monkeypatch.setattr(inpainting, "draw_images", lambda m, draw: sizes.append(draw.size) or found(m, draw))
    image, hole = np.zeros((1, 80, 80, 3), np.uint8), np.zeros((1, 80, 80), bool)
    hole[:, 2:6, 2:6] = hole[:, 70:76, 70:76] = True
    for whole in (False, True):
        inpainting.inpaint_images(loaded, image, hole, whole=whole, steps=1)
    assert len(sizes) > 1 and sizes[-1] == (80, 80) and all(max(size) < 80 for size in sizes[:-1])


@pytest.mark.parametrize("words", [("--masks", "lama-thin"), ("--blend", 0), ("--whole",)])
def test_they_are_refused_where_nothing_is_filled(tiny_runs, photos, words):
    for subject in (("--model", tiny_runs["sr"]), ("--model", tiny_runs["plain"]), ("--images", photos)):
        ending = commands.ldm("eval-fid", *subject, "--data", photos, *words)
        assert ending.code == 2 and "task inpaint" in ending.line


def test_shares_fall_into_tenths():
    assert share_groups([0.05, 0.1, 0.11, 0.5, 0.51]) == {
        "0-10 %": [0, 1],
        "10-20 %": [2],
        "40-50 %": [3],
        "50-100 %": [4],
    }

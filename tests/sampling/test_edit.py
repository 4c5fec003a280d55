"""`ldm inpaint`, `ldm upscale` and what they call: known pixels stay, sizes are exact, mistakes are one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import golden, squeezenet
from PIL import Image
from tiny import ADAM, ldm, noisy_images, pictures, train_ldm

import ldmcli
from ldmcli.core.errors import InputError, UsageError
from ldmcli.maths.compositing import composite, fill_smoothly, hole_windows, match_border, match_low_frequencies
from ldmcli.maths.patchmatch import patchmatch_fill
from ldmcli.sampling.inpainting import inpaint_images
from ldmcli.sampling.super_resolution import upscale_images

FAST = ("--steps", 3, "--sampler", "ddim")


@pytest.fixture(scope="module")
def sr(ae, tmp_path_factory) -> Path:
    """Four times as large."""
    run = tmp_path_factory.mktemp("edit") / "sr"
    train_ldm(run, ae, *ADAM, "--task", "sr", "--scale", 4)
    return run


@pytest.fixture(scope="module")
def inpainter(tiny_runs) -> Path:
    return tiny_runs["inpaint"]


@pytest.fixture(scope="module")
def plain(tiny_runs) -> Path:
    return tiny_runs["plain"]


@pytest.fixture(scope="module")
def text(tiny_runs) -> Path:
    return tiny_runs["text"]


@pytest.fixture(scope="module")
def patches(ae, tmp_path_factory) -> Path:
    """Inpaints after patches of the picture."""
    run = tmp_path_factory.mktemp("edit") / "patches"
    train_ldm(run, ae, *ADAM, "--task", "inpaint", "--set", "task.fill=patches")
    return run


@pytest.fixture(params=["inpainter", "patches", "plain", "text"])
def any_model(request) -> Path:
    return request.getfixturevalue(request.param)


def image_of(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def hole_of(height: int, width: int, y: int, x: int, h: int, w: int) -> np.ndarray:
    hole = np.zeros((height, width), bool)
    hole[y : y + h, x : x + w] = True
    return hole


# --- pure parts ---------------------------------------------------------------------------------------------------


def test_composition_is_the_recorded_one():
    """The original: ((1 − mask) image + mask prediction) · 255 on [0, 1], cut off to whole numbers."""
    _, _, io = golden("unet_concat_inpaint")

    def shares(x):
        return ((x[0] + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()

    hole = io["mask_pixels"][0, 0].numpy() > 0
    composed = composite(shares(io["image"]), shares(io["decoded"]), hole)
    recorded = io["composed"][0].permute(1, 2, 0).numpy()
    assert np.abs(composed - recorded).max() < 1e-6
    assert np.array_equal((composed * 255).astype(np.uint8), io["composed_uint8"][0].permute(1, 2, 0).numpy())


def test_filling_keeps_what_is_known_and_stays_between_its_values():
    image = image_of(37, 50)
    hole = hole_of(37, 50, 5, 8, 25, 30)
    out = fill_smoothly(image, hole)
    assert np.array_equal(out[~hole], image[~hole])
    assert image[~hole].min() <= out[hole].min() and out[hole].max() <= image[~hole].max()
    flat = np.full((20, 20, 3), 77, np.uint8)
    flat[hole_of(20, 20, 3, 3, 9, 9)] = 0
    assert (fill_smoothly(flat, hole_of(20, 20, 3, 3, 9, 9)) == 77).all()  # the old content does not shine through


def test_a_filling_meets_its_surroundings_and_a_drift_in_brightness_goes():
    image, drawn = np.full((60, 60, 3), 100, np.uint8), np.full((60, 60, 3), 140.0, np.float32)
    hole = hole_of(60, 60, 10, 10, 40, 40)
    image[hole] = 255  # old content, not to be looked at
    checks = np.indices((60, 60)).sum(0)[..., None] % 2 * 10.0
    out = match_border(image, drawn + hole[..., None] * checks, hole, 8)
    assert np.abs(out - 100 - checks)[hole].max() < 1e-3, "all of the shift goes, what was drawn stays"
    assert np.array_equal(match_border(image, drawn, hole, 0), drawn)


def test_what_is_drawn_in_a_hole_stays_where_the_surroundings_agree():
    image = image_of(60, 60)
    drawn, hole = image.astype(np.float32), hole_of(60, 60, 10, 10, 40, 40)
    drawn[20:40, 20:40] = 250
    assert np.array_equal(match_border(image, drawn, hole, 8), drawn)


def test_a_drift_that_changes_from_side_to_side_is_carried_on_smoothly():
    ramp = np.broadcast_to(np.linspace(0, 40, 60, dtype=np.float32)[None, :, None], (60, 60, 3))
    image, hole = np.full((60, 60, 3), 100, np.uint8), hole_of(60, 60, 20, 20, 20, 20)
    out = match_border(image, 100 + ramp, hole, 8)
    assert np.abs(out[hole] - 100).max() < 6 and np.abs(out[hole] - 100).mean() < 2


def test_an_enlarged_picture_keeps_the_brightness_of_the_small_one_and_its_own_detail():
    rng = np.random.default_rng(0)
    low = rng.integers(60, 190, (2, 12, 9, 3), dtype=np.uint8)
    large = low.repeat(4, axis=1).repeat(4, axis=2)
    assert np.array_equal(match_low_frequencies(large, low, 2.0), large), "nothing is off, nothing changes"
    checks = np.indices((48, 36)).sum(0)[..., None] % 2 * 20
    drifted = (large + checks - 10 + np.array([30, -25, 12])).astype(np.uint8)
    assert np.abs(match_low_frequencies(drifted, low, 2.0).astype(int) - (large + checks - 10)).max() <= 1
    assert match_low_frequencies(drifted, low, 0) is drifted
    half = drifted.copy()
    half[:, 24:] = drifted[:, 24:] - np.array([30, -25, 12]).astype(np.uint8)
    rows = np.abs(match_low_frequencies(half, low, 2.0).astype(float) - (large + checks - 10)).mean(axis=(0, 2, 3))
    assert rows[:8].max() < 1 and rows[-8:].max() < 1 and rows[22:26].max() > 5


def test_tone_is_the_models_unless_asked(sr):
    model, low = ldmcli.load(sr), image_of(6, 9)[None]
    own, none = upscale_images(model, low, steps=2), upscale_images(model, low, steps=2, tone=0)
    assert np.array_equal(own, match_low_frequencies(none, low, model.config.task.tone)) and not np.array_equal(
        own, none
    )


@pytest.mark.parametrize(
    ("hole", "expected"),
    [
        (hole_of(200, 300, 90, 140, 10, 10), [(64, 128), (112, 176)]),  # the middle: 64 px around it
        (hole_of(200, 300, 0, 0, 10, 10), [(0, 64), (0, 64)]),  # a corner: moved into the picture
        (hole_of(200, 300, 190, 290, 10, 10), [(136, 200), (236, 300)]),
        (hole_of(200, 300, 50, 50, 90, 90), None),  # larger than 64: with its margin
        (hole_of(40, 50, 3, 3, 9, 9), [(0, 40), (0, 50)]),  # a small picture: all of it
    ],
)
def test_a_window_holds_the_hole_and_its_surroundings(hole, expected):
    found = hole_windows(hole, (64, 64), (16, 16), 8)
    assert len(found) == 1
    ((rows, columns),) = found
    if expected:
        assert [(part.start, part.stop) for part in found[0]] == expected
    assert hole[rows, columns].sum() == hole.sum()
    for part, length in zip(found[0], hole.shape):
        assert 0 <= part.start < part.stop <= length
        assert (part.stop - part.start) % 8 == 0 or part.stop - part.start == length


@pytest.mark.parametrize("seed", range(5))
def test_windows_of_many_holes_don_t_meet_and_hold_all(seed):
    rng, hole = np.random.default_rng(seed), np.zeros((400, 500), bool)
    for _ in range(6):
        y, x = rng.integers(0, 380), rng.integers(0, 480)
        hole[y : y + rng.integers(1, 60), x : x + rng.integers(1, 60)] = True
    seen = np.zeros(hole.shape, int)
    for window in hole_windows(hole, (64, 64), (16, 16), 8):
        seen[window] += 1
    assert seen.max() == 1 and not (hole & (seen == 0)).any()


# --- inpaint_images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 20), (23, 41), (90, 67), (4, 30)])
def test_every_known_pixel_is_untouched_and_every_hole_is_drawn(any_model, size):
    model, image = ldmcli.load(any_model), image_of(*size)
    hole = hole_of(*size, 1, 3, max(2, size[0] // 3), size[1] // 3)
    out = inpaint_images(model, image[None], hole[None], steps=2)[0]
    assert out.shape == image.shape and out.dtype == np.uint8
    assert np.array_equal(out[~hole], image[~hole])
    assert (out[hole] != image[hole]).mean() > 0.5


def test_what_stood_in_the_hole_does_not_matter(any_model):
    model, image, hole = ldmcli.load(any_model), image_of(20, 20), hole_of(20, 20, 5, 5, 8, 8)
    other = np.where(hole[..., None], np.uint8(9), image)
    first, second = (inpaint_images(model, one[None], hole[None], steps=2) for one in (image, other))
    assert np.array_equal(first, second)


def test_a_result_depends_on_its_picture_seed_and_number_alone(any_model):
    model = ldmcli.load(any_model)
    images = np.stack([image_of(45, 60, k) for k in range(3)])
    masks = np.stack([hole_of(45, 60, 2 + 9 * k, 30, 8, 9) for k in range(3)])
    together = inpaint_images(model, images, masks, ids=[4, 5, 6], seed=1, steps=2)
    alone = inpaint_images(model, images[1:2], masks[1:2], ids=[5], seed=1, steps=2)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
    for other in ({"ids": [6], "seed": 1}, {"ids": [5], "seed": 2}):
        assert not np.array_equal(alone, inpaint_images(model, images[1:2], masks[1:2], steps=2, **other))


def test_what_the_first_stage_loses_of_patches_is_put_back(patches, monkeypatch):
    """A model that draws the latent of what it is told gives the patches themselves, to the last bit of texture."""
    model = ldmcli.load(patches)
    image, hole = image_of(40, 40, 1), hole_of(40, 40, 10, 14, 12, 12)
    ((rows, columns),) = hole_windows(hole, model.trained_size, (5, 5), model.size_multiple)  # what is looked at
    part = torch.from_numpy(image[rows, columns]).permute(2, 0, 1).float()
    wanted = image.copy()
    told = patchmatch_fill(part, torch.from_numpy(hole[rows, columns])).round().clamp(0, 255).byte()
    wanted[rows, columns] = told.permute(1, 2, 0).numpy()
    monkeypatch.setattr(
        "ldmcli.sampling.draw.sample_conditioned",
        lambda *a, inputs, **k: model.autoencoder.encode(inputs["masked.image"].permute(0, 2, 3, 1).numpy()),
    )
    assert np.array_equal(inpaint_images(model, image[None], hole[None], blend=0)[0], wanted)
    model.config = replace(model.config, task=replace(model.config.task, detail=False))
    drawn = inpaint_images(model, image[None], hole[None], blend=0)[0]
    assert np.abs(drawn.astype(int) - wanted)[hole].mean() > 5 and np.array_equal(drawn[~hole], image[~hole])


def test_two_holes_far_apart_are_not_drawn_with_the_same_noise(plain):
    model, image = ldmcli.load(plain), np.full((20, 200, 3), 120, np.uint8)
    hole = hole_of(20, 200, 6, 6, 8, 8) | hole_of(20, 200, 6, 186, 8, 8)
    out = inpaint_images(model, image[None], hole[None], steps=2, blend=0)[0]
    assert not np.array_equal(out[:, 6:14], out[:, 186:194])


def test_tiles_draw_large_holes_without_gaps(inpainter, plain):
    image, hole = image_of(90, 130), hole_of(90, 130, 5, 5, 80, 120)
    for run in (inpainter, plain):
        model = ldmcli.load(run)
        tiled = inpaint_images(model, image[None], hole[None], steps=2, tile=24)[0]
        assert np.array_equal(tiled[~hole], image[~hole])


def test_resampling_and_blending_change_the_hole_only(plain):
    model, image, hole = ldmcli.load(plain), image_of(20, 20), hole_of(20, 20, 4, 4, 10, 10)
    base = inpaint_images(model, image[None], hole[None], steps=3)[0]
    for more in ({"resample": 3}, {"blend": 0}):
        other = inpaint_images(model, image[None], hole[None], steps=3, **more)[0]
        assert np.array_equal(other[~hole], image[~hole]) and not np.array_equal(other, base)


def test_a_prompt_reaches_the_hole_and_no_prompt_is_the_null(text):
    model, image, hole = ldmcli.load(text), image_of(20, 20)[None], hole_of(20, 20, 4, 4, 10, 10)[None]
    none, empty, said = (
        inpaint_images(model, image, hole, steps=2, values=values, guidance=3.0)
        for values in ({}, {"text": [""]}, {"text": ["a red circle"]})
    )
    assert np.array_equal(none, empty) and not np.array_equal(none, said)


# --- upscale_images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 5), (6, 9), (1, 7), (17, 23)])
@pytest.mark.parametrize("tile", [0, 24])
def test_the_result_is_exactly_scale_times_as_large(sr, size, tile):
    out = upscale_images(ldmcli.load(sr), image_of(*size)[None], steps=2, tile=tile)
    assert out.shape == (1, 4 * size[0], 4 * size[1], 3) and out.dtype == np.uint8


def test_an_upscaled_picture_depends_on_its_number_alone(sr):
    model, low = ldmcli.load(sr), np.stack([image_of(6, 7, k) for k in range(3)])
    together = upscale_images(model, low, ids=[7, 8, 9], steps=2)
    alone = upscale_images(model, low[2:], ids=[9], steps=2)
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 1
    assert not np.array_equal(alone, upscale_images(model, low[2:], ids=[8], steps=2))


@pytest.mark.parametrize(
    "call",
    [
        lambda sr, plain: upscale_images(plain, image_of(5, 5)[None]),
        lambda sr, plain: inpaint_images(sr, image_of(20, 20)[None], hole_of(20, 20, 1, 1, 4, 4)[None]),
        lambda sr, plain: inpaint_images(
            plain, image_of(20, 20)[None], hole_of(20, 20, 1, 1, 4, 4)[None], values={"text": ["x"]}
        ),
        lambda sr, plain: inpaint_images(plain, image_of(20, 20)[None], hole_of(20, 20, 1, 1, 4, 4)[None], tile=2),
    ],
)
def test_a_model_that_cannot_is_refused(sr, plain, call):
    with pytest.raises(UsageError):
        call(ldmcli.load(sr), ldmcli.load(plain))


def test_a_picture_below_one_latent_is_refused(plain):
    with pytest.raises(InputError, match="smaller than one latent"):
        inpaint_images(ldmcli.load(plain), image_of(3, 20)[None], hole_of(3, 20, 1, 1, 1, 4)[None])


# --- commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.fromarray(image_of(41, 58)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def mask(tmp_path) -> Path:
    Image.fromarray(hole_of(41, 58, 8, 10, 15, 20)).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_inpaint_writes_diverse_results_with_known_pixels_bit_for_bit(any_model, photo, mask, tmp_path):
    out = tmp_path / "out"
    ending = ldm("inpaint", photo, mask, "--model", any_model, "-n", 3, *FAST, "--out", out, "--json")
    assert ending.code == 0, ending.stderr
    found, image, hole = pictures(out), np.asarray(Image.open(photo)), np.asarray(Image.open(mask))
    assert len(found) == 3 and (out / "grid.png").is_file()
    assert all(np.array_equal(one[~hole], image[~hole]) for one in found)
    assert not np.array_equal(found[0], found[1])
    facts = json.loads(Image.open(out / "000001.png").text["ldm"])
    assert (facts["command"], facts["image"], facts["mask"], facts["sample"]) == ("inpaint", "photo.png", "mask.png", 1)
    assert ending.json["sources"] == [str(photo)] * 3
    trained_for_it = any_model.name in ("inpaint", "patches")
    assert ("trained to inpaint" if trained_for_it else "known regions are put back at every step") in ending.stderr


def test_a_box_is_a_mask(plain, photo, mask, tmp_path):
    for name, what in (("a", [mask]), ("b", ["--box", "10,8,20,15"])):
        assert ldm("inpaint", photo, *what, "--model", plain, *FAST, "--out", tmp_path / name).code == 0
    assert np.array_equal(*(pictures(tmp_path / name)[0] for name in "ab"))


def test_folders_pair_by_name_whatever_the_ending(plain, tmp_path):
    noisy_images(tmp_path / "photos", 3)
    (tmp_path / "masks").mkdir()
    for k in range(3):
        Image.fromarray(hole_of(20, 20, 2 + k, 2, 5, 5)).convert("L").save(tmp_path / "masks" / f"{k:02d}.bmp")
    ending = ldm(
        "inpaint",
        tmp_path / "photos",
        tmp_path / "masks",
        "--model",
        plain,
        *FAST,
        "-n",
        2,
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert ending.code == 0, ending.stderr
    found = pictures(tmp_path / "out")
    assert len(found) == 6
    for k in range(6):
        image = np.asarray(Image.open(tmp_path / "photos" / f"{k % 3:02d}.png"))
        hole = hole_of(20, 20, 2 + k % 3, 2, 5, 5)
        assert np.array_equal(found[k][~hole], image[~hole])
    (tmp_path / "masks" / "01.bmp").unlink()
    ending = ldm("inpaint", tmp_path / "photos", tmp_path / "masks", "--model", plain, "--out", tmp_path / "other")
    assert ending.code == 3 and "01.png: no mask of that name" in ending.line


def test_the_same_command_goes_on_and_another_is_refused(plain, photo, mask, tmp_path):
    line = ["inpaint", photo, mask, "--model", plain, *FAST, "-n", 2, "--out", tmp_path / "out"]
    assert ldm(*line).code == 0
    before = pictures(tmp_path / "out")
    (tmp_path / "out" / "000001.png").unlink()
    ending = ldm(*line, "--json")
    assert ending.json["drawn"] == 1 and np.array_equal(pictures(tmp_path / "out")[1], before[1])
    ending = ldm(*line, "--seed", 3)
    assert ending.code == 2 and "another request" in ending.line
    Image.fromarray(hole_of(41, 58, 0, 0, 9, 9)).save(mask)  # other content under the same name
    assert ldm(*line).code == 2
    assert ldm(*line, "--overwrite").code == 0


def test_upscale_writes_every_picture_at_exactly_scale(sr, tmp_path):
    (tmp_path / "low").mkdir()
    for k, size in enumerate([(9, 7), (5, 12), (9, 7)]):
        Image.fromarray(image_of(*size, k)).save(tmp_path / "low" / f"{k}.png")
    ending = ldm("upscale", tmp_path / "low", "--model", sr, *FAST, "--out", tmp_path / "out", "--json")
    assert ending.code == 0, ending.stderr
    assert [one.shape[:2] for one in pictures(tmp_path / "out")] == [(36, 28), (20, 48), (36, 28)]
    assert [Path(one).name for one in ending.json["sources"]] == ["0.png", "1.png", "2.png"]


def test_alpha_16_bit_and_exif_pictures_are_taken_upright_and_opaque(sr, plain, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image_of(8, 12)).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(image_of(9, 8)[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(np.dstack([image_of(8, 8), image_of(8, 8, 1)[..., 0]])).save(tmp_path / "alpha.png")
    for name, size in (("turned.jpg", (48, 32)), ("deep.png", (36, 32)), ("alpha.png", (32, 32))):
        out = tmp_path / f"{name}-up"
        assert ldm("upscale", tmp_path / name, "--model", sr, *FAST, "--out", out).code == 0
        assert pictures(out)[0].shape[:2] == size
        out = tmp_path / f"{name}-in"
        assert ldm("inpaint", tmp_path / name, "--box", "1,1,4,4", "--model", plain, *FAST, "--out", out).code == 0


@pytest.fixture
def inputs(photo, mask, tmp_path):
    """Files of every kind of mistake, in an empty folder."""
    Image.new("L", (58, 41)).save(tmp_path / "black.png")
    Image.new("L", (58, 41), 127).save(tmp_path / "grey.png")
    Image.new("L", (58, 41), 255).save(tmp_path / "white.png")
    Image.new("L", (41, 58), 255).save(tmp_path / "turned.png")
    Image.fromarray(image_of(3, 3)).save(tmp_path / "dot.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "masks").mkdir()
    return tmp_path


WRONG = [
    ("inpaint photo.png turned.png", 3, "41x58 px for a picture of 58x41"),
    ("inpaint photo.png black.png", 3, "black.png: nothing in it is white"),
    ("inpaint photo.png grey.png", 3, "grey.png: nothing in it is white"),
    ("inpaint photo.png white.png", 3, "white.png: all of it is white"),
    ("inpaint photo.png lost.png", 3, "lost.png: no such file"),
    ("inpaint lost.png mask.png", 3, "lost.png: no such file"),
    ("inpaint text.png mask.png", 3, "text.png"),
    ("inpaint photo.png text.png", 3, "text.png"),
    ("inpaint empty masks", 3, "no pictures in this folder"),
    ("inpaint photo.png masks", 2, "two files, or two folders"),
    ("inpaint photo.png", 2, "MASK or --box"),
    ("inpaint photo.png mask.png --box 1,1,4,4", 2, "MASK or --box"),
    ("inpaint photo.png --box 50,1,20,4", 2, "reaches outside the picture of 58x41"),
    ("inpaint photo.png --box -1,1,20,4", 2, "reaches outside"),
    ("inpaint photo.png --box 1,1,0,4", 2, "at least 1"),
    ("inpaint photo.png --box 0,0,58,41", 2, "whole picture"),
    ("inpaint photo.png --box 1,1,4", 2, "x,y,width,height"),
    ("inpaint dot.png --box 1,1,1,1", 3, "dot.png: a picture of 3x3 px is smaller than one latent"),
    ("inpaint photo.png mask.png --prompt x", 2, "--prompt"),
    ("inpaint photo.png mask.png --class 0", 2, "--class"),
    ("inpaint photo.png mask.png --guidance text=3", 2, "--guidance"),
    ("inpaint photo.png mask.png --tile 2", 2, "--tile 2"),
    ("inpaint photo.png mask.png --max-memory 0", 2, "--max-memory"),
    ("inpaint photo.png mask.png --max-memory 0.000001", 6, "--max-memory"),
    ("inpaint photo.png mask.png --steps 5000", 2, "5000"),
    ("upscale photo.png --scale 2", 2, "enlarges by 4"),
    ("upscale photo.png --scale 3", 2, "choose one of 2, 4, 8"),
    ("upscale lost.png", 3, "lost.png: no such file"),
    ("upscale text.png", 3, "text.png"),
    ("upscale empty", 3, "no pictures in this folder"),
]


@pytest.mark.parametrize(("line", "code", "says"), WRONG, ids=[line for line, *_ in WRONG])
def test_a_mistake_is_one_line_with_a_code_and_no_folder(line, code, says, inputs, sr, plain, monkeypatch):
    monkeypatch.chdir(inputs)
    words = line.split()
    ending = ldm(*words, "--model", sr if words[0] == "upscale" else plain, "--out", "out")
    assert ending.code == code, ending.stderr
    assert ending.line.startswith("ldm: ") and says in ending.line and "Traceback" not in ending.stderr
    assert not list(inputs.glob("out/*.png"))


@pytest.mark.parametrize(
    ("line", "which", "code", "says"),
    [
        ("upscale photo.png", "plain", 2, "not trained for super-resolution"),
        ("upscale photo.png", "ae", 2, "an autoencoder"),
        ("inpaint photo.png mask.png", "sr", 2, "for super-resolution"),
        ("upscale photo.png", None, 4, "no super-resolution run"),
        ("inpaint photo.png mask.png", None, 4, "no suitable run"),
        ("upscale photo.png", "lost", 4, "lost"),
    ],
)
def test_a_model_that_does_not_fit_is_named(line, which, code, says, inputs, request, monkeypatch):
    monkeypatch.chdir(inputs)
    model = request.getfixturevalue(which) if which in ("plain", "ae", "sr") else which
    ending = ldm(*line.split(), *(("--model", model) if which else ()), "--out", "out")
    assert ending.code == code and says in ending.line, ending.stderr


def test_the_newest_suitable_run_is_taken_and_another_scale_names_what_there_is(
    sr, inpainter, plain, photo, mask, tmp_path, monkeypatch
):
    for run in (sr, inpainter, plain):
        shutil.copytree(run, tmp_path / "runs" / run.name)
    monkeypatch.chdir(tmp_path)
    ending = ldm("inpaint", photo, mask, *FAST, "--out", "a")
    assert ending.code == 0 and "runs/inpaint (the newest suitable run; trained to inpaint)" in ending.stderr
    ending = ldm("upscale", photo, *FAST, "--out", "b")
    assert ending.code == 0 and "runs/sr (the newest suitable run; enlarges by 4)" in ending.stderr
    ending = ldm("upscale", photo, "--scale", 2, "--out", "c")
    assert ending.code == 2 and "enlarge by 4" in ending.line


def test_sample_is_led_to_a_small_image(plain, tmp_path):
    Image.new("RGB", (5, 5), (250, 10, 10)).save(tmp_path / "low.png")
    for name, more in (("none", []), ("zero", ["--guide-scale", 0]), ("full", ["--guide-scale", 1])):
        guide = ["--guide", tmp_path / "low.png"] if more else []
        ending = ldm("sample", "--model", plain, "-n", 2, "--steps", 6, *guide, *more, "--out", tmp_path / name)
        assert ending.code == 0, ending.stderr
    none, zero, full = (np.stack(pictures(tmp_path / name)).astype(float) for name in ("none", "zero", "full"))
    assert np.array_equal(none, zero)
    target = np.array([250, 10, 10])
    errors = [np.square(drawn.reshape(2, 5, 4, 5, 4, 3).mean((2, 4)) - target).mean() for drawn in (none, full)]
    assert errors[1] < 0.9 * errors[0]  # a first stage of three steps has few colours
    Image.new("RGB", (5, 9)).save(tmp_path / "tall.png")
    ending = ldm("sample", "--model", plain, "--guide", tmp_path / "tall.png", "--out", tmp_path / "bad")
    assert ending.code == 3 and "5x9 px" in ending.line


def test_rule_and_distance_of_guiding_are_said_and_change_pictures(plain, sr, photo, tmp_path):
    """Sec. 4.4: --guide-rule and --guide-metric of `sample`, stated in the document, and in Python."""
    weights, low = squeezenet(tmp_path / "squeeze.safetensors"), tmp_path / "low.png"
    Image.fromarray(image_of(20, 20)).save(low)  # T is the identity for a picture of full size
    ways = {
        "ours": (),
        "paper": ("--guide-rule", "paper", "--guide-scale", 0.01),
        "lpips": ("--guide-metric", "lpips", "--perceptual", weights),
        "lpips paper": ("--guide-rule", "paper", "--guide-metric", "lpips", "--perceptual", weights),
    }
    seen = {}
    for name, options in ways.items():
        ending = ldm(
            "sample", "--model", plain, "-n", 1, *FAST, "--guide", low, *options, "--json", "--out", tmp_path / name
        )
        assert ending.code == 0, ending.stderr
        assert ending.json["guide_rule"] == ("paper" if "paper" in name else "ours")
        assert ending.json["guide_metric"] == ("lpips" if "lpips" in name else "l2")
        seen[name] = pictures(tmp_path / name)[0]
    assert len({one.tobytes() for one in seen.values()}) == len(ways)
    how = {"steps": 3, "sampler": "ddim", "guide_rule": "paper", "guide_scale": 0.01}
    assert np.array_equal(ldmcli.load(plain).sample(guide=low, **how)[0], seen["paper"])
    command = ("sample", "--guide", low, "-n", 1, *FAST, "--model", plain, "--out", tmp_path / "bad")
    for options, code, says in (
        (("--guide-metric", "l1"), 2, "not one of l2, lpips"),
        (("--guide-rule", "plain"), 2, "not one of ours, paper"),
        (("--perceptual", weights), 2, "--guide-metric lpips"),
        (("--guide-metric", "lpips", "--perceptual", tmp_path / "absent"), 3, "absent"),
    ):
        ending = ldm(*command, *options)
        assert ending.code == code and says in ending.line, ending.stderr
    ending = ldm("sample", "--model", plain, "--guide-rule", "paper", "--out", tmp_path / "bad")
    assert ending.code == 2 and "give --guide FILE" in ending.line
    assert not (tmp_path / "bad").exists()


def test_enlarged_pictures_are_led_to_the_small_one(sr, photo, tmp_path):
    """What is made small again agrees better with what was given, by either rule; of any size; Python alike."""
    low = np.asarray(Image.open(photo).convert("RGB"))[:7, :9]
    Image.fromarray(low).save(tmp_path / "low.png")
    command = ("upscale", tmp_path / "low.png", "--model", sr, "--tone", 0, *FAST, "--json")
    ways = {"none": (), "ours": ("--guide-scale", 1), "paper": ("--guide-scale", 0.02, "--guide-rule", "paper")}
    errors = {}
    for name, options in ways.items():
        ending = ldm(*command, *options, "--out", tmp_path / name)
        assert ending.code == 0, ending.stderr
        large = pictures(tmp_path / name)[0].astype(float)
        assert ending.json.get("guide_rule", "none") == name
        errors[name] = np.square(large.reshape(7, 4, 9, 4, 3).mean((1, 3)) - low).mean()
    assert errors["ours"] < 0.95 * errors["none"] and errors["paper"] < errors["none"]
    made = ldmcli.load(sr).upscale(low, steps=3, sampler="ddim", tone=0, guide_scale=1)[0]
    assert np.array_equal(made, pictures(tmp_path / "ours")[0])
    ending = ldm(*command, "--guide-scale", 1, "--tile", 16, "--out", tmp_path / "tiles")
    assert ending.code == 2 and "to be guided" in ending.line and not (tmp_path / "tiles").exists()


def test_guided_super_resolution_is_measured_beside_unguided(sr):
    """Tab. 4: the guided rows of super-resolution."""
    measure = ("eval-fid", "--metrics", "psnr", "-n", 2, "--steps", 3, "--json", "--model", sr, "--guide-factor", 4)
    document = json.loads(ldm(*measure, "--guide-scale", 1).stdout)
    assert document["baselines"] == ["unguided", "bicubic"] and document["guide_scale"] == 1
    without = json.loads(ldm(*measure, "--guide-scale", 0).stdout)["metrics"]
    assert without["psnr"] == without["psnr_unguided"] == document["metrics"]["psnr_unguided"]
    assert document["metrics"]["psnr"] != without["psnr"]
    assert document["metrics"]["psnr_bicubic"] == without["psnr_bicubic"]


@pytest.mark.parametrize("which", ["plain", "text"])
def test_guided_samples_are_measured_beside_unguided_ones(request, which, sr, inpainter):
    """Tab. 4: rows made small lead the samples, which are compared with the rows."""
    model = request.getfixturevalue(which)
    measure = ("eval-fid", "--metrics", "psnr", "-n", 3, "--steps", 6, "--json", "--batch-size", 2)
    document = json.loads(ldm(*measure, "--model", model, "--guide-factor", 4).stdout)
    values = document["metrics"]
    assert values["psnr"] > values["psnr_unguided"] + 0.3 and values["psnr_bicubic"] > values["psnr"]
    assert document["guide_factor"] == 4 and document["baselines"] == ["unguided", "bicubic"]
    for more, code, says in (
        (("--model", model, "--guide-factor", 3), 3, "divides both sides"),
        (("--model", inpainter, "--guide-factor", 4), 2, "this one is for inpaint"),
        (("--model", sr, "--guide-factor", 2), 2, "enlarges by 4"),
        (("--model", model, "--guide-rule", "paper"), 2, "give --guide-factor N"),
        (("--images", "x", "--data", "shapes", "--guide-factor", 4), 2, "with --model"),
    ):
        ending = ldm(*measure, *more)
        assert ending.code == code and says in ending.line


def test_samples_too_large_for_memory_are_drawn_in_tiles(plain, tmp_path, monkeypatch):
    """The bound is lowered instead of the picture made large."""
    from ldmcli.sampling import memory

    asked = []
    monkeypatch.setattr(memory, "MAX_MEMORY", 0.002)
    decode = memory.decode
    monkeypatch.setattr(
        memory, "decode", lambda ae, z, tile=0, *gib: asked.append((z.shape, tile)) or decode(ae, z, tile, *gib)
    )
    ending = ldm("sample", "--model", plain, "-n", 2, *FAST, "--size", "120x200", "--out", tmp_path / "out")
    assert ending.code == 0, ending.stderr
    assert [one.shape for one in pictures(tmp_path / "out")] == [(120, 200, 3)] * 2
    assert all(len(shape) == 4 and shape[0] == 1 and 0 < tile < 50 for shape, tile in asked)

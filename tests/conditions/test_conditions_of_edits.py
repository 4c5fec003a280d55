"""What `inpaint` and `upscale` tell a model beside the picture: prompts, classes, layouts and maps of whole pictures
reach the windows and padded pictures that the network sees, in their place; folders pair by relative path."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import ldmcli
from ldmcli.core.errors import UsageError
from ldmcli.maths.compositing import hole_windows
from ldmcli.maths.tiles import reframe_boxes
from ldmcli.sampling import draw
from ldmcli.sampling.edit_sources import edit_sources
from ldmcli.sampling.inpainting import inpaint_images
from ldmcli.sampling.request import EditRequest
from ldmcli.sampling.super_resolution import upscale_images

KINDS = "class+text+layout+map"
FAST = ("--steps", 1)


@pytest.fixture(scope="module")
def models(ae, tiny_runs, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("conditioned")
    own = {
        "inpaint": ("--condition", KINDS, "--task", "inpaint"),
        "sr": ("--condition", KINDS, "--task", "sr", "--scale", 2),
        "no dropout": ("--condition", "text", "--task", "inpaint", "--set", "condition.drop=0"),
    }
    for name, options in own.items():
        tiny.train_ldm(folder / name, ae, *options, steps=1)
    return {name: folder / name for name in own} | {name: tiny_runs[name] for name in ("map", "layout")}


@pytest.fixture
def seen(monkeypatch):
    """The prepared inputs of each draw, and the size of its latents."""
    found, sample = [], draw.sample_conditioned

    def recorded(*arguments, inputs, shape, **how):
        found.append({**inputs, "shape": shape})
        return sample(*arguments, inputs=inputs, shape=shape, **how)

    monkeypatch.setattr(draw, "sample_conditioned", recorded)
    return found


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def map_of(height: int, width: int) -> np.ndarray:
    """Each pixel's class says where it lies."""
    rows, columns = np.indices((height, width))
    return ((rows // 4 * 3 + columns // 4) % 7).astype(np.uint8)


BOX = np.array([[0.25, 0.5, 0.5, 0.25]])


def told(index: np.ndarray, **more) -> dict:
    return {
        "map": [index],
        "layout": [{"bbox": BOX, "category": np.array([3])}],
        "text": ["a star"],
        "class": ["star"],
        **more,
    }


def corners(model, ids) -> np.ndarray:
    """Box corners x0, y0, x1, y1 that layout tokens say, as shares of the picture that was told."""
    layout = model.network.conditions.entries["layout"].layout
    _, first, last = ids[0, :3].tolist()
    grid = layout.grid - 1
    return np.array([first % layout.grid, first // layout.grid, last % layout.grid, last // layout.grid]) / grid


def test_boxes_of_a_part_are_shares_of_the_whole():
    assert reframe_boxes(BOX, (8, 4), (8, 4)) is BOX
    assert reframe_boxes(BOX, (8, 4), (16, 8), (4, 2)).tolist() == [[(1 + 2) / 8, (4 + 4) / 16, 2 / 8, 2 / 16]]


@pytest.mark.parametrize("size", [(20, 20), (22, 27), (20, 33)])
def test_an_enlarged_picture_is_told_map_and_layout_where_they_lie(size, models, seen):
    model, large = ldmcli.load(models["sr"]), (2 * size[0], 2 * size[1])
    index = map_of(*large)
    made = upscale_images(model, picture(*size)[None], values=told(index), steps=1)
    assert made.shape == (1, *large, 3)
    (inputs,) = seen
    whole = [4 * side for side in inputs["shape"][1:]]  # latents of 4 px
    assert list(inputs["map.index"].shape[1:]) == whole and all(a >= b for a, b in zip(whole, large))
    assert (inputs["map.index"][0, : large[0], : large[1]].numpy() == index).all()
    across, down = large[1] / whole[1], large[0] / whole[0]
    expected = [0.25 * across, 0.5 * down, 0.75 * across, 0.75 * down]
    assert np.abs(corners(model, inputs["layout.ids"]) - expected).max() < 0.02


def test_a_window_around_a_hole_is_told_its_part_of_the_map(models, seen):
    model, size = ldmcli.load(models["map"]), (57, 70)
    index = np.random.default_rng(3).integers(0, 7, size, dtype=np.uint8)  # no part is like another
    hole = np.zeros(size, bool)
    hole[30:38, 41:49] = True
    inpaint_images(model, picture(*size)[None], hole[None], values={"map": [index]}, steps=1, resample=1)
    (inputs,), ((rows, columns),) = seen, hole_windows(hole, model.trained_size, (5, 5), model.size_multiple)
    assert 0 < rows.start <= 30 and 0 < columns.start <= 41
    assert (inputs["map.index"][0].numpy() == index[rows, columns]).all()


def test_with_a_layout_the_whole_picture_is_looked_at(models, seen):
    model, size = ldmcli.load(models["inpaint"]), (41, 58)
    hole = np.zeros(size, bool)
    hole[3:9, 4:9] = True
    inpaint_images(model, picture(*size)[None], hole[None], values=told(map_of(*size)), steps=1)
    (inputs,) = seen
    assert tuple(inputs["shape"][1:]) == (11, 15)
    expected = [0.25 * 58 / 60, 0.5 * 41 / 44, 0.75 * 58 / 60, 0.75 * 41 / 44]
    assert np.abs(corners(model, inputs["layout.ids"]) - expected).max() < 0.02


def test_large_pictures_in_tiles_are_told_everything(models):
    model, size = ldmcli.load(models["sr"]), (40, 60)
    made = upscale_images(model, picture(*size)[None], values=told(map_of(80, 120)), steps=1, tile=24)
    assert made.shape == (1, 80, 120, 3)
    model, hole = ldmcli.load(models["inpaint"]), np.ones((80, 120), bool)
    hole[:4] = False
    image = picture(80, 120)
    made = inpaint_images(model, image[None], hole[None], values=told(map_of(80, 120)), steps=1, tile=24)
    assert (made[0][~hole] == image[~hole]).all()


def test_samples_of_any_size_are_told_their_layout_in_the_middle(models, monkeypatch):
    found, sample = [], draw.sample_conditioned
    monkeypatch.setattr(
        draw, "sample_conditioned", lambda *a, inputs, **k: found.append(inputs) or sample(*a, inputs=inputs, **k)
    )
    model = ldmcli.load(models["layout"])
    model.sample(layout={"bbox": BOX, "category": ["star"]}, size=(22, 30), steps=1)
    expected = [(0.25 * 30 + 1) / 32, (0.5 * 22 + 1) / 24, (0.75 * 30 + 1) / 32, (0.75 * 22 + 1) / 24]
    assert np.abs(corners(model, found[0]["layout.ids"]) - expected).max() < 0.02


# --- files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path) -> Path:
    """Pictures in two folders, equally named, with a mask, a map and a layout each."""
    for k, name in enumerate(("a/1", "b/1", "b/2")):
        size = (20 + 4 * k, 24)
        for what in ("photos", "masks", "maps", "layouts"):
            (tmp_path / what / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(*size, k)).save(tmp_path / f"photos/{name}.png")
        hole = np.zeros(size, bool)
        hole[4:10, 4 + 2 * k : 12] = True
        Image.fromarray(hole).save(tmp_path / f"masks/{name}.bmp")
        Image.fromarray(np.full(size, k + 1, np.uint8)).save(tmp_path / f"maps/{name}.png")
        layout = {"objects": [{"bbox": [0.1 * k, 0.1, 0.5, 0.5], "category": "star"}]}
        (tmp_path / f"layouts/{name}.json").write_text(json.dumps(layout))
    return tmp_path


@pytest.mark.parametrize("command", ["inpaint", "upscale"])
def test_folders_pair_with_what_is_said_of_each_picture(command, models, files, seen):
    words = (files / "masks",) if command == "inpaint" else ("--scale", 2)
    ending = tiny.ldm(
        command,
        files / "photos",
        *words,
        "--map",
        files / "maps",
        "--layout",
        files / "layouts",
        "--prompt",
        "a star",
        "--class",
        "star",
        "--negative-prompt",
        "a ring",
        "--guidance",
        3,
        "--model",
        models[{"upscale": "sr"}.get(command, command)],
        *FAST,
        "--json",
        "--out",
        files / "out",
    )
    assert ending.code == 0, ending.stderr
    assert [Path(one).relative_to(files / "photos").as_posix() for one in ending.json["sources"]] == [
        "a/1.png",
        "b/1.png",
        "b/2.png",
    ]
    assert [int(inputs["map.index"].max()) for inputs in seen] == [1, 2, 3]
    assert [int(inputs["map.index"].min()) for inputs in seen] == [1, 2, 3]
    assert len({tuple(inputs["layout.ids"][0].tolist()) for inputs in seen}) == 3
    facts = json.loads(Image.open(files / "out/000001.png").text["ldm"])
    assert [facts[name] for name in ("prompt", "class", "map", "layout", "negative_prompt")] == [
        "a star",
        "star",
        "1.png",
        "1.json",
        "a ring",
    ]


def test_a_changed_map_or_layout_is_another_request(models, files):
    line = (
        "upscale",
        files / "photos/a/1.png",
        "--scale",
        2,
        "--map",
        files / "maps/a/1.png",
        "--layout",
        files / "layouts/a/1.json",
        "--model",
        models["sr"],
        *FAST,
        "--out",
        files / "out",
    )
    assert tiny.ldm(*line).code == 0 and tiny.ldm(*line).code == 0
    for name in ("maps/a/1.png", "layouts/a/1.json"):
        before = (files / name).read_bytes()
        (files / name).write_bytes((files / name.replace("a/1", "b/2")).read_bytes())
        if name.startswith("maps"):
            Image.fromarray(np.full((20, 24), 6, np.uint8)).save(files / name)
        ending = tiny.ldm(*line)
        assert ending.code == 2 and "another request" in ending.line, name
        (files / name).write_bytes(before)


def test_pairs_are_by_path_then_by_name_and_what_is_left_over_is_said(files, capsys):
    def masks_of(images: Path, masks: Path) -> list[str]:
        found = edit_sources(EditRequest(images=(images,), masks=(masks,)))
        return [f"{one.image.relative_to(images)} {one.mask.relative_to(masks)}" for one in found]

    assert masks_of(files / "photos", files / "masks") == ["a/1.png a/1.bmp", "b/1.png b/1.bmp", "b/2.png b/2.bmp"]
    assert masks_of(files / "photos/b", files / "masks/b") == ["1.png 1.bmp", "2.png 2.bmp"]
    (files / "masks").rename(files / "photos/masks")  # masks below the pictures are no pictures
    assert len(masks_of(files / "photos", files / "photos/masks")) == 3
    (files / "photos/b/1.png").unlink()
    capsys.readouterr()
    assert masks_of(files / "photos", files / "photos/masks") == ["a/1.png a/1.bmp", "b/2.png b/2.bmp"]
    assert "1 of 3 masks are not used" in capsys.readouterr().err
    for k, name in enumerate(("x", "y")):  # one folder of masks for several of pictures
        (files / f"flat{k}").mkdir()
        (files / "photos2" / name).mkdir(parents=True)
    Image.fromarray(picture(20, 20)).save(files / "photos2/x/p.png")
    Image.fromarray(picture(20, 20)).save(files / "photos2/y/q.png")
    for name in "pq":
        Image.fromarray(np.eye(20, dtype=bool)).save(files / f"flat0/{name}.png")
    assert masks_of(files / "photos2", files / "flat0") == ["x/p.png p.png", "y/q.png q.png"]


WRONG = [
    ("inpaint", ("--map", "maps/a/1.png", "--prompt", "a star", "--class", "moon"), 2, "--class moon: no such class"),
    ("inpaint", ("--prompt", "a star"), 2, "--map: this model draws what a class map says; give one with --map"),
    ("inpaint", ("--map", "gone.png"), 3, "gone.png: no such file"),
    ("inpaint", ("--map", "maps/b/2.png"), 3, "has another aspect"),
    ("inpaint", ("--map", "nine.png"), 3, "class index 9; this model knows 0 … 7"),
    ("inpaint", ("--map", "maps/a/1.png", "--layout", "maps/a/1.png"), 3, "not UTF-8"),
    ("inpaint", ("--map", "maps/a/1.png", "--layout", "two.json"), 3, "2 layouts for one picture"),
    ("inpaint", ("--map", "maps/a/1.png", "--layout", "moon.json"), 3, "category 'moon'"),
    ("inpaint", ("--map", "masks"), 3, "no map of that name"),
    ("upscale", ("--map", "maps/a/1.png", "--guidance", "size=3"), 2, "--guidance size=3: this model takes map, lay"),
    ("map", ("--map", "maps/a/1.png", "--prompt", "x"), 2, "--prompt: this model was trained without text"),
    ("map", ("--map", "maps/a/1.png", "--negative-prompt", "x"), 2, "--negative-prompt: this model takes no prompt"),
]


@pytest.mark.parametrize(("which", "words", "code", "says"), WRONG, ids=[" ".join(row[1]) for row in WRONG])
def test_what_does_not_fit_is_refused_before_anything_is_written(which, words, code, says, models, files, monkeypatch):
    monkeypatch.chdir(files)
    (files / "masks/a/other.bmp").write_bytes((files / "masks/a/1.bmp").read_bytes())
    layout = {"objects": [{"bbox": [0, 0, 1, 1], "category": "moon"}]}
    (files / "moon.json").write_text(json.dumps(layout))
    (files / "two.json").write_text(json.dumps([{"objects": [{"bbox": [0, 0, 1, 1], "category": "star"}]}] * 2))
    Image.fromarray(np.full((20, 24), 9, np.uint8)).save("nine.png")
    (files / "photos/a/1.png").rename(files / "photos/lone.png")
    command = (
        ("upscale", "photos/lone.png", "--scale", 2)
        if which == "upscale"
        else ("inpaint", "photos/lone.png", "masks/a/1.bmp")
    )
    model = models[{"upscale": "sr"}.get(which, which)]
    ending = tiny.ldm(*command, *words, "--model", model, *FAST, "--out", "out")
    assert ending.code == code and says in ending.line, ending.stderr
    assert ending.line.startswith("ldm: ") and not (files / "out").exists()


def test_what_was_never_left_out_is_asked_for(models, files):
    line = ("inpaint", files / "photos/a/1.png", files / "masks/a/1.bmp", "--model", models["no dropout"], *FAST)
    ending = tiny.ldm(*line, "--out", files / "without")
    assert ending.code == 0 and "warning: --prompt not given, and this model was trained without" in ending.stderr
    assert "not given" not in tiny.ldm(*line, "--prompt", "a star", "--guidance", 1, "--out", files / "with").stderr


def test_options_that_say_how_much_of_what_is_not_there(models, files):
    for words, says in ((("--strength", 0.5), "give --init-image FILE"), (("--guide-scale", 2), "give --guide FILE")):
        ending = tiny.ldm("sample", "--model", models["map"], "--map", files / "maps/a/1.png", *words)
        assert ending.code == 2 and says in ending.line
    with pytest.raises(UsageError, match="has the size that the image asks for"):
        ldmcli.load(models["sr"]).sample(image=picture(20, 20), size=64)

"""Every task and condition is trained, gone on with, and sampled through the command line; what is wrong is named."""

import json
import shutil
from itertools import product

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import ldmcli
from ldmcli.conditions.condition import View
from ldmcli.conditions.dataset import ConditionDataset
from ldmcli.conditions.pictures import box_pixels, boxed, colour, coloured, with_legend
from ldmcli.core.settings import DataSettings, DiffusionConfig, TaskSettings
from ldmcli.data.sources import open_rows
from ldmcli.sampling.inpainting import inpaint_images
from ldmcli.sampling.super_resolution import upscale_images

TASKS = {
    "layout": ("--condition", "layout"),
    "map": ("--condition", "map", "--flip"),
    "sr": ("--task", "sr", "--scale", 4),
    "inpaint": ("--task", "inpaint"),
    "text+map": ("--condition", "text+map"),
    "class+layout+inpaint": ("--condition", "class+layout", "--task", "inpaint"),
    "text+sr": ("--condition", "text", "--task", "sr", "--scale", 2, "--degradation", "bsr-light", "--no-cache"),
}


@pytest.fixture(scope="module")
def trained(ae, tmp_path_factory):
    """`trained(name)`: a run of four steps with a checkpoint after each, trained once."""
    folder = tmp_path_factory.mktemp("tasks")

    def run(name: str):
        if not (folder / name).exists():
            tiny.train_ldm(folder / name, ae, *tiny.ADAM, *TASKS[name], *SAVE, steps=4)
        return folder / name

    return run


SAVE = ("--save-every", 1, "--keep", 9, "--set", "sample.n=3", "--sample-every", 4, "--eval-every", 4)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_gone_on_with_ends_as_one_that_was_not_stopped(task, trained, ae, tmp_path):
    whole, again = trained(task), tmp_path / "run"
    shutil.copytree(whole, again)
    for step in (3, 4):
        shutil.rmtree(again / f"checkpoints/step-{step:08d}")
    state = tiny.state(again) | {"state": "running", "step": 2, "checkpoint": 2}
    (again / "run.json").write_text(json.dumps(state))
    cache = ("--set", f"data.cache_dir={whole.parent / 'cache'}")
    tiny.train_ldm(again, ae, *tiny.ADAM, *TASKS[task], *SAVE, *cache, steps=4)
    assert tiny.same(tiny.checkpoint(again), tiny.checkpoint(whole))
    assert tiny.log(again)[-1]["val/val_loss"] == tiny.log(whole)[-1]["val/val_loss"]


@pytest.mark.parametrize("task", TASKS)
def test_every_condition_changes_what_the_trained_network_says(task, trained):
    """One row's value of a kind put in another's place: the output moves; the same values: it does not."""
    model = ldmcli.load(trained(task))
    rows = open_rows(model.config.data, split="validation")
    source = ConditionDataset(rows, model.config, (20, 20), training=False)
    kinds, z = model.network.conditions.kinds, torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))

    def output(**picked: int) -> torch.Tensor:
        values = {kind: source.values(kind, [picked.get(kind, 0)], [picked.get(kind, 0)]) for kind in kinds}
        return model.predict(z, torch.tensor([500.0]), model._embed(values))

    other = next(i for i in range(1, 40) if rows.label(i) != rows.label(0))
    base = output()
    assert torch.equal(base, output())
    for kind in kinds:
        assert not torch.equal(base, output(**{kind: other})), kind


def test_the_preview_shows_conditions_above_samples_and_the_truth_below(trained):
    """Three rows of pictures, each six times as large: layouts on white, samples, the true pictures."""
    run = trained("layout")
    sheet = np.asarray(Image.open(run / "samples/step-00000004.png"))
    side, rows = 120, open_rows(DataSettings(size=(20, 20)), split="validation")
    assert sheet.shape == (3 * side + 8, 3 * side + 8, 3)
    first = sheet[2 : 2 + side, 2 : 2 + side]
    x0, y0, x1, y1 = box_pixels(rows.boxes(0, (20, 20))["bbox"][0], (side, side))
    assert (first[y0, x0] == colour(1 + rows.label(0))).all() and (first[y1, x1] == first[y0, x0]).all()
    truth = sheet[2 * (side + 2) + 2 :, 2 : 2 + side][:side:6, ::6]
    assert (truth == rows.pixels(0, (20, 20))).all()


# --- rows as conditions -----------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Dark oblong pictures with one bright box, told as an object and as class 1 of a map."""
    rows = []
    (tmp_path / "data").mkdir()
    for k, (x, y, w, h) in enumerate([(10, 4, 8, 6), (2, 2, 20, 16), (24, 6, 6, 12), (0, 0, 6, 5)]):
        index = np.zeros((20, 32), np.uint8)
        index[y : y + h, x : x + w] = 1
        Image.fromarray(index).save(tmp_path / f"data/m{k}.png")
        Image.fromarray(np.repeat((index * 255)[..., None], 3, axis=2)).save(tmp_path / f"data/{k}.png")
        rows.append(
            {
                "file_name": f"{k}.png",
                "map_file_name": f"m{k}.png",
                "objects": {"bbox": [[x, y, w, h]], "category": ["thing"]},
            }
        )
    (tmp_path / "data/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data"


def source_of(folder, size=(20, 20), **task) -> ConditionDataset:
    data = DataSettings(source=str(folder), size=size, crop="random", flip=True)
    config = DiffusionConfig(data=data, task=TaskSettings(**task))
    rows = open_rows(data, split="train")
    return ConditionDataset(rows, config, size, training=True)


def test_boxes_and_maps_are_cropped_and_mirrored_as_the_pixels_are(pictures):
    """Sixty positions: wherever crop and flip put the bright box, the map and the layout say it is there."""
    from ldmcli.data.augment import load_pixels

    source = source_of(pictures)
    where = np.arange(60)
    ids = where % len(source.rows)
    pixels = load_pixels(source.rows, source.config, ids, where, (20, 20)).numpy()
    maps, layouts = (source.values(kind, ids.tolist(), where.tolist()) for kind in ("map", "layout"))
    assert len({found.tobytes() for found in maps}) > 20
    for picture, found, layout in zip(pixels, maps, layouts):
        bright = picture[..., 0] > 127
        assert (bright == (found == 1)).all()
        drawn = np.zeros((20, 20), bool)
        for box in layout["bbox"]:
            x0, y0, x1, y1 = box_pixels(box, (20, 20))
            drawn[y0 : y1 + 1, x0 : x1 + 1] = True
        assert (drawn == bright).all()


@pytest.mark.parametrize(
    ("kind", "task"), [("lowres", {"name": "sr", "degradation": "bsr"}), ("masked", {"name": "inpaint"})]
)
def test_small_and_holed_images_are_made_of_the_pixels_seen_and_depend_on_seed_and_position(pictures, kind, task):
    source = source_of(pictures, **task)
    first, again, later = (source.values(kind, [1, 2], where) for where in ([4, 5], [4, 5], [40, 41]))
    handed = source.values(
        kind,
        [1, 2],
        [4, 5],
        np.stack([source.pixels(View(i, 0, tuple(u), flip)) for i, (u, flip) in zip((1, 2), views_of(source, [4, 5]))]),
    )
    one = source.values(kind, [2], [5])
    for a, b in ((first, again), (first, handed), (first[1:], one)):
        assert all((np.asarray(p) == np.asarray(q)).all() for x, y in zip(a, b) for p, q in zip(parts(x), parts(y)))
    assert any((np.asarray(p) != np.asarray(q)).any() for x, y in zip(first, later) for p, q in zip(parts(x), parts(y)))


def views_of(source, where):
    from ldmcli.data.augment import crop_and_flip

    return list(zip(*crop_and_flip(source.rows, source.config, where, np.asarray(where))))


def parts(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def test_objects_come_in_another_order_each_epoch(tmp_path):
    """The original shuffles them; here the order depends on seed and position, and boxes stay with their categories."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "a.png")
    objects = {"bbox": [[5 * k, 2 * k, 4, 4] for k in range(6)], "category": [f"c{k}" for k in range(6)]}
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "objects": objects}))
    data = DataSettings(source=str(folder), size=(40, 40))
    source = ConditionDataset(open_rows(data, split="train"), DiffusionConfig(data=data), (40, 40), training=True)
    orders = [source.values("layout", [0], [at])[0] for at in range(30)]
    assert len({tuple(one["category"]) for one in orders}) > 20
    for one in orders:
        assert np.allclose(one["bbox"][:, 0], one["category"] * 5 / 40)
    plain = ConditionDataset(source.rows, source.config, (40, 40), training=False)
    assert plain.values("layout", [0], [7])[0]["category"].tolist() == list(range(6))


# --- what is wrong before step 1 --------------------------------------------------------------------------------------


def _captions(folder, rows=4):
    tiny.noisy_images(folder, rows)
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{k:02d}.png", "caption": f"picture {k}"}) for k in range(rows))
    )
    return folder


def _wrong_map(folder):
    tiny.noisy_images(folder, 12)
    for k in range(12):
        Image.fromarray(np.zeros((20, 20 if k else 19), np.uint8)).save(folder / f"m{k}.png")
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{k:02d}.png", "map_file_name": f"m{k}.png"}) for k in range(12))
    )
    return folder


def _empty_layouts(folder):
    tiny.noisy_images(folder, 4)
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{k:02d}.png", "objects": {"bbox": [], "category": []}}) for k in range(4))
    )
    return folder


SIZE = ("--size", 20)
REFUSED = {
    "layout without objects": (_captions, ("--condition", "layout"), 3, "needs an objects column"),
    "map without maps": (_captions, ("--condition", "map"), 3, "caption = caption"),
    "no object at all": (_empty_layouts, ("--condition", "layout"), 3, "no row has a box"),
    "a map of another size": (_wrong_map, ("--condition", "map"), 3, "its map is 19x20 px, the picture 20x20"),
    "an unknown condition": (None, ("--condition", "boxes"), 2, "choose among none, class, text, layout, map"),
    "a task's plane as a condition": (None, ("--condition", "lowres"), 2, "--task sr or inpaint brings it along"),
    "a condition twice": (None, ("--condition", "map+map"), 2, "map is named twice"),
    "a size that the scale does not divide": (None, ("--task", "sr", "--scale", "8"), 2, "must be multiples of 8"),
    "a scale without its task": (None, ("--scale", "4"), 2, "--scale belongs to --task sr"),
    "an unknown task": (None, ("--task", "paint"), 2, "not one of generate, sr, inpaint"),
    "a stream of layouts": (None, ("--condition", "layout", "--streaming"), 2, "leave --streaming away"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line_before_step_1(what, ae, tmp_path):
    make, line, code, message = REFUSED[what]
    data = tiny.SHAPES if make is None else ("--data", make(tmp_path / "data"), *SIZE)
    ending = tiny.train_ldm(tmp_path / "run", ae, *line, data=data, code=code)
    assert message in ending.line and ending.line.startswith("ldm: ")
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_map_of_another_size_is_left_out_on_request_and_named(ae, tmp_path):
    data = ("--data", _wrong_map(tmp_path / "data"), *SIZE, "--val-fraction", 0.3)
    tiny.train_ldm(tmp_path / "run", ae, "--condition", "map", "--skip-bad", data=data)
    assert "00.png: its map is 19x20" in str(tiny.state(tmp_path / "run")["data"]["left_out"])


def test_boxes_beyond_the_picture_are_counted_and_shares_recognised(ae, tmp_path):
    folder = tmp_path / "data"
    tiny.noisy_images(folder, 6)
    (folder / "metadata.jsonl").write_text(
        "\n".join(
            json.dumps(
                {
                    "file_name": f"{k:02d}.png",
                    "objects": {"bbox": [[0.5, 0.5, 0.25, 0.25 if k else 0.9]], "category": ["a"]},
                }
            )
            for k in range(6)
        )
    )
    ending = tiny.train_ldm(
        tmp_path / "run", ae, "--condition", "layout", "--val-fraction", 0.3, data=("--data", folder, *SIZE)
    )
    assert "boxes are taken as shares" in ending.stderr and "1 boxes reach beyond" in ending.stderr


# --- using ------------------------------------------------------------------------------------------------------------


def layout_file(path, *objects, size=(40, 40)):
    told = {"objects": [{"bbox": list(box), "category": kind} for *box, kind in objects]}
    path.write_text(json.dumps(told | ({"size": list(size)} if size else {})))
    return path


def sample(run, out, *more, code=0):
    ending = tiny.ldm("sample", "--model", run, "--steps", 2, "--guidance", 1, "--out", out, *more)
    assert ending.code == code, ending.stderr
    return ending


def test_a_layout_is_drawn_beside_its_sample_at_the_right_pixels(trained, tmp_path):
    file = layout_file(tmp_path / "layout.json", (10, 20, 20, 16, "star"))
    sample(trained("layout"), tmp_path / "out", "--layout", file, "-n", 2)
    drawn, plain = (np.asarray(Image.open(tmp_path / f"out/000000{end}")) for end in ("-layout.png", ".png"))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "000000-layout.png",
        "000000.png",
        "000001-layout.png",
        "000001.png",
        "grid.png",
    ]
    changed = np.zeros((20, 20), bool)  # 40 px of the layout are 20 here: columns 5 … 14, rows 10 … 17
    changed[10:18, 5:15] = True
    changed[11:17, 6:14] = False
    assert (drawn[changed] == colour(1 + 3)).all() and (drawn[~changed] == plain[~changed]).all()


def test_the_same_layout_in_pixels_and_in_shares_gives_the_same_picture(trained, tmp_path):
    run = trained("layout")
    a = layout_file(tmp_path / "a.json", (10, 20, 20, 16, "star"))
    b = layout_file(tmp_path / "b.json", (0.25, 0.5, 0.5, 0.4, 3), size=None)
    c = layout_file(tmp_path / "c.json", (0, 0, 0.5, 0.4, 3), size=None)
    both = tmp_path / "both.json"
    both.write_text(json.dumps([json.loads(path.read_text()) for path in (a, c)]))
    sample(run, tmp_path / "out", "--layout", both, "--layout", b)
    found = [np.asarray(Image.open(tmp_path / f"out/{k:06d}-layout.png")) for k in range(3)]
    model = ldmcli.load(run)
    first, third = (model.sample(layout=path, steps=2, guidance=1, seed=0)[0] for path in (a, str(b)))
    assert (np.asarray(first) == np.asarray(third)).all()
    assert (found[0] != found[1]).any()


def test_a_map_gets_a_legend_and_conditions_go_together(trained, tmp_path):
    index = np.zeros((40, 40), np.uint8)
    index[10:30, 10:30] = 4
    Image.fromarray(index).save(tmp_path / "map.png")
    sample(
        trained("text+map"),
        tmp_path / "out",
        "--map",
        tmp_path / "map.png",
        "--prompt",
        "a star",
        "--guidance",
        "text=2,map=1.5",
    )
    legend = np.asarray(Image.open(tmp_path / "out/000000-map.png"))
    assert (legend[:20, :20] == coloured(index[::2, ::2])).all() and legend.shape[0] > 20
    facts = json.loads(Image.open(tmp_path / "out/000000.png").info["ldm"])
    assert facts["guidance"] == {"text": 2, "map": 1.5} and facts["prompt"] == "a star"


@pytest.mark.parametrize(("task", "command"), [("sr", "ldm upscale"), ("inpaint", "ldm inpaint")])
def test_sample_names_the_command_that_a_task_has(task, command, trained, tmp_path):
    assert command in sample(trained(task), tmp_path / "out", code=2).line


def test_small_and_holed_images_are_taken_from_python(trained):
    low, hole = np.full((10, 10, 3), 90, np.uint8), np.zeros((20, 20), bool)
    hole[:, :10] = True
    larger = ldmcli.load(trained("sr")).sample(image=[low[:5, :5], low[5:, 5:]], steps=2)
    assert [one.size for one in larger] == [(20, 20)] * 2
    whole = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    filled = np.asarray(ldmcli.load(trained("inpaint")).sample(image=whole, mask=hole, steps=2)[0])
    assert (filled[~hole] == whole[~hole]).all() and (filled[hole] != whole[hole]).any()


def test_images_of_any_sizes_go_the_way_of_the_commands(trained):
    """`sample` pads, cuts and fits as `ldm upscale` and `ldm inpaint` do, and keeps the order of what it is given."""
    sr, inpaint = ldmcli.load(trained("sr")), ldmcli.load(trained("inpaint"))
    noise = np.random.default_rng(0)
    low = [noise.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((5, 7), (6, 3), (5, 7))]
    found = sr.sample(image=low, steps=2, seed=3)
    assert [one.size for one in found] == [(28, 20), (12, 24), (28, 20)]
    for k, one in enumerate(found):
        assert (np.asarray(one) == upscale_images(sr, low[k][None], steps=2, seed=3, ids=[k])[0]).all()
    image, hole = noise.integers(0, 256, (23, 41, 3), dtype=np.uint8), np.zeros((23, 41), bool)
    hole[10:20, 5:12] = True
    filled = [np.asarray(one) for one in inpaint.sample(image=image, mask=hole, n=2, steps=2, blend=3)]
    expected = inpaint_images(inpaint, np.stack([image] * 2), np.stack([hole] * 2), steps=2, blend=3)
    assert (np.stack(filled) == expected).all() and (filled[0][~hole] == image[~hole]).all()
    assert (filled[0][hole] != filled[1][hole]).any()


def test_an_image_goes_with_the_other_conditions(trained):
    low = np.full((11, 10, 3), 90, np.uint8)
    model, texts = ldmcli.load(trained("text+sr")), ["a star", "a circle"]
    a, b, c = (
        np.asarray(model.sample(texts[k], image=low, steps=2, guidance=3.0, negative_prompt=no)[0])
        for k, no in ((0, ""), (1, ""), (0, "a circle"))
    )
    assert a.shape == (22, 20, 3) and (a != b).any() and (a != c).any()
    model, hole = ldmcli.load(trained("class+layout+inpaint")), np.zeros((24, 20), bool)
    hole[:20, 2:] = True
    layout = {"objects": [{"bbox": [0, 0, 0.5, 0.5], "category": "star"}]}
    image = np.full((24, 20, 3), 90, np.uint8)
    asked = {"layout": layout, "image": image, "mask": hole, "steps": 2, "guidance": 50.0}
    one, other = (np.asarray(model.sample(classes=[k], **asked)[0]) for k in (0, 1))
    assert (one[~hole] == 90).all() and (one[hole] != other[hole]).any()


def test_tokens_and_layouts_embed_alike_and_planes_reach_the_network(trained):
    model = ldmcli.load(trained("layout"))
    layout = {"objects": [{"bbox": [0, 0, 0.5, 0.5], "category": "star"}]}
    entry = model.network.conditions.entries["layout"]
    ids = entry.prepare([{"bbox": [[0, 0, 0.5, 0.5]], "category": [3]}])["ids"]
    by_layout, by_tokens = model.embed(layout=layout), model.embed(tokens=ids)
    assert torch.equal(by_layout.context, by_tokens.context) and by_layout.context.shape == (1, ids.shape[1], 16)
    told = ldmcli.load(trained("text+map"))
    z, t = torch.zeros(1, 3, 5, 5), torch.tensor([10.0])
    tokens, planes = told.embed("a star"), told.embed(map=np.zeros((20, 20), np.uint8))
    together = told.predict(z, t, tokens, concat=planes)
    assert together.shape == z.shape
    assert torch.equal(together, told.predict(z, t, tokens, concat=planes.concat))
    assert not torch.equal(together, told.predict(z, t, tokens, concat=planes.concat + 1))


def test_every_class_is_drawn_with_its_name(ae, tmp_path):
    tiny.train_ldm(tmp_path / "run", ae, "--condition", "class")
    sample(tmp_path / "run", tmp_path / "out", "--class", "all")
    assert np.asarray(Image.open(tmp_path / "out/grid.png")).shape == (20 + 13 + 4, 7 * 22 + 2, 3)


GOOD = {"size": [40, 40], "objects": [{"bbox": [4, 4, 20, 20], "category": "star"}]}


def changed(**more) -> str:
    return json.dumps(GOOD | more)


def with_object(**more) -> str:
    return changed(objects=[GOOD["objects"][0] | more])


BAD_LAYOUTS = {
    "not JSON": ("{", "not JSON"),
    "not UTF-8": (b"\xff\xfe{", "not UTF-8"),
    "a number": ("7", "a layout is"),
    "an empty list": ("[]", "a layout is"),
    "nothing of a layout": ("{}", "a layout is"),
    "objects that are none": (changed(objects=[1]), '"objects" is a list'),
    "no objects": (changed(objects=[]), "no objects in it"),
    "a size of one number": (changed(size=[4]), '"size" is [4]'),
    "a size of nothing": (changed(size=[0, 4]), '"size" is [0, 4]'),
    "an unknown category": (with_object(category="stra"), "did you mean star"),
    "a category out of range": (with_object(category=7), "no such category among 7"),
    "three numbers": (with_object(bbox=[1, 2, 3]), "four numbers"),
    "text for numbers": (with_object(bbox=["a", 1, 2, 3]), "four numbers"),
    "not a number": (with_object(bbox=[float("nan"), 1, 2, 3]), "four numbers"),
    "no area": (with_object(bbox=[1, 1, 0, 5]), "has no area"),
    "a box outside": (with_object(bbox=[35, 4, 20, 20]), "object 1: bbox [35, 4, 20, 20] reaches outside the picture"),
    "pixels without a size": (json.dumps({"objects": GOOD["objects"]}), "shares 0 … 1"),
}


@pytest.mark.parametrize("what", BAD_LAYOUTS)
def test_a_bad_layout_ends_with_3_and_one_line(what, trained, tmp_path):
    content, message = BAD_LAYOUTS[what]
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ending = sample(trained("layout"), tmp_path / "out", "--layout", path, code=3)
    assert message in ending.line and "bad.json" in ending.line and not (tmp_path / "out").exists()


BAD_MAPS = {
    "an index out of range": (np.full((20, 20), 200, np.uint8), "class index 200; this model knows 0 … 7"),
    "colours": (np.zeros((20, 20, 3), np.uint8), "mode RGB"),
    "another aspect": (np.zeros((20, 30), np.uint8), "30x20 px (width x height) has another aspect"),
    "sixteen bits": (np.zeros((20, 20), np.uint16), "a map holds class indices"),
}


@pytest.mark.parametrize("what", BAD_MAPS)
def test_a_bad_map_ends_with_3_and_one_line(what, trained, tmp_path):
    array, message = BAD_MAPS[what]
    Image.fromarray(array).save(tmp_path / "bad.png")
    ending = sample(trained("map"), tmp_path / "out", "--map", tmp_path / "bad.png", code=3)
    assert message in ending.line and "bad.png" in ending.line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "line", "code", "message"),
    [
        ("layout", (), 2, "--layout: this model draws what boxes say"),
        ("map", (), 2, "--map: this model draws what a class map says"),
        ("layout", ("--map", "x.png"), 2, "--map: this model was trained without map; it takes --layout"),
        ("map", ("--layout", "x.json"), 2, "--layout: this model was trained without layout; it takes --map"),
        ("layout", ("--layout", "gone.json"), 3, "gone.json: No such file"),
        ("map", ("--map", "gone.png"), 3, "gone.png: No such file"),
        ("map", ("--map", "gone.png", "--guidance", "map=x"), 2, "no scale from 0 on"),
    ],
)
def test_what_is_missing_or_not_taken_is_named(task, line, code, message, trained, tmp_path):
    assert message in sample(trained(task), tmp_path / "out", *line, code=code).line


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_boxes_are_outlined_from_first_to_last_pixel():
    white = np.full((10, 20, 3), 255, np.uint8)
    drawn = boxed(white, {"bbox": [[0.1, 0.2, 0.5, 0.6]], "category": [0]}, ["a"])
    ys, xs = np.nonzero((drawn != 255).any(axis=2))
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (2, 11, 2, 7) and len(xs) == 2 * 10 + 2 * 4
    assert box_pixels([0.9, 0.9, 0.5, 0.5], (10, 10)) == (9, 9, 9, 9)


def test_colours_of_neighbouring_classes_differ():
    found = [np.array(colour(k), int) for k in range(40)]
    assert all(np.abs(a - b).sum() > 30 for (i, a), (j, b) in product(enumerate(found), repeat=2) if i != j)


def test_a_legend_leaves_the_picture_and_shows_every_colour():
    picture = coloured(np.arange(16, dtype=np.uint8).reshape(4, 4))
    sheet = with_legend(picture, [(k, f"class {k}") for k in range(16)])
    assert (sheet[:4, :4] == picture).all()
    below = {tuple(pixel) for pixel in sheet[4:].reshape(-1, 3)}
    assert all(colour(k) in below for k in range(16))


# --- published models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["layout2img-openimages256", "semantic_synthesis256", "inpainting_big", "bsr_sr"])
def test_the_plan_of_a_published_model_counts_its_network_and_its_conditioner(name, monkeypatch):
    """The text transformer's head, which published files carry and nothing uses, is not built."""
    from ldmcli.core import config
    from ldmcli.core.presets import PRESETS
    from ldmcli.reports import cost_estimate as planning

    monkeypatch.setattr(planning, "probe_flops_per_s", lambda device, dtype: 1e9)
    preset = PRESETS[name]
    found = planning.plan(
        "diffusion", config.resolve("diffusion", [(name, dict(preset.values))]), first_stage=preset.extra["first_stage"]
    )
    conditioner = preset.extra["conditioner"] or {"parameters": 0}
    head = (conditioner["width"] + 1) * conditioner["vocabulary"] if conditioner.get("kind") == "layout" else 0
    assert found["parameters"] == {"model": preset.extra["parameters"] + conditioner["parameters"] - head}
    assert tuple(found["latent"]) == preset.extra["latent"]

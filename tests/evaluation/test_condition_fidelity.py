"""Whether samples obey: scores by hand, real pictures against shuffled conditions, the judge, tasks beside plain
methods, and all of it through evaluation."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from PIL import Image

from ldmcli.core.errors import UsageError
from ldmcli.core.settings import DataSettings, DiffusionConfig, TaskSettings
from ldmcli.data import shape_reading, shapes
from ldmcli.data.degradations import degrade
from ldmcli.data.rows import Room
from ldmcli.data.sources import open_rows
from ldmcli.evaluation import condition_fidelity as module
from ldmcli.evaluation import evaluate as evaluation
from ldmcli.evaluation import segmenter
from ldmcli.evaluation.condition_fidelity import (
    ConditionedSamples,
    box_iou,
    layout_scores,
    map_scores,
    measure,
    regions,
)
from ldmcli.evaluation.segmenter import train_segmenter

SIZE = (64, 64)


def quiet(total, label):
    return nullcontext(SimpleNamespace(advance=lambda n=1, **fields: None))


def config(source: str, task: str = "generate", size=SIZE, **more) -> DiffusionConfig:
    return DiffusionConfig(data=DataSettings(source=source, size=size, **more), task=TaskSettings(name=task, scale=4))


# --- scores by hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "a, b, wanted",
    [
        ((0, 0, 1, 1), (0, 0, 1, 1), 1),
        ((0, 0, 1, 1), (0, 0, 0.5, 1), 0.5),
        ((0, 0, 1, 1), (1, 0, 1, 1), 0),
        ((0, 0, 2, 2), (1, 1, 2, 2), 1 / 7),
    ],
)
def test_intersection_over_union(a, b, wanted):
    assert box_iou(a, b) == box_iou(b, a) == pytest.approx(wanted)


def test_each_box_is_matched_with_the_best_thing_of_its_category():
    box, half = (0, 0, 0.5, 0.5), (0, 0, 0.5, 0.25)
    seen = [[(1, half), (1, box), (2, box)], []]
    asked = [
        {"bbox": np.array([box, half, box]), "category": np.array([1, 2, 7])},
        {"bbox": np.array([box]), "category": np.array([1])},
    ]
    assert layout_scores(seen, asked) == {"iou": pytest.approx((1 + 0.5 + 0 + 0) / 4), "found": 0.5}
    assert layout_scores([[]], [{"bbox": np.zeros((0, 4)), "category": np.zeros(0)}]) == {"iou": 0, "found": 0}


def test_map_scores_leave_out_what_has_no_class():
    asked = [np.array([[0, 0, 1, 255]], np.uint8), np.array([[1, 1]], np.uint8)]
    seen = [np.array([[0, 1, 1, 3]], np.uint8), np.array([[1, 0]], np.uint8)]
    assert map_scores(seen, asked) == {"accuracy": pytest.approx(3 / 5), "miou": pytest.approx((1 / 3 + 2 / 4) / 2)}


def test_regions_are_connected_and_no_specks():
    classes = np.zeros((40, 20), np.uint8)
    classes[4:14, 2:12], classes[30:34, 0:4], classes[38, 18], classes[20:25, 10:15] = 5, 5, 5, 9
    assert regions(classes, {5: 0}) == [(0, (0.1, 0.1, 0.5, 0.25)), (0, (0, 0.75, 0.2, 0.1))]


# --- shapes, exactly -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 2, 3])
def test_real_shapes_obey_and_shuffled_ones_do_not(level):
    settings = config(f"shapes:{level}")
    rows = open_rows(settings.data, split="validation")
    ids = list(range(40))
    images = [rows.pixels(i, SIZE) for i in ids]
    for kind in ("layout", "map"):
        samples = ConditionedSamples(
            images=images, rows=rows, training=rows, ids=ids, config=settings, size=SIZE, progress=quiet
        )
        scores = measure(kind, samples)
        values = scores.values
        assert scores.protocol[f"{kind}_obedience"]["n"] == 40
        assert all(values[key] == values[f"{key}_real"] for key in values if "_" not in key[7:])
        if kind == "layout":
            assert values["layout_iou"] > 0.98 and values["layout_found"] == 1 and values["layout_iou_shuffled"] < 0.15
        else:
            assert values["map_accuracy"] > 0.999 and values["map_miou"] > 0.99
            assert values["map_accuracy_shuffled"] < 0.93 and values["map_miou_shuffled"] < 0.25


def test_find_reads_shape_colour_and_box():
    spec = shapes.Spec(1, 1, (shapes.ShapeObject(3, 4, 0.4, 0.6, 0.2),))
    ((shape, colour, box),) = shape_reading.find(shapes.render(spec, SIZE))
    assert (shape, colour) == (3, 4)
    assert np.abs(np.array(box) - shapes.boxes(spec, SIZE)[0]).max() < 0.3  # pixels
    assert shape_reading.find(np.zeros((*SIZE, 3), np.uint8)) == []
    moved = [(shape, np.array(box) + (8, 0, 0, 0))]
    asked = [{"bbox": np.array(shapes.boxes(spec, SIZE)), "category": np.array([3])}]
    assert 0.4 < layout_scores([moved], asked)["iou"] < 0.75


def test_a_shape_in_another_colour_obeys_and_another_shape_does_not():
    asked = shapes.Spec(1, 0, (shapes.ShapeObject(0, 0, 0.5, 0.5, 0.2),))
    for shape, colour, good in ((0, 5, True), (1, 0, False)):
        image = shapes.render(shapes.Spec(1, 2, (shapes.ShapeObject(shape, colour, 0.5, 0.5, 0.2),)), SIZE)
        accuracy = (shape_reading.classes_of(image) == shapes.segment(asked, SIZE)).mean()
        assert (accuracy > 0.99) == good


# --- a judge for everything else -------------------------------------------------------------------------------


def scenes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy grounds with a striped and a plain square: pictures and class maps 0, 1, 2."""
    draw = np.random.default_rng(seed)
    images, maps = draw.integers(90, 140, (count, 32, 32, 3)).astype(np.uint8), np.zeros((count, 32, 32), np.uint8)
    for k in range(count):
        for kind, left in ((1, draw.integers(1, 5)), (2, draw.integers(17, 20))):
            top, side = draw.integers(1, 18), draw.integers(8, 12)
            where = (k, slice(top, top + side), slice(left, left + side))
            maps[where] = kind
            images[where] = (230, 40, 40)
            if kind == 1:
                images[k, top : top + side : 4, left : left + side] = 255
    return images, maps


@pytest.fixture(scope="module")
def judge():
    images, maps = scenes(24, 0)
    return train_segmenter(images.__getitem__, maps.__getitem__, 24, 3, steps=60)


def test_a_judge_learns_classes_that_look_different(judge):
    images, maps = scenes(12, 1)
    seen = judge.maps(images)
    assert map_scores(seen, list(maps))["accuracy"] > 0.9
    assert map_scores(seen, list(maps[1:]) + [maps[0]])["miou"] < map_scores(seen, list(maps))["miou"] - 0.3
    things = [regions(one, {1: 0, 2: 1}) for one in seen]
    asked = [
        {"bbox": np.array([box for _, box in boxes]), "category": np.array([kind for kind, _ in boxes])}
        for boxes in (regions(one, {1: 0, 2: 1}) for one in maps)
    ]
    assert layout_scores(things, asked)["iou"] > 0.6


def test_a_judge_is_kept_and_found_again(tmp_path, monkeypatch):
    images, maps = scenes(10, 2)
    for k, (image, classes) in enumerate(zip(images, maps)):
        for name, array in (("p", image), ("m", classes)):
            Image.fromarray(array).save(tmp_path / f"{name}{k}.png")

    class Rows:
        source, split, fingerprint, category_names = str(tmp_path), "train", "abc", ["striped", "plain"]
        map_names, room = ["ground", "striped", "plain"], Room()
        has = staticmethod(lambda role: role in ("map", "objects"))
        __len__ = staticmethod(lambda: 10)
        pixels = staticmethod(lambda i, size, crop="center", u=None: images[i])
        map_pixels = staticmethod(lambda i, size, crop="center", u=None: maps[i])

    monkeypatch.setattr(module, "TRAIN_STEPS", 2)
    calls = []
    real = segmenter.train_segmenter
    monkeypatch.setattr(module, "train_segmenter", lambda *a, **k: (calls.append(1), real(*a, steps=2, **k))[1])
    settings = config("x", size=(32, 32), cache_dir=str(tmp_path / "cache"))
    readers = [module.open_reader(kind, Rows(), Rows(), settings, (32, 32), quiet) for kind in ("map", "layout")]
    assert len(calls) == 1 and readers[0].protocol["judge"] == readers[1].protocol["judge"]  # one judge, of the map
    first, again = (one.maps(list(images[:3])) for one in readers)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    next((tmp_path / "cache" / "judges").iterdir()).write_bytes(b"damaged")
    module.open_reader("map", Rows(), Rows(), settings, (32, 32), quiet)
    assert len(calls) == 2


# --- tasks beside plain methods --------------------------------------------------------------------------------


class TaskModel:
    """A model whose answers are given by a function of (true picture, what the model was told)."""

    kind, fingerprint, precision = "diffusion", "f" * 64, "float32"

    def __init__(self, task: str, level: int = 1):
        self.config = config(f"shapes:{level}", task)
        kinds = {"sr": ("lowres",), "inpaint": ("masked",)}[task]
        self.conditions = SimpleNamespace(kinds=kinds, droppable=(), entries={})
        self.trained_size = (64, 64)


@pytest.fixture
def answers(monkeypatch):
    """Perfect answers of both kinds, and the calls."""
    rows = open_rows(config("shapes").data, split="validation")
    calls = []

    def upscale(model, low, *, seed, ids, **settings):
        calls.append((low, list(ids), settings))
        return np.stack([rows.pixels(i, SIZE) for i in ids])

    def inpaint(model, images, masks, *, seed, ids, **settings):
        calls.append((images, list(ids), settings))
        return np.stack([np.where(hole[..., None], rows.pixels(i, SIZE), 0) for i, hole in zip(ids, masks)])

    monkeypatch.setattr("ldmcli.evaluation.baselines.upscale_images", upscale)
    monkeypatch.setattr("ldmcli.evaluation.baselines.inpaint_images", inpaint)
    return calls


def test_super_resolution_beside_bicubic(answers, monkeypatch):
    monkeypatch.setattr("ldmcli.evaluation.subjects.evenly_spaced", lambda count, n: list(range(n)))
    result = evaluation.evaluate(model=TaskModel("sr"), metrics=["psnr", "ssim"], n=6, batch_size=4, steps=3)
    values = result["metrics"]
    assert values["psnr"] == float("inf") and values["ssim"] == pytest.approx(1)
    assert 15 < values["psnr_bicubic"] < 40 and 0.5 < values["ssim_bicubic"] < 0.99
    assert (result["task"], result["scale"], result["degradation"]) == ("sr", 4, "bicubic")
    assert [ids for _, ids, _ in answers] == [[0, 1, 2, 3], [4, 5]] and answers[0][2] == {"steps": 3, "values": {}}
    low = answers[0][0]
    rows = open_rows(config("shapes").data, split="validation")
    assert low.shape == (4, 16, 16, 3) and np.array_equal(low[1], degrade(rows.pixels(1, SIZE), 4, "bicubic", 0))


def test_inpainting_pastes_known_pixels_and_states_the_share(answers, monkeypatch):
    monkeypatch.setattr("ldmcli.evaluation.subjects.evenly_spaced", lambda count, n: list(range(n)))
    monkeypatch.setattr("ldmcli.evaluation.baselines.has_biharmonic", lambda: False)
    result = evaluation.evaluate(model=TaskModel("inpaint"), metrics=["psnr"], n=5)
    assert result["metrics"]["psnr"] == float("inf")  # black outside of holes, and yet equal: known pixels are pasted
    assert result["baselines"] == ["smooth"] and 10 < result["metrics"]["psnr_smooth"] < 60
    assert any("scikit-image" in text for text in result["warnings"])
    assert result["masked_share"]["n"] == 5 and 0.04 <= result["masked_share"]["mean"] <= 0.75


def test_biharmonic_filling_where_it_is_installed(answers, monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setattr("ldmcli.evaluation.subjects.evenly_spaced", lambda count, n: list(range(n)))
    result = evaluation.evaluate(model=TaskModel("inpaint"), metrics=["psnr"], n=3)
    assert 10 < result["metrics"]["psnr_biharmonic"] < 60


# --- through the command line ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    data = ("--data", "shapes:2", "--limit", 12, "--size", "32x32")
    tiny.train_ldm(folder / "both", "none", "--condition", "layout+map", data=data, steps=2)
    return folder / "both"


def test_evaluation_of_an_untrained_model_reports_all_three(run):
    ending = tiny.ldm("eval-fid", "--model", run, "--metrics", "layout,map", "-n", 6, "--steps", 2, "--json")
    assert ending.code == 0, ending.stderr
    values = ending.json["metrics"]
    for key in ("layout_iou", "layout_found", "map_accuracy", "map_miou"):
        assert {key, f"{key}_shuffled", f"{key}_real"} <= values.keys()
    assert values["layout_iou_real"] > 0.9 and values["layout_iou"] < 0.5
    assert values["map_accuracy_real"] > 0.97 and ending.json["extractor"] is None
    assert ending.json["map_obedience"]["reader"] == "templates of the shapes"
    below = tiny.ldm(
        "eval-fid", "--model", run, "--metrics", "layout", "-n", 4, "--steps", 2, "--fail-below", "layout=0.9"
    )
    assert below.code == 8 and "layout_iou" in below.line


def test_what_does_not_go_together_is_refused(run, tmp_path):
    assert tiny.ldm("eval-fid", "--model", run, "--metrics", "psnr").code == 2
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    ending = tiny.ldm("eval-fid", "--images", tmp_path, "--data", "shapes", "--metrics", "layout")
    assert ending.code == 2 and "--condition layout" in ending.line
    with pytest.raises(UsageError, match="trained without map"):
        evaluation.evaluate(model=TaskModel("sr"), metrics=["map"])

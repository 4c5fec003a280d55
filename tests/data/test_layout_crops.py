"""Layouts of random crops tell where the crop lies, as the published models were trained; rows are chosen by boxes."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from ldmcli.conditions.dataset import ConditionDataset
from ldmcli.core import config
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DataSettings
from ldmcli.data.augment import crop_and_flip
from ldmcli.data.sources import open_rows
from ldmcli.networks.layout import LayoutConditioner

BOXES = [[[8, 6, 40, 30], [40, 30, 40, 30]], [[0, 0, 80, 60]], [[10, 10, 2, 2], [20, 20, 20, 20], [0, 0, 8, 6]]]


def folder(where, shares: bool = False):
    """Three pictures of 80 x 60 px with 2, 1 and 3 boxes, in pixels or shares, and one for validation."""
    lines = []
    for k, boxes in enumerate([*BOXES, BOXES[0]]):
        part = where / ("train" if k < len(BOXES) else "validation")
        part.mkdir(exist_ok=True, parents=True)
        pixels = np.random.default_rng(k).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(part / f"{k}.png")
        told = [[x / 80, y / 60, w / 80, h / 60] for x, y, w, h in boxes] if shares else boxes
        line = {"file_name": f"{k}.png", "objects": {"bbox": told, "category": [f"c{j}" for j in range(len(told))]}}
        lines.append((part, json.dumps(line)))
    for part in {part for part, _ in lines}:
        (part / "metadata.jsonl").write_text("\n".join(line for other, line in lines if other == part) + "\n")
    return where


def source(where, *, training: bool = True, **values) -> ConditionDataset:
    settings = {
        "data.source": str(where),
        "data.size": "32",
        "condition.kinds": "layout",
        "condition.crop_tokens": True,
        "data.crop": "random",
        "data.crop_min": 0.5,
        **values,
    }
    found = config.resolve("diffusion", [("test", settings)]).config
    rows = open_rows(found.data, split="train" if training else "validation")
    return ConditionDataset(rows, found, (32, 32), training=training)


def condition() -> LayoutConditioner:
    settings = config.resolve("diffusion", []).config.condition
    return LayoutConditioner(settings, {"categories": ["c0", "c1", "c2"], "length": 92, "vocabulary": 8192})


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shares", [False, True])
def test_tokens_tell_boxes_in_the_whole_picture_and_where_the_crop_lies(flip, shares, tmp_path):
    made = source(folder(tmp_path, shares), **{"data.flip": flip})
    made.rows.boxes_are_shares = shares
    where = list(range(24))
    ids = [0] * len(where)
    crops, mirrored = crop_and_flip(made.rows, made.config, ids, np.asarray(where))
    layout, seen = condition(), set()
    told = layout.prepare(made.values("layout", ids, where))["ids"]
    assert any(mirrored) == flip
    for tokens, (down, across, zoom), mirror in zip(told.numpy(), crops, mirrored):
        categories, boxes, crop = layout.layout.read(tokens)
        height, width = 1 / zoom, 60 / 80 / zoom  # the cut is square: the short side over the zoom
        left, top = across * (1 - width), down * (1 - height)
        left = 1 - left - width if mirror else left
        assert np.abs(crop - [left, top, width, height]).max() < 0.03
        for category, box in zip(categories, boxes):
            x, y, w, h = np.array(BOXES[0][category]) / (80, 60, 80, 60)
            assert np.abs(box - [1 - x - w if mirror else x, y, w, h]).max() < 0.012
        seen.add(tuple(tokens[-2:]))
    assert len(seen) > 12


def test_validation_tells_the_crop_in_the_middle(tmp_path):
    made = source(folder(tmp_path), training=False)
    layout = condition()
    *_, crop = layout.layout.read(layout.prepare(made.values("layout", [0], [0]))["ids"][0].numpy())
    assert np.abs(crop - [0.125, 0, 0.75, 1]).max() < 0.012


def test_without_crop_tokens_boxes_are_in_the_crop_and_the_crop_is_all(tmp_path):
    made = source(folder(tmp_path), **{"condition.crop_tokens": False})
    values = made.values("layout", [0] * 4, range(4))
    assert all(value.keys() == {"bbox", "category"} for value in values)
    assert {tuple(row[-2:].tolist()) for row in condition().prepare(values)["ids"]} == {(0, 8099)}


def test_the_embedded_shapes_are_never_cut():
    made = source("shapes", **{"data.limit": 4})
    crops = {tuple(value["crop"]) for value in made.values("layout", range(4), range(4))}
    assert crops == {(0.0, 0.0, 1.0, 1.0)}


def test_a_run_trains_with_crop_tokens_and_is_told_layouts(tmp_path):
    out = tmp_path / "run"
    tiny.train_ldm(
        out,
        "none",
        "--condition",
        "layout",
        "--crop",
        "random",
        "--set",
        "condition.crop_tokens=true",
        "--set",
        "data.crop_min=0.5",
        "--sample-every",
        1,
        data=("--data", folder(tmp_path / "data"), "--size", 16),
        steps=1,
    )
    (tmp_path / "layout.json").write_text(json.dumps({"objects": [{"bbox": [0.1, 0.1, 0.5, 0.5], "category": "c0"}]}))
    ending = tiny.ldm(
        "sample", "--model", out, "--layout", tmp_path / "layout.json", "-n", 1, "--steps", 2, "--out", tmp_path / "out"
    )
    assert ending.code == 0, ending.stderr


# --- rows by their boxes ----------------------------------------------------------------------------------------------


def chosen(where, **values):
    return open_rows(DataSettings(source=str(where), **values))


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize(
    "values, names",
    [
        ({"min_objects": 2}, ["0.png", "2.png"]),
        ({"max_objects": 2}, ["0.png", "1.png"]),
        ({"min_objects": 2, "max_objects": 2}, ["0.png"]),
        ({"min_objects": 3, "min_box_area": 0.0005}, ["2.png"]),
        ({"min_objects": 2, "min_box_area": 0.005}, ["0.png", "2.png"]),
        ({"min_objects": 2, "min_box_area": 0.05}, ["0.png"]),
        ({"min_box_area": 0.5}, ["0.png", "1.png", "2.png"]),
    ],
)
def test_rows_are_chosen_by_the_number_and_size_of_their_boxes(values, names, shares, tmp_path):
    rows = chosen(folder(tmp_path, shares), **values)
    assert [rows.name(i).split("/")[-1] for i in range(len(rows))] == names
    notes = [note for note in rows.notes if "boxes" in note]
    assert len(notes) == (len(names) < 3)
    if notes:
        assert notes[0].startswith(f"{3 - len(names)} of 3 train rows")


def test_small_boxes_are_not_told(tmp_path):
    rows = chosen(folder(tmp_path), min_box_area=0.005)
    assert [len(rows.objects(i)["category"]) for i in range(3)] == [2, 1, 2]
    assert len(rows.boxes(2, (32, 32))["category"]) <= 2


def test_what_is_left_out_is_said_before_training(tmp_path):
    ending = tiny.train_ldm(
        tmp_path / "run",
        "none",
        "--condition",
        "layout",
        "--set",
        "data.min_objects=2",
        data=("--data", folder(tmp_path / "data"), "--size", 16),
        steps=1,
    )
    assert ending.stderr.count("1 of 3 train rows, without 2 boxes or more, left out") == 1
    assert tiny.state(tmp_path / "run")["data"]["rows"] == 2


def test_bounds_that_leave_nothing_or_find_no_boxes_are_told(tmp_path):
    with pytest.raises(InputError, match="none of 3 rows has 9 boxes or more"):
        chosen(folder(tmp_path / "a"), min_objects=9)
    tiny.noisy_images(tmp_path / "b", 3)
    with pytest.raises(InputError, match="no objects column"):
        chosen(tmp_path / "b", min_objects=1)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"min_objects": 3, "max_objects": 2}, "less than data.min_objects"),
        ({"min_objects": -1}, "must not be negative"),
        ({"min_box_area": 1.0}, "below 1"),
        ({"min_objects": 2, "streaming": True}, "all rows beforehand"),
    ],
)
def test_bounds_that_contradict_each_other_are_refused(values, said):
    with pytest.raises(UsageError, match=said):
        DataSettings(**values)

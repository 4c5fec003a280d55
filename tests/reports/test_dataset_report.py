"""`ldm data` shows what is in a data set, and names what is wrong with it."""

import csv
import shlex
from pathlib import Path

import numpy as np
import pytest
from golden_cases import shared
from PIL import Image
from scipy import ndimage

from ldmcli.core.errors import InputError
from ldmcli.core.settings import DataSettings
from ldmcli.data import near_copies
from ldmcli.data.decode import EXTENSIONS
from ldmcli.reports import dataset_advice
from ldmcli.reports.dataset_advice import (
    EPOCHS,
    FIRST_STAGE_STEPS,
    LEAST_STEPS,
    Seen,
    advice_sentences,
    advise,
    command_lines,
    flip_is_safe,
)
from ldmcli.reports.dataset_report import inspect, inspect_text
from ldmcli.training.best import SMALL_SET


@pytest.fixture(autouse=True)
def known_speed(monkeypatch):
    """A step takes a second, however fast this machine is."""
    monkeypatch.setattr(dataset_advice, "_seconds_per_step", lambda *given: 1.0)


def picture(path, value=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)
    return path


def captioned(folder, captions):
    for k, text in enumerate(captions):
        picture(folder / f"{k}.png", k)
        (folder / f"{k}.txt").write_text(text, encoding="utf-8")
    return folder


def look(source, out, **settings):
    return inspect(DataSettings(source=str(source), **settings), out)


def test_bad_files_are_named_with_their_reason_and_stop_nothing(tmp_path):
    for k in range(4):
        picture(tmp_path / "data" / f"{k}.png", k)
    (tmp_path / "data" / "empty.png").write_bytes(b"")
    (tmp_path / "data" / "page.jpg").write_text("<html>")
    found = look(tmp_path / "data", tmp_path / "out")
    assert {one["file"]: one["reason"] for one in found["bad"]} == {
        "empty.png": "an empty file",
        "page.jpg": "not a picture of a known format (an HTML page)",
    }
    assert sum(found["rows"].values()) == 6
    text = inspect_text(found)
    assert "empty.png: an empty file" in text and "bad         2 files" in text


def test_every_picture_that_cannot_be_read_is_listed_and_no_other(tmp_path):
    folder = shared("broken")
    named = {one["file"] for one in look(folder, tmp_path)["bad"]}
    with open(folder / "EXPECTED.tsv", newline="", encoding="utf-8") as file:
        expected = {row["file"]: row["readable"] for row in csv.DictReader(file, delimiter="\t")}
    pictures = {name for name in expected if (folder / name).is_file() and (folder / name).suffix.lower() in EXTENSIONS}
    assert {name for name in pictures if expected[name] == "no"} <= named
    assert not {name for name in named if expected[name] == "yes"}


def test_copies_are_found_and_told(tmp_path):
    for k in range(5):
        picture(tmp_path / "data" / f"{k}.png", k)
    for name in ("copy", "again"):
        (tmp_path / "data" / f"{name}.png").write_bytes((tmp_path / "data" / "3.png").read_bytes())
    found = look(tmp_path / "data", tmp_path / "out")["duplicates"]
    assert (found["groups"], found["rows"]) == (1, 3)
    assert sorted(found["examples"][0]) == ["3.png", "again.png", "copy.png"]
    assert found["in_both_splits"] == 0  # rows are held out by content


def test_copies_across_given_splits_are_counted(tmp_path):
    picture(tmp_path / "data" / "train" / "a.png", 1)
    picture(tmp_path / "data" / "train" / "b.png", 2)
    picture(tmp_path / "data" / "test" / "c.png", 1)
    found = look(tmp_path / "data", tmp_path / "out")
    assert found["rows"] == {"train": 2, "validation": 1} and found["duplicates"]["in_both_splits"] == 1
    assert "1 of them in both splits" in inspect_text(found)


def test_classes_are_counted_over_both_splits(tmp_path):
    for name, count in (("cat", 5), ("dog", 3)):
        for k in range(count):
            picture(tmp_path / "data" / name / f"{k}.png", 20 * k + len(name) + (name == "dog"))
    found = look(tmp_path / "data", tmp_path / "out")
    assert found["classes"] == {"cat": 5, "dog": 3} and found["columns"]["label"] == "label"
    assert found["captions"] is None


def test_captions_are_measured_and_shown_without_control_characters(tmp_path):
    folder = captioned(tmp_path / "data", ["a b c", "a \x1b[31mred one", "", "a b c", "one two three four five six"])
    found = look(folder, tmp_path / "out")["captions"]
    assert (found["with_text"], found["empty"], found["different"]) == (4, 1, 3)
    assert (found["words_median"], found["words_most"]) == (3, 6)
    assert not any("\x1b" in text for text in found["examples"])


def test_sizes_are_those_of_the_files(tmp_path):
    for k, size in enumerate([(8, 8), (8, 8), (10, 30), (4, 6)]):
        picture(tmp_path / "data" / f"{k}.png", k, size)
    found = look(tmp_path / "data", tmp_path / "out", size=(8, 8))["sizes"]
    assert (found["smallest"], found["largest"], found["different"]) == ("4x6", "10x30", 3)
    assert found["common"]["8x8"] == 2 and found["enlarged_at_size"] == 1


def test_contact_sheet_shows_good_pictures_as_training_sees_them(tmp_path):
    for k in range(3):
        picture(tmp_path / "data" / f"{k}.png", 50 + k, (16, 16))
    (tmp_path / "data" / "bad.png").write_bytes(b"nothing")
    found = look(tmp_path / "data", tmp_path / "out", size=(8, 8))
    sheet = np.asarray(Image.open(found["contact_sheet"]).convert("RGB"))
    assert sheet.shape == (12, 32, 3)
    assert sorted({int(v) for v in np.unique(sheet)} - {255}) == [50, 51, 52]


def test_rows_without_partners_are_notes_rather_than_ends(tmp_path):
    folder = captioned(tmp_path / "data", ["a", "b", "c"])
    picture(folder / "lonely.png", 99)
    found = look(folder, tmp_path / "out")
    assert any("without a text file" in note for note in found["notes"])


def test_one_row_says_that_nothing_is_held_out(tmp_path):
    picture(tmp_path / "data" / "only.png")
    found = look(tmp_path / "data", tmp_path / "out")
    assert found["rows"] == {"train": 1} and "nothing is held out for validation" in found["notes"]


def test_embedded_shapes_are_described(tmp_path):
    found = look("shapes", tmp_path, limit=40)
    assert found["rows"]["train"] == 40 and not found["bad"]
    assert sum(found["classes"].values()) == sum(found["rows"].values())
    assert found["objects"]["per_image_most"] == 1


def test_data_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(InputError):
        look(tmp_path / "absent", tmp_path / "out")


def test_text_fits_eighty_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a path in a command to copy is not broken
    folder = captioned(Path("data"), ["word " * 60, "b", "c"])
    text = inspect_text(look(folder, tmp_path / "out"))
    assert max(map(len, text.splitlines())) <= 80
    assert "1,000 steps of 2 see each picture 1,000 times" in " ".join(text.split())


# --- near copies -----------------------------------------------------------------------------------------------


def drawing(seed: int, side: int = 64) -> np.ndarray:
    """A picture unlike that of any other seed."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(side, side, 3)), (side / 12,) * 2 + (0,))
    return np.clip(128 + 60 * noise / noise.std(), 0, 255).astype(np.uint8)


def stored(folder, name, pixels, size=None, **how):
    folder.mkdir(exist_ok=True)
    image = Image.fromarray(pixels)
    (image.resize(size) if size else image).save(folder / name, **how)


def moved(pixels):
    return np.roll(pixels, 1, axis=1)


@pytest.mark.parametrize(
    "name, change, saved, how",
    [
        ("z.jpg", lambda one: one, {"quality": 75}, "alike"),
        ("z.png", lambda one: one[:, ::-1], {}, "mirrored"),
        ("z.png", moved, {}, "shifted"),
        ("z.jpg", lambda one: one[:, ::-1], {"quality": 75}, "mirrored"),
        ("z.png", lambda one: one, {"size": (96, 96)}, "alike"),
        ("z.png", lambda one: 255 - one, {}, None),
        ("z.png", lambda one: drawing(99), {}, None),
        ("z.png", lambda one: np.full_like(one, 128), {}, None),
    ],
)
def test_near_copies_are_found_in_whatever_form_and_nothing_else(tmp_path, name, change, saved, how):
    for k in range(12):
        stored(tmp_path / "data", f"{k:02d}.png", drawing(k))
    stored(tmp_path / "data", name, np.ascontiguousarray(change(drawing(4))), **saved)
    found = look(tmp_path / "data", tmp_path / "out")
    near, training = found["near_duplicates"], found["training"]
    assert [(set(pair["files"]), pair["how"]) for pair in near["pairs"]] == [({"04.png", name}, how)] * bool(how)
    assert near["count"] == len(near["pairs"]) and not found["duplicates"]["groups"]
    across = near["in_both_splits"]
    assert training["different"] == found["rows"]["train"] - (near["count"] - across)
    text = inspect_text(found)
    assert ("near copies 1 pair" in text) == bool(how) and (f"({how})" in text) == bool(how)


def test_equal_files_are_duplicates_and_no_near_copies(tmp_path):
    for k, seed in enumerate((1, 2, 3, 3)):
        stored(tmp_path / "data", f"{k}.png", drawing(seed))
    found = look(tmp_path / "data", tmp_path / "out")
    assert found["duplicates"]["groups"] == 1 and found["near_duplicates"]["count"] == 0
    assert found["training"]["different"] + found["rows"]["validation"] == 3


def test_many_near_copies_are_counted_and_a_few_named(tmp_path):
    for k in range(8):
        for quality in (60, 95):
            stored(tmp_path / "data", f"{k}-{quality}.jpg", drawing(k), quality=quality)
    found = look(tmp_path / "data", tmp_path / "out")
    assert found["near_duplicates"]["count"] == 8 and "and 3 more" in inspect_text(found)


def test_pairs_that_are_looked_at_are_the_likest(monkeypatch):
    monkeypatch.setattr(near_copies, "LOOKED_AT", 1)
    monkeypatch.setattr(near_copies, "BLOCK", 2)
    images = [Image.fromarray(one) for one in (drawing(0), drawing(1), drawing(2), moved(drawing(1)), drawing(2))]
    signatures = np.stack([near_copies.signature(one) for one in images])
    found = near_copies.near_pairs(signatures, images.__getitem__)
    assert [(pair.first, pair.second, pair.distance) for pair in found] == [(2, 4, 0.0)]


def test_drawn_and_streamed_data_have_no_near_copies(tmp_path):
    assert look("shapes", tmp_path, limit=40)["near_duplicates"] is None
    for k in range(3):
        stored(tmp_path / "data", f"{k}.png", drawing(k))
    assert look(tmp_path / "data", tmp_path / "out", streaming=True)["training"] is None


# --- advice ----------------------------------------------------------------------------------------------------


def seen(different=300, **facts):
    given = {
        "settings": DataSettings(source="my pictures"),
        "rows": different,
        "held_out": 64,
        "by_share": True,
        "short_side": 512,
        "kind": "text",
        "texts": ["a red bicycle"],
        "bad": False,
    }
    return Seen(different=different, **(given | facts))


LOOKS = ("--set train.eval_novelty=true", "--set train.eval_samples=256")


@pytest.mark.parametrize(
    "facts, command, there, absent",
    [
        ({}, 1, ("--data my pictures", "--size 64", "--condition text", "--flip", *LOOKS), ("--skip-bad", "limit")),
        ({}, 0, ("train-ae", "--flip", "--out runs/my-pictures-ae"), ("--condition", *LOOKS)),
        ({"kind": "", "texts": ()}, 1, ("--condition none",), ("--flip",)),
        ({"texts": ["a cup", "the left hand"]}, 1, (), ("--flip",)),
        ({"kind": "class", "texts": ["0", "1"]}, 1, ("--condition class",), ("--flip",)),
        ({"bad": True}, 0, ("--skip-bad",), ()),
        ({"short_side": 28}, 1, ("--size 32",), ()),
        ({"settings": DataSettings(source="x", size=(64, 96), limit=9, flip=True)}, 1, ("--size 64x96",), ("--flip",)),
        ({"settings": DataSettings(source="x", limit=9)}, 0, ("--set data.limit=9",), ()),
        (
            {"settings": DataSettings(source="x", captions=("a {name}", "{name}, {style}"))},
            1,
            ('--set data.captions=["a {name}", "{name}, {style}"]',),
            (),
        ),
        ({"held_out": 15}, 0, ("--val-fraction 0.22",), ()),
        ({"held_out": 15, "by_share": False}, 1, (), ("--val-fraction", *LOOKS)),
        ({"different": 30, "held_out": 2}, 1, ("--batch-size 16",), ("--val-fraction", *LOOKS)),
        ({"different": SMALL_SET}, 1, ("--steps 10000",), LOOKS),
        ({"different": 1, "rows": 1, "held_out": 1}, 1, ("--batch-size 1",), LOOKS),
    ],
)
def test_commands_fit_the_data(facts, command, there, absent):
    lines = command_lines(advise(seen(**facts)), 80)
    first = [k for k, line in enumerate(lines) if line.startswith("ldm ")][command]
    whole = " ".join(line.removesuffix("\\").strip() for line in lines[first:]).split(" ldm ")[0]
    words = " ".join(shlex.split(whole))
    assert [part for part in there if part not in words] == [part for part in absent if part in words] == [], words


def test_steps_grow_with_the_pictures_and_are_never_too_few():
    few, more = advise(seen(300)), advise(seen(3000, rows=3000))
    assert few["steps"] == LEAST_STEPS and LEAST_STEPS < more["steps"] and more["epochs"] <= EPOCHS
    assert few["seconds"] == {"first_stage": FIRST_STAGE_STEPS, "diffusion": LEAST_STEPS}
    assert advise(seen(10, rows=10))["steps"] == LEAST_STEPS
    said = [dict(advice_sentences(one))["window"] for one in (few, more)]
    assert ["may be copied first" in text for text in said] == [True, False] and all("RUN@best" in one for one in said)
    assert not advise(seen(SMALL_SET))["few"]


@pytest.mark.parametrize(
    "texts, safe",
    [
        (["a bicycle", "two dogs"], True),
        (["cat", "dog"], True),
        (["a bicycle", "the Flag of Norway"], False),
        (["a ten o’clock"], False),
        (["7"], False),
        (["a"], False),
        (["copyright"], True),
        ([], False),
    ],
)
def test_mirroring_is_safe_where_captions_say_nothing_of_sides(texts, safe):
    assert flip_is_safe(texts) == safe


@pytest.mark.parametrize("width", [60, 80])
def test_advice_is_read_and_copied_at_the_width(tmp_path, width):
    folder = captioned(tmp_path / "data", [f"picture of kind {k}" for k in range(30)])
    found = look(folder, tmp_path / "out")
    found["training"]["commands"][0][3] = "a folder"
    text = inspect_text(found, width)
    assert max(map(len, text.splitlines())) <= max(width, 12 + len(str(folder)) + len("ldm train-ldm --data "))
    commands = text[text.index("ldm train-ae") :].replace("\\\n", " ")
    assert [shlex.split(line) for line in commands.splitlines() if line] == found["training"]["commands"]
    assert "learn from" in text and "too few are held out" in text

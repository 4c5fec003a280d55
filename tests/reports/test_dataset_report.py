"""`ldm data` shows what is in a data set, and names what is wrong with it."""

import csv

import numpy as np
import pytest
from golden_cases import shared
from PIL import Image

from ldmcli.core.errors import InputError
from ldmcli.core.settings import DataSettings
from ldmcli.data.decode import EXTENSIONS
from ldmcli.reports.dataset_report import inspect, inspect_text


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


def test_text_fits_eighty_columns(tmp_path):
    folder = captioned(tmp_path / "data", ["word " * 60, "b", "c"])
    assert max(map(len, inspect_text(look(folder, tmp_path / "out")).splitlines())) <= 80

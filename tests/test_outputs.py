"""Nothing of the user's is replaced: inputs, files of their own and pictures that they changed, in every command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import ADAM, ldm, noisy_images, train_ae, train_ldm

from ldmcli.core import outputs

FAST = ("--steps", 2, "--sampler", "ddim")
MADE = ("000000.png", "grid.png", "request.json")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("outputs")
    train_ae(root / "ae")
    made = {"none": (), "sr": ("--task", "sr", "--scale", 2), "inpaint": ("--task", "inpaint"),
            "layout": ("--condition", "layout")}  # fmt: skip
    for name, options in made.items():
        data = ("--data", "shapes:2", "--limit", 20, "--size", "20x20") if name == "layout" else ()
        train_ldm(root / name, root / "ae", *ADAM, *options, *data, steps=1)
    return {name: root / name for name in ("ae", *made)}


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with what commands read: a picture, a mask, boxes."""
    noisy_images(tmp_path / "in", 1)
    (tmp_path / "in" / "00.png").rename(tmp_path / "in" / "photo.png")
    hole = np.zeros((20, 20), np.uint8)
    hole[3:9, 4:11] = 255
    Image.fromarray(hole).save(tmp_path / "in" / "hole.png")
    (tmp_path / "in" / "boxes.json").write_text(
        json.dumps({"objects": [{"bbox": [0.1, 0.2, 0.5, 0.5], "category": "circle"}]}))
    return tmp_path / "in"


# command → the line, with what it reads; {} is the file that is put where the result would go
READERS = {
    "sample --init-image": ("none", "photo.png", ("sample", "--init-image", "{}", "-n", 1)),
    "sample --guide": ("none", "photo.png", ("sample", "--guide", "{}", "-n", 1)),
    "inpaint": ("inpaint", "photo.png", ("inpaint", "{}", "--box", "1,2,5,6")),
    "inpaint, its mask": ("none", "hole.png", ("inpaint", "photo.png", "{}")),
    "upscale": ("sr", "photo.png", ("upscale", "{}", "--scale", 2)),
    "reconstruct": ("ae", "photo.png", ("reconstruct", "{}")),
}
WRITERS = {
    "sample": ("none", ("sample", "-n", 1)),
    "sample --layout": ("layout", ("sample", "--layout", "boxes.json")),
    "inpaint": ("inpaint", ("inpaint", "photo.png", "--box", "1,2,5,6")),
    "upscale": ("sr", ("upscale", "photo.png", "--scale", 2)),
    "reconstruct": ("ae", ("reconstruct", "photo.png")),
}


WRITTEN = {name: MADE for name in WRITERS} | {"sample --layout": (*MADE, "000000-layout.png"),
                                              "reconstruct": MADE[:1]}  # fmt: skip


def line(models, model: str, asked, place: Path, out: Path, *more) -> list:
    words = [str(place / word) if str(word).endswith((".png", ".json")) else word for word in asked]
    if asked[0] == "reconstruct":
        return [*words, "--autoencoder", models[model], "--out", out, *more]
    return [*words, "--model", models[model], *FAST, "--out", out, *more]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_a_file_that_is_read_is_never_where_the_result_goes(models, place, tmp_path, name, more):
    model, read, asked = READERS[name]
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(place / read, out / "000000.png")
    before = (out / "000000.png").read_bytes()
    asked = [str(out / "000000.png") if word == "{}" else word for word in asked]
    words = line(models, model, asked, place, out, *more)
    ending = ldm(*(out / "000000.png" if str(word).endswith("out/000000.png") else word for word in words))
    assert ending.code == 2 and "000000.png" in ending.line, ending.stderr
    assert (out / "000000.png").read_bytes() == before and len(list(out.iterdir())) == 1


@pytest.mark.parametrize(("name", "taken"), [(name, taken) for name, names in WRITTEN.items() for taken in names])
@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_a_file_of_ones_own_is_kept_whatever_its_name(models, place, tmp_path, name, taken, more):
    """Refused before any work; the same for a link, whose target is not touched."""
    model, asked = WRITERS[name]
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "mine").write_bytes(b'{"mine": 1}')
    for make in (lambda path: path.write_bytes(b'{"mine": 1}'), lambda path: path.symlink_to(tmp_path / "mine")):
        make(out / taken)
        ending = ldm(*line(models, model, asked, place, out, *more))
        assert ending.code == 2 and (taken in ending.line or str(out) in ending.line), ending.stderr
        assert [path.name for path in out.iterdir()] == [taken] and (out / taken).read_bytes() == b'{"mine": 1}'
        (out / taken).unlink()
    assert (tmp_path / "mine").is_file()


@pytest.mark.parametrize(("name", "options"), [
    ("sample", ()), ("sample", ("--format", "jpg")), ("sample --layout", ()), ("upscale", ("--no-metadata",)),
    ("inpaint", ("--format", "webp", "--no-metadata")), ("reconstruct", ()),
])
def test_what_ldm_wrote_is_replaced_and_what_was_changed_since_is_not(models, place, tmp_path, name, options):
    model, asked = WRITERS[name]
    out = tmp_path / "out"
    words = line(models, model, asked, place, out, *options)
    assert ldm(*words).code == 0
    (out / "notes.txt").write_text("mine")
    assert ldm(*words, "--overwrite").code == 0 and (out / "notes.txt").read_text() == "mine"
    picture = next(out.glob("000000.*"))
    with Image.open(picture) as image:
        changed = image.convert("RGB").rotate(180)
    changed.save(picture)
    kept = picture.read_bytes()
    ending = ldm(*words, "--overwrite")
    assert ending.code == 2 and picture.name in ending.line and "changed since" in ending.line
    assert picture.read_bytes() == kept


def test_a_folder_of_an_older_version_is_replaced(models, tmp_path):
    """Its request.json lists no files, its sheets carry no mark, its pictures may hold no settings."""
    out = tmp_path / "out"
    asked = ("sample", "--model", models["none"], *FAST, "-n", 3, "--no-metadata", "--out", out)
    assert ldm(*asked).code == 0
    record = json.loads((out / "request.json").read_text())
    record.pop("files")
    (out / "request.json").write_text(json.dumps(record))
    with Image.open(out / "grid.png") as sheet:
        sheet.convert("RGB").save(out / "grid.png")
    assert not outputs.marked(out / "grid.png")
    assert ldm(*asked, "--json").json["drawn"] == 0
    record.pop("files", None)
    assert ldm(*asked, "-n", 2, "--overwrite").code == 0
    assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png", "grid.png", "request.json"]


def test_a_picture_that_was_changed_is_not_drawn_again_when_others_are_missing(models, tmp_path):
    out = tmp_path / "out"
    asked = ("sample", "--model", models["none"], *FAST, "-n", 3, "--out", out)
    assert ldm(*asked).code == 0
    Image.new("RGB", (20, 20), "red").save(out / "000001.png")
    (out / "000002.png").unlink()
    assert ldm(*asked, "--json").json["drawn"] == 1
    ending = ldm(*asked, "--overwrite")
    assert ending.code == 2 and "000001.png" in ending.line and (out / "000002.png").is_file()


@pytest.mark.parametrize("option, name", [("--init-image", "photo.png"), ("--guide", "photo.png"),
                                          ("--layout", "boxes.json")])
def test_other_content_under_the_same_name_is_another_request(models, place, tmp_path, option, name):
    model = models["layout" if option == "--layout" else "none"]
    asked = ("sample", "--model", model, *FAST, option, place / name, "-n", 1, "--out", tmp_path / "out")
    assert ldm(*asked).code == 0 and ldm(*asked, "--json").json["drawn"] == 0
    if name == "boxes.json":
        (place / name).write_text((place / name).read_text().replace("0.1", "0.3"))
    else:
        Image.new("RGB", (20, 20), "blue").save(place / name)
    ending = ldm(*asked)
    assert ending.code == 2 and "another request" in ending.line


@pytest.mark.parametrize("record", ["[]", '{"total": 2}', '{"model": "m", "format": "png", "total": "many"}', "{",
                                    '{"model": "m", "format": "png", "total": 1, "files": {"../a.png": ""}}'])
def test_somebody_elses_request_json_speaks_of_no_files(tmp_path, record):
    (tmp_path / "request.json").write_text(record)
    assert outputs.read_record(tmp_path / "request.json") is None


# --- pairs --------------------------------------------------------------------------------------------------------


def holes(folder: Path, where: dict[str, int], suffix: str = ".png") -> None:
    for name, left in where.items():
        hole = np.zeros((20, 20), np.uint8)
        hole[:4, left : left + 4] = 255
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(hole).save((folder / name).with_suffix(suffix))


def test_masks_pair_with_pictures_by_their_relative_path(models, tmp_path):
    """Two of one name in different folders, and other endings, are each painted where their own mask says so."""
    where = {"x/p.png": 0, "y/p.png": 8, "p.png": 14, "x/y/p.png": 4}
    for name in where:
        noisy_images((tmp_path / "in" / name).parent / "new", 1)[0].rename(tmp_path / "in" / name)
        ((tmp_path / "in" / name).parent / "new").rmdir()
    holes(tmp_path / "masks", where, ".bmp")
    ending = ldm("inpaint", tmp_path / "in", tmp_path / "masks", "--model", models["none"], *FAST, "--out",
                 tmp_path / "out", "--json")  # fmt: skip
    assert ending.code == 0, ending.stderr
    for source, result in zip(ending.json["sources"], ending.json["images"]):
        left = where[str(Path(source).relative_to(tmp_path / "in"))]
        changed = (np.asarray(Image.open(source)) != np.asarray(Image.open(result))).any(-1)
        columns = np.flatnonzero(changed.any(0))
        assert left <= columns.min() and columns.max() < left + 4


def test_masks_without_a_picture_and_of_one_name_are_told(models, tmp_path):
    noisy_images(tmp_path / "in", 2)
    holes(tmp_path / "masks", {"00.png": 0, "01.png": 3, "07.png": 3, "sub/01.png": 3})
    asked = ("inpaint", tmp_path / "in", tmp_path / "masks", "--model", models["none"], *FAST, "--out", tmp_path / "o")
    ending = ldm(*asked)
    assert ending.code == 0 and "2 of 4 masks are not used" in ending.stderr and "07.png" in ending.stderr
    holes(tmp_path / "masks", {"01.png": 5}, ".bmp")
    ending = ldm(*asked)
    assert ending.code == 3 and "01.bmp and 01.png" in ending.line.replace(str(tmp_path / "masks") + "/", "")

"""Nothing of the user's is replaced: inputs, files of their own and pictures that they changed, in every command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from compvis_checkpoints import random_checkpoint
from PIL import Image
from tiny import ldm, noisy_images, train_ae

from ldmcli.core import outputs

FAST = ("--steps", 2, "--sampler", "ddim")
MADE = ("000000.png", "grid.png", "request.json")


@pytest.fixture(scope="module")
def models(tiny_runs) -> dict[str, Path]:
    return {name: tiny_runs[name] for name in ("kl", "plain", "sr", "inpaint", "layout")}


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with what commands read: a picture, a mask, boxes."""
    noisy_images(tmp_path / "in", 1)
    (tmp_path / "in" / "00.png").rename(tmp_path / "in" / "photo.png")
    hole = np.zeros((20, 20), np.uint8)
    hole[3:9, 4:11] = 255
    Image.fromarray(hole).save(tmp_path / "in" / "hole.png")
    (tmp_path / "in" / "boxes.json").write_text(
        json.dumps({"objects": [{"bbox": [0.1, 0.2, 0.5, 0.5], "category": "circle"}]})
    )
    return tmp_path / "in"


# command → the line, with what it reads; {} is the file that is put where the result would go
READERS = {
    "sample --init-image": ("plain", "photo.png", ("sample", "--init-image", "{}", "-n", 1)),
    "sample --guide": ("plain", "photo.png", ("sample", "--guide", "{}", "-n", 1)),
    "inpaint": ("inpaint", "photo.png", ("inpaint", "{}", "--box", "1,2,5,6")),
    "inpaint, its mask": ("plain", "hole.png", ("inpaint", "photo.png", "{}")),
    "upscale": ("sr", "photo.png", ("upscale", "{}", "--scale", 2)),
    "reconstruct": ("kl", "photo.png", ("reconstruct", "{}")),
}
WRITERS = {
    "sample": ("plain", ("sample", "-n", 1)),
    "sample --layout": ("layout", ("sample", "--layout", "boxes.json")),
    "inpaint": ("inpaint", ("inpaint", "photo.png", "--box", "1,2,5,6")),
    "upscale": ("sr", ("upscale", "photo.png", "--scale", 2)),
    "reconstruct": ("kl", ("reconstruct", "photo.png")),
}


WRITTEN = {name: MADE for name in WRITERS} | {"sample --layout": (*MADE, "000000-layout.png"), "reconstruct": MADE[:1]}


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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sample", ()),
        ("sample", ("--format", "jpg")),
        ("sample --layout", ()),
        ("upscale", ("--no-metadata",)),
        ("inpaint", ("--format", "webp", "--no-metadata")),
        ("reconstruct", ()),
    ],
)
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
    asked = ("sample", "--model", models["plain"], *FAST, "-n", 3, "--no-metadata", "--out", out)
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
    asked = ("sample", "--model", models["plain"], *FAST, "-n", 3, "--out", out)
    assert ldm(*asked).code == 0
    Image.new("RGB", (20, 20), "red").save(out / "000001.png")
    (out / "000002.png").unlink()
    assert ldm(*asked, "--json").json["drawn"] == 1
    ending = ldm(*asked, "--overwrite")
    assert ending.code == 2 and "000001.png" in ending.line and (out / "000002.png").is_file()


@pytest.mark.parametrize(
    "option, name", [("--init-image", "photo.png"), ("--guide", "photo.png"), ("--layout", "boxes.json")]
)
def test_other_content_under_the_same_name_is_another_request(models, place, tmp_path, option, name):
    model = models["layout" if option == "--layout" else "plain"]
    asked = ("sample", "--model", model, *FAST, option, place / name, "-n", 1, "--out", tmp_path / "out")
    assert ldm(*asked).code == 0 and ldm(*asked, "--json").json["drawn"] == 0
    if name == "boxes.json":
        (place / name).write_text((place / name).read_text().replace("0.1", "0.3"))
    else:
        Image.new("RGB", (20, 20), "blue").save(place / name)
    ending = ldm(*asked)
    assert ending.code == 2 and "another request" in ending.line


@pytest.mark.parametrize(
    "record",
    [
        "[]",
        '{"total": 2}',
        '{"model": "m", "format": "png", "total": "many"}',
        "{",
        '{"model": "m", "format": "png", "total": 1, "files": {"../a.png": ""}}',
    ],
)
def test_somebody_elses_request_json_speaks_of_no_files(tmp_path, record):
    (tmp_path / "request.json").write_text(record)
    assert outputs.read_record(tmp_path / "request.json") is None


# --- pages, sheets, runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.html", "README.md"])
def test_a_page_that_was_changed_by_hand_is_kept(models, tmp_path, name):
    """By the command that writes it again, and by a training that goes on or begins anew."""
    run = tmp_path / "run"
    shutil.copytree(models["kl"], run)
    train_ae(run, steps=4)
    assert outputs.page_is_ours(run / name)
    text = (run / name).read_text().replace("step", "stride")
    (run / name).write_text(text)
    ending = train_ae(run, steps=5)
    assert f"{name}: not written by ldm, or changed since" in ending.stderr
    train_ae(run, "--fresh", steps=2)
    assert (run / name).read_text() == text
    if name == "report.html":
        ending = ldm("report", run)
        assert ending.code == 2 and name in ending.line and (run / name).read_text() == text
        assert ldm("report", run, "--out", tmp_path / "elsewhere").code == 0
        assert outputs.page_is_ours(tmp_path / "elsewhere" / name)


def test_a_run_that_begins_anew_keeps_what_is_not_of_it(models, tmp_path):
    """Also where its parts are links to folders elsewhere: those are emptied of checkpoints, and stay."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    shutil.copytree(models["kl"], run)
    (run / "checkpoints").rename(disk)
    (run / "checkpoints").symlink_to(disk)
    mine = [
        "notes.txt",
        "checkpoints/best.txt",
        "checkpoints/step-00000003/mine.txt",
        "samples/keep.png",
        "samples/step-of-a-dance.png",
        "tokenizer/poem.txt",
        ".secret.tmp",
    ]
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    train_ae(run, "--fresh", "--sample-every", 1, steps=1)
    assert all((run / name).read_text() == "mine" for name in mine)
    assert (run / "checkpoints").is_symlink() and {path.name for path in disk.glob("step-*/manifest.json")}
    assert json.loads((run / "run.json").read_text())["step"] == 1
    assert not list(disk.glob("step-00000003/*.safetensors"))


def test_the_sheet_of_a_data_set_replaces_only_an_earlier_one(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "contact.png").write_bytes(b"mine")
    asked = ("data", "shapes", "--limit", 4, "--out", out)
    ending = ldm(*asked)
    assert ending.code == 2 and "contact.png" in ending.line and (out / "contact.png").read_bytes() == b"mine"
    (out / "contact.png").unlink()
    assert ldm(*asked).code == 0 and ldm(*asked).code == 0 and outputs.marked(out / "contact.png")
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "outputs" / "shapes-data"
    old.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(old / "contact.png")  # of an older version, in the folder that the command names
    assert ldm("data", "shapes", "--limit", 4).code == 0 and outputs.marked(old / "contact.png")


@pytest.mark.parametrize("name", ["samples.png", "prompts.txt", "summary.json", "report.html"])
def test_the_demo_keeps_files_of_ones_own(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    ending = ldm("demo", "--minutes", 1, "--out", tmp_path / "out")
    assert ending.code == 2 and name in ending.line and [one.name for one in (tmp_path / "out").iterdir()] == [name]


FOREIGN = {
    "a letter": ("letter.txt", "dear"),
    "a picture": ("samples/holiday.png", "png"),
    "notes": ("README.md", "# Plan"),
    "weights elsewhere": ("old/weights.pt", "x"),
    "a hidden file": (".env", "TOKEN=1"),
}


@pytest.mark.parametrize("to", ["run", "diffusers"])
@pytest.mark.parametrize("what", FOREIGN)
def test_a_converted_folder_is_replaced_only_while_all_in_it_is_a_models(models, tmp_path, to, what):
    source, target = tmp_path / "source", tmp_path / "target"
    assert ldm("convert", models["plain"], source, "--to", "diffusers").code == 0
    asked = ("convert", source if to == "run" else models["plain"], target, "--to", to)
    assert ldm(*asked).code == 0 and ldm(*asked, "--overwrite").code == 0
    name, text = FOREIGN[what]
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text(text)
    before = sorted(target.rglob("*"))
    ending = ldm(*asked, "--overwrite")
    assert ending.code == 2 and name in ending.line, ending.stderr
    assert sorted(target.rglob("*")) == before and (target / name).read_text() == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"name": "my app"}'),
        ("run.json", "{}"),
        ("model_index.json", "[]"),
        ("model_index.json", "not json"),
    ],
)
def test_a_folder_of_something_else_is_not_replaced_by_a_model(models, tmp_path, name, text):
    target = tmp_path / "target"
    target.mkdir()
    (target / name).write_text(text)
    (target / "index.js").write_text("main()")
    assert ldm("convert", models["plain"], target, "--to", "diffusers", "--overwrite").code == 2
    assert (target / name).read_text() == text and (target / "index.js").is_file()


@pytest.mark.parametrize("spoilt", ["m.yaml", "m-tokenizer/poem.txt", "m.ckpt/inside.txt"])
def test_what_lies_beside_a_checkpoint_is_replaced_only_where_it_belongs_to_one(tmp_path, spoilt):
    path = random_checkpoint(tmp_path / "theirs", "unconditional")
    assert ldm("convert", path, tmp_path / "run").code == 0
    (tmp_path / "out" / spoilt).parent.mkdir(parents=True)
    (tmp_path / "out" / spoilt).write_text("shopping: [eggs]")
    asked = ("convert", tmp_path / "run", tmp_path / "out" / "m.ckpt", "--to", "compvis")
    assert ldm(*asked).code == 2
    ending = ldm(*asked, "--overwrite")
    assert ending.code == 2 and (tmp_path / "out" / spoilt).read_text() == "shopping: [eggs]", ending.stderr


def test_a_target_that_is_a_link_is_followed_or_refused(models, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    asked = ("convert", models["plain"])
    for _ in range(2):
        assert ldm(*asked, tmp_path / "link", "--to", "diffusers", "--overwrite").code == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "model_index.json").is_file()
    ending = ldm(*asked, tmp_path / "broken", "--to", "diffusers")
    assert ending.code == 2 and "a link to nothing" in ending.line


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
    ending = ldm(
        "inpaint",
        tmp_path / "in",
        tmp_path / "masks",
        "--model",
        models["plain"],
        *FAST,
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert ending.code == 0, ending.stderr
    for source, result in zip(ending.json["sources"], ending.json["images"]):
        left = where[str(Path(source).relative_to(tmp_path / "in"))]
        changed = (np.asarray(Image.open(source)) != np.asarray(Image.open(result))).any(-1)
        columns = np.flatnonzero(changed.any(0))
        assert left <= columns.min() and columns.max() < left + 4


def test_masks_without_a_picture_and_of_one_name_are_told(models, tmp_path):
    noisy_images(tmp_path / "in", 2)
    holes(tmp_path / "masks", {"00.png": 0, "01.png": 3, "07.png": 3, "sub/01.png": 3})
    asked = ("inpaint", tmp_path / "in", tmp_path / "masks", "--model", models["plain"], *FAST, "--out", tmp_path / "o")
    ending = ldm(*asked)
    assert ending.code == 0 and "2 of 4 masks are not used" in ending.stderr and "07.png" in ending.stderr
    holes(tmp_path / "masks", {"01.png": 5}, ".bmp")
    ending = ldm(*asked)
    assert ending.code == 3 and "01.bmp and 01.png" in ending.line.replace(str(tmp_path / "masks") + "/", "")

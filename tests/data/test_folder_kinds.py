"""Folders as people have them: what in them is a picture, what tells of it, and what is said of the rest."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import ldm

from ldmcli.core.errors import InputError
from ldmcli.core.settings import DataSettings
from ldmcli.data.pictures import find, image_files
from ldmcli.data.sources import drop_unreadable, open_rows
from ldmcli.evaluation.image_streams import image_files as measured_files
from ldmcli.reports.dataset_report import inspect, inspect_text

SIZE = (8, 8)


def bytes_of(k: int, kind: str = "PNG", mode: str = "RGB", size: int = 8) -> bytes:
    noise = np.random.default_rng(k).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, kind)
    return file.getvalue()


def make(root: Path, *names: str) -> Path:
    """A folder of pictures called `names`."""
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes_of(k))
    return root


def write(root: Path, name: str, content) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def rows_of(source, **options) -> list[tuple[str, str]]:
    """(name, caption) of all rows of both splits."""
    settings = DataSettings(source=str(source), size=SIZE, **options)
    both = [open_rows(settings, split=split) for split in ("train", "validation")]
    both = both[:1] if both[1].validation_is_train else both
    return sorted((rows.name(i), rows.caption(i)) for rows in both for i in range(len(rows)))


def names_of(source, **options) -> list[str]:
    return [name for name, _ in rows_of(source, **options)]


def notes_of(source, **options) -> str:
    return " | ".join(open_rows(DataSettings(source=str(source), size=SIZE, **options)).notes)


# --- one definition of a picture ------------------------------------------------------------------------------------

FORMATS = {
    "a.AVIF": "AVIF",
    "b.j2k": "JPEG2000",
    "c.jfif": "JPEG",
    "d.pgm": "PPM",
    "e.WebP": "WEBP",
    "f.tif": "TIFF",
    "g.dib": "BMP",
    "h.gif": "GIF",
    "i.jpe": "JPEG",
    "j.jp2": "JPEG2000",
    "k.pnm": "PPM",
}
NO_PICTURES = (
    ".cache/x.png",
    ".ipynb_checkpoints/a-checkpoint.png",
    "__MACOSX/a.png",
    "sub/._a.png",
    "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
    "sub/.b.png",
)


def test_all_commands_take_the_same_pictures_of_a_folder(tmp_path):
    for k, (name, kind) in enumerate(FORMATS.items()):
        write(tmp_path, name, bytes_of(k, kind, "L" if name.endswith(".pgm") else "RGB"))
    make(tmp_path, "sub/z.png", "sub/deeper/y.PNG")
    for name in NO_PICTURES:
        write(tmp_path, name, bytes_of(50))
    write(tmp_path, "Thumbs.db", b"x")
    wanted = sorted([*FORMATS, "sub/z.png", "sub/deeper/y.PNG"])
    settings = DataSettings(source=str(tmp_path), size=SIZE)
    assert names_of(tmp_path) == wanted and not drop_unreadable(open_rows(settings), settings)[1]
    for listing in (image_files([tmp_path]), measured_files(tmp_path)):
        assert sorted(path.relative_to(tmp_path).as_posix() for path in listing) == wanted
    assert not find(tmp_path).notes()


def run_folder(root: Path) -> None:
    write(root, "run.json", '{"kind": "autoencoder"}')
    write(root, "samples/step-00000010.png", bytes_of(60))
    write(root, "metrics.jsonl", "{}")


def sample_folder(root: Path) -> None:
    write(root, "request.json", "{}")
    for name in ("000000.png", "000000-map.png", "000001.png", "grid.png"):
        write(root, name, bytes_of(61))


WRITTEN = {
    "a run below": (lambda root: run_folder(root / "mine/model"), "mine/model/"),
    "samples below": (lambda root: sample_folder(root / "drawn"), "drawn/"),
    "runs": (lambda root: run_folder(root / "runs/x"), "runs/"),
    "outputs without a record": (lambda root: write(root, "outputs/abc/000000.png", bytes_of(62)), "outputs/"),
    "a contact sheet below": (lambda root: write(root, "outputs/set-data/contact.png", bytes_of(62)), "outputs/"),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_ldm_wrote_is_no_picture_no_class_and_no_table(tmp_path, kind):
    make(tmp_path, "oak/1.png", "oak/2.png", "elm/1.png", "elm/2.png")
    put, named = WRITTEN[kind]
    put(tmp_path)
    assert names_of(tmp_path) == ["elm/1.png", "elm/2.png", "oak/1.png", "oak/2.png"]
    assert open_rows(DataSettings(source=str(tmp_path))).class_names == ["elm", "oak"]
    assert f"what ldm itself wrote is passed over ({named}" in notes_of(tmp_path)
    assert len(image_files([tmp_path])) == len(measured_files(tmp_path)) == 4


def test_samples_whose_folder_is_named_are_pictures_but_not_their_sheet_and_companions(tmp_path):
    sample_folder(tmp_path / "drawn")
    assert names_of(tmp_path / "drawn") == ["000000.png", "000001.png"]
    assert [path.name for path in image_files([tmp_path / "drawn"])] == ["000000.png", "000001.png"]
    assert [path.name for path in measured_files(tmp_path / "drawn")] == ["000000.png", "000001.png"]


def test_users_pictures_in_folders_and_files_of_such_names_stay(tmp_path):
    make(
        tmp_path,
        "runs/1.png",
        "runs/2.png",
        "walks/1.png",
        "outputs/tom/face.png",
        "grid.png",
        "contact.png",
        "000000-map.png",
    )
    assert len(names_of(tmp_path)) == 7 and not find(tmp_path).written


# --- masks ----------------------------------------------------------------------------------------------------------


def mask(root: Path, name: str, kind: str = "L", size: int = 8) -> None:
    pixels = np.zeros((size, size), np.uint8)
    pixels[2:5, 2:5] = 255 if kind != "P" else 3
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels) if kind != "P" else Image.fromarray(pixels, "P")
    if kind == "P":
        image.putpalette([40, 10, 90] * 4)
    (image.convert("RGB") if kind == "RGB" else image).save(root / name)


@pytest.mark.parametrize(
    "names, kind",
    [
        ({"a.png": "masks/a.png", "b.png": "masks/b.png"}, "L"),
        ({"images/a.png": "masks/a.png", "images/b.png": "masks/b.png"}, "RGB"),
        ({"train/images/a.png": "train/labels/a.png", "train/images/b.png": "train/labels/b.png"}, "P"),
        ({"a.png": "a_mask.png", "b.png": "b_mask001.png"}, "L"),
        ({"JPEGImages/a.png": "SegmentationClass/a.png", "JPEGImages/b.png": "SegmentationClass/b.png"}, "P"),
    ],
)
def test_masks_beside_or_below_pictures_are_no_pictures_and_said(tmp_path, names, kind):
    make(tmp_path, *names)
    for name in names.values():
        mask(tmp_path, name, kind)
    assert [path.relative_to(tmp_path).as_posix() for path in image_files([tmp_path])] == list(names)
    assert len(names_of(tmp_path)) == 2 and "2 masks or maps of pictures" in notes_of(tmp_path)


def test_classes_that_are_called_masks_or_hold_other_pictures_stay(tmp_path):
    make(tmp_path, "mask/1.png", "mask/2.png", "no_mask/1.png", "no_mask/2.png", "face/1.png", "face/2.png")
    assert open_rows(DataSettings(source=str(tmp_path))).class_names == ["face", "mask", "no_mask"]
    mask(tmp_path, "labels/1.png")  # no picture of this name outside of the classes
    assert len(names_of(tmp_path)) == 7


def test_a_folder_of_masks_that_is_named_is_read(tmp_path):
    make(tmp_path, "a.png")
    mask(tmp_path, "masks/a.png")
    assert [path.name for path in image_files([tmp_path / "masks"])] == ["a.png"]
    assert image_files([tmp_path], besides=[tmp_path / "masks"]) == [tmp_path / "a.png"]


# --- metadata as people write it --------------------------------------------------------------------------------------

TWO = [("a.png", "a red fox, resting"), ("b.png", "two owls")]
QUOTED = 'a.png{0}"a red fox, resting"\nb.png{0}two owls\n'
TABLES = {
    "tabs": ("metadata.tsv", "file_name\tcaption\na.png\ta red fox, resting\nb.png\ttwo owls\n"),
    "semicolons": ("metadata.csv", "file_name;caption\n" + QUOTED.format(";")),
    "tabs in csv": ("metadata.csv", "file_name\tcaption\na.png\ta red fox, resting\nb.png\ttwo owls\n"),
    "bars": ("metadata.csv", "file_name|caption\na.png|a red fox, resting\nb.png|two owls\n"),
    "blanks": ("metadata.csv", "file_name , caption\n" + QUOTED.format(" ,  ")),
    "sep line": ("metadata.csv", "sep=;\r\nfile_name;caption\r\n" + QUOTED.format(";").replace("\n", "\r\n")),
    "index": (
        "metadata.csv",
        ",file_name,caption\n" + "\n".join(f"{k},{line}" for k, line in enumerate(QUOTED.format(",").splitlines())),
    ),
    "spreadsheet": ("metadata.csv", 'file_name,caption,,\na.png,"a red fox, resting",,\nb.png,two owls,,\n,,,\n\n'),
    "capitals": ("METADATA.CSV", "Filename,Caption\n" + QUOTED.format(",")),
    "old name": ("metadata.csv", "image_path,text\n" + QUOTED.format(",")),
    "crlf": (
        "metadata.jsonl",
        '{"file_name": "a.png", "caption": "a red fox, resting"}\r\n{"file_name": "b.png", "caption": "two owls"}\r\n',
    ),
    "utf-16": ("metadata.csv", ("file_name,caption\n" + QUOTED.format(",")).encode("utf-16")),
    "a list": ("metadata.json", json.dumps([{"file_name": n, "caption": c} for n, c in TWO], indent=1)),
    "by name": ("metadata.json", json.dumps({n: {"caption": c} for n, c in TWO})),
    "texts by name": ("metadata.json", json.dumps(dict(TWO))),
    "columns": (
        "metadata.json",
        json.dumps({"file_name": {"0": "a.png", "1": "b.png"}, "caption": {"0": TWO[0][1], "1": TWO[1][1]}}),
    ),
    "no ending": ("metadata.csv", 'file_name,caption\na,"a red fox, resting"\nb,two owls\n'),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_give_their_captions_however_they_are_written(tmp_path, kind):
    name, content = TABLES[kind]
    write(make(tmp_path, "a.png", "b.png"), name, content)
    assert rows_of(tmp_path) == TWO


@pytest.mark.parametrize(
    "content, says",
    [
        ("a.png,a fox\nb.png,owls\n", "its first line must name the columns"),
        ("file_name,text,text\na.png,x,y\n", "two columns called text"),
        ("file_name,text\nhttps://example.org/a.png,x\n", "is an address; fetch the pictures first"),
        ("file_name,text\nA.PNG,x\nb.png,y\n", "did you mean a.png"),
        ("file_name,text\npics\\a.png,x\nb.png,y\n", "did you mean a.png"),
    ],
)
def test_tables_that_cannot_be_meant_are_refused_with_what_to_do(tmp_path, content, says):
    write(make(tmp_path, "a.png", "b.png"), "metadata.csv", content)
    with pytest.raises(InputError) as failure:
        open_rows(DataSettings(source=str(tmp_path)))
    assert says in str(failure.value)


def test_a_metadata_file_of_the_whole_set_names_no_pictures_and_stops_nothing(tmp_path):
    write(make(tmp_path, "a.png", "b.png"), "metadata.json", json.dumps({"title": "birds", "license": "CC0"}, indent=1))
    assert names_of(tmp_path) == ["a.png", "b.png"]


def test_the_column_that_a_user_names_holds_the_pictures(tmp_path):
    make(tmp_path, "a.png", "b.png", "c.png")
    write(tmp_path, "metadata.csv", "file_name,second,text\na.png,b.png,x\nb.png,c.png,y\nc.png,a.png,z\n")
    assert rows_of(tmp_path, image_column="second") == [("a.png", "z"), ("b.png", "x"), ("c.png", "y")]
    with pytest.raises(InputError, match="--image-column third: no such column"):
        open_rows(DataSettings(source=str(tmp_path), image_column="third"))


def test_of_two_tables_for_one_picture_the_nearest_counts_and_it_is_said(tmp_path):
    make(tmp_path, "sub/a.png", "sub/b.png", "c.png")
    write(tmp_path, "metadata.csv", "file_name,text\nsub/a.png,far\nsub/b.png,far\nc.png,only\n")
    write(tmp_path, "sub/metadata.jsonl", '{"file_name": "a.png", "text": "near"}')
    assert rows_of(tmp_path) == [("c.png", "only"), ("sub/a.png", "near"), ("sub/b.png", "far")]
    assert "1 rows of metadata.csv left out: sub/metadata.jsonl tells of the same" in notes_of(tmp_path)


def test_of_several_rows_for_one_picture_the_first_counts_and_it_is_said(tmp_path):
    write(make(tmp_path, "a.png", "b.png"), "metadata.csv", "file_name,text\na.png,one\na.png,two\nb.png,x\na.png,3\n")
    assert rows_of(tmp_path) == [("a.png", "one"), ("b.png", "x")]
    assert "1 pictures have several rows in metadata.csv (a.png); the first of each is taken, 2" in notes_of(tmp_path)


def jsonl(root: Path, *rows: dict, name: str = "metadata.jsonl") -> Path:
    make(root, *(f"{k}.png" for k in range(len(rows))))
    write(root, name, "\n".join(json.dumps({"file_name": f"{k}.png", **row}) for k, row in enumerate(rows)))
    return root


ODD_CELLS = {
    "float": (2.5, "2.5"),
    "null": (None, ""),
    "nan": (float("nan"), ""),
    "list": (["", "second"], "second"),
    "empty list": ([], ""),
    "annotations": ([{"raw": "as in Flickr", "tokens": ["as"]}], "as in Flickr"),
}


@pytest.mark.parametrize("kind", ODD_CELLS)
def test_an_odd_cell_never_makes_another_column_the_caption(tmp_path, kind):
    cell, text = ODD_CELLS[kind]
    jsonl(tmp_path, {"prompt": "a", "title": "t"}, {"prompt": cell, "title": "t"}, {"prompt": "c", "title": "t"})
    assert [caption for _, caption in rows_of(tmp_path)] == ["a", text, "c"]
    if text == "":
        assert "1 of 3 captions in column prompt are empty" in notes_of(tmp_path)


def test_a_cell_that_is_no_text_is_refused_by_row_and_column_where_captions_are_used(tmp_path):
    jsonl(tmp_path / "set", {"caption": "a", "text": "x"}, {"caption": {"en": "b"}, "text": "y"}, {"caption": "c"})
    with pytest.raises(InputError, match=r"1.png: \{'en': 'b'\} in column caption is no caption"):
        rows_of(tmp_path / "set")
    assert open_rows(DataSettings(source=str(tmp_path / "set"), size=SIZE)).fingerprint
    found = inspect(DataSettings(source=str(tmp_path / "set"), size=SIZE), tmp_path / "out")
    assert any("captions of 1 rows cannot be used" in note and "1.png" in note for note in found["notes"])


# --- classes and boxes ------------------------------------------------------------------------------------------------


def labels_of(root: Path) -> tuple[list[str], list[str]]:
    both = [open_rows(DataSettings(source=str(root)), split=split) for split in ("train", "validation")]
    found = {rows.name(i): rows.class_names[rows.label(i)] for rows in both for i in range(len(rows))}
    return both[0].class_names, [found[name] for name in sorted(found)]


def csv_labels(root: Path, *labels: str) -> Path:
    make(root, *(f"{k}.png" for k in range(len(labels))))
    write(root, "metadata.csv", "file_name,label\n" + "".join(f"{k}.png,{one}\n" for k, one in enumerate(labels)))
    return root


@pytest.mark.parametrize(
    "labels, names, each",
    [(("3", "10", "3"), ["3", "10"], ["3", "10", "3"]), (("7 ", "cat", "7"), ["7", "cat"], ["7", "cat", "7"])],
)
def test_classes_called_by_numbers_keep_their_names(tmp_path, labels, names, each):
    assert labels_of(csv_labels(tmp_path / "csv", *labels)) == (names, each)
    assert labels_of(jsonl(tmp_path / "json", *({"label": int(x) if x.isdecimal() else x} for x in labels))) == (
        names,
        each,
    )


@pytest.mark.parametrize("bad", ["-1", "", " ", None, float("nan"), ["x"], -1])
def test_labels_that_name_no_class_are_refused_by_row_and_only_where_classes_are_used(tmp_path, bad):
    root = (
        csv_labels(tmp_path, "2", bad, "4")
        if isinstance(bad, str)
        else jsonl(tmp_path, {"label": "2"}, {"label": bad}, {"label": "4"})
    )
    assert len(names_of(root)) == 3 and open_rows(DataSettings(source=str(root))).class_names == ["2", "4"]
    with pytest.raises(InputError, match=r"1 labels in column label name no class \(1.png: "):
        labels_of(root)
    found = inspect(DataSettings(source=str(root), size=SIZE), tmp_path / "out")
    assert any("labels of 1 rows cannot be used" in note for note in found["notes"])


def test_classes_that_differ_in_capitals_alone_are_told(tmp_path):
    assert "capitals or blanks alone: Owl and owl" in notes_of(csv_labels(tmp_path, "owl", "Owl", "fox"))


BOXES = {  # what people write, categories of each box
    "lists": ({"bbox": [[1, 2, 3, 4], [0, 0, 5, 5]], "category": ["ox", 7]}, ["ox", "7"]),
    "coco": ([{"bbox": [1, 2, 3, 4], "category_id": 18, "iscrowd": 0, "segmentation": [[1, 2]]}], ["18"]),
    "one object": ({"bbox": [1, 2, 3, 4], "label": "ox"}, ["ox"]),
    "names inside": ({"bbox": [[1, 2, 3, 4]], "category": [{"id": 3, "name": "ox"}]}, ["ox"]),
    "none": ([], []),
    "null": (None, []),
}
BAD_BOXES = {
    "no category": ([{"bbox": [1, 2, 3, 4], "area": 3}], "category"),
    "one for two": ({"bbox": [[1, 2, 3, 4], [0, 0, 1, 1]], "category": ["ox"]}, "category"),
    "a scalar": ({"bbox": [[1, 2, 3, 4]], "category": 2}, "category"),
    "three numbers": ({"bbox": [[1, 2, 3]], "category": ["ox"]}, "bbox"),
    "text": ({"bbox": "1 2 3 4", "category": ["ox"]}, "bbox"),
    "nan": ({"bbox": [[1, float("nan"), 3, 4]], "category": ["ox"]}, "bbox"),
}


def boxes_of(root: Path, cell) -> "dict | None":
    first = {"bbox": [[0, 0, 2, 2]], "category": ["elk"]}
    jsonl(root, {"objects": first}, {"objects": cell}, {"objects": first})
    both = [open_rows(DataSettings(source=str(root), size=SIZE), split=split) for split in ("train", "validation")]
    assert both[0].fingerprint and both[0].has("objects")  # nobody asked for boxes yet
    names = both[0].category_names
    found = {rows.name(i): rows.objects(i) for rows in both for i in range(len(rows))}
    return {name: [names[k] for k in one["category"]] for name, one in found.items()}


@pytest.mark.parametrize("kind", BOXES)
def test_boxes_are_read_as_people_write_them(tmp_path, kind):
    cell, names = BOXES[kind]
    assert boxes_of(tmp_path, cell) == {"0.png": ["elk"], "1.png": names, "2.png": ["elk"]}


@pytest.mark.parametrize("kind", BAD_BOXES)
def test_boxes_that_cannot_be_used_are_refused_by_row_and_key_where_they_are_used(tmp_path, kind):
    cell, key = BAD_BOXES[kind]
    with pytest.raises(InputError, match=rf"1.png: {key} in column objects is .*; it must be"):
        boxes_of(tmp_path, cell)
    found = inspect(DataSettings(source=str(tmp_path), size=SIZE), tmp_path / "out")
    assert any("boxes of" in note and key in note for note in found["notes"])


def test_a_split_that_lacks_what_another_has_is_named(tmp_path):
    make(tmp_path, "train/a.png", "train/b.png", "val/c.png")
    write(tmp_path, "train/metadata.csv", "file_name,label\na.png,x\nb.png,y\n")
    found = inspect(DataSettings(source=str(tmp_path), size=SIZE), tmp_path / "out")
    assert found["rows"] == {"train": 2, "validation": 1} and found["classes"] == {"x": 1, "y": 1}
    assert any("split validation has no labels" in note for note in found["notes"])


@pytest.mark.parametrize("text", ["half \ud800 a sign", "nul \x00 inside", "x" * 5000])
def test_text_and_names_that_no_file_could_have_stop_nothing(tmp_path, text):
    jsonl(tmp_path, {"caption": text, "label": text}, {"caption": "b", "label": "b"})
    inspect_text(inspect(DataSettings(source=str(tmp_path), size=SIZE), tmp_path / "out"))
    for caption in (caption for _, caption in rows_of(tmp_path)):
        caption.encode()
    write(tmp_path, "metadata.jsonl", json.dumps({"file_name": f"{text}.png"}) + '\n{"file_name": "0.png"}')
    with pytest.raises(InputError, match="leads out" if "\x00" in text else "1 rows name pictures that are absent"):
        open_rows(DataSettings(source=str(tmp_path)))


# --- splits -----------------------------------------------------------------------------------------------------------

SPLITS = {  # folders with their pictures, rows by split as `ldm data` shows them, words of a note
    "years": ({"train2014": 3, "val2014": 2}, {"train": 3, "validation": 2}, ""),
    "other words": ({"Training": 3, "valid": 2}, {"train": 3, "validation": 2}, ""),
    "suffixes": ({"train_images": 3, "test-set": 2}, {"train": 3, "validation": 2}, ""),
    "others beside": ({"train": 3, "dev": 2, "preview": 1}, {"train": 3, "validation": 2}, "1 pictures beside them"),
    "three": ({"train": 3, "val": 2, "test": 4}, {"train": 3, "validation": 2}, "split test (4 rows) is not used"),
    "no train": ({"test": 3, "val": 2}, {"test": 3, "validation": 2}, "there is no split train"),
    "a class": ({"train": 3, "tram": 2}, {"train": 4, "validation": 1}, "train/ is no split"),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_folders_that_are_called_splits_are_splits_or_it_is_said(tmp_path, kind):
    folders, rows, note = SPLITS[kind]
    names = [f"{folder}/{k}.png" for folder, count in folders.items() for k in range(count)]
    found = inspect(DataSettings(source=str(make(tmp_path / "set", *names)), size=SIZE, val_fraction=0.01), tmp_path)
    assert found["rows"] == rows and note in " | ".join(found["notes"])


def test_metadata_above_split_folders_serve_all_of_them(tmp_path):
    make(tmp_path, "train/a.png", "train/b.png", "val2017/c.png")
    write(tmp_path, "metadata.csv", "file_name,text\ntrain/a.png,A\nval2017/c.png,C\ntrain/b.png,B\n")
    both = [open_rows(DataSettings(source=str(tmp_path)), split=split) for split in ("train", "validation")]
    assert [[rows.caption(i) for i in range(len(rows))] for rows in both] == [["A", "B"], ["C"]]


def test_metadata_inside_split_folders_may_name_pictures_from_the_root(tmp_path):
    make(tmp_path, "train/a.png", "valid/c.png")
    write(tmp_path, "train/metadata.csv", "file_name,text\ntrain/a.png,A\n")
    write(tmp_path, "valid/metadata.csv", "file_name,text\nc.png,C\n")
    assert rows_of(tmp_path) == [("train/a.png", "A"), ("valid/c.png", "C")]


def test_a_split_column_is_a_split(tmp_path):
    jsonl(tmp_path, *({"text": f"t{k}", "split": "val" if k == 1 else "train"} for k in range(4)))
    both = [open_rows(DataSettings(source=str(tmp_path)), split=split) for split in ("train", "validation")]
    assert [len(rows) for rows in both] == [3, 1] and both[1].caption(0) == "t1"
    assert "column split tells the splits" in both[0].notes


# --- text beside pictures, img2dataset, parquet of paths ------------------------------------------------------------


@pytest.mark.parametrize("ending", [".txt", ".TXT", ".caption", ".png.txt"])
def test_captions_in_files_beside_pictures(tmp_path, ending):
    make(tmp_path, "a.png", "b.png")
    for name in "ab":
        write(tmp_path, f"{name}{ending}", f"words of {name}\n")
    assert rows_of(tmp_path) == [("a.png", "words of a"), ("b.png", "words of b")]
    write(tmp_path, "lonely.txt", "of nobody")
    assert "1 text files belong to no picture, or to one that has another (lonely.txt)" in notes_of(tmp_path)


def test_captions_in_json_files_beside_pictures(tmp_path):
    make(tmp_path, "a.png", "b.png", "c.png")
    for name in "ab":
        write(tmp_path, f"{name}.json", json.dumps({"caption": f"words of {name}", "width": 8}))
    assert rows_of(tmp_path) == [("a.png", "words of a"), ("b.png", "words of b"), ("c.png", "")]
    assert "captions come from 2 JSON files beside the pictures; 1 have none (c.png)" in notes_of(tmp_path)


def shard(root: Path, name: str, *keys: str, unread: tuple[str, ...] = ()) -> None:
    import tarfile

    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / name, "w") as archive:
        for k, key in enumerate(keys):
            facts = json.dumps({"caption": "other", "url": "x", "key": key}).encode()
            picture, text = bytes_of(k + len(name), "JPEG"), f"of {key}".encode()
            for entry, content in ((f"{key}.jpg", picture), (f"{key}.txt", text), (f"{key}.json", facts)):
                info = tarfile.TarInfo(entry)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        for entry in unread:
            archive.addfile(tarfile.TarInfo(entry), io.BytesIO())


def stats(root: Path, *names: str) -> None:
    import datasets

    for name in names:
        datasets.Dataset.from_dict({"url": ["x"], "caption": ["y"], "status": ["success"]}).to_parquet(
            root / f"{name}.parquet"
        )
        write(root, f"{name}_stats.json", '{"count": 2}')


def test_img2dataset_archives_win_over_the_tables_beside_them(tmp_path):
    shard(tmp_path, "00000.tar", "000000000", "000000003")
    shard(tmp_path, "00001.tar", "000010001", unread=("000010002.heic",))
    stats(tmp_path, "00000", "00001")
    with pytest.raises(InputError, match=r"1 rows without a picture \(000010002; formats that are not read: 1 .heic\)"):
        rows_of(tmp_path)
    found = rows_of(tmp_path, skip_bad=True)
    assert [caption for _, caption in found] == ["of 000000000", "of 000000003", "of 000010001"]


def test_img2dataset_folders_have_captions_and_no_classes(tmp_path):
    for k, name in enumerate(("00000/000000001", "00000/000000002", "00001/000010001")):
        make(tmp_path, f"{name}.jpg")
        write(tmp_path, f"{name}.jpg", bytes_of(k, "JPEG"))
        write(tmp_path, f"{name}.txt", f"words {k}")
        write(tmp_path, f"{name}.json", json.dumps({"caption": "other", "sha256": "x"}))
    stats(tmp_path, "00000", "00001")
    assert [caption for _, caption in rows_of(tmp_path)] == ["words 0", "words 1", "words 2"]
    rows = open_rows(DataSettings(source=str(tmp_path)))
    assert not rows.has("label") and not rows.notes


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_of_paths_names_pictures_relative_to_it(tmp_path, streaming):
    import datasets

    from ldmcli.data.shards import first_rows, open_shards

    make(tmp_path, "img/a.png", "img/b.png", "img/c.png")
    table = {"image_path": [f"img/{x}.png" for x in "abc"], "caption": ["A", "B", "C"]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "index.parquet")
    settings = DataSettings(source=str(tmp_path / "index.parquet"), size=SIZE, val_fraction=0.01)
    if streaming:
        shards, divided = open_shards(settings, "train")
        row = first_rows(shards, shards.index(), divided, "train", 1)
        assert (row.pixels(0, SIZE) == np.asarray(Image.open(tmp_path / row.name(0)))).all()
        return
    assert rows_of(tmp_path / "index.parquet") == [(f"img/{x}.png", x.upper()) for x in "abc"]
    assert drop_unreadable(open_rows(settings), settings)[0].pixels(0, SIZE).shape == (8, 8, 3)


@pytest.mark.parametrize("column", ["url", "image"])
def test_a_parquet_file_of_addresses_says_what_to_do(tmp_path, column):
    import datasets

    table = {column: ["https://example.org/1.jpg"], "text": ["x"]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=f"column {column} holds addresses of pictures.*img2dataset"):
        open_rows(DataSettings(source=str(tmp_path)))


def test_a_path_of_a_parquet_file_that_leads_out_is_a_bad_picture(tmp_path):
    import datasets

    make(tmp_path, "secret.png", "x/a.png", "x/b.png", "x/c.png")
    paths = ["a.png", "../secret.png", "b.png", "gone.png", "c.png"]
    datasets.Dataset.from_dict({"path": paths}).to_parquet(tmp_path / "x/a.parquet")
    settings = DataSettings(source=str(tmp_path / "x/a.parquet"), size=SIZE, skip_bad=True)
    both = [drop_unreadable(open_rows(settings, split=split), settings) for split in ("train", "validation")]
    reasons = " | ".join(str(bad) for _, bads in both for bad in bads)
    assert "leads out of" in reasons and "gone.png: cannot be read" in reasons


def coco(names: list[str], kinds: dict[int, str], first: int = 40) -> str:
    """Instances: picture k has k boxes; ids begin anywhere."""
    images = [{"id": first + k, "file_name": name, "width": 8, "height": 8} for k, name in enumerate(names)]
    ids = list(kinds)
    boxes = [
        {
            "id": 9 * k + n,
            "image_id": first + k,
            "bbox": [n, 0, 2, 2],
            "category_id": ids[n % len(ids)],
            "segmentation": [[0, 0, 1, 1]],
            "iscrowd": 0,
        }
        for k in range(len(names))
        for n in range(k)
    ]
    return json.dumps(
        {
            "info": {},
            "images": images,
            "annotations": boxes,
            "categories": [{"id": k, "name": name} for k, name in kinds.items()],
        },
        indent=1,
    )


@pytest.mark.parametrize("place", ["annotations/instances_{0}2017.json", "{0}2017/_annotations.coco.json"])
def test_annotations_of_coco_give_boxes_with_names_and_captions(tmp_path, place):
    make(tmp_path, *(f"{split}2017/{k}.png" for split in ("train", "val") for k in range(3)))
    for split in ("train", "val"):
        write(tmp_path, place.format(split), coco([f"{k}.png" for k in range(3)], {90: "toothbrush", 1: "person"}))
        texts = [{"image_id": 7, "id": k, "caption": f"{split} text {k}\n"} for k in range(2)]
        write(
            tmp_path,
            f"annotations/captions_{split}2017.json",
            json.dumps({"images": [{"id": 7, "file_name": "1.png"}], "annotations": texts}),
        )
    for split in ("train", "validation"):
        rows = open_rows(DataSettings(source=str(tmp_path)), split=split)
        assert rows.category_names == ["person", "toothbrush"] and [rows.name(i)[-5] for i in range(3)] == list("012")
        assert [[rows.category_names[k] for k in rows.objects(i)["category"]] for i in range(3)] == [
            [],
            ["toothbrush"],
            ["toothbrush", "person"],
        ]
        assert [rows.caption(i) for i in range(3)] == ["", f"{split.replace('idation', '')} text 0", ""]
        assert "boxes or captions come from" in rows.notes[0] and not any("not read" in one for one in rows.notes)


def test_pictures_without_an_entry_in_the_annotations_are_counted(tmp_path):
    write(make(tmp_path, "a.png", "b.png", "c.png"), "instances.json", coco(["a.png", "b.png"], {5: "ox"}))
    assert "1 pictures have no entry in the annotations (c.png)" in notes_of(tmp_path)
    assert len(names_of(tmp_path)) == 3


# --- what is said -----------------------------------------------------------------------------------------------------


def test_what_is_not_read_is_counted_by_ending(tmp_path):
    make(tmp_path, "a.png", "b.png")
    for name in ("1.HEIC", "2.heif", "3.jxl", "4.svg", "5.TGA", "clip.mp4", "raw.NEF", "more/6.heic"):
        write(tmp_path, name, b"x")
    write(tmp_path, "no_ending", bytes_of(9))
    write(tmp_path, "labels.csv", "file_name,label\na.png,x\n")
    write(tmp_path, "README.md", "words")
    write(tmp_path, "a.tags", "words")
    write(tmp_path, "captions.txt", "image,caption\na.png,words\n")
    settings = DataSettings(source=str(tmp_path), size=SIZE)
    found = inspect(settings, tmp_path / "out")
    told = " | ".join(found["notes"])
    assert "8 files of formats that are not read passed over: 2 .heic" in told and "1 .nef" in told
    assert "1 pictures whose names have no ending of a picture passed over (no_ending)" in told
    assert "1 files beside pictures are not read: 1 .tags (a.tags)" in told
    assert "2 tables are not read (labels.csv, captions.txt)" in told and "README" not in told
    assert "and 3 more" in told and "note        8 files" in inspect_text(found)
    for name in ("a.png", "b.png", "labels.csv"):
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"no pictures in this folder; 8 files of formats that are not read"):
        open_rows(settings)


def test_rows_and_pictures_without_partner_are_named_by_data_as_by_training(tmp_path):
    make(tmp_path / "set", "img/a.png", "img/b.png")
    write(tmp_path / "set", "metadata.csv", "file_name,text\nimg/c.png,x\nimg/d.png,y\n")
    for command in (("data", tmp_path / "set"), ("train-ae", "--data", tmp_path / "set", "--size", 8, "--steps", 1)):
        ending = ldm(*command, "--out", tmp_path / "out")
        assert ending.code == 3 and "2 rows name pictures that are absent (img/c.png, img/d.png)" in ending.line
        assert "2 pictures have no row in the metadata (img/a.png, img/b.png)" in ending.line
    write(tmp_path / "set", "metadata.csv", "file_name,text\nimg/c.png,x\nimg/a.png,y\n")
    ending = ldm("data", tmp_path / "set", "--json", "--out", tmp_path / "out")
    notes = " | ".join(ending.json["notes"])
    assert ending.code == 0 and "absent (img/c.png), left out" in notes and "metadata (img/b.png), left out" in notes


def test_transparent_pixels_and_captions_that_are_cut_are_counted(tmp_path):
    make(tmp_path / "set", "a.png", "b.png", "c.png")
    clear = Image.open(tmp_path / "set/a.png").convert("RGBA")
    clear.save(tmp_path / "set/b.png")  # opaque all the same
    clear.putpixel((1, 1), (9, 9, 9, 0))
    clear.save(tmp_path / "set/a.png")
    for name, text in (("a", "few words"), ("b", "word " * 90), ("c", "x")):
        write(tmp_path / "set", f"{name}.txt", text)
    settings = DataSettings(source=str(tmp_path / "set"), size=SIZE)
    told = " | ".join(inspect(settings, tmp_path)["notes"])
    assert "1 pictures have transparent pixels, laid over white (data.background)" in told
    assert "1 captions have more than 75 words" in told
    both = [drop_unreadable(open_rows(settings, split=split), settings)[0] for split in ("train", "validation")]
    assert sum("1 pictures of" in note for rows in both for note in rows.notes) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.5])
def test_float_pictures_are_bad_by_name(tmp_path, value):
    make(tmp_path, "a.png", "b.png")
    Image.fromarray(np.full((8, 8), value, np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(InputError, match="f.tiff: float pixels"):
        for split in ("train", "validation"):
            settings = DataSettings(source=str(tmp_path), size=SIZE)
            drop_unreadable(open_rows(settings, split=split), settings)

"""Whatever holds a data set, nothing is lost on the way to its rows, and what cannot be used is named."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from golden_cases import shared
from PIL import Image

from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DataSettings
from ldmcli.data import folder
from ldmcli.data.column_roles import choose_columns
from ldmcli.data.readers import open_tables
from ldmcli.data.sources import decode_all, drop_unreadable, open_rows

SIZE = (8, 8)


def png(value: int, size: tuple[int, int] = SIZE) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size[::-1], (value % 256, value // 256, 7)).save(file, "PNG")
    return file.getvalue()


def put(path: Path, content: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pictures(root: Path, *names: str) -> Path:
    for k, name in enumerate(names):
        put(root / name, png(k + 1))
    return root


def settings(source, **options) -> DataSettings:
    return DataSettings(source=str(source), size=SIZE, **options)


def everything(source, **options) -> list:
    """Rows of both splits, as (name, caption, first red value)."""
    both = [open_rows(settings(source, **options), split=split) for split in ("train", "validation")]
    return sorted((r.name(i), r.caption(i), int(r.pixels(i, SIZE)[0, 0, 0])) for r in both for i in range(len(r)))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_plain_folder_gives_each_picture_once_under_its_relative_path(tmp_path):
    pictures(tmp_path, "a/1.png", "b/1.png", "1.png", "twin.png", "x y/Ü#%.PNG")
    put(tmp_path / "twin.jpg", png(99))
    found = everything(tmp_path)
    assert [name for name, _, _ in found] == ["1.png", "a/1.png", "b/1.png", "twin.jpg", "twin.png", "x y/Ü#%.PNG"]
    assert len({value for _, _, value in found}) == 6


def test_captions_na_and_null_stay_text_and_a_bom_is_no_part_of_a_name(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png", "d.png")
    put(tmp_path / "metadata.csv", '\ufefffile_name,text\na.png,NA\nb.png,null\nc.png,\nd.png,"x, ""y"""\n')
    assert [caption for _, caption, _ in everything(tmp_path)] == ["NA", "null", "", 'x, "y"']


def test_a_caption_of_megabytes_is_read(tmp_path):
    pictures(tmp_path, "a.png")
    put(tmp_path / "metadata.csv", f"file_name,text\na.png,{'x' * 3_000_000}\n")
    assert len(everything(tmp_path)[0][1]) == 3_000_000


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path):
    pictures(tmp_path, "a.png")
    put(tmp_path / "metadata.csv", b"file_name,text\na.png,caf\xe9\n")
    with pytest.raises(InputError, match=r"metadata.csv: not UTF-8 text at byte 24 \(0xe9\)"):
        open_rows(settings(tmp_path))


def test_jsonl_rows_keep_their_words_and_line_separators(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    rows = [{"file_name": "a.png", "caption": "one\u2028two"}, {"file_name": "b.png", "caption": None}]
    put(tmp_path / "metadata.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert [caption for _, caption, _ in everything(tmp_path)] == ["one\u2028two", ""]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("file_name,text\na.png,one,two\n", "line 2 has more fields"),
        ("file_name,text\na.png\n", "line 2 has fewer"),
        ("name,text\na.png,x\n", "no column file_name; there are name, text"),
        ('file_name\n"a.png\n', "line"),
    ],
)
def test_damaged_csv_is_named(tmp_path, text, reason):
    pictures(tmp_path, "a.png")
    put(tmp_path / "metadata.csv", text)
    with pytest.raises(InputError, match=reason):
        open_rows(settings(tmp_path))


@pytest.mark.parametrize("text, reason", [('{"file_name": "a.png"', "not valid JSON"), ("[1]", "not an object")])
def test_damaged_jsonl_is_named(tmp_path, text, reason):
    pictures(tmp_path, "a.png")
    put(tmp_path / "metadata.jsonl", text)
    with pytest.raises(InputError, match=reason):
        open_rows(settings(tmp_path))


def test_partners_that_are_missing_are_listed_or_left_out_and_counted(tmp_path):
    pictures(tmp_path, "a.png", "b.png", *(f"lonely{k}.png" for k in range(7)))
    put(tmp_path / "metadata.csv", "file_name,text\na.png,x\ngone.png,y\nb.png,z\n")
    with pytest.raises(InputError) as failure:
        open_rows(settings(tmp_path))
    for words in (
        "1 rows name pictures that are absent (gone.png)",
        "7 pictures have no row",
        "lonely0.png",
        "and 2 more",
        "--skip-bad",
    ):
        assert words in str(failure.value)
    assert [row[:2] for row in everything(tmp_path, skip_bad=True)] == [("a.png", "x"), ("b.png", "z")]
    notes = " ".join(open_rows(settings(tmp_path, skip_bad=True)).notes)
    assert "1 rows name pictures" in notes and "7 pictures have no row" in notes


def test_numeric_class_folders_are_ordered_by_number(tmp_path):
    pictures(tmp_path, *(f"{name}/{k}.png" for name in ("100", "7", "12") for k in range(3)))
    rows = open_rows(settings(tmp_path))
    assert rows.class_names == ["7", "12", "100"]
    assert all(rows.class_names[rows.label(i)] == rows.name(i).split("/")[0] for i in range(len(rows)))


def test_a_file_called_test_makes_no_split(tmp_path):
    pictures(tmp_path, "k_test_shirt.png", "train_photo.png", "validation.png")
    assert len(everything(tmp_path)) == 3


def test_split_folders_are_splits_and_share_their_classes(tmp_path):
    pictures(tmp_path, "train/b/1.png", "train/a/2.png", "val/b/3.png")
    train, validation = (open_rows(settings(tmp_path), split=s) for s in ("train", "validation"))
    assert (len(train), len(validation)) == (2, 1)
    assert train.class_names == validation.class_names == ["a", "b"]
    assert validation.class_names[validation.label(0)] == "b"


def test_a_class_folder_called_train_among_others_is_a_class(tmp_path):
    pictures(tmp_path, "train/1.png", "bus/1.png", "car/1.png")
    assert open_rows(settings(tmp_path)).class_names == ["bus", "car", "train"]


def test_hidden_files_and_files_of_systems_are_passed_over(tmp_path):
    pictures(tmp_path, "a.png", ".hidden.png", "._a.png", ".git/b.png", "__MACOSX/c.png")
    put(tmp_path / "Thumbs.db", b"x")
    put(tmp_path / "notes.md", b"x")
    assert [name for name, _, _ in everything(tmp_path)] == ["a.png", "a.png"]  # the only row serves as both


def test_text_files_beside_pictures_are_captions(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    put(tmp_path / "a.txt", "a cat\n")
    with pytest.raises(InputError, match=r"1 pictures have no text file beside them \(b.png\)"):
        open_rows(settings(tmp_path))
    put(tmp_path / "b.txt", "a dog\n")
    assert [caption for _, caption, _ in everything(tmp_path)] == ["a cat", "a dog"]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "sub/../../secret.png"])
def test_metadata_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    put(tmp_path / "secret.png", png(5))
    put(tmp_path / "data/a.png", png(1))
    put(tmp_path / "data/metadata.jsonl", json.dumps({"file_name": name}) + '\n{"file_name": "a.png"}')
    with pytest.raises(InputError, match=f"file_name '{name}' leads out of the folder"):
        open_rows(settings(tmp_path / "data", skip_bad=True))


def test_links_that_leave_the_folder_are_refused_and_links_inside_it_are_not(tmp_path):
    put(tmp_path / "secret/s.png", png(5))
    data = pictures(tmp_path / "data", "a.png", "c.png")
    (data / "b.png").symlink_to("a.png")
    assert len(everything(data)) == 3
    (data / "out.png").symlink_to(tmp_path / "secret/s.png")
    (data / "outdir").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="links that lead out"):
        open_rows(settings(data))
    assert [name for name, _, _ in everything(data, skip_bad=True)] == ["a.png", "b.png", "c.png"]


def test_names_that_are_not_utf8_work_and_can_be_shown(tmp_path):
    raw = os.path.join(os.fsencode(tmp_path), b"latin1_\xe9\xff.png")
    try:
        with open(raw, "wb") as file:
            file.write(png(3))
    except OSError:
        pytest.skip("this file system refuses names that are not UTF-8")
    rows, bad = drop_unreadable(open_rows(settings(tmp_path)), settings(tmp_path))
    assert len(rows) == 1 and not bad and rows.fingerprint
    with open(raw, "wb") as file:
        file.write(b"broken")
    with pytest.raises(InputError) as failure:
        drop_unreadable(open_rows(settings(tmp_path)), settings(tmp_path))
    assert "latin1_\\xe9\\xff.png" in str(failure.value) and str(failure.value).encode("utf-8")


def test_an_empty_folder_and_a_single_picture_are_refused(tmp_path):
    with pytest.raises(InputError, match="no pictures in this folder"):
        open_rows(settings(tmp_path))
    with pytest.raises(InputError, match="one picture; name the folder"):
        open_rows(settings(put(tmp_path / "a.png", png(1))))


def test_pictures_beside_parquet_files_are_not_taken_for_the_data(tmp_path):
    pictures(tmp_path, "preview.png")
    put(tmp_path / "data/train-00000-of-00001.parquet", b"x")
    with pytest.raises(InputError, match="both pictures"):
        open_rows(settings(tmp_path))


def test_a_csv_of_its_own_names_pictures_relative_to_it(tmp_path):
    pictures(tmp_path, "img/a.png", "img/b.png", "img/unused.png")
    table = put(tmp_path / "captions.csv", "image,caption\nimg/a.png,one\nimg/b.png,two\n")
    assert [row[:2] for row in everything(table)] == [("img/a.png", "one"), ("img/b.png", "two")]


def test_maps_and_objects_of_a_folder_come_with_their_pictures(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    classes = np.arange(64, dtype=np.uint8).reshape(8, 8)
    (tmp_path / "maps").mkdir()
    for name in "ab":
        Image.fromarray(classes).save(tmp_path / f"maps/{name}.png")
    rows = [
        {
            "file_name": f"{name}.png",
            "map_file_name": f"maps/{name}.png",
            "objects": {"bbox": [[0, 0, 4, 8]], "category": [kind]},
        }
        for name, kind in (("a", "dog"), ("b", "cat"))
    ]
    put(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    found = open_rows(settings(tmp_path))
    assert (found.map(0) == classes).all() and found.category_names == ["cat", "dog"]
    kind = 1 if found.name(0) == "a.png" else 0
    assert found.objects(0)["category"].tolist() == [kind] and found.objects(0)["bbox"].tolist() == [[0, 0, 4, 8]]
    assert found.boxes(0, (4, 4))["bbox"].tolist() == [[0, 0, 0.5, 1]]


def test_the_broken_folder_gives_its_good_pictures_and_names_the_bad(tmp_path):
    broken = shared("broken")
    expected = dict(line.split("\t")[:2] for line in (broken / "EXPECTED.tsv").read_text().splitlines()[1:])
    with tarfile.open(broken / "odd_names.tar") as tar:
        tar.extractall(tmp_path, filter="fully_trusted")
    names, refused = set(), set()
    for root, prefix in ((broken, ""), (tmp_path / "odd_names", "odd_names.tar:")):
        chosen = settings(root, skip_bad=True)
        for split in ("train", "validation"):
            rows, bad = drop_unreadable(open_rows(chosen, split=split), chosen)
            names |= {f"{prefix}{rows.name(i)}" for i in range(len(rows))}
            refused |= {f"{prefix}{error.name}" for error in bad}
    names = {n.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for n in names}
    assert not names & refused
    assert {name for name, verdict in expected.items() if verdict == "yes"} <= names
    assert not {name for name, verdict in expected.items() if verdict == "no"} & names
    with pytest.raises(InputError, match=r"pictures cannot be read: .*truncated|and \d+ more"):
        drop_unreadable(open_rows(settings(broken)), settings(broken))


# --- tables -----------------------------------------------------------------------------------------------------------


def dataset(n: int = 6, **columns):
    import datasets

    data = {"image": [{"bytes": png(k + 1), "path": None} for k in range(n)], **columns}
    return datasets.Dataset.from_dict(data).cast_column("image", datasets.Image())


def parquet(root: Path, name: str = "train-00000-of-00001.parquet", n: int = 6, **columns) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    dataset(n, **columns).to_parquet(root / name)
    return root


def test_parquet_files_make_the_splits_that_their_names_say(tmp_path):
    parquet(tmp_path, "data/train-00000-of-00002.parquet".split("/")[1], n=4)
    parquet(tmp_path, "train-00001-of-00002.parquet", n=2)
    parquet(tmp_path, "validation-00000-of-00001.parquet", n=3)
    train, validation = (open_rows(settings(tmp_path), split=s) for s in ("train", "validation"))
    assert (len(train), len(validation)) == (6, 3)
    assert train.pixels(3, SIZE)[0, 0, 0] == 4 and train.pixels(4, SIZE)[0, 0, 0] == 1


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    parquet(tmp_path, "validation-00000-of-00001.parquet")
    with pytest.raises(InputError, match="--split train: .* no such split; there are validation"):
        open_rows(settings(tmp_path))
    assert (
        len(open_rows(settings(tmp_path, split="validation")))
        + len(open_rows(settings(tmp_path, split="validation"), split="validation"))
        == 6
    )


def test_usual_columns_are_found_and_told(tmp_path):
    parquet(tmp_path, text=[f"t{k}" for k in range(6)], other=list(range(6)))
    rows = open_rows(settings(tmp_path))
    assert rows.columns == {"image": "image", "caption": "text"}
    assert rows.has("caption") and not rows.has("label") and not rows.has("map") and not rows.has("objects")


def test_a_named_column_wins_and_a_missing_one_is_refused_with_those_there_are(tmp_path):
    parquet(tmp_path, text=["t"] * 6, title=[f"title {k}" for k in range(6)])
    assert open_rows(settings(tmp_path, caption_column="title")).caption(0).startswith("title")
    with pytest.raises(InputError, match=r"--caption-column titel: no such column; there are image \(image\), text"):
        open_rows(settings(tmp_path, caption_column="titel"))
    with pytest.raises(InputError, match="did you mean title"):
        open_rows(settings(tmp_path, caption_column="titel"))
    with pytest.raises(InputError, match="holds image, which cannot be a caption"):
        open_rows(settings(tmp_path, caption_column="image"))


def test_a_table_without_pictures_is_refused(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"a": [1, 2]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"no column of pictures; there are a \(int\); name it with --image-column"):
        open_rows(settings(tmp_path))


def test_labels_take_their_names_from_the_data_or_their_names_from_the_numbers(tmp_path):
    import datasets

    named = dataset(label=[1, 0, 1, 0, 1, 0]).cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    named.to_parquet(tmp_path / "named.parquet")
    dataset(label=["10", "9", "10", "2", "9", "2"]).to_parquet(tmp_path / "text.parquet")
    dataset(label=[3, 0, 1, 0, 1, 0]).to_parquet(tmp_path / "numbers.parquet")
    names = {
        kind: open_rows(settings(tmp_path / f"{kind}.parquet")).class_names for kind in ("named", "text", "numbers")
    }
    assert names == {"named": ["no", "yes"], "text": ["2", "9", "10"], "numbers": ["0", "1", "3"]}


def everything_labelled(source) -> list[int]:
    both = [open_rows(settings(source), split=split) for split in ("train", "validation")]
    return [rows.label(i) for rows in both for i in range(len(rows))]


def test_labels_outside_their_classes_are_refused_before_anything_else(tmp_path):
    import datasets

    rows = dataset(label=[1, -1, 0, 0, 1, 0])
    rows.to_parquet(tmp_path / "negative.parquet")
    with pytest.raises(InputError, match=r"1 labels in column label name no class \(row 1: -1\)"):
        everything_labelled(tmp_path / "negative.parquet")
    table = open_tables(settings(tmp_path / "negative.parquet"))["train"]
    assert choose_columns(table, settings("x"))["label"] == "label"
    rows.cast_column("label", datasets.ClassLabel(names=["a", "b"])).to_parquet(tmp_path / "unlabelled.parquet")
    with pytest.raises(InputError, match="row 1: -1"):
        everything_labelled(tmp_path / "unlabelled.parquet")


def test_of_several_captions_the_first_with_words_is_taken(tmp_path):
    parquet(tmp_path, captions=[["", "two"], ["one", "x"], [], ["a"], ["b"], ["c"]])
    found = {row[2]: row[1] for row in everything(tmp_path)}
    assert found[1] == "two" and found[2] == "one" and found[3] == ""


def test_a_saved_dataset_and_an_arrow_file_open_like_the_parquet_they_came_from(tmp_path):
    made = dataset(text=[f"t{k}" for k in range(6)])
    made.select([5, 3, 1, 0, 2, 4]).save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "p.parquet")
    kept = {row[1:] for row in everything(tmp_path / "p.parquet")}
    assert {row[1:] for row in everything(tmp_path / "saved")} == kept
    assert {row[1:] for row in everything(next((tmp_path / "saved").glob("*.arrow")))} == kept
    (tmp_path / "saved" / "dataset_info.json").unlink()
    with pytest.raises(InputError, match="save_to_disk"):
        open_rows(settings(tmp_path / "saved"))


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = put(tmp_path / "x.parquet", b"PAR1 nonsense PAR1")
    with pytest.raises(InputError, match="x.parquet: cannot be read as parquet"):
        open_rows(settings(path))


def tar(path: Path, *entries: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, "/etc/passwd"
            archive.addfile(info, io.BytesIO(content))
    return path


def test_webdataset_archives_give_pictures_captions_and_labels(tmp_path):
    tar(
        tmp_path / "shard-0.tar",
        ("a/1.png", png(1)),
        ("a/1.txt", b"one"),
        ("a/1.cls", b"3"),
        ("b/1.PNG", png(2)),
        ("b/1.txt", b"two"),
        ("b/1.cls", b"0"),
    )
    tar(tmp_path / "shard-1.tar", ("a/1.png", png(3)), ("a/1.txt", b"three"), ("a/1.cls", b"1"))
    assert [row[1:] for row in everything(tmp_path)] == [("one", 1), ("two", 2), ("three", 3)]
    rows = open_rows(settings(tmp_path))
    assert rows.class_names == ["0", "1", "3"] and rows.name(0).startswith("shard-")


def test_json_of_an_archive_brings_captions(tmp_path):
    path = tar(tmp_path / "x.tar", ("1.png", png(1)), ("1.json", b'{"caption": "one"}'))
    assert open_rows(settings(path)).caption(0) == "one"


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png"])
def test_archive_entries_that_lead_out_are_refused_by_name(tmp_path, name):
    with pytest.raises(InputError, match="is refused"):
        open_rows(settings(tar(tmp_path / "x.tar", (name, png(1)))))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_archive_entries_that_are_no_plain_files_are_refused(tmp_path, kind):
    with pytest.raises(InputError, match="'link.png' is refused"):
        open_rows(settings(tar(tmp_path / "x.tar", ("link.png", b""), kind=kind)))


def test_an_archive_that_is_none_is_named(tmp_path):
    with pytest.raises(InputError, match="x.tar: not an uncompressed tar"):
        open_rows(settings(put(tmp_path / "x.tar", b"nonsense" * 100)))


def test_paths_that_are_not_there_are_not_looked_up_on_the_hub(tmp_path):
    pictures(tmp_path / "photos", "a.png")
    with pytest.raises(InputError, match="no such file or folder; did you mean photos"):
        open_rows(settings(tmp_path / "photo"))
    with pytest.raises(InputError, match="no such file or folder"):
        open_rows(settings("missing.parquet"))


def test_a_name_that_the_hub_does_not_give_says_how_to_get_it():
    with pytest.raises(InputError, match=r"--data shapse: .* did you mean shapes\?; .*hf download"):
        open_rows(settings("shapse"))


# --- splits and limits ------------------------------------------------------------------------------------------------


def many(root: Path, n: int = 200, **columns) -> Path:
    return parquet(root, n=n, **columns)


def test_held_out_rows_and_training_rows_are_all_rows_once(tmp_path):
    many(tmp_path)
    train, validation = (open_rows(settings(tmp_path, val_fraction=0.1), split=s) for s in ("train", "validation"))
    names = [rows.name(i) for rows in (train, validation) for i in range(len(rows))]
    assert sorted(names) == sorted(f"row {k}" for k in range(200))
    assert 8 <= len(validation) <= 35


def test_rows_that_are_added_move_no_other_row(tmp_path):
    few, more = many(tmp_path / "few", 100), many(tmp_path / "more", 200)
    held = [
        {rows.content_hash(i) for i in range(len(rows))}
        for rows in (open_rows(settings(root, val_fraction=0.2), split="validation") for root in (few, more))
    ]
    assert held[0] < held[1]


def test_equal_pictures_fall_on_the_same_side(tmp_path):
    pictures(tmp_path, *(f"{k}.png" for k in range(20)))
    for k in range(20):
        put(tmp_path / f"copy{k}.png", (tmp_path / f"{k}.png").read_bytes())
    train, validation = (open_rows(settings(tmp_path, val_fraction=0.3), split=s) for s in ("train", "validation"))
    hashes = [{rows.content_hash(i) for i in range(len(rows))} for rows in (train, validation)]
    assert not hashes[0] & hashes[1] and len(train) + len(validation) == 40


@pytest.mark.parametrize("n, fraction", [(2, 0.0001), (2, 0.9999), (3, 0.0001)])
def test_each_side_has_at_least_one_row(tmp_path, n, fraction):
    parquet(tmp_path, n=n)
    sizes = [len(open_rows(settings(tmp_path, val_fraction=fraction), split=s)) for s in ("train", "validation")]
    assert min(sizes) >= 1 and sum(sizes) == n


def test_copies_of_one_picture_are_parted_all_the_same(tmp_path):
    for k in range(4):
        put(tmp_path / f"{k}.png", png(1))
    sizes = [len(open_rows(settings(tmp_path), split=s)) for s in ("train", "validation")]
    assert sizes == [3, 1]


def test_a_single_row_serves_as_both_and_says_so(tmp_path):
    pictures(tmp_path, "a.png")
    rows = open_rows(settings(tmp_path), split="validation")
    assert len(rows) == 1 and rows.validation_is_train
    parquet(tmp_path / "two", n=2)
    assert not open_rows(settings(tmp_path / "two"), split="validation").validation_is_train


def test_the_limit_takes_training_rows_after_the_split(tmp_path):
    many(tmp_path, 50)
    whole = open_rows(settings(tmp_path, val_fraction=0.2))
    few = open_rows(settings(tmp_path, val_fraction=0.2, limit=7))
    spread = [i * len(whole) // 7 for i in range(7)]
    assert [few.name(i) for i in range(len(few))] == [whole.name(i) for i in spread]
    assert len(open_rows(settings(tmp_path, val_fraction=0.2, limit=60))) == len(whole)
    assert len(open_rows(settings(tmp_path, val_fraction=0.2, limit=7), split="validation")) == 50 - len(whole)
    assert len(open_rows(settings("shapes", limit=7))) == 7


def test_limited_rows_are_of_all_classes_of_a_folder(tmp_path):
    pictures(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog", "owl") for i in range(20)))
    few = open_rows(settings(tmp_path, limit=9, val_fraction=0.2))
    assert {few.class_names[few.label(i)] for i in range(9)} == {"cat", "dog", "owl"}


# --- rows -------------------------------------------------------------------------------------------------------------


def test_changed_pixels_change_hash_and_fingerprint_though_size_and_time_stay(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    rows = open_rows(settings(tmp_path))
    before, name = rows.fingerprint, rows.name(0)
    path = tmp_path / name
    stat = path.stat()
    image = Image.new("RGB", SIZE, (200, 0, 7))
    image.save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = open_rows(settings(tmp_path, val_split="", val_fraction=0.05))
    assert {after.content_hash(i) for i in range(len(after))} != {rows.content_hash(i) for i in range(len(rows))}
    assert after.fingerprint != before


def test_the_fingerprint_sees_captions_and_order(tmp_path):
    prints = set()
    for k, texts in enumerate((["a", "b"], ["a", "c"])):
        root = pictures(tmp_path / str(k), "train/a.png", "train/b.png", "validation/c.png")
        rows = [{"file_name": f"{n}.png", "text": t} for n, t in zip("ab", texts)]
        put(root / "train/metadata.jsonl", "\n".join(map(json.dumps, rows)))
        put(root / "validation/metadata.jsonl", '{"file_name": "c.png", "text": "v"}')
        opened = open_rows(settings(root))
        prints |= {opened.fingerprint, opened.select([1, 0]).fingerprint}
    assert len(prints) == 4


@pytest.mark.parametrize("crop", ["center", "random"])
def test_preloaded_pixels_are_those_that_decoding_gives(tmp_path, crop):
    rng = np.random.default_rng(0)
    for k, shape in enumerate([(20, 30), (30, 20), (8, 8), (5, 17)]):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
    chosen = settings(tmp_path, crop=crop)
    cold, warm = open_rows(chosen), open_rows(chosen)
    assert decode_all(warm, chosen) == []
    warm._columns.encoded = None  # from now on only memory can answer
    for i in range(len(cold)):
        for u in ((0.0, 0.0), (0.3, 0.8), (1.0, 1.0)):
            a, b = (rows.pixels(i, SIZE, crop, u).astype(int) for rows in (cold, warm))
            assert a.shape == (*SIZE, 3) and np.abs(a - b).max() <= 1


def test_another_size_than_the_one_preloaded_is_decoded_anew(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    rows = open_rows(settings(tmp_path))
    decode_all(rows, settings(tmp_path))
    assert rows.pixels(0, (16, 12)).shape == (16, 12, 3)


def test_a_set_that_memory_cannot_hold_is_decoded_each_time(tmp_path, monkeypatch):
    pictures(tmp_path, *(f"{k}.png" for k in range(6)))
    monkeypatch.setattr("ldmcli.data.rows.memory_bytes", lambda: 8 * (2 * 8 * 8 * 3 + 1))
    rows = open_rows(settings(tmp_path))
    assert decode_all(rows, settings(tmp_path)) == [] and len(rows._kept) == 2
    assert all(rows.pixels(i, SIZE).shape == (8, 8, 3) for i in range(len(rows)))


def test_bad_pictures_stop_before_the_start_and_all_are_counted(tmp_path):
    pictures(tmp_path, *(f"{k}.png" for k in range(9)))
    for name in ("2.png", "5.png"):
        put(tmp_path / name, b"not a picture")
    rows = open_rows(settings(tmp_path))
    with pytest.raises(InputError, match=r"2 of 8 pictures cannot be read: 2.png: not a picture .*5.png.*--skip-bad"):
        drop_unreadable(rows, settings(tmp_path))
    good, bad = drop_unreadable(rows, settings(tmp_path, skip_bad=True))
    assert [error.name for error in bad] == ["2.png", "5.png"] and len(good) == 6
    assert {good.name(i) for i in range(6)}.isdisjoint({"2.png", "5.png"})
    assert "2 pictures that cannot be read left out" in " ".join(good.notes)


def test_nothing_but_bad_pictures_is_an_error_even_when_they_are_skipped(tmp_path):
    for k in range(3):
        put(tmp_path / f"{k}.png", b"no")
    with pytest.raises(InputError, match="none of 2 pictures can be read"):
        drop_unreadable(open_rows(settings(tmp_path, skip_bad=True)), settings(tmp_path, skip_bad=True))


def test_progress_is_told_of_every_picture(tmp_path):
    class Bar:
        done = 0

        def advance(self, n=1):
            self.done += n

    pictures(tmp_path, *(f"{k}.png" for k in range(5)))
    rows = open_rows(settings(tmp_path))
    decode_all(rows, settings(tmp_path), progress=(bar := Bar()))
    assert bar.done == len(rows) == 4


def test_messages_show_no_control_characters_of_the_data(tmp_path):
    put(tmp_path / "bad\x1b]0;x\x07.png", b"no")
    with pytest.raises(InputError) as failure:
        drop_unreadable(open_rows(settings(tmp_path)), settings(tmp_path))
    assert "\x1b" not in str(failure.value) and "\x07" not in str(failure.value)


def test_maps_and_boxes_are_cut_as_the_picture_is(tmp_path):
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 20:] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray((image[..., 0] // 255).astype(np.uint8)).save(tmp_path / "m.png")
    put(
        tmp_path / "metadata.jsonl",
        json.dumps(
            {
                "file_name": "a.png",
                "map_file_name": "m.png",
                "objects": {"bbox": [[20, 0, 10, 10], [0, 0, 2, 2]], "category": [1, 0]},
            }
        ),
    )
    rows = open_rows(settings(tmp_path))
    for u in ((0.5, 0.75), (0.5, 1.0)):
        pixels, classes = rows.pixels(0, (10, 10), "random", u), rows.map_pixels(0, (10, 10), "random", u)
        assert ((pixels[..., 0] > 127) == (classes == 1)).all()
        ((x, y, w, h),) = rows.boxes(0, (10, 10), "random", u)["bbox"]
        assert (y, h) == (0, 1) and round(x * 10) == np.argmax(classes[0]) and round(w * 10) == classes[0].sum()


def test_a_coloured_picture_is_not_taken_for_a_class_map_and_refused_when_it_is_named(tmp_path):
    pictures(tmp_path, "a.png", "s.png")
    put(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "segmentation_file_name": "s.png"}')
    assert not open_rows(settings(tmp_path)).has("map")
    with pytest.raises(InputError, match="a map holds class indices"):
        open_rows(settings(tmp_path, map_column="segmentation")).map(0)


@pytest.mark.parametrize(
    "objects, reason",
    [({"bbox": [[1, 2, 3]], "category": [0]}, "four numbers"), ({"bbox": [[1, 2, 3, 4]], "category": []}, "one a box")],
)
def test_objects_that_do_not_fit_are_named(tmp_path, objects, reason):
    pictures(tmp_path, "a.png")
    put(tmp_path / "metadata.jsonl", json.dumps({"file_name": "a.png", "objects": objects}))
    with pytest.raises(InputError, match=f"a.png: .*{reason}"):
        open_rows(settings(tmp_path)).objects(0)


def test_shapes_are_rows_like_others():
    rows = open_rows(settings("shapes"))
    assert rows.has("caption") and rows.has("label") and rows.has("objects") and rows.has("map")
    assert len(rows) == 12_000 and len(open_rows(settings("shapes"), split="validation")) == 512
    assert rows.class_names[rows.label(4)] in rows.caption(4)
    assert rows.pixels(4, (32, 48)).shape == (32, 48, 3) and rows.map_pixels(4, (32, 48)).shape == (32, 48)
    assert set(np.unique(rows.map(4))) == {0, 1 + rows.label(4)}
    assert drop_unreadable(rows, settings("shapes")) == (rows, [])
    assert rows.select([4, 2]).caption(0) == rows.caption(4)
    assert rows.content_hash(1) != rows.content_hash(2)


def test_shapes_of_more_objects_have_no_class_of_their_own():
    assert not open_rows(settings("shapes:2")).has("label")
    with pytest.raises(UsageError, match="shapes:1, shapes:2 and shapes:3"):
        open_rows(settings("shapes:7"))


def test_fingerprints_of_shapes_tell_levels_splits_and_limits_apart():
    prints = {
        open_rows(settings(source, limit=limit), split=split).fingerprint
        for source in ("shapes", "shapes:2")
        for limit in (0, 10)
        for split in ("train", "validation")
    }
    assert len(prints) == 6  # the limit touches training rows only


def layouts(root: Path) -> Path:
    """Pictures with a caption, boxes and a class map, as published sets have them."""
    import datasets

    root.mkdir()
    boxes = {
        "bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float32"), length=4)),
        "category": datasets.Sequence(datasets.ClassLabel(names=["cat", "dog"])),
        "area": datasets.Sequence(datasets.Value("float32")),
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "segmentation": datasets.Image(),
            "caption": datasets.Value("string"),
            "objects": boxes,
            "image_id": datasets.Value("int64"),
        }
    )
    file = io.BytesIO()
    Image.new("L", SIZE, 3).save(file, "PNG")
    for split, n in (("train", 5), ("validation", 2)):
        row = {
            "segmentation": {"bytes": file.getvalue(), "path": None},
            "caption": "a dog",
            "objects": {"bbox": [[0, 0, 4, 8]], "category": [1], "area": [32]},
        }
        rows = [{"image": {"bytes": png(k + 1), "path": None}, "image_id": k, **row} for k in range(n)]
        datasets.Dataset.from_list(rows, features).to_parquet(root / f"{split}-00000-of-00001.parquet")
    return root


def class_folders(root: Path) -> Path:
    for split, n in (("train", 4), ("validation", 1)):
        pictures(root / split, *(f"{kind}/{k}.png" for kind in ("animals", "food") for k in range(n)))
    return root


@pytest.mark.parametrize(
    "made, sizes, roles",
    [
        (lambda root: shared("digits"), (40, 10), {"image", "caption", "label"}),
        (layouts, (5, 2), {"image", "caption", "objects", "map"}),
        (class_folders, (8, 2), {"image", "label"}),
    ],
)
def test_whole_sets_open_with_their_splits_and_columns(tmp_path, made, sizes, roles):
    root = made(tmp_path / "set")
    both = [open_rows(settings(root), split=split) for split in ("train", "validation")]
    assert tuple(map(len, both)) == sizes and set(both[0].columns) == roles
    assert both[1].pixels(0, SIZE).shape == (8, 8, 3)


def test_several_names_are_shortened_with_their_number():
    assert folder.first_few(["a", "b"]) == "a, b"
    assert folder.first_few(str(k) for k in range(8)) == "0, 1, 2, 3, 4 and 3 more"


def marked_rows(folder, **values):
    """One picture of 60 x 80 with a red square, its map and its box."""
    pixels, classes = np.zeros((60, 80, 3), np.uint8), np.zeros((60, 80), np.uint8)
    pixels[15:45, 20:60] = (255, 0, 0)
    classes[15:45, 20:60] = 1
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(classes).save(folder / "m.png")
    put(
        folder / "metadata.jsonl",
        json.dumps(
            {
                "file_name": "a.png",
                "map_file_name": "m.png",
                "objects": {"bbox": [[20, 15, 40, 30]], "category": ["square"]},
            }
        ),
    )
    return open_rows(settings(folder, **values))


def test_crops_of_several_sizes_cut_picture_map_and_boxes_alike(tmp_path):
    """A square marks the same place in the picture, its map and its box, however the crop lies and zooms."""
    rows = marked_rows(tmp_path, crop="random", crop_min=0.5)
    rows.preload((32, 32), "random")
    for u in ((0.0, 0.0, 2.0), (1.0, 0.3, 1.6), (0.5, 0.5, 1.0), (0.4, 0.8, 1.25)):
        pixels = rows.pixels(0, (32, 32), "random", u)
        found = rows.map_pixels(0, (32, 32), "random", u)
        box = rows.boxes(0, (32, 32), "random", u)["bbox"][0] * 32
        red = pixels[..., 0] > 127
        assert (red == (found == 1)).mean() > 0.97, u
        down, across = np.nonzero(red)
        seen = [across.min(), down.min(), np.ptp(across) + 1, np.ptp(down) + 1]
        assert np.abs(box - seen).max() <= 1.5, u


def test_only_random_crops_have_a_drawn_size():
    with pytest.raises(UsageError, match="crop_min"):
        DataSettings(crop_min=0.5)

"""Wrong input: one line, the right code, before step 1 (reliability 23 to 25)."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from golden_cases import shared
from PIL import Image
from tiny import ADAM, AE_NETWORK, QUIET_LOOP, SHAPES, ldm, noisy_images, train_ldm

SMALL = ("--size", 16, "--workers", 1)


@pytest.fixture(scope="module")
def plain_model(tiny_runs) -> Path:
    return tiny_runs["plain"]


@pytest.fixture(scope="module")
def class_model(tiny_runs) -> Path:
    return tiny_runs["class"]


def refused(code: int, *args) -> str:
    """The one line of a command that ends with `code`; no traceback, nothing on stdout."""
    ending = ldm(*args)
    assert ending.code == code, ending.stderr
    assert "Traceback" not in ending.stderr and ending.stdout == ""
    assert ending.line.startswith("ldm: ") and not ending.line.startswith("ldm: warning: ")
    return ending.line


def begin(folder: Path, out: Path, *more) -> tuple:
    return ("train-ae", "--data", folder, *SMALL, *AE_NETWORK, *QUIET_LOOP, "--steps", 1, "--out", out, *more)


def no_step(out: Path) -> bool:
    return not (out / "model.safetensors").exists() and not (out / "checkpoints").exists()


# --- reliability 23: damaged files --------------------------------------------------------------------------------


def one_of_each(folder: Path) -> dict[str, str]:
    """Files that cannot be used, by name, with a word of the reason; beside them six that can."""
    noisy_images(folder, 6)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for kind in ("jpg", "png"):
        path = folder / f"half.{kind}"
        Image.fromarray(picture).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("this is no picture")
    (folder / "flat.ppm").write_bytes(b"P6\n0 5\n255\n")
    Image.new("1", (15_000, 15_000)).save(folder / "huge.png")
    return {"half.jpg": "", "half.png": "", "empty.jpg": "empty", "text.png": "", "flat.ppm": "", "huge.png": "pixels"}


def test_every_damaged_file_is_named_with_its_reason_before_step_1(tmp_path):
    """Reliability 23: zero bytes, JPEG and PNG cut in half, text named .png, a 0x5 picture, 225 million pixels."""
    bad = one_of_each(tmp_path / "data")
    line = refused(3, *begin(tmp_path / "data", tmp_path / "run"))
    assert "pictures cannot be read" in line and "--skip-bad" in line and no_step(tmp_path / "run")
    found = ldm("data", tmp_path / "data", "--json", "--out", tmp_path / "seen")
    assert found.code == 0, found.stderr
    told = {each["file"]: each["reason"] for each in found.json["bad"]}
    assert told.keys() == bad.keys()
    assert all(reason and bad[name] in reason for name, reason in told.items())


def test_with_skip_bad_the_rest_trains_and_the_report_counts_what_was_left_out(tmp_path):
    """Reliability 23: the run keeps the names."""
    bad = one_of_each(tmp_path / "data")
    ending = ldm(*begin(tmp_path / "data", tmp_path / "run", "--skip-bad"))
    assert ending.code == 0, ending.stderr
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert data["rows"] + data["validation_rows"] == 6
    assert {each.partition(":")[0] for each in data["left_out"]} == bad.keys()


def test_the_pixel_limit_is_a_number_that_can_be_set(tmp_path):
    """Reliability 23: 100 million by default; a smaller one refuses more, a larger one less."""
    noisy_images(tmp_path / "data", 4)
    Image.new("1", (10_000, 10_001)).save(tmp_path / "data" / "large.png")
    assert "large.png" in refused(3, *begin(tmp_path / "data", tmp_path / "a"))
    line = refused(3, *begin(tmp_path / "data", tmp_path / "b", "--set", "data.max_pixels=300"))
    assert "pictures cannot be read" in line
    refused(2, *begin(tmp_path / "data", tmp_path / "c", "--set", "data.max_pixels=off"))


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    """Reliability 23: no read permission. Root may read everything, so it gets the file system's answer from here."""
    noisy_images(tmp_path / "data", 4)[0].chmod(0)
    whole = Path.read_bytes

    def read_bytes(path):
        if not path.stat().st_mode & 0o400:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    line = refused(3, *begin(tmp_path / "data", tmp_path / "run"))
    assert "00.png" in line and "Permission denied" in line


def test_the_broken_folder_is_refused_by_name_and_trains_with_skip_bad(tmp_path):
    """Reliability 23, 24: 77 damaged and unusual files: those that can be read are read, the others named."""
    folder = shared("broken")
    assert "pictures cannot be read" in refused(3, *begin(folder, tmp_path / "a"))
    ending = ldm(*begin(folder, tmp_path / "b", "--skip-bad"))
    assert ending.code == 0, ending.stderr
    left_out = " ".join(json.loads((tmp_path / "b" / "run.json").read_text())["data"]["left_out"])
    rows = [line.split("\t") for line in (folder / "EXPECTED.tsv").read_text().splitlines()[1:]]
    listed = [
        (name, verdict)
        for name, verdict, *_ in rows
        if (folder / name).is_file() and name.endswith((".png", ".jpg", ".gif", ".webp", ".tiff"))
    ]
    assert [name for name, verdict in listed if verdict == "no" and f"{name}:" not in left_out] == []
    assert [name for name, verdict in listed if verdict == "yes" and f" {name}:" in f" {left_out}"] == []


# --- reliability 24: unusual pixels -------------------------------------------------------------------------------


def as_trained(folder: Path, image: Image.Image, name: str, size, **how) -> np.ndarray:
    """What a training sees of one picture: the row's pixels at `size` (height, width)."""
    from ldmcli.core.settings import DataSettings
    from ldmcli.data.sources import open_rows

    folder.mkdir()
    image.save(folder / name, **how)
    return open_rows(DataSettings(source=str(folder), size=size)).pixels(0, size, "center", (0.5, 0.5))


def test_unusual_pixels_have_the_documented_values(tmp_path):
    """Reliability 24: 16-bit grey 65535 is 255, transparent red the background, CMYK and 1-bit have their colours."""
    ramp = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    seen = as_trained(tmp_path / "ramp", ramp, "a.png", (16, 16))
    assert seen[0, 0].tolist() == [0, 0, 0] and seen[-1, -1].tolist() == [255] * 3 and len(np.unique(seen)) > 200
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (as_trained(tmp_path / "clear", clear, "a.png", (8, 8)) == 255).all()
    assert (as_trained(tmp_path / "la", Image.new("LA", (8, 8), (0, 0)), "a.png", (8, 8)) == 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (as_trained(tmp_path / "p", palette, "a.png", (8, 8), transparency=1) == 255).all()
    assert (as_trained(tmp_path / "one", Image.new("1", (8, 8), 1), "a.png", (8, 8)) == 255).all()
    cyan = as_trained(tmp_path / "cmyk", Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "a.jpg", (8, 8))[0, 0]
    assert cyan[0] < 40 and cyan[1] > 150 and cyan[2] > 200


def test_exif_turns_a_40x20_picture_and_a_float_picture_is_refused(tmp_path):
    """Reliability 24: orientation 6: 40 wide, 20 high becomes 20 wide, 40 high; float pixels have no range."""
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (40, 20), "white")
    wide.paste((255, 0, 0), (0, 0, 10, 20))  # the left end: after a quarter turn to the right, the upper end
    seen = as_trained(tmp_path / "exif", wide, "a.png", (40, 20), exif=exif)
    assert seen.shape == (40, 20, 3) and seen[0, 10].tolist() == [255, 0, 0] and seen[-1, 10].tolist() == [255] * 3
    noisy_images(tmp_path / "data", 3)
    Image.new("F", (20, 20), 0.5).save(tmp_path / "data" / "f.tiff")
    assert "f.tiff" in refused(3, *begin(tmp_path / "data", tmp_path / "run"))


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    """Reliability 24: a GIF of two frames."""
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    seen = as_trained(tmp_path / "gif", red, "a.gif", (8, 8), save_all=True, append_images=[blue])
    assert seen[4, 4, 0] > 240 and seen[4, 4, 2] < 15


def test_training_and_evaluation_see_the_same_pixels(tmp_path):
    """Reliability 24: a picture that EXIF turns goes through `ldm reconstruct` the way that training sees it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8))
    trained = as_trained(tmp_path / "data", image, "a.png", (32, 16), exif=exif)
    from ldmcli.data.decode import decode

    assert np.array_equal(trained, np.asarray(decode(tmp_path / "data" / "a.png")))


# --- reliability 25: captions, classes, partners ------------------------------------------------------------------


def captioned(folder: Path, content: bytes, count: int = 4) -> Path:
    noisy_images(folder, count)
    (folder / "metadata.csv").write_bytes(content)
    return folder


def csv(*captions: str) -> bytes:
    return ("file_name,caption\n" + "".join(f"{k:02d}.png,{text}\n" for k, text in enumerate(captions))).encode()


def test_captions_na_null_and_empty_stay_text_behind_a_bom(tmp_path, ae):
    """Reliability 25: a text model trains on them; the preview request holds them as they stand."""
    folder = captioned(tmp_path / "data", b"\xef\xbb\xbf" + csv("NA", "null", "", "None"))
    train_ldm(tmp_path / "run", ae, "--condition", "text", data=("--data", folder, "--size", 20), steps=1)
    from ldmcli.core.settings import DataSettings
    from ldmcli.data.sources import open_rows

    settings = DataSettings(source=str(folder))
    found = [
        rows.caption(i)
        for split in ("train", "validation")
        for rows in [open_rows(settings, split=split)]
        for i in range(len(rows))
    ]
    assert sorted(found) == ["", "NA", "None", "null"]
    assert set(json.loads((tmp_path / "run" / "stats.json").read_text())["preview"]["prompt"]) <= set(found)


def test_a_caption_of_ten_megabytes_trains(tmp_path, ae):
    """Reliability 25: it is cut to the text length, not refused and not loaded into a message."""
    folder = captioned(tmp_path / "data", csv("a " * 5_000_000, "b", "c", "d"))
    ending = train_ldm(tmp_path / "run", ae, "--condition", "text", data=("--data", folder, "--size", 20), steps=1)
    assert len(ending.stderr) < 5000


def test_latin_1_is_refused_with_file_and_byte(tmp_path):
    """Reliability 25: undecodable text: file and position."""
    folder = captioned(tmp_path / "data", "file_name,caption\n00.png,caf\xe9\n".encode("latin-1"), 1)
    line = refused(3, *begin(folder, tmp_path / "run"))
    assert "metadata.csv" in line and "byte 28" in line


def test_a_picture_without_a_row_and_a_row_without_a_picture_are_both_listed(tmp_path):
    """Reliability 25: code 3 with both lists; with --skip-bad both are left out and the rest trains."""
    folder = captioned(tmp_path / "data", csv("a", "b", "c", "d") + b"gone.png,e\n", 5)
    line = refused(3, *begin(folder, tmp_path / "a"))
    assert "gone.png" in line and "04.png" in line and no_step(tmp_path / "a")
    ending = ldm(*begin(folder, tmp_path / "b", "--skip-bad"))
    assert ending.code == 0, ending.stderr
    data = json.loads((tmp_path / "b" / "run.json").read_text())["data"]
    assert data["rows"] + data["validation_rows"] == 4


def test_numeric_class_folders_keep_their_order_and_are_stored_with_the_model(tmp_path, ae):
    """Reliability 25: folders 7, 12, 100 are classes 0, 1, 2 in the run and in `sample`; file names say no split."""
    for name in ("7", "12", "100"):
        noisy_images(tmp_path / "data" / name, 3)
    (tmp_path / "data" / "7" / "00.png").rename(tmp_path / "data" / "7" / "k_test_shirt.png")
    train_ldm(tmp_path / "run", ae, *ADAM, "--condition", "class", data=("--data", tmp_path / "data", "--size", 20))
    stats = json.loads((tmp_path / "run" / "stats.json").read_text())
    assert stats["conditions"]["class"]["class_names"] == ["7", "12", "100"]
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert data["rows"] + data["validation_rows"] == 9
    ending = ldm("sample", "--model", tmp_path / "run", "--class", "100", "--steps", 2, "--out", tmp_path / "out")
    assert ending.code == 0, ending.stderr


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_its_classes_is_refused_before_step_1(tmp_path, ae, label):
    """Reliability 25: -1 and the number of classes; code 3, naming the row."""
    import datasets

    noisy_images(tmp_path / "pictures", 6)
    rows = {"image": [str(path) for path in sorted((tmp_path / "pictures").iterdir())], "label": [0, 1, 2, 0, 1, 2]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table = table.cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train.parquet")
    import pyarrow as pa
    import pyarrow.parquet as pq

    stored = pq.read_table(tmp_path / "data" / "train.parquet")
    position = stored.schema.get_field_index("label")
    spoiled = stored.set_column(position, stored.schema.field("label"), pa.array([0, 1, 2, 0, label, 2], pa.int64()))
    pq.write_table(spoiled.replace_schema_metadata(stored.schema.metadata), tmp_path / "data" / "train.parquet")
    ending = train_ldm(
        tmp_path / "run", ae, "--condition", "class", data=("--data", tmp_path / "data", "--size", 20), code=3
    )
    assert str(label) in ending.line and no_step(tmp_path / "run")


# --- what the contract refuses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--image-column", "--caption-column", "--label-column"])
def test_a_column_that_is_not_there_is_refused_with_those_there_are(tmp_path, option):
    """Reliability 25: missing column: code 3."""
    folder = captioned(tmp_path / "data", csv("a", "b", "c", "d"))
    line = refused(3, *begin(folder, tmp_path / "run", option, "words"))
    assert "words" in line and "caption" in line


def test_an_unknown_preset_comes_with_a_suggestion(tmp_path):
    """Did you mean."""
    line = refused(2, "train-ae", "--preset", "kl-f44", "--out", tmp_path / "run")
    assert "kl-f44" in line and "did you mean kl-f4" in line


def test_f_3_is_refused_with_the_factors_there_are(tmp_path):
    """As an option and as a setting."""
    assert "1, 2, 4, 8, 16, 32" in refused(2, "train-ae", "--f", 3, "--out", tmp_path / "run")
    assert "1, 2, 4, 8, 16, 32" in refused(2, "train-ae", "--set", "autoencoder.f=3", "--out", tmp_path / "run")


@pytest.mark.parametrize("command", ["train-ae", "train-ldm", "data"])
def test_an_empty_folder_is_code_3(tmp_path, ae, command):
    """Whatever wants pictures says that there are none."""
    (tmp_path / "data").mkdir()
    args = {"train-ae": ("--data",), "train-ldm": ("--autoencoder", ae, "--size", 16, "--data"), "data": ()}[command]
    line = refused(3, command, *args, tmp_path / "data", "--out", tmp_path / "run")
    assert "no pictures in this folder" in line


def test_a_folder_that_is_not_there_is_code_3(tmp_path):
    """Code 3 with the path."""
    assert "absent" in refused(3, "train-ae", "--data", tmp_path / "absent", "--out", tmp_path / "run")


@pytest.mark.parametrize("kind, option", [("text", "--caption-column"), ("class", "--label-column")])
def test_a_set_without_captions_or_classes_for_a_model_of_them_is_code_3(tmp_path, ae, kind, option):
    """The line says which option names a column, and that `none` needs none."""
    noisy_images(tmp_path / "data", 4)
    data = ("--data", tmp_path / "data", "--size", 20)
    ending = train_ldm(tmp_path / "run", ae, "--condition", kind, data=data, code=3)
    assert option in ending.line and "--condition none" in ending.line and no_step(tmp_path / "run")


def test_an_unknown_condition_is_code_2(tmp_path, ae):
    """The line lists those there are."""
    ending = train_ldm(tmp_path / "run", ae, "--condition", "smell", code=2)
    assert "smell" in ending.line and "text" in ending.line


def test_a_prompt_for_a_model_that_takes_none_is_code_2(plain_model, class_model, tmp_path):
    """It says what the model takes."""
    line = refused(2, "sample", "--model", plain_model, "--prompt", "a cat", "--out", tmp_path / "out")
    assert "trained without text" in line and "no condition" in line
    line = refused(2, "sample", "--model", class_model, "--prompt", "a cat", "--out", tmp_path / "out")
    assert "it takes --class" in line
    line = refused(2, "sample", "--model", plain_model, "--negative-prompt", "a cat", "--out", tmp_path / "out")
    assert "takes no prompt" in line
    assert not (tmp_path / "out").exists()


def test_an_unknown_class_is_code_2_with_a_suggestion(class_model, tmp_path):
    """Names near it, or how many there are; numbers past the end, too."""
    line = refused(2, "sample", "--model", class_model, "--class", "sqare", "--out", tmp_path / "out")
    assert "sqare" in line and "square" in line
    assert "99" in refused(2, "sample", "--model", class_model, "--class", 99, "--out", tmp_path / "out")
    assert "-1" in refused(2, "sample", "--model", class_model, "--class", "-1", "--out", tmp_path / "out")


def test_more_steps_than_timesteps_are_code_2(plain_model, tmp_path):
    """steps > T."""
    assert "1000" in refused(2, "sample", "--model", plain_model, "--steps", 1001, "--out", tmp_path / "out")


def test_a_model_that_is_not_there_or_of_the_other_kind_is_refused(ae, plain_model, tmp_path):
    """Code 4 for what is missing, code 2 for an autoencoder where a diffusion model is wanted."""
    assert "no such run folder" in refused(4, "sample", "--model", tmp_path / "absent", "--out", tmp_path / "out")
    assert "autoencoder" in refused(2, "sample", "--model", ae, "--out", tmp_path / "out")


def test_an_init_image_that_is_no_picture_is_code_3(plain_model, tmp_path):
    """Named with its reason."""
    (tmp_path / "text.png").write_text("no picture")
    line = refused(
        3, "sample", "--model", plain_model, "-n", 1, "--init-image", tmp_path / "text.png", "--out", tmp_path / "out"
    )
    assert "text.png" in line


@pytest.mark.parametrize("size, near", [("18x18", "16x16"), ("21x40", "20x40")])
def test_a_size_that_the_factor_does_not_divide_is_code_2_with_the_nearest(tmp_path, size, near):
    """`train-ae` at f = 4."""
    asked = (*SHAPES, "--size", size, *AE_NETWORK, *QUIET_LOOP, "--steps", 1)
    line = refused(2, "train-ae", *asked, "--out", tmp_path / "run")
    assert near in line


def test_a_picture_below_one_latent_is_named_before_any_other_is_reconstructed(tmp_path, ae):
    """Also where it is the last of several; with --size it is enlarged."""
    noisy_images(tmp_path / "data", 3)
    Image.new("RGB", (20, 1)).save(tmp_path / "data" / "z.png")
    command = ("reconstruct", tmp_path / "data", "--autoencoder", ae, "--out", tmp_path / "out")
    line = refused(3, *command)
    assert "1 of 4 pictures are smaller than one latent (4 px)" in line and "z.png" in line
    assert not (tmp_path / "out").exists()
    assert ldm(*command, "--size", 16).code == 0


def test_captions_that_the_model_cuts_are_counted_in_training(tmp_path, ae):
    """With the number of tokens that it reads."""
    noisy_images(tmp_path / "data", 6)
    for k in range(6):
        (tmp_path / "data" / f"{k:02d}.txt").write_text("one two three four five six seven eight " * (1 + k % 2))
    options = ("--condition", "text", "--set", "condition.text_length=12", "--set", "data.val_fraction=0.01")
    ending = train_ldm(tmp_path / "run", ae, *options, data=("--data", tmp_path / "data", "--size", 20), steps=1)
    cut = next(line for line in ending.stderr.splitlines() if "captions have more than" in line)
    assert cut.startswith("data: ") and "of 5 captions have more than the 12 tokens" in cut
    assert cut.split()[1] in ("2", "3")  # one of the six is held out


def test_what_is_passed_over_is_said_by_training_too(tmp_path):
    """The notes of `ldm data`, before step 1."""
    noisy_images(tmp_path / "data", 4)
    (tmp_path / "data" / "photo.heic").write_bytes(b"x")
    ending = ldm(*begin(tmp_path / "data", tmp_path / "run"))
    assert ending.code == 0 and "data: 1 files of formats that are not read passed over: 1 .heic" in ending.stderr

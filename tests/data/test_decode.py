"""Every kind of picture becomes upright opaque 8-bit RGB with known pixel values, or a one-line refusal."""

import os
import struct
import tarfile
import threading
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from golden_cases import shared
from PIL import Image, ImageFile, TiffImagePlugin

from ldmcli.core.errors import InputError, UsageError
from ldmcli.data.decode import BadImage, decode, probe, sanitise, scaled_size, to_size

BROKEN = shared("broken")


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def array(data, **options) -> np.ndarray:
    return np.asarray(decode(data, **options))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def expected_cases() -> list[tuple[str, str]]:
    lines = (BROKEN / "EXPECTED.tsv").read_text("utf-8").splitlines()[1:]
    return [tuple(line.split("\t")[:2]) for line in lines if not line.startswith("odd_names.tar:")]


@pytest.mark.parametrize("name, readable", expected_cases())
def test_each_broken_file_is_read_or_refused_as_stated(name, readable):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image = decode(BROKEN / name, name=name)
        except BadImage as refusal:
            assert readable in ("no", "either")
            assert name.rstrip("/") in str(refusal) and "\n" not in str(refusal)
        else:
            assert readable in ("yes", "either")
            assert image.mode == "RGB" and min(image.size) >= 1


def test_files_with_odd_names_are_read_and_their_names_can_be_shown(tmp_path):
    with tarfile.open(BROKEN / "odd_names.tar") as tar:
        tar.extractall(tmp_path, filter="fully_trusted")  # a dangling link is among them
    folder = os.fsencode(tmp_path / "odd_names")
    outcomes = {}
    for raw in os.listdir(folder):
        path = Path(os.fsdecode(os.path.join(folder, raw)))
        if path.is_dir():
            continue
        try:
            outcomes[raw] = decode(path).size
        except BadImage as refusal:
            str(refusal).encode("utf-8")  # no lone surrogates: it can be printed
            outcomes[raw] = None
    refused = {raw for raw, size in outcomes.items() if size is None}
    assert refused == {b"dangling_link.png", b"._resource_fork.png"}
    assert len(outcomes) == 8


def test_the_eight_orientations_are_one_picture():
    first = array(BROKEN / "exif_orientation_1.jpg").astype(int)
    for k in range(2, 9):
        turned = array(BROKEN / f"exif_orientation_{k}.jpg").astype(int)
        assert turned.shape == first.shape and np.abs(turned - first).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_6_turns_a_40x20_picture_into_20x40(kind):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = array(encoded(image, kind, exif=exif))
    assert turned.shape == (40, 20, 3)
    assert turned[5, 10, 1] < 60 and turned[35, 10, 1] > 200  # what was left is on top
    assert probe(encoded(image, kind, exif=exif)) == (40, 20)


def test_16_bit_grey_is_scaled_by_257():
    values = np.array([[0, 128, 129, 257], [32896, 65279, 65406, 65535]], np.uint16)
    found = array(encoded(Image.fromarray(values)))
    assert found[..., 0].tolist() == [[0, 0, 1, 1], [128, 254, 254, 255]]
    assert (found[..., 0] == found[..., 2]).all()


def test_transparency_is_laid_over_the_background():
    red = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    red.putpixel((1, 0), (255, 0, 0, 128))
    assert array(encoded(red)).tolist() == [[[255, 255, 255], [255, 127, 127]]]
    assert array(encoded(red), background="#000010")[0, 0].tolist() == [0, 0, 16]


def test_grey_with_alpha_is_laid_over_the_background():
    image = Image.fromarray(np.array([[[10, 0], [10, 255]]], np.uint8), "LA")
    assert array(encoded(image), background="navy").tolist() == [[[0, 0, 128], [10, 10, 10]]]


def test_a_transparent_palette_entry_shows_the_background():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 255, 0, 200, 0])
    image.putpixel((1, 0), 1)
    assert array(encoded(image, transparency=0)).tolist() == [[[255, 255, 255], [0, 200, 0]]]


def test_a_transparent_colour_of_an_rgb_png_shows_the_background():
    image = Image.new("RGB", (2, 1), (255, 0, 255))
    image.putpixel((1, 0), (1, 2, 3))
    assert array(encoded(image, transparency=(255, 0, 255))).tolist() == [[[255, 255, 255], [1, 2, 3]]]


def test_transparency_survives_the_turn_that_exif_asks_for():
    image = Image.new("RGB", (2, 1), (255, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 3
    assert (array(encoded(image, transparency=(255, 0, 255), exif=exif)) == 255).all()


def test_one_bit_and_cmyk_pictures_have_their_colours():
    assert array(encoded(Image.new("1", (1, 1), 1)))[0, 0].tolist() == [255, 255, 255]
    assert array(encoded(Image.new("1", (1, 1), 0)))[0, 0].tolist() == [0, 0, 0]
    cyan = array(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100))[4, 4]
    assert cyan[0] < 5 and cyan[1] > 250 and cyan[2] > 250


def test_lab_white_is_white():
    lab = Image.fromarray(np.full((4, 4, 3), (255, 0, 0), np.uint8), "LAB")
    assert array(encoded(lab, "TIFF"))[0, 0].min() >= 250


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert array(data)[0, 0].tolist() == [255, 0, 0]


def test_a_colour_profile_changes_no_pixel():
    image = picture(6, 6)
    srgb = (
        pytest.importorskip("PIL.ImageCms")
        .ImageCmsProfile(pytest.importorskip("PIL.ImageCms").createProfile("sRGB"))
        .tobytes()
    )
    for profile in (srgb, b"nonsense"):
        assert (array(encoded(image, icc_profile=profile)) == np.asarray(image)).all()


def test_float_and_32_bit_integer_pixels_are_refused():
    for values in (np.zeros((2, 2), np.float32), np.full((2, 2), 70_000, np.int32)):
        with pytest.raises(BadImage, match="without a stated range"):
            decode(encoded(Image.fromarray(values), "TIFF"), name="x.tiff")


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def test_a_header_that_claims_too_many_pixels_is_refused_by_its_size():
    data = png_header(100_000, 100_000) + struct.pack(">I", 64) + b"IDAT" + b"\0" * 68
    for call in (decode, probe):
        with pytest.raises(BadImage, match="100000x100000 pixels, over the limit of 89,478,485"):
            call(data, name="bomb.png")


def test_an_extended_webp_is_refused_by_its_canvas():
    chunk = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + (16382).to_bytes(3, "little") * 2
    data = b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk
    with pytest.raises(BadImage, match="16383x16383"):
        decode(data)


def test_the_limit_on_pixels_is_the_callers_and_not_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    data = encoded(picture(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data).size == (8, 8)
    with pytest.raises(BadImage, match="over the limit of 63"):
        decode(data, max_pixels=63)
    assert Image.MAX_IMAGE_PIXELS == 10 and ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_cut_in_half_is_refused(kind):
    data = encoded(picture(40, 40), kind)
    assert decode(data).size == (40, 40)
    with pytest.raises(BadImage, match="half: damaged"):
        decode(data[: len(data) // 2], name="half")


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "an empty file"),
        (b"hello there", "text"),
        (b"  <!DOCTYPE html><p>404", "an HTML page"),
        (bytes(range(1, 200)), "unknown first bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "text"),
    ],
)
def test_what_is_no_picture_is_told_apart(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data, name="x.png")


def test_missing_files_and_folders_are_refused_by_name(tmp_path):
    with pytest.raises(BadImage, match="gone.png: cannot be read"):
        decode(tmp_path / "gone.png")
    with pytest.raises(BadImage, match="a folder, not a picture"):
        decode(tmp_path, name="dir.png")


def test_a_refusal_shows_no_control_characters_and_stays_on_one_line():
    refusal = BadImage("a\x1b]52;c;x\x07\n\u202eb.png", "why\x9b\nnot")
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or c == "\u202e" for c in str(refusal))
    assert sanitise("latin1_\udce9.png") == "latin1_\\xe9.png"
    assert isinstance(refusal, InputError)


def test_an_unknown_background_is_a_usage_error():
    with pytest.raises(UsageError, match="'nocolour'"):
        decode(encoded(picture(2, 2)), background="nocolour")


def test_threads_decode_the_same_pixels():
    data = [encoded(picture(30, 30, seed), "JPEG") for seed in range(8)]
    single = [array(one).tobytes() for one in data]
    results: dict[int, bytes] = {}
    threads = [threading.Thread(target=lambda k=k: results.update({k: array(data[k]).tobytes()})) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[k] for k in range(8)] == single


def test_broken_exif_is_ignored():
    image = picture(4, 6)
    data = encoded(image, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert (array(data) == np.asarray(image)).all()
    assert TiffImagePlugin.READ_LIBTIFF is False


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_a_picture_of_the_right_size_is_not_touched():
    image = picture(12, 12)
    assert (to_size(image, (12, 12)) == np.asarray(image)).all()


def test_the_crop_of_a_resized_picture_is_part_of_the_resized_whole():
    image = picture(40, 100)
    whole = to_size(image, (20, 50)).astype(int)
    assert scaled_size((40, 100), (20, 20)) == (20, 50)
    for share, left in ((0.0, 0), (0.4, 12), (1.0, 30)):
        part = to_size(image, (20, 20), "random", u=(0.5, share)).astype(int)
        assert np.abs(part - whole[:, left : left + 20]).max() <= 1
    assert np.abs(to_size(image, (20, 20)).astype(int) - whole[:, 15:35]).max() <= 1


def test_shrinking_is_antialiased():
    checker = Image.fromarray(((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)).convert("RGB")
    assert np.abs(to_size(checker, (8, 8)).astype(int) - 128).max() < 8


def test_a_small_picture_is_enlarged_and_an_extreme_one_is_cut():
    assert to_size(picture(1, 1), (16, 16)).shape == (16, 16, 3)
    assert to_size(picture(1, 4000), (64, 64)).shape == (64, 64, 3)
    assert to_size(picture(7, 3), (10, 32), "random", u=(1.0, 1.0)).shape == (10, 32, 3)


def test_center_ignores_u():
    image = picture(10, 30)
    assert (to_size(image, (10, 10), "center", u=(0, 0)) == to_size(image, (10, 10), "random", u=(0.5, 0.5))).all()


def test_a_zoomed_crop_is_cut_from_a_larger_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(pixels)
    assert (to_size(image, (32, 32), "random", u=(0.0, 1.0, 2.0)) == pixels[:32, 32:]).all()  # its own pixels
    assert scaled_size((40, 100), (20, 20), 2) == (40, 100)
    whole, part = to_size(image, (32, 32)), to_size(image, (32, 32), "center", u=(0.0, 1.0, 2.0))
    assert (whole == part).all()  # the middle knows no zoom

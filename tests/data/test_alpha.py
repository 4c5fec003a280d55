"""Pictures and masks as people bring them to `inpaint`, `upscale` and `reconstruct`: transparency is kept or its loss
is said, holes told by it are understood or refused, and all forms of one picture are one picture."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import ldmcli
from ldmcli.conditions.masked import hole_in, transparent_hole
from ldmcli.core.errors import InputError, UsageError
from ldmcli.data.decode import decode_alpha

FAST = ("--steps", 2, "--json")
SIZE = (24, 28)  # height, width


@pytest.fixture(scope="module")
def models(tiny_runs) -> dict[str, Path]:
    return {name: tiny_runs[name] for name in ("kl", "inpaint", "sr")}


def colours(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def sprite() -> np.ndarray:
    """An alpha channel: opaque on the right, half on the left, nothing below."""
    alpha = np.full(SIZE, 255, np.uint8)
    alpha[:, :8], alpha[18:] = 128, 0
    return alpha


def area(y: int, x: int, h: int, w: int) -> np.ndarray:
    hole = np.zeros(SIZE, bool)
    hole[y : y + h, x : x + w] = True
    return hole


def save(array, path: Path, **how) -> Path:
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **how)
    return path


def run(*words, code: int = 0):
    ending = tiny.ldm(*words)
    assert ending.code == code, ending.stderr
    return ending if code else (np.asarray(Image.open(ending.json["images"][0])), ending)


# --- kept ---------------------------------------------------------------------------------------------------------


def test_inpainting_keeps_colours_and_alpha_of_all_that_is_known(models, tmp_path):
    photo = np.dstack([colours(), sprite()])
    mask = area(4, 10, 8, 10)  # where all is opaque
    files = save(photo, tmp_path / "photo.png"), save(mask, tmp_path / "mask.png")
    made, ending = run("inpaint", *files, "--model", models["inpaint"], *FAST, "--out", tmp_path / "out")
    assert made.shape == (*SIZE, 4) and (made[~mask] == photo[~mask]).all() and (made[mask][:, 3] == 255).all()
    assert (made[mask][:, :3] != photo[mask][:, :3]).any() and "transparen" not in ending.stderr


def test_a_hole_is_as_opaque_as_what_lies_around_it(models, tmp_path):
    alpha = np.full(SIZE, 200, np.uint8)
    alpha[6:10, 6:10] = 0
    files = (
        save(np.dstack([colours(), alpha]), tmp_path / "photo.webp", lossless=True),
        save(area(5, 5, 6, 6), tmp_path / "mask.png"),
    )
    made, _ = run("inpaint", *files, "--model", models["inpaint"], *FAST, "--out", tmp_path / "out")
    assert (made[..., 3] == 200).all()


def test_upscaling_keeps_alpha_and_does_not_see_colours_that_nobody_sees(models, tmp_path):
    alpha, first = sprite(), colours()
    second = np.where(alpha[..., None] > 0, first, colours(5))
    made = []
    for k, picture in enumerate((first, second)):
        file = save(np.dstack([picture, alpha]), tmp_path / f"{k}.png")
        made.append(run("upscale", file, "--scale", 2, "--model", models["sr"], *FAST, "--out", tmp_path / f"{k}")[0])
    assert made[0].shape == (2 * SIZE[0], 2 * SIZE[1], 4) and (made[0] == made[1]).all()
    shrunk = made[0][..., 3].reshape(SIZE[0], 2, SIZE[1], 2).mean((1, 3))
    assert np.abs(shrunk - alpha).mean() < 4 and (made[0][:30, 20:, 3] == 255).all() and (made[0][40:, :, 3] == 0).all()


@pytest.mark.parametrize("command", ["inpaint", "upscale"])
def test_a_format_without_alpha_says_that_it_is_lost(command, models, tmp_path):
    photo = save(np.dstack([colours(), sprite()]), tmp_path / "photo.png")
    words = ("--box", "10,4,8,8") if command == "inpaint" else ("--scale", 2)
    model = models["inpaint" if command == "inpaint" else "sr"]
    made, ending = run(command, photo, *words, "--model", model, *FAST, "--format", "jpg", "--out", tmp_path / "out")
    assert made.shape[-1] == 3 and "ldm: warning: --format jpg: transparency is lost" in ending.stderr
    assert (made[-4:] > 240).all()  # white


def test_reconstruct_and_python_say_that_it_is_lost(models, tmp_path, capsys):
    photo = save(np.dstack([colours(), sprite()]), tmp_path / "photo.png")
    ending = tiny.ldm("reconstruct", photo, "--autoencoder", models["kl"], "--out", tmp_path / "out")
    assert ending.code == 0 and "warning: " in ending.stderr and "transparency is lost" in ending.stderr
    plain = save(colours(), tmp_path / "plain.png")
    ending = tiny.ldm("reconstruct", plain, "--autoencoder", models["kl"], "--out", tmp_path / "b")
    assert ending.code == 0 and "transparen" not in ending.stderr
    capsys.readouterr()
    ldmcli.load(models["sr"]).upscale(Image.open(photo), steps=1)
    assert "transparency is lost" in capsys.readouterr().err


# --- one picture in every form ------------------------------------------------------------------------------------


def forms(folder: Path) -> dict[str, tuple[Path, np.ndarray, np.ndarray | None]]:
    """File, the colours and the alpha channel that it means."""
    rgb, alpha, grey = colours(), sprite(), colours()[..., 0]
    table = Image.fromarray(rgb).quantize(16, dither=Image.Dither.NONE)
    flat = np.asarray(table.convert("RGB"))
    index = np.asarray(table)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(np.dstack([rgb, alpha])).transpose(Image.Transpose.ROTATE_90)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    premultiplied = Image.fromarray(np.dstack([rgb, np.full(SIZE, 255, np.uint8)]))
    return {
        "LA": (save(np.dstack([grey, alpha]), folder / "la.png"), np.dstack([grey] * 3), alpha),
        "a palette": (save(table, folder / "p.png"), flat, None),
        "a palette with a transparent colour": (
            save(table, folder / "pt.png", transparency=3),
            flat,
            np.where(index == 3, 0, 255).astype(np.uint8),
        ),
        "a palette of alphas": (
            save(table, folder / "pa.png", transparency=bytes(range(0, 160, 10))),
            flat,
            (index * 10).astype(np.uint8),
        ),
        "a transparent colour": (
            save(Image.fromarray(rgb), folder / "tc.png", transparency=tuple(map(int, rgb[0, 0]))),
            rgb,
            np.where((rgb == rgb[0, 0]).all(-1), 0, 255).astype(np.uint8),
        ),
        "16 bit": (save(deep, folder / "deep.png"), np.dstack([grey] * 3), None),
        "turned by EXIF": (save(turned, folder / "turned.png", exif=exif), rgb, alpha),
        "opaque alpha": (save(premultiplied, folder / "opaque.png"), rgb, None),
        "TIFF": (save(np.dstack([rgb, alpha]), folder / "a.tiff"), rgb, alpha),
        "CMYK": (
            save(Image.fromarray(rgb).convert("CMYK"), folder / "c.tif"),
            np.asarray(Image.fromarray(rgb).convert("CMYK").convert("RGB")),
            None,
        ),
    }


def test_every_form_of_a_picture_goes_the_same_way(models, tmp_path):
    hole = area(3, 12, 6, 6)
    mask = save(hole, tmp_path / "hole.bmp")
    for name, (file, rgb, alpha) in forms(tmp_path).items():
        found, transparent = decode_alpha(file)
        assert (found == rgb).all(), name
        assert transparent is None if alpha is None else (transparent == alpha).all(), name
        out = tmp_path / f"{file.name}-out"
        made, _ = run("inpaint", file, mask, "--model", models["inpaint"], *FAST, "--out", out)
        assert (made[~hole][:, :3] == rgb[~hole]).all() and (alpha is None) == (made.shape[-1] == 3), name
        if alpha is not None:
            assert (made[~hole][:, 3] == alpha[~hole]).all(), name


# --- holes told by alpha ------------------------------------------------------------------------------------------


def test_what_is_transparent_in_a_photograph_is_repainted_without_a_mask(models, tmp_path):
    hole, alpha = area(6, 8, 9, 11), np.full(SIZE, 255, np.uint8)
    alpha[hole] = 0
    alpha[6, 8:19] = 130  # the soft rim of an eraser
    photo = np.dstack([colours(), alpha])
    file = save(photo, tmp_path / "photo.png")
    made, ending = run("inpaint", file, "--model", models["inpaint"], *FAST, "--out", tmp_path / "out")
    assert made.shape == (*SIZE, 3) and (made[~hole] == photo[~hole][:, :3]).all()
    assert (made[hole] != photo[hole][:, :3]).any(-1).mean() > 0.5
    save(hole, tmp_path / "mask.png")
    same, _ = run("inpaint", file, tmp_path / "mask.png", "--model", models["inpaint"], *FAST, "--out", tmp_path / "b")
    assert (made == same).all()
    ending = run("inpaint", save(colours(), tmp_path / "opaque.png"), "--model", models["inpaint"], code=2)
    assert "MASK or --box" in ending.line and "opaque.png has no transparent part" in ending.line


def painted(colour, where: np.ndarray, opaque: bool = True) -> np.ndarray:
    """RGBA of one colour, opaque (or transparent) where it says."""
    return np.dstack([np.full((*SIZE, 3), colour, np.uint8), np.where(where == opaque, 255, 0).astype(np.uint8)])


HOLE = area(5, 5, 9, 12)
WHITE, AROUND = HOLE * np.uint8(255), ~HOLE * np.uint8(255)
MASKS = {  # as a picture -> the hole, or what is said
    "bool": (Image.fromarray(HOLE), HOLE),
    "grey, RGB, bytes": (np.dstack([WHITE] * 3), HOLE),
    "16 bit": (Image.fromarray(HOLE.astype(np.uint16) * 65535), HOLE),
    "a palette": (Image.fromarray(HOLE.astype(np.uint8) * 255).convert("P"), HOLE),
    "soft": (np.where(HOLE, 128, 127).astype(np.uint8), HOLE),
    "white paint on nothing": (painted(255, HOLE), HOLE),
    "white and black, opaque alpha": (np.dstack([WHITE] * 3 + [np.full(SIZE, 255, np.uint8)]), HOLE),
    "white paint, a soft brush": (np.dstack([painted(255, HOLE)[..., :3], np.uint8(90) + HOLE * np.uint8(70)]), HOLE),
    "black and white paint on nothing": (np.dstack([WHITE] * 3 + [area(2, 2, 20, 20) * np.uint8(255)]), HOLE),
    "black paint on nothing": (painted(0, HOLE), "in its alpha channel alone"),
    "a hole in black": (painted(0, HOLE, False), "in its alpha channel alone"),
    "a hole in dark red": (painted((90, 0, 0), HOLE, False), "in its alpha channel alone"),
    "a photograph with a hole": (np.dstack([colours(), AROUND]), "give it as the image"),
    "nothing at all": (painted(255, area(0, 0, 0, 0)), "all of it is transparent"),
    "ones for holes": (HOLE.astype(np.uint8), "its values are 0 … 1 of 255"),
    "black": (np.zeros(SIZE, np.uint8), "nothing in it is white"),
}


@pytest.mark.parametrize("what", MASKS)
def test_a_mask_is_understood_or_refused(what, tmp_path):
    picture, wanted = MASKS[what]
    file = save(picture, tmp_path / "mask.png")
    for given in (file, Image.open(file)):
        if isinstance(wanted, str):
            with pytest.raises(InputError, match=wanted):
                hole_in(given, "mask.png")
        else:
            assert (hole_in(given, "mask.png") == wanted).all()


def test_paint_without_black_is_said_to_be_what_is_repainted(tmp_path, capsys):
    hole_in(save(painted(255, HOLE), tmp_path / "painted.png"), "painted.png")
    assert "painted.png: white on transparent: what is painted is repainted, 16% of" in capsys.readouterr().err


def test_a_hole_of_alpha_needs_something_opaque():
    with pytest.raises(InputError, match="nothing would be kept"):
        transparent_hole(np.zeros(SIZE, np.uint8), "x")
    with pytest.raises(UsageError, match="x has no transparent part"):
        transparent_hole(np.full(SIZE, 200, np.uint8), "x")

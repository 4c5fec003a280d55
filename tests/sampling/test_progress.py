"""`ldm sample --progress`: what each step predicts of the first samples, as a sheet or an animation."""

import io
import json

import numpy as np
import pytest
import tiny
from PIL import Image
from tiny import ldm

from ldmcli.data.pictures import find
from ldmcli.sampling.progress import COLUMNS, shown_steps


@pytest.mark.parametrize("count, most, expected", [(1, 10, [0]), (3, 10, [0, 1, 2]), (9, 3, [0, 4, 8]), (5, 1, [4])])
def test_steps_that_are_shown_begin_with_the_first_and_end_with_the_last(count, most, expected):
    assert shown_steps(count, most) == expected


def cells(sheet: Image.Image, side: int, gap: int = 2) -> list[list[np.ndarray]]:
    pixels = np.asarray(sheet.convert("RGB"))
    rows, columns = ((length - gap) // (side + gap) for length in pixels.shape[:2])
    at = [[(gap + y * (side + gap), gap + x * (side + gap)) for x in range(columns)] for y in range(rows)]
    return [[pixels[top : top + side, left : left + side] for top, left in row] for row in at]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "plms", "euler", "heun", "dpm++"])
def test_a_row_ends_with_the_sample_itself(tiny_runs, tmp_path, sampler):
    line = (
        "sample",
        "--model",
        tiny_runs["plain"],
        "-n",
        5,
        "--steps",
        3,
        "--sampler",
        sampler,
        "--out",
        tmp_path / "s",
    )
    ending = ldm(*line, "--progress", "row", "--json")
    assert ending.code == 0, ending.stderr
    found = cells(Image.open(ending.json["progress"]), 20)
    assert len(found) == 4 and len(found[0]) == 3
    for row, sample in zip(found, tiny.pictures(tmp_path / "s")):
        assert np.abs(row[-1].astype(int) - sample).max() <= 1
        assert (row[0] != row[-1]).any()


@pytest.mark.parametrize(
    "kind, options", [("text", ("--prompt", "a red circle")), ("map", ()), ("class", ("--class", "#1"))]
)
def test_many_steps_are_thinned_out_and_pictures_are_as_without(tiny_runs, tmp_path, kind, options):
    if kind == "map":
        Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "map.png")
        options = ("--map", tmp_path / "map.png")
    line = ("sample", "--model", tiny_runs[kind], *options, "-n", 2, "--steps", 24, "--sampler", "ddim")
    assert ldm(*line, "--out", tmp_path / "without").code == 0
    with_row = ldm(*line, "--out", tmp_path / "with", "--progress", "row")
    assert with_row.code == 0, with_row.stderr
    assert len(cells(Image.open(tmp_path / "with" / "progress.png"), 20)[0]) == COLUMNS
    both = [tiny.pictures(tmp_path / name) for name in ("without", "with")]
    assert all(np.array_equal(a, b) for a, b in zip(*both))


def test_an_animation_beside_pictures_that_are_there_already(tiny_runs, tmp_path):
    out = tmp_path / "out"
    line = ("sample", "--model", tiny_runs["plain"], "-n", 2, "--steps", 5, "--size", "24x20", "--out", out)
    assert ldm(*line).code == 0
    before = {path.name: path.read_bytes() for path in out.glob("0*.png")}
    again = ldm(*line, "--progress", "gif", "--json")
    assert again.code == 0 and again.json["drawn"] == 0, again.stderr
    content = (out / "progress.gif").read_bytes()
    with Image.open(io.BytesIO(content)) as animation:
        assert animation.n_frames == 5 and animation.size == (2 * 22 + 2, 24 + 4)
    assert {path.name: path.read_bytes() for path in out.glob("0*.png")} == before
    record = json.loads((out / "request.json").read_text())
    assert "progress.gif" in record["files"]
    assert ldm(*line, "--progress", "gif").code == 0 and (out / "progress.gif").read_bytes() == content
    assert [path.name for path in find(out).pictures] == ["000000.png", "000001.png"], (
        "what shows several is no picture"
    )


def test_a_sheet_of_somebody_else_stays(tiny_runs, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "progress.png")
    ending = ldm("sample", "--model", tiny_runs["plain"], "--steps", 1, "--progress", "row", "--out", tmp_path)
    assert ending.code == 2 and "not written by ldm" in ending.line and not list(tmp_path.glob("0*.png"))


def test_overwrite_replaces_the_sheet_of_an_earlier_request(tiny_runs, tmp_path):
    line = ("sample", "--model", tiny_runs["plain"], "-n", 1, "--progress", "row", "--out", tmp_path / "out")
    assert ldm(*line, "--steps", 1).code == 0
    first = (tmp_path / "out" / "progress.png").read_bytes()
    assert ldm(*line, "--steps", 2).code == 2
    assert ldm(*line, "--steps", 2, "--overwrite").code == 0
    assert (tmp_path / "out" / "progress.png").read_bytes() != first

"""The nearest training pictures: exact whatever the blocks, copies found, and shown where a run is shown."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
from PIL import Image
from tiny import ldm

from ldmcli.core import runs
from ldmcli.evaluation import extractors
from ldmcli.maths.nearest import Nearest
from ldmcli.studies.neighbours import closer_share


@pytest.fixture(scope="module", autouse=True)
def small_extractor():
    """EfficientNet-lite0 on pictures of 32 px."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(extractors.NETWORKS, "effnet-lite0", replace(extractors.NETWORKS["effnet-lite0"], size=32))
        extractors._cached.cache_clear()
        yield
    extractors._cached.cache_clear()


@pytest.mark.parametrize("block", [1, 7, 64, 200])
def test_neighbours_are_those_of_a_whole_table_of_distances(block):
    draw = np.random.default_rng(0)
    rows, queries = draw.normal(size=(200, 5)).astype(np.float32), draw.normal(size=(6, 5)).astype(np.float32)
    rows[150] = rows[20] = queries[0]
    nearest = Nearest(queries, 4)
    for start in range(0, 200, block):
        part = rows[start : start + block]
        nearest.add(np.arange(start, start + len(part)), part)
    table = np.linalg.norm(queries[:, None].astype(float) - rows[None].astype(float), axis=-1)
    order = np.argsort(table, axis=1, kind="stable")[:, :4]
    assert (nearest.numbers == order).all() and nearest.numbers[0, :2].tolist() == [20, 150]
    assert np.allclose(nearest.distances, np.take_along_axis(table, order, 1), atol=1e-6)


def test_fewer_rows_than_neighbours_leave_places_empty():
    nearest = Nearest(np.zeros((1, 2)), 3)
    nearest.add(np.array([4]), np.ones((1, 2)))
    assert nearest.numbers.tolist() == [[4, -1, -1]] and np.isinf(nearest.distances[0, 1:]).all()


def test_the_share_tells_repetition_from_drawing():
    draw = np.random.default_rng(0)
    held_out = draw.gamma(9, size=2000)
    assert 0.03 < closer_share(draw.gamma(9, size=2000), held_out) < 0.08
    assert closer_share(np.zeros(10), held_out) == 1 and closer_share(held_out + 99, held_out) == 0


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """A folder of 30 pictures."""
    folder = tmp_path_factory.mktemp("training")
    tiny.noisy_images(folder, 30)
    return folder


def test_copies_of_training_pictures_are_found(training, tmp_path):
    copies = tmp_path / "samples"
    copies.mkdir()
    names = ["03.png", "11.png", "27.png"]
    for name in names:
        shutil.copy(training / name, copies / name)
    line = ("neighbours", "--images", copies, "--data", training, "--val-fraction", 0.3, "-n", 3, "-k", 2)
    ending = ldm(*line, "--out", tmp_path / "out", "--features", "effnet-lite0", "--json")
    assert ending.code == 0, ending.stderr
    found = ending.json
    trained = {one["name"]: one for each in found["samples"] for one in each}
    held_out = [name for name in names if not any(name in known for known in trained)]
    assert found["n_training"] + found["n_held_out"] == 30 and found["n_held_out"] > 0
    assert found["copies"] == 3 - len(held_out) > 0
    zero = [each[0]["distance"] < 1e-3 for each in found["samples"]]
    assert sum(zero) == found["copies"] and found["closer_than_held_out"] >= found["copies"] / 3
    assert all(each[0]["distance"] <= each[1]["distance"] for each in found["samples"])
    sheet = Image.open(tmp_path / "out" / "neighbours.png")
    assert sheet.size == (3 * 22 + 2, 3 * (20 + 13 + 2) + 2)
    assert found == {"out": str(tmp_path / "out"), "sheet": found["sheet"]} | json.loads(
        (tmp_path / "out" / "neighbours.json").read_text()
    )


@pytest.mark.parametrize("kind", ["plain", "text", "map"])
def test_a_run_shows_what_its_samples_resemble(tiny_runs, tmp_path, kind):
    run = tmp_path / "run"
    shutil.copytree(tiny_runs[kind], run)
    line = ("neighbours", "--model", run, "-n", 2, "-k", 3, "--steps", 1, "--limit", 12, "--features", "effnet-lite0")
    ending = ldm(*line)
    assert ending.code == 0, ending.stderr
    assert "held-out pictures" in ending.stdout and str(run / "neighbours" / "neighbours.png") in ending.stdout
    document = json.loads((run / "neighbours" / "neighbours.json").read_text())
    assert len(document["samples"]) == 2 and len(document["samples"][0]) == 3 and document["n_training"] == 12
    assert document["sampling"]["steps"] == 1 and document["extractor"]["name"] == "effnet-lite0"
    assert "Nearest training pictures" in (run / "report.html").read_text()
    card = (run / "README.md").read_text()
    assert "](neighbours/neighbours.png)" in card and "Nobody has checked whether" not in card
    assert ldm(*line).code == 0, "its own files are replaced"
    assert {"neighbours.png", "neighbours.json"} <= {path.name for path in runs.own_files(run)}


@pytest.mark.parametrize(
    "options, code, words",
    [
        (("--model", "{sr}"), 2, "--images"),
        (("--images", "{training}"), 2, "--data"),
        (("--images", "{training}", "--model", "{sr}", "--data", "{training}"), 2, "exclude each other"),
        (("--images", "{training}", "--data", "{training}", "-k", 40), 3, "-k 40"),
        (("--images", "{training}/none", "--data", "{training}"), 3, "no such folder"),
        (("--images", "{training}", "--data", "{training}", "--features", "vgg19"), 2, "vgg16"),
    ],
)
def test_what_has_no_neighbours_is_said_in_a_line(tiny_runs, training, tmp_path, options, code, words):
    named = {"sr": tiny_runs["sr"], "training": training}
    ending = ldm("neighbours", *(str(one).format(**named) for one in options), "--out", tmp_path / "out")
    assert ending.code == code and words in ending.line
    assert not (tmp_path / "out").exists()


def test_a_file_of_somebody_else_stays(training, tmp_path):
    (tmp_path / "neighbours.json").write_text("{}")
    ending = ldm("neighbours", "--images", training, "--data", training, "--out", tmp_path)
    assert ending.code == 2 and "not written by ldm" in ending.line

"""Does it copy: planted copies are read as many as there are, whatever their form, and nothing else is a copy."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from scipy import ndimage
from tiny import ldm

from ldmcli.core import runs
from ldmcli.core.errors import InputError
from ldmcli.core.settings import AutoencoderConfig, DataSettings, DiffusionConfig, TaskSettings, TrainSettings
from ldmcli.data.rows import evenly_spaced
from ldmcli.evaluation import extractors, novelty
from ldmcli.evaluation.novelty import LEAST_HELD_OUT, Controls, CopyMeter, Reading, controls, planted, read
from ldmcli.evaluation.reference_statistics import open_reference
from ldmcli.reports import copying, run_view
from ldmcli.training import best
from ldmcli.training.best import SMALL_SET

SIZE = (32, 32)


def soft_noise(seed: int) -> np.ndarray:
    """A picture unlike that of any other seed."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(*SIZE, 3)), (2.5, 2.5, 0))
    return np.clip(128 + 60 * noise / noise.std(), 0, 255).astype(np.uint8)


class Rows:
    """Pictures as rows of a data set."""

    source, split, fingerprint = "pictures", "train", "0"

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def pixels(self, i, *where):
        return self.images[i]

    def name(self, i):
        return f"row {i}"


@pytest.fixture(scope="module")
def noisy() -> tuple[CopyMeter, list[np.ndarray]]:
    """Soft noise: a meter by 40 held-out pictures, and 100 pictures that nobody trained on."""
    images = [soft_noise(seed) for seed in range(340)]
    return CopyMeter(Rows(images[:200]), Rows(images[200:240]), SIZE), images[240:]


@pytest.fixture(scope="module")
def shapes() -> tuple[CopyMeter, list[np.ndarray]]:
    """The embedded shapes, where held-out pictures are near to training ones."""
    settings = DataSettings(source="shapes", size=SIZE, limit=400)
    training, held_out = (open_reference(settings, split)[0] for split in ("train", "validation"))
    images = [held_out.pixels(i, SIZE, "center", (0.5, 0.5)) for i in range(200)]
    return CopyMeter(training, Rows(images[:100]), SIZE), images[100:]


@pytest.mark.parametrize("data", ["noisy", "shapes"])
def test_planted_copies_are_read_as_many_as_there_are(data, request):
    meter, novel = request.getfixturevalue(data)
    assert not meter.controls.failure
    copies = [image for images in zip(*planted(meter.training).values()) for image in images]
    copies += [meter.training.at(i) for i in range(20)]
    copied, new = meter.read(copies)[2], meter.read(novel[:100])[2]
    for share in (0, 10, 50):
        found = read(np.concatenate([copied[:share], new[share:]]), meter.distances)
        assert abs(found.share - share / 100) <= 0.05, (share, found)
        assert found.interval[0] <= share / 100 <= found.interval[1]
    assert read(copied, meter.distances).share == 1


@pytest.mark.parametrize("data", ["noisy", "shapes"])
def test_the_row_that_was_copied_is_named_in_whatever_form(data, request):
    meter, _ = request.getfixturevalue(data)
    planted_rows = evenly_spaced(len(meter.training), 8)
    for images in planted(meter.training).values():
        _, rows, distances = meter.read(images)
        assert (distances < meter.limit).all() and rows.tolist() == planted_rows


@pytest.mark.parametrize("sigma", [1, 2, 5])
def test_blurred_pictures_are_no_copies(noisy, sigma):
    meter, novel = noisy
    soft = [ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0)).astype(np.uint8) for image in novel]
    flat = [np.full_like(image, image.mean((0, 1)).astype(np.uint8)) for image in novel[:20]]
    assert meter.read(soft)[0].share <= 0.03 and meter.read(flat)[0].below == 0


def test_held_out_pictures_that_are_training_pictures_do_not_calibrate():
    images = [soft_noise(seed) for seed in range(60)]
    meter = CopyMeter(Rows(images[:30]), Rows([*images[:5], *images[30:]]), SIZE)
    assert (meter.left_out, len(meter.held_out)) == (5, 30) and meter.limit > 0.1
    with pytest.raises(InputError, match=f"19 held-out pictures.*at least {LEAST_HELD_OUT}"):
        CopyMeter(Rows(images[:30]), Rows([*images[:5], *images[30:49]]), SIZE)


def test_where_held_out_pictures_are_as_near_as_copies_nothing_is_read():
    draw = np.random.default_rng(0)
    near = {"as they are": np.zeros(8), "JPEG": draw.random(8)}
    found: Controls = controls(near, draw.random(100))
    assert "planted copies" in found.failure and "JPEG" in found.failure
    assert not controls({"as they are": np.zeros(8)}, draw.random(100) + 0.1).failure
    assert read(np.array([0.0, 1.0]), np.linspace(0.5, 1, 60)).below == 1


def test_memory_does_not_grow_with_training_pictures():
    """Of each training picture no more than its coarse pixels is kept."""
    meter = CopyMeter(
        Rows([soft_noise(k % 50) for k in range(600)]), Rows([soft_noise(k) for k in range(60, 90)]), SIZE
    )
    kept = sum(block.nbytes for block in meter.training._coarse)
    assert kept == 600 * 192 and len(meter.training.hashes) == 50


# --- the command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def small_extractor():
    """EfficientNet-lite0 on pictures of 32 px."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(extractors.NETWORKS, "effnet-lite0", replace(extractors.NETWORKS["effnet-lite0"], size=32))
        extractors._cached.cache_clear()
        yield
    extractors._cached.cache_clear()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """120 pictures to train on, of which a quarter is held out, and 40 samples: 10 copies, 30 new ones."""
    base = tmp_path_factory.mktemp("novelty")
    for name, seeds in (("data", range(120)), ("samples", range(500, 530))):
        (base / name).mkdir()
        for seed in seeds:
            Image.fromarray(soft_noise(seed)).save(base / name / f"{seed:03d}.png")
    settings = DataSettings(source=str(base / "data"), size=SIZE, val_fraction=0.25)
    training = open_reference(settings, "train")[0]
    for k in range(10):
        image = training.pixels(k, SIZE, "center", (0.5, 0.5))
        Image.fromarray(image[:, ::-1] if k % 2 else image).save(base / "samples" / f"a{k}.png")
    return base / "data", base / "samples"


def test_the_command_reads_pictures_in_pixels_and_in_features(folders):
    data, samples = folders
    line = ("eval-fid", "--images", samples, "--data", data, "--val-fraction", 0.25, "--metrics", "novelty")
    ending = ldm(*line, "--features", "effnet-lite0", "--json")
    assert ending.code == 0, ending.stderr
    found = ending.json
    assert found["metrics"]["copied"] == pytest.approx(0.25, abs=0.05)
    low, high = found["estimates"]["copied"]["interval"]
    assert low < 0.25 < high
    assert found["metrics"]["copied_effnet_lite0_features"] == pytest.approx(0.25, abs=0.1)
    document = found["novelty"]
    assert document["exact"] == 5 and document["n"] == 40 and document["n_training"] + document["n_held_out"] == 120
    assert len(document["pairs"]) == 8 and all(pair["copy"] for pair in document["pairs"])
    assert set(document["controls"]["planted"]["found"].values()) == {1.0}
    assert document["controls"]["held_out"]["read"] < 0.1
    shown = ldm(*line, "--features", "effnet-lite0", "--fail-above", "copied=0.1")
    assert shown.code == 8 and "copied training pictures" in shown.stdout


@pytest.mark.parametrize("kind", ["text", "map"])
def test_a_run_keeps_and_shows_its_nearest_pairs(tiny_runs, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(novelty, "HELD_OUT", 24)
    run = tmp_path / "run"
    shutil.copytree(tiny_runs[kind], run)
    line = (
        "eval-fid",
        "--model",
        run,
        "--metrics",
        "novelty",
        "-n",
        3,
        "--steps",
        1,
        "--data",
        "shapes",
        "--limit",
        60,
    )
    ending = ldm(*line, "--features", "effnet-lite0", "--json")
    assert ending.code == 0, ending.stderr
    assert ending.json["novelty"]["below"] in (None, 0, 1, 2, 3) and "copied" in ending.json["metrics"]
    kept = json.loads((run / "novelty.json").read_text())
    assert kept["kind"] == "ldm novelty" and kept["n"] == 3 and kept["sampling"]["steps"] == 1
    assert Image.open(run / "novelty.png").size[0] > 3 * 20
    assert "Does it copy?" in (run / "report.html").read_text()
    assert "](novelty.png)" in (run / "README.md").read_text()
    assert {"novelty.png", "novelty.json"} <= {path.name for path in runs.own_files(run)}


@pytest.mark.parametrize(
    "options, code, words",
    [
        (("--model", "{sr}"), 2, "they are to resemble"),
        (("--images", "{samples}"), 2, "--data"),
        (("--autoencoder", "{kl}"), 2, "needs samples"),
        (("--images", "{samples}", "--data", "{data}", "--val-fraction", "0.1"), 3, "12 held-out pictures"),
    ],
)
def test_what_can_not_be_read_is_said_in_a_line(tiny_runs, folders, options, code, words):
    data, samples = folders
    named = {"sr": tiny_runs["sr"], "kl": tiny_runs["kl"], "data": data, "samples": samples}
    ending = ldm("eval-fid", *(one.format(**named) for one in options), "--metrics", "novelty")
    assert ending.code == code and words in ending.line, ending.stderr


# --- while a model trains --------------------------------------------------------------------------------------

DATA = ("--data", "shapes", "--limit", 60, "--size", "16x16", "--val-fraction", 0.5)
LOOKS = ("--set", "train.eval_samples=10", "--set", "train.eval_steps=1", "--set", "train.eval_novelty=true")
NETWORK = ("--set", "train.eval_features=effnet-lite0")


def test_a_training_logs_the_share_that_copies(ae, tmp_path, monkeypatch):
    monkeypatch.setattr(novelty, "HELD_OUT", 24)
    found = iter([(0.0, 0.0), (1.0, 0.9), (1.0, 0.9)])
    monkeypatch.setattr(novelty, "read", lambda *given: Reading(*_reading(*next(found))))
    monkeypatch.setattr(Controls, "failure", "")
    monkeypatch.setattr(novelty, "controls", lambda *given: Controls({}, 0.5, *[Reading(0, (0, 0.1), 0, 9)] * 2))
    run = tmp_path / "run"
    more = (*LOOKS, *NETWORK, "--eval-every", 2, "--save-every", 1, "--keep", 1, "--set", "train.keep_best=fid")
    ending = tiny.train_ldm(run, ae, *more, data=DATA, steps=6)
    assert "looked through for copies of" in ending.stderr
    lines = [line for line in tiny.log(run) if "val/copied" in line]
    assert [line["val/copied"] for line in lines] == [0, 1, 1]
    assert [line["val/copied_low"] for line in lines] == [0, 0.9, 0.9]
    assert tiny.state(run)["best"]["step"] == 2, "the later ones copy"
    page = (run / "report.html").read_text()
    assert "Copying begins at step 4" in page and "run@best" in page


def _reading(share, low):
    return share, (low, 1.0), 0, 10


@pytest.mark.parametrize(
    "more, code, words",
    [
        (("--set", "train.eval_novelty=true"), 2, "set train.eval_samples"),
        ((*LOOKS, "--val-fraction", "0.1"), 3, "12 held-out pictures"),
        ((*LOOKS, "--set", "data.streaming=true"), 2, "a stream"),
    ],
)
def test_a_training_that_can_not_look_says_so_at_once(ae, folders, tmp_path, more, code, words):
    data = ("--data", folders[0], "--size", "16x16")
    ending = tiny.train_ldm(tmp_path / "run", ae, *NETWORK, *more, data=data, steps=1, code=code)
    assert words in ending.line


def run_with(tmp_path: Path, copied: list[tuple[float, float]], distances: list[float], **state) -> run_view.RunView:
    """A run of 300 pictures whose evaluations every 100 steps read these shares and low ends, and distances whose 95 %
    intervals reach 10 to each side."""
    lines = [
        {
            "step": 100 * k,
            "images": 3200 * k,
            "val/fd_x": distance,
            "val/fd_x_low": distance - 10,
            "val/fd_x_high": distance + 10,
            "val/copied": share,
            "val/copied_low": low,
            "val/copied_high": share + 0.05,
            "val/copied_held_out": 0.01,
        }
        for k, ((share, low), distance) in enumerate(zip(copied, distances), 1)
    ]
    state = {"kind": "diffusion", "data": {"rows": 300}, **state}
    return run_view.RunView(tmp_path / "emoji", state, lines, {}, None)


N, C = (0, 0), (0.6, 0.5)  # an evaluation that shows no copies, one that does


@pytest.mark.parametrize(
    "copied, distances, good, best, copies",
    [
        pytest.param([N, N, N, N, C, C], [90, 70, 60, 55, 40, 20], 300, 400, 500, id="falls, then copies"),
        pytest.param([N, N, N, N], [90, 70, 50, 30], 400, 400, None, id="falls to the end"),
        pytest.param([N, N, N, N], [55, 52, 50, 51], 100, 300, None, id="good at once, never copies"),
        pytest.param([N, N, N, N, N], [90, 55, 75, 56, 50], 400, 500, None, id="noisy: one lucky early"),
        pytest.param([N, C, N, N, C], [90, 20, 58, 50, 10], 200, 400, 500, id="noisy: one reading of copies"),
        pytest.param([C, C, C], [50, 30, 10], None, None, 100, id="copies at once"),
        pytest.param([N, N, N, N], [50, 60, 80, 90], 100, 100, None, id="only gets worse"),
        pytest.param([N, C], [50, 30], 100, 100, 200, id="two evaluations"),
        pytest.param([N], [50], 100, 100, None, id="one evaluation"),
        pytest.param([], [], None, None, None, id="none"),
    ],
)
def test_the_window_lies_between_good_and_memorised(tmp_path, copied, distances, good, best, copies):
    run = run_with(tmp_path, copied, distances)
    seen = copying.window(copying.evaluations(run))
    assert [one and one.step for one in (seen.good, seen.best, seen.copies)] == [good, best, copies]
    text = copying.curve_text(run)
    assert (f"Good from step {good} " in text) == (good is not None)
    assert (f"is steps {good} to {copies}." in text) == (None not in (good, copies))
    assert ("open at the end" in text) == (good is not None and copies is None)
    assert ("Copying begins" in text) == (copies is not None)
    assert ("evaluation" in text and "only: train.evaluations" in text) == (0 < len(copied) < 4)
    assert (f"Use the checkpoint of step {best} " in text) == (best is not None)


def test_distances_without_intervals_have_no_window(tmp_path):
    run = run_with(tmp_path, [N, N], [90, 80])
    for line in run.log:
        del line["val/fd_x_high"]
    assert copying.window(copying.evaluations(run)).good is None
    assert "Good from" not in copying.curve_text(run) and "Use the checkpoint of step 200" in copying.curve_text(run)


def test_a_run_on_few_pictures_that_nobody_looked_through_says_so(tmp_path):
    view = replace(run_with(tmp_path, [N], [50]), config=DiffusionConfig())
    text = copying.unwatched_text(replace(view, log=[{"step": 100, "images": 3200}]))
    assert "Trained on 300 pictures, each seen 10.7 times" in text and "emoji --metrics novelty" in text
    assert copying.unwatched_text(replace(view, log=[{"step": 90, "images": 2880}])) == "", "seen less than ten times"
    many = replace(view, log=[], state=view.state | {"data": {"rows": SMALL_SET}})
    enlarging = replace(view, log=[], config=DiffusionConfig(task=TaskSettings(name="sr")))
    assert [copying.unwatched_text(one) for one in (view, many, enlarging)] == ["", "", ""]


TRAINS = {"eval_samples": 10, "eval_every": 5}


@pytest.mark.parametrize(
    "rows, train, data, metric, adds",
    [
        (300, {}, {}, "", "--set train.eval_samples=256 --set train.evaluations=10 --set train.eval_novelty=true"),
        (300, TRAINS, {}, "fid", "with --set train.eval_novelty=true"),
        (300, {**TRAINS, "eval_novelty": True}, {}, "fid", ""),
        (300, {**TRAINS, "keep_best": "val_loss"}, {}, "val_loss", "with --set train.eval_novelty=true"),
        (300, {**TRAINS, "keep_best": "none"}, {}, "", "with --set train.eval_novelty=true"),
        (300, {"eval_samples": 10, "eval_every": 0}, {}, "", "`ldm train-ldm` with"),
        (SMALL_SET, TRAINS, {}, "", ""),
        (300, {}, {"limit": 300}, "", ""),
        (300, TRAINS, {"streaming": True}, "", ""),
    ],
)
def test_small_sets_keep_their_best_checkpoint_or_are_told_how(rows, train, data, metric, adds):
    config = DiffusionConfig(train=TrainSettings(**train), data=DataSettings(**data))
    assert best.metric_to_keep(config, rows) == metric
    note = best.small_set_note(config, rows)
    assert adds in note if adds else not note
    assert best.metric_to_keep(AutoencoderConfig(train=TrainSettings(**train)), rows) == train.get(
        "keep_best", ""
    ).replace("none", "")


def test_the_report_says_when_copying_begins_and_which_checkpoint_to_use(tmp_path):
    copied = [(0, 0), (0.1, 0.05), (0.01, 0), (0.02, 0.0), (0.12, 0.06), (0.6, 0.5)]
    run = run_with(tmp_path, copied, [90, 80, 55, 60, 50, 30], best={"step": 300, "metric": "fd_x", "value": 55})
    text = copying.curve_text(run)
    assert "Copying begins at step 500 (epoch 53.3): 12 % of the samples (95 %: 6.0 % to 17 %)" in text
    assert "lasts to the end, where it is 60 %" in text
    assert "Use the checkpoint of step 300 (epoch 32), the best before by Fréchet distance, x (55)" in text
    assert "use it as emoji@best" in text
    assert "better later (30 at step 600), but there 60 % of the samples are copies" in text
    assert copying.section(run).count("<figure") == 1


def test_the_report_of_a_model_that_does_not_copy(tmp_path):
    text = copying.curve_text(run_with(tmp_path, [(0, 0), (0.3, 0.2), (0.01, 0)], [9, 2, 5]))
    assert "No copying that lasts" in text and "step 300" in text
    assert "the best of all" in text and "its checkpoint was not kept" in text and "(5)" in text


def test_the_report_of_a_model_that_copies_from_the_start(tmp_path):
    text = copying.curve_text(run_with(tmp_path, [(0.5, 0.4), (1, 0.9)], [9, 2]))
    assert "Copying begins at step 100" in text and "none is free of copies" in text
    assert copying.curve_text(run_with(tmp_path, [], [])) == copying.section(run_with(tmp_path, [], [])) == ""

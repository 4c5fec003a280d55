"""Super-resolution as the paper measures it: pictures that are large enough, and two references."""

import dataclasses

import pytest
import tiny as commands
from measured import tiny_extractor

from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DataSettings
from ldmcli.data.sources import open_rows
from ldmcli.evaluation import evaluate as module
from ldmcli.evaluation.evaluate import evaluate
from ldmcli.evaluation.protocols import PROTOCOLS
from ldmcli.sampling.load import load


@pytest.fixture(scope="module")
def model(tiny_runs):
    return tiny_runs["sr"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_extractor(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(autouse=True)
def cheap(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "open_extractor", lambda name=None: tiny)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path):
    """6 pictures to train on and 5 to validate on, two of them small."""
    commands.noisy_images(tmp_path / "set" / "train", 6, 24)
    commands.noisy_images(tmp_path / "set" / "validation", 5, 24)
    for split, side in (("train", 12), ("validation", 16)):
        for path in commands.noisy_images(tmp_path / "small" / split, 1, side):
            path.rename(tmp_path / "set" / split / f"small{path.suffix}")
    return tmp_path / "set"


def test_small_pictures_are_left_out_and_counted(photos):
    for split, kept, there in (("train", 6, 7), ("validation", 5, 6)):
        rows = open_rows(DataSettings(source=str(photos), min_side=20), split=split)
        assert len(rows) == kept and f"1 of {there} {split} rows, with a side below 20 px, left out" in rows.notes
    assert len(open_rows(DataSettings(source=str(photos)), split="train")) == 7
    assert len(open_rows(DataSettings(source=str(photos), min_side=16), split="validation")) == 6
    with pytest.raises(InputError, match="all 7 pictures have a side below 99 px"):
        open_rows(DataSettings(source=str(photos), min_side=99), split="train")
    with pytest.raises(UsageError, match="min_side"):
        DataSettings(min_side=20, streaming=True)


def test_training_and_evaluation_take_the_option(photos, tmp_path):
    data = ("--data", photos, "--size", 20, "--min-side", 20)
    trained = commands.train_ae(tmp_path / "ae", data=data, steps=1)
    assert "with a side below 20 px, left out" in trained.stderr
    words = ("eval-fid", "--autoencoder", tmp_path / "ae", *data, "--metrics", "psnr", "--json")
    assert commands.ldm(*words).json["n_generated"] == 5


@pytest.mark.parametrize("count", [None, "all", 4])
def test_a_second_reference_has_its_split_behind_its_numbers(model, photos, count):
    how = {"model": load(model), "data": str(photos), "n": 6, "steps": 1, "metrics": ["fid", "is", "psnr"]}
    alone = evaluate(**how)
    found = evaluate(**how, also_split="train", reference_count=count)
    assert {key: found["metrics"][key] for key in alone["metrics"]} == alone["metrics"]
    assert set(found["metrics"]) - set(alone["metrics"]) == {"fd_tiny8_train"}
    assert found["also_reference"]["split"] == "train" and "against train" in found["labels"]["fd_tiny8_train"]
    same = evaluate(**how, also_split="validation")["metrics"]
    assert same["fd_tiny8_validation"] == pytest.approx(same["fd_tiny8"], rel=1e-9)
    assert found["metrics"]["fd_tiny8_train"] != found["metrics"]["fd_tiny8"]


def test_what_has_one_reference_refuses_a_second(model, photos):
    for words in ({"images": str(photos / "train")}, {"model": load(model), "metrics": ["psnr"]}):
        with pytest.raises(UsageError, match="--also-split"):
            evaluate(**words, data=str(photos), also_split="train")


def test_the_protocol_of_super_resolution(model, photos, monkeypatch):
    with pytest.raises(UsageError, match=r"task.scale = 4; this one has 2"):
        evaluate(model=load(model), data=str(photos), protocol="tab4-sr")
    one = PROTOCOLS["tab4-sr"]
    sets = {**one.sets, "steps": 1, "size": (20, 20), "features": "tiny", "metrics": ("fid", "psnr")}
    published = {"fid": 2.8, "fid_train": 4.8, "psnr": 24.4}
    small = dataclasses.replace(
        one, sets=sets, task={"name": "sr"}, rows=5, row_settings={"min_side": 20}, published=published
    )
    monkeypatch.setitem(PROTOCOLS, "small-sr", small)
    ending = commands.ldm("eval-fid", "--model", model, "--data", photos, "--protocol", "small-sr", "--json")
    assert ending.code == 0, ending.stderr
    assert ending.json["protocol"]["name"] == "small-sr" and ending.json["n_generated"] == 5
    shown = commands.ldm("eval-fid", "--model", model, "--data", photos, "--protocol", "small-sr")
    lines = shown.stdout.splitlines()
    row = next(k for k, line in enumerate(lines) if "against train" in line)
    assert any("published" in line and line.rstrip(" │|").endswith("4.8") for line in lines[row : row + 4]), (
        shown.stdout
    )
    other = commands.ldm("eval-fid", "--model", model, "--data", photos, "--protocol", "small-sr", "-n", 3, "--json")
    assert other.json["protocol"]["differs"] == ["n: all there, 3 here"]


def test_the_protocol_of_inpainting_is_of_models_that_fill(model, photos):
    with pytest.raises(UsageError, match=r"task.name = inpaint; this one has sr"):
        evaluate(model=load(model), data=str(photos), protocol="tab7-places")

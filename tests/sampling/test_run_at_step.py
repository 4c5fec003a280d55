"""RUN@STEP, RUN@best and RUN/checkpoints/step-STEP: a run as it was at a checkpoint, wherever a model is named."""

import json
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.torch import load_file

import ldmcli
from ldmcli.core import runs
from ldmcli.core.errors import ModelError
from ldmcli.formats.run_folder import fingerprint_of

EVERY_STEP = ("--save-every", 1, "--keep", 9)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ae") / "ae"
    tiny.train_ae(folder, *EVERY_STEP, steps=2)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, autoencoder):
    """Three steps, and the weights for use as they were at each."""
    folder = tmp_path_factory.mktemp("ldm") / "text"
    for steps in (1, 2, 3):
        tiny.train_ldm(folder, autoencoder, *tiny.ADAM, *EVERY_STEP, "--condition", "text", steps=steps)
        shutil.copyfile(folder / "model.safetensors", folder.parent / f"{steps}.safetensors")
    return folder


def by_step(run, step):
    return [f"{run}@{step}", f"{run}/checkpoints/step-{step:08d}"]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_weights_and_hash_are_those_for_use_at_that_step(model, step):
    wanted = tiny.weights(model) if step == 3 else load_file(model.parent / f"{step}.safetensors")
    for name in by_step(model, step):
        loaded = ldmcli.load(name)
        assert tiny.same(loaded.network.state_dict(), wanted)
        assert loaded.fingerprint == fingerprint_of(wanted)
    assert (ldmcli.load(model).fingerprint == fingerprint_of(wanted)) == (step == 3)


def test_raw_weights_are_those_of_the_checkpoint(model):
    raw = load_file(model / "checkpoints/step-00000002/model.safetensors")
    assert tiny.same(ldmcli.load(f"{model}@2", weights="raw").network.state_dict(), raw)


def test_samples_state_the_step_and_the_checkpoints_hash(model, tmp_path):
    drawn = tiny.ldm(
        "sample", "--model", f"{model}@1", "--prompt", "a", "--steps", 2, "--out", tmp_path / "a", "--json"
    )
    newest = tiny.ldm("sample", "--model", model, "--prompt", "a", "--steps", 2, "--out", tmp_path / "b", "--json")
    assert drawn.json["step"] == 1 and drawn.json["model_sha256"] == ldmcli.load(f"{model}@1").fingerprint
    assert "step" not in newest.json and newest.json["model_sha256"] != drawn.json["model_sha256"]
    inside = json.loads(Image.open(tmp_path / "a" / "000000.png").text["ldm"])
    assert inside["step"] == 1
    pictures = [np.asarray(Image.open(tmp_path / one / "000000.png")) for one in "ab"]
    assert (pictures[0] != pictures[1]).any()


def test_every_command_takes_a_checkpoint(model, autoencoder, tmp_path):
    evaluated = tiny.ldm("eval-fid", "--model", f"{model}@1", "-n", 4, "--steps", 1, "--split", "train", "--json")
    assert evaluated.code == 0 and evaluated.json["step"] == 1, evaluated.stderr
    inpainted = tiny.ldm(
        "inpaint",
        _picture(tmp_path),
        "--box",
        "2,2,8,8",
        "--model",
        f"{model}@2",
        "--steps",
        1,
        "--resample",
        1,
        "--out",
        tmp_path / "filled",
        "--json",
    )
    assert inpainted.code == 0 and inpainted.json["step"] == 2, inpainted.stderr
    rebuilt = tiny.ldm(
        "reconstruct", _picture(tmp_path), "--autoencoder", f"{autoencoder}@1", "--out", tmp_path / "pairs", "--json"
    )
    assert rebuilt.code == 0 and rebuilt.json["step"] == 1, rebuilt.stderr


def _picture(folder):
    path = folder / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)).save(path)
    return path


def test_training_begins_in_and_from_checkpoints(model, autoencoder, tmp_path):
    """The first stage that a run carries, and the weights that it begins with, are those of the step."""
    stage = ldmcli.load(f"{autoencoder}@1")
    options = (*tiny.ADAM, "--condition", "text", "--lr", 1e-12)
    tiny.train_ldm(tmp_path / "on", f"{autoencoder}@1", *options, steps=1)
    assert ldmcli.load(tmp_path / "on").autoencoder.fingerprint == stage.fingerprint
    assert ldmcli.load(autoencoder).fingerprint != stage.fingerprint
    assert tiny.state(tmp_path / "on")["parents"] == [{"path": f"{autoencoder}@1", "sha256": stage.fingerprint}]
    begun = tmp_path / "begun"
    tiny.train_ldm(begun, autoencoder, *options, "--init-from", f"{model}@1", "--set", "train.ema=false", steps=1)
    first, newest = (ldmcli.load(name).network.state_dict() for name in (f"{model}@1", model))
    ours = tiny.weights(begun)
    apart = [sum(float((ours[k] - other[k]).abs().sum()) for k in ours) for other in (first, newest)]
    assert apart[0] < 1e-3 < apart[1]
    plan = tiny.ldm(
        "train-ldm", *tiny.SHAPES, *tiny.UNET, "--condition", "text", "--init-from", f"{model}@1", "--plan", "--json"
    )
    assert plan.code == 0, plan.stderr


@pytest.mark.parametrize("target, more", [("run", ()), ("diffusers", ("--to", "diffusers"))])
def test_a_checkpoint_is_converted(model, tmp_path, target, more):
    ending = tiny.ldm("convert", f"{model}@2", tmp_path / target, *more, "--json")
    assert ending.code == 0, ending.stderr
    if target == "run":
        assert ldmcli.load(tmp_path / target).fingerprint == ldmcli.load(f"{model}@2").fingerprint


def test_a_run_is_not_overwritten_by_what_one_of_its_checkpoints_becomes(model):
    ending = tiny.ldm("convert", f"{model}@2", model, "--overwrite")
    assert ending.code == 2 and "is to be converted" in ending.line


@pytest.mark.parametrize(
    "ending, said",
    [
        ("@7", "no checkpoint of step 7; its checkpoints are of step 1, 2, 3"),
        ("@best", "kept no best checkpoint (train.keep_best"),
        ("@first", "behind the @ belongs a step, or best"),
        ("@", "behind the @ belongs a step, or best"),
        ("/checkpoints/step-00000007", "no checkpoint of step 7"),
    ],
)
def test_unknown_steps_are_named_with_those_there_are(model, tmp_path, ending, said):
    for line in (
        ("sample", "--model", f"{model}{ending}", "--prompt", "a", "--out", tmp_path / "out"),
        ("train-ldm", *tiny.SHAPES, "--init-from", f"{model}{ending}", "--out", tmp_path / "out"),
    ):
        found = tiny.ldm(*line)
        assert found.code == 4 and said in found.line and not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_refused(model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "checkpoints/step-00000002/ema.safetensors").unlink()
    with pytest.raises(ModelError, match="ema.safetensors: missing"):
        ldmcli.load(f"{copy}@2")


def test_folders_with_an_at_in_their_name_are_themselves(model, tmp_path):
    for name in ("text@1", "a@b"):
        shutil.copytree(model, tmp_path / name)
        assert ldmcli.load(tmp_path / name).fingerprint == ldmcli.load(model).fingerprint
    shutil.copytree(model, tmp_path / "text")
    assert runs.locate(tmp_path / "text@1") == (tmp_path / "text@1", None)
    assert ldmcli.load(f"{tmp_path}/a@b@1").fingerprint == ldmcli.load(f"{model}@1").fingerprint
    assert tiny.ldm("sample", "--model", tmp_path / "none@3", "--out", tmp_path / "o").code == 4

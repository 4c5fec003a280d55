"""`--autoencoder` of training commands takes a diffusion run, too: its first stage is meant."""

import pytest
import tiny

import ldmcli
from ldmcli.core import box

NAMES = {"RUN": "", "RUN@STEP": "@3", "checkpoint": "/checkpoints/step-00000003", "RUN/autoencoder": "/autoencoder"}
TASKS = {"generate": (), "text": ("--condition", "text"), "sr": ("--task", "sr"), "inpaint": ("--task", "inpaint")}
NETWORK = tuple(word for one in ("channels=16", "channel_mult=1", "groups=4") for word in ("--set", f"diffusion.{one}"))


@pytest.fixture(scope="module", params=["kl", "vq"])
def run(request, tmp_path_factory, tiny_runs):
    """A diffusion run in latents of either first stage."""
    if request.param == "kl":
        return tiny_runs["plain"]
    folder = tmp_path_factory.mktemp("vq")
    tiny.train_ae(folder / "ae", "--reg", "vq", "--codebook-size", 32)
    tiny.train_ldm(folder / "run", folder / "ae", *tiny.ADAM)
    return folder / "run"


@pytest.mark.parametrize(
    "name, task", [(name, task) for name in NAMES for task in TASKS if "RUN" == name or task == "generate"]
)
def test_a_model_is_trained_in_its_latents(run, name, task, tmp_path):
    tiny.train_ldm(tmp_path / "run", f"{run}{NAMES[name]}", *tiny.ADAM, *TASKS[task], steps=1)
    theirs, ours = (ldmcli.load(one).autoencoder for one in (run, tmp_path / "run"))
    assert ours.fingerprint == theirs.fingerprint
    assert tiny.state(tmp_path / "run")["parents"] == [{"path": f"{run}/autoencoder", "sha256": theirs.fingerprint}]
    assert tiny.state(tmp_path / "run" / "autoencoder")["kind"] == "autoencoder"
    assert tiny.same(ours.network.state_dict(), theirs.network.state_dict())


def test_a_classifier_is_trained_in_its_latents(run, tmp_path):
    asked = ("--autoencoder", run, *NETWORK, *tiny.SHAPES, *tiny.QUIET_LOOP, "--steps", 1)
    ending = tiny.ldm(
        "train-classifier", *asked, "--out", tmp_path / "run", "--set", f"data.cache_dir={tmp_path}/cache"
    )
    assert ending.code == 0, ending.stderr
    assert tiny.state(tmp_path / "run")["parents"][0]["path"] == f"{run}/autoencoder"


@pytest.mark.parametrize("command", ["train-ldm", "train-classifier"])
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_counts_its_latents(run, name, command):
    plans = [
        tiny.ldm(command, *tiny.SHAPES, *NETWORK, "--autoencoder", one, "--plan", "--json").json
        for one in (f"{run}{NAMES[name]}", run / "autoencoder")
    ]
    assert plans[0]["latent"] == plans[1]["latent"] and plans[0]["flops"] == plans[1]["flops"]


def test_the_model_in_the_box_has_one(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(box, "FOLDER", tiny_runs["text"])
    monkeypatch.chdir(tmp_path)
    tiny.train_ldm(tmp_path / "run", box.NAME, *tiny.ADAM, steps=1)
    wanted = ldmcli.load(tiny_runs["text"] / "autoencoder").fingerprint
    assert ldmcli.load(tmp_path / "run").autoencoder.fingerprint == wanted


def test_pixels_have_none(tmp_path):
    tiny.train_ldm(tmp_path / "pixels", "none", *tiny.ADAM, steps=1)
    for more in ((), ("--plan",)):
        asked = ("train-ldm", "--autoencoder", tmp_path / "pixels", *tiny.SHAPES, *tiny.UNET, *more)
        ending = tiny.ldm(*asked, "--out", tmp_path / "run")
        assert ending.code == 4 and "--autoencoder none" in ending.line

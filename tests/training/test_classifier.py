"""`ldm train-classifier` and `--classifier`: trained in latents of every first stage and process, resumed exactly, by
two processes as by one, and refused where it does not fit the model."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from processes import ranks
from tiny import ldm

import ldmcli
from ldmcli.core.settings import DiffusionSettings
from ldmcli.diffusion.schedule import make_schedule
from ldmcli.networks.latent_scale import LatentScale
from ldmcli.networks.noisy_classifier import NoisyClassifier
from ldmcli.sampling.classifier import same_scale, same_schedule

NETWORK = tuple(
    word for name in ("channels=16", "channel_mult=1", "groups=4") for word in ("--set", f"diffusion.{name}")
)
LOOP = ("--limit", 20, "--size", "20x20", *tiny.QUIET_LOOP, "--set", "train.cooldown=0")
FAST = ("--steps", 3, "--sampler", "ddim")


def classify(out, *more, steps: int = 2, code: int = 0):
    """`ldm train-classifier` with a tiny network."""
    cache = ("--set", f"data.cache_dir={out.parent / 'cache'}")
    ending = ldm("train-classifier", *NETWORK, *LOOP, *cache, "--steps", steps, "--out", out, *more)
    assert ending.code == code, ending.stderr
    return ending


@pytest.fixture(scope="module")
def plain(tiny_runs):
    return tiny_runs["plain"]


@pytest.fixture(scope="module")
def classifier(plain, tmp_path_factory):
    """Of the latents and the process of `plain`."""
    out = tmp_path_factory.mktemp("classifier") / "run"
    classify(out, "--model", plain, "--sample-every", 2, "--eval-every", 1)
    return out


@pytest.mark.parametrize("pool", ["attention", "mean"])
@pytest.mark.parametrize(
    "more", [{}, {"patch": 2}, {"spatial_transformer": False, "position": "none"}, {"resblock_updown": True}]
)
def test_every_network_gives_logits_of_every_size_it_can_halve(pool, more):
    settings = DiffusionSettings(channels=16, channel_mult=(1, 2), groups=4, head_channels=8, **more)
    network = NoisyClassifier(settings, pool, 5, (3, 8, 8))
    for side in (8, 12):
        logits = network(torch.randn(2, 3, side, side), torch.tensor([0.0, 999.0]))
        assert logits.shape == (2, 5)
    assert {name.partition(".")[0] for name, _ in network.named_parameters()} == {"encoder", "norm", "pool"}


def test_a_run_has_all_that_runs_have(classifier, plain):
    state = tiny.state(classifier)
    assert (state["kind"], state["state"], len(state["parents"])) == ("classifier", "finished", 2)
    assert {"accuracy", "accuracy_q1", "accuracy_q4", "val_loss"} <= state["metrics"].keys()
    stats, theirs = (json.loads((run / "stats.json").read_text()) for run in (classifier, plain))
    assert stats["class_names"][0] == "circle" and stats["latent_scale"]["mean"] == theirs["latent_scale"]["mean"]
    assert (classifier / "samples" / "step-00000002.png").is_file()
    for page, says in (("report.html", "Accuracy by noise"), ("README.md", "image-classification")):
        assert says in (classifier / page).read_text()
    assert ldm("report", classifier, "--out", classifier.parent / "page").code == 0
    rows = ldm("runs", classifier.parent, "--json").json["runs"]
    assert [row["kind"] for row in rows] == ["classifier"]
    plan = ldm("train-classifier", "--model", plain, *NETWORK, "--plan", "--json").json
    assert plan["command"] == "ldm train-classifier" and plan["parameters"]["model"] > 10_000


@pytest.mark.parametrize("stage, prediction", [("kl", "flow"), ("vq", "eps"), ("none", "v")])
def test_it_leads_samples_over_every_first_stage_and_process(stage, prediction, ae, tmp_path):
    first = ae if stage == "kl" else stage
    if stage == "vq":
        first = tmp_path / "vq"
        tiny.train_ae(first, "--reg", "vq", "--codebook-size", 16, steps=1)
    process = ("--set", f"diffusion.prediction={prediction}")
    tiny.train_ldm(tmp_path / "model", first, *tiny.ADAM, *process, steps=1)
    classify(tmp_path / "led", "--model", tmp_path / "model")
    model = ldmcli.load(tmp_path / "model")
    led = ldmcli.load_classifier(tmp_path / "led")
    led.network.pool.out.weight.mul_(100)  # two steps teach nothing; only that it acts is asked
    how = {"steps": 3, "sampler": "ddim", "classifier": led}
    none, some = (np.stack(model.sample(classes=["star", 1], classifier_scale=s, **how)) for s in (0.0, 30.0))
    assert np.array_equal(none, np.stack(model.sample(n=2, steps=3, sampler="ddim")))
    assert (none[0] != some[0]).any() and (none[1] != some[1]).any()
    alone = np.asarray(model.sample(classes=["star", 1], classifier_scale=30.0, first=1, **how)[0])
    assert abs(alone.astype(int) - some[1]).max() <= 1


def test_commands_say_who_led_and_whereto(classifier, plain, tiny_runs, tmp_path):
    command = ("sample", "--model", plain, *FAST, "--classifier", classifier, "--classifier-scale", 10, "--json")
    ending = ldm(*command, "--class", "star", "--class", "#1", "-n", 2, "--out", tmp_path / "two")
    assert ending.code == 0, ending.stderr
    assert ending.json["classifier_scale"] == 10 and len(ending.json["images"]) == 4
    assert json.loads(Image.open(tmp_path / "two" / "000001.png").text["ldm"])["class"] == "square"
    assert len(ldm(*command, "--out", tmp_path / "all").json["images"]) == 7  # every class once
    of_classes = ldm(*command[:2], tiny_runs["class"], *command[3:], "--class", "ring", "--out", tmp_path / "class")
    assert of_classes.code == 0, of_classes.stderr
    measure = ("eval-fid", "--model", plain, "--features", "effnet-lite0", "-n", 4, "--steps", 2, "--json")
    found = ldm(*measure, "--metrics", "fid", "--classifier", classifier, "--classifier-scale", 2)
    if found.code == 0:  # the network of features may not be here
        assert found.json["generated"]["classifier_scale"] == 2


def test_what_does_not_fit_is_one_line(classifier, plain, tiny_runs, ae, tmp_path):
    classify(tmp_path / "eps", "--autoencoder", ae, "--set", "diffusion.prediction=eps")
    classify(tmp_path / "pixels", "--autoencoder", "none", "--set", "diffusion.channels=8")
    sample = ("sample", "--model", plain, *FAST, "--out", tmp_path / "out")
    evaluate = ("eval-fid", "--model", plain, "-n", 2)
    for line, code, says in (
        ((*sample, "--classifier", tmp_path / "eps"), 4, "another noise schedule"),
        ((*sample, "--classifier", tmp_path / "pixels"), 4, "another autoencoder"),
        ((*sample, "--classifier", plain), 4, "not a classifier"),
        ((*sample, "--classifier", classifier, "--class", "cirle"), 2, "did you mean circle"),
        ((*sample, "--classifier-scale", 2), 2, "give --classifier RUN"),
        (("sample", "--model", classifier, "--out", tmp_path / "out"), 4, "a classifier"),
        ((*evaluate, "--classifier", classifier, "--guide-factor", 2), 2, "nor --guide-factor"),
        ((*evaluate, "--classifier-scale", 2), 2, "give --classifier RUN"),
    ):
        ending = ldm(*line)
        assert ending.code == code and says in ending.line, (line, ending.stderr)
    assert not (tmp_path / "out").exists()
    no_labels = ("--data", "shapes:2", "--autoencoder", ae)
    assert "label column" in classify(tmp_path / "a", *no_labels, code=3).line
    process = ("--model", plain, "--set", "diffusion.timesteps=500")
    assert "another process" in classify(tmp_path / "b", *process, code=2).line
    loss = ("--autoencoder", ae, "--set", "diffusion.loss=l1")
    assert "cross-entropy alone" in classify(tmp_path / "c", *loss, code=2).line


def test_what_counts_as_the_same_process_and_scale():
    eps, v, flow = (make_schedule(DiffusionSettings(prediction=name)) for name in ("eps", "v", "flow"))
    assert same_schedule(eps, v) and not same_schedule(eps, flow)
    assert not same_schedule(eps, make_schedule(DiffusionSettings(prediction="eps", beta_end=0.02)))
    scale = LatentScale((0.0, 0.1), (1.0, 2.0))
    assert same_scale(scale, LatentScale((0.001, 0.1), (1.01, 2.0)))
    assert not same_scale(scale, LatentScale((0.0, 0.1), (1.1, 2.0))) and not same_scale(
        scale, LatentScale((0.0,), (1.0,))
    )


def test_it_goes_on_exactly_and_two_processes_train_what_one_does(ae, tmp_path):
    more = ("--autoencoder", ae, "--save-every", 2, "--log-every", 1, "--flip")
    classify(tmp_path / "whole", *more, steps=4)
    classify(tmp_path / "parts", *more, steps=2)
    classify(tmp_path / "parts", *more, steps=4)
    assert tiny.same(tiny.checkpoint(tmp_path / "whole"), tiny.checkpoint(tmp_path / "parts"))
    cache = ("--set", f"data.cache_dir={tmp_path / 'cache'}")
    line = ("train-classifier", *NETWORK, *LOOP, *cache, *more, "--steps", 4, "--out", tmp_path / "two")
    both = ranks(tmp_path, 2, *line)
    assert [command.wait() for command in both] == [0, 0], both[0].stderr + both[1].stderr
    one, two = (
        [row["loss_model"] for row in tiny.log(tmp_path / run) if "loss_model" in row] for run in ("whole", "two")
    )
    assert two == pytest.approx(one, rel=1e-4)
    for name, value in tiny.state(tmp_path / "whole")["metrics"].items():
        assert tiny.state(tmp_path / "two")["metrics"][name] == pytest.approx(value, rel=1e-3), name


def test_it_learns_and_what_it_has_learned_leads(tmp_path):
    """Dark and bright pictures, on pixels: with a model that denoises nothing, its gradient decides how bright."""
    for name, level in (("bright", 220), ("dark", 30)):
        for k in range(24):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            pixels = np.clip(np.random.default_rng(k).normal(level, 10, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{k}.png")
    data = ("--data", tmp_path / "data", "--size", 8, "--limit", 0, "--autoencoder", "none")
    classify(tmp_path / "led", *data, "--batch-size", 16, "--lr", 3e-3, steps=80)
    metrics = tiny.state(tmp_path / "led")["metrics"]
    assert metrics["accuracy_q1"] > 0.9 and metrics["accuracy_q1"] >= metrics["accuracy_q4"]
    tiny.train_ldm(tmp_path / "model", "none", *tiny.ADAM, *data[:4], "--limit", 0, data=(), steps=1)
    model = ldmcli.load(tmp_path / "model")
    how = {"classifier": tmp_path / "led", "steps": 10, "sampler": "ddim", "n": 4}
    dark, bright = (np.stack(model.sample(classes=[c], classifier_scale=3.0, **how)).mean() for c in ("dark", "bright"))
    assert bright > dark + 30

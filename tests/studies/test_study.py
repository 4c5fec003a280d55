"""`ldm study`: what it trains, that it goes on where it was, and what its JSON and page say."""

import json

import pytest
import tiny
from tiny import ldm

from ldmcli.core.errors import DivergedError, Interrupted
from ldmcli.core.settings import DiffusionConfig
from ldmcli.studies import measure, study
from ldmcli.studies.curves import quality_curves, seconds_at
from ldmcli.studies.plan import StudyRequest, levels, plan_trainings

TINY = (
    *("--data", "shapes", "--limit", 24, "--size", 32, "--batch-size", 4, "--parameters", "150k"),
    *("--set", "diffusion.groups=4", "--set", "diffusion.num_res_blocks=1", "--set", "diffusion.head_channels=8"),
    *("--set", "condition.context_dim=16", "--set", "condition.text_length=16", "--set", "autoencoder.channels=8"),
    *("--set", "sample.n=4", "--set", "train.sample_every=0"),
    *("--steps", 2, "--ae-steps", 2, "--sampling-steps", "1,2", "-n", 10, "--eval-samples", 0),
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    """No cache of others, and few images for what is measured."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "RATE_IMAGES", 4)
    monkeypatch.setattr(measure, "REFERENCE_LIMIT", 12)


# --- the plan ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "condition"),
    [(32, ""), (64, ""), (256, ""), (64, "class"), (256, "text"), (64, "text+layout"), (256, "map")],
)
def test_models_of_a_study_have_equal_numbers_of_parameters(size, condition):
    layers = (("--size", {"data.size": size, "condition.kinds": condition}),)
    factors = (1, 4, 8) if size == 32 else (1, 2, 4, 8, 16, 32)
    if condition:
        factors = factors[1::3]
    trainings = plan_trainings(StudyRequest(layers=layers, factors=factors, parameters=8_000_000))
    models = [one for one in trainings if one.kind == "diffusion"]
    assert [one.f for one in models] == list(factors)
    assert all(abs(one.parameters / 8_000_000 - 1) < 0.06 for one in models), [one.parameters for one in models]
    for one in models:
        config = one.resolved.config
        assert isinstance(config, DiffusionConfig)
        factor = 2 ** (len(config.diffusion.channel_mult) - 1)
        assert size // one.f % factor == 0  # the UNet can halve its latent that often


def test_without_a_number_the_default_network_is_the_measure():
    models = [one for one in plan_trainings(StudyRequest(factors=(4, 8))) if one.kind == "diffusion"]
    config = models[0].resolved.config
    assert config.diffusion.channels == DiffusionConfig().diffusion.channels
    assert models[1].parameters == pytest.approx(models[0].parameters, rel=0.03)


def test_latents_of_every_side_have_attention_at_small_maps():
    for side in (2, 4, 8, 16, 32, 64, 128, 256):
        ratios, factors = levels(side)
        assert len(ratios) >= 2 and factors and max(factors) <= 2 ** (len(ratios) - 1)
        assert all(side // factor <= 8 for factor in factors)


def test_a_grid_and_seeds_share_first_stages(ae):
    grid = {"train.lr": ("0.005", "0.01"), "autoencoder.channels": ("8", "16")}
    trainings = plan_trainings(StudyRequest(factors=(1, 4), grid=grid, seeds=(0, 1), parameters=500_000))
    names = [one.name for one in trainings]
    stages = [one for one in trainings if one.kind == "autoencoder"]
    assert [one.name for one in stages] == ["first-stages/f4-channels=8", "first-stages/f4-channels=16"]
    assert len(names) == len(set(names)) == 2 + 2 * 4 * 2
    by_name = {one.name: one for one in trainings}
    model = by_name["f4-lr=0.005-channels=16-seed1"]
    assert model.autoencoder == "first-stages/f4-channels=16" and model.variant == "LDM-4, lr = 0.005, channels = 16"
    assert model.resolved.config.train.lr == 0.005 and model.resolved.config.train.seed == 1
    named = plan_trainings(StudyRequest(factors=(4,), autoencoders=(str(ae),), parameters=500_000))
    assert [one.autoencoder for one in named] == [str(ae)] and not named[0].trained_here


def test_the_plan_trains_nothing(tmp_path):
    ending = ldm("study", *TINY, "--f", "1,4", "--plan", "--json", "--out", tmp_path / "s")
    assert ending.code == 0, ending.stderr
    assert [row["name"] for row in ending.json["trainings"]] == ["first-stages/f4", "f1-seed0", "f4-seed0"]
    assert ending.json["trainings"][1]["latent"] == "3x32x32" and not (tmp_path / "s").exists()
    ending = ldm("study", *TINY, "--f", "1,4", "--plan")
    assert "3 trainings, 6 steps" in ending.stdout and max(map(len, ending.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--f", "3"), 2, "--f 3: choose among 1, 2, 4, 8, 16, 32"),
        (("--f", "4,four"), 2, "--f 4,four: whole numbers"),
        (("--f", "4,4"), 2, "a value stands there twice"),
        (("--minutes", 1), 2, "--minutes and --steps exclude each other"),
        (("--grid", "train.lrr=1,2"), 2, "did you mean train.lr"),
        (("--grid", "train.lr"), 2, "write SECTION.NAME=A,B"),
        (("--grid", "autoencoder.f=4,8"), 2, "say it with --f"),
        (("--parameters", "many"), 2, "--parameters many"),
        (("--parameters", "10"), 2, "M or more; ask for as many"),
        (("--autoencoder", "nowhere"), 4, "no run of `ldm train-ae`"),
        (("--runs", "nowhere"), 4, "nowhere: no such run folder"),
        (("--features", "nowhere.safetensors"), 3, "nowhere.safetensors"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_trained(options, code, said, tmp_path):
    ending = ldm("study", *TINY, *options, "--out", tmp_path / "s")
    assert (ending.code, said in ending.line) == (code, True), ending.stderr
    assert not list(tmp_path.glob("s/**/run.json"))


# --- the whole -----------------------------------------------------------------------------------------------------


def test_a_study_that_is_stopped_goes_on_and_measures_each_run_once(tmp_path, monkeypatch):
    out, trained = tmp_path / "study", []
    train = study.train

    def stopped_at(name):
        def run(kind, resolved, folder, options):
            if folder.name == name:
                raise Interrupted("stopped", 2)
            trained.append(folder.name)
            return train(kind, resolved, folder, options)

        return run

    command = ("study", *TINY, "--f", "1,4", "--seeds", "0,1", "--out", out)
    monkeypatch.setattr(study, "train", stopped_at("f4-seed0"))
    assert ldm(*command).code == 130 and trained == ["f4", "f1-seed0", "f1-seed1"]
    monkeypatch.setattr(study, "train", stopped_at(""))
    measured, sampling = [], study.measure_sampling
    monkeypatch.setattr(
        study, "measure_sampling", lambda bench, name, *more: measured.append(name) or sampling(bench, name, *more)
    )
    ending = ldm(*command, "--json")
    assert ending.code == 0, ending.stderr
    assert trained[3:] == ["f4-seed0", "f4-seed1"] and len(measured) == 8
    found = json.loads((out / "study.json").read_text())
    assert ending.json == {"out": str(out), **found}
    _check(found)
    page = (out / "study.html").read_text()
    for words in ("LDM-1", "LDM-4", "R-Fréchet distance", "over images a second", "bits a dimension", "2 seeds"):
        assert words in page, words
    monkeypatch.setattr(measure, "model_source", None)  # what is measured already is not sampled again
    assert ldm(*command).code == 0 and json.loads((out / "study.json").read_text()) == found


def _check(found):
    """Every number that the page needs, of each run."""
    assert [stage["variant"] for stage in found["first_stages"]] == ["f = 4, kl"]
    metrics = found["first_stages"][0]["metrics"]
    assert {"psnr", "psnr_std", "ssim", "fd_effnet_lite0", "is_effnet_lite0_mean"} <= set(metrics)
    assert [model["name"] for model in found["models"]] == ["f1-seed0", "f1-seed1", "f4-seed0", "f4-seed1"]
    for model in found["models"]:
        assert [one["steps"] for one in model["sampling"]] == [1, 2] and model["steps"] == 2
        assert all(one["images_per_s"] > 0 and "fd_effnet_lite0" in one["metrics"] for one in model["sampling"])
        assert model["rate_distortion"][-1]["rate"] > model["rate_distortion"][0]["rate"] > 0
        assert [step for step, _, _ in model["curves"]["val_loss"]] == [1, 2]
        assert model["training_images_per_s"] > 0
    one, other = found["models"][2:]
    assert one["sampling"][0]["metrics"] != other["sampling"][0]["metrics"]  # the seed is that of the training


@pytest.mark.parametrize(
    ("options", "condition"),
    [
        (("--reg", "vq", "--condition", "text"), "text"),
        (("--condition", "text+layout", "--data", "shapes:2"), "layout"),
        (("--condition", "map"), "map"),
    ],
)
def test_first_stages_and_conditions_of_every_kind(options, condition, tmp_path):
    ending = ldm("study", *TINY, "--f", "4", "--parameters", "400k", *options, "--out", tmp_path / "s", "--json")
    assert ending.code == 0, ending.stderr
    stage, model = ending.json["first_stages"][0], ending.json["models"][0]
    assert model["rate_distortion"] and model["sampling"]
    assert ("codes_used" in stage) == ("vq" in options)
    if "vq" in options:
        assert 0 < stage["codes_used"] <= 1 <= stage["perplexity"] <= 1024


def test_an_autoencoder_is_no_model_to_measure(ae, tmp_path):
    ending = ldm("study", "--runs", ae, "--out", tmp_path / "s")
    assert ending.code == 4 and "no run of `ldm train-ldm`" in ending.line


def test_finished_runs_are_measured_without_training(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "train", None)
    runs = [word for name in ("plain", "text") for word in ("--runs", tiny_runs[name])]
    ending = ldm("study", *runs, "--sampling-steps", 1, "-n", 10, "--out", tmp_path / "s", "--json")
    assert ending.code == 0, ending.stderr
    assert [model["variant"] for model in ending.json["models"]] == ["plain", "text"]


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    ending = ldm("study", *TINY, "--f", "4", "--out", tmp_path / "s")
    assert ending.code == 2 and "start it without a launcher" in ending.stderr and not (tmp_path / "s").exists()


def test_runs_of_one_name_are_told_apart():
    """Else they would count as seeds of one model, and write over one another's measurements."""
    assert list(study.distinct_names(("x/a/run", "x/b/run"))) == ["a-run", "b-run"]
    assert list(study.distinct_names(("x/one", "x/two", "x/two"))) == ["one", "two"]
    assert study.distinct_names(()) == {}


def test_models_are_measured_by_one_network_in_training_and_after():
    request = StudyRequest(factors=(1,), features="effnet-lite0", eval_samples=16, parameters=500_000)
    train = plan_trainings(request)[0].resolved.config.train
    assert (train.eval_features, train.eval_samples) == ("effnet-lite0", 16)


def test_a_training_that_diverges_is_left_out_and_named(tmp_path, monkeypatch):
    train = study.train

    def run(kind, resolved, folder, options):
        if folder.name in ("f4", "f1-seed0"):
            raise DivergedError(f"{folder}: NaN")
        return train(kind, resolved, folder, options)

    monkeypatch.setattr(study, "train", run)
    ending = ldm("study", *TINY, "--f", "1,4,8", "--out", tmp_path / "s", "--json")
    assert ending.code == 0, ending.stderr
    assert set(ending.json["failed"]) == {"first-stages/f4", "f1-seed0", "f4-seed0"}
    assert [model["name"] for model in ending.json["models"]] == ["f8-seed0"]
    assert "f4-seed0 is left out" in (tmp_path / "s" / "study.html").read_text()


# --- curves --------------------------------------------------------------------------------------------------------


def test_seconds_of_an_evaluation_lie_between_those_of_the_log():
    log = [
        {"step": 10, "trained_seconds": 5.0, "images_per_s": 3},
        {"step": 15, "val/fid": 30.0, "val/val_loss": "nan"},
        {"step": 20, "trained_seconds": 9.0},
        {"step": 25, "val/fid": 20.0},
        {"event": "begun"},
    ]
    assert quality_curves(log) == {"fid": [(15, 7.0, 30.0), (25, 11.25, 20.0)]}
    assert seconds_at([], 5) == 0.0


def test_evaluations_come_at_equal_shares_of_a_run(ae, tmp_path):
    """train.evaluations, beside those of train.eval_every and the one at the end."""
    tiny.train_ldm(tmp_path / "run", ae, "--set", "train.evaluations=4", steps=10)
    steps = [line["step"] for line in tiny.log(tmp_path / "run") if "val/val_loss" in line]
    assert steps == [3, 5, 8, 10]

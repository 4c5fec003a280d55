"""What a model was trained against, and whether that judges it, too."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from golden_cases import squeezenet
from safetensors.torch import load_file, save_file

from ldmcli.core.files import load_tensors, save_tensors, sha256_file
from ldmcli.core.settings import AutoencoderConfig, LossSettings
from ldmcli.evaluation.evaluate import evaluate
from ldmcli.evaluation.extractors import NETWORKS, open_extractor
from ldmcli.evaluation.judges import Teacher, judges_among, trained_against
from ldmcli.networks.perceptual import perceptual_net
from ldmcli.sampling.load import load

AT_LOSS = ("--set", "loss.perceptual_weight=0.1", "--set")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A backbone in two files of one content, another one, an autoencoder trained against the first, and a model."""
    folder = tmp_path_factory.mktemp("judges")
    teacher = squeezenet(folder / "teacher.safetensors")
    torch.save(load_file(teacher), folder / "same.pth")
    save_file({name: value * 1.5 for name, value in load_file(teacher).items()}, folder / "other.safetensors")
    tiny.train_ae(folder / "ae", *AT_LOSS, f"loss.perceptual={teacher}", steps=1)
    settings = ("eval_samples=10", f"eval_features={teacher}", "eval_steps=1", "evaluations=1")
    words = [word for one in settings for word in ("--set", f"train.{one}")]
    ending = tiny.train_ldm(folder / "ldm", folder / "ae", "--condition", "none", *words, steps=1)
    (folder / "said.txt").write_text(ending.stderr)
    return folder


def without_metadata(run):
    """The run as versions wrote it that did not keep what it was trained against."""
    tensors, metadata = load_tensors(run / "model.safetensors")
    kept = {name: text for name, text in metadata.items() if name != "trained_against"}
    assert len(kept) == len(metadata) - 1
    save_tensors(run / "model.safetensors", tensors, kept)


def test_a_run_keeps_what_it_was_trained_against(places):
    teacher = places / "teacher.safetensors"
    (of_autoencoder,), (of_model,) = (trained_against(load(places / name)) for name in ("ae", "ldm"))
    assert of_autoencoder.where == "loss.perceptual" and of_model.where == "loss.perceptual of the autoencoder"
    assert of_autoencoder.weights_sha256 == of_model.weights_sha256 == sha256_file(teacher)
    assert of_autoencoder.named == f"squeezenet1_1@{sha256_file(teacher)[:12]}"
    assert trained_against(load(f"{places / 'ae'}@1"))[0].trunk_sha256 == of_autoencoder.trunk_sha256


def test_a_training_says_that_its_evaluations_are_by_such_a_network(places):
    said = (places / "said.txt").read_text()
    assert said.count("SqueezeNet 1.1 judges what was trained against it (loss.perceptual of the autoencoder)") == 1


def test_settings_say_it_of_runs_that_kept_nothing(places, tmp_path):
    teacher = squeezenet(tmp_path / "t.safetensors")
    tiny.train_ae(tmp_path / "ae", *AT_LOSS, f"loss.perceptual={teacher}", steps=1)
    kept = trained_against(load(tmp_path / "ae"))
    without_metadata(tmp_path / "ae")
    assert trained_against(load(tmp_path / "ae")) == kept
    teacher.unlink()
    assert trained_against(load(tmp_path / "ae")) == [Teacher("t.safetensors", "", "", "loss.perceptual")]
    assert not judges_among(trained_against(load(tmp_path / "ae")), [open_extractor("effnet-lite0")], None)


@pytest.mark.parametrize(
    "subject, features, perceptual, keys",
    [
        ("ae", "teacher.safetensors", "teacher.safetensors", ["squeezenet1_1", "lpips_squeeze"]),
        ("ldm", "same.pth", "other.safetensors", ["squeezenet1_1"]),
        ("ae", "other.safetensors", "same.pth", ["lpips_squeeze"]),
        ("ae", "effnet-lite0", "other.safetensors", []),
    ],
)
def test_a_judge_that_was_a_teacher_is_named(places, subject, features, perceptual, keys):
    features = places / features if "." in features else features
    given = {"autoencoder": places / "ae"} if subject == "ae" else {"model": places / "ldm", "steps": 1}
    metrics = ("fid", "lpips") if subject == "ae" else ("fid",)
    found = evaluate(**given, metrics=metrics, features=str(features), perceptual=str(places / perceptual), n=2)
    assert [entry["judges"] for entry in found.get("trained_against", [])] == keys
    of_parent = " of the autoencoder" if subject == "ldm" else ""
    assert all(entry["where"] == f"loss.perceptual{of_parent}" for entry in found.get("trained_against", []))
    warned = [text for text in found["warnings"] if "judges what was trained against it" in text]
    assert len(warned) == len(keys) and not any("\n" in text for text in warned)
    where = found["extractors"][0].get("trained_against", [])
    assert where == ([f"loss.perceptual{of_parent}"] if "squeezenet1_1" in keys else [])


@pytest.mark.parametrize(
    "named, judge, same",
    [
        ("", "vgg16", True),
        ("vgg", "vgg16", True),
        ("squeeze", "squeezenet", True),
        ("alex", "vgg16", False),
        ("", "effnet-lite0", False),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_published_weights_are_known_without_their_file(named, judge, same, known):
    loss = LossSettings(perceptual_weight=1.0, perceptual=named)
    run = SimpleNamespace(config=AutoencoderConfig(loss=loss))
    (teacher,) = trained_against(run)
    sha = teacher.weights_sha256.ljust(64, "0") if known else "f" * 64
    network = NETWORKS[judge]
    assert teacher.is_of(network.suffix, sha) == (same or known)
    assert not trained_against(SimpleNamespace(config=replace(run.config, loss=LossSettings(perceptual=named))))


def test_trunks_decide_where_both_are_known_and_hashes_of_networks_that_have_none():
    teacher = Teacher("vgg16", "a" * 64, "b" * 64, "loss.perceptual")
    assert teacher.is_of("vgg16", "c" * 64, "b" * 64) and not teacher.is_of("vgg16", "c" * 64, "d" * 64)
    aligned = Teacher("dinov2-vitb14", "a" * 64, "", "align.encoder")
    assert aligned.is_of("dinov2-vitb14", "a" * 64) and not aligned.is_of("dinov2-vitb14", "c" * 64)


def test_samples_that_lpips_led_are_not_judged_by_it_unsaid(places, tmp_path):
    own = str(places / "teacher.safetensors")
    found = evaluate(
        model=load(places / "ldm"), steps=1, n=2, metrics=("lpips",), perceptual=str(places / "other.safetensors"),
        guide_factor=1, guide_metric="lpips",
    )  # fmt: skip
    assert found["trained_against"][0]["where"] == "--guide-metric" and len(found["trained_against"]) == 1
    assert perceptual_net(own).identity["weights_sha256"] == sha256_file(places / "teacher.safetensors")

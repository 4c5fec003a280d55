"""Several runs in one call, options of samples, and how the codes of an autoencoder are used."""

import json

import numpy as np
import pytest
import tiny as commands
from measured import Autoencoder, Model, Rows, pictures, tiny_extractor
from PIL import Image

from ldmcli.core.errors import UsageError
from ldmcli.evaluation import evaluate as module
from ldmcli.evaluation import references
from ldmcli.evaluation.evaluate import evaluate
from ldmcli.evaluation.metrics import codebook_use


@pytest.fixture(scope="module")
def stages(tiny_runs, tmp_path_factory):
    """A KL and a VQ autoencoder."""
    vq = tmp_path_factory.mktemp("several") / "vq"
    commands.train_ae(vq, "--reg", "vq", "--codebook-size", 16)
    return tiny_runs["kl"], vq


@pytest.fixture(scope="module")
def text_model(tiny_runs):
    return tiny_runs["text"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_extractor(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(autouse=True)
def cheap(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "open_extractor", lambda name=None: tiny)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


def seen_blocks(tiny, monkeypatch):
    """Counts the images that go through the extractor."""
    seen, found = [], tiny.features_and_logits
    monkeypatch.setattr(tiny, "features_and_logits", lambda images: seen.append(len(images)) or found(images))
    return seen


def test_several_autoencoders_give_what_each_gives_alone_in_one_pass_of_the_reference(stages, tiny, monkeypatch):
    how = ("--data", "shapes", "-n", 6, "--size", 20, "--metrics", "fid,is,psnr,codebook", "--json")
    alone = [commands.ldm("eval-fid", "--autoencoder", stage, *how).json for stage in stages]
    seen = seen_blocks(tiny, monkeypatch)
    ending = commands.ldm("eval-fid", "--autoencoder", stages[0], "--autoencoder", stages[1], *how)
    assert ending.code == 0, ending.stderr
    assert [one["metrics"] for one in ending.json["results"]] == [one["metrics"] for one in alone]
    assert [one["name"] for one in ending.json["results"]] == [str(stage) for stage in stages]
    assert sum(seen) == 3 * 6, "two autoencoders and the originals once"
    assert ending.json["results"][0]["metrics"]["codebook_used"] is None
    assert 0 < ending.json["results"][1]["metrics"]["codebook_used"] <= 1
    assert 1 <= ending.json["results"][1]["metrics"]["codebook_perplexity"] <= 16


def test_the_table_has_a_row_a_run_and_a_column_a_metric(stages):
    words = [word for stage in stages for word in ("--autoencoder", stage)]
    ending = commands.ldm("eval-fid", *words, "--data", "shapes", "-n", 4, "--metrics", "psnr,ssim,codebook")
    lines = ending.stdout.splitlines()
    heads = " ".join(line for line in lines if line.startswith("run  "))
    assert all(name in heads for name in ("PSNR (dB)", "SSIM (Wang)", "perplexity of codes"))
    for stage in stages:
        assert "±" in next(line for line in lines if line.startswith(f"{stage}  "))
    limited = commands.ldm(
        "eval-fid", *words, "--data", "shapes", "-n", 4, "--metrics", "psnr", "--fail-below", "psnr=99"
    )
    assert limited.code == 8


def test_several_models_are_measured_alike(monkeypatch):
    monkeypatch.setattr(references, "open_reference", lambda settings, split: (Rows(pictures(12, 9)), 0))
    models = [Model(()), Model(())]
    found = evaluate(model=models, data="made", n=5, seed=1)
    assert [one["metrics"] for one in found["results"]] == [
        evaluate(model=Model(()), data="made", n=5, seed=1)["metrics"]
    ] * 2
    for name in ("compare", "save_statistics"):
        with pytest.raises(UsageError, match="about one result"):
            evaluate(model=models, data="made", **{name: "x.npz"})


def test_one_of_a_list_is_as_one():
    alone, listed = (
        evaluate(autoencoder=one, data="shapes", n=3, size=(20, 20), metrics=["psnr"])
        for one in (Autoencoder(), [Autoencoder()])
    )
    assert listed["metrics"] == alone["metrics"] and "results" not in listed


@pytest.mark.parametrize(
    "counts, used, perplexity",
    [([5, 5, 5, 5], 1, 4), ([8, 0, 0, 0], 0.25, 1), ([4, 4, 0, 0], 0.5, 2), (None, None, None)],
)
def test_use_of_a_codebook(counts, used, perplexity):
    values = codebook_use(None if counts is None else np.array(counts)).values
    assert values["codebook_used"] == used
    assert values["codebook_perplexity"] == (None if perplexity is None else pytest.approx(perplexity))


def test_codes_are_of_autoencoders_only():
    with pytest.raises(UsageError, match="use --autoencoder"):
        evaluate(images="a", data="b", metrics=["codebook"])


def test_every_option_of_sampling_is_in_the_protocol_and_changes_the_samples(text_model):
    options = {
        "steps": 2,
        "sampler": "ddim",
        "eta": 0.5,
        "temperature": 0.9,
        "spacing": "linspace",
        "guidance-interval": "0.1,1",
        "guidance": "text=40",
        "negative-prompt": "a large red circle",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    ending = commands.ldm("eval-fid", "--model", text_model, "--split", "train", "-n", 4, "--json", *words)
    assert ending.code == 0, ending.stderr
    expected = {name.replace("-", "_"): value for name, value in options.items()} | {"seed": 0}
    expected |= {"guidance": {"text": 40.0}, "guidance_interval": [0.1, 1.0]}
    assert ending.json["sampling"] == expected
    for name in ("eta", "guidance", "negative-prompt", "spacing"):
        fewer = [word for key, value in options.items() if key != name for word in (f"--{key}", value)]
        if name == "guidance":
            fewer += ["--guidance", "1.0"]
        other = commands.ldm("eval-fid", "--model", text_model, "--split", "train", "-n", 4, "--json", *fewer)
        assert other.json["metrics"] != ending.json["metrics"], name


@pytest.mark.parametrize("name, value", [("eta", "1"), ("steps", "4"), ("negative-prompt", "x"), ("guide-factor", "4")])
def test_options_of_samples_are_refused_where_nothing_is_sampled(tmp_path, name, value):
    ending = commands.ldm("eval-fid", "--images", tmp_path, "--data", "shapes", f"--{name}", value)
    assert ending.code == 2 and f"--{name}" in ending.line


def test_reconstructions_of_several_autoencoders_stand_on_one_sheet(stages, tmp_path):
    images = tmp_path / "in"
    commands.noisy_images(images, 3)
    words = (
        "reconstruct",
        images,
        *(word for stage in stages for word in ("--autoencoder", stage)),
        "--out",
        tmp_path / "out",
    )
    ending = commands.ldm(*words, "--json")
    assert ending.code == 0, ending.stderr
    assert ending.json["autoencoders"] == [str(stage) for stage in stages] and len(ending.json["psnr"]) == 2
    assert [len(row["results"]) for row in ending.json["images"]] == [2, 2, 2]
    with Image.open(tmp_path / "out" / "grid.png") as sheet:
        assert sheet.width == 3 * 256 + 4 * 2 and sheet.height > 3 * 256
    with Image.open(tmp_path / "out" / "000000.png") as row:
        three = np.asarray(row)
    for k, stage in enumerate(stages):
        single = commands.ldm("reconstruct", images, "--autoencoder", stage, "--out", tmp_path / f"one{k}", "--json")
        assert json.dumps(single.json["images"][1]["psnr"]) == json.dumps(
            ending.json["images"][1]["results"][k]["psnr"]
        )
        with Image.open(tmp_path / f"one{k}" / "000000.png") as pair:
            assert np.array_equal(np.asarray(pair)[:, 24:44], three[:, 24 + 22 * k : 44 + 22 * k])
    assert commands.ldm(*words).code == 2, "nothing is overwritten"

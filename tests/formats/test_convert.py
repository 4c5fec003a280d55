"""`ldm convert`: what it writes, what it refuses, and the lines of the README for each kind of checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compvis_checkpoints import KINDS, VQ, random_checkpoint
from PIL import Image
from tiny import ldm, same, state, weights

import ldmcli
from ldmcli.formats import run_folder


def vocabulary(folder: Path) -> Path:
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}\n')
    return folder


def picture(path: Path, size: int, mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(0).integers(0, 4 if mode == "L" else 256, (size, size) + (3,) * (mode == "RGB"))
    Image.fromarray(pixels.astype(np.uint8), mode).save(path)
    return path


def drawn(folder: Path, kind: str, model: Path) -> None:
    """Asks a model of that kind for a picture by the command of the README."""
    draw = ("sample", "--model", model, "--steps", 2, "-n", 1, "--out", folder / "out")
    layout = folder / "boxes.json"
    layout.write_text(json.dumps({"objects": [{"bbox": [0.1, 0.1, 0.5, 0.5], "category": 7}]}))
    commands = {
        "unconditional": draw,
        "class": (*draw, "--class", 3),
        "text": (*draw, "--prompt", "a red circle"),
        "layout": (*draw, "--layout", layout),
        "map": (*draw, "--map", picture(folder / "map.png", 32, "L")),
        "sr": (
            "upscale",
            picture(folder / "small.png", 8),
            "--scale",
            4,
            "--model",
            model,
            "--steps",
            2,
            "--out",
            folder / "out",
        ),
        "inpaint": (
            "inpaint",
            picture(folder / "whole.png", 32),
            "--box",
            "8,8,12,12",
            "--model",
            model,
            "--steps",
            2,
            "--out",
            folder / "out",
        ),
    }
    ending = ldm(*commands[kind])
    assert ending.code == 0, ending.stderr
    assert list((folder / "out").rglob("*.png"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_each_kind_converts_and_draws(tmp_path, kind):
    path = random_checkpoint(tmp_path / "theirs", kind)
    more = ("--tokenizer", vocabulary(tmp_path / "words")) if kind == "text" else ()
    ending = ldm("convert", path, tmp_path / "run", *more)
    assert ending.code == 0, ending.stderr
    drawn(tmp_path, kind, tmp_path / "run")
    assert state(tmp_path / "run")["state"] == "finished" and (tmp_path / "run" / "README.md").exists()
    assert ldm("report", tmp_path / "run").code == 0
    assert ldm("runs", tmp_path).code == 0


@pytest.mark.parametrize("kind", ("unconditional", "class"))
def test_commands_take_a_checkpoint_as_it_is(tmp_path, kind):
    drawn(tmp_path, kind, random_checkpoint(tmp_path / "theirs", kind, ".safetensors", VQ))
    model = tmp_path / "theirs" / "model.safetensors"
    ending = ldm("reconstruct", picture(tmp_path / "x.png", 32), "--autoencoder", model, "--out", tmp_path / "pairs")
    assert ending.code == 0, ending.stderr


def test_a_folder_with_one_checkpoint(tmp_path):
    random_checkpoint(tmp_path / "theirs", "class")
    assert ldmcli.load(tmp_path / "theirs").kind == "diffusion"


def test_a_text_model_without_a_tokenizer_takes_tokens_only(tmp_path):
    path = random_checkpoint(tmp_path / "theirs", "text")
    ending = ldm("convert", path, tmp_path / "run")
    assert ending.code == 0 and "no tokenizer" in ending.stderr
    model = ldmcli.load(tmp_path / "run")
    assert model.embed(tokens=torch.ones(1, 8, dtype=torch.int64)).shape == (1, 8, 16)
    ending = ldm("sample", "--model", tmp_path / "run", "--prompt", "x", "--out", tmp_path / "out")
    assert ending.code == 3 and "--tokenizer" in ending.line


def test_a_tokenizer_with_more_words_than_the_model_knows(tmp_path):
    path, words = random_checkpoint(tmp_path / "theirs", "text"), vocabulary(tmp_path / "words")
    (words / "vocab.txt").write_text((words / "vocab.txt").read_text() + "\n".join(f"w{k}" for k in range(99)) + "\n")
    ending = ldm("convert", path, tmp_path / "run", "--tokenizer", words)
    assert ending.code == 4 and "knows 40" in ending.line


def test_training_in_the_latents_of_a_checkpoint(tmp_path):
    from tiny import train_ldm

    path = random_checkpoint(tmp_path / "theirs", "unconditional")
    train_ldm(tmp_path / "run", path, "--size", "16x16", steps=1)
    inner = run_folder.read(tmp_path / "run").autoencoder
    assert same(inner.tensors, ldmcli.load(path).autoencoder.network.state_dict())


def test_nothing_is_overwritten(tmp_path):
    path = random_checkpoint(tmp_path / "theirs", "class")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    for more in ((), ("--overwrite",)):
        assert ldm("convert", path, tmp_path / "full", *more).code == 2
    assert (tmp_path / "full" / "letter.txt").read_text() == "dear"
    assert ldm("convert", path, tmp_path / "run").code == 0
    assert ldm("convert", path, tmp_path / "run").code == 2
    assert ldm("convert", path, tmp_path / "run", "--overwrite").code == 0
    assert ldm("convert", path, path.parent).code == 2
    back = ("convert", tmp_path / "run", path, "--to", "compvis")
    assert ldm(*back).code == 2 and ldm(*back, "--overwrite").code == 0
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (("convert", "RUN", "out"), 2, "--to"),
        (("convert", "RUN", "out", "--to", "compvis"), 2, ".ckpt"),
        (("convert", "RUN", "out.ckpt", "--to", "compvis", "--config", "YAML"), 2, "--config"),
        (("convert", "CKPT", "out", "--config", "nowhere.yaml"), 2, "no such file"),
        (("convert", "CKPT", "out", "--heads", "lots"), 4, "--heads"),
        (("convert", "nowhere.ckpt", "out"), 4, "nowhere.ckpt: no such file"),
        (("convert", "runs/nowhere", "out"), 4, "no such run folder"),
        (("convert", "CKPT"), 2, "DST"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    path = random_checkpoint(tmp_path / "theirs", "class")
    assert ldm("convert", path, tmp_path / "run").code == 0
    places = {"RUN": tmp_path / "run", "CKPT": path, "YAML": path.with_suffix(".yaml")}
    ending = ldm(*(places.get(word, word) for word in arguments))
    assert (ending.code, words in ending.line) == (code, True), ending.stderr
    assert not (tmp_path / "out").exists()


def test_the_document(tmp_path):
    path = random_checkpoint(tmp_path / "theirs", "class")
    found = ldm("convert", path, tmp_path / "run", "--json").json
    told = [found[key] for key in ("kind", "conditions", "format", "to")]
    assert told == ["diffusion", ["class"], "compvis", "run"]
    assert found["parameters"]["model"] == sum(t.numel() for t in weights(tmp_path / "run").values())


def test_a_configuration_of_another_model(tmp_path):
    path = random_checkpoint(tmp_path / "theirs", "class")
    other = random_checkpoint(tmp_path / "other", "map")
    ending = ldm("convert", path, tmp_path / "run", "--config", other.with_suffix(".yaml"))
    assert ending.code == 4 and len(ending.stderr.strip().splitlines()) == 1


def test_without_a_configuration_an_unpublished_model_is_refused(tmp_path):
    path = random_checkpoint(tmp_path / "theirs", "class")
    path.with_suffix(".yaml").unlink()
    ending = ldm("convert", path, tmp_path / "run")
    assert ending.code == 4 and "--config" in ending.line

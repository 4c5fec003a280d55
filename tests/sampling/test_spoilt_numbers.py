"""NaN and Inf are refused by name, wherever they come from; weights are found under other names and among variants."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compvis_checkpoints import random_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import checkpoint, ldm, noisy_images, same, train_ae, train_ldm, weights
from tiny import state as state_of

from ldmcli.core import files, runs
from ldmcli.core.errors import DivergedError, InputError, ModelError
from ldmcli.diffusion import sample
from ldmcli.evaluation.evaluate import evaluate
from ldmcli.maths.pixels import tensor_to_pixels
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.training.outcomes import Outcomes, Step

FAST = ("--steps", 3, "--sampler", "ddim")


@pytest.fixture(scope="module")
def models(tiny_runs, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("spoilt") / "diffusers"
    assert ldm("convert", tiny_runs["plain"], folder, "--to", "diffusers").code == 0
    return {name: tiny_runs[name] for name in ("kl", "plain", "sr", "inpaint")} | {"diffusers": folder}


def spoil(path: Path, value: float) -> str:
    """Puts one such number into the last tensor of floats; returns its name. A run's own hash is made to fit."""
    state = load_file(path)
    name = sorted(name for name, tensor in state.items() if tensor.is_floating_point())[-1]
    state[name].view(-1)[-1] = value
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    if "content_sha256" in metadata:
        metadata["content_sha256"] = files.tensors_hash(state)
    save_file(state, path, metadata)
    return name


WEIGHTS = {  # model → the file in it that is spoilt
    "plain": "model.safetensors",
    "kl": "model.safetensors",
    "plain/autoencoder": "autoencoder/model.safetensors",
    "diffusers": "model/diffusion_pytorch_model.safetensors",
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", WEIGHTS)
def test_weights_that_are_not_finite_are_refused_by_the_name_of_the_tensor(models, tmp_path, which, value):
    kind = which.partition("/")[0]
    run = tmp_path / "model"
    shutil.copytree(models[kind], run)
    name = spoil(run / WEIGHTS[which], value)
    noisy_images(tmp_path / "in", 2)
    commands = [("convert", run, tmp_path / "out", "--to", "diffusers" if kind != "diffusers" else "run")]
    if kind == "kl":
        commands += [
            ("reconstruct", tmp_path / "in", "--autoencoder", run),
            ("train-ldm", "--autoencoder", run, "--data", "shapes", "--limit", 8, "--size", 20, "--steps", 1),
        ]
    else:
        commands += [("sample", "--model", run, *FAST, "-n", 1)]
    for command in commands:
        more = () if command[0] == "convert" else ("--out", tmp_path / "out")
        ending = ldm(*command, *more)
        assert ending.code == 4 and name in ending.line and "NaN or Inf" in ending.line, ending.stderr
        assert not list(tmp_path.glob("out/**/*.png"))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_checkpoint_of_others_is_refused_by_its_own_names_and_unused_entries_may_hold_anything(tmp_path, suffix):
    path = random_checkpoint(tmp_path, "unconditional", suffix)
    state = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)["state_dict"]
    stray = {"lvlb_weights": torch.tensor([float("inf"), 1.0])}  # as published: the first of them is none

    def write(changed: dict) -> None:
        save_file(changed, path) if suffix == ".safetensors" else torch.save({"state_dict": changed}, path)

    write(state | stray)
    assert ldm("convert", path, tmp_path / "run").code == 0
    name = "model.diffusion_model.out.2.bias"
    write(state | {name: torch.full_like(state[name], float("nan"))})
    ending = ldm("convert", path, tmp_path / "other")
    assert ending.code == 4 and name in ending.line, ending.stderr


def test_a_training_does_not_go_on_from_spoilt_weights(models, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(models["kl"], run)
    newest = max((run / "checkpoints").iterdir())
    name = spoil(newest / "autoencoder.safetensors", float("nan"))
    manifest = json.loads((newest / "manifest.json").read_text())
    for listed in manifest["files"]:
        path = newest / listed
        manifest["files"][listed] = {"size": path.stat().st_size, "sha256": files.sha256_file(path)}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert not runs.problems(newest)
    ending = train_ae(run, steps=5, code=4)
    assert name in ending.line


@pytest.mark.parametrize(("of", "value"), [("mean", float("nan")), ("std", 0.0), ("std", float("inf"))])
def test_a_latent_scale_that_is_none_is_refused(models, tmp_path, of, value):
    run = tmp_path / "run"
    shutil.copytree(models["plain"], run)
    stats = json.loads((run / "stats.json").read_text())
    stats["latent_scale"][of][0] = value
    (run / "stats.json").write_text(json.dumps(stats))
    ending = ldm("sample", "--model", run, *FAST, "-n", 1, "--out", tmp_path / "out")
    assert ending.code == 4 and "latent_scale" in ending.line, ending.stderr


@pytest.mark.parametrize("key", ["mu", "sigma"])
def test_statistics_that_are_not_finite_are_refused_by_name(tmp_path, key):
    found = {"mu": np.zeros(1280), "sigma": np.eye(1280)}
    found[key].flat[7] = np.nan
    np.savez(tmp_path / "reference.npz", **found)
    noisy_images(tmp_path / "in", 3)
    ending = ldm(
        "eval-fid", "--images", tmp_path / "in", "--data", tmp_path / "reference.npz", "--features", "effnet-lite0"
    )
    assert ending.code == 3 and key in ending.line and "NaN" in ending.line


def test_networks_that_measure_are_refused_by_the_name_of_the_tensor(tmp_path):
    from ldmcli.networks.feature_nets import read_weights

    state = {"features.0.weight": torch.ones(3), "features.1.bias": torch.tensor([1.0, float("nan")])}
    save_file(state, tmp_path / "net.safetensors")
    torch.save(state, tmp_path / "net.pth")
    for name in ("net.safetensors", "net.pth"):
        with pytest.raises(InputError, match="features.1.bias"):
            read_weights(tmp_path / name)
    wrapped = {"state_dict": {f"module._orig_mod.{name}": torch.ones(2) for name in state}, "epoch": 3}
    torch.save(wrapped, tmp_path / "net.pth")
    assert read_weights(tmp_path / "net.pth").keys() == state.keys()


def test_a_large_sum_of_finite_numbers_is_no_infinity():
    files.require_finite(
        {
            "a": torch.full((1000,), 3e38),
            "b": torch.full((99,), 60000.0, dtype=torch.float16),
            "c": torch.arange(4),
            "d": torch.zeros(0),
        },
        "here",
    )
    with pytest.raises(ModelError, match=r"here: NaN or Inf in a0, a1, a2 and 2 more \(5 of 6 tensors\)"):
        files.require_finite({f"a{k}": torch.tensor([float("nan")]) for k in range(5)} | {"b": torch.ones(1)}, "here")


# --- while something is drawn -------------------------------------------------------------------------------------


def overflowing(monkeypatch, call: int, row: int) -> None:
    """The network's output of one call becomes infinite for one sample."""
    calls, predict = [], DiffusionModel.predict

    def spoilt(self, z, t, conditioning):
        out = predict(self, z, t, conditioning)
        calls.append(1)
        if len(calls) == call:
            out = out.clone()
            out[row, 0, 0, 0] = float("inf")
        return out

    monkeypatch.setattr(DiffusionModel, "predict", spoilt)


DRAWERS = {
    "sample": ("plain", ("sample", "-n", 3)),
    "inpaint": ("inpaint", ("inpaint", "photo.png", "--box", "1,1,9,9", "-n", 3)),
    "inpaint, not trained to": ("plain", ("inpaint", "photo.png", "--box", "1,1,9,9", "-n", 3)),
    "upscale": ("sr", ("upscale", "photo.png", "--scale", 2, "-n", 3)),
}


@pytest.mark.parametrize("name", DRAWERS)
def test_a_model_that_overflows_is_told_with_step_and_sample_and_writes_nothing(models, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    noisy_images(tmp_path, 1)[0].rename("photo.png")
    model, asked = DRAWERS[name]
    overflowing(monkeypatch, 2, 1)
    ending = ldm(*asked, "--model", models[model], *FAST, "--guidance", 1, "--out", "out")
    assert ending.code == 4 and "NaN or Inf in sample 1, from call 2 of" in ending.line, ending.stderr
    assert not list(Path("out").glob("*.png"))


@pytest.mark.parametrize("dtype, advised", [(torch.float16, True), (torch.bfloat16, False), (None, False)])
def test_a_wider_format_is_advised_where_float16_was_in_use(dtype, advised):
    """By the sampler, the decoder and the training, whose format is the run's."""
    x = torch.full((1, 3, 4, 4), float("inf"))
    raised = []
    with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
        for fails in (lambda: sample._finite(x, [], [0]), lambda: tensor_to_pixels(x)):
            with pytest.raises(ModelError) as found:
                fails()
            raised.append(str(found.value))
    outcomes = object.__new__(Outcomes)
    settings, progress = SimpleNamespace(max_bad_steps=1), SimpleNamespace(bad_in_a_row=0)
    outcomes.state = SimpleNamespace(settings=settings, progress=progress, dist=SimpleNamespace(dtype=dtype))
    outcomes.logger = SimpleNamespace(log_nonfinite=lambda *given: None)
    outcomes.folder = SimpleNamespace(path="run")
    with pytest.raises(DivergedError) as diverged:
        outcomes._count_bad(Step(1, torch.zeros(0), {}, None))
    raised.append(str(diverged.value))
    assert [("--mixed-precision bf16, or no" in text) for text in raised] == [advised] * 3


def test_a_measure_of_a_model_that_overflows_is_no_number(models, monkeypatch):
    overflowing(monkeypatch, 1, 0)
    with pytest.raises(ModelError, match="sample 0"):
        evaluate(model=models["plain"], data="shapes", n=4, steps=2)


def test_a_decoder_that_overflows_gives_no_black_pictures(models, tmp_path, monkeypatch):
    from ldmcli.networks.autoencoder import Autoencoder

    decode = Autoencoder.decode
    monkeypatch.setattr(Autoencoder, "decode", lambda self, z: decode(self, z) * float("nan"))
    noisy_images(tmp_path / "in", 1)
    for asked in (
        ("sample", "--model", models["plain"], *FAST, "-n", 1),
        ("reconstruct", tmp_path / "in", "--autoencoder", models["kl"]),
    ):
        ending = ldm(*asked, "--out", tmp_path / "out")
        assert ending.code == 4 and "1 of 1 decoded pictures" in ending.line, ending.stderr
        assert not list((tmp_path / "out").glob("*.png"))
    with pytest.raises(ModelError):
        tensor_to_pixels(torch.tensor([[[[float("inf")]]]]))


def test_a_preview_that_overflows_does_not_end_a_training(models, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sample, "_watched", lambda denoise: (lambda *given: tuple(float("nan") * one for one in denoise(*given)), [])
    )
    ending = train_ldm(tmp_path / "run", models["kl"], "--sample-every", 1, steps=2)
    assert "no preview at step 1" in ending.stderr and state_of(tmp_path / "run")["step"] == 2
    assert checkpoint(tmp_path / "run")


# --- names of wrappers, files side by side ------------------------------------------------------------------------

WRAPPERS = {
    "DDP": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "both": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "compiled inside": lambda state: {
        name.replace("model.diffusion_model.", "model.diffusion_model._orig_mod.").replace(
            "decoder.", "decoder._orig_mod."
        ): tensor
        for name, tensor in state.items()
    },
    "in a model": lambda state: {f"model.{name}": tensor for name, tensor in state.items()},
    "in a system": lambda state: {f"system.net.{name}": tensor for name, tensor in state.items()},
}


@pytest.mark.parametrize("part", ["whole", "first stage"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_are_found_under_wrapped_names(tmp_path, wrapper, part):
    path = random_checkpoint(tmp_path / "plain", "unconditional", ".safetensors")
    state = load_file(path)
    if part == "first stage":
        state = {
            name.removeprefix("first_stage_model."): tensor
            for name, tensor in state.items()
            if name.startswith("first_stage_model.")
        }
        path.with_suffix(".yaml").unlink()
        save_file(state, path)
    assert ldm("convert", path, tmp_path / "a").code == 0
    save_file({name: tensor.clone() for name, tensor in WRAPPERS[wrapper](state).items()}, path)
    ending = ldm("convert", path, tmp_path / "b")
    assert ending.code == 0, ending.stderr
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_name_with_and_without_a_wrapper_is_refused(tmp_path):
    path = random_checkpoint(tmp_path, "unconditional", ".safetensors")
    state = load_file(path)
    name = "model.diffusion_model.out.2.bias"
    save_file(state | {f"module.{name}": state[name] + 1}, path)
    ending = ldm("convert", path, tmp_path / "run")
    assert ending.code == 4 and name in ending.line and "twice" in ending.line


@pytest.fixture
def vae(models, tmp_path) -> tuple[Path, dict]:
    """A folder of an autoencoder as diffusers keeps it, and its weights."""
    path = random_checkpoint(tmp_path / "theirs", "unconditional")
    assert ldm("convert", path, tmp_path / "run").code == 0
    assert ldm("convert", tmp_path / "run", tmp_path / "whole", "--to", "diffusers").code == 0
    folder = tmp_path / "whole" / "vae"
    folder = folder if folder.is_dir() else tmp_path / "whole" / "vqvae"
    stem = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(stem)
    stem.unlink()
    return folder, state


def half(state: dict) -> dict:
    return {name: tensor.half() for name, tensor in state.items()}


def sharded(folder: Path, state: dict, kind: str, variant: str = "") -> str:
    names, shards = sorted(state), []
    for k in (1, 2):
        shards.append(f"diffusion_pytorch_model{variant}-{k:05d}-of-00002.{kind}")
        part = {name: state[name] for name in names[k - 1 :: 2]}
        save_file(part, folder / shards[-1]) if kind == "safetensors" else torch.save(part, folder / shards[-1])
    index = f"diffusion_pytorch_model.{kind}.index{variant}.json"
    (folder / index).write_text(json.dumps({"weight_map": {name: shards[k % 2] for k, name in enumerate(names)}}))
    return index


@pytest.mark.parametrize(
    "layout",
    [
        "fp16 and full",
        "fp16 alone",
        "bin beside",
        "bin alone",
        "index of fp16 beside",
        "shards alone",
        "shards of bin",
        "ema beside non_ema",
    ],
)
def test_of_files_side_by_side_the_full_one_is_taken_and_said(vae, tmp_path, layout):
    folder, state = vae
    stem = folder / "diffusion_pytorch_model"
    exact, said = True, "weights of "
    if layout == "fp16 and full":
        save_file(half(state), f"{stem}.fp16.safetensors")
        save_file(state, f"{stem}.safetensors")
        said = f"weights of {folder.name}/diffusion_pytorch_model.safetensors; not read: diffusion_pytorch_model.fp16"
    elif layout == "fp16 alone":
        save_file(half(state), f"{stem}.fp16.safetensors")
        exact = False
    elif layout == "bin beside":
        torch.save(half(state), f"{stem}.bin")
        save_file(state, f"{stem}.safetensors")
    elif layout == "bin alone":
        torch.save(state, f"{stem}.bin")
        said = ""
    elif layout == "index of fp16 beside":
        sharded(folder, half(state), "safetensors", ".fp16")
        sharded(folder, state, "safetensors")
    elif layout == "ema beside non_ema":
        save_file({name: tensor + 1 for name, tensor in state.items()}, f"{stem}.non_ema.safetensors")
        save_file(state, f"{stem}.ema.safetensors")
    else:
        sharded(folder, state, "bin" if "bin" in layout else "safetensors")
        said = ""
    ending = ldm("convert", folder, tmp_path / "out")
    assert ending.code == 0, ending.stderr
    assert said in ending.stderr and (said or "weights of" not in ending.stderr)
    whole, found = weights(tmp_path / "run" / "autoencoder"), weights(tmp_path / "out")
    assert whole.keys() == found.keys() and same(whole, found) == exact


def test_an_index_that_leads_to_itself_or_elsewhere_is_refused(vae, tmp_path):
    folder, state = vae
    index = sharded(folder, state, "safetensors")
    for target in (index, "../secret.safetensors", "notes.txt"):
        (folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(state, target)}))
        ending = ldm("convert", folder, tmp_path / "out")
        assert ending.code == 4 and target in ending.line, ending.stderr


def test_a_long_list_of_names_is_a_short_line(vae, tmp_path):
    folder, state = vae
    kept = dict(list(state.items())[:4])
    save_file(kept | {f"more.{k}": torch.ones(1) for k in range(40)}, folder / "diffusion_pytorch_model.safetensors")
    ending = ldm("convert", folder, tmp_path / "out")
    assert ending.code == 4 and "more.0, more.1, more.10 … (40)" in ending.line and len(ending.line) < 600


# --- how much of a set is measured against ------------------------------------------------------------------------


def saved(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    return folder


def test_the_share_of_a_set_that_is_measured_against_is_said_and_all_can_be_asked_for(tmp_path):
    folder = saved(tmp_path / "set", 16)
    asked = ("eval-fid", "--images", folder, "--data", folder, "--val-fraction", 0.3, "--features", "effnet-lite0")
    ending = ldm(*asked)
    counted = ldm(*asked, "--json").json
    share = counted["held_out"]
    assert share == {"rows": counted["n_reference"], "of": 16} and 2 <= share["rows"] < 10
    assert f"{share['rows']} of 16 rows" in ending.stderr and "--split all" in ending.stderr
    assert f"({share['rows']} held out of 16 rows)" in ending.stdout
    whole = ldm(*asked, "--split", "all")
    assert whole.code == 0 and "16 reference" in whole.stdout and "held out" not in whole.stdout + whole.stderr
    found = evaluate(images=folder, data=str(folder), split="all", features="effnet-lite0")
    assert found["n_reference"] == 16 and abs(found["metrics"][found["frechet"]]) < 1e-3  # with itself


def test_all_is_every_split_of_a_set_and_a_split_of_that_name_where_there_is_one(models, tmp_path):
    for name, count in (("train", 7), ("validation", 4), ("test", 3)):
        saved(tmp_path / "set" / name, count)
    asked = ("eval-fid", "--images", tmp_path / "set" / "train", "--data", tmp_path / "set", "--json")
    assert ldm(*asked).json["n_reference"] == 4 and "held_out" not in ldm(*asked).json
    assert ldm(*asked, "--split", "all").json["n_reference"] == 14
    assert ldm(*asked, "--split", "test").json["n_reference"] == 3
    ending = ldm(
        "eval-fid",
        "--model",
        models["plain"],
        "-n",
        3,
        "--steps",
        1,
        "--data",
        tmp_path / "set",
        "--split",
        "all",
        "--size",
        20,
        "--json",
    )
    assert ending.json["n_reference"] == 14, ending.stderr


def test_the_bound_on_reference_rows_is_said_and_all_has_none(tmp_path, monkeypatch):
    from ldmcli.evaluation import references

    monkeypatch.setattr(references, "REFERENCE_LIMIT", 6)
    for name in ("train", "validation"):
        saved(tmp_path / "set" / name, 9)
    found = evaluate(images=tmp_path / "set" / "train", data=str(tmp_path / "set"), features="effnet-lite0")
    assert found["n_reference"] == 6 and any("6 of 9 rows" in text for text in found["warnings"])
    found = evaluate(
        images=tmp_path / "set" / "train", data=str(tmp_path / "set"), split="all", features="effnet-lite0"
    )
    assert found["n_reference"] == 18 and not any("rows, evenly" in text for text in found["warnings"])

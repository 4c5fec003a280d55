"""The number format of what is drawn, compiled networks, and where it is said: heavy arithmetic changes, no more."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

import ldmcli
from ldmcli.core.errors import UsageError
from ldmcli.evaluation import subjects
from ldmcli.evaluation.compare import compare
from ldmcli.evaluation.image_streams import model_source
from ldmcli.sampling import memory
from ldmcli.sampling.draw import Draw, draw_images, draw_latents
from ldmcli.sampling.machine import inference_dtype

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))
FAST = ("--steps", 2, "--sampler", "ddim")
HEAVY = ("convolution", "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu")


class Heavy(TorchDispatchMode):
    """Formats of what convolutions and matrix products are given."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.partition("::")[2] in HEAVY:
            self.seen.add(next(arg.dtype for arg in args if isinstance(arg, torch.Tensor)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "setting, device, has_bf16, dtype",
    [
        ("auto", CUDA, True, torch.bfloat16),
        ("auto", CUDA, False, torch.float16),
        ("auto", CPU, True, None),
        ("auto", MPS, True, None),
        ("no", CUDA, True, None),
        ("bf16", CPU, False, torch.bfloat16),
        ("fp16", CUDA, True, torch.float16),
    ],
)
def test_the_format_in_use_is_the_best_that_a_gpu_has(setting, device, has_bf16, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert inference_dtype(setting, device) == dtype


@pytest.mark.parametrize("setting", ["fp16", "half"])
def test_a_format_that_a_cpu_lacks_is_refused(setting):
    with pytest.raises(UsageError, match="--mixed-precision"):
        inference_dtype(setting, CPU)


@pytest.mark.parametrize("name", ["text", "sr", "inpaint"])
def test_draws_run_in_the_format_and_states_and_pixels_stay_float32(name, tiny_runs):
    exact, low = (ldmcli.load(tiny_runs[name], mixed_precision=setting) for setting in ("no", "bf16"))
    assert (exact.precision, low.precision) == ("float32", "bfloat16")
    values = {"text": {"text": ["a red star"]}, "sr": {"lowres": [np.zeros((10, 10, 3), np.uint8)]}}
    hole = np.zeros((20, 20), bool)
    hole[5:9, 5:9] = True
    values["inpaint"] = {"masked": [(np.zeros((20, 20, 3), np.uint8), hole)]}
    states, how = [], {"steps": 3, "guidance": 2.0}
    draw = Draw(ids=[0], values=values[name], settings=how, callback=lambda i, *found: states.append(found))
    with Heavy() as heavy:
        images = draw_images(low, draw)
    assert heavy.seen == {torch.bfloat16} and {one.dtype for found in states for one in found} == {torch.float32}
    assert draw_latents(low, draw).dtype == torch.float32
    difference = np.abs(images.astype(int) - draw_images(exact, draw).astype(int))
    assert 0 < difference.max() and difference.mean() < 4


def test_calls_of_research_code_stay_float32(tiny_runs):
    model = ldmcli.load(tiny_runs["text"], mixed_precision="bf16")
    z = torch.randn(1, *model.network.latent_shape)
    with Heavy() as heavy:
        model.predict(z, 3, context=model.embed("a star"))
        model.autoencoder.decode(model.autoencoder.encode(np.zeros((1, 20, 20, 3), np.uint8)))
    assert heavy.seen == {torch.float32}


@pytest.mark.parametrize("tile", [0, 4])
def test_a_first_stage_gives_float32_and_works_in_the_format_whole_and_in_tiles(tile, tiny_runs):
    stage = ldmcli.load(tiny_runs["kl"], mixed_precision="bf16")
    with stage.autocast(), Heavy() as heavy:
        z = memory.encode(stage, np.zeros((1, 32, 32, 3), np.uint8), tile)
        x = memory.decode(stage, z, tile)
    assert heavy.seen == {torch.bfloat16} and z.dtype == x.dtype == torch.float32


# --- what is said ------------------------------------------------------------------------------------------------


def test_pictures_and_their_request_name_a_format_other_than_float32(tiny_runs, tmp_path):
    words = ("sample", "--model", tiny_runs["text"], "--prompt", "a star", *FAST, "--json")
    plain = tiny.ldm(*words, "--out", tmp_path / "plain")
    low = tiny.ldm(*words, "--out", tmp_path / "low", "--mixed-precision", "bf16")
    assert low.code == 0 and low.json["precision"] == "bfloat16" and "precision" not in plain.json
    for name, said in (("plain", None), ("low", "bfloat16")):
        assert json.loads((tmp_path / name / "request.json").read_text()).get("precision") == said
        with Image.open(tmp_path / name / "000000.png") as image:
            assert json.loads(image.text["ldm"]).get("precision") == said
    again = tiny.ldm(*words, "--out", tmp_path / "low")
    assert again.code == 2 and "another request" in again.line


@pytest.mark.parametrize("subject, run", [("model", "sr"), ("autoencoder", "kl")])
def test_a_result_states_the_format_and_compares_with_a_warning(subject, run, tiny_runs, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    steps = ("--steps", 1) if subject == "model" else ()
    words = ("eval-fid", f"--{subject}", tiny_runs[run], "--data", "shapes", "-n", 4, "--metrics", "psnr", *steps)
    exact, low = (tiny.ldm(*words, "--json", "--mixed-precision", setting).json for setting in ("no", "bf16"))
    assert (exact["precision"], low["precision"]) == ("float32", "bfloat16")
    assert exact["metrics"] != low["metrics"], "what is kept of one format does not serve the other"
    assert exact["generated"].get("precision") is None and low["generated"]["precision"] == "bfloat16"
    found = compare(low, {name: value for name, value in exact.items() if name != "precision"})  # of an older version
    assert "precision (float32 then, bfloat16 now)" in found["warnings"]
    assert all("precision float32 then, bfloat16 now" in one["why"] for one in found["metrics"].values())


def test_samples_of_two_formats_are_kept_under_two_names(tiny_runs):
    how = {"seed": 0, "batch_size": 2, "size": (20, 20), "settings": {}}
    models = [ldmcli.load(tiny_runs["plain"], mixed_precision=setting) for setting in ("no", "bf16")]
    assert len({model_source(model, None, 4, **how).key for model in models}) == 2


def test_reconstructions_of_two_formats_are_kept_under_two_names(tiny_runs, monkeypatch):
    keys, paired = [], subjects.paired
    monkeypatch.setattr(subjects, "paired", lambda *args, **how: keys.append(args[2].key) or paired(*args, **how))
    for setting in ("no", "bf16"):
        stage = ldmcli.load(tiny_runs["kl"], mixed_precision=setting)
        ldmcli.evaluate(autoencoder=stage, data="shapes", n=2, metrics=["psnr"])
    assert len(set(keys)) == 2 and all(keys)


def test_a_format_of_images_that_nothing_makes_is_refused(tmp_path):
    ending = tiny.ldm("eval-fid", "--pairs", tmp_path, tmp_path, "--mixed-precision", "bf16")
    assert ending.code == 2 and "--mixed-precision" in ending.line


# --- compiled ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text", "sr"])
def test_compiled_networks_draw_the_same_pictures(name, tiny_runs, monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    compiler = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiler(self, backend=backend, **how))
    plain, fast = (ldmcli.load(tiny_runs[name], compile=on) for on in (False, True))
    values = {"text": {"text": ["a red star"] * 2}, "sr": {"lowres": [np.zeros((12, 12, 3), np.uint8)] * 2}}[name]
    draw = Draw(ids=[0, 1], values=values, settings={"steps": 4, "guidance": 2.0}, size=(24, 24))
    difference = draw_images(plain, draw).astype(int) - draw_images(fast, draw)
    assert abs(difference).max() <= 1
    once = len(compiled)
    assert once == (3 if name == "sr" else 2), "UNet, decoder, and the encoder where a picture is given"
    draw_images(fast, draw)
    memory.largest_tile(fast, (64, 64), 4.0)  # measured by shapes alone
    assert len(compiled) == once, "once a size"

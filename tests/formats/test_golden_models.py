"""Recorded outputs of the original code, through the command line and the public calls of a loaded model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import decided, relative, shared
from safetensors.torch import load_file
from tiny import ldm, state

import ldmcli
from ldmcli.core.settings import DiffusionSettings
from ldmcli.diffusion.sample import KnownRegion, replace_known_region
from ldmcli.diffusion.schedule import sampling_levels

FORWARD, QUANTISED, TRAJECTORY = 1e-5, 2e-5, 1e-4  # float32 rounds by CPU: up to 8e-6 of a forward pass were seen
CASES = (
    "kl_f4_attn",
    "vq_f4_noattn",
    "unet_uncond",
    "unet_class_crossattn",
    "unet_text_bert",
    "unet_concat_inpaint",
    "unet_semantic_rescaler",
    "full_checkpoint",
)
READINGS = ("converted", "direct")


def checkpoint(case: str) -> Path:
    """The file of a case."""
    return shared("golden", case, "model.ckpt" if case == "full_checkpoint" else "model.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(case, reading) -> model, each loaded once: converted by the command line, or read as it is."""
    folder, loaded = tmp_path_factory.mktemp("converted"), {}

    def get(case: str, reading: str):
        if (case, reading) not in loaded:
            source = checkpoint(case)
            if reading == "converted":
                ending = ldm("convert", source, folder / case, "--config", source.parent / "config.yaml")
                assert ending.code == 0, ending.stderr
                source = folder / case
            loaded[case, reading] = ldmcli.load(source)
        return loaded[case, reading]

    return get


def recorded(case: str) -> dict[str, torch.Tensor]:
    return load_file(shared("golden", case, "io.safetensors"))


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("case", CASES)
def test_every_case_converts(models, case, reading):
    model = models(case, reading)
    assert model.kind == ("autoencoder" if case in CASES[:2] else "diffusion")


@pytest.mark.parametrize("reading", READINGS)
def test_kl(models, reading):
    ae, io = models("kl_f4_attn", reading), recorded("kl_f4_attn")
    mean, logvar = ae.moments(io["x"])
    assert relative(mean, io["mean"]) < FORWARD and relative(logvar, io["logvar"]) < FORWARD
    assert relative(ae.decode(mean), io["rec_mode"]) < FORWARD
    assert relative(ae.decode(mean + (logvar / 2).exp() * io["eps"]), io["rec_sample"]) < FORWARD


def clear(network, h: torch.Tensor) -> bool:
    """Whether every latent keeps its code where it is off by what is allowed."""
    return bool(decided(h, network.quantize.embedding.weight, FORWARD * h.abs().max().item()).all())


@pytest.mark.parametrize("reading", READINGS)
def test_vq(models, reading):
    ae, io = models("vq_f4_noattn", reading), recorded("vq_f4_noattn")
    h = ae.moments(io["x"])
    assert relative(h, io["h"]) < FORWARD and clear(ae.network, io["h"])
    quant, indices = ae.quantize(h)
    assert torch.equal(indices, io["indices"]) and relative(quant, io["quant"]) < FORWARD
    assert relative(ae.decode(h), io["rec"]) < QUANTISED
    assert relative(ae.network.decode(ae.network.codes(io["indices"]), quantize=False), io["rec"]) < QUANTISED
    assert relative(ae.network.decode(h, quantize=False), io["rec_noquant"]) < FORWARD


@pytest.mark.parametrize("reading", READINGS)
def test_unconditional(models, reading):
    model, io = models("unet_uncond", reading), recorded("unet_uncond")
    assert relative(model.predict(io["x"], io["t"]), io["eps"]) < FORWARD
    assert model.config.sample.spacing == "original" and model.config.sample.sampler == "ddim"
    draws = {
        "ddim": {},
        "ddim_eta1": {"eta": 1.0, "noise": lambda i: io["ddim_eta1.step_noise"][i]},
        "plms": {"sampler": "plms"},
    }
    for name, settings in draws.items():
        got = model.sample_latents(io[f"{name}.x_T"], steps=10, **settings)
        assert relative(got, io[f"{name}.samples"]) < TRAJECTORY, name


def test_known_region(models):
    model, io = models("unet_uncond", "direct"), recorded("unet_uncond")
    levels = sampling_levels(model.schedule, 10, "original")
    known = KnownRegion(io["ddim_mask.x0"], io["ddim_mask.mask"])
    put_in = replace_known_region(known, levels, lambda i: io["ddim_mask.q_noise"][i])
    got = model.sample_latents(io["ddim_mask.x_T"], steps=10, before_step=put_in)
    assert relative(got, io["ddim_mask.samples"]) < TRAJECTORY


@pytest.mark.parametrize("t", (0, 1, 500, 999))
def test_one_ancestral_step(models, t):
    from ldmcli.diffusion.samplers import ddpm
    from ldmcli.diffusion.schedule import NoiseLevels, alpha_sigma, to_x0_eps

    model, io = models("unet_uncond", "direct"), recorded("unet_uncond")
    alphas, sigmas = alpha_sigma(model.schedule, torch.tensor([float(t), float(max(t - 1, 0))], dtype=torch.float64))
    ends = (1.0, 0.0) if t == 0 else (float(alphas[1]), float(sigmas[1]))
    levels = NoiseLevels((float(t),), (float(alphas[0]), ends[0]), (float(sigmas[0]), ends[1]))
    for name, clamp in (("clip0", False), ("clip1", True)):

        def denoise(z, time, alpha, sigma, clamp=clamp):
            x0, eps = to_x0_eps("eps", model.predict(z, torch.full((len(z),), time)), z, alpha, sigma)
            return (x0.clamp(-1, 1), eps) if clamp else (x0, eps)

        got = ddpm(denoise, io["ddim.x_T"], levels, noise=lambda i: io[f"ddpm.t{t}.noise"])
        assert relative(got, io[f"ddpm.t{t}.{name}"]) < FORWARD * 4


@pytest.mark.parametrize("reading", READINGS)
def test_classes(models, reading):
    model, io = models("unet_class_crossattn", reading), recorded("unet_class_crossattn")
    context, none = model.embed(classes=io["labels"].tolist()), model.embed(classes=io["uncond_labels"].tolist())
    assert relative(context, io["context"]) == 0 and relative(none, io["uncond_context"]) == 0
    assert relative(model.predict(io["x"], io["t"], context=context), io["eps"]) < FORWARD
    assert relative(model.predict(io["x"], io["t"], classes=io["labels"].tolist()), io["eps"]) < FORWARD
    assert relative(model.predict(io["x"], io["t"], context=none), io["eps_uncond"]) < FORWARD
    assert relative(model.sample_latents(io["ddim.x_T"], context=context, steps=10), io["ddim.samples"]) < TRAJECTORY
    for sampler in ("ddim", "plms"):
        got = model.sample_latents(
            io[f"{sampler}_cfg.x_T"], context=context, uncond=none, steps=10, guidance=3.0, sampler=sampler
        )
        assert relative(got, io[f"{sampler}_cfg.samples"]) < TRAJECTORY


def test_the_other_head_count_can_be_chosen_and_is_recorded(tmp_path):
    source, io = checkpoint("unet_class_crossattn"), recorded("unet_class_crossattn")
    assert ldm("convert", source, tmp_path / "one", "--heads", "legacy").code == 0
    assert any("1 head" in note for note in state(tmp_path / "one")["notes"])
    for model in (ldmcli.load(tmp_path / "one"), ldmcli.load(source, heads=1)):
        got = model.predict(io["x"], io["t"], context=io["context"])
        assert relative(got, io["eps_other_head_count"]) < FORWARD < relative(got, io["eps"])


@pytest.mark.parametrize("reading", READINGS)
def test_text(models, reading):
    model, io = models("unet_text_bert", reading), recorded("unet_text_bert")
    context, none = model.embed(tokens=io["tokens"]), model.embed(tokens=io["uncond_tokens"])
    assert relative(context, io["context"]) < FORWARD and relative(none, io["uncond_context"]) < FORWARD
    assert relative(model.network.conditions.entries["text"].encoder.logits(io["tokens"]), io["logits"]) < FORWARD
    assert relative(model.predict(io["x"], io["t"], context=context), io["eps"]) < FORWARD
    for sampler in ("ddim", "plms"):
        got = model.sample_latents(
            io[f"{sampler}_cfg.x_T"], context=context, uncond=none, steps=10, guidance=5.0, sampler=sampler
        )
        assert relative(got, io[f"{sampler}_cfg.samples"]) < TRAJECTORY
    assert model.autoencoder.scale.std == (1 / 0.18215,) * 4


@pytest.mark.parametrize("reading", READINGS)
def test_inpainting(models, reading):
    model, io = models("unet_concat_inpaint", reading), recorded("unet_concat_inpaint")
    assert relative(model.predict(io["x"], io["t"], concat=io["c_concat"]), io["eps"]) < FORWARD
    got = model.sample_latents(io["ddim.x_T"], concat=io["c_concat"], steps=10)
    assert relative(got, io["ddim.samples"]) < TRAJECTORY
    from ldmcli.networks.spatial_conditioners import masked_planes

    planes = masked_planes(io["masked_latent"], io["mask_pixels"][:, 0] > 0)
    assert torch.equal(planes, io["c_concat"])


def test_filled_holes_are_pasted_hard_and_truncated():
    io = recorded("unet_concat_inpaint")
    hole = (io["mask_pixels"][:1] > 0).float()
    image, decoded = (((io[name].clamp(-1, 1) + 1) / 2).clamp(0, 1) for name in ("image", "decoded"))
    composed = (1 - hole) * image + hole * decoded
    assert relative(composed, io["composed"]) < FORWARD
    truncated = (io["composed"] * 255).numpy().astype(np.uint8)
    assert np.array_equal(truncated, io["composed_uint8"].numpy())


@pytest.mark.parametrize("reading", READINGS)
def test_maps(models, reading):
    model, io = models("unet_semantic_rescaler", reading), recorded("unet_semantic_rescaler")
    planes = model.embed(map=list(io["seg_indices"].numpy().astype(np.uint8))).concat
    assert relative(planes, io["context"]) < FORWARD
    assert relative(model.predict(io["x"], io["t"], concat=planes), io["eps"]) < FORWARD
    assert relative(model.sample_latents(io["ddim.x_T"], concat=planes, steps=10), io["ddim.samples"]) < TRAJECTORY


@pytest.mark.parametrize("reading", READINGS)
def test_a_full_checkpoint(models, reading):
    model, io = models("full_checkpoint", reading), recorded("full_checkpoint")
    ae = model.autoencoder
    assert relative(ae.encode(io["image"]), io["z"]) < FORWARD and clear(ae.network, ae.scale.restore(io["z"]))
    assert relative(ae.decode(io["z"]), io["rec"]) < QUANTISED
    assert relative(ae.network.decode(ae.scale.restore(io["z"]), quantize=False), io["rec_noquant"]) < FORWARD
    context = model.embed(classes=io["labels"].tolist())
    assert relative(context, io["context"]) == 0
    assert relative(model.predict(io["x"], io["t"], context=context), io["eps_ema_weights"]) < FORWARD
    got = model.sample_latents(io["ddim_ema.x_T"], context=context, steps=10)
    assert relative(got, io["ddim_ema.samples"]) < TRAJECTORY
    plain = ae.network.decode(ae.scale.restore(io["ddim_ema.samples"]), quantize=False)
    assert relative(plain, io["decoded_noquant"]) < FORWARD


def test_raw_weights_of_a_full_checkpoint(tmp_path):
    source, io = checkpoint("full_checkpoint"), recorded("full_checkpoint")
    assert ldm("convert", source, tmp_path / "raw", "--weights", "raw").code == 0
    for model in (ldmcli.load(tmp_path / "raw"), ldmcli.load(source, weights="raw")):
        got = model.predict(io["x"], io["t"], context=io["context"])
        assert relative(got, io["eps_raw_weights"]) < FORWARD < relative(got, io["eps_ema_weights"])


def test_settings_of_a_converted_model(models):
    for case in CASES[2:]:
        settings: DiffusionSettings = models(case, "converted").config.diffusion
        assert (settings.prediction, settings.position, settings.patch) == ("eps", "none", 1)
        assert settings == models(case, "direct").config.diffusion
        assert models(case, "converted").fingerprint == models(case, "direct").fingerprint

"""Exported folders loaded and run by diffusers itself: the same network outputs, latents and pictures.

`make test-interop` runs these in an environment that has diffusers; elsewhere they are skipped.
"""

import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

real = pytest.importorskip("diffusers", reason="diffusers is not installed here; `make test-interop` brings it")

from diffusers_models import (  # noqa: E402
    CUSTOM,
    SHIFTED,
    SINGLE,
    UNEVEN,
    custom_model,
    model_of,
    small_model,
    small_stage,
    stage_of,
    text_model,
    trajectory,
)
from golden_cases import DATA, decided, relative, unpack  # noqa: E402

from ldmcli.core.settings import DiffusionSettings, SampleSettings  # noqa: E402
from ldmcli.diffusion.samplers import SAMPLERS  # noqa: E402
from ldmcli.diffusion.schedule import make_schedule, sampling_levels, to_x0_eps  # noqa: E402
from ldmcli.formats import diffusers as ours  # noqa: E402
from ldmcli.formats import schedulers  # noqa: E402
from ldmcli.formats.diffusers_files import read_config  # noqa: E402
from ldmcli.networks.autoencoder import split_moments  # noqa: E402
from ldmcli.networks.conditioners import Conditioning  # noqa: E402
from ldmcli.networks.latent_scale import LatentScale  # noqa: E402

CLOSE = 1e-4
KL8 = dict(f=8, channels=8, channel_mult=(1, 1, 2, 2), z_channels=4, embed_dim=4, attn_resolutions=(2,))
CROSS = {"attention_resolutions": (1, 2), "num_heads": 2}


def bundles(tmp_path):
    """A random model of each row of the table: name -> (bundle, pipeline)."""
    one = LatentScale((0.0,) * 4, (1 / 0.18215,) * 4)
    return {
        "uncond-vq": lambda: small_model(stage=small_stage(reg="vq"), scale=SINGLE),
        "uncond-vq-shifted": lambda: small_model(stage=small_stage(reg="vq"), scale=SHIFTED),
        "uncond-kl-channelwise": lambda: small_model(scale=UNEVEN),
        "uncond-film": lambda: small_model(
            diffusion={"scale_shift": True, "resblock_updown": True, "attention_resolutions": (1,)}
        ),
        "uncond-no-middle": lambda: small_model(diffusion={"middle_attention": False}),
        "uncond-v-cosine": lambda: small_model(diffusion={"prediction": "v", "schedule": "cosine"}),
        "text-f8": lambda: text_model(
            tmp_path, stage=small_stage(**KL8), scale=one, diffusion=CROSS, sample={"guidance": 5.0}
        ),
        "text-f2": lambda: text_model(tmp_path, diffusion=CROSS, scale=UNEVEN, sample={"guidance": 5.0}),
        "text-levels": lambda: text_model(
            tmp_path, diffusion={"level_heads": (4, 2), "attention_resolutions": (1, 2), "transformer_depth": 2}
        ),
        "pixels": lambda: replace(small_model(), autoencoder=None),
        "superres": lambda: small_model(
            task={"name": "sr", "scale": 2},
            stage=small_stage(reg="vq"),
            scale=SINGLE,
            facts={"lowres": {"scale": 2, "f": 2}},
            side=32,
        ),
    }


@contextmanager
def decoded_latents(pipe):
    """What the pipeline's VQ model quantises, while it draws: (latents, their codes), each once."""
    seen, handle = [], None
    if hasattr(getattr(pipe, "vqvae", None), "quantize"):
        handle = pipe.vqvae.quantize.register_forward_hook(
            lambda module, args, out: seen.append((args[0], out[2][2].reshape(args[0][:, 0].shape)))
        )
    yield seen
    if handle:
        handle.remove()


def same_codes(bundle, z: torch.Tensor, theirs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The pixels of their codes, after our latents and codes were found to be theirs.

    Codes are compared where no rounding decides. A drawn latent may lie as near to one entry as to another: then both
    codes are right, and the pictures differ.
    """
    stage, h = stage_of(bundle.autoencoder), bundle.scale.restore(z)
    latents, codes = theirs  # normalised where the scale was folded into the first stage
    assert min(relative(latents, z), relative(latents, h)) < CLOSE
    clear = decided(h, stage.quantize.embedding.weight, CLOSE * h.abs().max().item())
    assert clear.float().mean() > 0.9 and torch.equal(stage.quantize(h).indices[clear], codes[clear])
    return stage.decode(stage.codes(codes), quantize=False)


STOCK = [
    "uncond-vq",
    "uncond-vq-shifted",
    "uncond-kl-channelwise",
    "uncond-film",
    "uncond-no-middle",
    "uncond-v-cosine",
    "text-f8",
    "text-f2",
    "text-levels",
    "superres",
    "pixels",
]


@pytest.mark.parametrize("name", STOCK)
def test_stock_pipelines_draw_the_same_pictures(name, tmp_path):
    bundle = bundles(tmp_path)[name]()
    lines = ours.write(bundle, tmp_path / "out")
    assert "of its own" not in lines[0]
    pipe = real.DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    model, side = model_of(bundle), bundle.latent_shape[1]
    z, t = torch.randn(2, *bundle.latent_shape), torch.tensor([7, 911])
    told, null, scale = Conditioning(), None, 1.0
    prompts = ["a red circle", "a blue square on white"]
    if "text" in name:
        told = model.embed(model.conditions.prepare({"text": prompts}))
        null, scale = model.embed(model.conditions.null(2)), 5.0
        theirs = pipe.unet(z, t, told.context).sample
    elif name == "superres":
        told = Conditioning(concat=torch.rand(2, 3, side, side) * 2 - 1)
        theirs = pipe.unet(torch.cat([z, told.concat], 1), t).sample
    else:
        theirs = pipe.unet(z, t).sample
    assert relative(theirs, model.predict(z, t, told)) < CLOSE
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn((2, *bundle.latent_shape), generator=torch.Generator().manual_seed(3))
    states, _ = trajectory(model, bundle, noise, told, null, scale, steps=10)
    more = {"num_inference_steps": 10, "generator": generator, "output_type": "np"}
    with decoded_latents(pipe) as latents:
        if "text" in name:
            images = pipe(prompts, guidance_scale=5.0, height=8 * side, width=8 * side, **more).images
        elif name == "superres":
            images = pipe(told.concat, **more).images
        else:
            images = pipe(batch_size=2, **more).images
    pixels = states[-1]
    if bundle.autoencoder is not None:
        stage = stage_of(bundle.autoencoder)
        pixels = same_codes(bundle, pixels, *latents) if stage.is_vq else stage.decode(bundle.scale.restore(pixels))
    expected = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert relative(torch.from_numpy(images), expected) < CLOSE


@pytest.mark.parametrize("reg", ["kl", "vq"])
def test_first_stages_encode_and_decode_the_same(reg, tmp_path):
    bundle = small_stage(reg=reg, attn_resolutions=(8,), num_res_blocks=2)
    ours.write(replace(bundle, scale=LatentScale((0.0,) * 3, (2.0,) * 3)), tmp_path / "out")
    theirs = (real.AutoencoderKL if reg == "kl" else real.VQModel).from_pretrained(tmp_path / "out")
    network, x, z = stage_of(bundle), torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)
    assert theirs.config.scaling_factor == 0.5
    assert reg == "kl" or decided(z, network.quantize.embedding.weight).all()
    assert relative(theirs.decode(z).sample, network.decode(z)) < CLOSE
    found = theirs.encode(x)
    if reg == "kl":
        assert relative(found.latent_dist.mean, split_moments(network.moments(x))[0]) < CLOSE
    else:
        assert relative(found.latents, network.moments(x)) < CLOSE


def ask(name: str, bundle):
    """What a custom model is told: for our conditions, and for the pipeline's call."""
    if name == "class":
        return {"class": [1, 0]}, {"class_labels": [1, 0]}
    if name == "map":
        maps = [np.full((16, 16), k, np.uint8) for k in (1, 3)]
        return {"map": maps}, {"segmentation": maps}
    if name in ("inpaint", "patches"):
        image, hole = np.full((16, 16, 3), 90, np.uint8), np.zeros((16, 16), bool)
        hole[4:9, 3:11] = True
        return {"masked": [(image, hole)] * 2}, {"image": [image] * 2, "mask_image": [hole] * 2}
    return {}, {"batch_size": 2}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_pipelines_draw_the_same_pictures(name, tmp_path):
    bundle = custom_model(name)
    check_custom(bundle, *ask(name, bundle), tmp_path / "out")


def check_custom(bundle, values, asked, folder, steps=4):
    ours.write(bundle, folder)
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "ldmcli"}
    sys.modules["ldmcli"] = None  # whoever imports it now fails: the folder has to stand alone
    try:
        pipe = real.DiffusionPipeline.from_pretrained(str(folder), custom_pipeline=str(folder), trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        z = torch.randn(2, *bundle.latent_shape)
        latents = pipe(latents=z, output_type="latent", num_inference_steps=steps, **asked).images
        images = pipe(latents=z, output_type="pt", num_inference_steps=steps, **asked).images
        seeded = pipe(seed=5, output_type="latent", num_inference_steps=steps, **asked).images
    finally:
        del sys.modules["ldmcli"]
        sys.modules.update(hidden)
    from ldmcli.maths import rng

    model, stage = model_of(bundle), stage_of(bundle.autoencoder)

    def encode(x):
        moments = stage.moments(x)
        return bundle.scale.normalise(moments if stage.is_vq else split_moments(moments)[0])

    inputs = model.conditions.prepare(values) if values else {}
    told, guidance = model.embed(inputs, encode=encode), bundle.config.sample.guidance
    null = model.embed(model.conditions.null(2, inputs), encode=encode) if guidance != 1 else None
    sampled = lambda start: trajectory(model, bundle, start, told, null, guidance, steps=steps)[0][-1]  # noqa: E731
    final = sampled(z)
    assert relative(latents, final) < CLOSE
    expected = (stage.decode(bundle.scale.restore(final)) / 2 + 0.5).clamp(0, 1)
    assert relative(images, expected) < CLOSE
    assert relative(seeded, sampled(rng.normal(5, range(2), bundle.latent_shape, "z_T"))) < CLOSE


def test_the_demos_kind_of_model_is_drawn_by_diffusers(tmp_path):
    """As `make demo` trains it: fast KL autoencoder of f = 4, text with a pooled vector, flow, dpm++, guidance."""
    words = ["a red circle", "a blue square on white"]
    bundle = text_model(
        tmp_path,
        16,
        stage=small_stage(family="fast", f=4, channel_mult=(1, 2)),
        scale=UNEVEN,
        diffusion={"prediction": "flow", "position": "learned", "scale_shift": True},
        condition={"text_pooled": True},
        sample={"sampler": "dpm++", "spacing": "", "guidance": 2.0},
    )
    check_custom(bundle, {"text": words}, {"prompt": words}, tmp_path / "out", steps=8)
    assert isinstance(bundle.config.sample.guidance, float)


SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
SCHEDULES = [
    ("DDIMScheduler", dict(clip_sample=False, set_alpha_to_one=False, **LEADING)),
    ("DDIMScheduler", dict(clip_sample=False, set_alpha_to_one=True)),
    ("DDIMScheduler", dict(clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction")),
    ("PNDMScheduler", dict(skip_prk_steps=True, **LEADING)),
    ("EulerDiscreteScheduler", dict(**LEADING)),
    ("EulerDiscreteScheduler", dict()),
    ("EulerDiscreteScheduler", dict(timestep_spacing="trailing")),
    ("EulerDiscreteScheduler", dict(final_sigmas_type="sigma_min", **LEADING)),
    ("DPMSolverMultistepScheduler", dict()),
    ("DPMSolverMultistepScheduler", dict(**LEADING)),
    ("DPMSolverMultistepScheduler", dict(timestep_spacing="trailing", prediction_type="sample")),
    ("DPMSolverMultistepScheduler", dict(final_sigmas_type="sigma_min", **LEADING)),
]


@pytest.mark.parametrize("steps", [1, 4, 10, 20, 50])
@pytest.mark.parametrize("kind, settings", SCHEDULES)
def test_samplers_end_where_the_schedulers_do(kind, settings, steps, tmp_path):
    """With a network that is a simple function; states of Euler are z/α."""
    theirs = getattr(real, kind)(**SCALED, **settings)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    process, sample, notes = schedulers.read_scheduler(path, read_config(path), DiffusionSettings(), SampleSettings())
    schedule = make_schedule(process)
    levels = sampling_levels(schedule, steps, sample.spacing)
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def network(x, t):
        return 0.6 * x + 0.3 * torch.sin(x * (1 + t / 500))

    def denoise(z, t, alpha, sigma):
        return to_x0_eps(schedule.prediction, network(z, t), z, alpha, sigma)

    euler = kind == "EulerDiscreteScheduler"
    mine = SAMPLERS[sample.sampler].function(denoise, z, levels)
    theirs.set_timesteps(steps)
    x = z / levels.alphas[0] if euler else z
    times = []
    for t in theirs.timesteps:
        times.append(float(t))
        out = network(theirs.scale_model_input(x, t), float(t))
        x = theirs.step(out, t, x).prev_sample
    assert sorted(set(times), reverse=True) == [pytest.approx(t, abs=1e-3) for t in levels.t]
    longest = kind.startswith("DPM") and settings.get("final_sigmas_type") == "sigma_min" and steps >= 15
    assert notes if longest else relative(mine, x) < CLOSE  # the one way that is known to differ, and says so


def test_what_was_recorded_is_what_diffusers_computes(tmp_path, monkeypatch):
    """The cases of tests/fixtures, recorded anew: weights bit by bit, the rest to rounding."""
    import record

    shutil.copytree(record.FOLDER, tmp_path / "new", ignore=shutil.ignore_patterns("*.packed"))
    monkeypatch.setattr(record, "FOLDER", tmp_path / "new")
    record.single_networks()
    record.pipelines()
    names = sorted(str(path.relative_to(DATA / "diffusers")) for path in (DATA / "diffusers").rglob("*.packed"))
    assert names == sorted(str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*.packed"))
    for name in names:
        old, new = (unpack((folder / name).read_bytes())[0] for folder in (DATA / "diffusers", tmp_path / "new"))
        assert old.keys() == new.keys()
        for key, value in old.items():
            exact = name.endswith("model.safetensors.packed") or not value.is_floating_point()
            assert torch.equal(new[key], value) if exact else relative(new[key], value) < CLOSE, (name, key)

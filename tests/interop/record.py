"""Records what diffusers computes, into tests/fixtures/diffusers: tiny networks whose weights are drawn by number.

    .venv-interop/bin/python tests/interop/record.py

The configurations are those of the folders there. A recorded latent keeps clear of the borders between the entries of
a codebook, so that no rounding decides which entry is taken.
"""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from golden_cases import DATA, decided, drawn, pack, unpack, words_of

FOLDER = DATA / "diffusers"
STEPS = 10


# --- weights --------------------------------------------------------------------------------------------------------


def place(name: str, shape: torch.Size, small: tuple[str, ...]) -> tuple[float, float]:
    """Bound and centre of a tensor: every one counts, the norms' too. Layers named in `small` are scaled down, so that
    the epsilon of the norm behind them shows."""
    if name.endswith("quantize.embedding.weight"):
        return 2.0, 0.0
    if len(shape) == 1:
        bound, centre = (0.2, 0.9) if name.endswith("weight") else (0.15, 0.0)
    else:
        bound, centre = (3 / int(np.prod(shape[1:]))) ** 0.5, 0.0
    if name.partition(".weight")[0].partition(".bias")[0] in small:
        bound /= 50
    return float(np.float32(bound)), centre


def fill(model: torch.nn.Module, seed: int, path: Path, small: tuple[str, ...] = ()) -> torch.nn.Module:
    """Draws all weights of a model and writes where they were drawn."""
    state, places, start = model.state_dict(), {}, 0
    for name in sorted(state):
        places[name] = (start, *place(name, state[name].shape, small))
        start += state[name].numel()
    words = words_of(seed, start)
    weights = {name: torch.from_numpy(drawn(words, list(state[name].shape), *places[name])) for name in places}
    model.load_state_dict(weights)
    path.with_name(path.name + ".packed").write_bytes(pack(weights, places, seed))
    return model.eval().requires_grad_(False)


def network(cls: type, folder: Path, seed: int, small: tuple[str, ...] = ()) -> torch.nn.Module:
    return fill(
        cls.from_config(json.loads((folder / "config.json").read_text())),
        seed,
        folder / "diffusion_pytorch_model.safetensors",
        small,
    )


# --- outputs --------------------------------------------------------------------------------------------------------


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def trajectory(scheduler, latents: torch.Tensor, denoise) -> tuple[torch.Tensor, torch.Tensor]:
    """All states, the start (times its initial sigma) first, and the timesteps."""
    scheduler.set_timesteps(STEPS)
    x = latents * scheduler.init_noise_sigma
    states = [x]
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        states.append(x)
    return torch.stack(states), scheduler.timesteps.float()


def guided(unet, context, null, scale):
    def denoise(z, t):
        without, told = unet(z, t, null).sample, unet(z, t, context).sample
        return without + scale * (told - without)

    return denoise


def write(folder: Path, **tensors: torch.Tensor) -> None:
    packed = pack({name: tensor.contiguous() for name, tensor in tensors.items()})
    assert unpack(packed)[0].keys() == tensors.keys()
    (folder / "io.safetensors.packed").write_bytes(packed)


def single_networks() -> None:
    folder = FOLDER / "autoencoder_kl"
    vae = network(diffusers.AutoencoderKL, folder, 1, ("encoder.conv_in", "decoder.conv_in"))
    x, z = image(1, 2, 3, 32, 32), noise(2, 2, 4, 8, 8)
    found = vae.encode(x).latent_dist
    write(
        folder,
        x=x,
        moments=found.parameters,
        mean=found.mean,
        logvar=found.logvar,
        kl=found.kl(),
        z=z,
        decoded=vae.decode(z).sample,
        reconstruction_of_mode=vae.decode(found.mean).sample,
    )

    folder = FOLDER / "vqmodel"
    vq = network(diffusers.VQModel, folder, 2, ("encoder.conv_in", "decoder.conv_in"))
    x = image(3, 2, 3, 32, 32)
    h = apart(lambda seed: noise(seed, 2, 3, 8, 8), vq)
    quantised, _, (_, _, indices) = vq.quantize(h)
    write(
        folder,
        x=x,
        encoded=vq.encode(x).latents,
        h=h,
        indices=indices.reshape(2, 8, 8),
        quantized=quantised,
        decoded=vq.decode(h).sample,
        decoded_without_quantisation=vq.decode(h, force_not_quantize=True).sample,
    )

    t = torch.tensor([3, 500])
    folder = FOLDER / "unet2d"
    unet = network(diffusers.UNet2DModel, folder, 3, ("conv_in",))
    latents, trajectories = noise(5, 2, 3, 16, 16), {}
    for name in ("ddim", "pndm", "dpm", "euler"):
        settings = json.loads((FOLDER / "schedulers" / name / "scheduler_config.json").read_text())
        scheduler = getattr(diffusers, settings["_class_name"]).from_config(settings)
        trajectories[f"trajectory_{name}_10"], trajectories[f"timesteps_{name}_10"] = trajectory(
            scheduler, latents, lambda z, t: unet(z, t).sample
        )
    x = noise(4, 2, 3, 16, 16)
    write(folder, x=x, t=t, eps=unet(x, t).sample, latents=latents, **trajectories)

    folder = FOLDER / "unet2d_film"
    unet, x = network(diffusers.UNet2DModel, folder, 4, ("conv_in",)), noise(6, 2, 4, 16, 16)
    write(folder, x=x, t=t, eps=unet(x, t).sample)

    folder = FOLDER / "unet2d_condition"
    unet = network(diffusers.UNet2DConditionModel, folder, 5, ("conv_in",))
    x, context, null, latents = (
        noise(7 + k, *shape) for k, shape in enumerate(((2, 4, 16, 16), (2, 7, 24), (2, 7, 24), (2, 4, 16, 16)))
    )
    scheduler = diffusers.DDIMScheduler.from_pretrained(FOLDER / "schedulers" / "ddim")
    told, times = trajectory(scheduler, latents, lambda z, t: unet(z, t, context).sample)
    write(
        folder,
        x=x,
        t=t,
        context=context,
        eps=unet(x, t, context).sample,
        latents=latents,
        timesteps=times,
        uncond_context=null,
        guidance=torch.tensor([3.0]),
        trajectory_ddim_10=told,
        trajectory_ddim_10_guided=trajectory(scheduler, latents, guided(unet, context, null, 3.0))[0],
    )


def apart(made, vq, of=lambda tensor: tensor):
    """The first of `made(0)`, `made(1)` … of which `of` gives latents where no rounding decides about a code."""

    def clear(h):
        return decided(h, vq.quantize.embedding.weight, 1e-5 * h.abs().max().item()).all()

    return next(found for found in map(made, range(100)) if clear(of(found)))


def finish(folder: Path, pipe, states, times, call, **tensors) -> None:
    """The pictures of the last state, which have to be those of the pipeline itself."""
    decoded = pipe.vqvae.decode(states[-1] / pipe.vqvae.config.scaling_factor).sample
    channels_last = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    pipe.set_progress_bar_config(disable=True)
    theirs = torch.from_numpy(call(num_inference_steps=STEPS, output_type="np").images)
    assert torch.allclose(theirs, channels_last, atol=1e-5), folder
    write(folder, timesteps=times, decoded=decoded, image01=channels_last, **tensors)


def pipelines() -> None:
    for name, seed in (("ldm_uncond", 10), ("ldm_superres", 20)):
        folder, low = FOLDER / name, image(seed, 2, 3, 16, 16)
        unet = network(diffusers.UNet2DModel, folder / "unet", seed)
        vq = network(diffusers.VQModel, folder / "vqvae", seed + 1)
        scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
        wide = name == "ldm_superres"
        cls = diffusers.LDMSuperResolutionPipeline if wide else diffusers.LDMPipeline
        pipe = cls(vqvae=vq, unet=unet, scheduler=scheduler)

        def denoise(z, t, unet=unet, low=low, wide=wide):
            return unet(torch.cat([z, low], 1) if wide else z, t).sample

        def made(number, scheduler=scheduler, denoise=denoise):
            latents = noise(number, 2, 3, 16, 16)
            return number, latents, trajectory(scheduler, latents, denoise)

        number, latents, (states, times) = apart(made, vq, lambda found: found[2][0][-1])

        def call(pipe=pipe, number=number, wide=wide, low=low, **options):
            generator = torch.Generator().manual_seed(number)
            return (
                pipe(low, generator=generator, **options)
                if wide
                else pipe(batch_size=2, generator=generator, **options)
            )

        finish(
            folder,
            pipe,
            states,
            times,
            call,
            latents=latents,
            trajectory_ddim_10=states,
            **({"low": low} if wide else {}),
        )

    folder = FOLDER / "ldm_text2img"
    unet = network(diffusers.UNet2DConditionModel, folder / "unet", 30)
    vae = network(diffusers.AutoencoderKL, folder / "vqvae", 31)
    settings = LDMBertConfig(**json.loads((folder / "bert" / "config.json").read_text()))
    bert = fill(LDMBertModel(settings), 32, folder / "bert" / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    pipe = diffusers.LDMTextToImagePipeline(vqvae=vae, bert=bert, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
    prompts = json.loads((folder / "prompts.json").read_text())
    ids, none = (
        tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        for texts in (prompts, ["", ""])
    )
    context, null, latents = bert(ids)[0], bert(none)[0], noise(33, 2, 4, 8, 8)
    states, times = trajectory(scheduler, latents, guided(unet, context, null, 5.0))

    def call(**options):
        return pipe(prompts, guidance_scale=5.0, height=64, width=64, latents=latents, **options)

    finish(
        folder,
        pipe,
        states,
        times,
        call,
        input_ids=ids,
        uncond_input_ids=none,
        context=context,
        uncond_context=null,
        guidance=torch.tensor([5.0]),
        latents=latents,
        trajectory_ddim_10_guided=states,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    single_networks()
    pipelines()

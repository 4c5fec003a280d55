"""What an exported model has of its own, as a component that diffusers loads.

Never imported here: `diffusers_custom` puts this source and those it imports into the folder of an export. It holds the
conditions, and UNet and first stage where no class of diffusers computes the same; what has such a class stands beside
it (unet/, vqvae/) and is passed in.
"""

from dataclasses import fields
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ldmcli.core.settings import AutoencoderSettings, ConditionSettings, DiffusionSettings, SampleSettings
from ldmcli.diffusion.samplers import SAMPLERS
from ldmcli.diffusion.schedule import levels, make_schedule, to_x0_eps
from ldmcli.maths import rng
from ldmcli.networks.autoencoder import Autoencoder, split_moments
from ldmcli.networks.conditioners import Conditioning, Conditions
from ldmcli.networks.unet import UNet


def _made(kind: type, values: dict[str, Any]):
    """Settings from JSON: lists become tuples."""
    known = {field.name for field in fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})


class LatentDiffusion(ModelMixin, ConfigMixin):
    """The own part of a latent diffusion model. settings: sections of the run's configuration; facts: of each
    condition; latent_shape: (c, h, w); own_unet, own_autoencoder: whether they are in here."""

    @register_to_config
    def __init__(
        self,
        settings: dict,
        kinds: list,
        facts: dict,
        latent_shape: list,
        own_unet: bool = True,
        own_autoencoder: bool = True,
    ):
        super().__init__()
        diffusion = _made(DiffusionSettings, settings["diffusion"])
        condition = _made(ConditionSettings, settings["condition"])
        self.schedule, self.sampling = make_schedule(diffusion), _made(SampleSettings, settings["sample"])
        self.conditions = Conditions(kinds, condition, facts, None)
        channels, height, width = latent_shape
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        if own_unet:
            self.unet = UNet(
                diffusion,
                channels + self.conditions.concat_channels,
                channels,
                context_dim=self.conditions.context_dim,
                vector_dim=self.conditions.vector_dim,
                sample_size=(height, width),
            )
        if own_autoencoder:
            self.autoencoder = Autoencoder(_made(AutoencoderSettings, settings["autoencoder"]))

    def inputs(self, values: dict[str, list], tokenizer) -> dict[str, Tensor]:
        """Prepared conditions from {kind: values}."""
        if tokenizer is not None and "text" in self.conditions.entries:
            self.conditions.entries["text"].tokenizer = tokenizer
        return {k: v.to(self.device) for k, v in self.conditions.prepare(values).items()}

    def predict(self, unet, z: Tensor, t: float, told: Conditioning) -> Tensor:
        """The network's output at one timestep."""
        x = z if told.concat is None else torch.cat([z, told.concat], dim=1)
        times = torch.full((len(z),), t, device=z.device, dtype=torch.float32)
        if unet is None:
            return self.unet(x, times, context=told.context, vector=told.vector)
        return unet(x, times, told.context).sample if told.context is not None else unet(x, times).sample

    @torch.no_grad()
    def sample_latents(
        self,
        unet,
        vqvae,
        inputs: dict[str, Tensor] | None,
        n: int,
        *,
        seed: int = 0,
        latents: Tensor | None = None,
        shape: tuple[int, ...] | None = None,
        progress=None,
        **asked,
    ) -> Tensor:
        """Final latents (n, c, h, w), the same numbers that `ldm sample` draws for a seed. asked: sampler, steps,
        guidance, eta, spacing; None takes the model's own."""
        settings = self.sampling
        chosen = {
            name: getattr(settings, name) if asked.get(name) is None else asked[name]
            for name in ("sampler", "steps", "guidance", "eta", "spacing")
        }
        way = levels(self.schedule, chosen["steps"], chosen["spacing"])
        self.conditions.first_stage = lambda x: self.encode(vqvae, x)
        shape = tuple(shape or self.config.latent_shape)
        given = self.conditions(inputs or {}, shape[1:])
        droppable = set(self.conditions.droppable)
        scale = chosen["guidance"] if droppable else 1.0
        null = None
        if scale != 1:
            none = {k: v.to(self.device) for k, v in self.conditions.null(n, inputs).items()}
            told = {k: none[k] if k.split(".")[0] in droppable else v for k, v in inputs.items()}
            null = self.conditions(told, shape[1:])
        last, interval = self.schedule.timesteps - 1, settings.guidance_interval

        def denoise(z, t, alpha, sigma):
            out = None
            if null is None or not interval[0] <= t / last <= interval[1]:
                out = self.predict(unet, z, t, given)
            else:
                both = [_pair(getattr(null, name), getattr(given, name)) for name in ("context", "concat", "vector")]
                without, told = self.predict(unet, torch.cat([z, z]), t, Conditioning(*both)).chunk(2)
                out = (1 - scale) * without + scale * told
            return to_x0_eps(self.schedule.prediction, out.float(), z, alpha, sigma)

        ids, heat = range(n), settings.temperature
        z = heat * rng.normal(seed, ids, shape, "z_T") if latents is None else latents
        return SAMPLERS[chosen["sampler"]].function(
            denoise,
            z.to(self.device),
            way,
            eta=chosen["eta"],
            noise=lambda step: heat * rng.normal(seed, ids, shape, "step", step, device=self.device),
            callback=None if progress is None else lambda *_: progress(),
        )

    @torch.no_grad()
    def decode(self, vqvae, z: Tensor) -> Tensor:
        """Latents as the diffusion model sees them -> pixels (B, 3, H, W) in about [-1, 1]."""
        z = z * self.latent_std.to(z)[:, None, None] + self.latent_mean.to(z)[:, None, None]
        return self.autoencoder.decode(z) if vqvae is None else vqvae.decode(z).sample

    @torch.no_grad()
    def encode(self, vqvae, x: Tensor) -> Tensor:
        """Pixels -> latents as the diffusion model sees them (KL: the mode)."""
        if vqvae is None:
            z = self.autoencoder.moments(x)
            z = z if self.autoencoder.is_vq or self.autoencoder.is_identity else split_moments(z)[0]
        else:
            found = vqvae.encode(x)
            z = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        return (z - self.latent_mean.to(z)[:, None, None]) / self.latent_std.to(z)[:, None, None]


def _pair(a, b):
    return None if b is None else torch.cat([a, b])

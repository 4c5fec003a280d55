"""What an exported model has of its own, as a component that diffusers loads.

Never imported here: `diffusers_custom` puts this source and those it imports into the folder of an export. It holds the
conditions, and UNet and first stage where no class of diffusers computes the same; what has such a class stands beside
it (unet/, vqvae/) and is passed in.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ldmcli.core.settings import (
    AutoencoderSettings,
    ConditionSettings,
    DiffusionSettings,
    DistillSettings,
    SampleSettings,
)
from ldmcli.diffusion.guidance import guidance_path
from ldmcli.diffusion.sample import KeyedNoise, check_sampling, sample_latents, with_overrides
from ldmcli.diffusion.schedule import make_schedule
from ldmcli.networks.autoencoder import Autoencoder, split_moments
from ldmcli.networks.conditioners import Conditioning, Conditions
from ldmcli.networks.conditioning import Encode
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
        self.distilled = _made(DistillSettings, settings.get("distill", {}))
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

    def embed(self, inputs: Mapping[str, Tensor], size: tuple[int, int], encode: Encode | None = None) -> Conditioning:
        """τ_θ(y) of prepared inputs for latents of `size` (h, w)."""
        return self.conditions(inputs, size, encode)

    def predict(self, unet, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output at timesteps t (B,)."""
        x = z if conditioning.concat is None else torch.cat([z, conditioning.concat], dim=1)
        if unet is None:
            return self.unet(x, t, context=conditioning.context, vector=conditioning.vector)
        return unet(x, t, conditioning.context).sample if conditioning.context is not None else unet(x, t).sample

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
        **overrides,
    ) -> Tensor:
        """Final latents (n, c, h, w), the same numbers as of `ldm sample` for a seed. overrides: sampler, steps,
        guidance, eta, spacing; None takes the model's own. Raises UsageError for what the model does not know."""
        settings = with_overrides(self.sampling, **overrides)
        check_sampling(settings, self.schedule, self.distilled)
        shape, ids = tuple(shape or self.config.latent_shape), range(n)
        size, encode = (shape[-2], shape[-1]), lambda x: self.encode(vqvae, x)
        path = guidance_path(self, settings.guidance, inputs or {}, None, n, size, encode)
        return sample_latents(
            lambda z, t, conditioning: self.predict(unet, z, t, conditioning),
            self.schedule,
            settings,
            path,
            KeyedNoise(seed, ids, shape, self.device),
            ids=ids,
            z_T=None if latents is None else latents.to(self.device),
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

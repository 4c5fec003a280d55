"""The trained part of a latent diffusion model as one module.

A whole training step by hand, for research code:

    schedule = make_schedule(settings)
    alpha, sigma = alpha_sigma(schedule, t)                        # (B,) each
    z_t = q_sample(z_0, noise, alpha, sigma)
    error = model(z_t, t, inputs) - prediction_target(schedule.prediction, z_0, noise, alpha, sigma)
    error.square().mean().backward()

`diffusion.loss.diffusion_loss` is this with the weights and the sampled timesteps of training.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldmcli.core.settings import ConditionSettings, DiffusionSettings
from ldmcli.networks.conditioners import Conditioning, Conditions
from ldmcli.networks.conditioning import Encode
from ldmcli.networks.meta_device import on_meta_device
from ldmcli.networks.unet import UNet


class DiffusionModel(nn.Module):
    """UNet and conditions under one forward, so that wrapped data-parallel training sees all parameters.

    `latent_shape` is (c, h, w) at the training size; `kinds` are all conditions (`DiffusionConfig.kinds`), by default
    those of `condition`. The UNet reads the latent's channels and the planes of the conditions.
    """

    def __init__(
        self,
        settings: DiffusionSettings,
        condition: ConditionSettings,
        specs: dict[str, dict[str, Any]],
        tokenizer,
        latent_shape: tuple[int, int, int],
        kinds: Sequence[str] | None = None,
    ):
        super().__init__()
        self._made_of = (settings, condition, specs, tokenizer, latent_shape, kinds)
        self.settings, self.latent_shape = settings, latent_shape
        self.conditions = Conditions(condition.kinds if kinds is None else kinds, condition, specs, tokenizer)
        channels, height, width = latent_shape
        self.unet = UNet(
            settings,
            channels + self.conditions.concat_channels,
            channels,
            context_dim=self.conditions.context_dim,
            vector_dim=self.conditions.vector_dim,
            sample_size=(height, width),
        )

    def another(self) -> "DiffusionModel":
        """A network of the same make, whose weights are still to be loaded (`strict_load`)."""
        # a frozen text encoder brings weights along that the meta device would lose
        with on_meta_device() if self._made_of[1].text_encoder == "joint" else torch.device("cpu"):
            return DiffusionModel(*self._made_of)

    def embed(
        self, inputs: Mapping[str, Tensor] | None, size: tuple[int, int] | None = None, encode: Encode | None = None
    ) -> Conditioning:
        """τ_θ(y) of prepared inputs (`Conditions.prepare`) for latents of `size` (h, w), by default those of the
        training. encode: the first stage's encoder, where a condition is an image (super-resolution, inpainting)."""
        return self.conditions(inputs or {}, self.latent_shape[1:] if size is None else size, encode)

    def predict(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's raw output (B, c, h, w) for z_t at timesteps t (B,)."""
        x = z_t if conditioning.concat is None else torch.cat([z_t, conditioning.concat], dim=1)
        return self.unet(x, t, context=conditioning.context, vector=conditioning.vector)

    def forward(
        self, z_t: Tensor, t: Tensor, inputs: Mapping[str, Tensor] | None = None, encode: Encode | None = None
    ) -> Tensor:
        """`predict` for prepared inputs (`Conditions.prepare`): ε_θ(z_t, t, τ_θ(y)) of Eq. 3, (B, c, h, w)."""
        return self.predict(z_t, t, self.embed(inputs, (z_t.shape[-2], z_t.shape[-1]), encode))

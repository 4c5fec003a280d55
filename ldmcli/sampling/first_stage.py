"""A first stage in use: encoding and decoding of images (Sec. 3.1), with the scale of its latents."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ldmcli.core.errors import ModelError, UsageError
from ldmcli.core.settings import AutoencoderConfig, AutoencoderSettings
from ldmcli.data.arrays import latents, to_pixels
from ldmcli.networks.autoencoder import Autoencoder, posterior_sample, split_moments
from ldmcli.networks.latent_scale import LatentScale
from ldmcli.sampling.machine import autocast, precision_of


class LoadedAutoencoder:
    """A first stage in use. Latents are normalised by `scale` on the way out and restored on the way in. place: where
    pixels go when the network has no weights, which would say so (LDM-1)."""

    kind = "autoencoder"
    trained_against: list[dict[str, str]] | None = None  # as the bundle has it
    dtype: torch.dtype | None = None  # of heavy arithmetic within `autocast`; None = float32

    def __init__(
        self,
        network: Autoencoder,
        scale: LatentScale,
        fingerprint: str,
        config: AutoencoderConfig | None = None,
        place: torch.device | None = None,
    ):
        self.network, self.scale, self.fingerprint, self.config = network, scale, fingerprint, config
        self.place = place or torch.device("cpu")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((p.device for p in self.network.parameters()), self.place)

    @property
    def precision(self) -> str:
        """float32, bfloat16 or float16: that of pictures that commands make."""
        return precision_of(self.dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which the networks run in `precision`; outside they are exact. What they give is float32."""
        return autocast(self.device, self.dtype)

    def compile(self) -> None:
        """Compiles the networks when they are first used at a size."""
        if not self.network.is_identity:
            self.network.encoder.compile(dynamic=False)
            self.network.decoder.compile(dynamic=False)

    @torch.no_grad()
    def moments(self, x: Any) -> Tensor | tuple[Tensor, Tensor]:
        """KL: (mean, log-variance), each (B, c, h, w), unscaled; VQ and pixels: the latent before quantisation."""
        moments = self.network.moments(self._pixels(x)).float()
        return split_moments(moments) if self._is_kl else moments

    def _pixels(self, x: Any) -> Tensor:
        return to_pixels(x, self.network.settings.in_channels).to(self.device)

    def _latents(self, z: Any) -> Tensor:
        return latents(z, "z", self.network.latent_channels).to(self.device)

    @property
    def _is_kl(self) -> bool:
        return not self.network.is_vq and not self.network.is_identity

    def check_channels(self) -> None:
        """Raises ModelError where the latents are those of a diffusion model that came without its first stage: pixels
        have other channels."""
        channels = len(self.scale.std)
        if channels != self.network.latent_channels:
            raise ModelError(
                f"this network denoises {channels} channels and came without the first stage that makes pictures of "
                "them; load it from a folder that has both (unet/ and vae/ or vqvae/)"
            )

    @torch.no_grad()
    def encode(self, x: Any, sample: bool | torch.Generator = False) -> Tensor:
        """Images (as `arrays.to_pixels` takes them) -> normalised latents (B, c, h, w): the mode, or with `sample`
        (True or a generator) a draw. Raises InputError for what is no picture, UsageError for sides that f does not
        divide, ModelError as `check_channels`."""
        self.check_channels()
        moments = self.network.moments(self._pixels(x)).float()
        return self.scale.normalise(self._draw(moments, sample))

    @torch.no_grad()
    def encode_unchecked(self, x: Tensor) -> Tensor:
        """`encode` of float images (B, 3, H, W) that lie beside the weights and are known to be in order: nothing of
        them is read, so nothing waits, and it compiles."""
        return self.scale.normalise(self._draw(self.network.moments(x), False))

    def _draw(self, moments: Tensor, sample: bool | torch.Generator) -> Tensor:
        if not self._is_kl:
            return moments
        noise = None
        if sample is not False:
            mean = split_moments(moments)[0]
            generator = sample if isinstance(sample, torch.Generator) else None
            noise = torch.randn(mean.shape, generator=generator).to(mean)
        return posterior_sample(moments, noise)

    @torch.no_grad()
    def decode(self, z: Any) -> Tensor:
        """Normalised latents (B, c, h, w) -> pixels (B, 3, H, W), about [-1, 1], not clamped. Raises UsageError for
        another shape, InputError for NaN, ModelError as `check_channels`."""
        self.check_channels()
        return self.network.decode(self.scale.restore(self._latents(z))).float()

    @torch.no_grad()
    def decode_unscaled(self, z: Any) -> Tensor:
        """The decoder on latents without scaling (VQ: quantised first). Raises as `decode`."""
        return self.network.decode(self._latents(z)).float()

    @torch.no_grad()
    def quantize(self, z: Any) -> tuple[Tensor, Tensor]:
        """VQ: (quantised latent, code indices (B, h, w)) of unscaled latents. Raises UsageError for other models."""
        if not self.network.is_vq:
            raise UsageError("quantize: this autoencoder has no codebook")
        found = self.network.quantize(self._latents(z))
        return found.z, found.indices


def pixel_autoencoder(device: torch.device | None = None) -> LoadedAutoencoder:
    """LDM-1: latents are the pixels, on `device` (the CPU where none is named)."""
    settings = AutoencoderSettings(f=1)
    scale = LatentScale.identity(settings.in_channels)
    return LoadedAutoencoder(Autoencoder(settings), scale, "pixels", place=device)

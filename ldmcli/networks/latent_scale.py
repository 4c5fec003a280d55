"""The scale of the latents that the diffusion model works in (latent normalisation, App. G)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentScale:
    """Affine map between the autoencoder's latents and those the diffusion model sees: (z - mean) / std a channel.

    The paper's single `scale_factor` s is mean 0 and std 1/s on every channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def identity(channels: int) -> "LatentScale":
        """No change."""
        return LatentScale((0.0,) * channels, (1.0,) * channels)

    @staticmethod
    def measured(mean: Tensor, variance: Tensor, kind: str) -> "LatentScale":
        """From per-channel mean and variance (c,) of latents. kind: per_channel | global | none (App. G)."""
        if kind == "none":
            return LatentScale.identity(len(mean))
        if kind == "global":  # one number, the mean left in, as the original's scale_by_std does
            second = variance + mean**2
            spread = float((second.mean() - mean.mean() ** 2).clamp(min=1e-12).sqrt())
            return LatentScale((0.0,) * len(mean), (spread,) * len(mean))
        return LatentScale(tuple(mean.tolist()), tuple(variance.clamp(min=1e-12).sqrt().tolist()))

    def normalise(self, z: Tensor) -> Tensor:
        """(B, c, h, w) from the autoencoder -> as the diffusion model sees it."""
        return (z - self._column(self.mean, z)) / self._column(self.std, z)

    def restore(self, z: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return z * self._column(self.std, z) + self._column(self.mean, z)

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]

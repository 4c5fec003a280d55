"""The scale of the latents that the diffusion model works in (latent normalisation, App. G)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentScale:
    """Affine map between the autoencoder's latents and those the diffusion model sees: (z - mean) / std a channel.

    The paper's single `scale_factor` s is mean 0 and std 1/s on every channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    _columns: dict = field(default_factory=dict, init=False, repr=False, compare=False)

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
        mean, std = self._as_columns(z)
        return (z - mean) / std

    def restore(self, z: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        mean, std = self._as_columns(z)
        return z * std + mean

    def _as_columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (c, 1, 1) beside `like`, brought to a device once: the copy makes the host
        wait."""
        key = (str(like.device), like.dtype)
        if key in self._columns:
            return self._columns[key]
        mean, std = (
            torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        if not torch.compiler.is_compiling():
            self._columns[key] = mean, std
        return mean, std

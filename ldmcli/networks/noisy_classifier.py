"""A classifier of noisy latents, log p(c | z_t, t) (App. C, D.4): the half of the UNet that goes down, then one vector.

As the original's EncoderUNetModel (ldm/modules/diffusionmodules/openaimodel.py) with pool "attention" or "adaptive",
which is the mean over positions.
"""

import torch
from torch import Tensor, nn

from ldmcli.core.settings import DiffusionSettings
from ldmcli.networks.blocks import attention, group_norm, join_heads, split_heads, zero_init
from ldmcli.networks.unet import NORM_EPS, BlockInputs, LearnedPosition, UNetEncoder, head_count


class AttentionPool(nn.Module):
    """(B, width, h, w) to (B, out): attention of the mean over positions to itself and to all of them, each with a
    learned code (Radford et al. 2021). size: (h, w) that the codes are made for; other sizes resize them."""

    def __init__(self, width: int, heads: int, out: int, size: tuple[int, int]):
        super().__init__()
        self.heads = heads
        self.position = LearnedPosition(width, size, width**-0.5)
        self.mean_position = nn.Parameter(width**-0.5 * torch.randn(width))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, out)."""
        mean = (x.mean(dim=(2, 3)) + self.mean_position.to(x.dtype))[:, None]
        positions = x + self.position((x.shape[-2], x.shape[-1])).to(x.dtype)
        tokens = torch.cat([mean, positions.flatten(2).transpose(1, 2)], dim=1)
        q, k, v = self.query(mean), self.key(tokens), self.value(tokens)
        pooled = attention(*(split_heads(part, self.heads) for part in (q, k, v)))
        return self.out(join_heads(pooled)[:, 0])


class MeanPool(nn.Module):
    """(B, width, h, w) to (B, out): the mean over positions through a linear map that begins at zero."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.out = zero_init(nn.Linear(width, out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, out)."""
        return self.out(x.mean(dim=(2, 3)))


class NoisyClassifier(nn.Module):
    """Logits of the classes of z_t at timestep t.

    settings: network of the encoder and process; pool: "attention" or "mean"; latent_shape: (c, h, w) at the training
    size, other multiples of `encoder.size_factor` work as well. Raises UsageError where settings contradict each other.
    """

    def __init__(self, settings: DiffusionSettings, pool: str, classes: int, latent_shape: tuple[int, int, int]):
        super().__init__()
        self.latent_shape = latent_shape
        channels, height, width = latent_shape
        self.encoder = UNetEncoder(settings, channels, sample_size=(height, width))
        self.encoder.add_input_position()
        last, factor = self.encoder.widths[-1], self.encoder.size_factor
        self.norm = nn.Sequential(group_norm(last, NORM_EPS, settings.groups), nn.SiLU())
        if pool == "mean":
            self.pool: nn.Module = MeanPool(last, classes)
        else:
            heads = head_count(last, settings, len(self.encoder.widths) - 1)
            self.pool = AttentionPool(last, heads, classes, (max(1, height // factor), max(1, width // factor)))

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        """(B, classes) for z_t (B, c, h, w) at timesteps t (B,). Raises UsageError for sides that the network cannot
        halve."""
        inputs = BlockInputs(self.encoder.embed_timestep(t), None, self.encoder.position_codes())
        return self.pool(self.norm(self.encoder.encode(z_t, inputs)[0]))

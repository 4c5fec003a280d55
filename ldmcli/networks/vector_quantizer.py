"""Vector quantisation of latents (VQ-reg. of Rombach et al. 2022, Sec. 3.1; van den Oord et al. 2017)."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUANTISE_ROWS = 8192  # rows of the distance matrix at a time: 8192 x 16384 fp32 are 512 MiB


@dataclass(frozen=True)
class Quantized:
    """z: straight-through quantised (B, c, h, w); indices: int64 (B, h, w); loss: scalar, mean over elements."""

    z: Tensor
    indices: Tensor
    loss: Tensor


def restart_dead_codes(codebook: Tensor, dead: Tensor, vectors: Tensor, generator: torch.Generator) -> Tensor:
    """The codebook (n, c) with entries where `dead` (bool, n) replaced by random rows of `vectors` (N, c), N >= 1.

    Rows are drawn without repetition while there are enough. The result is new; the generator lives on the CPU.
    """
    rounds = -(-len(codebook) // len(vectors))  # as many as could be needed: the host does not know how many are dead
    order = torch.cat([torch.randperm(len(vectors), generator=generator) for _ in range(rounds)])
    places = (dead.cumsum(0) - 1).clamp(min=0)
    chosen = order.to(vectors.device, non_blocking=True)[places]
    return torch.where(dead[:, None], vectors[chosen].to(codebook), codebook)


def _full_precision(device: torch.device) -> AbstractContextManager:
    """Context without autocast; the meta device, on which networks are measured, has none."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class VectorQuantizer(nn.Module):
    """Nearest entry of a learned codebook, straight-through: z (B, c, h, w) to `Quantized`, whose z has the gradient of
    the input (van den Oord et al. 2017, Eq. 1-3).

    The loss is ‖sg[z] - e‖² + beta ‖z - sg[e]‖², each a mean over elements. legacy_beta puts beta on the first term, of
    the codebook, and 1 on the second, the commitment, as the published models were trained.
    """

    def __init__(self, size: int, dim: int, beta: float, legacy_beta: bool):
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / size, 1.0 / size)
        self.codebook_weight, self.commitment_weight = (beta, 1.0) if legacy_beta else (1.0, beta)

    def nearest(self, rows: Tensor) -> Tensor:
        """Index of the nearest entry by |z|² + |e|² - 2 z·e, the first where equal. (N, c) to int64 (N,)."""
        codebook = self.embedding.weight.detach().float()
        squares = codebook.square().sum(dim=1)
        found = []
        with torch.no_grad(), _full_precision(rows.device):
            for part in rows.detach().float().split(QUANTISE_ROWS):
                distance = part.square().sum(dim=1, keepdim=True) + squares - 2.0 * part @ codebook.t()
                found.append(distance.argmin(dim=1))
        return torch.cat(found)

    def codes(self, indices: Tensor) -> Tensor:
        """Codebook entries by index: int64 (B, h, w) to (B, c, h, w)."""
        return self.embedding(indices).permute(0, 3, 1, 2).contiguous()

    def forward(self, z: Tensor) -> Quantized:
        z = z.float()
        batch, channels, height, width = z.shape
        rows = z.permute(0, 2, 3, 1).reshape(-1, channels)
        indices = self.nearest(rows).view(batch, height, width)
        entries = self.codes(indices).float()
        loss = self.commitment_weight * F.mse_loss(z, entries.detach())
        loss = loss + self.codebook_weight * F.mse_loss(entries, z.detach())
        return Quantized(z + (entries - z).detach(), indices, loss)

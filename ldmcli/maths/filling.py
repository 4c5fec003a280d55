"""Holes filled smoothly from what lies around them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def spread_over(x: Tensor, hole: Tensor) -> Tensor:
    """Pictures (B, c, H, W) whose holes, bool (B, H, W), are filled smoothly from around them; 0 where all is hole.

    Push-pull: means of the known pixels are taken over 2x2 blocks again and again until every block knows one, and
    come back enlarged (bilinear) where the finer level knows nothing. Known pixels stay.
    """
    known = (~hole[:, None]).to(x.dtype)
    if min(x.shape[-2:]) == 1 or bool((known > 0).all()):
        mean = (x * known).mean((2, 3), keepdim=True) / known.mean((2, 3), keepdim=True).clamp(min=1e-6)
        return torch.where(hole[:, None], mean, x)
    # a last row or column without partner is halved with itself
    odd = (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)
    total, share = (F.avg_pool2d(F.pad(part, odd, mode="replicate"), 2) for part in (x * known, known))
    coarse = spread_over(total / share.clamp(min=1e-6), share[:, 0] == 0)
    fine = F.interpolate(coarse, size=x.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(hole[:, None], fine, x)

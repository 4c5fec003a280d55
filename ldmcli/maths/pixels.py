"""Pixels as whole numbers and as floats: uint8 NHWC in 0 … 255, float NCHW in [-1, 1]. The one place that converts."""

import numpy as np
import torch
from torch import Tensor

from ldmcli.core.errors import ModelError
from ldmcli.maths.number_format import autocast_format, narrow_range_advice


def tensor_to_pixels(x: Tensor, *, finite: bool = True) -> np.ndarray:
    """Float NCHW in [-1, 1] -> uint8 NHWC: clamped, rounded half to even. Raises ModelError (finite) for pictures with
    NaN or Inf, which would become black."""
    if finite and not bool(x.isfinite().all()):
        bad = int((~x.isfinite().flatten(1).all(1)).sum())
        raise ModelError(
            f"{bad} of {len(x)} decoded pictures hold NaN or Inf; the autoencoder overflows on these "
            f"latents, so nothing is written of them{narrow_range_advice(autocast_format(x.device))}"
        )
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def pixels_to_tensor(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 NHWC -> float NCHW in [-1, 1] on the device."""
    return pixels.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1

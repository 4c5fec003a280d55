"""Pictures in, pictures out: larger ones (super-resolution), and ones with holes filled (inpainting)."""

from collections.abc import Sequence

import numpy as np
import torch

from ldmcli.core.errors import UsageError
from ldmcli.drivers.loaded import LoadedDiffusion, to_uint8
from ldmcli.drivers.sampling import Steering
from ldmcli.maths import tiles


@torch.no_grad()
def upscale_images(
    model: LoadedDiffusion, low: np.ndarray, *, seed: int = 0, ids: Sequence[int] | None = None, tile: int = 0,
    **settings,
) -> np.ndarray:
    """uint8 (n, h, w, 3) -> uint8 (n, h·scale, w·scale, 3) by a model trained with task sr. Any h and w.

    Picture i is drawn with the noise of sample ids[i] (default 0 … n-1). tile: latent positions a side above which the
    networks see overlapping tiles; 0 = never. settings: steps, guidance, sampler, eta, spacing. Raises UsageError for
    a model of another task.
    """
    if model.config.task.name != "sr":
        raise UsageError("upscale: this model was not trained for super-resolution (`ldm train-ldm --task sr`)")
    scale, ids = model.config.task.scale, list(range(len(low)) if ids is None else ids)
    height, width = low.shape[1] * scale, low.shape[2] * scale
    unit = unit_of(model) // scale or 1
    padded = np.stack([tiles.padded(image, unit) for image in low])
    size = (padded.shape[1] * scale, padded.shape[2] * scale)
    z = model.latents_for(range(len(low)), {"lowres": list(padded)}, seed=seed, size=size,
                          steering=Steering(tile=tile), **settings)  # fmt: skip
    return to_uint8(model.autoencoder.decode(z))[:, :height, :width]


@torch.no_grad()
def inpaint_images(
    model: LoadedDiffusion, images: np.ndarray, masks: np.ndarray, *, seed: int = 0, ids: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None, classes: Sequence[str | int] | None = None, blend: int = 8,
    resample: int = 1, tile: int = 0, **settings,
) -> np.ndarray:
    """uint8 (n, H, W, 3) and bool (n, H, W), True = hole -> uint8 (n, H, W, 3); pixels outside holes as they were.

    A model of task inpaint is told the masked image; any other generating model keeps the known region on its way
    down (each step `resample` times). prompts, classes: one a picture, where the model takes them. blend: pixels over
    which a hole's rim is fitted to what lies around it. ids, tile, settings as `upscale_images`.
    """
    raise NotImplementedError


def unit_of(model: LoadedDiffusion) -> int:
    """Pixels that both sides of a picture must be a multiple of: the autoencoder's f times the UNet's factor."""
    return model.autoencoder.network.f * model.model.unet.size_factor

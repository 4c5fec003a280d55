"""Super-resolution (Sec. 4.4): small images made larger by a model whose UNet reads them beside z_t."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ldmcli.conditions.parse import on_padded
from ldmcli.core.errors import UsageError
from ldmcli.core.settings import TASK_CONDITIONS
from ldmcli.data.arrays import to_pixels
from ldmcli.maths import compositing
from ldmcli.maths.tiles import pad_reflect
from ldmcli.sampling.draw import Draw, draw_images, tile_side
from ldmcli.sampling.guiding import ImageGuiding
from ldmcli.sampling.memory import MAX_MEMORY
from ldmcli.sampling.model import TrainedDiffusion


@torch.no_grad()
def upscale_images(
    model: TrainedDiffusion,
    low: np.ndarray,
    *,
    seed: int = 0,
    ids: Sequence[int] | None = None,
    values: Mapping[str, Sequence] | None = None,
    tone: float | None = None,
    tile: int = 0,
    max_memory: float = MAX_MEMORY,
    negative_prompt: str = "",
    guiding: ImageGuiding | None = None,
    **settings,
) -> np.ndarray:
    """uint8 (n, h, w, 3) -> uint8 (n, h·scale, w·scale, 3) by a model trained with task sr. Any h and w.

    Image i is sampled with the noise of sample ids[i] (default 0 … n-1). values: of further conditions by name, one an
    image, maps as large as the result. tone: pixels of the small image beyond which brightness and colour are its own
    (`match_low_frequencies`); 0 = as sampled, None = as the model's task.tone says. tile: pixels a side above which the
    networks see overlapping tiles; 0 = as many as fit into `max_memory` GiB. guiding: leads results to what, made small
    again, is the small image (Sec. 4.4); None = they are not led. settings: steps, guidance, guidance_interval,
    sampler, eta, temperature, spacing. Raises UsageError for a model of another task, InputError for images below one
    latent.
    """
    task = model.config.task
    if task.name != "sr":
        raise UsageError("upscale: this model was not trained for super-resolution (`ldm train-ldm --task sr`)")
    height, width = low.shape[1] * task.scale, low.shape[2] * task.scale
    model.check_size((height, width))
    step = int(np.lcm(model.size_multiple, task.scale)) // task.scale  # low pixels that make whole latents
    images = [pad_reflect(image, step) for image in low]
    size = (images[0].shape[0] * task.scale, images[0].shape[1] * task.scale)
    tile, guide = tile_side(model, size, settings, tile=tile, max_memory=max_memory), None
    if guiding is not None and guiding.scale > 0:
        check_guided(tile, size)
        guide = guiding.guide(model, to_pixels(np.stack(images)), size, size)
    draw = Draw(
        ids=range(len(low)) if ids is None else ids,
        seed=seed,
        values={**on_padded(values or {}, (height, width), step * task.scale), TASK_CONDITIONS["sr"]: images},
        settings=settings,
        negative_prompt=negative_prompt,
        size=size,
        guide=guide,
        tile=tile,
        max_memory=max_memory,
    )
    sampled = draw_images(model, draw)[:, :height, :width]
    return compositing.match_low_frequencies(sampled, low, task.tone if tone is None else tone)


def check_guided(tile: int, size: tuple[int, int]) -> None:
    """Raises UsageError for a guided picture of `size` px that would be drawn in tiles: gradients pass through the
    whole of it."""
    if tile:
        raise UsageError(
            f"guide_scale: {size[1]}x{size[0]} px are too many to be guided, since gradients pass through the whole "
            "picture; take a smaller one, raise --max-memory, or leave --guide-scale away"
        )

"""Inpainting (Sec. 4.5): holes of images filled by a model that reads the masked image beside z_t, or by any model that
generates, which then keeps the known region at every step.

Holes are filled in windows around them, at least as large as the images that the model was trained on and with
surroundings a quarter as wide on each side; the rest of a photograph is never looked at. A model sees the hole at the
scale that it knows, whatever the size of the photograph, and time goes with the hole. What is larger than the bound on
memory goes through the networks in tiles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ldmcli.conditions import CONDITIONS
from ldmcli.conditions.parse import on_padded
from ldmcli.core.errors import UsageError
from ldmcli.core.settings import TASK_CONDITIONS
from ldmcli.diffusion.sample import KnownRegion
from ldmcli.maths import compositing, rng
from ldmcli.maths.pixels import tensor_to_pixels
from ldmcli.maths.tiles import pad_reflect
from ldmcli.sampling import memory
from ldmcli.sampling.draw import Draw, draw_images, tile_side
from ldmcli.sampling.memory import MAX_MEMORY
from ldmcli.sampling.model import TrainedDiffusion

BLEND = 8  # pixels
RESAMPLE = 10  # as in the RePaint paper; docs/experiments.md has 1, 4 and 10 compared


@dataclass(frozen=True)
class _Window:
    """A part of an image with a hole. image: its index; index: which of that image's windows."""

    image: int
    index: int
    rows: slice
    columns: slice

    @property
    def where(self) -> tuple[slice, slice]:
        return self.rows, self.columns

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


@torch.no_grad()
def inpaint_images(
    model: TrainedDiffusion,
    images: np.ndarray,
    masks: np.ndarray,
    *,
    seed: int = 0,
    ids: Sequence[int] | None = None,
    values: Mapping[str, Sequence] | None = None,
    blend: int = BLEND,
    resample: int = RESAMPLE,
    whole: bool = False,
    tile: int = 0,
    max_memory: float = MAX_MEMORY,
    negative_prompt: str = "",
    **settings,
) -> np.ndarray:
    """uint8 (n, H, W, 3) and bool (n, H, W), True = hole -> uint8 (n, H, W, 3); pixels outside holes as they were.

    A model of task inpaint is conditioned on the masked image. Where that was filled with patches, what the first stage
    loses of them is put back into the sample (task.detail): latents hold no fine texture. Any other generating model
    keeps the known region on its way down (each step `resample` times, as RePaint). blend: pixels around a hole by
    which brightness and colour in it are fitted (`match_border`); 0 = as sampled. whole: the networks see each image as
    a whole (Tab. 7), not windows around its holes; so it is with a layout, which speaks of the whole image. ids,
    values, tile, max_memory, settings as `upscale_images`. Raises UsageError for a model that can't, InputError for
    images below one latent.
    """
    if model.config.task.name == "sr":
        raise UsageError("inpaint: this model was trained for super-resolution; take one for inpainting or generation")
    model.check_size((images.shape[1], images.shape[2]))
    ids, values, unit = range(len(images)) if ids is None else ids, values or {}, model.size_multiple
    out = images.copy()
    for group in _windows(model, masks, whole=whole or any(CONDITIONS[name].whole for name in values)):
        index, shape = group[0].index, group[0].shape
        parts = [tuple(pad_reflect(x[one.image][one.where], unit) for x in (images, masks)) for one in group]
        of_window = {
            name: [CONDITIONS[name].window(x[one.image], one.where) for one in group] for name, x in values.items()
        }
        draw = Draw(
            ids=[ids[one.image] for one in group],
            seed=seed if index == 0 else rng.key(seed, "window", index),
            values=on_padded(of_window, shape, unit),
            settings=settings,
            negative_prompt=negative_prompt,
            size=parts[0][0].shape[:2],
            tile=tile_side(model, parts[0][0].shape[:2], settings, tile=tile, max_memory=max_memory),
            max_memory=max_memory,
        )
        for one, (image, hole), sampled in zip(group, parts, _sample_windows(model, parts, draw, resample)):
            sampled = compositing.match_border(image, sampled, hole, blend).round().clip(0, 255).astype(np.uint8)
            inside = tuple(slice(0, side) for side in shape)
            out[one.image][one.where] = compositing.composite(out[one.image][one.where], sampled[inside], hole[inside])
    return out


def _windows(model: TrainedDiffusion, masks: np.ndarray, whole: bool) -> list[list[_Window]]:
    """Windows around the holes, those of one shape and index together. whole: one window an image, all of it."""
    least, (height, width) = model.trained_size, masks.shape[1:]
    groups: dict[tuple, list[_Window]] = {}
    for i, hole in enumerate(masks):
        found = compositing.hole_windows(hole, least, (least[0] // 4, least[1] // 4), model.size_multiple)
        if found and whole:
            found = [(slice(0, height), slice(0, width))]
        for index, where in enumerate(found):
            window = _Window(i, index, *where)
            groups.setdefault((window.shape, index), []).append(window)
    return list(groups.values())


def _sample_windows(
    model: TrainedDiffusion, parts: list[tuple[np.ndarray, ...]], draw: Draw, resample: int
) -> np.ndarray:
    """Windows (image, hole) whose sides are whole latents, with their holes sampled: float32 (n, H, W, 3), about
    0 … 255."""
    name, task = TASK_CONDITIONS["inpaint"], model.config.task
    if task.name != "inpaint":
        return draw_images(model, replace(draw, known=_known_region(model, parts, draw, resample))).astype(np.float32)
    inputs = model.conditions.prepare_one(name, parts)
    sampled = draw_images(model, replace(draw, inputs=inputs)).astype(np.float32)
    if task.fill == "patches" and task.detail:
        sampled += _lost_detail(model, inputs[f"{name}.image"], draw)
    return sampled


def _known_region(
    model: TrainedDiffusion, parts: list[tuple[np.ndarray, ...]], draw: Draw, resample: int
) -> KnownRegion:
    """What is outside the holes, in latents: a latent is known where all of its pixels are."""
    filled = np.stack([compositing.fill_smoothly(image, hole) for image, hole in parts])
    keep = 1 - torch.from_numpy(np.stack([hole for _, hole in parts]))[:, None].float()
    keep = -torch.nn.functional.max_pool2d(-keep, model.autoencoder.network.f)
    z_0 = memory.encode(model.autoencoder, filled, draw.tile, draw.max_memory)
    return KnownRegion(z_0, keep.to(model.device), resample)


def _lost_detail(model: TrainedDiffusion, image: Tensor, draw: Draw) -> np.ndarray:
    """What the first stage loses of the image that the model reads, uint8 (n, 3, H, W): float32 (n, H, W, 3)."""
    seen = image.permute(0, 2, 3, 1).numpy()
    z = memory.encode(model.autoencoder, seen, draw.tile, draw.max_memory)
    return seen.astype(np.float32) - tensor_to_pixels(memory.decode(model.autoencoder, z, draw.tile, draw.max_memory))

"""Images from images: super-resolution and inpainting of several sizes, and what is checked before either."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from ldmcli.conditions.parse import check_missing, conditioner, parse_sized, warn_of_values
from ldmcli.conditions.text import negative_inputs
from ldmcli.diffusion.guidance import guidance_steps
from ldmcli.diffusion.sample import check_sampling, with_overrides
from ldmcli.sampling import memory
from ldmcli.sampling.draw import tile_side, warn_of_idle_guidance
from ldmcli.sampling.inpainting import inpaint_images
from ldmcli.sampling.memory import MAX_MEMORY
from ldmcli.sampling.model import TrainedDiffusion
from ldmcli.sampling.super_resolution import upscale_images


def edit_images(
    model: TrainedDiffusion,
    images: Sequence[np.ndarray],
    holes: Sequence[np.ndarray] | None,
    values: Mapping[str, Sequence],
    *,
    n: int = 1,
    first: int = 0,
    batch_size: int = 16,
    **how,
) -> list[Image.Image]:
    """n results for each entry of the longest list, from number `first` on: sample k enlarges images[k mod their
    number], or fills its hole, conditioned on values[name][k mod their number], as `parse_unsized` left them.

    Images, uint8 (h, w, 3), may differ in size; those of one size go together. holes: bool (h, w); None enlarges.
    how: as `upscale_images` and `inpaint_images`.
    """
    scale = 1 if holes is not None else model.config.task.scale
    total = n * max(len(images), *(len(given) for given in values.values()), 0)
    groups: dict[tuple[int, int], list[int]] = {}
    for k in range(first, total):
        height, width = images[k % len(images)].shape[:2]
        groups.setdefault((height * scale, width * scale), []).append(k)
    results: dict[int, np.ndarray] = {}
    for size, group in groups.items():
        most = memory.largest_batch(model, size, how.get("max_memory", MAX_MEMORY), batch_size)
        for ids in (group[start : start + most] for start in range(0, len(group), most)):
            batch = np.stack([images[k % len(images)] for k in ids])
            raw = {name: [given[k % len(given)] for k in ids] for name, given in values.items() if len(given)}
            own = parse_sized(model.conditions, raw, size)
            if holes is None:
                made = upscale_images(model, batch, ids=ids, values=own, **how)
            else:
                made = inpaint_images(
                    model, batch, np.stack([holes[k % len(holes)] for k in ids]), ids=ids, values=own, **how
                )
            results |= dict(zip(ids, made))
    return [Image.fromarray(results[k]) for k in range(first, total)]


def check_edit(
    model: TrainedDiffusion,
    size: tuple[int, int],
    tile: int,
    settings: Mapping,
    values: Mapping[str, Sequence],
    negative_prompt: str = "",
) -> None:
    """Raises for what is wrong with an edit that gives images of `size` px, without sampling any."""
    conditions = model.conditions
    model.check_size(size)
    check_sampling(with_overrides(model.config.sample, **settings), model.schedule, model.config.distill)
    if tile:
        tile_side(model, size, settings, tile=tile)
    warn_of_idle_guidance(model, settings.get("guidance"))
    guidance_steps(conditions.kinds, settings.get("guidance") or 1.0)
    for name, given in values.items():
        conditioner(conditions, name)
        conditions.prepare_one(name, list(given))
    warn_of_values(conditions, values)
    missing = [name for name in conditions.droppable if name not in values]
    check_missing(conditions, missing, model.config.condition.drop)
    negative_inputs(conditions, negative_prompt, 1)

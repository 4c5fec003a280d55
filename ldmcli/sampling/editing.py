"""Pictures in, pictures out: larger ones (super-resolution, Sec. 4.4), and ones with holes filled (Sec. 4.5).

Where holes are filled: in rectangles around them, at least as large as the pictures that the model was trained on and
with surroundings a quarter as wide on each side; the rest of a photograph is never looked at. A model sees the hole at
the scale that it knows, whatever the size of the photograph, and time goes with the hole. What is larger than the
bound on memory goes through the networks in tiles.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldmcli.conditions import CONDITIONS
from ldmcli.conditions.parse import check_missing, conditioner, on_padded, parse_sized, warn_of_values
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import TASK_CONDITIONS
from ldmcli.diffusion.guidance import guidance_steps
from ldmcli.diffusion.sample import KnownRegion, check_sampling, draw_latents, with_overrides
from ldmcli.maths import compositing, rng
from ldmcli.maths.pixels import tensor_to_pixels
from ldmcli.maths.tiles import pad_reflect
from ldmcli.sampling import memory
from ldmcli.sampling.memory import MAX_MEMORY
from ldmcli.sampling.model import LoadedDiffusion

BLEND = 8  # pixels
# As in the RePaint paper. With 20 steps on emoji of 64 px, once left foreign things in the hole (PSNR 9.6 dB in it),
# 4 times blurred ones (11.9), 10 times lines and colours that go on (11.7)
RESAMPLE = 10


@torch.no_grad()
def upscale_images(
    model: LoadedDiffusion,
    low: np.ndarray,
    *,
    seed: int = 0,
    ids: Sequence[int] | None = None,
    told: Mapping[str, Sequence] | None = None,
    tone: float | None = None,
    tile: int = 0,
    max_memory: float = MAX_MEMORY,
    **settings,
) -> np.ndarray:
    """uint8 (n, h, w, 3) -> uint8 (n, h·scale, w·scale, 3) by a model trained with task sr. Any h and w.

    Picture i is drawn with the noise of sample ids[i] (default 0 … n-1). told: values of further conditions by kind,
    one a picture, maps as large as the result. tone: pixels of the small picture beyond which brightness and colour are
    its own (`match_low_frequencies`); 0 = as drawn, None = as the model's task.tone says. tile: pixels a side
    above which the networks see overlapping tiles; 0 = as many as fit into `max_memory` GiB. settings: steps,
    guidance, guidance_interval, sampler, eta, temperature, spacing, negative_prompt. Raises UsageError for a model
    of another task, InputError for pictures below one latent.
    """
    if model.config.task.name != "sr":
        raise UsageError("upscale: this model was not trained for super-resolution (`ldm train-ldm --task sr`)")
    scale, ids = model.config.task.scale, _ids(ids, len(low))
    height, width = low.shape[1] * scale, low.shape[2] * scale
    _check_side(model, (height, width))
    step = int(np.lcm(unit_of(model), scale)) // scale  # low pixels that make a whole number of latents
    images = [pad_reflect(image, step) for image in low]
    size = (images[0].shape[0] * scale, images[0].shape[1] * scale)
    side = tile_side(model, size, tile, max_memory, settings)
    given = on_padded(told or {}, (height, width), step * scale)
    given[TASK_CONDITIONS["sr"]] = images
    with _first_stage(model, side, max_memory):
        z = _drawn(model, given, ids, seed, size, settings, tile=side)
    made = tensor_to_pixels(memory.decode(model.autoencoder, z, side, max_memory))[:, :height, :width]
    return compositing.match_low_frequencies(made, low, model.config.task.tone if tone is None else tone)


@torch.no_grad()
def inpaint_images(
    model: LoadedDiffusion,
    images: np.ndarray,
    masks: np.ndarray,
    *,
    seed: int = 0,
    ids: Sequence[int] | None = None,
    told: Mapping[str, Sequence] | None = None,
    blend: int = BLEND,
    resample: int = RESAMPLE,
    tile: int = 0,
    max_memory: float = MAX_MEMORY,
    **settings,
) -> np.ndarray:
    """uint8 (n, H, W, 3) and bool (n, H, W), True = hole -> uint8 (n, H, W, 3); pixels outside holes as they were.

    A model of task inpaint is told the masked picture. Where that was filled with patches, what the first stage loses
    of them is put back into what is drawn (task.detail): latents hold no fine texture. Any other generating model keeps
    the known region on its way down (each step `resample` times, as RePaint). blend: pixels around a hole by
    which brightness and colour in it are fitted (`match_border`); 0 = as drawn. A layout speaks of the whole
    picture, which is then looked at as a whole. ids, told, tile, max_memory, settings as `upscale_images`. Raises
    UsageError for a model that can't, InputError for pictures below one latent.
    """
    if model.config.task.name == "sr":
        raise UsageError("inpaint: this model was trained for super-resolution; take one for inpainting or generation")
    ids, size = _ids(ids, len(images)), images.shape[1:3]
    _check_side(model, size)
    known = {kind: list(given) for kind, given in (told or {}).items()}
    out, least, unit = images.copy(), trained_size(model), unit_of(model)
    jobs = []  # (picture, window, which of its windows)
    for i, hole in enumerate(masks):
        found = compositing.hole_windows(hole, least, (least[0] // 4, least[1] // 4), unit)
        if found and any(CONDITIONS[kind].whole for kind in known):
            found = [(slice(0, size[0]), slice(0, size[1]))]
        jobs += [(i, window, k) for k, window in enumerate(found)]
    batches: dict[tuple, list] = {}
    for i, window, k in jobs:
        shape = tuple(part.stop - part.start for part in window)
        batches.setdefault((shape, k), []).append((i, window))
    for (_, k), batch in batches.items():
        which = [i for i, _ in batch]
        parts = [(pad_reflect(images[i][window], unit), pad_reflect(masks[i][window], unit)) for i, window in batch]
        here = {
            kind: [CONDITIONS[kind].window(given[i], window) for i, window in batch] for kind, given in known.items()
        }
        here = on_padded(here, shape, unit)
        drawn = _fill(
            model,
            parts,
            here,
            [ids[i] for i in which],
            seed if k == 0 else rng.key(seed, "window", k),
            (tile, max_memory, resample),
            settings,
        )
        for (i, window), (image, hole), made in zip(batch, parts, drawn):
            made = compositing.match_border(image, made, hole, blend).round().clip(0, 255).astype(np.uint8)
            rows, columns = (slice(0, part.stop - part.start) for part in window)
            out[i][window] = compositing.composite(out[i][window], made[rows, columns], hole[rows, columns])
    return out


def edited(
    model: LoadedDiffusion,
    pictures: Sequence[np.ndarray],
    holes: Sequence[np.ndarray] | None,
    told: Mapping[str, Sequence],
    *,
    n: int = 1,
    first: int = 0,
    batch_size: int = 16,
    **how,
) -> list[Image.Image]:
    """n results for each entry of the longest list, from number `first` on: sample k enlarges pictures[k mod their
    number], or fills its hole, told told[kind][k mod their number]: values, but maps as people give them.

    Pictures, uint8 (h, w, 3), may differ in size; those of one size go together. holes: bool (h, w); None enlarges.
    how: as `upscale_images` and `inpaint_images`.
    """
    scale = 1 if holes is not None else model.config.task.scale
    total = n * max(len(pictures), *(len(given) for given in told.values()), 0)
    groups: dict[tuple[int, int], list[int]] = {}
    for k in range(first, total):
        height, width = pictures[k % len(pictures)].shape[:2]
        groups.setdefault((height * scale, width * scale), []).append(k)
    found: dict[int, np.ndarray] = {}
    for size, group in groups.items():
        most = memory.batch_within(model, size, how.get("max_memory", MAX_MEMORY), batch_size)
        for ids in (group[start : start + most] for start in range(0, len(group), most)):
            shown = np.stack([pictures[k % len(pictures)] for k in ids])
            asked = {kind: [given[k % len(given)] for k in ids] for kind, given in told.items() if len(given)}
            asked = parse_sized(model.model.conditions, asked, size)
            if holes is None:
                drawn = upscale_images(model, shown, ids=ids, told=asked, **how)
            else:
                masks = np.stack([holes[k % len(holes)] for k in ids])
                drawn = inpaint_images(model, shown, masks, ids=ids, told=asked, **how)
            found |= dict(zip(ids, drawn))
    return [Image.fromarray(found[k]) for k in range(first, total)]


def _fill(model, parts, told, ids, seed, how, settings) -> np.ndarray:
    """Pictures whose sides are whole units, with their holes drawn: float32 (n, H, W, 3), about 0 … 255."""
    tile, max_memory, resample = how
    size, known = parts[0][0].shape[:2], None
    side = tile_side(model, size, tile, max_memory, settings)
    prepared: dict[str, Tensor] = {}
    if model.config.task.name == "inpaint":
        prepared = model.model.conditions.prepare_one(TASK_CONDITIONS["inpaint"], parts)
    else:
        whole = np.stack([compositing.fill_smoothly(image, hole) for image, hole in parts])
        keep = 1 - torch.from_numpy(np.stack([hole for _, hole in parts]))[:, None].float()
        f = model.autoencoder.network.f
        keep = -torch.nn.functional.max_pool2d(-keep, f)  # a latent is known where all of its pixels are
        known = KnownRegion(memory.encode(model.autoencoder, whole, side, max_memory), keep.to(model.device), resample)
    with _first_stage(model, side, max_memory):
        z = _drawn(model, told, ids, seed, size, settings, prepared, known=known, tile=side)
    made = tensor_to_pixels(memory.decode(model.autoencoder, z, side, max_memory)).astype(np.float32)
    if prepared and model.config.task.fill == "patches" and model.config.task.detail:
        seen = prepared[f"{TASK_CONDITIONS['inpaint']}.image"].permute(0, 2, 3, 1).numpy()
        z = memory.encode(model.autoencoder, seen, side, max_memory)
        made += seen.astype(np.float32) - tensor_to_pixels(memory.decode(model.autoencoder, z, side, max_memory))
    return made


@contextmanager
def _first_stage(model: LoadedDiffusion, side: int, max_memory: float) -> Iterator[None]:
    """The encoder lent to the conditions, in tiles for a while."""
    lent = model.model.conditions.first_stage
    if side and lent is not None:
        model.model.conditions.first_stage = partial(memory.encode, model.autoencoder, tile=side, max_memory=max_memory)
    try:
        yield
    finally:
        model.model.conditions.first_stage = lent


def _drawn(
    model: LoadedDiffusion,
    told: dict[str, list],
    ids: Sequence[int],
    seed: int,
    size: tuple[int, int],
    settings: Mapping,
    prepared: Mapping[str, Tensor] | None = None,
    *,
    known: KnownRegion | None = None,
    tile: int = 0,
) -> Tensor:
    """Final latents of pictures of `size` px, one for each of `ids`, told the entries of `told` in the same order.

    prepared: inputs of further conditions (`Conditions.prepare_one`). A prompt, class or layout that is not told is the
    model's null.
    """
    conditions, n = model.model.conditions, len(ids)
    inputs: dict[str, Tensor] = dict(prepared or {})
    ready = {name.partition(".")[0] for name in inputs}
    for kind, given in told.items():
        conditioner(conditions, kind)
        inputs |= conditions.prepare_one(kind, given)
    missing = [kind for kind in conditions.kinds if kind not in told and kind not in ready]
    check_missing(conditions, missing, model.config.condition.drop)
    if missing:
        null = conditions.null(n, inputs)
        inputs |= {name: tensor for name, tensor in null.items() if name.partition(".")[0] in missing}
    if missing and set(missing) == set(conditions.droppable):
        settings = {**settings, "guidance": 1.0}  # nothing is asked for, so there is nothing to lead to
    settings = dict(settings)
    negative = settings.pop("negative_prompt", "")
    chosen = with_overrides(model.config.sample, **settings)
    check_sampling(chosen, model.schedule)
    model._warn_about_guidance(chosen.guidance, negative)
    return draw_latents(
        model.model,
        model.schedule,
        chosen,
        ids=ids,
        seed=seed,
        inputs=inputs,
        negative=model._negative(negative, n),
        shape=model.latent_shape(size),
        known=known,
        tile=tile,
    )


def tile_side(model: LoadedDiffusion, size: tuple[int, int], tile: int, max_memory: float, settings: Mapping) -> int:
    """Latent positions a side of a tile for pictures of `size` px; 0 = no tiles. tile: pixels, 0 = by memory.

    Raises UsageError for a tile below the model's smallest, ResourceError where not even that fits.
    """
    unit = unit_of(model)
    if tile:
        if tile < unit:
            raise UsageError(f"--tile {tile}: at least {unit} px with this model")
        return tile // unit * model.model.unet.size_factor
    scale = settings.get("guidance")  # of both halves, though a picture without a prompt has one
    scale = model.config.sample.guidance if scale is None else scale
    steps = [kinds for kinds, _ in guidance_steps(model.model.conditions.kinds, scale) if kinds]
    return memory.tile_within(model, size, max_memory, halves=1 + len(steps) * (scale != 1))


def check_edit(
    model: LoadedDiffusion,
    size: tuple[int, int],
    tile: int,
    settings: Mapping,
    told: Mapping[str, Sequence],
    negative: str = "",
) -> None:
    """Raises for what is wrong with an edit that gives pictures of `size` px, without drawing any. told: values."""
    _check_side(model, size)
    check_sampling(with_overrides(model.config.sample, **settings), model.schedule)
    if tile:
        tile_side(model, size, tile, MAX_MEMORY, settings)
    model.warn_of_idle_guidance(settings.get("guidance"))
    conditions = model.model.conditions
    guidance_steps(conditions.kinds, settings.get("guidance") or 1.0)
    for kind, given in told.items():
        conditioner(conditions, kind)
        conditions.prepare_one(kind, list(given))
    warn_of_values(conditions, told)
    missing = [kind for kind in conditions.droppable if kind not in told]
    check_missing(conditions, missing, model.config.condition.drop)
    model._negative(negative, 1)


def unit_of(model: LoadedDiffusion) -> int:
    """Pixels that both sides of a picture must be a multiple of: the autoencoder's f times the UNet's factor."""
    return model.autoencoder.network.f * model.model.unet.size_factor


def trained_size(model: LoadedDiffusion) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that the model was trained on."""
    _, height, width = model.model.latent_shape
    return height * model.autoencoder.network.f, width * model.autoencoder.network.f


def _ids(ids: Sequence[int] | None, n: int) -> list[int]:
    return list(range(n) if ids is None else ids)


def _check_side(model: LoadedDiffusion, size: tuple[int, int]) -> None:
    f = model.autoencoder.network.f
    if min(size) < f:
        raise InputError(f"a picture of {size[1]}x{size[0]} px is smaller than one latent ({f} px)")

"""Measures of a model with a task: its answer for each held-out picture beside the true one, and a plain method's.

Super-resolution is given rows made small by the degradation that the model was trained on, inpainting rows with a
random mask, both by (seed, row). What is compared is the enlarged picture, and the filled one with all known pixels in
their place. The plain methods: bicubic interpolation of the same small picture (a = -0.5); the biharmonic filling of
scikit-image where that is installed, and the filling that the model itself is given (`task.fill`): what the network
adds is what it is better than that. A model without a task and one of super-resolution can be guided to rows made small
(Sec. 4.4, Tab. 4); beside it stand the same samples without the guide.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import MASKS, TASK_CONDITIONS
from ldmcli.data.arrays import to_pixels
from ldmcli.data.cache import cache_key
from ldmcli.data.degradations import degrade, resize, to_uint8
from ldmcli.data.masks import masked_share
from ldmcli.evaluation.features import content_hash
from ldmcli.evaluation.image_streams import (
    ImageStream,
    batches,
    check_columns,
    condition_source,
    positions,
    sample_for_rows,
)
from ldmcli.evaluation.mask_files import folder_masks
from ldmcli.maths.patchmatch import patchmatch_fill
from ldmcli.maths.smooth_inpainting import thin_plate_fill
from ldmcli.sampling.guiding import ImageGuiding
from ldmcli.sampling.inpainting import inpaint_images
from ldmcli.sampling.machine import stated_precision
from ldmcli.sampling.super_resolution import upscale_images

FILLINGS = {"smooth": lambda x, hole: thin_plate_fill(x[None], hole[None])[0], "patches": patchmatch_fill}
PLAIN_METHODS = ("bicubic", "biharmonic", *FILLINGS)  # they say how much a model's number is worth
UNGUIDED = "unguided"  # the model's own samples without the guide


def task_of(model) -> str:
    """Of a diffusion model: "sr", "inpaint" or "generate"."""
    return next((task for task, name in TASK_CONDITIONS.items() if name in model.conditions.kinds), "generate")


def task_sources(
    model,
    rows,
    ids: list[int],
    truth: ImageStream,
    *,
    size: tuple[int, int],
    seed: int,
    batch_size: int,
    settings: dict[str, Any],
    masks: str | Path | None = None,
    pasting: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[ImageStream, dict[str, ImageStream], dict[str, Any]]:
    """(the model's answers for rows `ids`, plain methods by name, protocol), in the order of `ids`.

    Answer k is sampled from the noise of sample k of `seed`. truth: the rows' own pictures at `size`, for their
    protocol. masks: of inpainting, a kind of the setting task.masks or a folder; None = the kind of the training.
    pasting: blend and whole of `inpaint_images`, where they are given.
    Raises InputError where the data lack what the model is conditioned on.
    """
    task = task_of(model)
    check_columns(rows, tuple(model.conditions.kinds), model.config.data)
    dataset = condition_source(model, rows, size, seed)
    if masks in MASKS:
        dataset.config = replace(dataset.config, task=replace(dataset.config.task, masks=str(masks)))
    elif masks is not None:
        dataset.given_masks = folder_masks(Path(masks), rows, ids, size)
    protocol = {**truth.protocol, **stated_precision(model.precision), "fingerprint": model.fingerprint, "task": task}
    plain = {"bicubic": _bicubic} if task == "sr" else _fillings(model.config.task.fill)
    stated: dict[str, Any] = {"task": task, "baselines": list(plain)}
    drawn = [protocol, size, seed, {**settings, **pasting}, dataset.config.task]  # what the answers depend on
    if task == "sr":
        stated |= {"scale": model.config.task.scale, "degradation": model.config.task.degradation}
    else:
        holes = [(float(hole.mean()), content_hash(hole)) for _, hole in _pairs(dataset, ids)]
        stated["shares"] = shares = [share for share, _ in holes]
        stated |= {"masked_share": masked_share(shares), "masks": str(masks or dataset.config.task.masks), **pasting}
        drawn.append([name for _, name in holes])
    answers_stream = ImageStream(
        name="model",
        count=len(ids),
        read=_answers(model, dataset, ids, seed, batch_size, {**settings, **pasting}),
        protocol={**protocol, "source": "model"},
        key=_key(truth, drawn),
        batch=batch_size,
        action="sampling",
    )
    baselines = {
        name: replace(
            answers_stream,
            name=name,
            protocol={**protocol, "source": name},
            read=_each(dataset, ids, task, method),
            key=_key(truth, [name, *drawn]),
            action="filling" if task == "inpaint" else "enlarging",
        )
        for name, method in plain.items()
    }
    return answers_stream, baselines, stated


def _key(truth: ImageStream, drawn: Any) -> str:
    """Names images by the true ones beside them and by how they were made; "" where the true ones have no name."""
    return truth.key and cache_key(truth.key, json.dumps(drawn, default=str))


def guided_sources(
    model,
    rows,
    ids: list[int],
    truth: ImageStream,
    factor: int,
    *,
    guiding: ImageGuiding,
    size: tuple[int, int],
    seed: int,
    batch_size: int,
    settings: dict[str, Any],
) -> tuple[ImageStream, dict[str, ImageStream], dict[str, Any]]:
    """Samples of a model without a task, or answers of one of super-resolution, each led to its row made `factor` times
    smaller (antialiased bicubic, or as the model's task does it).

    (guided, {"unguided": the same noise and words without a guide, "bicubic": the small picture enlarged},
    protocol), in the order of `ids`. Raises UsageError for a model of another task or factor, InputError where `size`
    is no multiple of the factor.
    """
    task = task_of(model)
    _check_guided(model, factor, size)
    check_columns(rows, tuple(model.conditions.kinds), model.config.data)
    dataset = condition_source(model, rows, size, seed)
    low = _made_small(rows, size, factor) if task == "generate" else partial(_condition, dataset, task)

    def samples(guided: bool):
        if task == "sr":
            how = {**settings, "guiding": guiding if guided else None}
            return _answers(model, dataset, ids, seed, batch_size, how)

        def read(blocks: Sequence[range]) -> Iterator[np.ndarray]:
            for numbers in batches(blocks, batch_size):
                block = [ids[k] for k in numbers]
                pixels = to_pixels(np.stack([low(i) for i in block]))
                guide = guiding.guide(model, pixels, size, size) if guided else None
                yield from sample_for_rows(model, dataset, block, numbers[0], seed, size, settings, guide)

        return read

    protocol = {**truth.protocol, "fingerprint": model.fingerprint, "task": "guided", "source": "model"}
    protocol |= stated_precision(model.precision)
    drawn = [protocol, size, seed, settings, factor, guiding.document()]
    how: dict[str, Any] = {"count": len(ids), "batch": batch_size, "action": "sampling"}
    guided_stream = ImageStream(name="guided", read=samples(True), protocol=protocol, key=_key(truth, drawn), **how)
    others = {
        UNGUIDED: samples(False),
        "bicubic": lambda blocks: (_bicubic(low(ids[k]), size) for k in positions(blocks)),
    }
    plain = {
        name: replace(
            guided_stream, name=name, protocol={**protocol, "source": name}, read=read, key=_key(truth, [name, *drawn])
        )
        for name, read in others.items()
    }
    stated = {"task": "guided", "baselines": list(plain), "guide_factor": factor, **guiding.document()}
    return guided_stream, plain, stated


def _check_guided(model, factor: int, size: tuple[int, int]) -> None:
    task = task_of(model)
    if task == "inpaint":
        raise UsageError(f"--guide-factor: leads models that generate or enlarge; this one is for {task}")
    if task == "sr" and factor != model.config.task.scale:
        raise UsageError(f"--guide-factor {factor}: this model enlarges by {model.config.task.scale}")
    if any(side % factor for side in size):
        raise InputError(
            f"--guide-factor {factor}: pictures of {size[1]}x{size[0]} px can't be made {factor} times "
            "smaller; name a factor that divides both sides"
        )


def _made_small(rows, size: tuple[int, int], factor: int):
    def low(i: int) -> np.ndarray:
        return degrade(rows.pixels(i, size, "center", (0.5, 0.5)), factor, "bicubic", 0)

    return low


def has_biharmonic() -> bool:
    """Whether scikit-image is installed."""
    from importlib.util import find_spec

    return find_spec("skimage") is not None


def answer_for_rows(
    model, dataset, ids: list[int], numbers: Sequence[int], seed: int, settings: dict[str, Any]
) -> np.ndarray:
    """What a model with a task makes of rows `ids`, sampled from the noise of samples `numbers` of `seed`: uint8
    (n, H, W, 3). dataset: of `condition_source`."""
    values = _droppable_values(model, dataset, ids)
    given = dataset.values(TASK_CONDITIONS[task_of(model)], ids, ids)
    if task_of(model) == "sr":
        return upscale_images(model, np.stack(given), seed=seed, ids=numbers, values=values, **settings)
    images, holes = (np.stack(part) for part in zip(*given))
    filled = inpaint_images(model, images, holes, seed=seed, ids=numbers, values=values, **settings)
    return np.where(holes[..., None], filled, images)


def _answers(model, dataset, ids, seed, batch_size, settings):
    def read(blocks: Sequence[range]) -> Iterator[np.ndarray]:
        for numbers in batches(blocks, batch_size):
            yield from answer_for_rows(model, dataset, [ids[k] for k in numbers], numbers, seed, settings)

    return read


def _droppable_values(model, dataset, ids: list[int]) -> dict[str, list]:
    """Values of rows for the conditions beside that of the model's task."""
    return {name: dataset.foreign_values(name, ids) for name in model.conditions.droppable}


def _each(dataset, ids, task: str, method):
    def read(blocks: Sequence[range]) -> Iterator[np.ndarray]:
        for k in positions(blocks):
            yield method(_condition(dataset, task, ids[k]), dataset.size)

    return read


def _condition(dataset, task: str, i: int) -> Any:
    """What a model of a task is given of row i."""
    return dataset.values(TASK_CONDITIONS[task], [i], [i])[0]


def _pairs(dataset, ids) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for i in ids:
        yield _condition(dataset, "inpaint", i)


def _bicubic(low: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    planes = np.ascontiguousarray(low.transpose(2, 0, 1)).astype(np.float32) / 255
    return to_uint8(resize(planes, *size, "antialiased"))  # enlarging widens nothing


def _fillings(fill_name: str) -> dict[str, Callable]:
    """Plain fillings by name."""
    found = {"biharmonic": _biharmonic} if has_biharmonic() else {}
    return found | {name: partial(_apply_fill, fill) for name, fill in FILLINGS.items() if name == fill_name}


def _apply_fill(fill: Callable, pair: tuple[np.ndarray, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    image, hole = pair
    pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)
    filled = fill(pixels, torch.from_numpy(hole)).permute(1, 2, 0).round().clamp(0, 255)
    return np.where(hole[..., None], filled.to(torch.uint8).numpy(), image)


def _biharmonic(pair: tuple[np.ndarray, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    from skimage.restoration import inpaint_biharmonic

    image, hole = pair
    filled = inpaint_biharmonic(np.where(hole[..., None], 0, image) / 255.0, hole, channel_axis=-1)
    return np.where(hole[..., None], (np.clip(filled, 0, 1) * 255).round().astype(np.uint8), image)

"""`ldm sample`: a request to a folder of samples with their settings inside."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ldmcli import __version__
from ldmcli.conditions import outputs
from ldmcli.conditions.class_ import Class
from ldmcli.conditions.parse import centred, list_values, option_values, parse_conditions
from ldmcli.conditions.pictures import labelled
from ldmcli.conditions.text import negative_inputs
from ldmcli.core import console, runs
from ldmcli.core.errors import UsageError
from ldmcli.core.outputs import PROGRESS, SHEET
from ldmcli.data.decode import decode, to_size
from ldmcli.diffusion.sample import Guide, InitLatents, check_sampling, with_overrides
from ldmcli.maths.tiles import pad_edge
from ldmcli.sampling import memory
from ldmcli.sampling.api import LoadedDiffusion, to_pil
from ldmcli.sampling.classifier import ClassGuidance, class_guidance, group_count, without_classes
from ldmcli.sampling.contact_sheets import in_rows
from ldmcli.sampling.draw import Draw, draw_images, tile_side, warn_of_idle_guidance
from ldmcli.sampling.guiding import guide_to, guiding_of
from ldmcli.sampling.image_folder import ImageFolder, Images, contents
from ldmcli.sampling.load import find_model, load
from ldmcli.sampling.machine import ALONE, Machine, stated_precision
from ldmcli.sampling.progress import SAMPLES, progress_bytes
from ldmcli.sampling.request import (
    SampleRequest,
    document_of,
    named_files,
    sampling_of,
    sampling_used,
    stated_distillation,
)

AT_ONCE = (16, 128)  # samples at a time, at most: on a CPU, on a GPU
Size = tuple[int, int] | None  # (height, width) in pixels; None: as trained


def sample_to_folder(
    model: str | None,
    request: SampleRequest,
    out: Path,
    *,
    overwrite: bool = False,
    fmt: str = "png",
    metadata: bool = True,
    progress: str | None = None,
    machine: Machine = ALONE,
) -> dict[str, Any]:
    """Samples what `request` says into `out`: 000000.png …, grid.png. Returns the document that --json prints.
    progress: "row" or "gif" shows how the first samples came about, in progress.png or progress.gif.

    Sample k depends on the seed and k alone; the same command again makes only what is missing. A signal leaves whole
    images only and ends with 130 or 143. machine: its processes share the work; the document is that of rank 0.
    """
    path, loaded, values, draw = machine.world.on_all_ranks(lambda: _ready(model, request, machine))
    led = draw.classes
    groups = group_count(values, led)
    n = request.n or (1 if values or led else loaded.config.sample.n)
    shown_as = [PROGRESS[progress]] if progress else []
    folder = ImageFolder(
        out,
        _record(loaded, request, values, n * groups, fmt, led),
        conditions=outputs.spatial(values),
        inputs=named_files(request),
        sheets=[SHEET, *shown_as],
        overwrite=overwrite,
        world=machine.world,
    )
    describe = _describe(loaded, path, request) | _led_document(request, led)
    folder.write(
        folder.in_batches(request.batch_size or memory.batch_that_fits(loaded, draw.size, *AT_ONCE)),
        _making(loaded, draw, request, values),
        (lambda k: _metadata(k, values, request, describe) | _led_class(k, led)) if metadata else None,
        lambda: _sheet(folder.names, groups, values, loaded),
        action="sampling",
        more=lambda: {
            name: progress_bytes(progress or "", loaded, draw.of(range(min(SAMPLES, n * groups))), request.size)
            for name in shown_as
            if not (out / name).exists()
        },
    )
    made, total, seconds = len(folder.todo), len(folder.names), folder.seconds
    rate = made / seconds if made else 0.0
    console.say(f"{total} images in {out} ({made} drawn in {seconds:.1f} s, {rate:.2f} images/s)")
    return {
        "model": str(path),
        **folder.document(),
        **({"progress": str(out / shown_as[0])} if shown_as else {}),
        "drawn": made,
        "seconds": seconds,
        "images_per_s": rate,
        **describe,
    }


def _ready(
    model: str | None, request: SampleRequest, machine: Machine
) -> tuple[Path, LoadedDiffusion, dict[str, list], Draw]:
    """The model, the values of its conditions, and the draw of all samples."""
    path, loaded = _generating_model(model, request, machine)
    led = _class_guidance(loaded, request)
    values = _parse(loaded, request, led)
    return path, loaded, values, replace(request_draw(loaded, request, values), classes=led)


def _making(
    loaded: LoadedDiffusion, draw: Draw, request: SampleRequest, values: dict[str, list]
) -> Callable[[list[int]], Images]:
    """A function of numbers to those samples, each with the pictures of its conditions."""
    shown = outputs.spatial(values)

    def make(ids: list[int]) -> Images:
        for k, image in zip(ids, to_pil(draw_images(loaded, draw.of(ids)), draw.size, request.size)):
            pixels = np.asarray(image)
            yield (
                image,
                {
                    name: outputs.beside(name, pixels, values[name][k % len(values[name])], loaded.conditions)
                    for name in shown
                },
            )

    return make


def _generating_model(model: str | None, request: SampleRequest, machine: Machine) -> tuple[Path, LoadedDiffusion]:
    """The run named, or the newest. Raises UsageError for one that does not generate from noise."""
    path = find_model(model, "diffusion")
    loaded = load(path, weights=request.weights, mixed_precision=machine.mixed_precision, compile=machine.compile)
    if not isinstance(loaded, LoadedDiffusion):
        raise UsageError(
            f"{path}: an autoencoder; `ldm sample` needs a diffusion run (`ldm reconstruct` takes this one)"
        )
    if loaded.config.task.name != "generate":
        command = {"sr": "ldm upscale", "inpaint": "ldm inpaint"}[loaded.config.task.name]
        raise UsageError(f"{path}: a model for {loaded.config.task.name} starts from a picture: use `{command}`")
    return path, loaded


def request_draw(loaded: LoadedDiffusion, request: SampleRequest, values: dict[str, list]) -> Draw:
    """The draw of all samples of a request, whose values `Draw.of` shares out. Raises for whatever is wrong with it,
    before a folder is made."""
    settings, size = sampling_of(request), loaded.round_up_size(request.size)
    check_sampling(with_overrides(loaded.config.sample, **settings), loaded.schedule, loaded.config.distill)
    if values:
        loaded.conditions.prepare(values)
    negative_inputs(loaded.conditions, request.negative_prompt, 1)
    warn_of_idle_guidance(loaded, request.guidance)
    budget = memory.activation_budget(loaded.device)
    tile = tile_side(loaded, size, settings, max_memory=budget)
    return Draw(
        ids=(),
        seed=request.seed,
        values=centred(values, size, request.size),
        settings=settings,
        negative_prompt=request.negative_prompt,
        size=size,
        init=_init_latents(loaded, request, size, tile, budget),
        guide=_guide(loaded, request, size),
        tile=tile,
        max_memory=budget,
    )


def _init_latents(
    loaded: LoadedDiffusion, request: SampleRequest, size: Size, tile: int, max_memory: float
) -> InitLatents | None:
    """Where an image-to-image run begins (--init-image)."""
    if request.init_image is None:
        return None
    if not 0 < request.strength <= 1:
        raise UsageError(f"--strength {request.strength}: must be above 0 and at most 1")
    inside = request.size or loaded.trained_size
    pixels = pad_edge(to_size(decode(Path(request.init_image), name=str(request.init_image)), inside), size or inside)
    return InitLatents(memory.encode(loaded.autoencoder, pixels[None], tile, max_memory), request.strength)


def _guide(loaded: LoadedDiffusion, request: SampleRequest, size: Size) -> Guide | None:
    """What leads samples to --guide."""
    if request.guide is None:
        return None
    picture = np.asarray(decode(Path(request.guide), name=str(request.guide)))
    return guide_to(loaded, picture, guiding_of(request), size, request.size, f"--guide {request.guide}")


def _record(
    loaded: LoadedDiffusion,
    request: SampleRequest,
    values: dict[str, list],
    total: int,
    fmt: str,
    led: ClassGuidance | None,
) -> dict[str, Any]:
    """What request.json keeps: all that changes the images."""
    record = {"model": loaded.fingerprint, **document_of(request), "total": total, "format": fmt}
    record |= stated_precision(loaded.precision)
    if led is not None:
        record["classifier"] = led.classifier.fingerprint
    if outputs.spatial(values):
        record["told"] = outputs.digest(values)
    if begun := [path for path in (request.init_image, request.guide) if path is not None]:
        record["contents"] = contents(begun)
    return record


def _class_guidance(loaded: LoadedDiffusion, request: SampleRequest) -> ClassGuidance | None:
    """What leads samples to classes (--classifier)."""
    if request.classifier is None:
        return None
    return class_guidance(loaded, request.classifier, request.classes, request.classifier_scale)


def _led_document(request: SampleRequest, led: ClassGuidance | None) -> dict[str, Any]:
    """What is told of a classifier."""
    if led is None or request.classifier is None:
        return {}
    return {
        "classifier": request.classifier.name,
        "classifier_sha256": led.classifier.fingerprint,
        "classifier_scale": led.scale,
    }


def _led_class(k: int, led: ClassGuidance | None) -> dict[str, Any]:
    return {} if led is None else {Class.name: led.classifier.names[led.labels[k % len(led.labels)]]}


def _parse(loaded: LoadedDiffusion, request: SampleRequest, led: ClassGuidance | None) -> dict[str, list]:
    """Values of the model's conditions. Raises UsageError, or InputError for what is wrong with a layout or map."""
    given = list_values(
        option_values(request.given),
        prompt=list(request.prompts),
        classes=list(request.classes),
        layout=list(request.layouts),
        map=list(request.maps),
    )
    given = without_classes(loaded, given, led)
    return parse_conditions(loaded.conditions, given, request.size or loaded.trained_size)


def _describe(loaded: LoadedDiffusion, path: Path, request: SampleRequest) -> dict[str, Any]:
    used = sampling_used(loaded.config.sample, request)
    return {
        "weights": request.weights,
        "model_sha256": loaded.fingerprint,
        **runs.step_document(path),
        "ldm_version": __version__,
        "negative_prompt": request.negative_prompt,
        **({"guide": request.guide.name, **guiding_of(request).document()} if request.guide else {}),
        **used,
        **stated_distillation(loaded.config.distill),
        **stated_precision(loaded.precision),
    }


def _metadata(k: int, values: dict[str, list], request: SampleRequest, describe: dict[str, Any]) -> dict[str, Any]:
    return {**outputs.metadata(values, k), "seed": request.seed, "sample": k, **describe}


def _sheet(names: list[Path], groups: int, values: dict[str, list], loaded: LoadedDiffusion) -> list[list[np.ndarray]]:
    """Rows of a sheet of all samples, at most 256: a prompt a column where there are several, a class's name above, or
    a layout or map before its samples."""
    from PIL import Image

    pictures = [np.asarray(Image.open(name).convert("RGB")) for name in names[:256]]
    conditions = loaded.conditions
    pictures = [
        labelled(one, text) if (text := outputs.caption(values, conditions, k)) else one
        for k, one in enumerate(pictures)
    ]
    if spatial := outputs.spatial(values):
        rows = []
        for group in range(min(groups, len(pictures))):
            own = [(name, values[name][group % len(values[name])]) for name in spatial]
            shown = [outputs.picture(name, value, pictures[0].shape[:2], conditions) for name, value in own]
            rows.append([*shown, *pictures[group::groups]])
        return rows
    columns = groups if 1 < groups <= 16 else min(8, math.ceil(math.sqrt(len(pictures))))
    return in_rows(pictures, columns)

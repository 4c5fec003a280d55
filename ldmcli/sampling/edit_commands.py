"""`ldm inpaint` and `ldm upscale`: picture files to picture files, with the request inside them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from ldmcli import __version__
from ldmcli.conditions.class_ import Class
from ldmcli.conditions.layout import BoxLayout
from ldmcli.conditions.pictures import holed
from ldmcli.conditions.semantic_map import SemanticMap
from ldmcli.core import console, runs
from ldmcli.core.config import from_toml
from ldmcli.core.errors import InputError, LdmError, ModelError, UsageError
from ldmcli.core.settings import DiffusionConfig
from ldmcli.core.world import World
from ldmcli.data.decode import decode, probe
from ldmcli.maths.compositing import fill_smoothly
from ldmcli.sampling import memory
from ldmcli.sampling.api import LoadedDiffusion
from ldmcli.sampling.draw import tile_side
from ldmcli.sampling.edit_sources import EditSource, edit_sources
from ldmcli.sampling.editing import check_edit
from ldmcli.sampling.guiding import guiding_of
from ldmcli.sampling.image_folder import ImageFolder, Images, contents, in_batches
from ldmcli.sampling.inpainting import inpaint_images
from ldmcli.sampling.load import load
from ldmcli.sampling.machine import ALONE, Machine, stated_precision
from ldmcli.sampling.request import EditRequest, document_of, sampling_of, sampling_used, stated_distillation
from ldmcli.sampling.super_resolution import check_guided, upscale_images

SHEET_SIDE, SHEET_ROWS, SHEET_RESULTS = 256, 16, 6
AT_ONCE = {"cpu": 8, "cuda": 64}  # results at a time, at most


def suitable_model(model: str | None, request: EditRequest, machine: Machine = ALONE) -> tuple[Path, LoadedDiffusion]:
    """The run named, or the newest that can do it, which is then said. Raises UsageError or ModelError, saying what
    there is."""
    command = "upscale" if request.scale else "inpaint"
    path = Path(model) if model else _newest(request.scale)
    loaded = load(path, weights=request.weights, mixed_precision=machine.mixed_precision, compile=machine.compile)
    if not isinstance(loaded, LoadedDiffusion):
        raise UsageError(f"{path}: an autoencoder; `ldm {command}` needs a diffusion run")
    task = loaded.config.task
    if request.scale and task.name != "sr":
        raise UsageError(f"{path}: not trained for super-resolution; train one with `ldm train-ldm --task sr`")
    if request.scale and task.scale != request.scale:
        raise UsageError(f"--scale {request.scale}: {path} enlarges by {task.scale}")
    if not request.scale and task.name == "sr":
        raise UsageError(
            f"{path}: a model for super-resolution; inpainting takes one of "
            "`ldm train-ldm --task inpaint`, or any that generates"
        )
    how = {
        "sr": f"enlarges by {task.scale}",
        "inpaint": "trained to inpaint",
        "generate": "not trained to inpaint: known regions are put back at every step",
    }[task.name]
    console.say(f"model: {path} ({how})" if model else f"model: {path} (the newest suitable run; {how})")
    return path, loaded


def _newest(scale: int) -> Path:
    found: dict[str, list[Path]] = {"generate": [], "inpaint": [], "sr": []}
    scales = []
    for row in reversed(runs.list_runs()):
        path = Path(row["path"])
        if row["kind"] != "diffusion" or not (path / "model.safetensors").exists():
            continue
        try:
            config = from_toml("diffusion", (path / "config.toml").read_text(encoding="utf-8"))
        except (LdmError, OSError):
            continue
        assert isinstance(config, DiffusionConfig)
        task = config.task
        if task.name == "sr":
            scales.append(task.scale)
        if task.name != "sr" or task.scale == scale:
            found[task.name].append(path)
    if scale and scales and not found["sr"]:
        known = ", ".join(f"{one}" for one in sorted(set(scales)))
        raise UsageError(f"--scale {scale}: the super-resolution runs below runs/ enlarge by {known}")
    fitting = found["sr"] if scale else [*found["inpaint"], *found["generate"]]
    if not fitting:
        what, options = ("super-resolution", f"--task sr --scale {scale}") if scale else ("suitable", "--task inpaint")
        raise ModelError(
            f"no {what} run with weights below runs/: train one with `ldm train-ldm {options}` or name one with --model"
        )
    return fitting[0]


def inpaint_to_folder(
    model: str | None, request: EditRequest, out: Path, *, machine: Machine = ALONE, **how
) -> dict[str, Any]:
    """Each picture with its hole repainted, n times, into `out`; result k is of picture k mod their number.

    Returns the document that --json prints. Known pixels come back as they were (in png). As `sample_to_folder` for
    everything else: nothing is overwritten, the same command goes on, a signal leaves whole files, processes share the
    work.
    """

    def ready() -> tuple[list[EditSource], list[tuple[int, int]], Path, LoadedDiffusion]:
        sources = edit_sources(request)
        sizes = [probe(source.image) for source in sources]
        for source, size in zip(sources, sizes):
            source.hole(size)
        return sources, sizes, *suitable_model(model, request, machine)

    sources, sizes, path, loaded = machine.world.on_all_ranks(ready)

    def draw(ids: list[int], which: list[EditSource]) -> list[np.ndarray]:
        images = np.stack([source.pixels() for source in which])
        holes = np.stack([source.hole(image.shape[:2]) for source, image in zip(which, images)])
        made = inpaint_images(
            loaded,
            _seen(which, images),
            holes,
            seed=request.seed,
            ids=ids,
            blend=request.blend,
            resample=request.resample,
            values=_values(loaded, request, which, images.shape[1:3]),
            **_sampling_record(request),
        )
        made = np.where(holes[..., None], made, images)
        return [_with_alpha(one, source.alpha(), hole) for one, source, hole in zip(made, which, holes)]

    def shown(source: EditSource) -> list[np.ndarray]:
        image = np.asarray(decode(source.image))
        return [image, holed(image, source.hole(image.shape[:2]))]

    edit = _Edit("inpaint", loaded.trained_size, draw, shown)
    return _to_folder(edit, path, loaded, request, sources, sizes, out, machine.world, **how)


def upscale_to_folder(
    model: str | None, request: EditRequest, out: Path, *, machine: Machine = ALONE, **how
) -> dict[str, Any]:
    """Each picture `scale` times as large, n times, into `out`; otherwise as `inpaint_to_folder`."""

    def ready() -> tuple[list[EditSource], list[tuple[int, int]], Path, LoadedDiffusion, tuple[int, int]]:
        sources = edit_sources(request)
        sizes = [probe(source.image) for source in sources]
        path, loaded = suitable_model(model, request, machine)
        largest = max(sizes, key=lambda size: size[0] * size[1])
        size = (largest[0] * request.scale, largest[1] * request.scale)
        if request.guide_scale:
            check_guided(
                tile_side(loaded, size, sampling_of(request), tile=request.tile, max_memory=request.max_memory), size
            )
        return sources, sizes, path, loaded, size

    sources, sizes, path, loaded, size = machine.world.on_all_ranks(ready)

    def draw(ids: list[int], which: list[EditSource]) -> list[np.ndarray]:
        low = np.stack([source.pixels() for source in which])
        large = (low.shape[1] * request.scale, low.shape[2] * request.scale)
        made = upscale_images(
            loaded,
            _seen(which, low),
            seed=request.seed,
            ids=ids,
            tone=request.tone,
            guiding=guiding_of(request),
            values=_values(loaded, request, which, large),
            **_sampling_record(request),
        )
        return [_with_alpha(one, _enlarged(source.alpha(), large)) for one, source in zip(made, which)]

    def shown(source: EditSource) -> list[np.ndarray]:
        return [np.asarray(decode(source.image))]

    edit = _Edit("upscale", size, draw, shown)
    return _to_folder(edit, path, loaded, request, sources, sizes, out, machine.world, **how)


def _sampling_record(request: EditRequest) -> dict[str, Any]:
    return sampling_of(request) | {
        "tile": request.tile,
        "max_memory": request.max_memory,
        "negative_prompt": request.negative_prompt,
    }


def _values(
    loaded: LoadedDiffusion, request: EditRequest, which: list[EditSource], size: tuple[int, int]
) -> dict[str, list]:
    """Values by condition, one a picture."""
    each = [source.values(loaded, request, size) for source in which]
    return {name: [values[name] for values in each] for name in each[0]}


def _seen(which: list[EditSource], images: np.ndarray) -> np.ndarray:
    """What the networks see of pictures: colours that nobody sees are those around them."""
    found = [source.alpha() for source in which]
    return np.stack(
        [image if alpha is None else fill_smoothly(image, alpha == 0) for image, alpha in zip(images, found)]
    )


def _with_alpha(image: np.ndarray, alpha: np.ndarray | None, hole: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3), or (H, W, 4) where the picture has an alpha channel. In a hole it goes on as it is at the rim; where
    all that is known is opaque, nothing is left of it."""
    if alpha is None:
        return image
    if hole is not None:
        nearest = ndimage.distance_transform_edt(hole, return_distances=False, return_indices=True)
        alpha = alpha[tuple(nearest)]
    return image if alpha.min() == 255 else np.dstack([image, alpha])


def _enlarged(alpha: np.ndarray | None, size: tuple[int, int]) -> np.ndarray | None:
    """An alpha channel at `size` = (height, width), bicubic."""
    if alpha is None:
        return None
    return np.asarray(Image.fromarray(alpha).resize(size[::-1], Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class _Edit:
    """What `ldm inpaint` and `ldm upscale` differ in. largest: what goes through the networks at once, (h, w) px; make:
    results of sources by number; before: what a sheet shows of a source."""

    command: str
    largest: tuple[int, int]
    make: Callable[[list[int], list[EditSource]], list[np.ndarray]]
    before: Callable[[EditSource], list[np.ndarray]]


def _to_folder(
    edit: _Edit,
    path: Path,
    loaded: LoadedDiffusion,
    request: EditRequest,
    sources: list[EditSource],
    sizes: list[tuple[int, int]],
    out: Path,
    world: World,
    *,
    overwrite: bool = False,
    fmt: str = "png",
    metadata: bool = True,
) -> dict[str, Any]:
    """Makes what is missing of n results a source."""
    world.on_all_ranks(lambda: _check(loaded, request, sources, sizes))
    read = [file for source in sources for file in source.files]
    record = world.on_rank_0(lambda: _record(edit, loaded, request, sources, read, fmt))
    folder = ImageFolder(out, record, inputs=read, overwrite=overwrite, world=world)
    if folder.todo and fmt == "jpg" and edit.command == "inpaint":
        console.warn("--format jpg: known pixels change a little as the file is packed; png keeps them")
    most = AT_ONCE.get(loaded.device.type, AT_ONCE["cpu"])
    most = request.batch_size or memory.largest_batch(loaded, edit.largest, request.max_memory, most)
    describe = {
        "command": edit.command,
        "weights": request.weights,
        "model_sha256": loaded.fingerprint,
        **runs.step_document(path),
        "ldm_version": __version__,
        **_plain(sampling_used(loaded.config.sample, request)),
        **stated_distillation(loaded.config.distill),
        **(guiding_of(request).document() if request.guide_scale else {}),
        **stated_precision(loaded.precision),
    }

    def make(ids: list[int]) -> Images:
        for image in edit.make(ids, [sources[k % len(sources)] for k in ids]):
            yield _fit_for(fmt, image), {}

    def image_metadata(k: int) -> dict[str, Any]:
        return {**_about(sources[k % len(sources)], request), "seed": request.seed, "sample": k, **describe}

    folder.write(
        _of_one_size(folder.todo, sizes, folder.largest_batch(most)),
        make,
        image_metadata if metadata else None,
        lambda: _sheet([edit.before(source) for source in sources[:SHEET_ROWS]], folder.names, len(sources)),
        action=edit.command,
    )
    made, total, seconds = len(folder.todo), len(folder.names), folder.seconds
    console.say(f"{total} pictures in {out} ({made} drawn in {seconds:.1f} s)")
    return {
        "model": str(path),
        **folder.document(),
        "sources": [str(sources[k % len(sources)].image) for k in range(total)],
        "drawn": made,
        "seconds": seconds,
        **describe,
    }


def _record(
    edit: _Edit, loaded: LoadedDiffusion, request: EditRequest, sources: list[EditSource], read: list[Path], fmt: str
) -> dict[str, Any]:
    """What request.json keeps: all that changes the images."""
    return {
        "model": loaded.fingerprint,
        "command": edit.command,
        **document_of(request),
        "total": request.n * len(sources),
        "format": fmt,
        "pictures": contents(read),
        **stated_precision(loaded.precision),
    }


def _check(
    loaded: LoadedDiffusion, request: EditRequest, sources: list[EditSource], sizes: list[tuple[int, int]]
) -> None:
    """Raises for what is wrong with a request before a folder is made for it."""
    settings, scale, seen = sampling_of(request), request.scale or 1, set()
    for source, size in zip(sources, sizes):
        if (about := (size, source.map, source.layout)) not in seen:
            seen.add(about)
            whole = (size[0] * scale, size[1] * scale)
            values = {name: [value] for name, value in source.values(loaded, request, whole).items()}
            try:
                check_edit(loaded, whole, request.tile, settings, values, request.negative_prompt)
            except InputError as error:
                raise InputError(f"{source.image}: {error}") from None


def _of_one_size(todo: list[int], sizes: Sequence[tuple[int, int]], most: int) -> list[list[int]]:
    """Batches of results whose pictures have one size, in order of their first."""
    groups: dict[tuple[int, int], list[int]] = {}
    for k in todo:
        groups.setdefault(sizes[k % len(sizes)], []).append(k)
    return [batch for group in groups.values() for batch in in_batches(group, most)]


def _fit_for(fmt: str, image: np.ndarray) -> Image.Image:
    """A picture as its format can hold it."""
    if fmt != "jpg" or image.shape[-1] == 3:
        return Image.fromarray(image)
    console.warn_once("alpha-jpg", "--format jpg: transparency is lost, laid over white; png and webp keep it")
    return decode(Image.fromarray(image))


def _about(source: EditSource, request: EditRequest) -> dict[str, Any]:
    about = {
        "image": source.image.name,
        "mask": source.mask.name if source.mask else None,
        "box": source.box,
        "scale": request.scale or None,
        "prompt": next(iter(request.prompts), None),
        Class.name: next(iter(request.classes), None),
        "negative_prompt": request.negative_prompt or None,
        "given": list(request.given) or None,
        **{name: file.name for name, file in ((BoxLayout.name, source.layout), (SemanticMap.name, source.map)) if file},
    }
    return {name: value for name, value in about.items() if value is not None}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back."""
    return json.loads(json.dumps(values, default=str))


def _sheet(shown: list[list[np.ndarray]], names: list[Path], groups: int) -> list[list[np.ndarray]]:
    """A row a picture, before its results; each brought to one small size."""
    rows = []
    for k, before in enumerate(shown):
        results = [np.asarray(decode(name)) for name in names[k::groups][:SHEET_RESULTS]]
        rows.append([_small(picture) for picture in (*before, *results)])
    return rows


def _small(picture: np.ndarray) -> np.ndarray:
    """A picture in the middle of a white square of SHEET_SIDE px: smaller ones enlarged without smoothing."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    share = SHEET_SIDE / max(image.size)
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    image = image.resize(size, Image.Resampling.BOX if share < 1 else Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (SHEET_SIDE, SHEET_SIDE), "white")
    sheet.paste(image, ((SHEET_SIDE - size[0]) // 2, (SHEET_SIDE - size[1]) // 2))
    return np.asarray(sheet)

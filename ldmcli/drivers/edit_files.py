"""`ldm inpaint` and `ldm upscale`: picture files to picture files, with what was asked for inside them."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldmcli import __version__
from ldmcli.core import console, runs
from ldmcli.core.config import from_toml
from ldmcli.core.errors import InputError, LdmError, ModelError, UsageError
from ldmcli.core.outputs import SHEET, Results
from ldmcli.core.requests import EditRequest, named_files, sampling_of, sampling_used
from ldmcli.core.signals import StopRequest
from ldmcli.data.decode import decode, probe
from ldmcli.drivers import tiling
from ldmcli.drivers.drawing import holed
from ldmcli.drivers.edit import check_edit, inpaint_images, trained_size, upscale_images
from ldmcli.drivers.generate import batches, contents, end_if_asked, image_bytes, image_files, output_names
from ldmcli.drivers.grids import grid, png_bytes
from ldmcli.drivers.image_sources import by_pair_name
from ldmcli.drivers.load import load
from ldmcli.drivers.loaded import LoadedDiffusion

HOLE_LUMINANCE = 128
SHEET_SIDE, SHEET_ROWS, SHEET_RESULTS = 256, 16, 6
LARGEST_BATCH = 8


@dataclass(frozen=True)
class _Source:
    """A picture to work on. mask: a file, or None where a box says where the hole is."""

    image: Path
    mask: Path | None = None
    box: tuple[int, int, int, int] | None = None

    def pixels(self) -> np.ndarray:
        """uint8 (H, W, 3). Raises InputError."""
        return np.asarray(decode(self.image))

    def hole(self, size: tuple[int, int]) -> np.ndarray:
        """bool (H, W), True = hole. Raises InputError or, for a box, UsageError for what cannot be used."""
        if self.mask is None:
            return _boxed(self.box, size, self.image)
        # what is transparent in a mask was not painted
        found = np.asarray(decode(self.mask, background="black").convert("L")) >= HOLE_LUMINANCE
        if found.shape != size:
            raise InputError(f"{self.mask}: a mask of {found.shape[1]}x{found.shape[0]} px for a picture of "
                             f"{size[1]}x{size[0]} px ({self.image}); they must be of one size")
        if not found.any():
            raise InputError(f"{self.mask}: nothing in it is white (luminance {HOLE_LUMINANCE} or more), so there is "
                             "nothing to repaint; white marks the hole")
        if found.all():
            raise InputError(f"{self.mask}: all of it is white, so nothing of the picture would be kept; black marks "
                             "what is known (`ldm sample` draws whole pictures)")
        return found


def _boxed(box: tuple[int, int, int, int] | None, size: tuple[int, int], image: Path) -> np.ndarray:
    assert box is not None
    x, y, width, height = box
    name, whole = f"--box {','.join(map(str, box))}", f"{size[1]}x{size[0]} px ({image})"
    if width < 1 or height < 1:
        raise UsageError(f"{name}: x,y,width,height with a width and height of at least 1")
    if x < 0 or y < 0 or x + width > size[1] or y + height > size[0]:
        raise UsageError(f"{name}: reaches outside the picture of {whole}")
    hole = np.zeros(size, bool)
    hole[y : y + height, x : x + width] = True
    if hole.all():
        raise UsageError(f"{name}: is the whole picture of {whole}, so nothing would be kept")
    return hole


def paired(request: EditRequest) -> list[_Source]:
    """Pictures with their masks: two files, or two folders paired by relative path without ending; or one box for all.
    Raises InputError, naming what has no partner or two."""
    images = image_files(list(request.images))
    if request.box is not None:
        return [_Source(image, box=request.box) for image in images]
    if not request.masks:
        return [_Source(image) for image in images]
    if request.images[0].is_dir() != request.masks[0].is_dir():
        raise UsageError("IMAGE and MASK: two files, or two folders whose files pair up by name")
    masks = image_files(list(request.masks))
    if not request.images[0].is_dir():
        return [_Source(images[0], masks[0])]
    pictures = by_pair_name(request.images[0], images)
    partners = by_pair_name(request.masks[0], masks)
    lost = [image for name, image in pictures.items() if name not in partners]
    if lost:
        raise InputError(f"{lost[0]}: no mask of that name in {request.masks[0]} ({len(lost)} of {len(images)} "
                         "pictures have none); pairs share path and name")
    left = [mask for name, mask in partners.items() if name not in pictures]
    if left:
        console.warn(f"{left[0]}: no picture of that name in {request.images[0]} ({len(left)} of {len(masks)} masks "
                     "are not used)")
    return [_Source(image, partners[name]) for name, image in pictures.items()]


def suitable_model(model: str | None, request: EditRequest) -> tuple[Path, LoadedDiffusion]:
    """The run named, or the newest that can do it, which is then said. Raises UsageError or ModelError, saying what
    there is."""
    command = "upscale" if request.scale else "inpaint"
    path = Path(model) if model else _newest(request.scale)
    loaded = load(path, weights=request.weights)
    if not isinstance(loaded, LoadedDiffusion):
        raise UsageError(f"{path}: an autoencoder; `ldm {command}` needs a diffusion run")
    task = loaded.config.task
    if request.scale and task.name != "sr":
        raise UsageError(f"{path}: not trained for super-resolution; train one with `ldm train-ldm --task sr`")
    if request.scale and task.scale != request.scale:
        raise UsageError(f"--scale {request.scale}: {path} enlarges by {task.scale}")
    if not request.scale and task.name == "sr":
        raise UsageError(f"{path}: a model for super-resolution; inpainting takes one of "
                         "`ldm train-ldm --task inpaint`, or any that generates")
    how = {"sr": f"enlarges by {task.scale}", "inpaint": "trained to inpaint",
           "generate": "not trained to inpaint: known regions are put back at every step"}[task.name]
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
            task = from_toml("diffusion", (path / "config.toml").read_text(encoding="utf-8")).task
        except (LdmError, OSError):
            continue
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
        raise ModelError(f"no {what} run with weights below runs/: train one with `ldm train-ldm {options}` or name "
                         "one with --model")
    return fitting[0]


def inpaint_to_folder(model: str | None, request: EditRequest, out: Path, **how) -> dict[str, Any]:
    """Each picture with its hole repainted, n times, into `out`; result k is of picture k mod their number.

    Returns the document that --json prints. Known pixels come back as they were (in png). As `sample_to_folder` for
    everything else: nothing is overwritten, the same command goes on, a signal leaves whole files.
    """
    sources = paired(request)
    sizes = [probe(source.image) for source in sources]
    for source, size in zip(sources, sizes):
        source.hole(size)
    path, loaded = suitable_model(model, request)

    def draw(ids: list[int], which: list[_Source]) -> np.ndarray:
        images = np.stack([source.pixels() for source in which])
        holes = np.stack([source.hole(image.shape[:2]) for source, image in zip(which, images)])
        told = {name: list(given) * len(ids) for name, given in (("prompts", request.prompts),
                ("classes", request.classes)) if given}  # fmt: skip
        return inpaint_images(loaded, images, holes, seed=request.seed, ids=ids, blend=request.blend,
                              resample=request.resample, **told, **_drawing(request))  # fmt: skip

    def shown(source: _Source) -> list[np.ndarray]:
        image = source.pixels()
        return [image, holed(image, source.hole(image.shape[:2]))]

    size = trained_size(loaded)
    return _to_folder("inpaint", path, loaded, request, sources, sizes, size, draw, shown, out, **how)


def upscale_to_folder(model: str | None, request: EditRequest, out: Path, **how) -> dict[str, Any]:
    """Each picture `scale` times as large, n times, into `out`; otherwise as `inpaint_to_folder`."""
    sources = paired(request)
    sizes = [probe(source.image) for source in sources]
    path, loaded = suitable_model(model, request)
    largest = max(sizes, key=lambda size: size[0] * size[1])
    size = (largest[0] * request.scale, largest[1] * request.scale)

    def draw(ids: list[int], which: list[_Source]) -> np.ndarray:
        low = np.stack([source.pixels() for source in which])
        return upscale_images(loaded, low, seed=request.seed, ids=ids, tone=request.tone, **_drawing(request))

    def shown(source: _Source) -> list[np.ndarray]:
        return [source.pixels()]

    return _to_folder("upscale", path, loaded, request, sources, sizes, size, draw, shown, out, **how)


def _drawing(request: EditRequest) -> dict[str, Any]:
    return sampling_of(request) | {"tile": request.tile, "max_memory": request.max_memory}


def _to_folder(
    command: str,
    path: Path,
    loaded: LoadedDiffusion,
    request: EditRequest,
    sources: list[_Source],
    sizes: list[tuple[int, int]],
    largest: tuple[int, int],
    draw: Callable[[list[int], list[_Source]], np.ndarray],
    shown: Callable[[_Source], list[np.ndarray]],
    out: Path,
    *,
    overwrite: bool = False,
    fmt: str = "png",
    metadata: bool = True,
) -> dict[str, Any]:
    """Draws what is missing of n results a source. largest: what goes through the networks at once, (h, w) px."""
    _check(loaded, request, sizes)
    total = request.n * len(sources)
    names = output_names(out, total, fmt)
    document = {name: value for name, value in asdict(request).items() if name != "batch_size"}
    read = [file for source in sources for file in (source.image, source.mask) if file is not None]
    wanted = {"model": loaded.fingerprint, "command": command, **_plain(document), "total": total, "format": fmt,
              "pictures": contents(read)}  # fmt: skip
    told = [path for path in named_files(request) if path not in {*request.images, *request.masks}]
    wanted |= {"contents": contents(told)} if told else {}
    results = Results(out, names, wanted, inputs=[*read, *told], overwrite=overwrite)
    todo = results.todo
    if todo and fmt == "jpg" and command == "inpaint":
        console.warn("--format jpg: known pixels change a little as the file is packed; png keeps them")
    size = request.batch_size or tiling.batch_within(loaded, largest, request.max_memory, LARGEST_BATCH)
    used = sampling_used(loaded.config.sample, request)
    describe = {"command": command, "weights": request.weights, "model_sha256": loaded.fingerprint,
                "ldm_version": __version__, **_plain(used)}  # fmt: skip
    started = time.perf_counter()
    with results, StopRequest() as stop, console.progress(len(todo), command) as bar:
        for batch in _of_one_size(todo, sizes, size):
            which = [sources[k % len(sources)] for k in batch]
            for k, source, image in zip(batch, which, draw(batch, which)):
                facts = {**_about(source, request), "seed": request.seed, "sample": k, **describe} if metadata else None
                results.write(names[k], image_bytes(Image.fromarray(image), fmt, facts))
            bar.advance(len(batch))
            end_if_asked(stop, names)
        seconds = time.perf_counter() - started
        rows = _sheet([shown(source) for source in sources[:SHEET_ROWS]], names, len(sources))
        results.write(out / SHEET, png_bytes(grid(rows)))
    console.say(f"{total} pictures in {out} ({len(todo)} drawn in {seconds:.1f} s)")
    images = [str(name) for name in names]
    return {"model": str(path), "out": str(out), "images": images, "grid": str(out / SHEET),
            "sources": [str(sources[k % len(sources)].image) for k in range(total)], "drawn": len(todo),
            "seconds": seconds, **describe}  # fmt: skip


def _check(loaded: LoadedDiffusion, request: EditRequest, sizes: list[tuple[int, int]]) -> None:
    """Raises for what is wrong with a request before a folder is made for it."""
    settings = sampling_of(request)
    for size in set(sizes):
        whole = (size[0] * (request.scale or 1), size[1] * (request.scale or 1))
        check_edit(loaded, whole, request.tile, settings, request.prompts, request.classes)


def _of_one_size(todo: list[int], sizes: Sequence[tuple[int, int]], most: int) -> list[list[int]]:
    """Batches of results whose pictures have one size, in order of their first."""
    groups: dict[tuple[int, int], list[int]] = {}
    for k in todo:
        groups.setdefault(sizes[k % len(sizes)], []).append(k)
    return [batch for group in groups.values() for batch in batches(group, most)]


def _about(source: _Source, request: EditRequest) -> dict[str, Any]:
    told = {"image": source.image.name, "mask": source.mask.name if source.mask else None, "box": source.box,
            "scale": request.scale or None, "prompt": next(iter(request.prompts), None),
            "class": next(iter(request.classes), None)}  # fmt: skip
    return {name: value for name, value in told.items() if value is not None}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back."""
    return json.loads(json.dumps(values, default=str))


def _sheet(shown: list[list[np.ndarray]], names: list[Path], groups: int) -> list[list[np.ndarray]]:
    """A row a picture, before its results; each brought to one small size."""
    rows = []
    for k, before in enumerate(shown):
        results = [np.asarray(Image.open(name).convert("RGB")) for name in names[k::groups][:SHEET_RESULTS]]
        rows.append([_small(picture) for picture in (*before, *results)])
    return rows


def _small(picture: np.ndarray) -> np.ndarray:
    """A picture in the middle of a white square of SHEET_SIDE px: smaller ones enlarged without smoothing."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    share = SHEET_SIDE / max(image.size)
    size = tuple(max(1, round(side * share)) for side in image.size)
    image = image.resize(size, Image.Resampling.BOX if share < 1 else Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (SHEET_SIDE, SHEET_SIDE), "white")
    sheet.paste(image, ((SHEET_SIDE - size[0]) // 2, (SHEET_SIDE - size[1]) // 2))
    return np.asarray(sheet)

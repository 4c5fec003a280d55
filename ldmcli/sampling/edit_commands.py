"""`ldm inpaint` and `ldm upscale`: picture files to picture files, with what was asked for inside them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from ldmcli import __version__
from ldmcli.conditions.class_ import Class
from ldmcli.conditions.layout import BoxLayout
from ldmcli.conditions.masked import hole_in, transparent_hole
from ldmcli.conditions.parse import list_values, option_values, parse_each
from ldmcli.conditions.pictures import holed
from ldmcli.conditions.semantic_map import SemanticMap
from ldmcli.core import console, runs
from ldmcli.core.config import from_toml
from ldmcli.core.errors import InputError, LdmError, ModelError, UsageError
from ldmcli.data.decode import decode, decode_alpha, probe
from ldmcli.data.pictures import by_pair_name, image_files
from ldmcli.maths.compositing import fill_smoothly
from ldmcli.sampling import memory
from ldmcli.sampling.api import LoadedDiffusion
from ldmcli.sampling.editing import check_edit
from ldmcli.sampling.image_folder import ImageFolder, Images, contents, in_batches
from ldmcli.sampling.inpainting import inpaint_images
from ldmcli.sampling.load import load
from ldmcli.sampling.request import EditRequest, document_of, sampling_of, sampling_used
from ldmcli.sampling.super_resolution import upscale_images

SHEET_SIDE, SHEET_ROWS, SHEET_RESULTS = 256, 16, 6
LARGEST_BATCH = 8


@dataclass(frozen=True)
class _Source:
    """A picture to work on. mask: a file, or None where a box says where the hole is; without both the hole is what is
    transparent. map, layout: files that speak of the whole picture."""

    image: Path
    mask: Path | None = None
    box: tuple[int, int, int, int] | None = None
    map: Path | None = None
    layout: Path | None = None

    @property
    def files(self) -> list[Path]:
        """All files that the results depend on."""
        return [file for file in (self.image, self.mask, self.map, self.layout) if file is not None]

    def pixels(self) -> np.ndarray:
        """uint8 (H, W, 3): colours as they are in the file. Raises InputError."""
        return decode_alpha(self.image)[0]

    def alpha(self) -> np.ndarray | None:
        """uint8 (H, W), 255 = opaque; None where all of the picture is. Raises InputError."""
        return decode_alpha(self.image)[1]

    def hole(self, size: tuple[int, int]) -> np.ndarray:
        """bool (H, W), True = hole. Raises InputError or, for a box, UsageError for what cannot be used."""
        if self.box is not None:
            return _boxed(self.box, size, self.image)
        if self.mask is None:
            return transparent_hole(self.alpha(), str(self.image))
        found = hole_in(self.mask, str(self.mask))
        if found.shape != size:
            raise InputError(
                f"{self.mask}: a mask of {found.shape[1]}x{found.shape[0]} px for a picture of "
                f"{size[1]}x{size[0]} px ({self.image}); they must be of one size"
            )
        if found.all():
            raise InputError(
                f"{self.mask}: all of it is white, so nothing of the picture would be kept; black marks "
                "what is known (`ldm sample` draws whole pictures)"
            )
        return found

    def values(self, loaded: LoadedDiffusion, request: EditRequest, size: tuple[int, int]) -> dict[str, Any]:
        """Values of conditions by kind, for a result of `size` = (height, width) px. Raises UsageError for a kind that
        the model does not take, InputError for a layout or map that is wrong."""
        given = list_values(
            option_values(request.given),
            prompt=list(request.prompts[:1]),
            classes=list(request.classes[:1]),
            layout=self.layout,
            map=self.map,
        )
        return parse_each(loaded.conditions, given, size)


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
    """Pictures with what belongs to each: masks, maps and layouts from folders pair up with pictures by relative path
    without ending (or by name, where names are unique); a single file, or box, is for all. Raises UsageError, or
    InputError for a picture without a partner."""
    root, beside = request.images[0], [*request.masks, *request.maps, *request.layouts]
    inside = [path for path in beside if path.is_dir() and path != root and path.is_relative_to(root)]
    images = image_files(request.images, besides=inside)
    if request.masks and root.is_dir() != request.masks[0].is_dir():
        raise UsageError("IMAGE and MASK: two files, or two folders whose files pair up by name")
    sources = [_Source(image, box=request.box) for image in images]
    for what, given in (("mask", request.masks), (SemanticMap.name, request.maps), (BoxLayout.name, request.layouts)):
        if given:
            partners = _partners(images, root, given[0], what)
            sources = [replace(source, **{what: partner}) for source, partner in zip(sources, partners)]
    return sources


def _partners(images: list[Path], root: Path, given: Path, what: str) -> list[Path]:
    """What belongs to each picture: a file for all, or the one of its name in a folder."""
    if not given.is_dir():
        return [given] * len(images)
    found = sorted(given.rglob("*.json")) if what == BoxLayout.name else image_files([given])
    folder = root if root.is_dir() else root.parent
    pictures, partners = by_pair_name(folder, images), by_pair_name(given, found)
    lost = [image for name, image in pictures.items() if name not in partners]
    if lost and len({image.stem for image in images}) == len(images) and len({one.stem for one in found}) == len(found):
        pictures, partners = ({path.stem: path for path in paths} for paths in (images, found))  # one folder, flat
        lost = [image for name, image in pictures.items() if name not in partners]
    if lost:
        raise InputError(
            f"{lost[0]}: no {what} of that name in {given} ({len(lost)} of {len(images)} pictures have "
            "none); pairs share path and name"
        )
    left = [path for name, path in partners.items() if name not in pictures]
    if left:
        console.warn(f"{left[0]}: no picture of that name in {root} ({len(left)} of {len(found)} {what}s are not used)")
    return [partners[name] for name in pictures]


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
        raise ModelError(
            f"no {what} run with weights below runs/: train one with `ldm train-ldm {options}` or name one with --model"
        )
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

    def draw(ids: list[int], which: list[_Source]) -> list[np.ndarray]:
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
            **_drawing(request),
        )
        made = np.where(holes[..., None], made, images)
        return [_with_alpha(one, source.alpha(), hole) for one, source, hole in zip(made, which, holes)]

    def shown(source: _Source) -> list[np.ndarray]:
        image = np.asarray(decode(source.image))
        return [image, holed(image, source.hole(image.shape[:2]))]

    edit = _Edit("inpaint", loaded.trained_size, draw, shown)
    return _to_folder(edit, path, loaded, request, sources, sizes, out, **how)


def upscale_to_folder(model: str | None, request: EditRequest, out: Path, **how) -> dict[str, Any]:
    """Each picture `scale` times as large, n times, into `out`; otherwise as `inpaint_to_folder`."""
    sources = paired(request)
    sizes = [probe(source.image) for source in sources]
    path, loaded = suitable_model(model, request)
    largest = max(sizes, key=lambda size: size[0] * size[1])
    size = (largest[0] * request.scale, largest[1] * request.scale)

    def draw(ids: list[int], which: list[_Source]) -> list[np.ndarray]:
        low = np.stack([source.pixels() for source in which])
        large = (low.shape[1] * request.scale, low.shape[2] * request.scale)
        made = upscale_images(
            loaded,
            _seen(which, low),
            seed=request.seed,
            ids=ids,
            tone=request.tone,
            values=_values(loaded, request, which, large),
            **_drawing(request),
        )
        return [_with_alpha(one, _enlarged(source.alpha(), large)) for one, source in zip(made, which)]

    def shown(source: _Source) -> list[np.ndarray]:
        return [np.asarray(decode(source.image))]

    edit = _Edit("upscale", size, draw, shown)
    return _to_folder(edit, path, loaded, request, sources, sizes, out, **how)


def _drawing(request: EditRequest) -> dict[str, Any]:
    return sampling_of(request) | {
        "tile": request.tile,
        "max_memory": request.max_memory,
        "negative_prompt": request.negative_prompt,
    }


def _values(
    loaded: LoadedDiffusion, request: EditRequest, which: list[_Source], size: tuple[int, int]
) -> dict[str, list]:
    """Values by kind, one a picture."""
    each = [source.values(loaded, request, size) for source in which]
    return {kind: [told[kind] for told in each] for kind in each[0]}


def _seen(which: list[_Source], images: np.ndarray) -> np.ndarray:
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
    make: Callable[[list[int], list[_Source]], list[np.ndarray]]
    before: Callable[[_Source], list[np.ndarray]]


def _to_folder(
    edit: _Edit,
    path: Path,
    loaded: LoadedDiffusion,
    request: EditRequest,
    sources: list[_Source],
    sizes: list[tuple[int, int]],
    out: Path,
    *,
    overwrite: bool = False,
    fmt: str = "png",
    metadata: bool = True,
) -> dict[str, Any]:
    """Makes what is missing of n results a source."""
    _check(loaded, request, sources, sizes)
    read = [file for source in sources for file in source.files]
    folder = ImageFolder(out, _record(edit, loaded, request, sources, read, fmt), inputs=read, overwrite=overwrite)
    if folder.todo and fmt == "jpg" and edit.command == "inpaint":
        console.warn("--format jpg: known pixels change a little as the file is packed; png keeps them")
    most = request.batch_size or memory.largest_batch(loaded, edit.largest, request.max_memory, LARGEST_BATCH)
    describe = {
        "command": edit.command,
        "weights": request.weights,
        "model_sha256": loaded.fingerprint,
        "ldm_version": __version__,
        **_plain(sampling_used(loaded.config.sample, request)),
    }

    def make(ids: list[int]) -> Images:
        for image in edit.make(ids, [sources[k % len(sources)] for k in ids]):
            yield _fit_for(fmt, image), {}

    def facts(k: int) -> dict[str, Any]:
        return {**_about(sources[k % len(sources)], request), "seed": request.seed, "sample": k, **describe}

    folder.write(
        _of_one_size(folder.todo, sizes, most),
        make,
        facts if metadata else None,
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
    edit: _Edit, loaded: LoadedDiffusion, request: EditRequest, sources: list[_Source], read: list[Path], fmt: str
) -> dict[str, Any]:
    """What request.json keeps: all that changes the images."""
    return {
        "model": loaded.fingerprint,
        "command": edit.command,
        **document_of(request),
        "total": request.n * len(sources),
        "format": fmt,
        "pictures": contents(read),
    }


def _check(loaded: LoadedDiffusion, request: EditRequest, sources: list[_Source], sizes: list[tuple[int, int]]) -> None:
    """Raises for what is wrong with a request before a folder is made for it."""
    settings, scale, seen = sampling_of(request), request.scale or 1, set()
    for source, size in zip(sources, sizes):
        if (about := (size, source.map, source.layout)) not in seen:
            seen.add(about)
            whole = (size[0] * scale, size[1] * scale)
            told = {kind: [value] for kind, value in source.values(loaded, request, whole).items()}
            try:
                check_edit(loaded, whole, request.tile, settings, told, request.negative_prompt)
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


def _about(source: _Source, request: EditRequest) -> dict[str, Any]:
    told = {
        "image": source.image.name,
        "mask": source.mask.name if source.mask else None,
        "box": source.box,
        "scale": request.scale or None,
        "prompt": next(iter(request.prompts), None),
        Class.name: next(iter(request.classes), None),
        "negative_prompt": request.negative_prompt or None,
        "given": list(request.given) or None,
        **{kind: file.name for kind, file in ((BoxLayout.name, source.layout), (SemanticMap.name, source.map)) if file},
    }
    return {name: value for name, value in told.items() if value is not None}


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
    size = tuple(max(1, round(side * share)) for side in image.size)
    image = image.resize(size, Image.Resampling.BOX if share < 1 else Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (SHEET_SIDE, SHEET_SIDE), "white")
    sheet.paste(image, ((SHEET_SIDE - size[0]) // 2, (SHEET_SIDE - size[1]) // 2))
    return np.asarray(sheet)

"""Requests to files: samples with their settings inside, reconstructions with their PSNR."""

import hashlib
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldmcli import __version__
from ldmcli.conditions import outputs
from ldmcli.conditions.parse import option_values
from ldmcli.conditions.pictures import labelled
from ldmcli.core import console, files, runs
from ldmcli.core.errors import InputError, Interrupted, UsageError
from ldmcli.core.outputs import SHEET, Results, beside, refuse_foreign, refuse_inputs
from ldmcli.core.signals import StopRequest
from ldmcli.data.arrays import to_pil, to_pixels
from ldmcli.data.decode import decode, decode_alpha, probe, to_size
from ldmcli.data.pictures import first_few, image_files
from ldmcli.diffusion.gradient_guidance import image_guide, latent_decoder
from ldmcli.diffusion.sample import Guide, InitLatents, check_sampling, with_overrides
from ldmcli.maths.metrics import psnr, ssim
from ldmcli.maths.pixels import tensor_to_pixels
from ldmcli.maths.tiles import center_slices, pad_edge
from ldmcli.sampling import memory
from ldmcli.sampling.contact_sheets import grid, in_rows, png_bytes
from ldmcli.sampling.editing import MAX_MEMORY, tile_side, trained_size
from ldmcli.sampling.first_stage import LoadedAutoencoder
from ldmcli.sampling.load import load
from ldmcli.sampling.model import LoadedDiffusion
from ldmcli.sampling.request import SampleRequest, document_of, named_files, sampling_of, sampling_used

Size = tuple[int, int] | None  # (height, width) in pixels; None: as trained
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


def find_model(model: str | None, kind: str) -> Path:
    """The run named, else the newest of its kind, which is then said."""
    if model:
        return Path(model)
    path = runs.newest_run(kind)
    console.say(f"model: {path} (the newest {kind} run)")
    return path


def image_bytes(image, fmt: str, metadata: dict[str, Any] | None) -> bytes:
    """A PIL image as png, jpg or webp, with `metadata` as JSON inside (PNG text "ldm", EXIF description otherwise)."""
    import io

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    buffer, text = io.BytesIO(), files.json_text(metadata) if metadata else ""
    if fmt == "png":
        info = PngInfo()
        if text:
            info.add_itxt("ldm", text)
        image.save(buffer, "PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        if text:
            exif[0x010E] = text.encode("ascii", "backslashreplace").decode()
        image.save(buffer, FORMATS[fmt], quality=95, exif=exif)
    return buffer.getvalue()


def output_names(out: Path, total: int, fmt: str) -> list[Path]:
    """The pictures of a request, in a folder that is made for them."""
    if fmt not in FORMATS:
        raise UsageError(f"--format {fmt}: choose one of {', '.join(FORMATS)}")
    with files.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return [out / f"{k:06d}.{fmt}" for k in range(total)]


def contents(paths: Iterable[Path]) -> str:
    """Hash of the files that a request stands for: they may change under the same names."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(files.sha256_file(path)))
    return digest.hexdigest()


def _check(
    loaded: LoadedDiffusion, values: dict[str, list], request: SampleRequest, settings: dict[str, Any], whole: Size
) -> None:
    """Raises for whatever is wrong with a request before a folder is made for it."""
    check_sampling(with_overrides(loaded.config.sample, **settings), loaded.schedule)
    if values:
        loaded.model.conditions.prepare(values)
    loaded._negative(request.negative_prompt, 1)
    loaded.warn_of_idle_guidance(request.guidance)
    tile_side(loaded, whole, 0, MAX_MEMORY, settings) if whole else 0
    _start(loaded, request, whole)
    _guide(loaded, request, whole)


def sample_to_folder(
    model: str | None,
    request: SampleRequest,
    out: Path,
    *,
    overwrite: bool = False,
    fmt: str = "png",
    metadata: bool = True,
) -> dict[str, Any]:
    """Draws what `request` says into `out`: 000000.png …, grid.png. Returns the document that --json prints.

    Sample k depends on the seed and k alone; the same command again draws only what is missing. A signal leaves
    whole images only and ends with 130 or 143.
    """
    path = find_model(model, "diffusion")
    loaded = load(path, weights=request.weights)
    if not isinstance(loaded, LoadedDiffusion):
        raise UsageError(
            f"{path}: an autoencoder; `ldm sample` needs a diffusion run (`ldm reconstruct` takes this one)"
        )
    if loaded.config.task.name != "generate":
        command = {"sr": "ldm upscale", "inpaint": "ldm inpaint"}[loaded.config.task.name]
        raise UsageError(f"{path}: a model for {loaded.config.task.name} starts from a picture: use `{command}`")
    values = loaded.request_values(
        list(request.prompts),
        list(request.classes),
        layout=list(request.layouts),
        map=list(request.maps),
        values=option_values(request.given),
        size=request.size,
    )
    groups = max([len(v) for v in values.values()], default=1)
    n = request.n or (1 if values else loaded.config.sample.n)
    total, settings = n * groups, sampling_of(request)
    whole = loaded.drawn_size(request.size)
    _check(loaded, values, request, settings, whole)
    names = output_names(out, total, fmt)
    wanted = {"model": loaded.fingerprint, **document_of(request), "total": total, "format": fmt}
    wanted |= {"told": outputs.digest(values)} if outputs.spatial(values) else {}
    read = named_files(request)
    if begun := [path for path in (request.init_image, request.guide) if path is not None]:
        wanted["contents"] = contents(begun)
    results = Results(out, names, wanted, kinds=outputs.spatial(values), inputs=read, overwrite=overwrite)
    todo, describe = results.todo, _describe(loaded, path, request)
    started = time.perf_counter()
    with results, StopRequest() as stop, console.progress(len(todo), "sampling") as bar:
        for batch in batches(todo, request.batch_size or _batch_size(loaded, whole)):
            images = _draw(loaded, batch, values, request, settings, whole)
            for k, image in zip(batch, images):
                facts = _facts(k, values, request, describe) if metadata else None
                for kind in outputs.spatial(values):  # before the sample, whose presence says that both are there
                    value = values[kind][k % len(values[kind])]
                    shown = outputs.beside(kind, np.asarray(image), value, loaded.model.conditions)
                    results.write(beside(names[k], kind), png_bytes(shown))
                results.write(names[k], image_bytes(image, fmt, facts))
            bar.advance(len(batch))
            end_if_asked(stop, names)
        seconds = time.perf_counter() - started
        results.write(out / SHEET, png_bytes(grid(_sheet(names, n, groups, values, loaded))))
    rate = len(todo) / seconds if todo else 0.0
    console.say(f"{total} images in {out} ({len(todo)} drawn in {seconds:.1f} s, {rate:.2f} images/s)")
    return {
        "model": str(path),
        "out": str(out),
        "images": [str(name) for name in names],
        "grid": str(out / SHEET),
        "drawn": len(todo),
        "seconds": seconds,
        "images_per_s": rate,
        **describe,
    }


def end_if_asked(stop: StopRequest, names: list[Path]) -> None:
    """Raises Interrupted after a signal, saying how many of the pictures `names` are missing."""
    if stop.stop:
        left = sum(not name.exists() for name in names)
        raise Interrupted(
            f"{names[0].parent}: stopped with {left} of {len(names)} images missing; the same command draws them",
            stop.stop,
        )


def batches(todo: list[int], size: int) -> list[list[int]]:
    return [todo[i : i + size] for i in range(0, len(todo), size)]


def _draw(
    loaded: LoadedDiffusion,
    ids: list[int],
    values: dict[str, list],
    request: SampleRequest,
    settings: dict[str, Any],
    whole: Size,
) -> list:
    tile = tile_side(loaded, whole, 0, MAX_MEMORY, settings) if whole else 0
    z = loaded.latents_for(
        ids,
        values,
        seed=request.seed,
        negative_prompt=request.negative_prompt,
        size=whole,
        inside=request.size,
        init=_start(loaded, request, whole),
        guide=_guide(loaded, request, whole),
        tile=tile,
        **settings,
    )
    drawn = memory.decode(loaded.autoencoder, z, tile)
    return to_pil(drawn[(..., *center_slices(whole, request.size))] if whole and request.size else drawn)


def _start(loaded: LoadedDiffusion, request: SampleRequest, whole: Size) -> InitLatents | None:
    if request.init_image is None:
        return None
    if not 0 < request.strength <= 1:
        raise UsageError(f"--strength {request.strength}: must be above 0 and at most 1")
    size = request.size or trained_size(loaded)
    pixels = pad_edge(to_size(decode(Path(request.init_image), name=str(request.init_image)), size), whole or size)
    tile = tile_side(loaded, whole, 0, MAX_MEMORY, sampling_of(request)) if whole else 0
    return InitLatents(memory.encode(loaded.autoencoder, pixels[None], tile), request.strength)


def _batch_size(loaded: LoadedDiffusion, whole: Size) -> int:
    """Samples at a time: 16, or fewer where larger ones than the model was trained on would take too much memory."""
    return memory.batch_within(loaded, whole, MAX_MEMORY, 16) if whole else 16


def _guide(loaded: LoadedDiffusion, request: SampleRequest, whole: Size) -> Guide | None:
    """What leads samples to --guide. Raises InputError for an image that no result could look like when made small."""
    if request.guide is None:
        return None
    low = to_pixels(np.array(decode(Path(request.guide), name=str(request.guide)))).to(loaded.device)
    (h, w), (height, width) = low.shape[-2:], request.size or trained_size(loaded)
    if h > height or w > width or abs(h * width - w * height) > max(height, width):
        raise InputError(
            f"--guide {request.guide}: {w}x{h} px; it must have the shape of the pictures to draw "
            f"({width}x{height}) and be no larger"
        )
    decoder, cut = latent_decoder(loaded.autoencoder), center_slices(whole or (height, width), (height, width))

    def shown(z: torch.Tensor) -> torch.Tensor:
        return decoder(z)[(..., *cut)]

    return lambda denoise: image_guide(denoise, shown, low, request.guide_scale)


def _describe(loaded: LoadedDiffusion, path: Path, request: SampleRequest) -> dict[str, Any]:
    used = sampling_used(loaded.config.sample, request)
    return {
        "weights": request.weights,
        "model_sha256": loaded.fingerprint,
        "ldm_version": __version__,
        "negative_prompt": request.negative_prompt,
        **({"guide": request.guide.name, "guide_scale": request.guide_scale} if request.guide else {}),
        **used,
    }


def _facts(k: int, values: dict[str, list], request: SampleRequest, describe: dict[str, Any]) -> dict[str, Any]:
    return {**outputs.metadata(values, k), "seed": request.seed, "sample": k, **describe}


def _sheet(
    names: list[Path], n: int, groups: int, values: dict[str, list], loaded: LoadedDiffusion
) -> list[list[np.ndarray]]:
    """Rows of a sheet of all samples, at most 256: a prompt a column where there are several, a class's name above, or
    a layout or map before its samples."""
    from PIL import Image

    pictures = [np.asarray(Image.open(name).convert("RGB")) for name in names[:256]]
    conditions = loaded.model.conditions
    pictures = [
        labelled(one, text) if (text := outputs.caption(values, conditions, k)) else one
        for k, one in enumerate(pictures)
    ]
    if kinds := outputs.spatial(values):
        rows = []
        for group in range(min(groups, len(pictures))):
            told = [(kind, values[kind][group % len(values[kind])]) for kind in kinds]
            shown = [outputs.picture(kind, value, pictures[0].shape[:2], conditions) for kind, value in told]
            rows.append([*shown, *pictures[group::groups]])
        return rows
    columns = groups if 1 < groups <= 16 else min(8, math.ceil(math.sqrt(len(pictures))))
    return in_rows(pictures, columns)


def reconstruct_to_folder(
    inputs: list[Path],
    autoencoder: str | None,
    out: Path,
    *,
    size: tuple[int, int] | None = None,
    overwrite: bool = False,
    own_folder: bool = False,
) -> dict[str, Any]:
    """Images through the autoencoder: original and reconstruction side by side in `out`, with PSNR and SSIM.

    Images keep their size, cropped to multiples of f (centre), unless `size` is given. own_folder: `out` is the name
    that the command gave itself, so that what lies there is its own, also without a mark (as older versions wrote it).
    """
    path = find_model(autoencoder, "autoencoder")
    loaded = load(path)
    loaded = loaded if isinstance(loaded, LoadedAutoencoder) else loaded.autoencoder
    found = image_files(inputs)
    small = [] if size else [path for path in found if min(probe(path)) < loaded.network.f]
    if small:
        raise InputError(
            f"{len(small)} of {len(found)} pictures are smaller than one latent ({loaded.network.f} px): "
            f"{first_few(small)}; take them out, or give --size"
        )
    names = output_names(out, len(found), "png")
    refuse_inputs(out, names, found)
    taken = [name for name in names if name.exists()]
    if taken and not overwrite:
        raise UsageError(f"{taken[0]}: exists; choose another --out or add --overwrite")
    refuse_foreign(names, dict.fromkeys((name.name for name in names), "") if own_folder else {})
    rows = []
    with console.progress(len(found), "reconstructing") as bar:
        for source, name in zip(found, names):
            if decode_alpha(source, name=str(source))[1] is not None:
                console.warn_once("alpha", f"{source}: its transparency is lost, laid over white")
            pixels = _whole(decode(source, name=str(source)), loaded.network.f, size)
            rebuilt = tensor_to_pixels(loaded.decode(loaded.encode(pixels[None])))[0]
            files.write_bytes(name, png_bytes(grid([[pixels, rebuilt]])))
            rows.append(
                {
                    "image": str(source),
                    "out": str(name),
                    "psnr": psnr(pixels, rebuilt),
                    "ssim": ssim(pixels, rebuilt) if min(pixels.shape[:2]) >= 11 else None,
                }
            )
            bar.advance(1)
    mean = float(np.mean([row["psnr"] for row in rows]))
    return {"autoencoder": str(path), "out": str(out), "n": len(rows), "psnr": mean, "images": rows}


def _whole(image, f: int, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 HWC at `size`, or at the image's own size cropped to multiples of f."""
    if size is None:
        size = (image.height // f * f, image.width // f * f)
        if min(size) < f:
            raise InputError(f"an image of {image.width}x{image.height} px is smaller than one latent ({f} px)")
        top, left = (image.height - size[0]) // 2, (image.width - size[1]) // 2
        return np.asarray(image)[top : top + size[0], left : left + size[1]]
    return to_size(image, size)

"""`ldm reconstruct`: images through a first stage, beside what comes back."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldmcli.conditions.pictures import labelled
from ldmcli.core import console, files, runs
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.outputs import SHEET, refuse_foreign, refuse_inputs
from ldmcli.data.decode import decode, decode_alpha, probe, to_size
from ldmcli.data.pictures import first_few, image_files
from ldmcli.maths.metrics import psnr, ssim
from ldmcli.maths.pixels import tensor_to_pixels
from ldmcli.sampling.contact_sheets import grid, png_bytes
from ldmcli.sampling.first_stage import LoadedAutoencoder
from ldmcli.sampling.image_folder import numbered
from ldmcli.sampling.load import find_model, load
from ldmcli.sampling.machine import ALONE, Machine, stated_precision

SHEET_SIDE, SHEET_ROWS = 256, 16


def reconstruct_to_folder(
    inputs: list[Path],
    autoencoder: str | Sequence[str] | None,
    out: Path,
    *,
    size: tuple[int, int] | None = None,
    overwrite: bool = False,
    own_folder: bool = False,
    machine: Machine = ALONE,
) -> dict[str, Any]:
    """Images through one autoencoder, or several: original and reconstructions side by side in `out`, with PSNR and
    SSIM; of several a sheet of the first images, with their names, too.

    Images keep their size, cropped to multiples of f (centre), unless `size` is given. own_folder: `out` is the name
    that the command gave itself, so that what lies there is its own, also without a mark (as older versions wrote it).
    machine: its processes share the images.
    """
    world = machine.world
    named = [autoencoder] if autoencoder is None or isinstance(autoencoder, str) else list(dict.fromkeys(autoencoder))
    paths = world.on_rank_0(lambda: [find_model(one, "autoencoder") for one in named])
    stages = world.on_all_ranks(lambda: [_first_stage(path, machine) for path in paths])
    f = math.lcm(*(stage.network.f for stage in stages))
    found = world.on_all_ranks(lambda: _pictures(inputs, f, size))
    names = world.on_rank_0(lambda: _places(out, found, len(stages) > 1, overwrite, own_folder))
    results: list[dict[str, Any]] = []
    rows: list[list[np.ndarray]] = []
    with console.progress(len(found), "reconstructing") as bar:
        for start in range(0, len(found), world.world_size):
            of_round = range(start, min(start + world.world_size, len(found)))
            mine = next(iter(world.share(of_round)), None)
            made = world.on_all_ranks(partial(_written, mine, found, names, stages, f, size))
            keep = len(stages) > 1 and start < SHEET_ROWS
            for result, row in filter(None, world.gather(made and (made[0], made[1] if keep else None))):
                results.append(result)
                rows += [row] if keep else []
            bar.advance(len(of_round))
    precision = stated_precision(stages[0].precision)
    sheet = out / SHEET
    if len(stages) > 1:
        titles = ["original", *_short_names(paths)]
        world.on_rank_0(lambda: files.write_bytes(sheet, png_bytes(labelled_sheet(rows[:SHEET_ROWS], titles))))
    return _document(paths, out, results) | precision


def _first_stage(path: Path, machine: Machine) -> LoadedAutoencoder:
    found = load(path, mixed_precision=machine.mixed_precision, compile=machine.compile)
    return found if isinstance(found, LoadedAutoencoder) else found.autoencoder


def _pictures(inputs: list[Path], f: int, size: tuple[int, int] | None) -> list[Path]:
    """The pictures to pass through. Raises InputError where one is smaller than a latent."""
    found = image_files(inputs)
    small = [] if size else [path for path in found if min(probe(path)) < f]
    if small:
        raise InputError(
            f"{len(small)} of {len(found)} pictures are smaller than one latent ({f} px): "
            f"{first_few(small)}; take them out, or give --size"
        )
    return found


def _places(out: Path, found: list[Path], with_sheet: bool, overwrite: bool, own_folder: bool) -> list[Path]:
    """Where the results go. Raises UsageError where something would be lost."""
    names = numbered(out, len(found), "png")
    targets = [*names, *([out / SHEET] if with_sheet else [])]
    refuse_inputs(out, targets, found)
    taken = [name for name in targets if name.exists()]
    if taken and not overwrite:
        raise UsageError(f"{taken[0]}: exists; choose another --out or add --overwrite")
    refuse_foreign(targets, dict.fromkeys((name.name for name in names), "") if own_folder else {})
    return names


def _written(
    k: int | None,
    found: list[Path],
    names: list[Path],
    stages: list[LoadedAutoencoder],
    f: int,
    size: tuple[int, int] | None,
) -> tuple[dict[str, Any], list[np.ndarray]] | None:
    """What is told of image k, and its row of pictures, once it is written; None without an image for this process."""
    if k is None:
        return None
    row = _row(found[k], stages, f, size)
    files.write_bytes(names[k], png_bytes(grid([row])))
    results = [_scores(row[0], x) for x in row[1:]]
    return {"image": str(found[k]), "out": str(names[k]), "results": results}, row


def _row(source: Path, stages: list[LoadedAutoencoder], f: int, size: tuple[int, int] | None) -> list[np.ndarray]:
    """An image and its reconstructions, uint8 HWC."""
    if decode_alpha(source, name=str(source))[1] is not None:
        console.warn_once("alpha", f"{source}: its transparency is lost, laid over white")
    pixels = _whole(decode(source, name=str(source)), f, size)
    row = [pixels]
    for stage in stages:
        with stage.autocast():
            row.append(tensor_to_pixels(stage.decode(stage.encode(pixels[None])))[0])
    return row


def _scores(pixels: np.ndarray, rebuilt: np.ndarray) -> dict[str, Any]:
    similarity = ssim(pixels, rebuilt) if min(pixels.shape[:2]) >= 11 else None
    return {"psnr": psnr(pixels, rebuilt), "ssim": similarity}


def _document(paths: list[Path], out: Path, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What --json prints; of one autoencoder its numbers stand beside each image."""
    means = [float(np.mean([row["results"][k]["psnr"] for row in results])) for k in range(len(paths))]
    if len(paths) == 1:
        rows = [{name: row[name] for name in ("image", "out")} | row["results"][0] for row in results]
        step = runs.step_document(paths[0])
        return {"autoencoder": str(paths[0]), **step, "out": str(out), "n": len(rows), "psnr": means[0], "images": rows}
    named = {"autoencoders": [str(path) for path in paths], "out": str(out), "sheet": str(out / SHEET)}
    return {**named, "n": len(results), "psnr": means, "images": results}


def _short_names(paths: list[Path]) -> list[str]:
    """The runs' own names; where two are alike, with their folders'."""
    own = [path.name for path in paths]
    return own if len(set(own)) == len(own) else [str(path) for path in paths]


def labelled_sheet(rows: list[list[np.ndarray]], titles: list[str]) -> np.ndarray:
    """Rows of pictures, each brought to `SHEET_SIDE` px, with the columns' names above the first."""
    small = [[np.asarray(to_size(Image.fromarray(one), (SHEET_SIDE, SHEET_SIDE))) for one in row] for row in rows]
    first = grid([[labelled(one, title) for one, title in zip(small[0], titles)]])
    return np.concatenate([first, grid(small[1:])]) if len(small) > 1 else first


def _whole(image, f: int, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 HWC at `size`, or at the image's own size cropped to multiples of f."""
    if size is None:
        size = (image.height // f * f, image.width // f * f)
        if min(size) < f:
            raise InputError(f"an image of {image.width}x{image.height} px is smaller than one latent ({f} px)")
        top, left = (image.height - size[0]) // 2, (image.width - size[1]) // 2
        return np.asarray(image)[top : top + size[0], left : left + size[1]]
    return to_size(image, size)

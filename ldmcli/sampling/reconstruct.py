"""`ldm reconstruct`: images through a first stage, beside what comes back."""

from pathlib import Path
from typing import Any

import numpy as np

from ldmcli.core import console, files, runs
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.outputs import refuse_foreign, refuse_inputs
from ldmcli.data.decode import decode, decode_alpha, probe, to_size
from ldmcli.data.pictures import first_few, image_files
from ldmcli.maths.metrics import psnr, ssim
from ldmcli.maths.pixels import tensor_to_pixels
from ldmcli.sampling.contact_sheets import grid, png_bytes
from ldmcli.sampling.first_stage import LoadedAutoencoder
from ldmcli.sampling.image_folder import numbered
from ldmcli.sampling.load import find_model, load


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
    names = numbered(out, len(found), "png")
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
    step = runs.step_document(path)
    return {"autoencoder": str(path), **step, "out": str(out), "n": len(rows), "psnr": mean, "images": rows}


def _whole(image, f: int, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 HWC at `size`, or at the image's own size cropped to multiples of f."""
    if size is None:
        size = (image.height // f * f, image.width // f * f)
        if min(size) < f:
            raise InputError(f"an image of {image.width}x{image.height} px is smaller than one latent ({f} px)")
        top, left = (image.height - size[0]) // 2, (image.width - size[1]) // 2
        return np.asarray(image)[top : top + size[0], left : left + size[1]]
    return to_size(image, size)

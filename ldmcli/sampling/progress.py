"""How samples come about: what a model takes z_0 to be after each step (its x0), decoded, as a sheet or a GIF."""

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image
from torch import Tensor

from ldmcli.maths.pixels import tensor_to_pixels
from ldmcli.sampling import memory
from ldmcli.sampling.api import LoadedDiffusion, to_pil
from ldmcli.sampling.contact_sheets import grid, png_bytes
from ldmcli.sampling.draw import Draw, draw_latents

SAMPLES = 4  # the first ones
COLUMNS, FRAMES = 10, 50  # of a row, of a GIF: steps that are shown at most
FRAME_MS, LAST_MS = 80, 1500


def shown_steps(count: int, most: int) -> list[int]:
    """At most `most` of `count` steps, evenly spread, the first and the last among them."""
    most = min(count, most)
    return [round(k * (count - 1) / (most - 1)) for k in range(most)] if most > 1 else [count - 1]


def progress_bytes(kind: str, model: LoadedDiffusion, draw: Draw, size: tuple[int, int] | None) -> bytes:
    """Draws the samples of `draw`, at most 4, and gives the file that `PROGRESS[kind]` names: "row", a sheet with a row
    a sample and steps from left to right, or "gif", the samples side by side. size: (height, width) px that they are
    cut to, None = as drawn."""
    found: list[Tensor] = []
    draw_latents(model, replace(draw, callback=lambda step, z, x0: found.append(x0.cpu())))
    steps = shown_steps(len(found), COLUMNS if kind == "row" else FRAMES)
    frames = [_pictures(found[step], model, draw, size) for step in steps]
    if kind == "row":
        return png_bytes(grid([list(row) for row in zip(*frames)]))
    return _gif([grid([frame]) for frame in frames])


def _pictures(latents: Tensor, model: LoadedDiffusion, draw: Draw, size: tuple[int, int] | None) -> list[np.ndarray]:
    pixels = tensor_to_pixels(memory.decode(model.autoencoder, latents.to(model.device), draw.tile, draw.max_memory))
    return [np.asarray(image) for image in to_pil(pixels, draw.size, size)]


def _gif(frames: Sequence[np.ndarray]) -> bytes:
    images, buffer = [Image.fromarray(frame) for frame in frames], io.BytesIO()
    times = [FRAME_MS] * (len(images) - 1) + [LAST_MS]
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=times, loop=0)
    return buffer.getvalue()

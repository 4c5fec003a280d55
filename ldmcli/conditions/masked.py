"""Images with holes, the input of inpainting (Sec. 4.5), and the masks that say where the holes are."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ldmcli.conditions.condition import Condition, Size, Spec, View, as_list
from ldmcli.conditions.pictures import enlarged, holed
from ldmcli.core.console import warn_once
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DiffusionConfig
from ldmcli.data.decode import decode_alpha
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.spatial_conditioners import MaskedConditioner

if TYPE_CHECKING:
    from ldmcli.conditions.dataset import ConditionDataset

HOLE_LUMINANCE = 128
OPAQUE = 250  # of 255: lossy formats round


class Masked(Condition):
    """An image with a hole, (uint8 (H, W, 3), bool (H, W)). Its latent and the mask stand beside z_t; no null."""

    name, conditioner = "masked", MaskedConditioner
    option = "image"
    column = "image"
    user_given = False
    image_sized = True
    spatial = True
    pipeline_tag = "image-to-image"
    example_call = 'image="photo.png", mask="mask.png", '
    missing = "this model fills holes; use `ldm inpaint`, or image=… and mask=… from Python"

    def from_row(self, dataset: "ConditionDataset", view: View) -> tuple[np.ndarray, np.ndarray]:
        """The row's picture and a random mask."""
        return dataset.pixels(view), dataset.mask(view)

    def picture(self, value: tuple[np.ndarray, np.ndarray], size: Size, names: Sequence[str]) -> np.ndarray:
        """The image, its hole grey."""
        return enlarged(holed(*value), size)

    def assumed_spec(self, config: DiffusionConfig, stage: Autoencoder) -> tuple[Spec, str]:
        """All of it is in the settings and the first stage."""
        return {"channels": stage.latent_channels, "fill": config.task.fill}, ""


def parse_masks(given: Any) -> list[np.ndarray]:
    """Masks from Python as bool (H, W), True = hole: bool arrays, or pictures as `hole_in` reads them."""
    found = []
    for k, one in enumerate(as_list(given)):
        array = np.asarray(one) if isinstance(one, np.ndarray) or hasattr(one, "detach") else None
        if array is not None and array.dtype == bool and array.ndim == 2:
            found.append(array)
        elif array is None or array.dtype == np.uint8:
            found.append(hole_in(one if array is None else array, f"mask {k + 1}"))
        else:
            raise InputError(
                f"mask {k + 1}: {array.dtype} {array.shape}; a mask is bool (H, W), True in holes, "
                "or a uint8 picture that is white there"
            )
    return found


def hole_in(mask: Any, name: str) -> np.ndarray:
    """bool (H, W), True = hole, of a mask: a file, a PIL picture, or uint8 (H, W) or (H, W, 3 or 4).

    A hole has a luminance of at least 128. What is transparent was not painted, so it is no hole. Raises InputError
    where nothing is a hole, and for a picture with a transparent part whose colours are no mask.
    """
    colours, alpha = decode_alpha(_opened(mask), name=name)
    luminance = np.asarray(Image.fromarray(colours).convert("L"))
    if alpha is not None:
        _check_painted(luminance, alpha, name)
        luminance = (luminance * (alpha / 255.0) + 0.5).astype(np.uint8)
    found = luminance >= HOLE_LUMINANCE
    if not found.any():
        least, most = int(luminance.min()), int(luminance.max())
        dim = f"; its values are {least} … {most} of 255, so brighten it" if 0 < most and least != most else ""
        raise InputError(
            f"{name}: nothing in it is white (luminance {HOLE_LUMINANCE} or more), so there is nothing to "
            f"repaint; white marks the hole{dim}"
        )
    return found


def _check_painted(luminance: np.ndarray, alpha: np.ndarray, name: str) -> None:
    """Raises InputError for a mask with alpha that says nothing by its colours, or that is a photograph."""
    painted = luminance[alpha >= HOLE_LUMINANCE]
    if not painted.size:
        raise InputError(f"{name}: all of it is transparent; paint white what is to be repainted")
    if painted.max() < HOLE_LUMINANCE:
        raise InputError(
            f"{name}: a mask in its alpha channel alone, and nothing in it is white: it may mean what is "
            "painted or what is transparent; save it without transparency, white where to repaint"
        )
    between = (painted > 32) & (painted < 224)
    if between.mean() > 0.2 and painted.min() != painted.max():
        raise InputError(
            f"{name}: a picture with a transparent part, not a mask; to repaint that part, give it as the "
            "image, without a mask"
        )
    if painted.min() >= HOLE_LUMINANCE:
        warn_once(
            f"painted {name}",
            f"{name}: white on transparent: what is painted is repainted, "
            f"{(alpha >= HOLE_LUMINANCE).mean():.0%} of the picture",
        )


def transparent_hole(alpha: np.ndarray | None, name: str) -> np.ndarray:
    """bool (H, W), True where a picture's alpha is not opaque. Raises UsageError where it has no such part, InputError
    where nothing is opaque."""
    if alpha is None or alpha.min() >= HOLE_LUMINANCE:
        raise UsageError(
            f"MASK or --box: give one of them, to say what to repaint ({name} has no transparent part, "
            "which would say it, too)"
        )
    hole = alpha < OPAQUE
    if hole.all():
        raise InputError(f"{name}: all of it is transparent, so nothing would be kept")
    return hole


def _opened(one: Any) -> Any:
    """What `decode` takes, of a path, a PIL picture or a uint8 array."""
    if isinstance(one, np.ndarray):
        return Image.fromarray(one)
    return Path(one) if isinstance(one, str) else one

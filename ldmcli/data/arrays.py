"""What calls from Python are given, as tensors, and tensors as pictures: lists, arrays and tensors alike.

Whole numbers of pictures are 0 … 255 in (H, W, 3), as PIL and numpy have them; floats are [-1, 1] in (3, H, W), as the
networks have them. Everything that cannot be meant so is refused by name.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldmcli.core.console import warn_once
from ldmcli.core.errors import InputError, UsageError
from ldmcli.data.decode import decode, decode_alpha
from ldmcli.maths.pixels import tensor_to_pixels

LARGEST = 16.0  # of pixels in [-1, 1]; reconstructions reach a little beyond 1, shares of 255 far


def to_pixels(images: Any, channels: int = 3, name: str = "images") -> Tensor:
    """Float32 (N, channels, H, W) in [-1, 1] of one picture or several of one size: PIL images, whole numbers
    (N, H, W, 3) or (N, 3, H, W), floats (N, 3, H, W); or a list of these without N.

    Raises InputError for other shapes, types, ranges, and NaN.
    """
    if numeric_rows(images):
        images = tensor_of(images, name)
    if isinstance(images, (list, tuple)):
        if not images:
            raise InputError(f"{name}: an empty list; give at least one picture")
        parts = [to_pixels(one, channels, f"{name}[{k}]") for k, one in enumerate(images)]
        shapes = sorted({tuple(part.shape[-2:]) for part in parts})
        if len(shapes) > 1:
            sizes = ", ".join(f"{w}x{h}" for h, w in shapes[:4])
            raise InputError(f"{name}: of several sizes ({sizes}); give pictures of one size")
        return torch.cat(parts)
    if isinstance(images, Image.Image):
        images = np.asarray(decode(images, name=name))
    x = tensor_of(images, name)
    if x.is_floating_point():
        return _float_pixels(x, channels, name)
    if x.dtype == torch.bool or x.ndim not in (2, 3, 4) or not x.numel():
        raise InputError(f"{name}: {_dtype_and_shape(x)}; {_wanted(channels)}")
    if x.ndim == 2:
        x = x[..., None].expand(*x.shape, channels)
    x = x if x.ndim == 4 else x[None]
    if x.shape[-1] == channels:
        x = x.permute(0, 3, 1, 2)
    elif x.shape[1] != channels:
        raise InputError(f"{name}: {_dtype_and_shape(x)}; {_wanted(channels)}")
    if x.dtype != torch.uint8:
        low, high = int(x.to(torch.int64).min()), int(x.to(torch.int64).max())
        if low < 0 or high > 255:
            raise InputError(f"{name}: whole numbers from {low} to {high}; pixels are 0 … 255")
    return x.contiguous().float() / 127.5 - 1


def _float_pixels(x: Tensor, channels: int, name: str) -> Tensor:
    x = x if x.ndim == 4 else x[None]
    if x.ndim != 4 or x.shape[1] != channels or not x.numel():
        raise InputError(f"{name}: {_dtype_and_shape(x)}; {_wanted(channels)}")
    x = finite(x, name)
    if float(x.abs().max()) > LARGEST:
        raise InputError(
            f"{name}: floats up to {float(x.abs().max()):.4g}; floats are in [-1, 1], whole numbers in 0 … 255"
        )
    return x


def _wanted(channels: int) -> str:
    return f"pictures are whole numbers (N, H, W, {channels}), floats (N, {channels}, H, W) in [-1, 1], or PIL images"


def pictures_of(given: Any, name: str = "image") -> list[np.ndarray]:
    """Pictures, which may differ in size, as uint8 (H, W, 3): files, PIL images, and what `to_pixels` takes."""
    if isinstance(given, (list, tuple)) and not numeric_rows(given):
        return [one for k, part in enumerate(given) for one in pictures_of(part, f"{name} {k + 1}")]
    if not isinstance(given, (list, tuple, np.ndarray, Tensor)):
        return [_opened(given, name)]
    return list(tensor_to_pixels(to_pixels(given, name=name)))


def _opened(given: Any, name: str) -> np.ndarray:
    if not hasattr(given, "mode") and not hasattr(given, "__fspath__") and not isinstance(given, str):
        raise InputError(f"{name}: {type(given).__name__} is no picture; {_wanted(3)}, or files")
    from pathlib import Path

    source = given if hasattr(given, "mode") else Path(given)
    name = name if hasattr(given, "mode") else str(given)
    if decode_alpha(source, name=name)[1] is not None:
        warn_once("alpha", f"{name}: its transparency is lost, laid over white")
    return np.asarray(decode(source, name=name))


def to_pil(x: Tensor) -> list:
    """Float NCHW in [-1, 1] -> list of PIL images."""
    return [Image.fromarray(array) for array in tensor_to_pixels(x)]


def numeric_rows(given: Any) -> bool:
    """Whether these are lists of lists … of plain numbers."""
    if not isinstance(given, (list, tuple)):
        return False
    while isinstance(given, (list, tuple)) and given:
        given = given[0]
    return isinstance(given, (int, float))


def tensor_of(value: Any, name: str) -> Tensor:
    """A number, a list of numbers, arrays or tensors, an array or a tensor as a tensor of its own type. Raises
    UsageError."""
    if isinstance(value, Tensor):
        return value.detach()
    try:
        if isinstance(value, (list, tuple)) and any(isinstance(one, (Tensor, np.ndarray)) for one in value):
            return torch.stack([tensor_of(one, name) for one in value])
        array = np.asarray(value)
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(
            f"{name}: {type(value).__name__} that is no array of numbers; give a list, an array or a "
            "tensor whose rows are equally long"
        ) from None


def floats(value: Any, name: str, ndim: int) -> Tensor:
    """Float32 with `ndim` axes; one axis less stands for a batch of one. Raises UsageError, or InputError for NaN."""
    x = tensor_of(value, name)
    if x.dtype == torch.bool or x.is_complex():
        raise UsageError(f"{name}: {_dtype_and_shape(x)}; it must hold numbers")
    x = x[None] if x.ndim == ndim - 1 else x
    if x.ndim != ndim:
        raise UsageError(f"{name}: {_dtype_and_shape(x)}; it must have {ndim} axes")
    return finite(x, name)


def whole_numbers(value: Any, name: str, ndim: int) -> Tensor:
    """Int64 with `ndim` axes, as `floats`."""
    x = tensor_of(value, name)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise UsageError(f"{name}: {_dtype_and_shape(x)}; it must hold whole numbers")
    x = x[None] if x.ndim == ndim - 1 else x
    if x.ndim != ndim:
        raise UsageError(f"{name}: {_dtype_and_shape(x)}; it must have {ndim} axes")
    return x.long()


def finite(x: Tensor, name: str) -> Tensor:
    """Float32 `x`. Raises InputError where it holds NaN or Inf."""
    x = x.float()
    if not bool(torch.isfinite(x).all()):
        raise InputError(f"{name}: {int((~torch.isfinite(x)).sum()):,} of {x.numel():,} numbers are NaN or infinite")
    return x


def latents(value: Any, name: str, channels: int) -> Tensor:
    """Float32 (B, channels, h, w). Raises UsageError, or InputError for NaN."""
    z = floats(value, name, 4)
    if z.shape[1] != channels or not z.numel():
        raise UsageError(f"{name}: {_dtype_and_shape(z)}; latents of this model are (B, {channels}, h, w)")
    return z


def batch_of(x: Tensor, n: int, name: str) -> Tensor:
    """`x` with n rows; one row stands for all. Raises UsageError."""
    if len(x) == n:
        return x
    if len(x) != 1:
        raise UsageError(f"{name}: {len(x)} rows for a batch of {n}; give one, or {n}")
    return x.expand(n, *x.shape[1:])


def _dtype_and_shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"

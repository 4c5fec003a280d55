"""Weights in a half or a quarter of their room, for a model that is shipped. Networks compute with float32 as ever.

The rule, exactly:

- "float16": every floating-point tensor is rounded to IEEE half precision.
- "int8": a floating-point tensor of two dimensions or more (matrix, kernel, embedding) is stored as whole numbers q in
  -127 … 127, of its shape, and one float32 number s for each index of its first dimension (a row: the weights of one
  output): w ≈ s · q, with s = max |w| of the row / 127 and q = w / s, rounded half to even. s stands beside q under the
  tensor's name and SCALE, with shape (rows,). All other tensors are stored as in "float16".

Unpacking multiplies in float32, so that every machine has the same weights.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ldmcli.core.files import require_finite

KINDS = ("float16", "int8")
PACKED = "packed"  # in the metadata of weights: their kind
SCALE = ":scale"  # no module's parameter has a colon in its name


def pack(tensors: Mapping[str, Tensor], kind: str, where: str = "") -> dict[str, Tensor]:
    """Tensors as they are stored; what is no floating-point tensor stays. where: names them in errors. Raises
    ModelError for numbers that half precision does not hold."""
    assert kind in KINDS
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            found[name] = tensor
        elif kind == "int8" and tensor.dim() >= 2:
            found[name], found[name + SCALE] = _rows(tensor.float())
        else:
            found[name] = tensor.to(torch.float16)
    require_finite(found, where)
    return found


def _rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(q, s) of a tensor (rows, …)."""
    flat = tensor.flatten(1)
    scale = flat.abs().amax(1) / 127
    q = (flat / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
    return q.reshape(tensor.shape), scale


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in float32, of what `pack` gave."""
    found = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name + SCALE)
        if scale is not None:
            found[name] = tensor.float() * scale.reshape(-1, *[1] * (tensor.dim() - 1))
        elif not name.endswith(SCALE):
            found[name] = tensor.float() if tensor.is_floating_point() else tensor
    return found

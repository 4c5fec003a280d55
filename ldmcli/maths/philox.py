"""Random numbers made where they are used: Philox4x32-10 (Salmon et al. 2011), a counter through a keyed bijection.

A number depends on its key and its place alone, so whatever device makes it, in whatever batch, its bits are the same;
of normal numbers the last digits are those of the device's logarithm and cosine.
"""

from collections.abc import Sequence
from math import pi, prod

import torch
from torch import Tensor

from ldmcli.maths import rng

_MASK = 0xFFFFFFFF
_MULTIPLIERS, _WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def keys(seed: int, ids: Sequence[int], *path: rng.Part) -> Tensor:
    """The key of each id for one purpose, (len(ids),) int64 on the CPU; `rng.key` of (seed, id, *path)."""
    return torch.tensor([rng.key(seed, sample, *path) for sample in ids], dtype=torch.int64)


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """The bijection: counter (…, 4) and key (…, 2), int64 with 32 bits in use each, to (…, 4) of the same kind."""
    a, b, c, d = counter.unbind(-1)
    low, high = key.unbind(-1)
    for _ in range(_ROUNDS):
        # products of 64 bits; int64 wraps, and the mask after the shift drops the copies of its sign
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = ((second >> 32 & _MASK) ^ b ^ low, second & _MASK, (first >> 32 & _MASK) ^ d ^ high, first & _MASK)
        low, high = low + _WEYL[0] & _MASK, high + _WEYL[1] & _MASK
    return torch.stack([a, b, c, d], dim=-1)


def normal(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers (B, *shape) float32 on the device of `key` (B,) int64, by Box and Muller; at most 5.8."""
    count = prod(shape)
    block = torch.arange(-(-count // 4), device=key.device)
    counter = torch.stack([block, *[torch.zeros_like(block)] * 3], dim=-1)
    halves = torch.stack([key & _MASK, key >> 32 & _MASK], dim=-1)
    bits = philox(counter[None], halves[:, None])  # (B, blocks, 4)
    uniform = ((bits >> 8) + 1).float() * 2.0**-24  # (0, 1]
    radius = (-2 * uniform[..., :2].log()).sqrt()
    angle = uniform[..., 2:] * (2 * pi)
    numbers = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return numbers.flatten(1)[:, :count].reshape(len(key), *shape)

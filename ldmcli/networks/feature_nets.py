"""Networks whose pooled features measure images, their resize rules, and the search for weights that others trained.

Architectures: EfficientNet-Lite0 and -Lite2 (TensorFlow SAME padding, ReLU6, no squeeze-excite),
SqueezeNet 1.1 of torchvision, and the Inception-v3 of FID from the blocks that torch-fidelity ships.
"""

import hashlib
import math
import os
import urllib.request
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.files import atomic_path, plain_name, require_finite

TIMEOUT = 3.0  # seconds that a server may stay silent
OFFLINE = ("LDM_OFFLINE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of values in [0, 1]

# repeat, in, out, kernel, stride of the first, expansion
LITE0 = (
    (1, 32, 16, 3, 1, 1),
    (2, 16, 24, 3, 2, 6),
    (2, 24, 40, 5, 2, 6),
    (3, 40, 80, 3, 2, 6),
    (3, 80, 112, 5, 1, 6),
    (4, 112, 192, 5, 2, 6),
    (1, 192, 320, 3, 1, 6),
)


def _scaled(width: float, depth: float) -> tuple[tuple[int, ...], ...]:
    """Stages of a larger EfficientNet-Lite (Tan and Le 2019, Eq. 3, with the rounding of its authors): channels times
    `width` to multiples of 8, repeats times `depth`; the stem, and the repeats of the first and last stage, stay."""

    def channels(count: int) -> int:
        rounded = max(8, int(count * width + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * count * width else rounded

    stages = []
    for i, (repeat, cin, cout, *rest) in enumerate(LITE0):
        repeats = repeat if i in (0, len(LITE0) - 1) else math.ceil(repeat * depth)
        stages.append((repeats, cin if i == 0 else channels(cin), channels(cout), *rest))
    return tuple(stages)


LITE2 = _scaled(1.1, 1.2)


# --- weights ---------------------------------------------------------------------------------------------------


def offline() -> bool:
    """True where the user wants no downloads."""
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in OFFLINE)


def weights_folder() -> Path:
    """Where downloaded weights lie: $LDM_WEIGHTS, else torch hub's folder."""
    named = os.environ.get("LDM_WEIGHTS")
    return Path(named) if named else Path(torch.hub.get_dir()) / "checkpoints"


def find_weights(url: str) -> Path:
    """The file at `url` from the weights folder, downloaded if need be. The name ends in the start of its SHA-256."""
    path = weights_folder() / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    prefix = path.stem.rsplit("-", 1)[-1]
    remedy = f"get {url} (SHA-256 begins {prefix}) and put it at {path}, or set LDM_WEIGHTS to its folder"
    if offline():
        raise InputError(f"{path.name}: not here, and nothing may be downloaded; {remedy}")
    try:
        _download(url, path, prefix)
    except (OSError, UsageError) as error:
        raise InputError(f"{path.name}: not here, and the download failed ({error}); {remedy}") from error
    return path


def _download(url: str, path: Path, prefix: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with atomic_path(path) as part:
        with open(part, "wb") as out, urllib.request.urlopen(url, timeout=TIMEOUT) as source:
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
        if not digest.hexdigest().startswith(prefix):
            raise InputError(f"{url}: SHA-256 begins {digest.hexdigest()[:8]}, not {prefix}; nothing was kept")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from .safetensors or .pth (`weights_only`: a file of tensors, never code)."""
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: dict = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            state = state[key] if isinstance(state.get(key), dict) else state
        state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # both readers raise many kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable weights file ({reason})") from error
    require_finite(state, path, InputError)
    return {plain_name(name): value for name, value in state.items()}


# --- resize rules ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def tensorflow_bilinear(size: int, target: int) -> Tensor:
    """(target, size) matrix of TensorFlow 1's bilinear resize: no antialiasing, corner-aligned at 0."""
    # float32 positions, as in the network's own graph: they decide which pixel a sample falls on
    position = torch.arange(target, dtype=torch.float32) * torch.tensor(size / target, dtype=torch.float32)
    low = position.long()
    high = (low + 1).clamp_max(size - 1)
    share = position - low.float()
    rows = torch.arange(target)
    matrix = torch.zeros(target, size)
    matrix.index_put_((rows, low), 1 - share, accumulate=True)
    return matrix.index_put_((rows, high), share, accumulate=True)


@lru_cache(maxsize=32)
def antialiased(size: int, target: int, mode: str) -> Tensor:
    """(target, size) matrix of a resize with antialiasing, as Pillow and torch have it. mode: "bilinear", or "bicubic"
    (a = -0.5)."""
    columns = torch.eye(size)[None, None]
    return F.interpolate(columns, size=(target, size), mode=mode, antialias=True, align_corners=False)[0, 0]


RESIZE: dict[str, Callable[[int, int], Tensor]] = {
    "bilinear (TensorFlow 1)": tensorflow_bilinear,
    "bilinear (antialiased)": partial(antialiased, mode="bilinear"),
    "bicubic (antialiased)": partial(antialiased, mode="bicubic"),
}


def resize(x: Tensor, target: int, rule: str, shorter: int = 0) -> Tensor:
    """x: (B, C, H, W) float in [0, 255] → (B, C, target, target), as two matrix products; not rounded.

    shorter: px of the shorter side, of which the middle is cut out; 0: each side is resized to `target`.
    """
    sides = [shorter * side // min(x.shape[-2:]) if shorter else target for side in x.shape[-2:]]
    for axis, side in ((-1, sides[1]), (-2, sides[0])):
        if x.shape[axis] != side:
            weights = RESIZE[rule](x.shape[axis], side).to(x)
            x = x @ weights.T if axis == -1 else weights @ x
    top, left = ((side - target) // 2 for side in sides)
    return x[..., top : top + target, left : left + target].clamp(0, 255)


# --- networks --------------------------------------------------------------------------------------------------


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, which adds the odd pixel at the right and the bottom."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(reversed(input.shape[-2:]), reversed(self.kernel_size), reversed(self.stride)):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads) if any(pads) else input)


class LiteBlock(nn.Module):
    """Inverted residual: expand 1×1, depthwise, project 1×1."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = cin * expansion
        self.skip = stride == 1 and cin == cout
        self.expand = expansion > 1
        if self.expand:
            self._expand_conv = nn.Conv2d(cin, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = SameConv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = nn.Conv2d(width, cout, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expand else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.skip else h


class _EfficientNetLite(nn.Module):
    """x: (B, 3, H, W) in [0, 255] → pooled features (B, 1280) and logits (B, 1000)."""

    def __init__(self, stages: tuple[tuple[int, ...], ...]):
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks = [
            LiteBlock(cin if i == 0 else cout, cout, kernel, stride if i == 0 else 1, expansion)
            for repeat, cin, cout, kernel, stride, expansion in stages
            for i in range(repeat)
        ]
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(stages[-1][2], 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu6(self._bn0(self._conv_stem((x - 127) / 128)))
        for block in self._blocks:
            h = block(h)
        pooled = F.relu6(self._bn1(self._conv_head(h))).mean((2, 3))
        return pooled, self._fc(pooled)


class EfficientNetLite0(_EfficientNetLite):
    """The smallest one; takes 224 x 224 px."""

    def __init__(self):
        super().__init__(LITE0)


class EfficientNetLite2(_EfficientNetLite):
    """1.1 times as wide, 1.2 times as deep; takes 260 x 260 px."""

    def __init__(self):
        super().__init__(LITE2)


class _Torchvision(nn.Module):
    """A network of torchvision by name. x: (B, 3, 224, 224) in [0, 255] → features (B, 512) and logits (B, 1000)."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str):
        super().__init__()
        import torchvision

        net = getattr(torchvision.models, name)(weights=None)
        self.features, self.classifier = net.features, net.classifier
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        self.register_buffer("mean", 255 * mean[:, None, None], persistent=False)
        self.register_buffer("std", 255 * std[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features((x - self.mean) / self.std)
        return h.mean((2, 3)), self.logits(h)

    def logits(self, h: Tensor) -> Tensor:
        """(B, 1000) of the last map (B, 512, h, w)."""
        raise NotImplementedError


class SqueezeNet(_Torchvision):
    """SqueezeNet 1.1."""

    def __init__(self):
        super().__init__("squeezenet1_1")

    def logits(self, h: Tensor) -> Tensor:
        return self.classifier(h).flatten(1)


class VGG16(_Torchvision):
    """VGG-16 (Simonyan and Zisserman 2015); features are the mean of the last pooled map."""

    def __init__(self):
        super().__init__("vgg16")

    def logits(self, h: Tensor) -> Tensor:
        return self.classifier(h.flatten(1))


class InceptionV3(nn.Module):
    """The network of FID. x: (B, 3, 299, 299) in [0, 255] → pool features (B, 2048), logits without bias (B, 1008)."""

    def __init__(self):
        super().__init__()
        for name, module in _inception_stages().items():
            self.add_module(name, module)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = (x - 128) / 128
        for name, stage in self.named_children():
            h = h if name == "fc" else stage(h)
        pooled = h.mean((2, 3))
        return pooled, pooled @ self.fc.weight.T


def _inception_stages() -> "OrderedDict[str, nn.Module]":
    from torch_fidelity import feature_extractor_inceptionv3 as tf

    conv = tf.BasicConv2d
    return OrderedDict(
        Conv2d_1a_3x3=conv(3, 32, kernel_size=3, stride=2),
        Conv2d_2a_3x3=conv(32, 32, kernel_size=3),
        Conv2d_2b_3x3=conv(32, 64, kernel_size=3, padding=1),
        MaxPool_1=nn.MaxPool2d(3, 2),
        Conv2d_3b_1x1=conv(64, 80, kernel_size=1),
        Conv2d_4a_3x3=conv(80, 192, kernel_size=3),
        MaxPool_2=nn.MaxPool2d(3, 2),
        Mixed_5b=tf.InceptionA(192, 32),
        Mixed_5c=tf.InceptionA(256, 64),
        Mixed_5d=tf.InceptionA(288, 64),
        Mixed_6a=tf.InceptionB(288),
        Mixed_6b=tf.InceptionC(768, 128),
        Mixed_6c=tf.InceptionC(768, 160),
        Mixed_6d=tf.InceptionC(768, 160),
        Mixed_6e=tf.InceptionC(768, 192),
        Mixed_7a=tf.InceptionD(768),
        Mixed_7b=tf.InceptionE_1(1280),
        Mixed_7c=tf.InceptionE_2(2048),
    )


def load_frozen(build: type[nn.Module], path: Path) -> nn.Module:
    """The network with the file's weights: strict names, evaluation mode, no gradients, BatchNorm folded."""
    with torch.random.fork_rng(devices=[]):  # initial values are overwritten: leave the global stream alone
        net = build()
    try:
        net.load_state_dict(read_weights(path), strict=True)
    except RuntimeError as error:
        raise InputError(
            f"{path}: not the weights of {build.__name__} ({str(error).splitlines()[1].strip()[:120]})"
        ) from error
    net = fold_batch_norm(net.eval().requires_grad_(False))
    return net.to(memory_format=torch.channels_last)


def fold_batch_norm(net: nn.Module) -> nn.Module:
    """Every BatchNorm that follows its convolution in the parent's order of children becomes part of it."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for parent in net.modules():
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in zip(children, children[1:]):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                # float64: the product of two rounded factors would cost a digit of the features
                setattr(parent, conv_name, fuse_conv_bn_eval(conv.double(), norm.double()).float())
                setattr(parent, norm_name, nn.Identity())
    return net

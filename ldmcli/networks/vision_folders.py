"""DINOv2 (Oquab et al. 2023) and CLIP (Radford et al. 2021) from a folder of transformers, as networks that measure.

The folder has config.json and model.safetensors; preprocessor_config.json, where there is one, says how pictures are
prepared. Nothing pickled is read, and nothing is downloaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldmcli.core.errors import InputError, LdmError
from ldmcli.core.files import read_json, require_finite
from ldmcli.networks.feature_nets import IMAGENET_MEAN, IMAGENET_STD, RESIZE

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROJECTION = "visual_projection.weight"
RESAMPLE = {2: "bilinear (antialiased)", 3: "bicubic (antialiased)"}  # Pillow's numbers
DEFAULT_SIDE = 224  # px, of DINOv2, which takes any size
# (width, layers) of the vision transformers that have a letter
LETTERS = {(384, 12): "S", (768, 12): "B", (1024, 24): "L", (1280, 32): "H", (1536, 40): "g", (1664, 48): "bigG"}


@dataclass(frozen=True)
class Preparation:
    """How a picture becomes what the network takes: resized by `rule`, its middle, minus mean over std.

    size: px a side of what the network gets. shorter: px of the shorter side before the middle is cut out; 0: both
    sides are resized to `size`, and nothing is cut off. mean, std: a channel each, of values in [0, 255].
    """

    size: int
    shorter: int
    rule: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def normalisation(self) -> str:
        """Mean and deviation, in words."""
        mean, std = (" ".join(f"{value:.6g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std} of 0 to 255"


@dataclass(frozen=True)
class VisionFolder:
    """What a folder says before its weights are read. kind: "dinov2" or "clip"; projection: values of CLIP's projected
    embedding, 0 where there is none."""

    path: Path
    kind: str
    vision: Mapping[str, Any]  # config of the vision transformer
    preparation: Preparation
    projection: int

    @property
    def weights(self) -> Path:
        """The file of its weights."""
        return self.path / "model.safetensors"

    @property
    def dim(self) -> int:
        """Values a feature vector has."""
        return self.projection or int(self.vision["hidden_size"])

    @property
    def layer(self) -> str:
        """What the features are."""
        if self.projection:
            return f"projected image embedding ({self.dim})"
        return f"class token after the last norm ({self.dim})"

    @property
    def architecture(self) -> tuple[str, str]:
        """What names it among others of its kind, for people and in names: ("ViT-S/14", "vits14")."""
        width, layers, patch = (int(self.vision[key]) for key in ("hidden_size", "num_hidden_layers", "patch_size"))
        letter = LETTERS.get((width, layers))
        if letter is None:
            return f"ViT {width}x{layers}/{patch}", f"{width}x{layers}p{patch}"
        return f"ViT-{letter}/{patch}", f"vit{letter.lower()}{patch}"


class VisionEncoder(nn.Module):
    """x: (B, 3, H, W) in [0, 255] → features (B, dim), and no logits (B, 0)."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, preparation: Preparation, projected: bool):
        super().__init__()
        self.net, self.projected = net, projected
        self.register_buffer("mean", torch.tensor(preparation.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(preparation.std)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.net(pixel_values=(x - self.mean) / self.std)
        features = found.image_embeds if self.projected else found.pooler_output
        return features, features.new_zeros(len(x), 0)


def read_vision_folder(path: Path) -> VisionFolder:
    """What a folder holds. Raises InputError for one without DINOv2 or CLIP, and for pictures prepared in a way that
    is not known here."""
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: no config.json, so it is no folder of a network that measures (DINOv2 or CLIP)")
    config = _object(path / "config.json")
    kinds = {"dinov2": "dinov2", "clip": "clip", "clip_vision_model": "clip"}
    kind = kinds.get(str(config.get("model_type")))
    if kind is None:
        raise InputError(
            f"{path}: model_type {config.get('model_type')!r}; networks that measure are {', '.join(kinds)}"
        )
    if not (path / "model.safetensors").is_file():
        pickled = " (a pickled file is not read; save the model as safetensors)"
        raise InputError(
            f"{path}: no model.safetensors, all weights in one file"
            + (pickled if (path / "pytorch_model.bin").is_file() else "")
        )
    vision = _vision_config(path, kind, config)
    side = DEFAULT_SIDE if kind == "dinov2" else int(vision["image_size"])
    preparation = _preparation(path / "preprocessor_config.json", kind, side)
    if kind == "clip" and preparation.size != side:
        raise InputError(
            f"{path}: preprocessor_config.json makes pictures of {preparation.size} px, and CLIP's config.json says "
            f"{side}"
        )
    return VisionFolder(path, kind, vision, preparation, _projection(path) if kind == "clip" else 0)


def load_vision_network(folder: VisionFolder) -> VisionEncoder:
    """The folder's network with its weights in float32, frozen. Raises InputError where weights are missing or
    damaged."""
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    configs = {"dinov2": transformers.Dinov2Config, "clip": transformers.CLIPVisionConfig}
    clip = transformers.CLIPVisionModelWithProjection if folder.projection else transformers.CLIPVisionModel
    model: Any = transformers.Dinov2Model if folder.kind == "dinov2" else clip
    try:
        with torch.random.fork_rng(devices=[]):
            config = configs[folder.kind](**{**folder.vision, "projection_dim": folder.projection})
            net, told = model.from_pretrained(
                folder.path, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # transformers raises many kinds for a damaged folder
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder.weights}: not the weights of its config.json ({reason})") from error
    lacking = sorted(name for name in told["missing_keys"] if "mask_token" not in name)
    if lacking:
        raise InputError(f"{folder.weights}: not the weights of its config.json ({lacking[0]} is missing)")
    require_finite(net.state_dict(), folder.weights, InputError)
    return VisionEncoder(net.float(), folder.preparation, bool(folder.projection)).eval().requires_grad_(False)


def _object(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except LdmError as error:
        raise InputError(str(error)) from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object")
    return found


def _vision_config(path: Path, kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json about pictures, with the sizes that transformers takes where it names none."""
    defaults = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 14 if kind == "dinov2" else 32}
    found = config.get("vision_config") if config["model_type"] == "clip" else config
    if not isinstance(found, dict):
        raise InputError(f"{path}: its config.json has no vision_config")
    vision = {**defaults, "image_size": DEFAULT_SIDE, **found}
    for name in (*defaults, "image_size"):
        if not isinstance(vision[name], int) or vision[name] < 1:
            raise InputError(f"{path}: {name} = {vision[name]!r} in its config.json; a positive whole number is needed")
    if vision.get("num_channels", 3) != 3:
        raise InputError(f"{path}: takes {vision['num_channels']} channels, and pictures have 3")
    return vision


def _projection(path: Path) -> int:
    """Values of the projected embedding, by the weights: a config names a number where there is none, too."""
    from safetensors import safe_open

    try:
        with safe_open(path / "model.safetensors", "pt") as file:
            return file.get_slice(PROJECTION).get_shape()[0] if PROJECTION in file.keys() else 0
    except Exception as error:  # the reader raises its own kind for a damaged file
        raise InputError(f"{path / 'model.safetensors'}: not a readable weights file ({error})") from error


# --- preprocessor_config.json ----------------------------------------------------------------------------------


def _preparation(path: Path, kind: str, side: int) -> Preparation:
    """What the file says; without one pictures are resized to side x side px, bicubic, with the mean and deviation
    that the network was published with."""
    told = _object(path) if path.is_file() else {}
    means = {"dinov2": (IMAGENET_MEAN, IMAGENET_STD), "clip": (CLIP_MEAN, CLIP_STD)}[kind]
    if not told.get("do_resize", True):
        raise InputError(f"{path}: do_resize is false, and pictures of all sizes have to be measured")
    rule = RESAMPLE.get(told.get("resample", 3))
    if rule not in RESIZE:
        raise InputError(f"{path}: resample {told.get('resample')!r}; 2 (bilinear) and 3 (bicubic) are known here")
    size, shorter = _sides(path, told, side)
    # values reach the network as (x · factor - mean) / std
    factor = _number(path, "rescale_factor", told.get("rescale_factor", 1 / 255)) if told.get("do_rescale", True) else 1
    mean, std = (_three(path, name, told.get(name, values)) for name, values in zip(("image_mean", "image_std"), means))
    if not told.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if factor <= 0 or min(std) <= 0:
        raise InputError(f"{path}: rescale_factor and image_std must be above 0")
    return Preparation(size, shorter, rule, tuple(m / factor for m in mean), tuple(s / factor for s in std))


def _sides(path: Path, told: dict[str, Any], side: int) -> tuple[int, int]:
    """(px a side that the network gets, px of the shorter side before the middle is cut out, or 0)."""
    given, crop = told.get("size", {"height": side, "width": side}), told.get("crop_size", side)
    if isinstance(given, int):  # older files: the shorter side where the middle is cut out
        given = {"shortest_edge": given} if told.get("do_center_crop") else {"height": given, "width": given}
    cut = _square(path, "crop_size", crop) if told.get("do_center_crop") else 0
    shortest = given.get("shortest_edge") if isinstance(given, dict) else None
    if shortest is None:
        whole = _square(path, "size", given)
        if cut and cut != whole:
            raise InputError(f"{path}: a crop of {cut} px of pictures of {whole} px is not known here")
        return whole, 0
    shorter = int(_number(path, "shortest_edge", shortest))
    if not cut or cut > shorter:
        raise InputError(f"{path}: a shorter side of {shorter} px needs a crop_size of at most as much")
    return cut, shorter


def _square(path: Path, name: str, given: Any) -> int:
    sides = {given.get("height"), given.get("width")} if isinstance(given, dict) else {given}
    side = sides.pop()
    if sides or not isinstance(side, int) or side < 1:
        raise InputError(f"{path}: {name} = {given!r}; a height and a width that are equal are needed")
    return side


def _number(path: Path, name: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise InputError(f"{path}: {name} = {given!r} is not a number")
    return float(given)


def _three(path: Path, name: str, given: Any) -> tuple[float, ...]:
    if not isinstance(given, (list, tuple)) or len(given) != 3:
        raise InputError(f"{path}: {name} = {given!r}; three numbers are needed")
    return tuple(_number(path, name, value) for value in given)

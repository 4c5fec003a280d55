"""Conditions that are planes beside z_t: class maps, low-resolution images, images with holes (Sec. 4.3.2-4.5, D.6)."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldmcli.core.errors import InputError, ModelError
from ldmcli.core.settings import ConditionSettings
from ldmcli.maths.patchmatch import patchmatch_fill
from ldmcli.maths.smooth_inpainting import thin_plate_fill
from ldmcli.networks.conditioning import Conditioner, Conditioning, Encode
from ldmcli.networks.text_encoder import SpatialRescaler

NO_CLASS = 255  # in maps whose data use it: pixels that nobody labelled
MAP_PLANES = 3
FILLERS = 4  # pictures that are filled at a time


class SemanticMapConditioner(Conditioner):
    """Class maps, uint8 (H, W) at the picture's size -> planes: one plane a class, halved to the latent's size, mixed.

    The null is a map on which no pixel has a class. spec: "classes", "names", "out_channels", "stages" (halvings),
    "void" (whether 255 stands for no class).
    """

    guidance_rank = 0

    def __init__(self, settings: ConditionSettings, spec: dict[str, Any], tokenizer=None):
        super().__init__()
        self.classes, self.channels, self.void = spec["classes"], spec["out_channels"], spec.get("void", False)
        self.names: list[str] = list(spec.get("names") or map(str, range(self.classes)))
        self.stages = spec["stages"]
        self.encoder = SpatialRescaler(self.classes, self.channels, self.stages)

    @staticmethod
    def learn(found: list[int], names: list[str], f: int) -> dict[str, Any]:
        """Facts from the class indices that occur in the data: as many classes as the largest index says, or as have
        names."""
        void = NO_CLASS in found and len(names) <= NO_CLASS
        classes = max([len(names), *(index + 1 for index in found if not (void and index == NO_CLASS))])
        names = [*names, *map(str, range(len(names), classes))]
        return {
            "classes": classes,
            "names": names,
            "out_channels": MAP_PLANES,
            "stages": f.bit_length() - 1,
            "void": void,
        }

    def prepare(self, maps: list[np.ndarray]) -> dict[str, Tensor]:
        """Maps of one size -> {"index": (n, H, W) int16}, -1 for no class. Raises InputError for an index that the
        model does not know."""
        index = torch.from_numpy(np.stack(maps).astype(np.int16))
        if self.void:
            index[index == NO_CLASS] = -1
        if int(index.max()) >= self.classes:
            raise InputError(f"a class map holds index {int(index.max())}; this model knows 0 … {self.classes - 1}")
        return {"index": index}

    def example(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """A map."""
        return {"index": torch.zeros(1, *size, dtype=torch.int16)}

    def null(self, n: int, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """No class anywhere, n times, at the size of `given` (one pixel where there is none)."""
        size = given["index"].shape[1:] if given else (1, 1)
        return {"index": torch.full((n, *size), -1, dtype=torch.int16)}

    def forward(self, inputs: dict[str, Tensor]) -> Conditioning:
        index = inputs["index"][:, None]
        planes = index == torch.arange(self.classes, device=index.device)[:, None, None]
        return Conditioning(concat=self.encoder(planes.to(self.encoder.channel_mapper.weight.dtype)))


class LowResConditioner(Conditioner):
    """Low-resolution images, uint8 (S / scale, S / scale, 3) -> planes at the latent's size S / f, in [-1, 1].

    Where scale = f, as in the paper, they stand beside z_t as they are; larger ones are folded into channels, smaller
    ones enlarged (bilinear). With "latent" in the spec the latent of their bicubic enlargement stands there, too: what
    is already known, in the language of z_t. spec: "scale", "f", "latent" (channels of a latent; 0 or absent: the
    small image alone, as in the paper).
    """

    droppable = False
    encodes = True

    def __init__(self, settings: ConditionSettings, spec: dict[str, Any], tokenizer=None):
        super().__init__()
        self.scale, self.f = spec["scale"], spec["f"]
        self.fold, self.enlarge = max(1, self.f // self.scale), max(1, self.scale // self.f)
        self.latent = spec.get("latent", 0)
        self.channels = 3 * self.fold**2 + self.latent

    def prepare(self, images: list[np.ndarray]) -> dict[str, Tensor]:
        """Images of one size -> {"image": (n, 3, h, w) uint8}."""
        return {"image": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()}

    def example(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """A small image."""
        return {"image": torch.zeros(1, 3, *(side // self.scale for side in size), dtype=torch.uint8)}

    def forward(self, inputs: dict[str, Tensor], encode: Encode | None = None) -> Conditioning:
        x = small = inputs["image"].float() / 127.5 - 1
        if self.enlarge > 1:
            x = F.interpolate(x, scale_factor=float(self.enlarge), mode="bilinear", align_corners=False)
        planes = F.pixel_unshuffle(x, self.fold)
        if self.latent:
            large = F.interpolate(small, scale_factor=float(self.scale), mode="bicubic", align_corners=False)
            planes = torch.cat([planes, _encoded(encode, large.clamp(-1, 1))], dim=1)
        return Conditioning(concat=planes)


class MaskedConditioner(Conditioner):
    """Images with holes -> [latent of the image without them, mask]: the c + 1 planes of the published model.

    A value is (uint8 (H, W, 3), bool (H, W), True = hole). The mask stands at the latent's size, nearest pixel, 1 in
    holes and -1 elsewhere. The published model sees black holes. With "fill" = "smooth" what lies around goes on
    into them first (`thin_plate_fill`), so that latents beside a hole are those of the picture and latents in it
    already have about the right brightness and colour; with "patches" they also have the texture of the most similar
    surroundings (`patchmatch_fill`), which is done on the CPU while batches are made. spec: "channels" (of a latent),
    "fill".
    """

    droppable = False
    encodes = True

    def __init__(self, settings: ConditionSettings, spec: dict[str, Any], tokenizer=None):
        super().__init__()
        self.channels, self.fill = spec["channels"] + 1, spec.get("fill", "black")

    def prepare(self, pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
        """Pairs of one size -> {"image": (n, 3, H, W) uint8, "hole": (n, H, W) bool}. Holes are black, or filled where
        the model sees patches in them; what was there before is never looked at."""
        images, holes = (np.stack(part) for part in zip(*pairs))
        images = np.where(holes[..., None], np.uint8(0), images)
        pixels, hole = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(holes)
        if self.fill == "patches":
            with ThreadPoolExecutor(FILLERS) as pool:
                pixels = torch.stack(list(pool.map(_patched, pixels, hole)))
        return {"image": pixels, "hole": hole}

    def example(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """An image without a hole."""
        return {"image": torch.zeros(1, 3, *size, dtype=torch.uint8), "hole": torch.zeros(1, *size, dtype=torch.bool)}

    def count_only(self) -> None:
        """Holes stay black."""
        self.fill = "black"

    @torch.no_grad()
    def complete(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds "filled" (n, 3, H, W), the images in [-1, 1] as the first stage sees them."""
        if "filled" in inputs:
            return inputs
        x = inputs["image"].float() / 127.5 - 1
        return {**inputs, "filled": thin_plate_fill(x, inputs["hole"]) if self.fill == "smooth" else x}

    def forward(self, inputs: dict[str, Tensor], encode: Encode | None = None) -> Conditioning:
        latent = _encoded(encode, self.complete(inputs)["filled"])
        return Conditioning(concat=masked_planes(latent, inputs["hole"]))


def _patched(pixels: Tensor, hole: Tensor) -> Tensor:
    return patchmatch_fill(pixels.float(), hole).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def _encoded(encode: Encode | None, x: Tensor) -> Tensor:
    if encode is None:
        raise ModelError("planes of latents: the first stage's encoder is missing (`embed(…, encode=)`)")
    return encode(x).float()


def masked_planes(latent: Tensor, hole: Tensor) -> Tensor:
    """[latent (B, c, h, w), mask]: hole (B, H, W) bool becomes a plane of 1 and -1 at the latent's size."""
    mask = F.interpolate(hole[:, None].float() * 2 - 1, size=latent.shape[-2:], mode="nearest")
    return torch.cat([latent, mask], dim=1)

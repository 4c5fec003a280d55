"""Samples led to small pictures (Sec. 4.4, App. C): what `ldm sample --guide`, `ldm upscale --guide-scale` and
`ldm eval-fid --guide-factor` have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import GUIDE_METRICS, GUIDE_RULES
from ldmcli.data.arrays import to_pixels
from ldmcli.diffusion.gradient_guidance import half_squared_error, image_guide, latent_decoder
from ldmcli.diffusion.sample import Guide
from ldmcli.maths.tiles import center_slices
from ldmcli.networks.perceptual import PerceptualNet, perceptual_net
from ldmcli.sampling.machine import full_precision
from ldmcli.sampling.model import TrainedDiffusion
from ldmcli.sampling.request import EditRequest, SampleRequest

Size = tuple[int, int] | None  # (height, width) in pixels; None: as trained


@dataclass(frozen=True, kw_only=True)
class ImageGuiding:
    """How samples are led to pictures. scale: of the rule's step, 0 = not at all; rule: "ours" or "paper"
    (`image_guide`); metric: "l2", ½‖·‖² in [-1, 1], or "lpips"; perceptual: network of LPIPS, as `perceptual_net` takes
    it. Raises UsageError for others."""

    scale: float = 1.0
    rule: str = "ours"
    metric: str = "l2"
    perceptual: str = ""

    def __post_init__(self):
        for name, value, known in (("rule", self.rule, GUIDE_RULES), ("metric", self.metric, GUIDE_METRICS)):
            if value not in known:
                raise UsageError(f"guide_{name}: {value!r} is not one of {', '.join(known)}")
        if not 0 <= self.scale < float("inf"):
            raise UsageError(f"guide_scale: {self.scale:g}; a number from 0 on")

    def guide(self, model: TrainedDiffusion, low: Tensor, drawn: tuple[int, int], inside: tuple[int, int]) -> Guide:
        """Leads samples of `drawn` = (height, width) px so that their middle of `inside` px, made as small as `low` (B
        or 1, 3, h, w) in [-1, 1], is like it. Raises InputError where LPIPS has no weights here, or where `low` is too
        small for it."""
        distance, low = self._distance(low), low.to(model.device)
        decoder, middle = latent_decoder(model.autoencoder), center_slices(drawn, inside)

        def decode(z: Tensor) -> Tensor:
            return decoder(z)[(..., *middle)]

        return lambda denoise: image_guide(denoise, decode, low, self.scale, distance, rule=self.rule)

    def document(self) -> dict[str, Any]:
        """As files beside pictures name it."""
        network = {"perceptual": self.perceptual or "vgg"} if self.metric == "lpips" else {}
        return {"guide_scale": self.scale, "guide_rule": self.rule, "guide_metric": self.metric, **network}

    def _distance(self, low: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        if self.metric == "l2":
            return half_squared_error
        network = _network(self.perceptual).to(low.device)
        network.check_size((low.shape[-2], low.shape[-1]))

        def distance(a: Tensor, b: Tensor) -> Tensor:
            with full_precision(a.device):  # a distance is what its network was fitted to give
                return network(a, b).flatten()

        return distance


def guiding_of(request: SampleRequest | EditRequest) -> ImageGuiding:
    """How a request leads samples to a picture."""
    return ImageGuiding(
        scale=request.guide_scale, rule=request.guide_rule, metric=request.guide_metric, perceptual=request.perceptual
    )


def guide_to(
    model: TrainedDiffusion, picture: np.ndarray, guiding: ImageGuiding, drawn: Size, wanted: Size, name: str = "guide"
) -> Guide:
    """Leads samples, of which the middle of `wanted` px is kept of `drawn` px (None: as trained), to a picture, uint8
    (h, w, 3). Raises InputError for one that no result could look like when made small, calling it `name`."""
    (h, w), (height, width) = picture.shape[:2], wanted or model.trained_size
    if h > height or w > width or abs(h * width - w * height) > max(height, width):
        raise InputError(
            f"{name}: {w}x{h} px; it must have the shape of the pictures to draw ({width}x{height}) and be no larger"
        )
    return guiding.guide(model, to_pixels(picture), drawn or (height, width), (height, width))


@lru_cache(maxsize=1)
def _network(name: str) -> PerceptualNet:
    """Loaded once for all batches."""
    return perceptual_net(name)


def split_guiding(settings: Mapping[str, Any]) -> tuple[ImageGuiding, dict[str, Any]]:
    """(guiding, the rest) of keyword arguments: guide_scale, guide_rule, guide_metric and perceptual are of guiding;
    None stands for the default. Raises UsageError as `ImageGuiding`."""
    names = {"guide_scale": "scale", "guide_rule": "rule", "guide_metric": "metric", "perceptual": "perceptual"}
    own = {short: settings[name] for name, short in names.items() if settings.get(name) is not None}
    return ImageGuiding(**own), {name: value for name, value in settings.items() if name not in names}

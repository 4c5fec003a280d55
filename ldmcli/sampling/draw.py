"""One draw, for samples, edits, previews and evaluation alike: from conditions and noise to images."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmcli.conditions.parse import check_missing, conditioner
from ldmcli.conditions.text import negative_inputs
from ldmcli.core.console import warn_once
from ldmcli.core.errors import UsageError
from ldmcli.core.settings import SampleSettings
from ldmcli.diffusion.guidance import guidance_steps
from ldmcli.diffusion.sample import (
    Callback,
    Guide,
    InitLatents,
    KnownRegion,
    check_sampling,
    sample_conditioned,
    with_overrides,
)
from ldmcli.maths.pixels import tensor_to_pixels
from ldmcli.sampling import memory
from ldmcli.sampling.classifier import ClassGuidance
from ldmcli.sampling.machine import cast_once
from ldmcli.sampling.memory import MAX_MEMORY
from ldmcli.sampling.model import TrainedDiffusion


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Samples of one model: which, conditioned on what, and how. Sample k depends on (seed, k) alone.

    ids: numbers of the samples. values: {condition: one value a sample, in order}; a condition without values is the
    model's null. inputs: prepared inputs of further conditions. guide: of all samples alike; classes: a classifier and
    the class that each sample is led to. settings: those of SampleSettings, None = the model's
    own. size: (height, width) px, multiples of the model's; None = as trained. tile: latent positions a side above
    which the networks see overlapping tiles, 0 = all at once; max_memory: GiB of activations. callback: is given what
    each step leads to.
    """

    ids: Sequence[int]
    seed: int = 0
    values: Mapping[str, Sequence] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    negative_prompt: str = ""
    size: tuple[int, int] | None = None
    init: InitLatents | None = None
    known: KnownRegion | None = None
    guide: Guide | None = None
    classes: ClassGuidance | None = None
    tile: int = 0
    max_memory: float = MAX_MEMORY
    callback: Callback | None = None

    def of(self, ids: Sequence[int]) -> "Draw":
        """The draw of samples `ids` of a request whose values this holds: sample k takes entry k mod their number."""
        values = {name: [x[k % len(x)] for k in ids] for name, x in self.values.items()}
        return replace(self, ids=ids, values=values, classes=self.classes and self.classes.of(ids))

    @property
    def guides(self) -> Guide | None:
        """All that leads the samples, one around the other."""
        guide, classes = self.guide, self.classes
        if classes is None:
            return guide
        if guide is None:
            return classes.guide
        return lambda denoise: guide(classes.guide(denoise))


@torch.no_grad()
def draw_images(model: TrainedDiffusion, draw: Draw) -> np.ndarray:
    """uint8 (n, H, W, 3). Raises ModelError for NaN or Inf."""
    z = draw_latents(model, draw)
    with model.autoencoder.autocast():
        return tensor_to_pixels(memory.decode(model.autoencoder, z, draw.tile, draw.max_memory))


@torch.no_grad()
def draw_latents(model: TrainedDiffusion, draw: Draw) -> Tensor:
    """Final latents (n, c, h, w). Raises UsageError for settings or conditions that do not fit the model."""
    inputs, missing = _inputs(model, draw)
    settings = with_overrides(model.config.sample, **draw.settings)
    if missing and set(missing) == set(model.conditions.droppable):
        settings = replace(settings, guidance=1.0)  # no values are given, so there is nothing to lead to
    check_sampling(settings, model.schedule, model.config.distill)
    _warn_of_guidance(model, settings, draw.negative_prompt)
    guiding = model.guiding if settings.autoguidance != 1 else None
    with ExitStack() as casts:
        casts.enter_context(model.autoencoder.autocast())
        # with a guide there are gradients, and weights that can get them would be part of its graph
        if model.autoencoder.dtype is not None and not draw.guides:
            for network in (model.network, guiding):
                casts.enter_context(cast_once(network) if network is not None else nullcontext())
        return sample_conditioned(
            model.network,
            model.schedule,
            settings,
            ids=draw.ids,
            seed=draw.seed,
            inputs=inputs,
            negative=negative_inputs(model.conditions, draw.negative_prompt, len(draw.ids)),
            encode=partial(memory.encode, model.autoencoder, tile=draw.tile, max_memory=draw.max_memory),
            shape=model.latent_shape(draw.size),
            init=draw.init,
            known=draw.known,
            guide=draw.guides,
            guiding=guiding,
            tile=draw.tile,
            callback=draw.callback,
        )


def _inputs(model: TrainedDiffusion, draw: Draw) -> tuple[dict[str, Tensor], list[str]]:
    """(prepared inputs of all conditions, names of those that are the null)."""
    conditions, inputs = model.conditions, dict(draw.inputs)
    ready = {name.partition(".")[0] for name in inputs}
    for name, values in draw.values.items():
        conditioner(conditions, name)
        inputs |= conditions.prepare_one(name, list(values))
    missing = [name for name in conditions.kinds if name not in draw.values and name not in ready]
    check_missing(conditions, missing, model.config.condition.drop)
    if missing:
        null = conditions.null(len(draw.ids), inputs)
        inputs |= {name: tensor for name, tensor in null.items() if name.partition(".")[0] in missing}
    return inputs, missing


def _warn_of_guidance(model: TrainedDiffusion, settings: SampleSettings, negative_prompt: str) -> None:
    if settings.guidance == 1 and negative_prompt:
        why = "on a distilled model, whose guidance is baked in" if model.config.distill.calls else "at --guidance 1"
        warn_once("negative", f"--negative-prompt has no effect {why}")
    if settings.guidance != 1 and model.conditions.droppable and model.config.condition.drop == 0:
        warn_once(
            "no-dropout",
            "this model was trained without condition dropout, so guidance has nothing sound to "
            "push away from; use --guidance 1",
        )


def warn_of_idle_guidance(model: TrainedDiffusion, scale: float | Mapping[str, float] | None) -> None:
    """Says that a given scale does nothing, where a model has no condition that can be left out."""
    if scale not in (None, 1) and not model.conditions.droppable:
        warn_once("idle-guidance", "--guidance has no effect: this model takes no prompt, class, layout or map")


def tile_side(
    model: TrainedDiffusion,
    size: tuple[int, int] | None,
    settings: Mapping[str, Any],
    *,
    tile: int = 0,
    max_memory: float = MAX_MEMORY,
) -> int:
    """Latent positions a side of a tile for images of `size` px; 0 = no tiles, as at the trained size (None).

    tile: pixels, 0 = by memory. Raises UsageError for a tile below the model's smallest, ResourceError where not even
    that fits.
    """
    if size is None:
        return 0
    unit = model.size_multiple
    if tile:
        if tile < unit:
            raise UsageError(f"--tile {tile}: at least {unit} px with this model")
        return tile // unit * model.network.unet.size_factor
    scale = settings.get("guidance")  # of both halves, though an image without a prompt has one
    scale = model.config.sample.guidance if scale is None else scale
    steps = [names for names, _ in guidance_steps(model.conditions.kinds, scale) if names]
    return memory.largest_tile(model, size, max_memory, halves=1 + len(steps) * (scale != 1))

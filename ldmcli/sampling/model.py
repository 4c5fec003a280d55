"""A trained diffusion model: its parts, on a device, checked against what callers give."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ldmcli.conditions.class_ import class_names
from ldmcli.conditions.parse import embed_inputs, inputs_size, list_values
from ldmcli.core.console import say, warn_once
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DiffusionConfig
from ldmcli.data.arrays import batch_of, floats, latents
from ldmcli.diffusion.guidance import GuidancePath
from ldmcli.diffusion.sample import KeyedNoise, sample_latents, with_overrides
from ldmcli.diffusion.schedule import make_schedule
from ldmcli.formats.bundle import strict_load
from ldmcli.formats.run_folder import read_guiding
from ldmcli.maths import rng
from ldmcli.networks.conditioners import Conditioning, Conditions
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.sampling.first_stage import LoadedAutoencoder


class TrainedDiffusion:
    """A diffusion model with its first stage, noise schedule and sampling defaults: the parts that research code calls.

    network: ε_θ and τ_θ. The calls that make images are those of `api.LoadedDiffusion`.
    """

    kind = "diffusion"
    trained_against: list[dict[str, str]] | None = None  # as the bundle has it

    def __init__(
        self, network: DiffusionModel, autoencoder: LoadedAutoencoder, config: DiffusionConfig, fingerprint: str
    ):
        self.network, self.autoencoder, self.config, self.fingerprint = network, autoencoder, config, fingerprint
        self.schedule = make_schedule(config.diffusion)
        self._guiding: Path | None = None
        self._compiled = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def precision(self) -> str:
        """float32, bfloat16 or float16: that of pictures that are drawn. `predict` and its like are exact."""
        return self.autoencoder.precision

    def compile(self) -> None:
        """Compiles UNet and first stage when they are first used at a size."""
        self.network.unet.compile(dynamic=False)
        self.autoencoder.compile()
        self._compiled = True

    def led_by(self, guiding: Path | None) -> Self:
        """This model, which takes the weights of its guiding model from this file; without one its own settings have no
        autoguidance."""
        self._guiding = guiding
        if guiding is None:
            self.config = replace(self.config, sample=replace(self.config.sample, autoguidance=1.0))
        return self

    @cached_property
    def guiding(self) -> DiffusionModel:
        """The model that autoguidance leads away from: this one, as it was early in its training. It is read when it is
        first used. Raises ModelError where the file is damaged, UsageError where there is none."""
        if self._guiding is None:
            raise UsageError(
                "--autoguidance: this model has no guiding model to be led away from; a training keeps one with "
                "--set train.guide_at=0.3"
            )
        network = self.network.another()
        strict_load(network, read_guiding(self._guiding), self._guiding)
        network.eval().requires_grad_(False).to(self.device)
        if self._compiled:
            network.unet.compile(dynamic=False)
        return network

    @property
    def conditions(self) -> Conditions:
        """τ_θ of each condition."""
        return self.network.conditions

    @property
    def size_multiple(self) -> int:
        """Pixels that both sides of an image must be a multiple of: the first stage's f times the UNet's factor."""
        return self.autoencoder.network.f * self.network.unet.size_factor

    @property
    def trained_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the model was trained on."""
        _, height, width = self.network.latent_shape
        return height * self.autoencoder.network.f, width * self.autoencoder.network.f

    @property
    def class_names(self) -> list[str]:
        """Names of the classes of a class-conditional model, else []."""
        return class_names(self.conditions)

    @torch.no_grad()
    def predict(self, z_t: Any, t: Any, context: Any = None, concat: Any = None, classes: Any = None) -> Tensor:
        """The network's raw output (B, c, h, w). t: timesteps (B,), or one for all; context: tokens (B, M, d), or what
        `embed` gave; concat: planes (B, c', h, w), all of them or those that `context` lacks. One row of context,
        planes or classes stands for all. Raises UsageError for shapes that do not fit, InputError for NaN."""
        z = self._z(z_t, "z_t")
        times = batch_of(floats(t, "t", 1), len(z), "t").to(self.device)
        conditioning = self._conditioning(context, concat)
        if classes is not None:
            embedded = self._embed(list_values(classes=classes))
            conditioning = Conditioning(
                *(None if part is None else batch_of(part, len(z), "classes") for part in astuple_of(embedded))
            ).joined(conditioning)
        return self.network.predict(z, times, self._checked(conditioning, z))

    def _z(self, value: Any, name: str) -> Tensor:
        z, factor = latents(value, name, self.network.latent_shape[0]), self.network.unet.size_factor
        if z.shape[-2] % factor or z.shape[-1] % factor:
            raise UsageError(f"{name}: {z.shape[-1]}x{z.shape[-2]} positions; this UNet needs multiples of {factor}")
        return z.to(self.device)

    def _conditioning(self, context: Any, concat: Any) -> Conditioning:
        """Tokens or what `embed` gave, and planes beside them, as the network takes them."""
        given = (
            context
            if isinstance(context, Conditioning)
            else Conditioning(context=None if context is None else floats(context, "context", 3))
        )
        planes = concat.concat if isinstance(concat, Conditioning) else concat
        if planes is not None:
            planes, wanted = floats(planes, "concat", 4), self.conditions.concat_channels
            lacking = wanted - (0 if given.concat is None else given.concat.shape[1])
            if planes.shape[1] == lacking and given.concat is not None:
                planes = torch.cat([batch_of(given.concat.to(planes), len(planes), "context"), planes], dim=1)
        parts = (given.context, given.concat if planes is None else planes, given.vector)
        return Conditioning(*(None if part is None else part.to(self.device) for part in parts))

    def _checked(self, given: Conditioning, z: Tensor) -> Conditioning:
        """The conditioning with as many rows as z. Raises UsageError where the network could not take it."""
        conditions = self.conditions
        width, planes = conditions.context_dim, conditions.concat_channels
        if given.context is not None and given.context.shape[-1] != width:
            raise UsageError(
                f"context: tokens of {given.context.shape[-1]} numbers; this model reads "
                + (f"{width}" if width else "no tokens")
            )
        if (0 if given.concat is None else given.concat.shape[1]) != planes:
            raise UsageError(
                f"concat: {0 if given.concat is None else given.concat.shape[1]} planes; this model reads "
                f"{planes} beside z_t"
            )
        if given.concat is not None and given.concat.shape[-2:] != z.shape[-2:]:
            shapes = [f"{x.shape[-1]}x{x.shape[-2]}" for x in (given.concat, z)]
            raise UsageError(f"concat: planes of {shapes[0]} for latents of {shapes[1]}")
        named = zip(("context", "concat", "vector"), astuple_of(given))
        return Conditioning(*(None if part is None else batch_of(part, len(z), name) for name, part in named))

    @torch.no_grad()
    def embed(
        self,
        prompt: Any = None,
        classes: Any = None,
        *,
        tokens: Any = None,
        layout: Any = None,
        map: Any = None,
        values: Mapping[str, Any] | None = None,
    ) -> Any:
        """tau(y) of what is given: tokens (B, M, d), or a `Conditioning` where planes or a vector stand beside them.

        prompt: a text or several; classes: names or indices, one or several. tokens: ids (B, L) for the transformer of
        a text or layout model, instead of a prompt or layout. layout, map: one or several, as `sample` takes them; maps
        keep their size, and layouts are painted at it. Of each condition one, or equally many. Raises UsageError, or
        InputError for a layout or map that is wrong.
        """
        found = self._embed(list_values(values, prompt=prompt, classes=classes, layout=layout, map=map), tokens)
        return found.context if found.vector is None and found.concat is None else found

    def _embed(self, values: dict[str, list], tokens: Any = None) -> Conditioning:
        inputs = embed_inputs(self.conditions, values, tokens)
        pixels = inputs_size(self.conditions, inputs)
        size = None if pixels is None else self.latent_shape(pixels)[1:]
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return self.network.embed(inputs, size, self.autoencoder.encode)

    def round_up_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """What images of `size` (height, width) px are the middle of: sides are multiples of `size_multiple`. None (as
        trained) stays. Says so where the two differ. Raises UsageError below one latent."""
        if size is None:
            return None
        f, factor = self.autoencoder.network.f, self.size_multiple
        if min(size) < f:
            raise UsageError(
                f"--size {size[0]}x{size[1]}: smaller than one latent of this model ({f} px); "
                f"take {max(size[0], factor)}x{max(size[1], factor)} or more"
            )
        whole = (-(-size[0] // factor) * factor, -(-size[1] // factor) * factor)
        if whole != tuple(size):
            say(f"--size {size[0]}x{size[1]}: drawn at {whole[0]}x{whole[1]} (multiples of {factor}), the middle kept")
        return whole

    def latent_shape(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(c, h, w) for an image size in pixels (None: as trained). Raises UsageError, naming the nearest sizes, and
        ModelError where the first stage is missing (`LoadedAutoencoder.check_channels`)."""
        self.autoencoder.check_channels()
        if size is None:
            return self.network.latent_shape
        factor = self.size_multiple
        wrong = [side for side in size if side < factor or side % factor]
        if wrong:
            near = "x".join(str(max(factor, round(side / factor) * factor)) for side in size)
            raise UsageError(f"--size {size[0]}x{size[1]}: both sides must be multiples of {factor}; nearest: {near}")
        return self.autoencoder.network.latent_shape(*size)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises InputError for images of `size` px that are smaller than one latent."""
        f = self.autoencoder.network.f
        if min(size) < f:
            raise InputError(f"a picture of {size[1]}x{size[0]} px is smaller than one latent ({f} px)")

    @torch.no_grad()
    def sample_latents(
        self,
        z_T: Any = None,
        *,
        n: int | None = None,
        seed: int = 0,
        context: Any = None,
        uncond: Any = None,
        concat: Any = None,
        noise: Callable[[int], Tensor] | None = None,
        before_step: Callable[[int, Tensor], Tensor] | None = None,
        **settings,
    ) -> Tensor:
        """The final latent (B, c, h, w) from given noise, with tokens (or what `embed` gave) for both halves.

        noise(i): what step i adds where it adds some, instead of numbers from `seed`; before_step(i, z): what step i
        starts from (`diffusion.sample.replace_known_region` makes one that keeps a region).
        """
        if settings.get("autoguidance") not in (None, 1):
            raise UsageError("autoguidance: `sample` takes it; what is given here is of this model's conditions alone")
        chosen = with_overrides(self.config.sample, **settings)
        if context is None and uncond is None and "guidance" not in settings:
            chosen = replace(chosen, guidance=1.0)
        z_T = rng.normal(seed, range(n or 1), self.network.latent_shape, "z_T") if z_T is None else z_T
        z_T = self._z(z_T, "z_T")
        if uncond is None and context is not None and chosen.guidance != 1:
            warn_once("no-uncond", "guidance has no effect without uncond=…, which it leads away from")
        given, null = (
            self._checked(self._conditioning(c, concat), z_T) for c in (context, context if uncond is None else uncond)
        )
        path = GuidancePath((given,)) if uncond is None else GuidancePath((null, given), (float(chosen.guidance),))
        ids = range(len(z_T))
        keyed = KeyedNoise(seed, ids, tuple(z_T.shape[1:]), self.device)
        return sample_latents(
            self.network.predict,
            self.schedule,
            replace(chosen, temperature=1.0),
            path,
            keyed if noise is None else lambda purpose, step: noise(step),
            ids=ids,
            z_T=z_T,
            before_step=before_step,
        )


def astuple_of(given: Conditioning) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(context, concat, vector), not copied."""
    return given.context, given.concat, given.vector

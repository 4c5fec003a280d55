"""A trained model in use: on a device, with the calls of the Python interface."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmcli.conditions.class_ import class_names
from ldmcli.conditions.masked import parse_masks
from ldmcli.conditions.parse import (
    centred,
    embed_inputs,
    inputs_size,
    list_values,
    only_given,
    parse_conditions,
    parse_unsized,
    warn_of_values,
)
from ldmcli.conditions.text import negative_inputs
from ldmcli.core.console import say, warn_once
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DiffusionConfig
from ldmcli.data.arrays import batch_of, floats, latents, pictures_of, to_pil
from ldmcli.diffusion.guidance import GuidancePath
from ldmcli.diffusion.sample import (
    Guide,
    InitLatents,
    KeyedNoise,
    KnownRegion,
    check_sampling,
    draw_latents,
    sample_latents,
    with_overrides,
)
from ldmcli.diffusion.schedule import make_schedule
from ldmcli.maths import rng
from ldmcli.maths.tiles import center_slices
from ldmcli.networks.conditioners import Conditioning
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.sampling.first_stage import LoadedAutoencoder

TASK_WORDS = {
    "generate": "draws images from nothing; `inpaint(image, mask)` fills a hole with it",
    "sr": "makes images larger; use `upscale(image)`",
    "inpaint": "fills holes; use `inpaint(image, mask)`",
}


class LoadedDiffusion:
    """A diffusion model in use, with its autoencoder, noise schedule and sampling defaults."""

    kind = "diffusion"

    def __init__(
        self, model: DiffusionModel, autoencoder: LoadedAutoencoder, config: DiffusionConfig, fingerprint: str
    ):
        self.model, self.autoencoder, self.config, self.fingerprint = model, autoencoder, config, fingerprint
        self.schedule = make_schedule(config.diffusion)
        model.conditions.first_stage = autoencoder.encode

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def class_names(self) -> list[str]:
        """Names of the classes of a class-conditional model, else []."""
        return class_names(self.model.conditions)

    @torch.no_grad()
    def predict(self, z_t: Any, t: Any, context: Any = None, concat: Any = None, classes: Any = None) -> Tensor:
        """The network's raw output (B, c, h, w). t: timesteps (B,), or one for all; context: tokens (B, M, d), or what
        `embed` gave; concat: planes (B, c', h, w), all of them or those that `context` lacks. One row of context,
        planes or classes stands for all. Raises UsageError for shapes that do not fit, InputError for NaN."""
        z = self._z(z_t, "z_t")
        times = batch_of(floats(t, "t", 1), len(z), "t").to(self.device)
        conditioning = self._conditioning(context, concat)
        if classes is not None:
            told = self._embed(list_values(classes=classes))
            conditioning = Conditioning(
                *(None if part is None else batch_of(part, len(z), "classes") for part in astuple_of(told))
            ).joined(conditioning)
        return self.model.predict(z, times, self._checked(conditioning, z))

    def _z(self, value: Any, name: str) -> Tensor:
        z, factor = latents(value, name, self.model.latent_shape[0]), self.model.unet.size_factor
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
            planes, wanted = floats(planes, "concat", 4), self.model.conditions.concat_channels
            lacking = wanted - (0 if given.concat is None else given.concat.shape[1])
            if planes.shape[1] == lacking and given.concat is not None:
                planes = torch.cat([batch_of(given.concat.to(planes), len(planes), "context"), planes], dim=1)
        parts = (given.context, given.concat if planes is None else planes, given.vector)
        return Conditioning(*(None if part is None else part.to(self.device) for part in parts))

    def _checked(self, given: Conditioning, z: Tensor) -> Conditioning:
        """The conditioning with as many rows as z. Raises UsageError where the network could not take it."""
        conditions, shapes = self.model.conditions, {}
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
        keep their size, and layouts are drawn at it. Of each kind one, or equally many. Raises UsageError, or
        InputError for a layout or map that is wrong.
        """
        found = self._embed(list_values(values, prompt=prompt, classes=classes, layout=layout, map=map), tokens)
        return found.context if found.vector is None and found.concat is None else found

    def _embed(self, values: dict[str, list], tokens: Any = None) -> Conditioning:
        inputs = embed_inputs(self.model.conditions, values, tokens)
        pixels = inputs_size(self.model.conditions, inputs)
        size = None if pixels is None else self.latent_shape(pixels)[1:]
        return self.model.embed({name: tensor.to(self.device) for name, tensor in inputs.items()}, size)

    @torch.no_grad()
    def sample(
        self,
        prompt: str | list[str] | None = None,
        *,
        classes: Sequence[int | str] | None = None,
        layout: Any = None,
        map: Any = None,
        values: Mapping[str, Any] | None = None,
        image: Any = None,
        mask: Any = None,
        n: int = 1,
        negative_prompt: str = "",
        seed: int = 0,
        batch_size: int = 16,
        size: tuple[int, int] | None = None,
        first: int = 0,
        **settings,
    ) -> list:
        """PIL images, n for each prompt, class, layout, map or image; sample k takes entry k mod their number of each.

        layout: {"size": [w, h], "objects": [{"bbox": [x, y, w, h], "category": name}]} (shares without size), a JSON
        file, or a list. map: class indices (H, W), a PIL picture or file, or a list. values: of further conditions, by
        name. image: what a model of task sr enlarges, or of task inpaint fills where mask (bool, or a picture with
        holes of luminance ≥ 128) says so; known pixels stay. size: (height, width) in pixels, or one number, as
        `drawn_size` draws it. settings: steps, guidance (a number, or one a condition), guidance_interval, sampler,
        eta, spacing; with an image those of `sampling.editing` as well.
        """
        if image is not None:
            if size is not None:
                raise UsageError("size: a result from an image has the size that the image asks for")
            return self._edited(
                self.config.task.name,
                image,
                mask,
                list_values(values, prompt=prompt, classes=classes, layout=layout, map=map),
                n=n,
                first=first,
                seed=seed,
                batch_size=batch_size,
                negative_prompt=negative_prompt,
                **settings,
            )
        if n < 1 or batch_size < 1:
            raise UsageError(f"n: {n} images, {batch_size} at a time; both must be at least 1")
        size = (size, size) if isinstance(size, int) else size
        values = self.request_values(prompt, classes, layout=layout, map=map, values=values, size=size)
        ids, images = range(first, n * _groups(values)), []
        whole = self.drawn_size(size)
        from ldmcli.sampling import editing, memory

        tile = editing.tile_side(self, whole, 0, memory.MAX_MEMORY, settings) if whole else 0
        for start in range(0, len(ids), batch_size):
            z = self.latents_for(
                ids[start : start + batch_size],
                values,
                seed=seed,
                negative_prompt=negative_prompt,
                size=whole,
                inside=size,
                tile=tile,
                **settings,
            )
            drawn = memory.decode(self.autoencoder, z, tile)
            images += to_pil(drawn[(..., *center_slices(whole, size))] if whole and size else drawn)
        return images

    def inpaint(
        self,
        image: Any,
        mask: Any,
        prompt: Any = None,
        *,
        classes: Any = None,
        layout: Any = None,
        map: Any = None,
        values: Mapping[str, Any] | None = None,
        n: int = 1,
        **how,
    ) -> list:
        """PIL images: holes filled, known pixels as they were; by a model of task inpaint, or any that generates.

        image: a PIL image, file or array, or several; mask: where to repaint (bool (H, W), or a picture whose luminance
        is at least 128 there), one or one an image. prompt, classes, layout, map: one or one an image, of the picture
        as a whole, where the model takes them; a map is needed, the others may be left out. how: seed, batch_size,
        negative_prompt, steps and other settings of sampling, and those of `sampling.editing.inpaint_images`.
        """
        given = list_values(values, prompt=prompt, classes=classes, layout=layout, map=map)
        return self._edited("inpaint", image, mask, given, n=n, **how)

    def upscale(
        self,
        image: Any,
        prompt: Any = None,
        *,
        classes: Any = None,
        layout: Any = None,
        map: Any = None,
        values: Mapping[str, Any] | None = None,
        n: int = 1,
        **how,
    ) -> list:
        """PIL images, `config.task.scale` times as large, by a model of task sr; arguments as `inpaint`."""
        given = list_values(values, prompt=prompt, classes=classes, layout=layout, map=map)
        return self._edited("sr", image, None, given, n=n, **how)

    def _edited(self, task: str, image: Any, mask: Any, given: dict[str, list], **how) -> list:
        own = self.config.task.name
        if task == "generate" or (task == "sr") != (own == "sr"):
            raise UsageError(f"image: this model {TASK_WORDS[own]}")
        pictures = pictures_of(image)
        if (task == "inpaint") != (mask is not None):
            raise UsageError(
                "mask: says what to repaint; give one"
                if mask is None
                else "mask: this model makes images larger; it takes none"
            )
        holes = None if mask is None else [hole for _, hole in _pairs(pictures, parse_masks(mask))]
        conditions = self.model.conditions
        told = only_given(conditions, given)
        warn_of_values(conditions, told)
        told = parse_unsized(conditions, told)
        from ldmcli.sampling import editing

        return editing.edited(self, pictures, holes, told, **how)

    @torch.no_grad()
    def latents_for(
        self,
        ids: Sequence[int],
        values: dict[str, list],
        *,
        seed: int = 0,
        negative_prompt: str = "",
        size: tuple[int, int] | None = None,
        inside: tuple[int, int] | None = None,
        init: InitLatents | None = None,
        known: KnownRegion | None = None,
        guide: Guide | None = None,
        tile: int = 0,
        **settings,
    ) -> Tensor:
        """Final latents of samples `ids` of a call; sample k is told values[kind][k mod their number].

        inside: (height, width) px of the middle of `size` (multiples of the model's unit) that is wanted: what maps and
        layouts speak of.
        """
        chosen = with_overrides(self.config.sample, **settings)
        check_sampling(chosen, self.schedule)
        self._warn_about_guidance(chosen.guidance, negative_prompt)
        rows = {kind: [given[k % len(given)] for k in ids] for kind, given in values.items()}
        rows = centred(rows, size, inside)
        return draw_latents(
            self.model,
            self.schedule,
            chosen,
            ids=ids,
            seed=seed,
            inputs=self.model.conditions.prepare(rows) if rows else None,
            negative=self._negative(negative_prompt, len(ids)),
            shape=self.latent_shape(size),
            init=init,
            known=known,
            guide=guide,
            tile=tile,
        )

    def request_values(
        self,
        prompt=None,
        classes=None,
        *,
        layout: Any = None,
        map: Any = None,
        values: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
    ) -> dict[str, list]:
        """What the model is told, checked against what it takes. Raises UsageError, or InputError for what is wrong
        with a layout or map. size: of the pictures to draw, in pixels; maps are brought to it."""
        _, height, width = self.model.latent_shape
        f = self.autoencoder.network.f
        given = list_values(values, prompt=prompt, classes=classes, layout=layout, map=map)
        return parse_conditions(self.model.conditions, given, size or (height * f, width * f))

    def drawn_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """What pictures of `size` (height, width) px are cut from the middle of: sides are whole units, the
        autoencoder's f times the UNet's factor. None (as trained) stays. Says so where the two differ. Raises
        UsageError below one latent."""
        if size is None:
            return None
        f, factor = self.autoencoder.network.f, self.autoencoder.network.f * self.model.unet.size_factor
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
        """(c, h, w) for an image size in pixels (None: as trained). Raises UsageError, naming the nearest sizes."""
        if size is None:
            return self.model.latent_shape
        factor = self.autoencoder.network.f * self.model.unet.size_factor
        wrong = [side for side in size if side < factor or side % factor]
        if wrong:
            near = "x".join(str(max(factor, round(side / factor) * factor)) for side in size)
            raise UsageError(f"--size {size[0]}x{size[1]}: both sides must be multiples of {factor}; nearest: {near}")
        return self.autoencoder.network.latent_shape(*size)

    def _negative(self, text: str, n: int) -> dict[str, Tensor] | None:
        return negative_inputs(self.model.conditions, text, n)

    def warn_of_idle_guidance(self, scale: float | Mapping[str, float] | None) -> None:
        """Says that a scale that was asked for does nothing, where nothing can be left out of what the model is
        told."""
        if scale not in (None, 1) and not self.model.conditions.droppable:
            warn_once("idle-guidance", "--guidance has no effect: this model takes no prompt, class, layout or map")

    def _warn_about_guidance(self, scale: float | Mapping[str, float], negative: str) -> None:
        if scale == 1 and negative:
            warn_once("negative", "--negative-prompt has no effect at --guidance 1")
        if scale != 1 and self.model.conditions.droppable and self.config.condition.drop == 0:
            warn_once(
                "no-dropout",
                "this model was trained without condition dropout, so guidance has nothing sound to "
                "push away from; use --guidance 1",
            )

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
        chosen = with_overrides(self.config.sample, **settings)
        if context is None and uncond is None and "guidance" not in settings:
            chosen = replace(chosen, guidance=1.0)
        z_T = rng.normal(seed, range(n or 1), self.model.latent_shape, "z_T") if z_T is None else z_T
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
            self.model.predict,
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


def _groups(values: dict[str, list]) -> int:
    return max([len(given) for given in values.values()], default=1)


def _pairs(images: list[np.ndarray], holes: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    if len(holes) not in (1, len(images)):
        raise UsageError(f"{len(images)} images and {len(holes)} masks: give one mask, or one an image")
    pairs = list(zip(images, holes * (len(images) // len(holes))))
    for image, hole in pairs:
        if image.shape[:2] != hole.shape:
            raise InputError(
                f"a mask of {hole.shape[1]}x{hole.shape[0]} px for an image of "
                f"{image.shape[1]}x{image.shape[0]}; they must be of one size"
            )
    return pairs

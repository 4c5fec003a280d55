"""A diffusion model as `ldmcli.load` gives it: the calls that make images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldmcli.conditions.class_ import Class
from ldmcli.conditions.masked import parse_masks
from ldmcli.conditions.parse import centred, list_values, only_given, parse_conditions, parse_unsized, warn_of_values
from ldmcli.core.errors import InputError, UsageError
from ldmcli.data.arrays import pictures_of
from ldmcli.maths.tiles import center_slices
from ldmcli.sampling import memory
from ldmcli.sampling.classifier import class_guidance, group_count, without_classes
from ldmcli.sampling.draw import Draw, draw_images, tile_side
from ldmcli.sampling.editing import edit_images
from ldmcli.sampling.guiding import guide_to, split_guiding
from ldmcli.sampling.model import TrainedDiffusion

TASK_WORDS = {
    "generate": "draws images from nothing; `inpaint(image, mask)` fills a hole with it",
    "sr": "makes images larger; use `upscale(image)`",
    "inpaint": "fills holes; use `inpaint(image, mask)`",
}


class LoadedDiffusion(TrainedDiffusion):
    """A diffusion model in use, with its autoencoder, noise schedule and sampling defaults."""

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
        guide: Any = None,
        classifier: Any = None,
        classifier_scale: float = 1.0,
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
        holes of luminance ≥ 128) says so; known pixels stay. size: (height, width) in pixels, or one number, rounded up
        (`round_up_size`) and cut to its middle. guide: a picture no larger than the results, which are led to what
        looks like it when made as small; how: `guiding.split_guiding`. classifier: what `load_classifier` gave, or its
        run: leads samples to `classes`, also those of a model that takes none. settings: steps, guidance (a number, or
        one a condition), guidance_interval, sampler, eta, spacing; with an image those of `upscale` and `inpaint`, too.
        """
        given = list_values(values, prompt=prompt, classes=classes, layout=layout, map=map)
        if image is not None:
            if size is not None:
                raise UsageError("size: a result from an image has the size that the image asks for")
            settings |= {"n": n, "first": first, "seed": seed, "batch_size": batch_size}
            return self._edit(self.config.task.name, image, mask, given, negative_prompt=negative_prompt, **settings)
        if n < 1 or batch_size < 1:
            raise UsageError(f"n: {n} images, {batch_size} at a time; both must be at least 1")
        size = (size, size) if isinstance(size, int) else size
        led = None if classifier is None else class_guidance(self, classifier, given[Class.name], classifier_scale)
        given = parse_conditions(self.conditions, without_classes(self, given, led), size or self.trained_size)
        ids = range(first, n * group_count(given, led))
        whole, images = self.round_up_size(size), []
        guiding, settings = split_guiding(settings)
        draw = Draw(
            ids=ids,
            seed=seed,
            values=centred(given, whole, size),
            settings=settings,
            negative_prompt=negative_prompt,
            size=whole,
            guide=None if guide is None else guide_to(self, pictures_of(guide, "guide")[0], guiding, whole, size),
            classes=led,
            tile=tile_side(self, whole, settings, max_memory=memory.activation_budget(self.device)),
        )
        for start in range(0, len(ids), batch_size):
            images += to_pil(draw_images(self, draw.of(ids[start : start + batch_size])), whole, size)
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
        negative_prompt, steps and other settings of sampling, and those of `inpainting.inpaint_images`.
        """
        given = list_values(values, prompt=prompt, classes=classes, layout=layout, map=map)
        return self._edit("inpaint", image, mask, given, n=n, **how)

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
        """PIL images, `config.task.scale` times as large, by a model of task sr; arguments as `inpaint`.

        guide_scale: leads results to what, made small again, is the image; guide_rule, guide_metric, perceptual as
        `sample`.
        """
        given = list_values(values, prompt=prompt, classes=classes, layout=layout, map=map)
        return self._edit("sr", image, None, given, n=n, **how)

    def _edit(self, task: str, image: Any, mask: Any, values: dict[str, list], **how) -> list:
        own = self.config.task.name
        if task == "sr":
            guiding, how = split_guiding({"guide_scale": 0.0, **how})
            how["guiding"] = guiding
        if task == "generate" or (task == "sr") != (own == "sr"):
            raise UsageError(f"image: this model {TASK_WORDS[own]}")
        pictures = pictures_of(image)
        if (task == "inpaint") != (mask is not None):
            raise UsageError(
                "mask: says what to repaint; give one"
                if mask is None
                else "mask: this model makes images larger; it takes none"
            )
        holes = None if mask is None else _holes(pictures, parse_masks(mask))
        values = only_given(self.conditions, values)
        warn_of_values(self.conditions, values)
        return edit_images(self, pictures, holes, parse_unsized(self.conditions, values), **how)


def to_pil(images: np.ndarray, whole: tuple[int, int] | None, size: tuple[int, int] | None) -> list:
    """The middle of `size` of images (n, *whole, 3), as PIL images; None = all of them."""
    if whole is not None and size is not None:
        images = images[(slice(None), *center_slices(whole, size))]
    return [Image.fromarray(one) for one in images]


def _holes(images: list[np.ndarray], holes: list[np.ndarray]) -> list[np.ndarray]:
    """A hole for each image. Raises UsageError for other numbers of them, InputError for other sizes."""
    if len(holes) not in (1, len(images)):
        raise UsageError(f"{len(images)} images and {len(holes)} masks: give one mask, or one an image")
    holes = holes * (len(images) // len(holes))
    for image, hole in zip(images, holes):
        if image.shape[:2] != hole.shape:
            raise InputError(
                f"a mask of {hole.shape[1]}x{hole.shape[0]} px for an image of "
                f"{image.shape[1]}x{image.shape[0]}; they must be of one size"
            )
    return holes

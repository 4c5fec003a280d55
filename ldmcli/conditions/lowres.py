"""Low-resolution images, the input of super-resolution (Sec. 4.4)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ldmcli.conditions.condition import Condition, Size, Spec, View
from ldmcli.conditions.pictures import enlarged
from ldmcli.core.settings import DiffusionConfig
from ldmcli.data.degradations import degrade
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.spatial_conditioners import LowResConditioner

if TYPE_CHECKING:
    from ldmcli.conditions.dataset import ConditionDataset


class LowRes(Condition):
    """A small image, uint8 (h, w, 3), which stands beside z_t; no null."""

    name, conditioner = "lowres", LowResConditioner
    option = "image"
    column = "image"
    user_given = False
    image_sized = True
    spatial = True
    pipeline_tag = "image-to-image"
    example_call = 'image="photo.png", '
    missing = "this model makes small images larger; use `ldm upscale`, or image=… from Python"

    def from_row(self, dataset: "ConditionDataset", view: View) -> np.ndarray:
        """The row's picture made small by the degradation of the task."""
        task = dataset.config.task
        return degrade(dataset.pixels(view), task.scale, task.degradation, *dataset.random_key(view), "degrade")

    def assumed_spec(self, config: DiffusionConfig, stage: Autoencoder) -> tuple[Spec, str]:
        """All of it is in the settings and the first stage."""
        latent = stage.latent_channels if config.task.enlarged else 0
        return {"scale": config.task.scale, "f": stage.f, "latent": latent}, ""

    def picture(self, value: np.ndarray, size: Size, names: Sequence[str]) -> np.ndarray:
        """The image, pixels repeated."""
        return enlarged(value, size)

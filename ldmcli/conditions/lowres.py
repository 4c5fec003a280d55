"""Low-resolution images, the input of super-resolution (Sec. 4.4)."""

from ldmcli.conditions.condition import Condition
from ldmcli.networks.spatial_conditioners import LowresCondition


class LowRes(Condition):
    """A small image, uint8 (h, w, 3), which stands beside z_t; no null."""

    name, conditioner = "lowres", LowresCondition
    option = "image"
    column = "image"
    user_given = False
    missing = "this model makes small images larger; use `ldm upscale`, or image=… from Python"

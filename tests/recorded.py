"""Networks with the weights that were recorded in tests/fixtures, or made by the rule that is recorded there."""

import hashlib

import numpy as np
import torch
from golden_cases import golden, strip_prefix

from ldmcli.core.settings import DiffusionSettings
from ldmcli.networks.perceptual import BACKBONES
from ldmcli.networks.unet import UNet


def unet_settings(unet: dict, num_heads: int | None = None) -> DiffusionSettings:
    """Our settings for a configuration of the original."""
    return DiffusionSettings(
        channels=unet["model_channels"],
        channel_mult=tuple(unet["channel_mult"]),
        num_res_blocks=unet["num_res_blocks"],
        attention_resolutions=tuple(unet["attention_resolutions"]),
        num_heads=num_heads or unet.get("num_heads", 0),
        head_channels=unet.get("num_head_channels", 32),
        spatial_transformer=unet.get("use_spatial_transformer", False),
        transformer_depth=unet.get("transformer_depth", 1),
        scale_shift=unet.get("use_scale_shift_norm", False),
        resblock_updown=unet.get("resblock_updown", False),
        position="none",
    )


def recorded_unet(case: str, num_heads: int | None = None) -> tuple[UNet, dict, dict, dict]:
    """UNet with the recorded weights, the conditioner's state dict, the recorded tensors, the configuration."""
    config, state, io = golden(case)
    unet = config["unet"]
    model = UNet(
        unet_settings(unet, num_heads), unet["in_channels"], unet["out_channels"], context_dim=unet.get("context_dim")
    )
    model.load_state_dict(strip_prefix(state, "model.diffusion_model."), strict=True)
    return model.eval(), strip_prefix(state, "cond_stage_model."), io, config


def trunk_state(kind):
    """Names and shapes of a backbone's `features` with small random values."""
    import torchvision

    with torch.device("meta"):
        state = getattr(torchvision.models, BACKBONES[kind].builder)(weights=None).features.state_dict()
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=generator) * 0.05 for name, value in state.items()}


def recorded_trunk(kind, seed):
    """The recorded rule: a seed of each name as lpips spells it, `sliceK.` in front of torchvision's index."""
    state, ends = {}, BACKBONES[kind].taps
    for name, value in trunk_state(kind).items():
        index = int(name.split(".")[0])
        if index > ends[-1]:
            continue
        part = 1 + sum(index > end for end in ends)
        number = int.from_bytes(hashlib.sha256(f"{seed}:slice{part}.{name}".encode()).digest()[:4], "little")
        values = np.random.RandomState(number).standard_normal(tuple(value.shape))
        scale = np.sqrt(2 / np.prod(value.shape[1:])) if value.ndim == 4 else 0.01
        state[name] = torch.from_numpy((values * scale).astype(np.float32))
    return state

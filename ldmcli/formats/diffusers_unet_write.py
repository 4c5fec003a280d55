"""Our UNet written as UNet2DModel or UNet2DConditionModel of diffusers."""

from typing import Any

import torch
from torch import Tensor, nn

from ldmcli.core.settings import DiffusionSettings
from ldmcli.formats.diffusers_files import translate_back
from ldmcli.formats.diffusers_unet import CROSS, DEFAULTS, PLAIN, unet_names
from ldmcli.networks.unet import UNet, head_count, level_widths


def why_not(
    settings: DiffusionSettings, in_channels: int, out_channels: int, context_dim: int | None, vector_dim: int | None
) -> str:
    """ "" where a stock class computes the same, else the reason for which none does."""
    if settings.position != "none":
        return "position codes inside attention"
    if settings.patch != 1:
        return "folded latent patches"
    if vector_dim and settings.vector_mlp:
        return "a vector that goes through layers of its own"
    if settings.spatial_transformer:
        if context_dim is None:
            return "transformer blocks without tokens to look at"
        if not settings.middle_attention:
            return "no attention in the middle"
        if settings.resblock_updown:
            return "residual resampling beside cross-attention"
    elif _head_width(settings) is None:
        return "a number of heads that leaves widths of heads unequal"
    with torch.device("meta"):
        net = UNet(settings, in_channels, out_channels, context_dim=context_dim)
    groups = {module.num_groups for module in net.modules() if isinstance(module, nn.GroupNorm)}
    if len(groups) > 1:
        return f"GroupNorm of {' and '.join(map(str, sorted(groups)))} groups"
    return ""


def _used_levels(settings: DiffusionSettings) -> list[tuple[int, int]]:
    """(width, heads) of the levels that have attention, the middle's last."""
    widths = level_widths(settings)
    on = [2**level in settings.attention_resolutions for level in range(len(widths))]
    on[-1] = on[-1] or settings.middle_attention
    return [(width, head_count(width, settings, level)) for level, width in enumerate(widths) if on[level]]


def _head_width(settings: DiffusionSettings) -> int | None:
    """The width of a head on all levels; None where there is no such number."""
    widths = {width // heads for width, heads in _used_levels(settings)} or {8}
    return widths.pop() if len(widths) == 1 else None


def write_unet(
    settings: DiffusionSettings,
    tensors: dict[str, Tensor],
    *,
    in_channels: int,
    out_channels: int,
    context_dim: int | None,
    sample_size: tuple[int, int],
    table: Tensor | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, tensors) of the stock class; `why_not` must have found nothing."""
    class_name = CROSS if settings.spatial_transformer else PLAIN
    widths = level_widths(settings)
    on = [2**level in settings.attention_resolutions for level in range(len(widths))]
    by = settings.resblock_updown
    cross = "Cross" if class_name == CROSS else ""

    def block(attends: bool, resample_type: str, sampling: str) -> str:
        if attends:
            return f"{cross}Attn{resample_type}Block2D"
        return f"Resnet{sampling}Block2D" if by else f"{resample_type}Block2D"

    with torch.device("meta"):
        groups = next(
            m.num_groups
            for m in UNet(settings, in_channels, out_channels, context_dim=context_dim).modules()
            if isinstance(m, nn.GroupNorm)
        )
    height, width = sample_size
    config: dict[str, Any] = {
        "_class_name": class_name,
        "_diffusers_version": "0.42.1",
        "act_fn": "silu",
        "sample_size": height if height == width else [height, width],
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": widths,
        "down_block_types": [block(a, "Down", "Downsample") for a in on],
        "up_block_types": [block(a, "Up", "Upsample") for a in reversed(on)],
        "layers_per_block": settings.num_res_blocks,
        "mid_block_type": DEFAULTS[class_name]["mid_block_type"],
        "norm_num_groups": groups,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "dropout": settings.dropout,
        "resnet_time_scale_shift": "scale_shift" if settings.scale_shift else "default",
        "class_embed_type": None,
        "num_class_embeds": None if table is None else len(table),
        "time_embedding_type": "positional",
        "center_input_sample": False,
    }
    config |= _plain_entries(settings, groups) if class_name == PLAIN else _cross_entries(settings, on, context_dim)
    theirs = translate_back(unet_names(settings), tensors)
    if table is not None:
        theirs["class_embedding.weight"] = table
    return config, theirs


def _plain_entries(settings: DiffusionSettings, groups: int) -> dict[str, Any]:
    """Configuration that only a UNet2DModel has."""
    resample_type = "resnet" if settings.resblock_updown else "conv"
    return {
        "attention_head_dim": _head_width(settings),
        "attn_norm_num_groups": groups,
        "add_attention": settings.middle_attention,
        "downsample_type": resample_type,
        "upsample_type": resample_type,
    }


def _cross_entries(settings: DiffusionSettings, on: list[bool], context_dim: int | None) -> dict[str, Any]:
    """Configuration that only a UNet2DConditionModel has. on: which levels have attention."""
    counts = [
        head_count(width, settings, level) if attends or level == len(on) - 1 else 1
        for level, (width, attends) in enumerate(zip(level_widths(settings), on))
    ]
    return {
        "attention_head_dim": counts[0] if len(set(counts)) == 1 else counts,
        "cross_attention_dim": context_dim,
        "transformer_layers_per_block": settings.transformer_depth,
        "use_linear_projection": False,
        "only_cross_attention": False,
        "dual_cross_attention": False,
        "upcast_attention": False,
    }

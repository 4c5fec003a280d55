"""UNet2DModel and UNet2DConditionModel of diffusers read as our UNet; `diffusers_unet_write` is the way back."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldmcli.core.errors import ModelError, UsageError
from ldmcli.core.settings import DiffusionSettings
from ldmcli.formats.diffusers_files import MOST_LAYERS, Config, Names, translate
from ldmcli.networks.unet import UNet, head_count, level_widths

PLAIN, CROSS = "UNet2DModel", "UNet2DConditionModel"
_SHARED: dict[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "class_embed_type": None,
    "num_class_embeds": None,
    "sample_size": None,
    "attention_head_dim": 8,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    PLAIN: _SHARED
    | {
        "in_channels": 3,
        "out_channels": 3,
        "mid_block_type": "UNetMidBlock2D",
        "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
        "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
        "block_out_channels": [224, 448, 672, 896],
        "downsample_type": "conv",
        "upsample_type": "conv",
        "attn_norm_num_groups": None,
        "add_attention": True,
        "num_heads": None,
    },
    CROSS: _SHARED
    | {
        "in_channels": 4,
        "out_channels": 4,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [320, 640, 1280, 1280],
        "only_cross_attention": False,
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "use_linear_projection": False,
        "addition_embed_type": None,
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "class_embeddings_concat": False,
        "attention_type": "default",
        "mid_block_only_cross_attention": None,
        "cross_attention_norm": None,
    },
}
_BlockTypes = dict[str, dict[str, tuple[bool, bool | None]]]
# block type -> (attention, resampling by residual blocks; None: as downsample_type or upsample_type say)
_DOWN: _BlockTypes = {
    PLAIN: {"DownBlock2D": (False, False), "AttnDownBlock2D": (True, None), "ResnetDownsampleBlock2D": (False, True)},
    CROSS: {"DownBlock2D": (False, False), "CrossAttnDownBlock2D": (True, False)},
}
_UP: _BlockTypes = {
    PLAIN: {"UpBlock2D": (False, False), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, True)},
    CROSS: {"UpBlock2D": (False, False), "CrossAttnUpBlock2D": (True, False)},
}
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def unet_names(settings: DiffusionSettings, linear: bool = False) -> Names:
    """Where the parts of our UNet stand in theirs. linear: projections around transformer blocks are matrices."""
    names = Names(
        {
            "time_embed.0": "time_embedding.linear_1",
            "time_embed.2": "time_embedding.linear_2",
            "input_blocks.0.0": "conv_in",
            "out.0": "conv_norm_out",
            "out.2": "conv_out",
        }
    )
    widths, depth = level_widths(settings), settings.num_res_blocks

    def residual(ours: str, theirs: str) -> None:
        names.roots.update({f"{ours}.{a}": f"{theirs}.{b}" for a, b in _RESIDUAL.items()})

    def attention(ours: str, theirs: str, level: int) -> None:
        if settings.spatial_transformer:
            names.roots[ours] = theirs
            if linear:
                names.matrices |= {f"{ours}.proj_in", f"{ours}.proj_out"}
            return
        names.roots.update({f"{ours}.norm": f"{theirs}.group_norm", f"{ours}.proj_out": f"{theirs}.to_out.0"})
        names.matrices.add(f"{ours}.proj_out")
        names.qkv[f"{ours}.qkv"] = (theirs, head_count(widths[level], settings, level))

    def resampling(ours: str, theirs: str, conv: str) -> None:
        if settings.resblock_updown:
            residual(ours, theirs)
        else:
            names.roots[f"{ours}.{conv}"] = f"{theirs}.conv"

    attends = [2**level in settings.attention_resolutions for level in range(len(widths))]
    block = 1
    for level in range(len(widths)):
        for j in range(depth):
            residual(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{j}")
            if attends[level]:
                attention(f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{j}", level)
            block += 1
        if level < len(widths) - 1:
            resampling(f"input_blocks.{block}.0", f"down_blocks.{level}.downsamplers.0", "op")
            block += 1
    residual("middle_block.0", "mid_block.resnets.0")
    if settings.middle_attention:
        attention("middle_block.1", "mid_block.attentions.0", len(widths) - 1)
    residual(f"middle_block.{2 if settings.middle_attention else 1}", "mid_block.resnets.1")
    block = 0
    for position, level in enumerate(reversed(range(len(widths)))):
        for j in range(depth + 1):
            residual(f"output_blocks.{block}.0", f"up_blocks.{position}.resnets.{j}")
            if attends[level]:
                attention(f"output_blocks.{block}.1", f"up_blocks.{position}.attentions.{j}", level)
            if level > 0 and j == depth:
                entry = 2 if attends[level] else 1
                resampling(f"output_blocks.{block}.{entry}", f"up_blocks.{position}.upsamplers.0", "conv")
            block += 1
    return names


def _levels(config: Config, class_name: str) -> tuple[list[bool], bool]:
    """(attention of each level, resampling by residual blocks), read from the two lists of block types."""
    seen: dict[str, list[tuple[bool, bool]]] = {}
    for key, table, sampling_type in (
        ("down_block_types", _DOWN, "downsample_type"),
        ("up_block_types", _UP, "upsample_type"),
    ):
        types = config[key]
        if not isinstance(types, list) or len(types) != len(config.integers("block_out_channels")):
            raise config.refuse(key, "as many as block_out_channels are expected")
        unknown = [name for name in types if name not in table[class_name]]
        if unknown:
            raise config.refuse(key, f"{unknown[0]} is not among {', '.join(table[class_name])}")
        seen[key] = [
            (attends, config[sampling_type] == "resnet" if by is None else by)
            for attends, by in (table[class_name][name] for name in types)
        ]
    down, up = seen["down_block_types"], seen["up_block_types"][::-1]
    if [attends for attends, _ in down] != [attends for attends, _ in up]:
        raise config.refuse("up_block_types", "attention on the levels of down_block_types, mirrored, is expected")
    ways = {by for _, by in down[:-1]} | {by for _, by in up[1:]}
    if len(ways) > 1:
        raise config.refuse(
            "down_block_types",
            "some levels resample by residual blocks and some by convolutions "
            "(down_block_types, up_block_types, downsample_type, upsample_type)",
        )
    return [attends for attends, _ in down], ways == {True}


def _heads(config: Config, class_name: str, widths: list[int], attends: list[bool]) -> dict[str, Any]:
    """Settings of the head counts. attention_head_dim is a head's width in one class and their number in the other."""
    used = [width for width, on in zip(widths, [*attends[:-1], True]) if on]
    given = config["attention_head_dim"]
    if class_name == PLAIN and config["num_heads"] is not None:
        return _head_counts(config, "num_heads", widths, attends)
    if class_name == CROSS:
        if config["num_attention_heads"] is not None:
            raise config.refuse("num_attention_heads", "diffusers refuses it, too; attention_head_dim is their number")
        return _head_counts(config, "attention_head_dim", widths, attends)
    if given is None:
        return {"num_heads": 1}
    width = config.integer("attention_head_dim")
    wrong = [level for level in used if level % width]
    if wrong:
        raise config.refuse("attention_head_dim", f"a head's width here; it does not divide a level of {wrong[0]}")
    return {"num_heads": 0, "head_channels": width}


def _head_counts(config: Config, key: str, widths: list[int], attends: list[bool]) -> dict[str, Any]:
    counts = config.integers(key) if isinstance(config[key], list) else [config.integer(key)] * len(widths)
    if len(counts) != len(widths):
        raise config.refuse(key, f"one number or {len(widths)} are expected")
    pairs = [pair for pair, on in zip(zip(widths, counts), [*attends[:-1], True]) if on]
    wrong = [pair for pair in pairs if pair[0] % pair[1]]
    if wrong:
        raise config.refuse(key, f"{wrong[0][1]} heads do not divide a width of {wrong[0][0]}")
    if len({count for _, count in pairs}) == 1:
        return {"num_heads": pairs[0][1]}
    if len({width // count for width, count in pairs}) == 1:
        return {"num_heads": 0, "head_channels": pairs[0][0] // pairs[0][1]}
    return {"level_heads": tuple(counts)}


def _plain_only(config: Config, groups: int, scale_shift: bool) -> dict[str, Any]:
    """Settings that only a UNet2DModel has."""
    config.only(downsample_type=("conv", "resnet"), upsample_type=("conv", "resnet"))
    own = config["attn_norm_num_groups"]
    if config["add_attention"] and own != groups and (scale_shift or own is not None):
        raise config.refuse(
            "attn_norm_num_groups",
            "the middle attention is normalised like the rest, by "
            f"norm_num_groups = {groups}; null with scale_shift is not",
        )
    return {"middle_attention": bool(config["add_attention"])}


def _cross_only(config: Config) -> dict[str, Any]:
    """Settings that only a UNet2DConditionModel has."""
    config.only(
        only_cross_attention=(False,),
        reverse_transformer_layers_per_block=(None,),
        encoder_hid_dim=(None,),
        encoder_hid_dim_type=(None,),
        dual_cross_attention=(False,),
        addition_embed_type=(None,),
        resnet_skip_time_act=(False,),
        resnet_out_scale_factor=(1.0,),
        time_embedding_act_fn=(None,),
        timestep_post_act=(None,),
        time_cond_proj_dim=(None,),
        conv_in_kernel=(3,),
        conv_out_kernel=(3,),
        class_embeddings_concat=(False,),
        attention_type=("default",),
        cross_attention_norm=(None,),
        mid_block_only_cross_attention=(None, False),
    )
    layers = config["transformer_layers_per_block"]
    if isinstance(layers, list) and len(set(config.integers("transformer_layers_per_block"))) == 1:
        config.values["transformer_layers_per_block"] = layers[0]
    return {"transformer_depth": config.integer("transformer_layers_per_block", MOST_LAYERS)}


def read_settings(config: Config, class_name: str) -> DiffusionSettings:
    """The settings of the network that a configuration describes. Raises ModelError, naming a key that is beyond it."""
    config.only(
        center_input_sample=(False,),
        flip_sin_to_cos=(True,),
        freq_shift=(0,),
        downsample_padding=(1,),
        time_embedding_type=("positional",),
        mid_block_scale_factor=(1,),
        act_fn=("silu", "swish"),
        norm_eps=(1e-5,),
        resnet_time_scale_shift=("default", "scale_shift"),
        class_embed_type=(None,),
        mid_block_type=(DEFAULTS[class_name]["mid_block_type"],),
    )
    widths = config.integers("block_out_channels")
    if config["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise config.refuse("time_embedding_dim", "four times the first width is expected")
    depth = config["layers_per_block"]
    if isinstance(depth, list):
        if len(set(config.integers("layers_per_block"))) != 1:
            raise config.refuse("layers_per_block", "one number for all levels is expected")
        depth = depth[0]
        config.values["layers_per_block"] = depth
    groups = config.integer("norm_num_groups")
    if any(width % groups for width in widths):
        raise config.refuse("norm_num_groups", f"does not divide {widths}")
    scale_shift = config["resnet_time_scale_shift"] == "scale_shift"
    more = _plain_only(config, groups, scale_shift) if class_name == PLAIN else _cross_only(config)
    attends, by_residuals = _levels(config, class_name)
    try:
        settings = DiffusionSettings(
            channels=widths[0],
            channel_mult=tuple(width / widths[0] for width in widths),
            num_res_blocks=config.integer("layers_per_block", MOST_LAYERS),
            attention_resolutions=tuple(2**level for level, on in enumerate(attends) if on),
            spatial_transformer=class_name == CROSS,
            scale_shift=scale_shift,
            resblock_updown=by_residuals,
            dropout=float(config["dropout"] or 0.0),
            groups=groups,
            position="none",
            **_heads(config, class_name, widths, attends),
            **more,
        )
    except UsageError as error:
        raise ModelError(f"{config.path}: {error}") from error
    if level_widths(settings) != widths:
        raise config.refuse("block_out_channels", "widths that are multiples of the first, or of 8, are expected")
    return settings


def read_unet(
    config: Config, class_name: str, weights: dict[str, Tensor]
) -> tuple[DiffusionSettings, dict[str, Tensor], Tensor | None]:
    """(settings, tensors under our names, class table (n, 4·channels) or None). Raises ModelError."""
    settings = read_settings(config, class_name)
    table = None
    if config["num_class_embeds"] is not None:
        settings = replace(settings, vector_mlp=False)
        table = weights.pop("class_embedding.weight", None)
        if table is None or tuple(table.shape) != (config.integer("num_class_embeds"), 4 * settings.channels):
            raise config.refuse("num_class_embeds", "class_embedding.weight is missing or of another shape")
    context = config.integer("cross_attention_dim") if class_name == CROSS else None
    names = unet_names(settings, linear=bool(config["use_linear_projection"]))
    return (
        settings,
        translate(
            names,
            weights,
            _shapes(settings, config.integer("in_channels"), config.integer("out_channels"), context),
            config.path,
        ),
        table,
    )


def _shapes(settings: DiffusionSettings, in_channels: int, out_channels: int, context_dim: int | None) -> dict:
    with torch.device("meta"):
        return UNet(settings, in_channels, out_channels, context_dim=context_dim).state_dict()

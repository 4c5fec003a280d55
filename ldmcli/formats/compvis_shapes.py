"""What a CompVis checkpoint is by the shapes of its weights, where no YAML says it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmcli.core.errors import LdmError, ModelError
from ldmcli.core.presets import FIRST_STAGES, MODELS, Preset
from ldmcli.core.settings import AutoencoderSettings, DiffusionSettings
from ldmcli.formats import compvis_config as cc
from ldmcli.formats import compvis_heads
from ldmcli.networks.unet import UNet

UNET, COND = "model.diffusion_model.", "cond_stage_model."


def first_stage(path: Path, state: dict[str, Tensor], prefix: str) -> cc.FirstStage:
    """The settings of a first stage: its names and shapes say all but the nominal resolution, taken as 256.

    Raises ModelError where they do not fit a network of the paper.
    """
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    try:
        settings = _settings(own)
    except (KeyError, IndexError, ZeroDivisionError, ValueError, LdmError) as error:
        raise ModelError(
            f"{path}: not a first stage that can be recognised by its weights ({error}); "
            "name its configuration with --config"
        ) from None
    return cc.FirstStage(settings, settings.resolution)


def _count(names: dict[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _settings(own: dict[str, Tensor]) -> AutoencoderSettings:
    levels = _count(own, r"encoder\.down\.(\d+)\.block\.")
    channels, in_channels = own["encoder.conv_in.weight"].shape[:2]
    widths = [own[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    if not levels or any(width % channels for width in widths):
        raise ValueError("widths are no multiples of the first")
    attention = tuple(256 // 2**i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in own)
    z_channels, embed_dim = own["post_quant_conv.weight"].shape[:2]
    vq = "quantize.embedding.weight" in own
    return AutoencoderSettings(
        family="paper",
        f=2 ** (levels - 1),
        reg="vq" if vq else "kl",
        in_channels=in_channels,
        z_channels=z_channels,
        embed_dim=embed_dim,
        codebook_size=own["quantize.embedding.weight"].shape[0] if vq else 1024,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=_count(own, r"encoder\.down\.0\.block\.(\d+)\."),
        attn_resolutions=attention,
        resolution=256,
        mid_attention="encoder.mid.attn_1.q.weight" in own,
        legacy_beta=True,
    )


def plan(path: Path, state: dict[str, Tensor], heads: str) -> cc.Plan:
    """The published model whose network has these shapes. Raises ModelError where none has, or several differ."""
    unet = {name.removeprefix(UNET): tuple(tensor.shape) for name, tensor in state.items() if name.startswith(UNET)}
    found = [name for name, preset in MODELS.items() if _is(preset, unet) and _conditioned(preset, state)]
    if not found:
        raise ModelError(f"{path}: no published model has a network of these shapes; name its YAML with --config")
    preset = MODELS[found[0]]
    settings = replace(_diffusion(preset), position="none")
    betas = state.get("betas")
    if betas is not None and len(betas):
        settings = replace(settings, beta_start=round(float(betas[0]), 6), beta_end=round(float(betas[-1]), 6))
    settings, notes = compvis_heads.with_heads(settings, heads, found, False)
    if not notes and found[0] in compvis_heads.ONE_HEAD:
        notes = [
            f"attention: 1 head, as {found[0]} was trained; its configuration reads as heads of 32 channels to "
            "later code (--heads to choose)"
        ]
    names = " or ".join(found)
    stage = FIRST_STAGES[preset.extra["first_stage"]]
    values = {key.partition(".")[2]: value for key, value in stage.values.items() if key.startswith("autoencoder.")}
    shared = preset.values.get("task.name") == "inpaint"
    inner = cc.FirstStage(AutoencoderSettings(**values))
    if any(name.startswith("first_stage_model.") for name in state):
        inner = first_stage(path, state, "first_stage_model.")
    return cc.Plan(
        settings,
        preset.extra["in_channels"],
        inner,
        replace(_conditioner(preset), shared=shared),
        preset.extra["latent"],
        preset.extra["scale_factor"],
        found[0] == "lsun_churches256",
        preset.extra["context_dim"],
        {},
        (f"recognised by its shapes: {names}", *notes),
    )


def _diffusion(preset: Preset) -> DiffusionSettings:
    return DiffusionSettings(
        **{key.partition(".")[2]: value for key, value in preset.values.items() if key.startswith("diffusion.")}
    )


def _is(preset: Preset, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the preset's network has exactly these names and shapes."""
    extra, settings = preset.extra, _diffusion(preset)
    first = (settings.channels, extra["in_channels"], 3, 3)
    if len(shapes) != extra["tensors"] or shapes.get("input_blocks.0.0.weight") != first:
        return False
    with torch.device("meta"):
        network = UNet(
            settings,
            extra["in_channels"],
            extra["out_channels"],
            context_dim=extra["context_dim"],
            sample_size=extra["latent"][1:],
        )
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == shapes


def _conditioned(preset: Preset, state: dict[str, Tensor]) -> bool:
    """Whether the checkpoint's conditioner is the preset's."""
    wanted: dict[str, Any] = preset.extra["conditioner"] or {}
    key = {
        "class": "embedding.weight",
        "text": "transformer.token_emb.weight",
        "layout": "transformer.token_emb.weight",
        "map": "channel_mapper.weight",
    }.get(wanted.get("kind", ""))
    if key is None:
        return True
    table = state.get(COND + key)
    if table is None:
        return False
    if wanted["kind"] == "map":
        return tuple(table.shape[:2]) == (wanted["out_channels"], wanted["in_channels"])
    return tuple(table.shape) == (wanted.get("classes") or wanted["vocabulary"], wanted["width"])


def _conditioner(preset: Preset) -> cc.Conditioner:
    wanted: dict[str, Any] = preset.extra["conditioner"] or {}
    match wanted.get("kind"):
        case "class":
            return cc.class_conditioner(wanted["classes"], wanted["width"])
        case "text" | "layout":
            return cc.bert_conditioner(
                wanted["kind"] == "layout", wanted["width"], wanted["layers"], wanted["vocabulary"], wanted["length"]
            )
        case "map":
            return cc.map_conditioner(wanted["in_channels"], wanted["out_channels"], wanted["stages"])
    task = preset.values.get("task.name", "generate")
    return cc.Conditioner({"sr": "lowres", "inpaint": "masked"}.get(task, ""))

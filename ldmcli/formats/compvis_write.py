"""Bundles as checkpoints of CompVis/latent-diffusion with their YAML, where that code has a class for all of it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmcli.core import files
from ldmcli.core.errors import ModelError
from ldmcli.core.settings import AutoencoderSettings, DiffusionSettings
from ldmcli.formats.bundle import AutoencoderBundle, Bundle, DiffusionBundle
from ldmcli.networks.latent_scale import LatentScale
from ldmcli.networks.unet import level_widths

GROUPS = 32  # of every GroupNorm of the original
KEPT = "ldm_unfolded."  # tensors as they were before a latent scale was folded into them
SAMPLE = ("sampler", "steps", "guidance", "eta", "temperature", "spacing")


def write(bundle: Bundle, path: Path) -> list[str]:
    """Writes `path` (.ckpt or .safetensors) and the YAML of the same name beside it; returns what there is to say.

    Raises ModelError, naming the reason, where the original has no class for what the model is.
    """
    reason = why_not(bundle)
    if reason:
        raise ModelError(f"{path}: not a model that the code of latent-diffusion can build: {reason}")
    parts = _autoencoder(bundle) if isinstance(bundle, AutoencoderBundle) else _diffusion(bundle)
    state, document, notes = parts
    import yaml

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        files.save_tensors(path, state)
    else:
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        with files.atomic_path(path, size) as temporary:
            files.require_space(path, size)
            torch.save({"state_dict": state, "global_step": 0, "epoch": 0}, temporary)
    files.write_text(path.with_suffix(".yaml"), yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    return notes


def why_not(bundle: Bundle) -> str:
    """Why the original's classes cannot hold a bundle; "" where they can."""
    if isinstance(bundle, AutoencoderBundle):
        return _why_not_first_stage(bundle.config.autoencoder)
    settings, condition = bundle.config.diffusion, bundle.config.condition
    if calls := bundle.config.distill.calls:
        return f"distilled to {calls} network calls, which are other steps than it samples by"
    if bundle.autoencoder is not None and bundle.autoencoder.tensors:
        inner = bundle.autoencoder.config.autoencoder
        uneven = len(set(bundle.scale.std)) > 1 or any(bundle.scale.mean)
        reason = _why_not_first_stage(inner)
        if not reason and uneven and inner.reg == "vq" and len(set(bundle.scale.std)) > 1:
            reason = "VQ latents scaled by a number a channel (nearest codes would be others)"
        if reason:
            return reason
    elif bundle.scale != LatentScale.identity(len(bundle.scale.std)) and len(set(bundle.scale.std)) > 1:
        return "pixels scaled by a number a channel"
    if len(bundle.config.kinds) > 1:
        return f"several conditions ({' + '.join(bundle.config.kinds)})"
    kind = next(iter(bundle.config.kinds), "")
    vector = (kind in ("text", "layout") and condition.text_pooled) or (kind == "class" and condition.class_vector)
    if vector:
        return f"a vector of the {kind} beside the time embedding"
    if kind in ("text", "layout") and (condition.text_heads, condition.text_head_channels) != (8, 64):
        return "a text transformer of other than 8 heads of 64 channels"
    if kind == "text" and condition.text_encoder != "joint":
        return f"the text encoder {condition.text_encoder}"
    if kind == "layout" and bundle.specs[kind].get("planes"):
        return "boxes drawn as planes (condition.layout_planes)"
    if kind == "lowres" and bundle.specs[kind]["scale"] != bundle.specs[kind]["f"]:
        return f"enlarging by {bundle.specs[kind]['scale']} in latents of f = {bundle.specs[kind]['f']}"
    if kind == "lowres" and bundle.specs[kind].get("latent"):
        return "the latent of the enlarged image beside the small one (task.enlarged)"
    return _why_not_unet(settings, kind)


def _why_not_first_stage(s: AutoencoderSettings) -> str:
    if s.family != "paper":
        return f"a first stage of family {s.family!r}"
    if s.groups != GROUPS or any(s.channels * m % GROUPS for m in (1, *s.channel_mult)):
        return "a first stage whose widths are no multiples of 32"
    if not s.mid_attention and s.attn_resolutions:
        return "a first stage with attention outside of its middle only"
    return ""


def _why_not_unet(s: DiffusionSettings, kind: str) -> str:
    widths = level_widths(s)
    tokens = kind in ("class", "text", "layout", "tokens")
    checks = {
        f"prediction = {s.prediction!r}": s.prediction not in ("eps", "x0"),
        f"position = {s.position!r}": s.position != "none",
        f"patch = {s.patch}": s.patch != 1,
        "a network without attention in the middle": not s.middle_attention,
        "heads set level by level": bool(s.level_heads),
        "widths that are no whole multiples of the first": any(m != int(m) for m in s.channel_mult),
        "a first level wider than model_channels": s.channel_mult[0] != 1,
        "widths that are no multiples of 32": s.groups != GROUPS or any(w % GROUPS for w in widths),
        "heads that do not divide a width": not s.num_heads and any(w % s.head_channels for w in widths),
        "cross-attention without a condition of tokens": s.spatial_transformer and not tokens,
        "a condition of tokens without cross-attention": tokens and not s.spatial_transformer,
        "tokens that an encoder outside of the model makes": kind == "tokens",
    }
    return next((reason for reason, wrong in checks.items() if wrong), "")


# ---------------------------------------------------------------- first stages


def _stage_document(s: AutoencoderSettings, interface: bool) -> dict[str, Any]:
    """`{target, params}` of a first stage. interface: as a diffusion model holds it."""
    vq = s.reg == "vq"
    network = {
        "double_z": not vq,
        "z_channels": s.z_channels,
        "resolution": s.resolution,
        "in_channels": s.in_channels,
        "out_ch": s.in_channels,
        "ch": s.channels,
        "ch_mult": list(map(int, s.channel_mult)),
        "num_res_blocks": s.num_res_blocks,
        "attn_resolutions": list(s.attn_resolutions),
        "dropout": s.dropout,
    }
    if not s.mid_attention:
        network = {"attn_type": "none", **network}
    name = ("VQModelInterface" if interface else "VQModel") if vq else "AutoencoderKL"
    params: dict[str, Any] = {"embed_dim": s.embed_dim}
    if vq:
        params["n_embed"] = s.codebook_size
    params |= {"ddconfig": network, "lossconfig": {"target": "torch.nn.Identity"}}
    return {"target": f"ldm.models.autoencoder.{name}", "params": params}


def _autoencoder(bundle: AutoencoderBundle) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    document: dict[str, Any] = {"model": _stage_document(bundle.config.autoencoder, interface=False)}
    if bundle.scale is not None:
        document["ldm"] = {"latent_mean": list(bundle.scale.mean), "latent_std": list(bundle.scale.std)}
    return dict(bundle.tensors), document, []


def folded(s: AutoencoderSettings, tensors: dict[str, Tensor], scale: LatentScale) -> dict[str, Tensor]:
    """The convolutions around the latent (and the codebook) that work on normalised latents.

    Computed in double precision; of VQ models the scale is one number for all channels, so nearest codes stay.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (scale.mean, scale.std))
    part = {name: tensor.double() for name, tensor in tensors.items()}
    weight, bias = part["quant_conv.weight"].clone(), part["quant_conv.bias"].clone()
    c = s.embed_dim
    weight[:c] /= std[:, None, None, None]
    bias[:c] = (bias[:c] - mean) / std
    if s.reg == "kl":  # the log-variance follows the scale
        bias[c:] -= 2 * std.log()
    back = part["post_quant_conv.weight"]
    out = {
        "quant_conv.weight": weight,
        "quant_conv.bias": bias,
        "post_quant_conv.weight": back * std[None, :, None, None],
        "post_quant_conv.bias": part["post_quant_conv.bias"] + back[:, :, 0, 0] @ mean,
    }
    if s.reg == "vq":
        out["quantize.embedding.weight"] = (part["quantize.embedding.weight"] - mean) / std
    return {name: tensor.float() for name, tensor in out.items()}


# ---------------------------------------------------------------- diffusion models


def _diffusion(bundle: DiffusionBundle) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    s, kind = bundle.config.diffusion, next(iter(bundle.config.kinds), "")
    channels, height, width = bundle.latent_shape
    state = {
        name.replace("unet.", "model.diffusion_model.", 1): tensor
        for name, tensor in bundle.tensors.items()
        if name.startswith("unet.")
    }
    ours = f"conditions.entries.{kind}." + ("" if kind == "class" else "encoder.")
    state |= {
        "cond_stage_model." + name.removeprefix(ours): tensor
        for name, tensor in bundle.tensors.items()
        if name.startswith("conditions.")
    }
    own: dict[str, Any] = {
        "sample": {
            name: value
            for name, value in asdict(bundle.config.sample).items()
            if name in SAMPLE and isinstance(value, (str, int, float))
        }
    }
    notes: list[str] = []
    stage, factor = _inner_stage(bundle, state, own, notes)
    document = {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": s.beta_start,
                "linear_end": s.beta_end,
                "timesteps": s.timesteps,
                "beta_schedule": s.schedule,
                "parameterization": s.prediction,
                "loss_type": s.loss,
                "first_stage_key": "image",
                **_conditioning(bundle, kind, own, notes),
                "image_size": height if height == width else [height, width],
                "channels": channels,
                "scale_factor": factor,
                "use_ema": False,
                "unet_config": _unet_document(bundle, s),
                "first_stage_config": stage,
            },
        },
        "ldm": own,
    }
    return state, document, notes


def _inner_stage(
    bundle: DiffusionBundle, state: dict[str, Tensor], own: dict[str, Any], notes: list[str]
) -> tuple[dict[str, Any], float]:
    """The first stage's section and the scale factor; its tensors join `state`, with the latent scale folded in where
    it is more than one number."""
    inner, scale = bundle.autoencoder, bundle.scale
    simple = len(set(scale.std)) == 1 and not any(scale.mean)
    own["latent_std"] = list(scale.std)
    own["latent_mean"] = list(scale.mean)
    if inner is None or not inner.tensors:
        return {"target": "ldm.models.autoencoder.IdentityFirstStage"}, 1 / scale.std[0]
    tensors = dict(inner.tensors)
    if not simple:
        changed = folded(inner.config.autoencoder, tensors, scale)
        state |= {f"{KEPT}{name}": tensors[name] for name in changed}
        tensors |= changed
        notes.append(
            "the scale of the latents is folded into the convolutions around them; the originals are kept "
            "under a name of their own"
        )
    state |= {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}
    if bundle.config.task.name == "inpaint":  # the original holds it twice
        state |= {f"cond_stage_model.{name}": tensor.clone() for name, tensor in tensors.items()}
    return _stage_document(inner.config.autoencoder, interface=True), 1 / scale.std[0] if simple else 1.0


def _unet_document(bundle: DiffusionBundle, s: DiffusionSettings) -> dict[str, Any]:
    channels, height, _ = bundle.latent_shape
    first = bundle.tensors["unet.input_blocks.0.0.weight"]
    params: dict[str, Any] = {
        "image_size": height,
        "in_channels": first.shape[1],
        "out_channels": channels,
        "model_channels": s.channels,
        "attention_resolutions": list(s.attention_resolutions),
        "num_res_blocks": s.num_res_blocks,
        "channel_mult": list(map(int, s.channel_mult)),
        "dropout": s.dropout,
        **({"num_heads": s.num_heads} if s.num_heads else {"num_head_channels": s.head_channels}),
        "use_scale_shift_norm": s.scale_shift,
        "resblock_updown": s.resblock_updown,
    }
    if s.spatial_transformer:
        params |= {
            "use_spatial_transformer": True,
            "transformer_depth": s.transformer_depth,
            "context_dim": bundle.config.condition.context_dim,
            "legacy": False,
        }
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


_MODULES = "ldm.modules.encoders.modules."


def _conditioning(bundle: DiffusionBundle, kind: str, own: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The entries of a LatentDiffusion for its condition."""
    spec = bundle.specs.get(kind, {})
    match kind:
        case "":
            return {"cond_stage_key": "image", "cond_stage_config": "__is_unconditional__"}
        case "class":
            rows = len(bundle.tensors["conditions.entries.class.embedding.weight"])
            own["names"] = list(spec["class_names"])
            params = {"embed_dim": bundle.config.condition.context_dim, "n_classes": rows, "key": "class_label"}
            return _trained("class_label", "crossattn", "ClassEmbedder", params)
        case "text" | "layout":
            key = "caption" if kind == "text" else "coordinates_bbox"
            return _trained(key, "crossattn", "BERTEmbedder", _transformer(bundle, kind, own, notes))
        case "map":
            own["names"], own["void"] = list(spec["names"]), bool(spec.get("void", False))
            params = {"n_stages": spec["stages"], "in_channels": spec["classes"], "out_channels": spec["out_channels"]}
            return _trained("segmentation", "concat", "SpatialRescaler", params)
        case "lowres":
            return {
                "cond_stage_key": "LR_image",
                "conditioning_key": "concat",
                "cond_stage_config": {"target": "torch.nn.Identity"},
            }
    own["fill"] = spec.get("fill", "black")
    return {"cond_stage_key": "masked_image", "conditioning_key": "concat", "cond_stage_config": "__is_first_stage__"}


def _trained(key: str, enters: str, target: str, params: dict[str, Any]) -> dict[str, Any]:
    """The entries for a conditioner that was trained with the UNet."""
    return {
        "cond_stage_key": key,
        "conditioning_key": enters,
        "cond_stage_trainable": True,
        "cond_stage_config": {"target": _MODULES + target, "params": params},
    }


def _transformer(bundle: DiffusionBundle, kind: str, own: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Parameters of the transformer that reads captions or layouts."""
    spec, condition = bundle.specs.get(kind, {}), bundle.config.condition
    own["logits"] = bool(spec.get("logits", False))
    params = {
        "n_embed": condition.context_dim,
        "n_layer": condition.text_layers,
        "vocab_size": spec["vocabulary"],
        "max_seq_len": spec["length"],
    }
    if kind == "layout":
        params["use_tokenizer"] = False
        if spec["categories"] != [str(k) for k in range(spec["vocabulary"] - 1)]:
            own["names"] = list(spec["categories"])
    elif spec["vocabulary"] != 30522:
        notes.append(
            "the original reads captions with the vocabulary of bert-base-uncased; this model has its "
            "own, written beside it"
        )
    return params

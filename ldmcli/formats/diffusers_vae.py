"""AutoencoderKL and VQModel of diffusers <-> our first stage, with the scale of its latents."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmcli.core import files
from ldmcli.core.errors import ModelError, UsageError
from ldmcli.core.settings import AutoencoderConfig, AutoencoderSettings, DataSettings
from ldmcli.formats.bundle import AutoencoderBundle
from ldmcli.formats.diffusers_files import MOST_LAYERS, Config, Names, read_weights, translate, translate_back
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.latent_scale import LatentScale

KL, VQ = "AutoencoderKL", "VQModel"
UNFOLDED = "unfolded.safetensors"
_SHARED: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "sample_size": 32,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "mid_block_add_attention": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    KL: _SHARED
    | {
        "latent_channels": 4,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    },
    VQ: _SHARED
    | {
        "latent_channels": 3,
        "num_vq_embeddings": 256,
        "vq_embed_dim": None,
        "norm_type": "group",
        "lookup_from_codebook": False,
    },
}


def vae_names(settings: AutoencoderSettings) -> Names:
    """Where the parts of our first stage stand in theirs; the decoder's levels are numbered the other way round."""
    names = Names()
    levels = len(settings.channel_mult)

    def residual(ours: str, theirs: str) -> None:
        names.roots[ours] = theirs
        names.roots[f"{ours}.nin_shortcut"] = f"{theirs}.conv_shortcut"

    def attention(ours: str, theirs: str) -> None:
        parts = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        names.roots.update({f"{ours}.{a}": f"{theirs}.{b}" for a, b in parts.items()})
        names.matrices |= {f"{ours}.{a}" for a in parts if a != "norm"}

    for part, ours, theirs, depth in (
        ("encoder", "down", "down_blocks", settings.num_res_blocks),
        ("decoder", "up", "up_blocks", settings.num_res_blocks + 1),
    ):
        for level in range(levels):
            place = f"{part}.{theirs}.{level if part == 'encoder' else levels - 1 - level}"
            for j in range(depth):
                residual(f"{part}.{ours}.{level}.block.{j}", f"{place}.resnets.{j}")
                attention(f"{part}.{ours}.{level}.attn.{j}", f"{place}.attentions.{j}")
            names.roots[f"{part}.{ours}.{level}.{ours}sample"] = f"{place}.{ours}samplers.0"
        residual(f"{part}.mid.block_1", f"{part}.mid_block.resnets.0")
        residual(f"{part}.mid.block_2", f"{part}.mid_block.resnets.1")
        attention(f"{part}.mid.attn_1", f"{part}.mid_block.attentions.0")
        names.roots[f"{part}.norm_out"] = f"{part}.conv_norm_out"
    return names


def _attention_levels(config: Config, widths: list[int]) -> list[bool]:
    known = {
        "down_block_types": {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True},
        "up_block_types": {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True},
    }
    found = {}
    for key, table in known.items():
        types = config[key]
        if not isinstance(types, list) or len(types) != len(widths) or any(name not in table for name in types):
            raise config.refuse(key, f"{len(widths)} of {', '.join(table)} are expected")
        found[key] = [table[name] for name in types]
    if found["down_block_types"] != found["up_block_types"][::-1]:
        raise config.refuse("up_block_types", "attention on the levels of down_block_types, mirrored, is expected")
    return found["down_block_types"]


def read_settings(config: Config, class_name: str) -> AutoencoderSettings:
    """The settings of the network that a configuration describes. Raises ModelError, naming a key that is beyond it."""
    config.only(act_fn=("silu", "swish"))
    if config["out_channels"] != config["in_channels"]:
        raise config.refuse("out_channels", f"as many as in_channels = {config['in_channels']} are expected")
    if class_name == VQ:
        config.only(norm_type=("group",), lookup_from_codebook=(False,))
    widths, groups = config.integers("block_out_channels"), config.integer("norm_num_groups")
    if any(width % groups for width in widths):
        raise config.refuse("norm_num_groups", f"does not divide {widths}")
    attends = _attention_levels(config, widths)
    latent = config.integer("latent_channels")
    codes: dict[str, Any] = {}
    if class_name == VQ:
        codes = {"codebook_size": config.integer("num_vq_embeddings"), "legacy_beta": True}
    embed = config.integer("vq_embed_dim") if class_name == VQ and config["vq_embed_dim"] is not None else latent
    levels = len(widths)
    resolution = config.side("sample_size", 256)[0]
    if resolution % 2 ** (levels - 1):
        resolution = 256
    try:
        return AutoencoderSettings(
            family="paper",
            f=2 ** (levels - 1),
            reg="vq" if class_name == VQ else "kl",
            in_channels=config.integer("in_channels"),
            z_channels=latent,
            embed_dim=embed,
            channels=widths[0],
            channel_mult=tuple(width / widths[0] for width in widths),
            num_res_blocks=config.integer("layers_per_block", MOST_LAYERS),
            attn_resolutions=tuple(resolution // 2**i for i, on in enumerate(attends) if on),
            resolution=resolution,
            mid_attention=bool(config["mid_block_add_attention"]),
            groups=groups,
            **codes,
        )
    except UsageError as error:
        raise ModelError(f"{config.path}: {error}") from error


def read_scale(config: Config, class_name: str, channels: int) -> LatentScale:
    """What the configuration says of the latents' scale: (z - shift) · scaling_factor, or per channel where
    latents_mean and latents_std stand there."""
    factor, shift = config["scaling_factor"], config["shift_factor"] if class_name == KL else None
    for key, value in (("scaling_factor", factor), ("shift_factor", shift or 0.0)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise config.refuse(key, "a number is expected")
    if not 0 < factor < float("inf"):
        raise config.refuse("scaling_factor", "a number above 0 is expected")
    mean, std = (config["latents_mean"], config["latents_std"]) if class_name == KL else (None, None)
    if mean is not None and std is not None:  # (z - mean) · scaling_factor / std, as pipelines that read them do
        if len(mean) != channels or len(std) != channels:
            raise config.refuse("latents_mean", f"{channels} numbers are expected, and as many in latents_std")
        return LatentScale(tuple(map(float, mean)), tuple(float(value) / factor for value in std))
    return LatentScale((float(shift or 0.0),) * channels, (1.0 / factor,) * channels)


def read_vae(folder: Path, values: dict[str, Any], class_name: str) -> AutoencoderBundle:
    """A single-model folder. Raises ModelError."""
    config = Config(folder / "config.json", values, DEFAULTS[class_name])
    settings = read_settings(config, class_name)
    with torch.device("meta"):
        ours = Autoencoder(settings).state_dict()
    notes: list[str] = []
    weights = read_weights(folder, notes=notes)
    for key, layer, width in (
        ("use_quant_conv", "quant_conv", 2 * settings.embed_dim),
        ("use_post_quant_conv", "post_quant_conv", settings.embed_dim),
    ):
        if class_name == KL and config[key] is False:
            weights[f"{layer}.weight"], weights[f"{layer}.bias"] = (
                torch.eye(width)[:, :, None, None],
                torch.zeros(width),
            )
            notes.append(f"{key} = false: {layer} became the identity, which changes nothing")
    weights = {name: value for name, value in weights.items() if not name.startswith("loss.")}
    tensors = translate(vae_names(settings), weights, ours, folder)
    scale = read_scale(config, class_name, settings.embed_dim)
    if (folder / UNFOLDED).is_file():
        tensors, scale = _unfold(folder / UNFOLDED, tensors, scale, settings)
    data = DataSettings(size=config.side("sample_size", 256))
    whole = AutoencoderConfig(autoencoder=settings, data=data)
    return AutoencoderBundle(whole, tensors, scale, notes)


# ---------------------------------------------------------------- writing


def why_not(settings: AutoencoderSettings) -> str:
    """ "" where a stock class computes the same, else the reason for which none does."""
    if settings.family != "paper":
        return f"a first stage of family {settings.family!r}"
    if settings.reg == "kl" and settings.embed_dim != settings.z_channels:
        return f"embed_dim = {settings.embed_dim} beside z_channels = {settings.z_channels}"
    widths = _widths(settings)
    if widths[0] != settings.channels:
        return "a first convolution narrower than the first level"
    if any(width % min(settings.groups, min(widths)) for width in widths):
        return "GroupNorm of different numbers of groups"
    return ""


def _widths(settings: AutoencoderSettings) -> list[int]:
    return [round(settings.channels * mult) for mult in settings.channel_mult]


def why_not_scale(settings: AutoencoderSettings, scale: LatentScale) -> str:
    """ "" where the scale can be written or folded in exactly, else the reason. The nearest entry of a codebook stays
    the nearest under a shift and one factor, but not under a factor a channel."""
    if settings.reg == "vq" and len(set(scale.std)) > 1:
        return "latents of a codebook scaled channel by channel"
    return ""


def write_vae(
    settings: AutoencoderSettings, tensors: dict[str, Tensor], scale: LatentScale, *, side: int, factor_read: bool
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """(config.json, tensors, what was folded away). factor_read: whether the pipeline divides by scaling_factor.

    One number goes into scaling_factor. Means, deviations a channel, and numbers that the pipeline ignores are folded
    into the convolutions around z and the codebook; the original tensors and the scale are the third result, from
    which `read_vae` restores them bit by bit.
    """
    single = not any(scale.mean) and len(set(scale.std)) == 1
    keep = single and (factor_read or scale.std[0] == 1.0)
    written = tensors if keep else {**tensors, **_folded(settings, tensors, scale)}
    kept = (
        {}
        if keep
        else {
            **{name: tensors[name] for name in _folded(settings, tensors, scale)},
            "latent_mean": torch.tensor(scale.mean, dtype=torch.float64),
            "latent_std": torch.tensor(scale.std, dtype=torch.float64),
        }
    )
    config = _stock_config(settings, side, 1.0 / scale.std[0] if keep else 1.0)
    theirs = translate_back(vae_names(settings), written)
    if settings.reg == "kl":
        for key, layer in (("use_quant_conv", "quant_conv"), ("use_post_quant_conv", "post_quant_conv")):
            if _is_identity(theirs[f"{layer}.weight"], theirs[f"{layer}.bias"]):
                config[key] = False
                del theirs[f"{layer}.weight"], theirs[f"{layer}.bias"]
    return config, theirs, kept


def _stock_config(settings: AutoencoderSettings, side: int, scaling_factor: float) -> dict[str, Any]:
    """config.json of the stock class."""
    widths = _widths(settings)
    on = [settings.resolution // 2**i in settings.attn_resolutions for i in range(len(widths))]
    class_name = VQ if settings.reg == "vq" else KL
    config: dict[str, Any] = {
        "_class_name": class_name,
        "_diffusers_version": "0.42.1",
        "act_fn": "silu",
        "sample_size": side,
        "in_channels": settings.in_channels,
        "out_channels": settings.in_channels,
        "block_out_channels": widths,
        "down_block_types": [f"{'Attn' if a else ''}DownEncoderBlock2D" for a in on],
        "up_block_types": [f"{'Attn' if a else ''}UpDecoderBlock2D" for a in reversed(on)],
        "layers_per_block": settings.num_res_blocks,
        "latent_channels": settings.z_channels,
        "norm_num_groups": min(settings.groups, min(widths)),
        "mid_block_add_attention": settings.mid_attention,
        "scaling_factor": scaling_factor,
    }
    if class_name == VQ:
        config |= {
            "num_vq_embeddings": settings.codebook_size,
            "vq_embed_dim": settings.embed_dim,
            "norm_type": "group",
            "lookup_from_codebook": False,
            "force_upcast": False,
        }
    else:
        config |= {
            "shift_factor": None,
            "latents_mean": None,
            "latents_std": None,
            "force_upcast": True,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
        }
    return config


def _is_identity(weight: Tensor, bias: Tensor) -> bool:
    return not bias.any() and torch.equal(weight[:, :, 0, 0], torch.eye(len(weight), dtype=weight.dtype))


def _folded(settings: AutoencoderSettings, tensors: dict[str, Tensor], scale: LatentScale) -> dict[str, Tensor]:
    """The convolutions around z, and the codebook, of a first stage whose latents are normalised by itself."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (scale.mean, scale.std))
    channels = len(mean)
    weight, bias = (tensors[f"quant_conv.{leaf}"].double() for leaf in ("weight", "bias"))
    weight, bias = weight.clone(), bias.clone()
    weight[:channels] /= std[:, None, None, None]
    bias[:channels] = (bias[:channels] - mean) / std
    if settings.reg == "kl":
        bias[channels:] -= 2 * std.log()
    post, post_bias = (tensors[f"post_quant_conv.{leaf}"].double() for leaf in ("weight", "bias"))
    out = {
        "quant_conv.weight": weight,
        "quant_conv.bias": bias,
        "post_quant_conv.weight": post * std[:, None, None],
        "post_quant_conv.bias": post_bias + post[:, :, 0, 0] @ mean,
    }
    if settings.reg == "vq":
        name = "quantize.embedding.weight"
        out[name] = (tensors[name].double() - mean) / std
    return {name: value.to(tensors[name].dtype) for name, value in out.items()}


def _unfold(
    path: Path, tensors: dict[str, Tensor], scale: LatentScale, settings: AutoencoderSettings
) -> tuple[dict[str, Tensor], LatentScale]:
    """The tensors before folding, provided that folding them gives what stands in the folder now."""
    kept, _ = files.load_tensors(path)
    before = LatentScale(*(tuple(kept.pop(name).tolist()) for name in ("latent_mean", "latent_std")))
    restored = {**tensors, **kept}
    again = _folded(settings, restored, before)
    if again.keys() == kept.keys() and all(torch.equal(again[name], tensors[name]) for name in again):
        return restored, before
    return tensors, scale

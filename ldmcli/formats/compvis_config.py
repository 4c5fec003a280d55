"""Configurations of CompVis/latent-diffusion (YAML) as our settings. `target:` texts are looked up, never imported."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ldmcli.core.errors import LdmError, ModelError
from ldmcli.core.presets import MODELS
from ldmcli.core.settings import (
    FACTORS,
    FILLS,
    AutoencoderConfig,
    AutoencoderSettings,
    ConditionSettings,
    DataSettings,
    DiffusionSettings,
    SampleSettings,
    TaskSettings,
)
from ldmcli.formats.compvis_heads import published, with_heads
from ldmcli.formats.compvis_yaml import Section

DEEPEST = 64  # layers, blocks, stages of one kind
CLIP = """
    FrozenCLIPEmbedder FrozenOpenCLIPEmbedder FrozenClipImageEmbedder GeneralConditioner FrozenCLIPTextEmbedder
    FrozenClipMultiTextEmbedder
""".split()
_FIRST_STAGE_KEYS = """
    double_z z_channels resolution in_channels out_ch ch ch_mult num_res_blocks attn_resolutions dropout attn_type
    resamp_with_conv use_linear_attn tanh_out give_pre_end
""".split()
_UNET_KEYS = """
    image_size in_channels model_channels out_channels num_res_blocks dropout attention_resolutions channel_mult
    conv_resample dims num_classes use_checkpoint use_fp16 num_heads num_head_channels num_heads_upsample
    use_scale_shift_norm resblock_updown use_new_attention_order use_spatial_transformer transformer_depth
    context_dim n_embed legacy
""".split()
OWN = "ldm"  # section of a YAML that we wrote: what the original's has no place for


@dataclass(frozen=True)
class FirstStage:
    """A first stage by its configuration; settings None: pixels."""

    settings: AutoencoderSettings | None
    resolution: int = 256


@dataclass(frozen=True)
class Conditioner:
    """The condition of a model: its name as `kind`, "" for none, its spec, and settings beside kinds.

    shared: the conditioner is the first stage, whose weights a checkpoint then holds twice.
    """

    kind: str = ""
    spec: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    shared: bool = False


@dataclass(frozen=True)
class Plan:
    """A diffusion model by its configuration. heads_open: why its head count can be read in two ways, "" where not."""

    diffusion: DiffusionSettings
    in_channels: int
    first_stage: FirstStage
    conditioner: Conditioner
    latent_shape: tuple[int, int, int]
    scale_factor: float = 1.0
    scale_measured: bool = False  # scale_by_std: the file has to hold the number
    context_dim: int | None = None
    own: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------- first stages


def first_stage(section: Section) -> FirstStage:
    """AutoencoderKL, VQModel, VQModelInterface, IdentityFirstStage by a `{target, params}` section."""
    name = section.target()
    if name == "IdentityFirstStage":
        return FirstStage(None)
    if name not in ("AutoencoderKL", "VQModel", "VQModelInterface"):
        raise section.error("target", "a first stage that is not known here")
    params, vq = section.sub("params"), name != "AutoencoderKL"
    params.only(remap=(None,))
    network = params.sub("ddconfig")
    network.known(*_FIRST_STAGE_KEYS)
    network.only(
        double_z=(not vq,),
        attn_type=("vanilla", "none", "vanilla-xformers"),
        resamp_with_conv=(True,),
        use_linear_attn=(False,),
        tanh_out=(False,),
        give_pre_end=(False,),
        out_ch=(network.whole("in_channels", 3),),
    )
    mult = network.wholes("ch_mult", (1, 2, 4, 8))
    f, attends = 2 ** (len(mult) - 1), network.values.get("attn_type", "vanilla") != "none"
    if f not in FACTORS:
        raise network.error("ch_mult", f"1 to {FACTORS[-1].bit_length()} levels are expected")
    resolution = network.whole("resolution", 256)
    settings = AutoencoderSettings(
        family="paper",
        f=f,
        reg="vq" if vq else "kl",
        in_channels=network.whole("in_channels", 3),
        z_channels=network.whole("z_channels"),
        embed_dim=params.whole("embed_dim"),
        codebook_size=params.whole("n_embed") if vq else 1024,
        channels=network.whole("ch"),
        channel_mult=mult,
        num_res_blocks=network.whole("num_res_blocks", most=DEEPEST),
        attn_resolutions=network.wholes("attn_resolutions", ()) if attends else (),
        resolution=resolution,
        mid_attention=attends,
        dropout=network.number("dropout", 0.0),
        legacy_beta=True,
    )
    return FirstStage(settings, resolution)


def autoencoder_config(stage: FirstStage, channels: int = 3, size: int = 0) -> AutoencoderConfig:
    """Our configuration of a first stage. Pixels: the identity on `channels` channels at `size`."""
    settings = stage.settings or AutoencoderSettings(f=1, in_channels=channels)
    side = stage.resolution if stage.settings else size
    return AutoencoderConfig(data=DataSettings(size=(side, side)), autoencoder=settings)


# ---------------------------------------------------------------- conditioners


def _class_embedder(params: Section) -> Conditioner:
    width, classes = params.whole("embed_dim"), params.whole("n_classes", 1000)
    return class_conditioner(classes, width)


def class_conditioner(classes: int, width: int) -> Conditioner:
    """A table of `classes` rows. The last is the null, except in a table of 1,000, all classes of ImageNet."""
    null = classes != 1000 and classes > 1
    names = [str(k) for k in range(classes - null)]
    return Conditioner(
        "class",
        {"class_names": names, "null": null},
        {"context_dim": width, "class_vector": False, "drop": 0.1 if null else 0.0},
    )


def _bert(params: Section) -> Conditioner:
    layout = params.values.get("use_tokenizer", True) is False
    return bert_conditioner(
        layout,
        params.whole("n_embed"),
        params.whole("n_layer", most=DEEPEST),
        params.whole("vocab_size", 30522),
        params.whole("max_seq_len", 77),
    )


def bert_conditioner(layout: bool, width: int, layers: int, vocabulary: int, length: int) -> Conditioner:
    """The text transformer, on captions or on layouts, whose categories a checkpoint knows by number only."""
    settings = {
        "context_dim": width,
        "text_layers": layers,
        "text_length": length,
        "vocabulary_size": vocabulary,
        "text_pooled": False,
        "embedding_std": 0.02,
        "smooth_places": False,
        "layout_planes": 0,
        "drop": 0.0 if layout else 0.1,
    }
    spec: dict[str, Any] = {"length": length, "vocabulary": vocabulary, "logits": True}
    if layout:
        spec["categories"] = [str(k) for k in range(vocabulary - 1)]
    return Conditioner("layout" if layout else "text", spec, settings)


def _rescaler(params: Section) -> Conditioner:
    params.only(method=("bilinear",), multiplier=(0.5,), bias=(False,))
    stages = params.whole("n_stages", 1, most=DEEPEST)
    return map_conditioner(params.whole("in_channels", 3), params.whole("out_channels"), stages)


def map_conditioner(classes: int, planes: int, stages: int) -> Conditioner:
    """Maps of classes, halved `stages` times and mixed."""
    spec = {
        "classes": classes,
        "names": [str(k) for k in range(classes)],
        "out_channels": planes,
        "stages": stages,
        "void": False,
    }
    return Conditioner("map", spec, {"drop": 0.0})


_CONDITIONERS: dict[str, Callable[[Section], Conditioner]] = {
    "ClassEmbedder": _class_embedder,
    "BERTEmbedder": _bert,
    "SpatialRescaler": _rescaler,
}


def conditioner(params: Section) -> Conditioner:
    """The condition that a LatentDiffusion's parameters describe."""
    given, key = params.values.get("cond_stage_config"), params.values.get("conditioning_key")
    if given in ("__is_unconditional__", None):
        return Conditioner()
    if given == "__is_first_stage__":
        if key not in ("concat", None):
            raise params.error("conditioning_key", "the first stage as conditioner goes with concat")
        return Conditioner("masked", shared=True)
    section = params.sub("cond_stage_config")
    name = section.target()
    if name == "Identity":
        return Conditioner("lowres")
    if name in CLIP:
        raise section.error(
            "target",
            "a model that reads CLIP's text is none of latent-diffusion; its first stage can "
            "be had with --part first-stage",
        )
    if name not in _CONDITIONERS:
        raise section.error("target", f"a conditioner that is not known here ({', '.join(_CONDITIONERS)})")
    found = _CONDITIONERS[name](
        section.sub("params") if section.values.get("params") else Section(section.path, f"{section.place}.params", {})
    )
    wanted = "concat" if found.kind == "map" else "crossattn"
    if key not in (wanted, None):
        raise params.error("conditioning_key", f"{name} goes with {wanted}")
    return found


# ---------------------------------------------------------------- UNets and the process


def unet_settings(section: Section) -> tuple[DiffusionSettings, int, int, int | None]:
    """Settings, channels in and out, and context width of a UNetModel, heads as the newest code reads them."""
    if section.target() not in ("UNetModel", ""):
        raise section.error("target", "a network that is not known here")
    params = section.sub("params")
    params.known(*_UNET_KEYS)
    heads = params.values.get("num_heads", -1)
    params.only(
        conv_resample=(True,),
        dims=(2,),
        num_classes=(None,),
        use_new_attention_order=(False,),
        n_embed=(None,),
        num_heads_upsample=(-1, heads),
    )
    wide = params.values.get("num_head_channels", -1)
    transformer = bool(params.values.get("use_spatial_transformer", False))
    if heads == wide == -1:
        raise params.error("num_heads", "neither num_heads nor num_head_channels is given")
    depth = params.values.get("num_res_blocks")
    if not isinstance(depth, int) or not 0 <= depth <= DEEPEST:
        raise params.error("num_res_blocks", "a whole number is expected")
    mult = params.wholes("channel_mult", (1, 2, 4, 8))
    if mult[:1] != (1,):
        raise params.error("channel_mult", "the first entry is 1 in every network that the original code can build")
    settings = DiffusionSettings(
        channels=params.whole("model_channels"),
        channel_mult=mult,
        num_res_blocks=depth,
        attention_resolutions=params.wholes("attention_resolutions"),
        num_heads=params.whole("num_heads") if wide == -1 else 0,
        head_channels=32 if wide == -1 else params.whole("num_head_channels"),
        spatial_transformer=transformer,
        transformer_depth=params.whole("transformer_depth", 1, most=DEEPEST),
        scale_shift=bool(params.values.get("use_scale_shift_norm", False)),
        resblock_updown=bool(params.values.get("resblock_updown", False)),
        dropout=params.number("dropout", 0.0),
        position="none",
    )
    for k in range(len(mult)):
        width = settings.channels * mult[k]
        used = 2**k in settings.attention_resolutions or k == len(mult) - 1
        if used and width % (settings.num_heads or settings.head_channels):
            key = "num_heads" if wide == -1 else "num_head_channels"
            raise params.error(key, f"does not divide a width of {width}")
    context = params.whole("context_dim") if transformer else None
    return settings, params.whole("in_channels"), params.whole("out_channels"), context


def plan(root: Section, heads: str = "") -> Plan | FirstStage:
    """What a configuration describes: a first stage, or a diffusion model. Raises ModelError."""
    model = root.sub("model")
    name = model.target()
    if name in ("AutoencoderKL", "VQModel", "VQModelInterface"):
        return first_stage(model)
    if name not in ("LatentDiffusion", "DDPM"):
        raise model.error("target", "a model that is not known here (LatentDiffusion, DDPM, AutoencoderKL, VQModel)")
    try:
        return _diffusion_plan(model.sub("params"), name, heads, root.values.get(OWN))
    except ModelError:
        raise
    except LdmError as error:  # what our settings say of values that the sections let pass
        raise ModelError(f"{root.path}: {error}") from None


def _diffusion_plan(params: Section, name: str, heads: str, own: Any) -> Plan:
    params.only(
        given_betas=(None,),
        cosine_s=(8e-3,),
        num_timesteps_cond=(None, 1),
        cond_stage_forward=(None,),
        parameterization=("eps", "x0"),
        beta_schedule=("linear", "cosine", "sqrt_linear", "sqrt"),
        loss_type=("l1", "l2"),
    )
    unet = params.sub("unet_config")
    settings, in_channels, out_channels, context_dim = unet_settings(unet)
    given = unet.sub("params").values
    wide = given.get("num_head_channels", -1) != -1
    is_open = settings.spatial_transformer and wide and given.get("legacy", True) is not False
    settings, notes = with_heads(settings, heads, published(settings, in_channels, context_dim), is_open)
    if name == "DDPM":
        stage, condition = FirstStage(None), Conditioner()
    else:
        stage, condition = first_stage(params.sub("first_stage_config")), conditioner(params)
    measured = bool(params.values.get("scale_by_std", False))
    factor = params.number("scale_factor", 1.0)
    settings = replace(
        settings,
        prediction=params.values.get("parameterization", "eps"),
        schedule=params.values.get("beta_schedule", "linear"),
        beta_start=params.number("linear_start", 1e-4),
        beta_end=params.number("linear_end", 2e-2),
        timesteps=params.whole("timesteps", 1000),
        t_sampling="uniform",
        loss=params.values.get("loss_type", "l2"),
        latent_scale="global" if measured or factor != 1 else "none",
    )
    side = params.values.get("image_size", given.get("image_size", 256))
    sides = side if isinstance(side, list) and len(side) == 2 else [side, side]
    if not all(isinstance(n, int) and 0 < n < 2**16 for n in sides):
        raise params.error("image_size", "a number, or a pair of them, is expected")
    return Plan(
        settings,
        in_channels,
        stage,
        condition,
        (out_channels, *sides),
        factor,
        measured,
        context_dim,
        own if isinstance(own, dict) else {},
        tuple(notes),
    )


def task_of(plan: Plan) -> tuple[TaskSettings, dict[str, dict[str, Any]]]:
    """The task, and the specs of all conditions."""
    f, kind = plan.first_stage.settings.f if plan.first_stage.settings else 1, plan.conditioner.kind
    specs = {kind: dict(plan.conditioner.spec)} if kind else {}
    if kind == "lowres":
        scale = f if f in (2, 4, 8) else 4
        specs["lowres"] = {"scale": scale, "f": f}
        return TaskSettings(name="sr", scale=scale, degradation="bsr-light", enlarged=False, tone=0.0), specs
    if kind == "masked":
        fill = plan.own["fill"] if plan.own.get("fill") in FILLS else "black"
        specs["masked"] = {"channels": plan.latent_shape[0], "fill": fill}
        return TaskSettings(name="inpaint", fill=fill), specs
    return TaskSettings(), specs


def condition_of(plan: Plan) -> ConditionSettings:
    """Settings of the condition."""
    kind, settings = plan.conditioner.kind, dict(plan.conditioner.settings)
    kinds = (kind,) if kind in ("class", "text", "layout", "map") else ()
    if plan.context_dim is not None and settings.get("context_dim", plan.context_dim) != plan.context_dim:
        raise ModelError(f"tokens of width {settings['context_dim']} for a network that reads {plan.context_dim}")
    return ConditionSettings(
        **{
            "drop": 0.0,
            "text_pooled": False,
            "class_vector": False,
            "embedding_std": 0.02,
            "smooth_places": False,
            **settings,
            "kinds": kinds,
        }
    )


def sample_of(plan: Plan) -> SampleSettings:
    """How the original samples: DDIM, its timesteps and last level, steps and guidance as published; or as a YAML that
    was written here says."""
    match = published(plan.diffusion, plan.in_channels, plan.context_dim)
    known = (
        {key.partition(".")[2]: value for key, value in MODELS[match[0]].values.items() if key.startswith("sample.")}
        if match
        else {}
    )
    guided = {"text": 5.0, "class": 3.0}.get(plan.conditioner.kind, 1.0)
    guided = guided if plan.conditioner.settings.get("drop") else 1.0
    found = {
        "sampler": "ddim",
        "spacing": "original",
        "eta": known.get("eta", 0.0),
        "steps": min(known.get("steps", 50), plan.diffusion.timesteps),
        "guidance": known.get("guidance", guided) if guided != 1 else 1.0,
    }
    own = plan.own.get("sample")
    if isinstance(own, dict):
        found |= {
            key: type(value)(own[key])
            for key, value in found.items()
            if isinstance(own.get(key), (int, float)) == isinstance(value, (int, float)) and key in own
        }
    return SampleSettings(**found)

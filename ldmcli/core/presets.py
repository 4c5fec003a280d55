"""Named settings: the published first stages and diffusion models, the paper's way of training, small defaults.

Sources: configs and model zoo of CompVis/latent-diffusion (a506df5), Tab. 8 and 12-17 of Rombach et al. 2022. A preset
is data only; it is read before torch is loaded. Facts of a model that are no settings stand in `extra`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

AE_BASE_LR = 4.5e-6  # per sample of the batch
VALUE = Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings by dotted name, and what is published of the model: shapes, parameter and tensor counts, quality.

    kind: "autoencoder" or "diffusion". summary: one line. extra keys are those of `_first_stage` and `_model`; of our
    own models "first_stage" alone, the preset that a plan takes where no autoencoder is named.
    """

    kind: str
    summary: str
    values: Mapping[str, VALUE]
    extra: Mapping[str, VALUE] = field(default_factory=dict)


PAPER_AE: dict[str, VALUE] = {
    "autoencoder.family": "paper",
    "autoencoder.channels": 128,
    "autoencoder.num_res_blocks": 2,
    "autoencoder.resolution": 256,
    "autoencoder.legacy_beta": True,
    "autoencoder.revive_codes": 0,
    "loss.style": "paper",
    "loss.l1": 1.0,
    "loss.l2": 0.0,
    "loss.edge": 0.0,
    "loss.perceptual_weight": 1.0,
    "loss.kl_weight": 1e-6,
    "loss.codebook_weight": 1.0,
    "loss.gan": "hinge",
    "loss.disc_channels": 64,
    "loss.adaptive_weight": True,
    "train.optimizer": "adamw",
    "train.betas": (0.5, 0.9),
    "train.weight_decay": 0.0,
    "train.warmup": 0,
    "train.cooldown": 0.0,
    "train.clip": 0.0,
    "train.ema": False,
}

# Crops of 256 px from pictures whose short side is 384 px, as the released configurations of most first stages and of
# landscapes have it; those of vq-f4 and vq-f4-noattn name no size to scale to.
CUT_OF_384: dict[str, VALUE] = {"data.crop_min": 0.6667, "data.crop_max": 0.6667}

PAPER_LDM: dict[str, VALUE] = {
    "diffusion.scale_shift": False,
    "diffusion.position": "none",
    "diffusion.prediction": "eps",
    "diffusion.schedule": "linear",
    "diffusion.beta_start": 0.0015,
    "diffusion.beta_end": 0.0195,
    "diffusion.timesteps": 1000,
    "diffusion.t_sampling": "uniform",
    "diffusion.loss": "l2",
    "diffusion.loss_weight": "uniform",
    "diffusion.latent_scale": "global",
    "task.enlarged": False,
    "task.tone": 0.0,
    "task.fill": "black",
    "condition.text_pooled": False,
    "condition.embedding_std": 0.02,
    "condition.layout_planes": 0,
    "condition.smooth_places": False,
    "condition.class_vector": False,
    "train.optimizer": "adamw",
    "train.lr": 1e-4,
    "train.betas": (0.9, 0.999),
    "train.weight_decay": 0.01,
    "train.warmup": 0,
    "train.cooldown": 0.0,
    "train.clip": 0.0,
    "train.ema": True,
    "train.ema_decay": 0.9999,
    "train.ema_scope": "unet",
    "sample.sampler": "ddim",
    "sample.steps": 50,
    "sample.eta": 0.0,
    "sample.spacing": "original",
}

# In the published models every width is a multiple of 32, and there are two residual blocks a level.
PUBLISHED_LDM: dict[str, VALUE] = PAPER_LDM | {
    "data.size": (256, 256),
    "diffusion.num_res_blocks": 2,
    "diffusion.spatial_transformer": False,
    "diffusion.num_heads": 0,
    "diffusion.head_channels": 32,
    "diffusion.latent_scale": "none",
    "condition.drop": 0.0,
    "sample.guidance": 1.0,
}


def _first_stage(
    name: str,
    channels: int,
    mult: tuple[int, ...],
    attention: tuple[int, ...] = (),
    *,
    batch: int,
    steps: int,
    gan: tuple[int, float, int] = (50_001, 0.5, 3),
    codes: int = 0,
    published: Mapping[str, VALUE] | None = None,
    **more: VALUE,
) -> Preset:
    """A first stage. gan: (first step, weight, layers) of the discriminator; codes: codebook size, 0 = KL.

    extra: parameters, tensors and quality (rfid, psnr) as published, or {"assumed": what the paper leaves open}.
    """
    f, reg = 2 ** (len(mult) - 1), "vq" if codes else "kl"
    values = PAPER_AE | {
        "data.size": (256, 256),
        "data.crop": "random",
        **CUT_OF_384,
        "autoencoder.f": f,
        "autoencoder.reg": reg,
        "autoencoder.z_channels": channels,
        "autoencoder.embed_dim": channels,
        "autoencoder.channel_mult": mult,
        "autoencoder.attn_resolutions": attention,
        "autoencoder.mid_attention": True,
        "loss.disc_start": gan[0],
        "loss.disc_weight": gan[1],
        "loss.disc_layers": gan[2],
        "train.batch_size": batch,
        "train.lr": AE_BASE_LR * batch,
        "train.steps": steps,
        **more,
    }
    if codes:
        values["autoencoder.codebook_size"] = codes
    middle = "" if values["autoencoder.mid_attention"] else ", no attention"
    what = f"codebook of {codes}" if codes else "KL"
    summary = f"{name}: f = {f}, {channels} channels, {what}{middle}" + ("" if published else " (Tab. 8, unpublished)")
    return Preset(kind="autoencoder", summary=summary, values=values, extra=published or {"assumed": ASSUMED})


ASSUMED = "levels, discriminator, batch and steps: the paper's tables do not give them"
NOATTN: dict[str, Any] = {"autoencoder.mid_attention": False}


def _counts(parameters: int, tensors: int, rfid: float, psnr: float) -> dict[str, VALUE]:
    return {"parameters": parameters, "tensors": tensors, "rfid": rfid, "psnr": psnr}


F4, F8, F16, F32 = (1, 2, 4), (1, 2, 2, 4), (1, 1, 2, 2, 4), (1, 1, 2, 2, 4, 4)
LATE = (250_001, 0.75, 3)

# fmt: off
FIRST_STAGES: dict[str, Preset] = {
    "kl-f4": _first_stage("kl-f4", 3, F4, batch=10, steps=176_991,
                          published=_counts(55_312_063, 204, 0.27, 27.53)),
    "kl-f8": _first_stage("kl-f8", 4, (1, 2, 4, 4), batch=4, steps=246_803,
                          published=_counts(83_653_863, 248, 0.90, 24.19)),
    "kl-f16": _first_stage("kl-f16", 16, F16, (16,), batch=6, steps=442_998,
                           published=_counts(69_610_963, 342, 0.87, 24.08)),
    "kl-f32": _first_stage("kl-f32", 64, F32, (16, 8), batch=6, steps=406_763,
                           published=_counts(103_880_131, 436, 2.04, 22.27)),
    "vq-f4": _first_stage("vq-f4", 3, F4, batch=8, steps=533_066, gan=(0, 0.75, 3), codes=8192,
                          published=_counts(55_322_782, 205, 0.58, 27.43)),
    "vq-f4-noattn": _first_stage("vq-f4-noattn", 3, F4, batch=8, steps=658_131, gan=(11, 0.75, 3), codes=8192,
                                 published=_counts(53_219_486, 185, 1.06, 25.21), **NOATTN),
    "vq-f8": _first_stage("vq-f8", 4, F8, (32,), batch=10, steps=971_043, gan=(1, 0.6, 2), codes=16384,
                          published=_counts(67_717_295, 299, 1.14, 23.07)),
    "vq-f8-n256": _first_stage("vq-f8-n256", 4, F8, (32,), batch=10, steps=1_608_649, gan=LATE, codes=256,
                               published=_counts(67_652_783, 299, 1.49, 22.35)),
    "vq-f16": _first_stage("vq-f16", 8, F16, (16,), batch=14, steps=1_101_166, gan=(250_001, 0.75, 2), codes=16384,
                           published=_counts(69_593_371, 343, 5.15, 20.83)),
    "kl-f2": _first_stage("kl-f2", 2, (1, 2), batch=4, steps=176_991),
    "kl-f16-c8": _first_stage("kl-f16-c8", 8, F16, (16,), batch=6, steps=442_998),
    "kl-f32-c16": _first_stage("kl-f32-c16", 16, F32, (16, 8), batch=6, steps=406_763),
    "vq-f2": _first_stage("vq-f2", 2, (1, 2), batch=4, steps=533_066, gan=LATE, codes=2048),
    "vq-f2-n64": _first_stage("vq-f2-n64", 2, (1, 2), batch=4, steps=533_066, gan=LATE, codes=64),
    "vq-f4-n256": _first_stage("vq-f4-n256", 3, F4, batch=8, steps=533_066, gan=LATE, codes=256),
    "vq-f32": _first_stage("vq-f32", 16, F32, (16, 8), batch=14, steps=1_101_166, gan=LATE, codes=16384),
}
# fmt: on


@dataclass(frozen=True)
class _Shape:
    """What a published UNet is and reads: counts, its first stage and latent, planes beside z, width of tokens."""

    parameters: int
    tensors: int
    first_stage: str
    latent: tuple[int, int, int]
    planes: int = 0
    context_dim: int | None = None


def _model(
    summary: str,
    shape: _Shape,
    unet: tuple[int, tuple[int, ...], tuple[int, ...]],
    train: tuple[float, int, int],
    *,
    conditioner: Mapping[str, VALUE] | None = None,
    scale_factor: float = 1.0,
    **more: VALUE,
) -> Preset:
    """A published model. unet: (channels, multipliers, attention factors); train: (lr, batch, steps).

    `more` holds settings as section__name. extra: in_channels, out_channels, latent (c, h, w), context_dim,
    first_stage, conditioner (kind and its shape and counts, or None), scale_factor, parameters, tensors.
    """
    values = PUBLISHED_LDM | {
        "diffusion.channels": unet[0],
        "diffusion.channel_mult": unet[1],
        "diffusion.attention_resolutions": unet[2],
        "diffusion.spatial_transformer": shape.context_dim is not None,
        "train.lr": train[0],
        "train.batch_size": train[1],
        "train.steps": train[2],
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    if conditioner is not None:
        values["condition.kinds"] = (conditioner["kind"],)
    if shape.context_dim is not None:
        values["condition.context_dim"] = shape.context_dim
    channels = shape.latent[0]
    extra = {
        "in_channels": channels + shape.planes,
        "out_channels": channels,
        "latent": shape.latent,
        "context_dim": shape.context_dim,
        "first_stage": shape.first_stage,
        "conditioner": conditioner,
        "scale_factor": scale_factor,
        "parameters": shape.parameters,
        "tensors": shape.tensors,
    }
    return Preset(kind="diffusion", summary=summary, values=values, extra=extra)


def _classes(classes: int, width: int) -> dict[str, VALUE]:
    return {"kind": "class", "classes": classes, "width": width, "parameters": classes * width, "tensors": 1}


def _text(vocabulary: int, layers: int, width: int, length: int, parameters: int) -> dict[str, VALUE]:
    """The text transformer, its head included: 13 tensors a layer and 6."""
    return {
        "kind": "text",
        "vocabulary": vocabulary,
        "layers": layers,
        "width": width,
        "length": length,
        "parameters": parameters,
        "tensors": 13 * layers + 6,
    }


Z4, Z8 = (3, 64, 64), (4, 32, 32)
UNCONDITIONAL = _Shape(274_056_163, 368, "vq-f4", Z4)
UNCONDITIONAL_UNET = (224, (1, 2, 3, 4), (8, 4, 2))
TEXT_SETTINGS: dict[str, Any] = {
    "condition__text_layers": 32,
    "condition__text_length": 77,
    "condition__vocabulary": "bert-base-uncased",
    "condition__vocabulary_size": 30522,
    "condition__drop": 0.1,
}
# The published code drops no condition; the models meant for guidance get the 0.1 that is usual elsewhere.

# One head in cin256, text2img256 and layout2img: their weights come from code that ignored the configured head width.
# Eight heads in semantic_synthesis256 as in the code; the paper's table says one.
# fmt: off
MODELS: dict[str, Preset] = {
    "celeba256": _model("faces of CelebA-HQ, unconditional", UNCONDITIONAL, UNCONDITIONAL_UNET,
                        (9.6e-5, 48, 410_000), sample__steps=200),
    "ffhq256": _model("faces of FFHQ, unconditional", UNCONDITIONAL, UNCONDITIONAL_UNET,
                      (8.4e-5, 42, 635_000), sample__steps=200, sample__eta=1.0),
    "lsun_beds256": _model("LSUN bedrooms, unconditional", UNCONDITIONAL, UNCONDITIONAL_UNET,
                           (9.6e-5, 48, 1_900_000), sample__steps=200, sample__eta=1.0, data__flip=True),
    "lsun_churches256": _model(
        "LSUN churches, unconditional, KL latents scaled by their deviation",
        _Shape(294_966_916, 520, "kl-f8", Z8), (192, (1, 2, 2, 4, 4), (1, 2, 4, 8)), (5e-5, 96, 500_000),
        diffusion__num_heads=8, diffusion__scale_shift=True, diffusion__resblock_updown=True, diffusion__loss="l1",
        diffusion__beta_end=0.0155, diffusion__latent_scale="global", train__warmup=10_000, data__flip=True,
        sample__steps=200),
    "cin256": _model(
        "ImageNet classes, LDM-8", _Shape(394_984_196, 626, "vq-f8", Z8, context_dim=512),
        (256, (1, 2, 4), (4, 2, 1)), (6.4e-5, 64, 2_900_000), conditioner=_classes(1000, 512),
        diffusion__num_heads=1, data__crop="random", sample__steps=200),
    "cin256-v2": _model(
        "ImageNet classes, LDM-4, with a null class for guidance",
        _Shape(400_920_579, 688, "vq-f4", Z4, context_dim=512), (192, (1, 2, 3, 5), (8, 4, 2)),
        (1e-4, 1200, 178_000), conditioner=_classes(1001, 512), diffusion__num_heads=1,
        condition__drop=0.1, data__crop="random", sample__steps=20,
        sample__guidance=3.0),
    "text2img256": _model(
        "captions (LAION, then Conceptual Captions), LDM-4",
        _Shape(403_623_939, 688, "vq-f4", Z4, context_dim=640), (192, (1, 2, 3, 5), (8, 4, 2)),
        (5.6e-5, 28, 390_000), conditioner=_text(30522, 32, 640, 77, 186_154_682), diffusion__num_heads=1,
        sample__steps=100, sample__guidance=5.0, **TEXT_SETTINGS),
    "txt2img-1p4B": _model(
        "captions of LAION-400M, LDM-8, 1.45 billion parameters with its text transformer",
        _Shape(872_300_484, 686, "kl-f8", Z8, context_dim=1280), (320, (1, 2, 4, 4), (4, 2, 1)),
        (1e-4, 680, 390_000), conditioner=_text(30522, 32, 1280, 77, 581_994_042), scale_factor=0.18215,
        diffusion__num_heads=8, diffusion__beta_start=0.00085, diffusion__beta_end=0.012,
        diffusion__latent_scale="global", sample__steps=50, sample__guidance=5.0, **TEXT_SETTINGS),
    "layout2img-openimages256": _model(
        "boxes of OpenImages", _Shape(246_277_379, 1328, "vq-f4", Z4, context_dim=512),
        (128, (1, 2, 3, 4), (8, 4, 2)), (4.8e-5, 24, 4_400_000),
        conditioner=_text(8192, 16, 512, 92, 58_858_496) | {"kind": "layout"}, diffusion__num_heads=1,
        diffusion__transformer_depth=3, diffusion__loss="l1", diffusion__beta_end=0.0205,
        condition__text_layers=16, condition__crop_tokens=True, sample__steps=200,
        data__crop="random", data__crop_min=0.375, data__min_objects=2, data__max_objects=30,
        data__min_box_area=1e-4),
    "semantic_synthesis256": _model(
        "maps of 182 classes to landscapes", _Shape(215_229_315, 216, "vq-f4", Z4, planes=3),
        (128, (1, 4, 8), (32, 16, 8)), (4.8e-5, 48, 360_000),
        conditioner={"kind": "map", "in_channels": 182, "out_channels": 3, "stages": 2, "parameters": 546,
                     "tensors": 1},
        diffusion__num_heads=8, diffusion__loss="l1", diffusion__beta_end=0.0205,
        sample__steps=200, data__crop="random", **CUT_OF_384),
    "inpainting_big": _model(
        "fills holes in photographs of Places", _Shape(387_245_827, 416, "vq-f4-noattn", Z4, planes=4),
        (256, (1, 2, 3, 4), (8, 4, 2)), (1e-6, 128, 360_000), task__name="inpaint", diffusion__num_heads=8,
        diffusion__resblock_updown=True, diffusion__loss="l1", diffusion__beta_end=0.0205, data__crop="random",
        task__masks="lama-thick", sample__steps=50),
    "bsr_sr": _model(
        "four times as many pixels, from degraded photographs", _Shape(113_622_563, 306, "vq-f4", Z4, planes=3),
        (160, (1, 2, 2, 4), (16, 8)), (6.4e-5, 64, 860_000), task__name="sr", task__scale=4,
        task__degradation="bsr-light", diffusion__beta_end=0.0155,
        data__crop="random", data__crop_min=0.5, data__resize="box", sample__steps=100, sample__eta=1.0),
}
# fmt: on

# Sizes for GPUs, where nobody has tried them. Muon steps by orthogonal matrices, whose rate is the same at any width.
_OWN_TRAINING: dict[str, VALUE] = {"train.optimizer": "muon", "train.cooldown": 0.2}
_OWN_UNET = _OWN_TRAINING | {"diffusion.num_res_blocks": 2, "diffusion.head_channels": 64, "sample.steps": 20}

OWN: dict[str, Preset] = {
    "paper-ae": Preset(
        kind="autoencoder",
        summary="the paper's network and losses at any size: perceptual and adversarial terms, Adam",
        values=PAPER_AE
        | {
            "autoencoder.channel_mult": F4,
            "loss.disc_weight": 0.5,
            "loss.disc_start": 50_001,
            "autoencoder.z_channels": 3,
            "autoencoder.embed_dim": 3,
            "train.batch_size": 12,
            "train.lr": AE_BASE_LR * 12,
        },
    ),
    "paper": Preset(
        kind="diffusion",
        summary="the paper's way of training and sampling at any size: ε, its schedule, AdamW 1e-4, DDIM 50",
        values=PAPER_LDM,
    ),
    "small-ae": Preset(
        kind="autoencoder",
        summary="0.9 million parameters for 64 px on a CPU: L1, L2 and edges, Muon, no GAN",
        values={
            "loss.l2": 1.0,
            "loss.edge": 0.5,
            "train.optimizer": "muon",
            "train.lr": 0.02,
            "train.cooldown": 0.4,
            "train.batch_size": 32,
        },
    ),
    "base-ae": Preset(
        kind="autoencoder",
        summary="15 million parameters for 256 px on a GPU: f = 8, 16 channels, L1, L2 and edges, Muon, no GAN",
        values=_OWN_TRAINING
        | {
            "data.size": (256, 256),
            "autoencoder.f": 8,
            "autoencoder.embed_dim": 16,
            "autoencoder.channels": 128,
            "autoencoder.channel_mult": (1, 2, 3),
            "autoencoder.num_res_blocks": 3,
            "train.lr": 0.01,
            "train.clip": 2.0,
            "train.batch_size": 64,
            "train.steps": 50_000,
        },
    ),
    "small": Preset(
        kind="diffusion",
        summary="a UNet of 7 million parameters for latents of 16x16 on a CPU: rectified flow, Muon",
        values={
            "train.optimizer": "muon",
            "train.lr": 0.01,
            "train.muon_every": 2,
            "train.cooldown": 0.4,
            "train.batch_size": 32,
        },
    ),
    "base": Preset(
        kind="diffusion",
        summary="a UNet of 67 million parameters for latents of 16x16 to 32x32 on a GPU: as small, wider",
        values=_OWN_UNET
        | {
            "diffusion.channels": 128,
            "diffusion.channel_mult": (1.0, 2.0, 3.0),
            "condition.context_dim": 256,
            "condition.text_layers": 4,
            "train.lr": 0.01,
            "train.adam_lr": 5e-4,
            "train.warmup": 500,
            "train.batch_size": 256,
            "train.steps": 100_000,
        },
        extra={"first_stage": "base-ae"},
    ),
    "large": Preset(
        kind="diffusion",
        summary="a UNet of 312 million parameters, 395 with its text transformer, for latents of 32x32 on GPUs",
        values=_OWN_UNET
        | {
            "diffusion.channels": 224,
            "diffusion.channel_mult": (1.0, 2.0, 4.0),
            "condition.context_dim": 768,
            "condition.text_layers": 12,
            "train.lr": 0.005,
            "train.adam_lr": 3e-4,
            "train.warmup": 1000,
            "train.batch_size": 512,
            "train.steps": 300_000,
        },
        extra={"first_stage": "base-ae"},
    ),
}

PRESETS: dict[str, Preset] = OWN | FIRST_STAGES | MODELS

"""diffusers folders <-> bundles: single models, the three pipelines of latent diffusion, and our own custom pipeline.

diffusers is never imported. What our networks cannot express is refused with the name of the key.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmcli.core import files
from ldmcli.core.errors import ModelError, UsageError
from ldmcli.core.settings import (
    AutoencoderSettings,
    ConditionSettings,
    DataSettings,
    DiffusionConfig,
    DiffusionSettings,
    SampleSettings,
    TaskSettings,
)
from ldmcli.formats import diffusers_custom as custom
from ldmcli.formats import diffusers_text as text
from ldmcli.formats import diffusers_unet as unets
from ldmcli.formats import diffusers_unet_write, schedulers
from ldmcli.formats import diffusers_vae as vaes
from ldmcli.formats.bundle import AutoencoderBundle, DiffusionBundle
from ldmcli.formats.diffusers_card import write_card
from ldmcli.formats.diffusers_files import Config, read_config, read_weights, translate, write_model
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.networks.latent_scale import LatentScale

LATENT, TEXT, UPSCALE = "LDMPipeline", "LDMTextToImagePipeline", "LDMSuperResolutionPipeline"
PIXELS = ("DDPMPipeline", "DDIMPipeline")
TEXT_LENGTH = 77  # the text pipeline's, whatever the model
VERSION = "0.42.1"
# Of all LDM pipelines; the classes' own defaults are wrong for these models in five places.
PAPER_SAMPLING = SampleSettings(sampler="ddim", steps=50, guidance=1.0, eta=0.0, spacing="leading+1/first")


def read(path: str | Path) -> AutoencoderBundle | DiffusionBundle:
    """A folder as a bundle. Pipelines of other models give their first stage alone, and a note that says so.

    Raises ModelError for missing, unknown or misshapen weights (with a list), for what our networks cannot express
    (with the key), and for folders that are none of diffusers.
    """
    path = Path(path)
    try:
        return _read(path)
    except (TypeError, AttributeError, KeyError, OverflowError, ValueError, IndexError) as error:
        # values of a kind that no class writes, wherever they are first used
        raise ModelError(f"{path}: configurations of another form than diffusers writes ({error})") from error


def _read(path: Path) -> AutoencoderBundle | DiffusionBundle:
    if (path / "model_index.json").is_file():
        return _read_pipeline(path, read_config(path / "model_index.json"))
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: not a diffusers folder (neither model_index.json nor config.json in it)")
    values = read_config(path / "config.json")
    class_name = values.get("_class_name")
    if class_name in vaes.DEFAULTS:
        return vaes.read_vae(path, values, class_name)
    if class_name in unets.DEFAULTS:
        return _bundle(path, path, values, None)
    known = ", ".join([*vaes.DEFAULTS, *unets.DEFAULTS])
    raise ModelError(f"{path}: a model of class {class_name}; {known} and pipelines of latent diffusion are read")


def _read_pipeline(path: Path, index: dict[str, Any]) -> AutoencoderBundle | DiffusionBundle:
    class_name = index.get("_class_name")
    if isinstance(class_name, list) and custom.PIPELINE in class_name:
        return _read_custom(path, index)
    stage = next((name for name in ("vqvae", "vae") if _class_of(index, name) in vaes.DEFAULTS), None)
    if class_name not in (LATENT, TEXT, UPSCALE, *PIXELS):
        if stage is None:
            raise ModelError(
                f"{path}: a {class_name} without a first stage of latent diffusion; nothing in it can be used"
            )
        found = _read_vae(path / stage)
        found.notes.insert(0, f"of this {class_name} only the first stage ({stage}/) is taken")
        return found
    autoencoder = None
    if class_name not in PIXELS:
        if stage is None:
            raise ModelError(f"{path}: model_index.json names no first stage ({', '.join(vaes.DEFAULTS)})")
        autoencoder = _read_vae(path / stage)
    return _bundle(path, path / "unet", read_config(path / "unet" / "config.json"), autoencoder, str(class_name))


def _class_of(index: dict[str, Any], name: str) -> str | None:
    entry = index.get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else None


def _read_vae(folder: Path) -> AutoencoderBundle:
    values = read_config(folder / "config.json")
    class_name = values.get("_class_name")
    if class_name not in vaes.DEFAULTS:
        raise ModelError(f"{folder}: a first stage of class {class_name}; {' and '.join(vaes.DEFAULTS)} are read")
    return vaes.read_vae(folder, values, class_name)


def _bundle(
    path: Path, folder: Path, values: dict[str, Any], autoencoder: AutoencoderBundle | None, pipeline: str = ""
) -> DiffusionBundle:
    """A UNet with what stands around it."""
    class_name = values.get("_class_name")
    if class_name not in unets.DEFAULTS:
        raise ModelError(f"{folder}: a network of class {class_name}; {' and '.join(unets.DEFAULTS)} are read")
    config = Config(folder / "config.json", values, unets.DEFAULTS[class_name])
    read: list[str] = []
    settings, own, table = unets.read_unet(config, class_name, read_weights(folder, notes=read))
    tensors = {f"unet.{name}": tensor for name, tensor in own.items()}
    channels, height, width = config.integer("out_channels"), *config.side("sample_size", 32)
    planes = config.integer("in_channels") - channels
    condition: dict[str, Any] = {"context_dim": 4 * settings.channels, "drop": 0.0, "text_pooled": False}
    task, tokenizer = TaskSettings(), None
    specs: dict[str, dict[str, Any]] = {}
    sample, notes = PAPER_SAMPLING, [*(autoencoder.notes if autoencoder else []), *read]
    f = autoencoder.config.autoencoder.f if autoencoder else 1
    if planes:
        task, specs = _planes(config, planes, channels, f if autoencoder else 4, notes)
    if class_name == unets.CROSS:
        condition["context_dim"] = config.integer("cross_attention_dim")
        if table is not None:
            raise config.refuse("num_class_embeds", "beside cross-attention it cannot be expressed")
        if pipeline == TEXT:
            condition["kinds"], sample = ("text",), replace(sample, guidance=5.0)
            encoder = path / "bert"
            more, specs["text"], weights = text.read_text(encoder, read_config(encoder / "config.json"))
            if more["context_dim"] != condition["context_dim"]:
                raise config.refuse("cross_attention_dim", f"the text encoder's width is {more['context_dim']}")
            condition |= more | {"drop": 0.1, "vocabulary_size": specs["text"]["vocabulary"]}
            tensors |= {f"conditions.entries.text.encoder.{name}": tensor for name, tensor in weights.items()}
            tokenizer = _tokenizer(path / "tokenizer", notes)
        else:
            condition["kinds"], specs["tokens"] = ("tokens",), {}
            notes.append("no text encoder is read with this network; its tokens are given from Python (context=)")
    if table is not None:
        condition |= {"kinds": ("class",), "class_vector": True}
        specs["class"] = {"class_names": [str(k) for k in range(len(table))], "null": False}
        tensors |= _class_tensors(table)
    settings, sample = _scheduled(path, settings, sample, notes)
    if pipeline == UPSCALE and autoencoder:
        if autoencoder.scale != LatentScale.identity(channels):
            notes.append("scaling_factor of the first stage is left out, as LDMSuperResolutionPipeline does")
        autoencoder.scale = LatentScale.identity(channels)
    scale = autoencoder.scale if autoencoder and autoencoder.scale else LatentScale.identity(channels)
    whole = DiffusionConfig(
        data=DataSettings(size=(height * f, width * f)),
        diffusion=settings,
        condition=ConditionSettings(**condition),
        task=task,
        sample=sample,
    )
    if autoencoder and autoencoder.config.autoencoder.embed_dim != channels:
        raise config.refuse("out_channels", f"latents have {autoencoder.config.autoencoder.embed_dim} channels")
    return DiffusionBundle(whole, tensors, autoencoder, scale, (channels, height, width), specs, tokenizer, notes)


def _class_tensors(table: Tensor) -> dict[str, Tensor]:
    """A class table that is added to the time embedding as it is."""
    width, prefix = table.shape[1], "conditions.entries.class"
    return {
        f"{prefix}.embedding.weight": table,
        f"{prefix}.vector.weight": torch.eye(width),
        f"{prefix}.vector.bias": torch.zeros(width),
    }


def _planes(
    config: Config, planes: int, channels: int, f: int, notes: list[str]
) -> tuple[TaskSettings, dict[str, dict[str, Any]]]:
    """What the input's planes beside the latent are: three are a small picture, as in LDMSuperResolutionPipeline."""
    if planes == 3 and f in (2, 4, 8):
        return TaskSettings(name="sr", scale=f, enlarged=False, tone=0.0), {"lowres": {"scale": f, "f": f}}
    if planes == channels + 1:
        notes.append(f"in_channels = {channels + planes}: taken as [latent, latent of the masked image, mask]")
        return TaskSettings(name="inpaint", fill="black"), {"masked": {"channels": channels}}
    raise config.refuse("in_channels", f"{planes} planes beside {channels} latent channels: it is not known which")


def _scheduled(
    path: Path, settings: DiffusionSettings, sample: SampleSettings, notes: list[str]
) -> tuple[DiffusionSettings, SampleSettings]:
    file = path / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        notes.append("no scheduler beside the network: noise schedule and sampling of the paper's models are assumed")
        return replace(settings, prediction="eps", t_sampling="uniform"), sample
    process, chosen, more = schedulers.read_scheduler(file, read_config(file), settings, sample)
    notes += more
    return process, chosen


def _tokenizer(folder: Path, notes: list[str]) -> Path | None:
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        return folder
    notes.append("no tokenizer/ with tokenizer.json or vocab.txt: token ids have to be given")
    return None


def _read_custom(path: Path, index: dict[str, Any]) -> DiffusionBundle:
    """What `write` made for models without a stock pipeline: the own part, with unet/ and vqvae/ put back in."""
    bundle, described = custom.read_component(path)
    stage = bundle.autoencoder.config.autoencoder if bundle.autoencoder else None
    if not described["own_autoencoder"] and _class_of(index, "vqvae"):
        bundle.autoencoder = _read_vae(path / "vqvae")
        bundle.autoencoder.scale, stage = bundle.scale, bundle.autoencoder.config.autoencoder
    if not described["own_unet"]:
        values = read_config(path / "unet" / "config.json")
        class_name = values.get("_class_name")
        if class_name not in unets.DEFAULTS:
            raise ModelError(f"{path}/unet: a network of class {class_name}; {' and '.join(unets.DEFAULTS)} are read")
        names = unets.unet_names(bundle.config.diffusion)
        with torch.device("meta"):
            shapes = _model_of(bundle).unet.state_dict()
        own = translate(names, read_weights(path / "unet"), shapes, path / "unet")
        bundle.tensors |= {f"unet.{name}": tensor for name, tensor in own.items()}
    if (path / "tokenizer").is_dir():
        bundle.tokenizer = _tokenizer(path / "tokenizer", bundle.notes)
    f = stage.f if stage else 1
    size = (bundle.latent_shape[1] * f, bundle.latent_shape[2] * f)
    bundle.config = replace(bundle.config, data=replace(bundle.config.data, size=size))
    return bundle


def _model_of(bundle: DiffusionBundle):
    return DiffusionModel(
        bundle.config.diffusion, bundle.config.condition, bundle.specs, None, bundle.latent_shape, bundle.config.kinds
    )


# ---------------------------------------------------------------- writing


def write(bundle: AutoencoderBundle | DiffusionBundle, path: str | Path, run: Path | None = None) -> list[str]:
    """Writes a folder that diffusers loads; returns lines on what it is and why. run: a run folder, whose metrics,
    protocol and sample grid go into the model card.

    Raises ModelError, naming the reason, for models that neither a stock class nor a custom pipeline can hold, and
    UsageError where something lies at `path`.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path}: exists already; choose another folder or remove it")
    if isinstance(bundle, AutoencoderBundle):
        return _write_stage_alone(bundle, path, run)
    if _single(bundle):
        parts = _unet_parts(bundle)
        write_model(path, *parts)
        lines = [f"one network of class {parts[0]['_class_name']}: its condition has no pipeline"]
        write_card(path, bundle, lines, run)
        return lines
    reason = _why_not_stock(bundle)
    lines = _write_custom(bundle, path, reason) if reason else _write_stock(bundle, path)
    write_card(path, bundle, lines, run)
    return lines


def _write_stage_alone(bundle: AutoencoderBundle, path: Path, run: Path | None) -> list[str]:
    settings = bundle.config.autoencoder
    scale = bundle.scale or LatentScale.identity(settings.embed_dim)
    reason = vaes.why_not(settings) or vaes.why_not_scale(settings, scale)
    if reason:
        raise ModelError(
            f"--to diffusers: {reason} has no class there; export a diffusion model that carries it, "
            "whose pipeline brings its own code"
        )
    _write_stage(bundle, scale, path, factor_read=True)
    lines = [f"a first stage of class {'VQModel' if settings.reg == 'vq' else 'AutoencoderKL'}"]
    write_card(path, bundle, lines, run)
    return lines


def _write_stage(bundle: AutoencoderBundle, scale: LatentScale, folder: Path, *, factor_read: bool) -> None:
    side = max(bundle.config.data.size) or bundle.config.autoencoder.resolution
    config, tensors, kept = vaes.write_vae(
        bundle.config.autoencoder, bundle.tensors, scale, side=side, factor_read=factor_read
    )
    write_model(folder, config, tensors)
    if kept:
        files.save_tensors(folder / vaes.UNFOLDED, kept)


def _single(bundle: DiffusionBundle) -> bool:
    """A network that was read alone and has no pipeline: it goes back alone."""
    if bundle.config.distill.calls:  # alone it would not say how it samples
        return False
    plain_class = bundle.config.kinds == ("class",) and not bundle.config.diffusion.vector_mlp
    of_latents = not bundle.config.kinds and bundle.latent_shape[0] != AutoencoderSettings().in_channels
    return bundle.autoencoder is None and (plain_class or of_latents or bundle.config.kinds == ("tokens",))


def _context_dim(bundle: DiffusionBundle) -> int | None:
    tokens = {"class", "text", "layout", "tokens"} & set(bundle.config.kinds)
    return bundle.config.condition.context_dim if tokens else None


def _why_not_unet(bundle: DiffusionBundle) -> str:
    condition, kinds = bundle.config.condition, set(bundle.config.kinds)
    vector = (condition.class_vector and "class" in kinds) or (condition.text_pooled and {"text", "layout"} & kinds)
    if vector and not _single(bundle):
        return "a vector beside the time embedding"
    channels = bundle.latent_shape[0]
    return diffusers_unet_write.why_not(
        bundle.config.diffusion, _in_channels(bundle), channels, _context_dim(bundle), None
    )


def _in_channels(bundle: DiffusionBundle) -> int:
    return bundle.tensors["unet.input_blocks.0.0.weight"].shape[1] // bundle.config.diffusion.patch**2


def _why_not_stock(bundle: DiffusionBundle) -> str:
    """ "" where a pipeline of diffusers computes the same, else the first reason for which none does."""
    config, kinds, specs = bundle.config, bundle.config.kinds, bundle.specs
    channels, height, width = bundle.latent_shape
    stage = bundle.autoencoder.config.autoencoder if bundle.autoencoder else None
    few = config.distill.calls
    reasons = [f"distilled to {few} network calls, with guidance baked in" if few else ""]
    reasons.append(schedulers.why_not(config.diffusion))
    if kinds not in ((), ("text",), ("lowres",)):
        reasons.append(f"conditioning on {' + '.join(kinds)}, which no pipeline has")
    if kinds == ("text",) and (config.condition.text_encoder != "joint" or specs["text"]["length"] != TEXT_LENGTH):
        reasons.append(f"another text encoder, or another length than {TEXT_LENGTH} tokens")
    if kinds == ("lowres",):
        if stage is None or specs["lowres"]["scale"] != stage.f or channels != 3 or specs["lowres"].get("latent"):
            reasons.append("super-resolution other than LDM's: three latent channels, scale = f")
    if height != width:
        reasons.append("latents that are not square")
    if stage is None:
        if kinds or bundle.scale != LatentScale.identity(channels):
            reasons.append("pixel space with conditions or a scale")
    else:
        reasons += [vaes.why_not(stage), vaes.why_not_scale(stage, bundle.scale)]
    return next((reason for reason in [*reasons, _why_not_unet(bundle)] if reason), "")


def _unet_parts(bundle: DiffusionBundle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    own = {name.removeprefix("unet."): tensor for name, tensor in bundle.tensors.items() if name.startswith("unet.")}
    table = None
    if _single(bundle) and bundle.config.kinds == ("class",):
        table = bundle.tensors["conditions.entries.class.embedding.weight"]
    channels, height, width = bundle.latent_shape
    return diffusers_unet_write.write_unet(
        bundle.config.diffusion,
        own,
        in_channels=_in_channels(bundle),
        out_channels=channels,
        context_dim=_context_dim(bundle),
        sample_size=(height, width),
        table=table,
    )


def _write_stock(bundle: DiffusionBundle, path: Path) -> list[str]:
    kinds = bundle.config.kinds
    stock: dict[tuple[str, ...], str] = {("text",): TEXT, ("lowres",): UPSCALE}
    pipeline = stock.get(kinds, LATENT if bundle.autoencoder else PIXELS[1])
    config, tensors = _unet_parts(bundle)
    write_model(path / "unet", config, tensors)
    scheduler = schedulers.write_scheduler(bundle.config.diffusion, bundle.config.sample)
    files.write_json(path / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": VERSION}
    index["unet"] = ["diffusers", config["_class_name"]]
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    lines = [f"a {pipeline}"]
    if bundle.autoencoder:
        _write_stage(bundle.autoencoder, bundle.scale, path / "vqvae", factor_read=pipeline != UPSCALE)
        stage = bundle.autoencoder.config.autoencoder
        index["vqvae"] = ["diffusers", "VQModel" if stage.reg == "vq" else "AutoencoderKL"]
        side = 8 * bundle.latent_shape[1]
        if pipeline == TEXT and stage.f != 8:
            lines.append(f"the pipeline takes every first stage for one of f = 8: pass height={side}, width={side}")
    if pipeline == TEXT:
        prefix = "conditions.entries.text.encoder."
        own = {name.removeprefix(prefix): t for name, t in bundle.tensors.items() if name.startswith(prefix)}
        write_model(path / "bert", *text.write_text(bundle.config.condition, bundle.specs["text"], own), stem="model")
        index |= {"bert": ["latent_diffusion", text.BERT], "tokenizer": _copy_tokenizer(bundle, path, "BertTokenizer")}
    files.write_json(path / "model_index.json", index)
    return lines


def _copy_tokenizer(bundle: DiffusionBundle, path: Path, class_name: str) -> list[str]:
    if bundle.tokenizer is None:
        raise ModelError(
            "--to diffusers: this model takes text and its tokenizer is not at hand; convert the original "
            "with --tokenizer FOLDER first"
        )
    for file in sorted(bundle.tokenizer.iterdir()):
        if file.is_file():
            files.write_bytes(path / "tokenizer" / file.name, file.read_bytes())
    found = path / "tokenizer" / "tokenizer_config.json"
    if not found.is_file():
        files.write_json(found, {"tokenizer_class": class_name, "do_lower_case": True})
    named = read_config(found).get("tokenizer_class")
    return ["transformers", named.removesuffix("Fast") if isinstance(named, str) else class_name]


def _write_custom(bundle: DiffusionBundle, path: Path, reason: str) -> list[str]:
    if "text" in bundle.config.kinds and bundle.config.condition.text_encoder != "joint":
        raise ModelError(
            f"--to diffusers: {reason}; and the text encoder {bundle.config.condition.text_encoder} is no "
            "part of the run, so an exported folder could not hold it"
        )
    if "tokens" in bundle.config.kinds:
        raise ModelError(f"--to diffusers: {reason}; and what makes the tokens is not part of this model")
    stage = bundle.autoencoder
    own_unet = bool(_why_not_unet(bundle))
    own_stage = stage is None or bool(vaes.why_not(stage.config.autoencoder))
    index: dict[str, Any] = {"_class_name": ["pipeline", custom.PIPELINE], "_diffusers_version": VERSION}
    index["model"] = custom.write_component(bundle, path, own_unet=own_unet, own_autoencoder=own_stage)
    lines = [f"a pipeline of its own ({reason})"]
    if not own_unet:
        config, tensors = _unet_parts(bundle)
        write_model(path / "unet", config, tensors)
        index["unet"] = ["diffusers", config["_class_name"]]
    if stage is not None and not own_stage:
        channels = bundle.latent_shape[0]
        _write_stage(stage, LatentScale.identity(channels), path / "vqvae", factor_read=True)
        index["vqvae"] = ["diffusers", "VQModel" if stage.config.autoencoder.reg == "vq" else "AutoencoderKL"]
    if "text" in bundle.config.kinds:
        index["tokenizer"] = _copy_tokenizer(bundle, path, "BertTokenizer")
    files.write_json(path / "model_index.json", index)
    return lines

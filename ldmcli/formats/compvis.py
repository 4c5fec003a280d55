"""Checkpoints of CompVis/latent-diffusion, in: state dict and YAML to a bundle (the way out is `compvis_write.py`)."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmcli.core import files
from ldmcli.core.errors import ModelError
from ldmcli.core.settings import DataSettings, DiffusionConfig
from ldmcli.diffusion.schedule import make_schedule
from ldmcli.formats import compvis_config as cc
from ldmcli.formats import compvis_shapes, compvis_yaml, pickles
from ldmcli.formats.bundle import AutoencoderBundle, Bundle, DiffusionBundle, Reading, checkpoint_in
from ldmcli.formats.compvis_write import KEPT
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.conditioners import load_tokenizer
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.networks.latent_scale import LatentScale

UNET, FIRST, COND, EMA = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "model_ema."
BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
)
# entries that are no weights of the model: schedule, losses of the first stage, counters
STRAY = re.compile(
    "|".join(
        [
            *BUFFERS,
            "logvar",
            "scale_factor",
            r"model_ema\.(decay|num_updates)",
            r"(first_stage_model\.|cond_stage_model\.)?loss\..*",
            r"(first_stage_model\.)?model_ema\.(decay|num_updates)",
        ]
    )
)
ROOTS = (UNET, FIRST, COND, EMA, "encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.", "conditioner.")
HINT = "does the configuration belong to another model?"
SD_SCALES = {"cond_stage_model.": 0.18215, "conditioner.": 0.13025}
SD_MARKS = ("cond_stage_model.transformer.text_model.", "cond_stage_model.model.", "conditioner.embedders.")


def read(path: Path, reading: Reading) -> Bundle:
    """The model of a checkpoint file, or of a folder that holds one. Raises ModelError."""
    if path.is_dir():
        path = checkpoint_in(path) or path
    state = read_tensors(path)
    yaml = reading.config or config_beside(path)
    root = compvis_yaml.read_yaml(yaml) if yaml else None
    has_unet = any(name.startswith(UNET) for name in state)
    clip = next((mark for mark in SD_MARKS if any(name.startswith(mark) for name in state)), "")
    if not has_unet or reading.part == "first-stage" or clip:
        stage = _stage_of(root) if root else None
        own = root.values.get(cc.OWN) if root and not has_unet else None
        bundle = _first_stage(path, state, stage, reading.weights, own if isinstance(own, dict) else {})
        if clip:
            bundle.notes.append("first stage only: the network beside it reads CLIP's text, which no LDM does")
            factor = next(value for mark, value in SD_SCALES.items() if clip.startswith(mark))
            bundle.scale = bundle.scale or _scale(factor, bundle.config.autoencoder.embed_dim)
        return bundle
    plan = cc.plan(root, reading.heads) if root else compvis_shapes.plan(path, state, reading.heads)
    if isinstance(plan, cc.FirstStage):
        raise ModelError(f"{yaml}: describes a first stage, but {path.name} holds a diffusion model")
    return _diffusion(path, state, plan, reading)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in the numbers that it has; nothing is executed."""
    if path.suffix.lower() == ".safetensors":
        state = files.load_tensors(path, verify=False)[0]
    else:
        state = pickles.read_state_dict(path)
    if not state:
        raise ModelError(f"{path}: holds no weights")
    return unwrapped(state, path)


def unwrapped(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Weights under the model's own names: without what DistributedDataParallel and torch.compile put into them, nor
    the name under which a program kept the whole model. Raises ModelError where two would get one name."""
    plain = {name: files.plain_name(name).replace("_orig_mod", "") for name in state}
    while not any(name.startswith(ROOTS) for name in plain.values()):
        first = {name.partition(".")[0] for name in plain.values()}
        if len(first) != 1 or not all("." in name for name in plain.values()):
            break  # no model of this kind, as the reader will say
        plain = {name: short.partition(".")[2] for name, short in plain.items()}
    if len(set(plain.values())) < len(plain):
        twice = next(name for name, short in plain.items() if list(plain.values()).count(short) > 1)
        raise ModelError(f"{path}: {twice} stands there twice, with and without a wrapper's name; keep one of them")
    return {plain[name]: tensor for name, tensor in state.items()}


def config_beside(path: Path) -> Path | None:
    """The YAML that belongs to a checkpoint: of the same name, or config.yaml or the only one in its folder."""
    named = [path.with_suffix(suffix) for suffix in (".yaml", ".yml")] + [path.parent / "config.yaml"]
    found = [name for name in named if name.is_file()]
    others = sorted(path.parent.glob("*.yaml"))
    alone = len(others) == 1 and len([p for p in path.parent.iterdir() if p.suffix == path.suffix]) == 1
    return found[0] if found else others[0] if alone else None


def _stage_of(root: compvis_yaml.Section) -> cc.FirstStage:
    """The first stage that a configuration describes, of a diffusion model, too."""
    model = root.sub("model")
    params = model.sub("params")
    return cc.first_stage(params.sub("first_stage_config") if "first_stage_config" in params.values else model)


class _Weights:
    """The tensors of a checkpoint, taken one by one under their own names; what is left over is reported."""

    def __init__(self, path: Path, state: dict[str, Tensor], weights: str):
        self.path, self.state, self.left = path, state, set(state)
        averages = [name for name in state if name.startswith(EMA) and not STRAY.fullmatch(name)]
        self.averaged = bool(averages) and weights == "ema"
        self.has_averages = bool(averages)

    def take(self, prefix: str, names: Iterable[str], average: Callable[[str], str] | None = None) -> dict[str, Tensor]:
        """`names` below a prefix, as fp32; from the averages where `average` says their names and they are wanted."""
        found, missing, sources = {}, [], {}
        for name in names:
            source = own = prefix + name
            if average is not None and self.has_averages:
                self.left.discard(average(name))
                source = average(name) if self.averaged else own
            self.left.discard(own)
            if source not in self.state:
                missing.append(source)
            else:
                found[name] = sources[source] = self.state[source]
        if missing:
            raise ModelError(f"{self.path}: {len(missing)} weights are missing: {_list(missing)}; {HINT}")
        files.require_finite(sources, self.path)
        return {name: tensor.float() for name, tensor in found.items()}

    def drop(self, prefix: str) -> None:
        """Leaves out all that begins so."""
        self.left = {name for name in self.left if not name.startswith(prefix)}

    def finish(self) -> None:
        """Raises ModelError where something is left that nobody knows."""
        unknown = sorted(name for name in self.left if not STRAY.fullmatch(name))
        if unknown:
            raise ModelError(f"{self.path}: {len(unknown)} unknown entries: {_list(unknown)}; {HINT}")


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _fitting(path: Path, found: dict[str, Tensor], module: torch.nn.Module, below: str = "") -> dict[str, Tensor]:
    """Tensors as the module has them; ModelError for those of another shape."""
    own = {name.removeprefix(below): tensor for name, tensor in module.state_dict().items() if name.startswith(below)}
    wrong = [
        f"{name} {list(found[name].shape)} instead of {list(own[name].shape)}"
        for name in found
        if found[name].shape != own[name].shape
    ]
    if wrong:
        raise ModelError(f"{path}: {len(wrong)} weights of another shape than the configuration says: {_list(wrong)}")
    return found


def _dtype_notes(state: dict[str, Tensor]) -> list[str]:
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()}
    kinds -= {"float32"}
    return [f"weights of {' and '.join(sorted(kinds))}, read as float32"] if kinds else []


# ---------------------------------------------------------------- first stages


def _first_stage(
    path: Path, state: dict[str, Tensor], stage: cc.FirstStage | None, which: str, own: Mapping[str, Any]
) -> AutoencoderBundle:
    """The first stage of a checkpoint of its own, or of a whole model's."""
    inside = any(name.startswith(FIRST) for name in state)
    prefix = FIRST if inside else ""
    if not any(name.startswith(f"{prefix}decoder.") for name in state):
        raise ModelError(f"{path}: holds no model of latent-diffusion (no {prefix}decoder.…, no {UNET}… in it)")
    notes = _dtype_notes(state)
    if stage is None or stage.settings is None:
        stage = compvis_shapes.first_stage(path, state, prefix)
    weights = _Weights(path, state, which)
    if inside:
        for other in ("model.", COND, EMA, KEPT, "conditioner.", "denoiser."):
            weights.drop(other)
        found = take_first_stage(weights, stage, prefix)
    else:
        found = take_first_stage(weights, stage, "", lambda name: EMA + name.replace(".", ""))
        if weights.averaged:
            notes.append("averaged weights (model_ema)")
    weights.finish()
    assert stage.settings is not None
    factor, channels = state.get("scale_factor") if inside else None, stage.settings.embed_dim
    scale = None if factor is None else _scale(_finite(path, factor), channels)
    scale = scale or _own_scale(own, channels, None)
    return AutoencoderBundle(cc.autoencoder_config(stage), found, scale, notes)


def take_first_stage(
    weights: _Weights, stage: cc.FirstStage, prefix: str, average: Callable[[str], str] | None = None
) -> dict[str, Tensor]:
    """The tensors of a first stage as our network names them: the original's names."""
    assert stage.settings is not None, "pixels have no tensors"
    with torch.device("meta"):
        network = Autoencoder(stage.settings)
    return _fitting(weights.path, weights.take(prefix, network.state_dict(), average), network)


def _scale(factor: float, channels: int) -> LatentScale:
    return LatentScale((0.0,) * channels, (1 / factor,) * channels)


def _finite(path: Path, factor: Tensor) -> float:
    if factor.numel() != 1 or not bool(torch.isfinite(factor).all()) or float(factor) <= 0:
        raise ModelError(f"{path}: scale_factor is no positive number")
    return float(factor)


# ---------------------------------------------------------------- diffusion models


def _diffusion(path: Path, state: dict[str, Tensor], plan: cc.Plan, reading: Reading) -> DiffusionBundle:
    notes = [*plan.notes, *_dtype_notes(state)]
    weights = _Weights(path, state, reading.weights)
    task, specs = cc.task_of(plan)
    condition = cc.condition_of(plan)
    channels, height, width = plan.latent_shape
    stage = plan.first_stage
    f = stage.settings.f if stage.settings else 1
    config = DiffusionConfig(
        data=DataSettings(size=(height * f, width * f)),
        diffusion=plan.diffusion,
        condition=condition,
        task=task,
        sample=cc.sample_of(plan),
    )
    specs = _own_specs(specs, plan)
    with torch.device("meta"):
        model = DiffusionModel(plan.diffusion, condition, specs, None, plan.latent_shape, config.kinds)
    reads = channels + model.conditions.concat_channels
    if reads != plan.in_channels:
        raise ModelError(f"{path}: the network reads {plan.in_channels} channels; latents and conditions give {reads}")
    if plan.context_dim is not None and model.conditions.context_dim is None:
        raise ModelError(f"{path}: the network attends to tokens, and no conditioner that gives some is configured")
    tensors = {
        f"unet.{name}": tensor
        for name, tensor in _fitting(
            path,
            weights.take(UNET, model.unet.state_dict(), lambda name: f"{EMA}diffusion_model{name.replace('.', '')}"),
            model,
            "unet.",
        ).items()
    }
    tensors |= _conditioner(weights, plan, model)
    autoencoder = _inner_stage(path, weights, plan)
    unfolded = _unfold(weights, autoencoder)
    if weights.averaged:
        notes.append("averaged weights of the network (model_ema)")
    elif weights.has_averages:
        notes.append("raw weights of the network; averaged ones are in the checkpoint, too")
    weights.finish()
    _check_schedule(path, state, plan)
    scale = _scale(_factor(path, state, plan, notes), channels)
    scale = _own_scale(plan.own, channels, None if unfolded else scale) or scale
    tokenizer = _tokenizer(path, reading, specs, notes)
    kind = "none" if scale == LatentScale.identity(channels) else "per_channel" if any(scale.mean) else "global"
    config = replace(config, diffusion=replace(config.diffusion, latent_scale=kind))
    if autoencoder is not None:
        autoencoder.scale = scale
    return DiffusionBundle(config, tensors, autoencoder, scale, plan.latent_shape, specs, tokenizer, notes)


def _own_specs(specs: dict[str, dict], plan: cc.Plan) -> dict[str, dict]:
    """Facts with what a YAML written here keeps of them: names, whether 255 is a class of maps, the unused head."""
    kind, kept = plan.conditioner.kind, plan.own.get("names")
    key = {"class": "class_names", "layout": "categories", "map": "names"}.get(kind)
    if key and isinstance(kept, list) and all(isinstance(name, str) for name in kept):
        found = specs[kind]
        rows = len(found[key]) + (found["null"] if kind == "class" else 0)
        fits = {"class": len(kept) in (rows, rows - 1), "map": len(kept) == rows, "layout": len(kept) <= rows}
        if fits[kind]:
            found[key] = kept
            if kind == "class":
                found["null"] = len(kept) < rows
    if kind == "map" and plan.own.get("void") is True:
        specs[kind]["void"] = True
    if kind in ("text", "layout") and plan.own.get("logits") is False:
        specs[kind].pop("logits", None)
    return specs


def _conditioner(weights: _Weights, plan: cc.Plan, model: DiffusionModel) -> dict[str, Tensor]:
    """The conditioner's tensors under our names; the copy of a first stage is left out."""
    kind = plan.conditioner.kind
    if plan.conditioner.shared:
        weights.drop(COND)
    if kind not in ("class", "text", "layout", "map"):
        return {}
    ours = f"conditions.entries.{kind}." + ("" if kind == "class" else "encoder.")
    names = [name.removeprefix(ours) for name in model.state_dict() if name.startswith(ours)]
    found = _fitting(weights.path, weights.take(COND, names), model, ours)
    return {ours + name: tensor for name, tensor in found.items()}


def _inner_stage(path: Path, weights: _Weights, plan: cc.Plan) -> AutoencoderBundle | None:
    stage, channels = plan.first_stage, plan.latent_shape[0]
    if stage.settings is None:
        if channels == 3:
            return None
        return AutoencoderBundle(cc.autoencoder_config(stage, channels, plan.latent_shape[1]), {})
    if stage.settings.embed_dim != channels:
        raise ModelError(f"{path}: latents of {stage.settings.embed_dim} channels for a network of {channels}")
    return AutoencoderBundle(cc.autoencoder_config(stage), take_first_stage(weights, stage, FIRST))


def _factor(path: Path, state: dict[str, Tensor], plan: cc.Plan, notes: list[str]) -> float:
    """The scale of latents: the checkpoint's where it holds one, else the configuration's."""
    if "scale_factor" in state:
        return _finite(path, state["scale_factor"])
    if plan.scale_measured:
        notes.append("scale_by_std without a scale_factor in the checkpoint: 1 is taken, as the original would")
    if not plan.scale_factor > 0:
        raise ModelError(f"{path}: scale_factor = {plan.scale_factor}: a positive number is expected")
    return plan.scale_factor


def _own_scale(own: Mapping[str, Any], channels: int, near: LatentScale | None) -> LatentScale | None:
    """The scale that a YAML written here gives in full, where it is that of the checkpoint (`near`; None: any)."""
    mean, std = own.get("latent_mean", ()), own.get("latent_std", ())
    if not all(
        isinstance(v, list) and len(v) == channels and all(isinstance(n, float) for n in v) for v in (mean, std)
    ):
        return None
    found = LatentScale(tuple(mean), tuple(std))
    if min(found.std) <= 0:
        return None
    same = near is None or found.mean == near.mean and all(abs(a / b - 1) < 1e-6 for a, b in zip(found.std, near.std))
    return found if same else None


def _unfold(weights: _Weights, autoencoder: AutoencoderBundle | None) -> bool:
    """Puts back what `compvis_write` kept of a first stage before a latent scale was folded in; whether it did."""
    kept = [name for name in weights.left if name.startswith(KEPT)]
    if autoencoder is None or not kept:
        return False
    for name in kept:
        own = name.removeprefix(KEPT)
        if own not in autoencoder.tensors or autoencoder.tensors[own].shape != weights.state[name].shape:
            raise ModelError(f"{weights.path}: {name} belongs to no weight of the first stage")
        autoencoder.tensors[own] = weights.state[name].float()
        weights.left.discard(name)
    return True


def _check_schedule(path: Path, state: dict[str, Tensor], plan: cc.Plan) -> None:
    """Raises ModelError where the checkpoint's own betas are not those of the configuration."""
    if "betas" not in state:
        return
    ours = torch.as_tensor(make_schedule(plan.diffusion).alphas_cumprod)
    theirs = (1 - state["betas"].double()).cumprod(0)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3):
        ends = " to ".join(f"{float(beta):.3g}" for beta in (state["betas"][:1].sum(), state["betas"][-1:].sum()))
        raise ModelError(f"{path}: the noise schedule in it (betas {ends}) is not that of the configuration")


def _tokenizer(path: Path, reading: Reading, specs: dict, notes: list[str]) -> Path | None:
    """The folder of a text model's tokeniser: the given one, one beside the checkpoint, or the published one."""
    if "text" not in specs:
        return None
    vocabulary = specs["text"]["vocabulary"]
    near = [path.parent / f"{path.stem}-tokenizer", path.parent / "tokenizer", path.parent]
    near = [folder for folder in near if any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json"))]
    found = reading.tokenizer or next(iter(near), None)
    if found is None and vocabulary == 30522:
        found = _published_tokenizer()
    if found is None:
        notes.append("no tokenizer is at hand: prompts need one (ldm convert --tokenizer FOLDER), tokens do not")
        return None
    size = len(load_tokenizer(found))
    if size > vocabulary:
        raise ModelError(f"{found}: a tokenizer of {size} words for a model that knows {vocabulary}")
    return found


def _published_tokenizer() -> Path | None:
    """bert-base-uncased from the hub or its cache; None where neither has it."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download("google-bert/bert-base-uncased", allow_patterns=["tokenizer*.json", "vocab.txt"]))
    except Exception:  # offline, or no such cache: the model is converted without
        return None

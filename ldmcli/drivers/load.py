"""A trained run from disk: weights verified, ready for use."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmcli.core import files, runs
from ldmcli.core.config import flat, from_toml
from ldmcli.core.console import warn
from ldmcli.core.errors import LdmError, ModelError
from ldmcli.core.settings import AutoencoderConfig, DiffusionConfig
from ldmcli.drivers.loaded import LoadedAutoencoder, LoadedDiffusion, default_device, pixel_autoencoder
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.conditions import load_tokenizer
from ldmcli.networks.diffusion import DiffusionModel, LatentScale


def read_scale(stats: dict[str, Any], channels: int) -> LatentScale:
    """The latent scale of a run's stats.json; none for autoencoders that have not measured it yet."""
    found = stats.get("latent_scale")
    return LatentScale(tuple(found["mean"]), tuple(found["std"])) if found else LatentScale.identity(channels)


def strict_load(module: torch.nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Loads weights, refusing missing, extra or misshapen ones (ModelError names the first five)."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = sorted(k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape)
    if missing or extra or shapes:
        parts = [
            f"{what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''} ({len(names)})"
            for what, names in (("missing", missing), ("unknown", extra), ("of another shape", shapes))
            if names
        ]
        raise ModelError(f"{where}: weights do not fit the configuration; {'; '.join(parts)}")
    module.load_state_dict(tensors)


def load_autoencoder(path: Path, device: torch.device | None = None) -> LoadedAutoencoder:
    """The autoencoder of a run folder (or of a diffusion run's autoencoder/)."""
    if str(path) == "none":
        return pixel_autoencoder()
    state = runs.read_run(path)
    if state.get("kind") != "autoencoder":
        raise ModelError(f"{path}: a {state.get('kind')} run, not an autoencoder; pass a run of `ldm train-ae`")
    config = read_config("autoencoder", path)
    network = Autoencoder(config.autoencoder)
    tensors, metadata = files.load_tensors(path / "model.safetensors")
    strict_load(network, tensors, path / "model.safetensors")
    if "latent_scale" in metadata:  # of these very weights, whatever stats.json was measured on
        stats = {"latent_scale": json.loads(metadata["latent_scale"])}
    else:
        stats = files.read_json(path / "stats.json") if (path / "stats.json").exists() else {}
    network.eval().requires_grad_(False).to(device or default_device())
    return LoadedAutoencoder(network, read_scale(stats, network.latent_channels), metadata["content_sha256"], config)


def read_config(kind: str, path: Path):
    """The resolved configuration of a run. Raises ModelError when it is missing or damaged."""
    try:
        return from_toml(kind, (path / "config.toml").read_text(encoding="utf-8"), str(path / "config.toml"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: config.toml is missing") from error
    except LdmError as error:
        raise ModelError(str(error)) from error


def load_diffusion(path: Path, device: torch.device | None = None, weights: str = "ema") -> LoadedDiffusion:
    """The diffusion model of a run folder. weights: "ema" (model.safetensors) or "raw" (the newest checkpoint's)."""
    device = device or default_device()
    config = read_config("diffusion", path)
    stats = files.read_json(path / "stats.json")
    tokenizer = load_tokenizer(path / "tokenizer") if "text" in config.condition.kinds else None
    model = DiffusionModel(config.diffusion, config.condition, stats["conditions"], tokenizer, stats["latent_shape"],
                           config.kinds)
    source = path / "model.safetensors" if weights == "ema" else _raw_weights(path)
    tensors, metadata = files.load_tensors(source)
    _check_settings(config, metadata, path)
    strict_load(model, tensors, source)
    autoencoder = _own_autoencoder(path, stats, device)
    model.eval().requires_grad_(False).to(device)
    return LoadedDiffusion(model, autoencoder, config, metadata.get("content_sha256", ""))


def _check_settings(config: DiffusionConfig, metadata: dict[str, str], path: Path) -> None:
    """Raises ModelError when config.toml says something else of the model than the file that holds its weights."""
    written, now = json.loads(metadata.get("settings", "{}")), settings_of_weights(config)
    changed = {name: (value, now[name]) for name, value in written.items() if now.get(name, value) != value}
    if changed:
        table = "; ".join(f"{name}: {a} in the weights, {b} in config.toml" for name, (a, b) in changed.items())
        raise ModelError(f"{path}: config.toml does not belong to model.safetensors ({table}); restore it")


def settings_of_weights(config: DiffusionConfig | AutoencoderConfig) -> dict[str, Any]:
    """Settings without which weights mean nothing, as JSON values: of network, process and conditions."""
    of_weights = ("diffusion.", "condition.", "task.", "autoencoder.")
    kept = {k: v for k, v in flat(config).items() if k.startswith(of_weights)}
    return json.loads(json.dumps(kept))


def _own_autoencoder(path: Path, stats: dict[str, Any], device: torch.device) -> LoadedAutoencoder:
    """The run's autoencoder, with the scale that the diffusion model was trained at."""
    wanted = stats["autoencoder"]
    found = pixel_autoencoder() if wanted == "pixels" else load_autoencoder(path / "autoencoder", device)
    if found.fingerprint != wanted:
        raise ModelError(
            f"{path}/autoencoder: not the autoencoder that this model was trained with "
            f"(hash {found.fingerprint[:12]}, wanted {wanted[:12]})"
        )
    found.scale = read_scale(stats, found.network.latent_channels)
    return found


def _raw_weights(path: Path) -> Path:
    newest = runs.newest_checkpoint(path, warn)
    if newest is None:
        raise ModelError(f"{path}: no complete checkpoint, so no raw weights; use the averaged ones (--weights ema)")
    return newest / "model.safetensors"


def load(path: str | Path, device: str | torch.device | None = None, weights: str = "ema"):
    """A run folder, ready for use: `LoadedAutoencoder` or `LoadedDiffusion`. Raises ModelError."""
    path = Path(path)
    chosen = torch.device(device) if device else default_device()
    if runs.read_run(path).get("kind") == "autoencoder":
        return load_autoencoder(path, chosen)
    return load_diffusion(path, chosen, weights)

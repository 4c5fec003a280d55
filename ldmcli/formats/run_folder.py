"""Run folders as bundles, both ways: what use needs of a run, without its training state."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldmcli import __version__
from ldmcli.core import console, files, runs
from ldmcli.core.config import Config, config_hash, flat, from_toml, to_toml
from ldmcli.core.errors import LdmError, ModelError
from ldmcli.core.settings import ClassifierConfig, DiffusionConfig
from ldmcli.formats.bundle import AutoencoderBundle, Bundle, ClassifierBundle, DiffusionBundle
from ldmcli.formats.packed_weights import PACKED, pack, unpack
from ldmcli.networks.latent_scale import LatentScale

WEIGHTS = "model.safetensors"
GUIDING = "guiding.safetensors"  # the weights for use as they were early in the training, for autoguidance
TEACHERS = "trained_against"  # in the metadata of weights


def read(path: Path, weights: str = "ema") -> Bundle:
    """The model of a run folder or of one of its checkpoints (`runs.locate`), its weights verified. weights: "ema" or,
    of a diffusion run, "raw". Raises ModelError."""
    name, path = path, runs.locate(path)[0]
    kind = runs.read_run(path).get("kind")
    if kind == "autoencoder":
        return read_autoencoder(name)
    if kind == "classifier":
        raise ModelError(f"{path}: a classifier, which leads a model's samples: `ldm sample --classifier {path}`")
    config = read_config("diffusion", path)
    stats = files.read_json(path / "stats.json")
    tensors, metadata = read_weights(name, "model", weights)
    _check_settings(config, metadata, path)
    wanted = stats["autoencoder"]
    autoencoder = None if wanted == "pixels" else read_autoencoder(path / "autoencoder")
    if autoencoder is not None and autoencoder.fingerprint != wanted:
        raise ModelError(
            f"{path}/autoencoder: not the autoencoder that this model was trained with "
            f"(hash {autoencoder.fingerprint[:12]}, wanted {wanted[:12]})"
        )
    channels, height, width = stats["latent_shape"]
    tokenizer = path / "tokenizer"
    return DiffusionBundle(
        config,
        tensors,
        autoencoder,
        read_scale(stats, channels),
        (channels, height, width),
        stats["conditions"],
        tokenizer if "text" in config.condition.kinds and tokenizer.is_dir() else None,
        _notes(path),
        metadata.get("content_sha256", ""),
        _teachers(metadata),
        guiding_weights(path),
    )


def guiding_weights(run: Path) -> Path | None:
    """The file of a run's guiding model (train.guide_at); None where it has none."""
    return run / GUIDING if (run / GUIDING).is_file() else None


def read_guiding(path: Path) -> dict[str, Tensor]:
    """The weights in the file of a guiding model, packed ones as float32. Raises ModelError."""
    tensors, metadata = files.load_tensors(path)
    return unpack(tensors) if metadata.get(PACKED) else tensors


def read_weights(path: Path, network: str, weights: str = "ema") -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a run's main network ("model", "autoencoder"), or of a checkpoint's (`runs.locate`).

    weights: "ema" (of a run its model.safetensors, of a checkpoint the averages where it has some) or "raw" (of a run
    those of its newest checkpoint). A checkpoint's metadata are the settings of the run's weights, as far as they are
    there. Packed weights come as float32, with the hash of what is stored. Raises ModelError.
    """
    run, checkpoint = runs.locate(path)
    if checkpoint is None and weights == "ema":
        tensors, metadata = files.load_tensors(run / WEIGHTS)
        return (unpack(tensors) if metadata.get(PACKED) else tensors), metadata
    checkpoint = checkpoint or _newest_checkpoint(run)
    tensors = runs.checkpoint_tensors(checkpoint, network)
    if weights == "ema" and "ema.safetensors" in files.read_json(checkpoint / "manifest.json")["files"]:
        tensors |= runs.checkpoint_tensors(checkpoint, "ema")
    written = files.tensors_metadata(run / WEIGHTS) if (run / WEIGHTS).is_file() else {}
    return tensors, {name: text for name, text in written.items() if name in ("settings", TEACHERS)}


def first_stage_run(path: Path) -> Path:
    """Of a diffusion run, or of a checkpoint of one, its autoencoder/; `path` itself for anything else. Raises
    ModelError for a model of pixels, which has none."""
    run = runs.locate(path)[0]
    if not runs.is_run(run) or runs.read_run(run).get("kind") != "diffusion":
        return path
    if files.read_json(run / "stats.json").get("autoencoder") == "pixels":
        raise ModelError(
            f"{path}: a diffusion model of pixels, without an autoencoder; pixels are `--autoencoder none`"
        )
    return run / "autoencoder"


def read_autoencoder(path: Path) -> AutoencoderBundle:
    """The autoencoder of a run folder (or of a diffusion run's autoencoder/), or of a checkpoint of one, whose latents
    nobody has measured. Raises ModelError."""
    (path, checkpoint), name = runs.locate(path), path
    state = runs.read_run(path)
    if state.get("kind") != "autoencoder":
        raise ModelError(f"{path}: a {state.get('kind')} run, not an autoencoder; pass a run of `ldm train-ae`")
    config = read_config("autoencoder", path)
    tensors, metadata = read_weights(name, "autoencoder")
    if checkpoint is not None:
        return AutoencoderBundle(config, tensors, None, _notes(path), trained_against=_teachers(metadata))
    if "latent_scale" in metadata:  # of these very weights, whatever stats.json was measured on
        stats = {"latent_scale": json.loads(metadata["latent_scale"])}
    else:
        stats = files.read_json(path / "stats.json") if (path / "stats.json").exists() else {}
    scale = read_scale(stats, 0) if stats.get("latent_scale") else None
    return AutoencoderBundle(config, tensors, scale, _notes(path), metadata["content_sha256"], _teachers(metadata))


def read_classifier(path: Path) -> ClassifierBundle:
    """The classifier of a run of `ldm train-classifier`, or of one of its checkpoints. Raises ModelError."""
    name, path = path, runs.locate(path)[0]
    kind = runs.read_run(path).get("kind")
    if kind != "classifier":
        article = "an" if str(kind)[:1] == "a" else "a"
        raise ModelError(f"{path}: {article} {kind} run, not a classifier; name a run of `ldm train-classifier`")
    config, stats = read_config("classifier", path), files.read_json(path / "stats.json")
    tensors, metadata = read_weights(name, "model")
    _check_settings(config, metadata, path)
    channels, height, width = stats["latent_shape"]
    return ClassifierBundle(
        config,
        tensors,
        stats["autoencoder"],
        read_scale(stats, channels),
        (channels, height, width),
        stats["class_names"],
        metadata.get("content_sha256", ""),
    )


def read_config(kind: str, path: Path):
    """The resolved configuration of a run, or of that of a checkpoint (`runs.locate`). Raises ModelError when it is
    missing or damaged."""
    path = runs.locate(path)[0]
    try:
        return from_toml(kind, (path / "config.toml").read_text(encoding="utf-8"), str(path / "config.toml"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: config.toml is missing") from error
    except LdmError as error:
        raise ModelError(str(error)) from error


def read_scale(stats: Mapping[str, Any], channels: int) -> LatentScale:
    """The latent scale of a run's stats.json; none for autoencoders that have not measured it yet."""
    found = stats.get("latent_scale")
    if not found:
        return LatentScale.identity(channels)
    if not all(map(math.isfinite, found["mean"])) or not all(0 < std < math.inf for std in found["std"]):
        raise ModelError(f"stats.json: latent_scale holds what is no scale (mean {found['mean']}, std {found['std']})")
    return LatentScale(tuple(found["mean"]), tuple(found["std"]))


def settings_of_weights(config: Config) -> dict[str, Any]:
    """Settings without which weights mean nothing, as JSON values: of network, process and conditions."""
    of_weights = ("diffusion.", "condition.", "task.", "autoencoder.", "classifier.", "distill.")
    kept = {k: v for k, v in flat(config).items() if k.startswith(of_weights)}
    return json.loads(json.dumps(kept))


def _check_settings(config: DiffusionConfig | ClassifierConfig, metadata: Mapping[str, str], path: Path) -> None:
    """Raises ModelError when config.toml says something else of the model than the file that holds its weights."""
    written, now = json.loads(metadata.get("settings", "{}")), settings_of_weights(config)
    changed = {name: (value, now[name]) for name, value in written.items() if now.get(name, value) != value}
    if changed:
        table = "; ".join(f"{name}: {a} in the weights, {b} in config.toml" for name, (a, b) in changed.items())
        raise ModelError(f"{path}: config.toml does not belong to model.safetensors ({table}); restore it")


def _newest_checkpoint(path: Path) -> Path:
    newest = runs.newest_checkpoint(path, console.warn)
    if newest is None:
        raise ModelError(f"{path}: no complete checkpoint, so no raw weights; use the averaged ones (--weights ema)")
    return newest


def _teachers(metadata: Mapping[str, str]) -> list[dict[str, str]] | None:
    return json.loads(metadata[TEACHERS]) if TEACHERS in metadata else None


def _notes(path: Path) -> list[str]:
    return list(runs.read_run(path).get("notes") or [])


# ---------------------------------------------------------------- writing


def write(bundle: Bundle, path: Path, source: Mapping[str, Any] | None = None, packed: str = "") -> str:
    """Writes a bundle as a complete run folder into `path`, which is made; returns the hash of its weights.

    source: where the model comes from, as run.json keeps it ({"file": name, "format": …}); no absolute paths. packed:
    how weights are stored, of `packed_weights.KINDS`; "" as they are.
    """
    path.mkdir(parents=True, exist_ok=True)
    files.write_text(path / "config.toml", to_toml(bundle.config))
    if isinstance(bundle, AutoencoderBundle):
        kind, fingerprint = "autoencoder", _write_autoencoder(bundle, path, packed)
    else:
        kind, fingerprint = "diffusion", _write_diffusion(bundle, path, packed)
    runs.RunFolder(path).update(
        kind=kind,
        state="finished",
        step=0,
        version=__version__,
        seed=bundle.config.train.seed,
        parents=[],
        data={},
        machine=runs.machine(),
        exit_code=0,
        source=dict(source or {}),
        notes=bundle.notes,
    )
    return fingerprint


def _metadata(bundle: Bundle) -> dict[str, str]:
    teachers = {} if bundle.trained_against is None else {TEACHERS: json.dumps(bundle.trained_against)}
    return {
        **teachers,
        "config_sha256": config_hash(bundle.config),
        "settings": json.dumps(settings_of_weights(bundle.config)),
        "step": "0",
        "weights": "converted",
        "ldm_version": __version__,
    }


def _scale_entry(scale: LatentScale, kind: str) -> dict[str, Any]:
    return {"kind": kind, "mean": list(scale.mean), "std": list(scale.std), "images": 0}


def _write_autoencoder(bundle: AutoencoderBundle, path: Path, packed: str) -> str:
    stats: dict[str, Any] = {"size": list(bundle.config.data.size)}
    metadata = _metadata(bundle)
    if bundle.scale is not None:
        stats["latent_scale"] = _scale_entry(bundle.scale, "converted")
        metadata["latent_scale"] = json.dumps(stats["latent_scale"])
    files.write_json(path / "stats.json", stats)
    return _save(path, bundle.tensors, metadata, packed)


def _write_diffusion(bundle: DiffusionBundle, path: Path, packed: str) -> str:
    own = "pixels" if bundle.autoencoder is None else write(bundle.autoencoder, path / "autoencoder", packed=packed)
    if bundle.tokenizer is not None:
        shutil.copytree(bundle.tokenizer, path / "tokenizer")
    files.write_json(
        path / "stats.json",
        {
            "latent_scale": _scale_entry(bundle.scale, bundle.config.diffusion.latent_scale),
            "latent_shape": list(bundle.latent_shape),
            "size": list(bundle.config.data.size),
            "conditions": bundle.specs,
            "autoencoder": own,
        },
    )
    if bundle.guiding is not None:
        _save(path, read_guiding(bundle.guiding), {}, packed, GUIDING)
    return _save(path, bundle.tensors, _metadata(bundle), packed)


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], packed: str, name: str = WEIGHTS) -> str:
    if packed:
        tensors, metadata = pack(tensors, packed, str(path / name)), {**metadata, PACKED: packed}
    return files.save_tensors(path / name, dict(tensors), metadata)


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """The hash that `write` would give these weights."""
    return files.tensors_hash({name: tensor.detach().cpu() for name, tensor in tensors.items()})

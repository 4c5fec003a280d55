"""A model as data: what a run folder, a published checkpoint and a diffusers folder have in common.

Readers (`compvis.py`, `diffusers.py`) give bundles, writers take them, and `sampling.load` builds networks from them.
Tensors carry the names of our own modules; nothing here knows where they came from.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmcli.core.errors import ModelError
from ldmcli.core.settings import AutoencoderConfig, ClassifierConfig, DiffusionConfig
from ldmcli.networks.latent_scale import LatentScale


@dataclass
class AutoencoderBundle:
    """A first stage. tensors: as `networks.autoencoder.Autoencoder` names them; scale: None where it was never
    measured; notes: readings that were chosen and what was left out, one line each, kept in run.json; fingerprint:
    content hash of the tensors, "" where nobody has computed it; trained_against: networks in the loss, as
    `evaluation.judges.Teacher` has them, None where nobody wrote them down."""

    config: AutoencoderConfig
    tensors: dict[str, Tensor]
    scale: LatentScale | None = None
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    trained_against: list[dict[str, str]] | None = None


@dataclass
class DiffusionBundle:
    """A diffusion model. tensors: as `networks.diffusion.DiffusionModel` names them (`unet.…`,
    `conditions.entries.KIND.…`).

    autoencoder: None for pixel space; latent_shape: (c, h, w) at the training size; specs: of each condition as
    stats.json keeps them; tokenizer: a folder, None where the model takes no text or its vocabulary is not at hand;
    guiding: the file with the weights of a guiding model, for autoguidance.
    """

    config: DiffusionConfig
    tensors: dict[str, Tensor]
    autoencoder: AutoencoderBundle | None
    scale: LatentScale
    latent_shape: tuple[int, int, int]
    specs: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: Path | None = None
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    trained_against: list[dict[str, str]] | None = None
    guiding: Path | None = None


@dataclass
class ClassifierBundle:
    """A classifier of noisy latents. tensors: as `networks.noisy_classifier.NoisyClassifier` names them; autoencoder:
    hash of the first stage whose latents it knows, "pixels" without one; scale, latent_shape: as of a diffusion
    model; names: of the classes."""

    config: ClassifierConfig
    tensors: dict[str, Tensor]
    autoencoder: str
    scale: LatentScale
    latent_shape: tuple[int, int, int]
    names: list[str]
    fingerprint: str = ""


Bundle = AutoencoderBundle | DiffusionBundle


def strict_load(module: torch.nn.Module, tensors: dict[str, Tensor], where: str | Path) -> None:
    """Loads weights, refusing missing, extra or misshapen ones (ModelError names the first three).

    The module takes the tensors themselves where it was built on the meta device.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = sorted(k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape)
    if missing or extra or shapes:
        parts = [
            f"{what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''} ({len(names)})"
            for what, names in (("missing", missing), ("unknown", extra), ("of another shape", shapes))
            if names
        ]
        raise ModelError(f"{where}: weights do not fit the configuration; {'; '.join(parts)}")
    module.load_state_dict(tensors, assign=any(tensor.is_meta for tensor in own.values()))


CHECKPOINTS = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Reading:
    """How a model of others is to be read, where that is open.

    weights: "ema" where there are averages, or "raw"; config: the YAML of a CompVis checkpoint; heads: attention heads
    of its UNet, "" = as the table of published models and the YAML say, "legacy" = one, "config" = as the YAML says to
    the newest code, or a number; part: "" or "first-stage"; tokenizer: a folder for a text model that has none.
    """

    weights: str = "ema"
    config: Path | None = None
    heads: str = ""
    part: str = ""
    tokenizer: Path | None = None


def checkpoint_in(folder: Path) -> Path | None:
    """The one checkpoint of a folder; None where there is none or several."""
    found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in CHECKPOINTS and path.is_file()]
    return found[0] if len(found) == 1 else None

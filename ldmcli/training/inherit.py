"""What a diffusion run takes over from other runs: its autoencoder, and weights to begin with."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from ldmcli.conditions.text import TOKENIZER
from ldmcli.core import files, runs
from ldmcli.core.errors import ModelError
from ldmcli.formats.bundle import AutoencoderBundle
from ldmcli.formats.run_folder import read_weights, write
from ldmcli.sampling.first_stage import LoadedAutoencoder

FIRST_LAYER = "unet.input_blocks.0.0.weight"  # (channels, z_t and then concat conditions, 3, 3)


def copy_autoencoder(autoencoder: LoadedAutoencoder, source: Path, target: Path) -> None:
    """Makes `target` a run of the autoencoder that was loaded from `source`: a copy, or written from a checkpoint or
    another format."""
    if not runs.is_run(source):
        assert autoencoder.config is not None, "loaded from a file, so with its settings"
        tensors, teachers = autoencoder.network.state_dict(), autoencoder.trained_against
        write(AutoencoderBundle(autoencoder.config, tensors, autoencoder.scale, trained_against=teachers), target)
        return
    target.mkdir(exist_ok=True)
    for name in ("config.toml", "stats.json", "model.safetensors", "run.json"):
        if (source / name).exists():
            with files.atomic_path(target / name) as temporary:
                shutil.copyfile(source / name, temporary)


def begin_as_student(teacher: Path, run: Path) -> Path:
    """Copies the vocabulary of a distilled run's teacher; returns its stats.json, with all that it learned of data."""
    source = runs.locate(teacher)[0]
    if (source / TOKENIZER).is_dir():
        shutil.copytree(source / TOKENIZER, run / TOKENIZER, dirs_exist_ok=True)
    return source / "stats.json"


def matching_weights(source: Path, own: dict[str, Tensor], latent_planes: int) -> dict[str, Tensor]:
    """Weights of another run, or of a checkpoint of it, that fit `own` in name and shape (--init-from).

    The first layer reads `latent_planes` planes of z_t, then those of concat conditions. Where the other model has
    z_t alone its weights are padded with zeros, so that the conditions change nothing at first.

    Raises ModelError when fewer than half of the tensors of `own` are found there.
    """
    tensors, _ = read_weights(source, "model")
    first, wanted = tensors.get(FIRST_LAYER), own[FIRST_LAYER].shape
    if first is not None and first.shape[:2] == (wanted[0], latent_planes) and latent_planes < wanted[1]:
        tensors[FIRST_LAYER] = torch.zeros(wanted)
        tensors[FIRST_LAYER][:, : first.shape[1]] = first
    fitting = {k: v for k, v in tensors.items() if k in own and own[k].shape == v.shape}
    if len(fitting) < len(own) / 2:
        raise ModelError(
            f"{source}: only {len(fitting)} of {len(own)} tensors fit this model; --init-from needs a "
            "run of the same network"
        )
    return fitting

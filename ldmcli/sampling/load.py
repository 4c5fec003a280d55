"""A model from disk, ready for use: a run, or what others wrote."""

from pathlib import Path

import torch

from ldmcli.core import box, console, runs
from ldmcli.core.errors import ModelError
from ldmcli.core.world import default_device
from ldmcli.formats.bundle import AutoencoderBundle, Bundle, DiffusionBundle, Reading, strict_load
from ldmcli.formats.open_model import format_of, read
from ldmcli.formats.run_folder import fingerprint_of, first_stage_run, read_autoencoder
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.conditioners import load_tokenizer
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.networks.latent_scale import LatentScale
from ldmcli.networks.meta_device import on_meta_device
from ldmcli.sampling.api import LoadedDiffusion
from ldmcli.sampling.first_stage import LoadedAutoencoder, pixel_autoencoder
from ldmcli.sampling.machine import inference_dtype


def build_autoencoder(bundle: AutoencoderBundle, device: torch.device, where: str | Path = "") -> LoadedAutoencoder:
    """The autoencoder of a bundle in use. `where` names it in errors."""
    with on_meta_device():
        network = Autoencoder(bundle.config.autoencoder)
    strict_load(network, bundle.tensors, where)
    network.eval().requires_grad_(False).to(device)
    scale = bundle.scale or LatentScale.identity(network.latent_channels)
    fingerprint = bundle.fingerprint or fingerprint_of(bundle.tensors)
    found = LoadedAutoencoder(network, scale, fingerprint, bundle.config, device)
    found.trained_against = bundle.trained_against
    return found


def build_diffusion(bundle: DiffusionBundle, device: torch.device, where: str | Path = "") -> LoadedDiffusion:
    """The diffusion model of a bundle in use, its autoencoder at the scale that the model was trained at."""
    config = bundle.config
    tokenizer = None if bundle.tokenizer is None else load_tokenizer(bundle.tokenizer)
    # a frozen text encoder brings weights along that the meta device would lose
    with on_meta_device() if config.condition.text_encoder == "joint" else torch.device("cpu"):
        model = DiffusionModel(
            config.diffusion, config.condition, bundle.specs, tokenizer, bundle.latent_shape, config.kinds
        )
    strict_load(model, bundle.tensors, where)
    model.eval().requires_grad_(False).to(device)
    autoencoder = (
        pixel_autoencoder(device)
        if bundle.autoencoder is None
        else build_autoencoder(bundle.autoencoder, device, where)
    )
    autoencoder.scale = bundle.scale
    found = LoadedDiffusion(model, autoencoder, config, bundle.fingerprint or fingerprint_of(bundle.tensors))
    found.trained_against = bundle.trained_against
    return found.led_by(bundle.guiding)


def load_autoencoder(path: Path, device: torch.device | None = None) -> LoadedAutoencoder:
    """A first stage: a run of `ldm train-ae` (also RUN@STEP), a diffusion run, a checkpoint or diffusers folder
    with one, or "none" for pixels.

    Of a checkpoint or pipeline of others that holds a whole diffusion model, its first stage is taken, at that model's
    scale. Raises ModelError.
    """
    device = device or default_device()
    if str(path) == "none":
        return pixel_autoencoder(device)
    if format_of(path) == "run":
        return build_autoencoder(read_autoencoder(first_stage_run(path)), device, path)
    return build_autoencoder(first_stage_of(read(path, Reading(part="first-stage")), path), device, path)


def first_stage_of(bundle: Bundle, where: Path) -> AutoencoderBundle:
    """The autoencoder in a bundle. Raises ModelError for a model of pixels, which has none."""
    if isinstance(bundle, AutoencoderBundle):
        return bundle
    if bundle.autoencoder is None:
        raise ModelError(f"{where}: a diffusion model of pixels, without an autoencoder")
    return bundle.autoencoder


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    weights: str = "ema",
    *,
    config: str | Path | None = None,
    heads: str | int = "",
    tokenizer: str | Path | None = None,
    mixed_precision: str = "auto",
    compile: bool = False,
) -> LoadedAutoencoder | LoadedDiffusion:
    """A model, ready for use: a run folder, a checkpoint of CompVis/latent-diffusion, a diffusers folder, a hub id.

    RUN@STEP, RUN@best and RUN/checkpoints/step-STEP are a run as it was at that checkpoint; "ldm-emoji" is the model
    that comes with the package.

    weights: "ema" or "raw"; config: the YAML of a checkpoint, by default the one beside it; heads: attention heads
    where a checkpoint loads under several readings ("legacy", "config" or a number); tokenizer: a folder, for a text
    model whose vocabulary is not beside it. mixed_precision: of the pictures that it makes (`inference_dtype`);
    compile: its networks, when they are first used. Raises ModelError.
    """
    path, chosen = Path(path), torch.device(device) if device else default_device()
    reading = Reading(
        weights=weights,
        config=Path(config) if config else None,
        heads=str(heads),
        tokenizer=Path(tokenizer) if tokenizer else None,
    )
    dtype, bundle = inference_dtype(mixed_precision, chosen), read(path, reading)
    if isinstance(bundle, AutoencoderBundle):
        found: LoadedAutoencoder | LoadedDiffusion = build_autoencoder(bundle, chosen, path)
    else:
        found = build_diffusion(bundle, chosen, path)
    (found if isinstance(found, LoadedAutoencoder) else found.autoencoder).dtype = dtype
    if compile:
        found.compile()
    return found


def find_model(model: str | None, run_kind: str) -> Path:
    """The run named, else the newest of its kind, else, of diffusion models, the one that comes with the package; which
    it is, is then said. Raises ModelError where there is none of them."""
    if model:
        return Path(model)
    try:
        path = runs.newest_run(run_kind)
    except ModelError:
        if run_kind != "diffusion" or not box.is_there():
            raise
        console.say(
            f"model: {box.NAME} ({box.WHAT}, and no {run_kind} run lies below runs/); `ldm demo` trains one in ten "
            "minutes, `ldm train-ldm --data FOLDER` one of your pictures"
        )
        return Path(box.NAME)
    console.say(f"model: {path} (the newest {run_kind} run)")
    return path

"""What lies at a path, and its reader: run folders, CompVis checkpoints, diffusers folders, hub ids."""

import re
from pathlib import Path

from ldmcli.core import box, runs
from ldmcli.core.errors import ModelError, UsageError
from ldmcli.formats import compvis, diffusers, run_folder
from ldmcli.formats.bundle import CHECKPOINTS, Bundle, Reading, checkpoint_in

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OURS = ("runs", "outputs", ".", "..")  # first parts of a path that no hub id begins with


def format_of(path: Path) -> str:
    """ "run", "compvis", "diffusers" or "hub"; what `runs.locate` finds, as a checkpoint of a run, is "run", too.
    Raises ModelError where nothing that can be read is there."""
    run, checkpoint = runs.locate(path)
    if checkpoint is not None or runs.is_run(run):
        return "run"
    if path.is_dir():
        if (path / "model_index.json").is_file() or (path / "config.json").is_file():
            return "diffusers"
        if checkpoint_in(path) is not None:
            return "compvis"
        raise ModelError(f"{path}: not a run folder (no run.json in it), nor one of diffusers or with one checkpoint")
    if path.is_file():
        if path.suffix.lower() in CHECKPOINTS:
            return "compvis"
        raise ModelError(f"{path}: not a model; a run folder, a diffusers folder, a .ckpt or .safetensors is expected")
    if _HUB_ID.fullmatch(path.as_posix()) and path.parts[0] not in _OURS and not path.parent.is_dir():
        return "hub"
    if path.suffix.lower() in CHECKPOINTS:
        raise ModelError(f"{path}: no such file")
    raise ModelError(f"{path}: no such run folder; `ldm runs` lists those there are")


AS_USUAL = Reading()


def read(path: Path, reading: Reading = AS_USUAL) -> Bundle:
    """The model at `path`, whatever its format. Raises ModelError, or UsageError for a reading that it cannot take."""
    source_format = format_of(path)
    if source_format != "compvis":
        for name in ("config", "heads"):
            if getattr(reading, name):
                raise UsageError(f"--{name}: only checkpoints (.ckpt, .safetensors) take one; {path} is none")
    if source_format == "run":
        return _read_run(path, reading.weights)
    if source_format == "compvis":
        return compvis.read(path, reading)
    return diffusers.read(path if source_format == "diffusers" else hub_folder(path.as_posix()))


def _read_run(path: Path, weights: str) -> Bundle:
    try:
        return run_folder.read(path, weights)
    except ModelError as error:
        if box.is_meant(path) and weights == "ema":
            raise ModelError(f"{box.NAME}: this installation of ldm is damaged, install it again ({error})") from error
        raise


def hub_folder(name: str) -> Path:
    """A diffusers folder of the hub, downloaded or from the cache. Raises ModelError where it cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.bin"]))
    except Exception as error:  # what the hub's client raises comes from several libraries
        why = str(error).strip().splitlines()
        reason = why[0] if why else repr(error)
        raise ModelError(f"{name}: no such folder here, and the hub gives none ({reason})") from None

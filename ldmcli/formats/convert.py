"""From one format to another: what `ldm convert` does."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldmcli.core.errors import UsageError
from ldmcli.formats import run
from ldmcli.formats.bundle import AutoencoderBundle, Bundle
from ldmcli.formats.detect import Reading, format_of, read

TARGETS = ("run", "compvis", "diffusers")
_MARKS = ("run.json", "model_index.json", "config.json")  # of folders that --overwrite may replace


def convert(source: Path, target: Path, to: str = "", reading: Reading | None = None, *, overwrite: bool = False
            ) -> dict[str, Any]:  # fmt: skip
    """Reads the model at `source` and writes it to `target` in the format `to` ("" = a run); returns what was read.

    Nothing appears under the name of `target` before it is whole. Raises ModelError for what cannot be read or
    expressed, UsageError for a target that is in the way.
    """
    kind = format_of(source)
    if kind == "run" and not to:
        raise UsageError("--to: a run can go to compvis or diffusers; say which")
    to = to or "run"
    _check_target(source, target, to, overwrite)
    bundle = read(source, reading or Reading())
    with _staged(target) as place:
        notes = _write(bundle, place, to, source, kind)
    return _facts(bundle) | {"source": str(source), "format": kind, "target": str(target), "to": to,
                             "notes": [*bundle.notes, *notes]}


def _write(bundle: Bundle, place: Path, to: str, source: Path, kind: str) -> list[str]:
    if to == "run":
        run.write(bundle, place, {"name": source.name, "format": kind})
        return []
    if to == "compvis":
        from ldmcli.formats import compvis_write

        notes = compvis_write.write(bundle, place)
        tokenizer = getattr(bundle, "tokenizer", None)
        if tokenizer is not None:
            shutil.copytree(tokenizer, place.with_name(f"{place.stem}-tokenizer"))
        return notes
    from ldmcli.formats import diffusers

    return diffusers.write(bundle, place, source if kind == "run" else None)


def _facts(bundle: Bundle) -> dict[str, Any]:
    parts = {"model" if not isinstance(bundle, AutoencoderBundle) else "autoencoder": bundle.tensors}
    if not isinstance(bundle, AutoencoderBundle) and bundle.autoencoder is not None:
        parts["autoencoder"] = bundle.autoencoder.tensors
    return {
        "kind": "autoencoder" if isinstance(bundle, AutoencoderBundle) else "diffusion",
        "conditions": [] if isinstance(bundle, AutoencoderBundle) else list(bundle.config.kinds),
        "size": list(bundle.config.data.size),
        "parameters": {name: sum(t.numel() for t in tensors.values()) for name, tensors in parts.items()},
    }


def _check_target(source: Path, target: Path, to: str, overwrite: bool) -> None:
    if to == "compvis" and target.suffix not in (".ckpt", ".safetensors"):
        raise UsageError(f"{target}: a checkpoint of CompVis is one file; end its name with .ckpt or .safetensors")
    if source.exists() and (target.resolve() == source.resolve() or target.resolve() in source.resolve().parents):
        raise UsageError(f"{target}: is, or holds, what is to be converted; choose another name")
    if to == "compvis":
        taken = [path for path in (target, target.with_suffix(".yaml")) if path.exists()]
        if taken and not overwrite:
            raise UsageError(f"{taken[0]}: exists; --overwrite replaces it")
        return
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not overwrite:
            raise UsageError(f"{target}: exists; --overwrite replaces it")
        if not any((target / mark).is_file() for mark in _MARKS):
            raise UsageError(f"{target}: holds something other than a model, which --overwrite does not replace")


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A place beside `target` to write in; what stands there becomes `target` (with what lies beside it) at the end."""
    stage = target.parent / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage / target.name
        for path in sorted(stage.iterdir(), key=lambda path: path.name == target.name):
            final = target.with_name(path.name)
            if final.is_dir():
                shutil.rmtree(final)
            os.replace(path, final)
    finally:
        shutil.rmtree(stage, ignore_errors=True)

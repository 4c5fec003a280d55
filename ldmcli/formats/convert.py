"""From one format to another: what `ldm convert` does."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldmcli.core import files, runs
from ldmcli.core.errors import ModelError, UsageError
from ldmcli.core.outputs import card_is_models, marked
from ldmcli.formats import compvis_write, diffusers, run_folder
from ldmcli.formats.bundle import AutoencoderBundle, Bundle, DiffusionBundle, Reading
from ldmcli.formats.open_model import format_of, read

# files of models of diffusers and transformers, and of the tokenizers beside them
_OF_MODELS = re.compile(
    r"(model_index|config|scheduler_config|generation_config|preprocessor_config|tokenizer|tokenizer_config|vocab|"
    r"special_tokens_map|added_tokens|latents)\.json|vocab\.txt|merges\.txt|\.gitattributes|(pipeline|model_\w+)\.py|"
    r"(diffusion_pytorch_model|pytorch_model|model|unfolded|io)[\w.-]*\.(safetensors|bin|json)"
)


def convert(
    source: Path, target: Path, to: str = "", reading: Reading | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Reads the model at `source` and writes it to `target` in the format `to` ("" = a run); returns what was read.

    Nothing appears under the name of `target` before it is whole. Raises ModelError for what cannot be read or
    expressed, UsageError for a target that is in the way.
    """
    source_format = format_of(source)
    run, checkpoint = runs.locate(source)
    if source_format == "run" and checkpoint is None and not to:
        raise UsageError("--to: a run can go to compvis or diffusers; say which")
    to = to or "run"
    _check_target(run, target, to, overwrite)
    bundle = read(source, reading or Reading())
    if to == "compvis" and (reason := compvis_write.why_not(bundle)):
        raise ModelError(f"{source}: not a model that the code of latent-diffusion can build: {reason}")
    bundle, left_out = (bundle, []) if to == "run" else _without_guiding(bundle)
    with _staged(target) as place:
        notes = left_out + _write(bundle, place, to, source, source_format)
    return _description(bundle) | {
        "source": str(source),
        "format": source_format,
        "target": str(target),
        "to": to,
        "notes": [*bundle.notes, *notes],
    }


def _without_guiding(bundle: Bundle) -> tuple[Bundle, list[str]]:
    """The bundle as other formats hold it, and what has to be said of that."""
    if not isinstance(bundle, DiffusionBundle) or bundle.guiding is None:
        return bundle, []
    config = bundle.config
    bundle = replace(bundle, guiding=None, config=replace(config, sample=replace(config.sample, autoguidance=1.0)))
    return bundle, ["its guiding model is left out, so that pictures there are drawn without autoguidance"]


def _write(bundle: Bundle, place: Path, to: str, source: Path, source_format: str) -> list[str]:
    if to == "run":
        run_folder.write(bundle, place, {"name": source.name, "format": source_format})
        return []
    if to == "compvis":
        notes = compvis_write.write(bundle, place)
        tokenizer = getattr(bundle, "tokenizer", None)
        if tokenizer is not None:
            shutil.copytree(tokenizer, _tokenizer_beside(place))
        return notes
    return diffusers.write(bundle, place, runs.locate(source)[0] if source_format == "run" else None)


def _description(bundle: Bundle) -> dict[str, Any]:
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
    if target.is_symlink() and not target.exists():
        raise UsageError(f"{target}: a link to nothing; choose another name")
    if to == "compvis":
        _check_file(target, overwrite)
    elif target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not overwrite:
            raise UsageError(f"{target}: exists; --overwrite replaces it")
        foreign = _foreign(target)
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            what = "" if foreign == [target] else f" ({foreign[0]}{more})"
            raise UsageError(
                f"{target}: holds something other than a model{what}, which --overwrite does not replace; "
                "move it away or choose another name"
            )


def _check_file(target: Path, overwrite: bool) -> None:
    """As above for a checkpoint, whose configuration and tokenizer lie beside it."""
    yaml, tokenizer = target.with_suffix(".yaml"), _tokenizer_beside(target)
    taken = [path for path in (target, yaml, tokenizer) if path.exists()]
    if taken and not overwrite:
        raise UsageError(f"{taken[0]}: exists; --overwrite replaces it")
    wrong = [target] if target.is_dir() else []
    wrong += [yaml] if yaml.exists() and not _is_configuration(yaml) else []
    wrong += [path for path in files.files_below(tokenizer) if not _OF_MODELS.fullmatch(path.name)]
    if wrong:
        raise UsageError(
            f"{wrong[0]}: no part of a checkpoint, so --overwrite does not replace it; move it away or "
            "choose another name"
        )


def _tokenizer_beside(target: Path) -> Path:
    return target.with_name(f"{target.stem}-tokenizer")


def _is_configuration(path: Path) -> bool:
    """Whether a YAML names the class of a model, as those of CompVis do."""
    import yaml

    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return False
    return isinstance(model, dict) and "target" in model


def _foreign(folder: Path) -> list[Path]:
    """What of a folder is no part of a model; the folder itself where nothing in it says that it is one."""
    if not folder.is_dir():
        return [folder]
    run = runs.is_run(folder)
    if not run and not any(_describes_model(folder / name) for name in ("model_index.json", "config.json")):
        return [folder]
    own = set(runs.own_files(folder)) if run else set()
    return [path for path in files.files_below(folder) if path not in own and not _is_part(path, run)]


def _is_part(path: Path, run: bool) -> bool:
    if path.name == "README.md":
        return card_is_models(path)
    if path.name == "samples.png":
        card = path.with_name("README.md")
        return marked(path) or card.is_file() and "Exported for diffusers: " in card.read_text(encoding="utf-8")
    return not run and _OF_MODELS.fullmatch(path.name) is not None


def _describes_model(path: Path) -> bool:
    try:
        found = files.read_json(path)
    except ModelError:
        return False
    return isinstance(found, dict) and bool({"_class_name", "model_type", "architectures"} & set(found))


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A place beside `target` to write in; what stands there becomes `target` (with what lies beside it) at the end."""
    target = target.resolve() if target.is_symlink() else target
    stage = files.temporary_path(target)
    shutil.rmtree(stage, ignore_errors=True)
    with files.writing(target):
        stage.mkdir(parents=True)
    try:
        yield stage / target.name
        for path in sorted(stage.iterdir(), key=lambda path: path.name == target.name):
            final = target.with_name(path.name)
            if final.is_dir():  # out of the way first: a kill leaves the old one or the new one, whole
                os.replace(final, stage / f"{path.name}.before")
            os.replace(path, final)
    finally:
        shutil.rmtree(stage, ignore_errors=True)

"""Folders for models without a stock pipeline: parts that have a class of diffusers as single-model folders, the rest
as a component whose code lies beside its weights. Nothing in such a folder needs this package.

diffusers fetches one code file a component, so the sources that are needed stand in that one file as text, each line
behind a bar, and become modules under a name of their own when it is loaded.
"""

import ast
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ldmcli
from ldmcli.core import files
from ldmcli.core.errors import ModelError
from ldmcli.core.settings import (
    AutoencoderConfig,
    AutoencoderSettings,
    ConditionSettings,
    DataSettings,
    DiffusionConfig,
    DiffusionSettings,
    DistillSettings,
    SampleSettings,
    TaskSettings,
)
from ldmcli.formats.bundle import AutoencoderBundle, DiffusionBundle
from ldmcli.formats.diffusers_files import read_config, read_weights, write_model
from ldmcli.networks.latent_scale import LatentScale

PIPELINE, COMPONENT = "LatentDiffusionPipeline", "LatentDiffusion"
SECTIONS: dict[str, type] = {
    "data": DataSettings,
    "diffusion": DiffusionSettings,
    "condition": ConditionSettings,
    "task": TaskSettings,
    "sample": SampleSettings,
    "distill": DistillSettings,
}
_LOADER = '''"""{title}. Made by ldm {version}; the sources are those of that package, under Apache-2.0."""

import linecache
import sys
import types

PACKAGE = "{package}"
SOURCES = {{}}
{sources}

def _modules():
    """Makes a module of each source, in order, the packages above them first."""
    for name, text in SOURCES.items():
        parts = f"{{PACKAGE}}.{{name}}".split(".")
        for k in range(1, len(parts)):
            above = ".".join(parts[:k])
            if above not in sys.modules:
                sys.modules[above] = types.ModuleType(above)
                sys.modules[above].__path__ = []
        full = ".".join(parts)
        if full in sys.modules:
            continue
        source = "\\n".join(line[1:] for line in text.splitlines()[1:]) + "\\n"
        linecache.cache[f"<{{full}}>"] = (len(source), None, source.splitlines(True), f"<{{full}}>")
        module = sys.modules[full] = types.ModuleType(full)
        exec(compile(source, f"<{{full}}>", "exec"), module.__dict__)
        setattr(sys.modules[full.rpartition(".")[0]], parts[-1], module)
    return sys.modules[f"{{PACKAGE}}.formats.exported_model"]


{component} = _modules().{component}
{component}.__module__ = __name__
'''


def _imports(tree: ast.Module) -> list[str]:
    """Modules of ours that a source names, in order."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldmcli."):
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in below if _path(name).is_file()] or [node.module or ""]
    return found


def _path(module: str) -> Path:
    return Path(ldmcli.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")


def sources(module: str = "ldmcli.formats.exported_model") -> dict[str, str]:
    """{module: text} of a module of ours and of all that it imports, those that are imported first."""
    found: dict[str, str] = {}

    def add(name: str) -> None:
        if name in found:
            return
        text = _path(name).read_text(encoding="utf-8")
        for needed in _imports(ast.parse(text)):
            if needed != name:
                add(needed)
        found[name] = text

    add(module)
    return found


def component_code() -> tuple[str, str]:
    """(name of the module, its text) of the component's one code file. The name goes with the content, because modules
    of several exports meet in one process."""
    texts = sources()
    digest = hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:10]
    package, blocks = f"ldm_{digest}", []
    for name, text in texts.items():
        text = text.replace("from ldmcli.", f"from {package}.")
        if "'''" in text:
            raise ModelError(f"{name}: cannot be exported, its source has three quotes in a row")
        barred = "\n".join(f"|{line}" for line in text.rstrip("\n").splitlines())
        blocks.append(f"SOURCES[{name.removeprefix('ldmcli.')!r}] = r'''\n{barred}\n'''")
    code = _LOADER.format(
        title="The own part of a latent diffusion model",
        version=ldmcli.__version__,
        package=package,
        sources="\n".join(blocks),
        component=COMPONENT,
    )
    return f"model_{digest}", code


def write_component(bundle: DiffusionBundle, folder: Path, *, own_unet: bool, own_autoencoder: bool) -> list[str]:
    """The folder model/ and pipeline.py; returns the entry for model_index.json."""
    if bundle.autoencoder is not None:
        stage = bundle.autoencoder.config.autoencoder
    else:
        stage = AutoencoderSettings(f=1, in_channels=bundle.latent_shape[0])
    config = bundle.config
    settings = {name: asdict(getattr(config, name)) for name in SECTIONS} | {"autoencoder": asdict(stage)}
    described = {
        "_class_name": COMPONENT,
        "_diffusers_version": "0.42.1",
        "settings": settings,
        "kinds": list(config.kinds),
        "facts": bundle.specs,
        "latent_shape": list(bundle.latent_shape),
        "own_unet": own_unet,
        "own_autoencoder": own_autoencoder,
        "_notes": bundle.notes,
    }
    tensors = {name: tensor for name, tensor in bundle.tensors.items() if own_unet or not name.startswith("unet.")}
    if own_autoencoder and bundle.autoencoder is not None:
        tensors |= {f"autoencoder.{name}": tensor for name, tensor in bundle.autoencoder.tensors.items()}
    tensors["latent_mean"] = torch.tensor(bundle.scale.mean)
    tensors["latent_std"] = torch.tensor(bundle.scale.std)
    write_model(folder / "model", described, tensors)
    # the statistics as written above are rounded to float32; those of a run are not
    files.write_json(folder / "model" / "latents.json", {"mean": bundle.scale.mean, "std": bundle.scale.std})
    module, code = component_code()
    files.write_text(folder / "model" / f"{module}.py", code)
    files.write_text(folder / "pipeline.py", _path("ldmcli.formats.exported_pipeline").read_text(encoding="utf-8"))
    return [module, COMPONENT]


def _made(kind: type, values: dict[str, Any], path: Path):
    from dataclasses import fields

    known = {field.name for field in fields(kind)}
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})
    except (TypeError, AttributeError) as error:
        raise ModelError(f"{path}: settings of another form ({error})") from error


def read_component(folder: Path) -> tuple[DiffusionBundle, dict[str, Any]]:
    """(bundle with the tensors that model/ holds, its config.json). The code beside them is not looked at."""
    path = folder / "model" / "config.json"
    described = read_config(path)
    try:
        settings, shape = {"distill": {}, **described["settings"]}, tuple(map(int, described["latent_shape"]))
        sections = {name: _made(kind, settings[name], path) for name, kind in SECTIONS.items()}
        stage = _made(AutoencoderSettings, settings["autoencoder"], path)
        specs, kinds = dict(described["facts"]), described["kinds"]
        own = bool(described["own_autoencoder"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: not written by `ldm convert` ({error})") from error
    config = DiffusionConfig(**sections)
    if list(config.kinds) != list(kinds) or len(shape) != 3:
        raise ModelError(f"{path}: kinds {kinds} do not go with its settings")
    tensors = read_weights(folder / "model")
    scale = _scale(folder / "model" / "latents.json", tensors.pop("latent_mean"), tensors.pop("latent_std"))
    first = {name: tensors.pop(name) for name in list(tensors) if name.startswith("autoencoder.")}
    autoencoder = None
    if own and stage.f > 1:
        named = {name.removeprefix("autoencoder."): tensor for name, tensor in first.items()}
        size = (shape[1] * stage.f, shape[2] * stage.f)
        whole = AutoencoderConfig(autoencoder=stage, data=DataSettings(size=size))
        autoencoder = AutoencoderBundle(whole, named, scale)
    notes = [note for note in described.get("_notes") or [] if isinstance(note, str)]
    bundle = DiffusionBundle(config, tensors, autoencoder, scale, (shape[0], shape[1], shape[2]), specs, None, notes)
    return bundle, described


def _scale(path: Path, mean: Tensor, std: Tensor) -> LatentScale:
    """The scale in full precision, where it rounds to what stands among the weights."""
    if path.is_file():
        found = read_config(path)
        exact = LatentScale(tuple(map(float, found["mean"])), tuple(map(float, found["std"])))
        if torch.equal(torch.tensor(exact.mean), mean) and torch.equal(torch.tensor(exact.std), std):
            return exact
    return LatentScale(tuple(mean.tolist()), tuple(std.tolist()))

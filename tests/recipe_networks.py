"""The recipes, resolved, and the networks that they build, on the meta device."""

import functools
from pathlib import Path

import torch

from ldmcli.cli.manage import recipe_summary
from ldmcli.core import config
from ldmcli.networks.latent_diffusion import DiffusionModel

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.toml"))}


@functools.cache
def resolved(name: str) -> config.Resolved:
    kind = {command: kind for kind, command in config.COMMAND_OF.items()}[recipe_summary(RECIPES[name])["command"]]
    return config.resolve(kind, config.recipe_layers(kind, name))


@functools.cache
def command(name: str) -> list[str]:
    return recipe_summary(RECIPES[name])["head"]["command"].split()


@functools.cache
def writer_of(run: str) -> str:
    """The recipe whose command writes the run folder that another one reads."""

    def out(words: list[str]) -> str:
        return words[words.index("--out") + 1] if "--out" in words else ""

    [name] = [name for name in RECIPES if out(command(name)) == run]
    return name


@functools.cache
def first_stage(name: str) -> tuple[int, int]:
    """Channels of the latent and f, of the run that a recipe's command names; pixels where it names none."""
    words = command(name)
    if "--init-from" in words:
        return first_stage(writer_of(words[words.index("--init-from") + 1]))
    run = words[words.index("--autoencoder") + 1]
    if run == "none":
        return 3, 1
    settings = resolved(writer_of(run)).config.autoencoder
    return settings.embed_dim, settings.f


@functools.cache
def diffusion_model(name: str) -> DiffusionModel:
    settings = resolved(name).config
    channels, f = first_stage(name)
    height, width = settings.data.size
    facts = {
        "class": {"class_names": [str(index) for index in range(1000)]},
        "text": {"length": 77, "vocabulary": 30522},
        "layout": {"categories": ["thing"], "length": 92, "vocabulary": 8192},
        "map": {"classes": 182, "names": [], "out_channels": 3, "stages": f.bit_length() - 1},
        "lowres": {"scale": settings.task.scale, "f": f},
        "masked": {"channels": channels},
    }
    with torch.device("meta"):
        return DiffusionModel(
            settings.diffusion, settings.condition, facts, None, (channels, height // f, width // f), settings.kinds
        )


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""Command lines as people type them, with networks and data made small by settings from the environment.

`small_networks(folder)` makes a folder to type in; lines stay as they stand.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ldmcli.core import config
from ldmcli.evaluation import extractors

SMALL = {
    "data.limit": 24,
    "train.batch_size": 4,
    "train.steps": 3,
    "train.mixed_precision": "no",
    "train.sample_every": 0,
    "autoencoder.channels": 8,
    "autoencoder.num_res_blocks": 1,
    "diffusion.channels": 16,
    "diffusion.channel_mult": "1",
    "diffusion.groups": 4,
    "diffusion.attention_resolutions": "1",
    "diffusion.head_channels": 8,
    "condition.context_dim": 16,
    "condition.text_heads": 2,
    "condition.text_head_channels": 8,
}


def environment(settings: dict) -> dict[str, str]:
    """The variables that set these settings."""
    return {f"LDM_{path.replace('.', '_').upper()}": str(value) for path, value in settings.items()}


@contextlib.contextmanager
def small_networks(folder: Path) -> Iterator[Path]:
    """`folder` as the current one, small settings, a cache of its own, and a feature network on small pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in (environment(SMALL) | {"LDM_CACHE": str(folder / "cache")}).items():
            patch.setenv(name, value)
        patch.setattr("ldmcli.reports.demo._resolved", small_resolved)
        patch.setattr("ldmcli.reports.demo.HELD_OUT", 6)
        patch.setitem(extractors.NETWORKS, "effnet-lite0", replace(extractors.NETWORKS["effnet-lite0"], size=32))
        extractors._cached.cache_clear()  # an extractor of 224 px that another test has opened
        yield folder
    extractors._cached.cache_clear()


def small_resolved(kind: str, values: dict, preset: str = ""):
    """`ldm demo` chooses its settings itself and reads no environment."""
    layers = [config.preset_layer(kind, preset)] if preset else []
    small = [layer for layer in config.environment_layers(kind, environment(SMALL))]
    return config.resolve(kind, [*layers, ("ldm demo", values), *small])

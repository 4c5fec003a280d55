"""`ldm bench --suite gpu`: published and own networks, each with what the settings of this toolkit change."""

import time
from dataclasses import replace
from typing import Any

import torch

from ldmcli.core import config as configuration
from ldmcli.core import console
from ldmcli.core.errors import ResourceError
from ldmcli.core.presets import PRESETS
from ldmcli.core.settings import AutoencoderConfig
from ldmcli.studies.bench import BenchRequest, bench, with_variant
from ldmcli.studies.bench_subjects import Asked

# what makes a network so small that any machine tries the suite in seconds
TINY = {
    "autoencoder": {
        "autoencoder.channels": 8,
        "autoencoder.num_res_blocks": 1,
        "autoencoder.codebook_size": 16,
        "autoencoder.groups": 4,
        "loss.disc_channels": 4,
        "loss.disc_layers": 1,
        "loss.perceptual": "squeeze",
        "data.size": (32, 32),
    },
    "diffusion": {
        "diffusion.channels": 8,
        "diffusion.groups": 4,
        "diffusion.num_res_blocks": 1,
        "condition.context_dim": 16,
        "data.size": (32, 32),
        "sample.steps": 2,
    },
}
EAGER: dict[str, dict[str, Any]] = {"": {}}
COMPILED: dict[str, dict[str, Any]] = {"compiled": {"compile": True}}
# (preset, batch, works, variants): a variant is settings of [train]. What is eager comes first: compilers take minutes
SUITE: tuple[tuple[str, int, tuple[str, ...], dict[str, dict[str, Any]]], ...] = (
    ("cin256-v2", 64, ("train", "sample"), EAGER),
    ("lsun_beds256", 48, ("train",), EAGER),
    ("kl-f8", 8, ("train", "encode", "decode"), EAGER),
    ("small-ae", 64, ("train", "encode", "decode"), EAGER),
    ("small", 64, ("train", "sample"), EAGER),
    ("cin256-v2", 64, ("train",), {"float32 without TF32": {"mixed_precision": "no", "tf32": False}}),
    ("cin256-v2", 64, ("train",), {"TF32": {"mixed_precision": "no"}}),
    ("cin256-v2", 64, ("train", "sample"), COMPILED),
    ("lsun_beds256", 48, ("train",), COMPILED),
    ("small", 64, ("train", "sample"), COMPILED),
)
SECONDS, STEPS = 4.0, 20
LATEST = 330.0  # seconds after which no compiled network is begun: with the last one it is 8 minutes at most


def gpu_suite(request: BenchRequest, *, tiny: bool = False) -> dict[str, Any]:
    """The document of `bench` for the suite, at most 8 minutes on one H100 or H200. Raises ResourceError without a GPU,
    unless `tiny`."""
    if not tiny and not torch.cuda.is_available():
        raise ResourceError("--suite gpu: no GPU is here; --tiny tries the suite with tiny networks on any device")
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {}
    rates: dict[str, float] = {}
    begun = time.monotonic()
    for name, batch, works, variants in SUITE:
        if variants is COMPILED and (tiny or time.monotonic() - begun > LATEST):
            if not tiny:  # compilers take minutes on a CPU whatever the network's size
                console.warn(f"{name}, compiled, is left out: {LATEST:.0f} seconds are over")
            continue
        one = replace(
            request,
            asked=tuple(with_variant(_asked(name, tiny), label, **settings) for label, settings in variants.items()),
            works=request.works or works,
            batch_sizes=request.batch_sizes or ((2,) if tiny else (batch,)),
            steps=request.steps or (2 if tiny else STEPS),
            seconds=0.05 if tiny else min(request.seconds, SECONDS),
        )
        document = bench(one)
        rows += document["rows"]
        rates |= document["product_flops_per_s"]
    return document | {"rows": rows, "product_flops_per_s": rates}


def _asked(name: str, tiny: bool) -> Asked:
    kind = PRESETS[name].kind
    stage = str(PRESETS[name].extra.get("first_stage", "")) if kind == "diffusion" else ""
    found = _config(kind, name, tiny)
    first: Any = _config("autoencoder", stage, tiny) if kind == "diffusion" else None
    assert first is None or isinstance(first, AutoencoderConfig)
    return Asked(name=name, kind=kind, config=found, first_stage=first)


def _config(kind: str, preset: str, tiny: bool) -> Any:
    layers = [configuration.preset_layer(kind, preset)] if preset else []
    small = [("--tiny", TINY[kind])] if tiny else []
    return configuration.resolve(kind, [*layers, *small]).config

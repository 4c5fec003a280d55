"""Values of conditions beside and inside of samples: pictures, captions, metadata, hashes."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldmcli.conditions import CONDITIONS
from ldmcli.conditions.condition import Spec
from ldmcli.conditions.dataset import ConditionDataset
from ldmcli.conditions.parse import request_values
from ldmcli.networks.conditioners import Conditions


def spatial(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Those of the conditions that can be shown as pictures."""
    return [name for name, one in CONDITIONS.items() if name in names and one.spatial]


def metadata(values: Mapping[str, Sequence], k: int) -> dict[str, Any]:
    """The values of sample k, as JSON; sample k takes entry k mod their number."""
    return {
        CONDITIONS[name].metadata_key or name: CONDITIONS[name].metadata(given[k % len(given)])
        for name, given in values.items()
    }


def digest(values: Mapping[str, Sequence]) -> str:
    """Hash of the spatial values that a request stands for: their files may change."""
    found = hashlib.sha256()
    for name in spatial(values):
        for value in values[name]:
            for part in CONDITIONS[name].arrays(value):
                found.update(f"{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
    return found.hexdigest()


def caption(values: Mapping[str, Sequence], conditions: Conditions, k: int) -> str:
    """A line above sample k of a sheet: the name of its class; "" where there is a prompt, which is too long."""
    named = [name for name in values if CONDITIONS[name].static]
    if not all(CONDITIONS[name].short for name in named):
        return ""
    return ", ".join(
        CONDITIONS[name].described(values[name][k % len(values[name])], conditions.conditioners[name].names)
        for name in named
    )


def beside(name: str, sample: np.ndarray, value: Any, conditions: Conditions) -> np.ndarray:
    """What stands beside a sample: it with its boxes drawn, or its map with a legend of the classes in it."""
    return CONDITIONS[name].beside(sample, value, conditions.conditioners[name].names)


def picture(name: str, value: Any, size: tuple[int, int], conditions: Conditions) -> np.ndarray:
    """A value of a spatial condition as uint8 (H, W, 3) of `size`."""
    return CONDITIONS[name].picture(value, size, conditions.conditioners[name].names)


def preview_values(dataset: ConditionDataset, ids: Sequence[int], specs: Mapping[str, Spec]) -> dict[str, list]:
    """What previews of a training show of static conditions, of rows `ids`."""
    return {
        name: one.preview_values(dataset, ids, specs[name])
        for name, one in CONDITIONS.items()
        if name in specs and one.static
    }


def preview_captions(request: Mapping[str, Any], names: Sequence[str], specs: Mapping[str, Spec]) -> list[str]:
    """The values that each sample of a preview is conditioned on, of the request in stats.json; [] where the sheet
    itself shows them, as boxes. names: the model's conditions."""
    if any(name not in CONDITIONS or not CONDITIONS[name].static for name in names):
        return []
    described = []
    for name, given in request_values(request).items():
        known = CONDITIONS[name].names_of(specs.get(name) or {})
        described.append([CONDITIONS[name].described(value, known) for value in given])
    if len(described) < 2:
        return described[0] if described else []
    return [f"{first} ({', '.join(rest)})" for first, *rest in zip(*described)]

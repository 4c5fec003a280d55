"""Recorded outputs of the original implementation, where the shared folder of reference cases is at hand."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

SHARED = Path(os.environ.get("LDM_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def shared(*parts: str) -> Path:
    """A path in the shared folder; skips the test where it is not there."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"reference case {'/'.join(parts)} not found; set LDM_SHARED to the folder that holds it")
    return path


def golden(case: str) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """Configuration, state dict and recorded tensors of a case."""
    folder = shared("golden", case)
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors"), load_file(folder / "io.safetensors")


def strip_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def randomised(module: torch.nn.Module, seed: int = 0, std: float = 0.05) -> torch.nn.Module:
    """The module with all parameters moved off their start, so that zero-initialised branches count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return module

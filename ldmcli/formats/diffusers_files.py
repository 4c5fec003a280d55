"""Files of a diffusers folder: configurations, weights (whole, in shards, variants, pickled), and names translated.

`translate` and `translate_back` are driven by the names of our own networks, so nothing of ours can be forgotten and
nothing of theirs goes unnoticed.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ldmcli.core import files
from ldmcli.core.errors import ModelError
from ldmcli.formats.pickles import read_state_dict

MODEL = "diffusion_pytorch_model"
MOST_LAYERS = 256  # a level or a stack; more is damage, which must not cost memory
VARIANTS = ("", "fp32", "ema", "fp16", "bf16")  # in the order in which they are taken; then others
LARGEST_SHARD = 10 * 2**30  # bytes of weights a file, as diffusers cuts them
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_config(path: Path) -> dict[str, Any]:
    """A configuration as JSON (with the Infinity that schedulers write). Raises ModelError where it is no object."""
    config = files.read_json(path)
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a configuration (a JSON object is expected)")
    return config


class Config:
    """A model's config.json over the defaults of its class. `unset` collects what was neither read nor a default."""

    def __init__(self, path: Path, values: dict[str, Any], defaults: dict[str, Any]):
        self.path, self.values = path, {**defaults, **{k: v for k, v in values.items() if not k.startswith("_")}}

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    def refuse(self, key: str, why: str) -> ModelError:
        """The error for a key that cannot be expressed here."""
        return ModelError(f"{self.path}: {key} = {json.dumps(self[key])}: {why}")

    def only(self, **allowed: tuple) -> None:
        """Raises ModelError, naming the key, where a value is not among those that these networks can express."""
        for key, values in allowed.items():
            found = self[key]
            if not any(found == value and (found is None) == (value is None) for value in values):
                shown = " or ".join(json.dumps(value) for value in values)
                raise self.refuse(key, f"these networks know {shown}")

    def integer(self, key: str, most: int = 2**24) -> int:
        """A positive whole number up to `most`. Raises ModelError for anything else."""
        if isinstance(self[key], bool) or not isinstance(self[key], int) or not 0 < self[key] <= most:
            raise self.refuse(key, f"a whole number from 1 to {most} is expected")
        return self[key]

    def integers(self, key: str) -> list[int]:
        """A list of positive whole numbers, not empty."""
        found = self[key]
        if not isinstance(found, list) or not 0 < len(found) <= 16:
            raise self.refuse(key, "a list of whole numbers is expected")
        if any(isinstance(v, bool) or not isinstance(v, int) or not 0 < v < 2**24 for v in found):
            raise self.refuse(key, "a list of positive whole numbers is expected")
        return found

    def side(self, key: str, default: int) -> tuple[int, int]:
        """A size, as one number or two: (height, width)."""
        found = self[key]
        if found is None:
            return default, default
        if isinstance(found, list):
            height, width = self.integers(key)[:2] if len(found) == 2 else (0, 0)
            if not height:
                raise self.refuse(key, "one side or two are expected")
            return height, width
        return self.integer(key), self.integer(key)


def read_weights(folder: Path, stem: str = MODEL, notes: list[str] | None = None) -> dict[str, Tensor]:
    """All tensors of a model folder in float32. stem: "model" for the classes of transformers.

    Taken in this order: STEM.safetensors, its shards, a variant of lower precision, another one, the same as pickled
    .bin; where several lie there, `notes` says which was taken. Raises ModelError when nothing is there, when an
    index leads out of the folder, or names a file that lacks its tensors, and for NaN or Inf, naming the tensor.
    """
    there = _weight_files(folder, stem)
    if not there:
        raise ModelError(f"{folder}: no weights ({stem}.safetensors, its index, or a .bin)")
    variant, path = there[0]
    others = [other.name for _, other in there[1:]]
    if notes is not None and (variant or others):
        more = f"; not read: {', '.join(others[:3])}{' …' if len(others) > 3 else ''}" if others else ""
        notes.append(f"weights of {folder.name}/{path.name}{more}")
    tensors = _read_file(path)
    files.require_finite(tensors, path)
    tensors = {files.plain_name(name): tensor for name, tensor in tensors.items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _weight_files(folder: Path, stem: str) -> list[tuple[str, Path]]:
    """(variant, file) of everything that holds, or lists, all weights of a folder, what to take first."""
    stems = "|".join(map(re.escape, {stem, "pytorch_model"}))
    pattern = re.compile(
        rf"({stems})(\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)"
        r"(?P<index>\.index(\.(?P<late>\w+))?\.json)?"
    )
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and (match := pattern.fullmatch(path.name)):
            variant = match["variant"] or match["late"] or ""
            rank = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
            found.append((match["kind"] == "bin", rank, bool(match["index"]), variant, path))
    return [(variant, path) for *_, variant, path in sorted(found)]


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".json":
        return _shards(path)
    if path.suffix == ".safetensors":
        return files.load_tensors(path, verify=False)[0]
    return read_state_dict(path)


def _shards(index: Path) -> dict[str, Tensor]:
    table = read_config(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ModelError(f"{index}: no weight_map in it")
    for name in set(table.values()):
        if PurePosixPath(name).name != name or "\\" in name or not name.endswith((".safetensors", ".bin")):
            raise ModelError(f"{index}: weight_map leads to {name!r}; files beside the index are expected")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(table.values())):
        tensors |= _read_file(index.parent / name)
    absent = sorted(set(table) - set(tensors))
    if absent:
        raise ModelError(f"{index}: names {absent[0]} and {len(absent) - 1} more that its files do not hold")
    return tensors


def write_model(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], stem: str = MODEL) -> None:
    """config.json and the weights, in shards where they are large; the index is written last."""
    files.write_json(folder / "config.json", config)
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        count = tensor.numel() * tensor.element_size()
        if size and size + count > LARGEST_SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + count, total + count
    if len(shards) == 1:
        files.save_tensors(folder / f"{stem}.safetensors", tensors)
        return
    table: dict[str, str] = {}
    for k, shard in enumerate(shards, 1):
        name = f"{stem}-{k:05d}-of-{len(shards):05d}.safetensors"
        files.save_tensors(folder / name, shard)
        table |= dict.fromkeys(shard, name)
    files.write_json(
        folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": table}
    )


@dataclass
class Names:
    """Where parts of our network are found in theirs.

    roots: our module -> theirs, what lies below keeps its name; qkv: our joint projection -> (their attention, heads);
    matrices: our 1x1 convolutions that are matrices there.
    """

    roots: dict[str, str] = field(default_factory=dict)
    qkv: dict[str, tuple[str, int]] = field(default_factory=dict)
    matrices: set[str] = field(default_factory=set)

    def of(self, module: str) -> str:
        """Their name of our module: by the longest root it lies below."""
        root = module
        while root not in self.roots:
            root, dot, _ = root.rpartition(".")
            if not dot:
                return module
        return self.roots[root] + module[len(root) :]


def translate(names: Names, theirs: dict[str, Tensor], ours: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Their tensors under our names. ours: our network's state dict (its shapes; it may be on the meta device).

    Raises ModelError with the first three that are missing, unknown, or of another shape.
    """
    left = {_modern(name): tensor for name, tensor in theirs.items()}
    out: dict[str, Tensor] = {}
    missing, misshapen = [], []
    for name, wanted in ours.items():
        module, _, leaf = name.rpartition(".")
        if module in names.qkv:
            prefix, heads = names.qkv[module]
            keys = [f"{prefix}.to_{part}.{leaf}" for part in "qkv"]
        else:
            prefix, heads = "", 0
            keys = [f"{names.of(module)}.{leaf}"]
        parts = [left.pop(key, None) for key in keys]
        missing += [key for key, part in zip(keys, parts) if part is None]
        found = [part for part in parts if part is not None]
        if len(found) < len(keys):
            continue
        shape = tuple(wanted.shape)
        if heads:
            shape = (shape[0] // 3, *shape[1:2])
        elif module in names.matrices and leaf == "weight":
            shape = shape[:2]
        bad = [key for key, part in zip(keys, found) if tuple(part.shape) != shape]
        misshapen += bad
        if not bad:
            joined = _join_heads(found, heads) if heads else found[0]
            out[name] = joined.reshape(wanted.shape)
    _complain(where, missing, sorted(left), misshapen)
    return out


def _complain(where: Path, missing: list[str], unknown: list[str], misshapen: list[str]) -> None:
    groups = (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
    parts = [
        f"{what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''} ({len(names)})"
        for what, names in groups
        if names
    ]
    if parts:
        raise ModelError(f"{where}: weights do not fit the configuration; {'; '.join(parts)}")


def _modern(name: str) -> str:
    """Attention of old files had other names."""
    return re.sub(r"\.(query|key|value|proj_attn)\.(weight|bias)$", lambda m: f".{OLD_ATTENTION[m[1]]}.{m[2]}", name)


def _join_heads(parts: list[Tensor], heads: int) -> Tensor:
    """Separate q, k, v (C, …) -> one (3C, …) in our order (head, {q, k, v}, d)."""
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)


def translate_back(names: Names, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names."""
    out = {}
    for name, tensor in ours.items():
        module, _, leaf = name.rpartition(".")
        if module in names.qkv:
            prefix, heads = names.qkv[module]
            split = tensor.unflatten(0, (heads, 3, -1))
            for index, part in enumerate("qkv"):
                piece = split[:, index].flatten(0, 1)
                out[f"{prefix}.to_{part}.{leaf}"] = piece.reshape(piece.shape[:2]).contiguous()
            continue
        if module in names.matrices and leaf == "weight":
            tensor = tensor.reshape(tensor.shape[:2])
        out[f"{names.of(module)}.{leaf}"] = tensor
    return out

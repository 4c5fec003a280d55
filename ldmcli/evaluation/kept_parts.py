"""What an evaluation has found so far, kept in the cache until its result is complete.

A pass (`passes.py`) has a folder of its own there, named by everything that its numbers depend on, and a file for each
finished block. The folder goes when the result is complete. What a killed evaluation left goes after `DAYS` without a
second start. Passes whose features take more than `MOST` bytes are not kept.
"""

import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldmcli.core import console
from ldmcli.core.errors import LdmError
from ldmcli.core.files import atomic_path
from ldmcli.data.cache import cache_key, cache_root

DAYS = 14
MOST = 2**33  # bytes


@dataclass
class Side:
    """Of the images of one side of a block: content hashes, (height, width), and features and logits by network."""

    hashes: list[str]
    sizes: list[tuple[int, int]]
    found: list[tuple[np.ndarray, np.ndarray]]


@dataclass
class Part:
    """Everything that is kept of a block of images; the fields are those of `Pass`. seconds: by stage, not kept."""

    sides: list[Side]
    values: dict[str, list[float]]
    arrays: dict[str, np.ndarray]
    sums: dict[str, np.ndarray]
    seconds: dict[str, float] = field(default_factory=dict)

    def in_arrays(self) -> dict[str, np.ndarray]:
        """As arrays of an .npz."""
        out: dict[str, np.ndarray] = {"networks": np.array([len(side.found) for side in self.sides])}
        for s, side in enumerate(self.sides):
            out |= {f"hashes {s}": np.array(side.hashes), f"sizes {s}": np.array(side.sizes)}
            for k, (features, logits) in enumerate(side.found):
                out |= {f"features {s} {k}": features, f"logits {s} {k}": logits}
        out |= {f"values {name}": np.array(found, np.float64) for name, found in self.values.items()}
        out |= {f"array {name}": found for name, found in self.arrays.items()}
        return out | {f"sum {name}": found for name, found in self.sums.items()}


def part_of(stored: Mapping[str, np.ndarray]) -> Part:
    """What `Part.in_arrays` gave. Raises KeyError where something lacks."""
    sides = []
    for s, networks in enumerate(stored["networks"]):
        found = [(stored[f"features {s} {k}"], stored[f"logits {s} {k}"]) for k in range(int(networks))]
        sizes = [(int(height), int(width)) for height, width in stored[f"sizes {s}"]]
        sides.append(Side([str(name) for name in stored[f"hashes {s}"]], sizes, found))

    def named(kind: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(f"{kind} "): stored[name] for name in stored if name.startswith(f"{kind} ")}

    values = {name: found.tolist() for name, found in named("values").items()}
    return Part(sides, values, named("array"), named("sum"))


class PartStore:
    """The parts of one pass. folder: where they lie, None where none are kept. name: of a block, by its content."""

    def __init__(self, folder: Path | None, name: Callable[[range], str]):
        self.folder, self.name = folder, name

    def known(self, blocks: Sequence[range]) -> list[int]:
        """Numbers of the blocks that are kept and whole."""
        if self.folder is None or not self.folder.is_dir():
            return []
        return [k for k, block in enumerate(blocks) if self.read(block) is not None]

    def read(self, block: range) -> Part | None:
        """The part of a block; None where there is none, or a damaged one."""
        path = self._path(block)
        if path is None or not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                part = part_of({name: file[name] for name in file.files})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return part if all(len(side.hashes) == len(block) for side in part.sides) else None

    def write(self, block: range, part: Part) -> None:
        """Keeps a part; where the cache takes no more, that is said once, and nothing is kept from then on."""
        path = self._path(block)
        if path is None:
            return
        try:
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, allow_pickle=False, **part.in_arrays())
        except (LdmError, OSError) as error:
            console.warn(f"what is measured is not kept for a second start: {error}")
            self.folder = None

    def remove(self) -> None:
        """Removes everything that is kept."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, block: range) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.name(block)}.npz"


def open_store(identity: Sequence[Any], name: Callable[[range], str], size: int) -> PartStore:
    """The store of a pass. identity: what its parts depend on; () where that is not known, so that nothing is kept.
    size: bytes that the parts will take."""
    root = cache_root("") if identity and size <= MOST else None
    if root is None:
        return PartStore(None, name)
    passes = root / "features" / "passes"
    _remove_old(passes)
    return PartStore(passes / cache_key("pass-1", *map(str, identity)), name)


def _remove_old(passes: Path) -> None:
    """Removes what was left by evaluations that nobody went on with for `DAYS`."""
    try:
        old = [path for path in passes.iterdir() if path.stat().st_mtime < time.time() - DAYS * 86400]
    except OSError:
        return
    for path in old:
        shutil.rmtree(path, ignore_errors=True)

"""Latents encoded once: a content-addressed store of posterior moments, of each image and of its mirror image.

The store of one (autoencoder, transform, dtype) is a folder of immutable shards: `NAME.npy` holds moments
(N, v, c, h, w), where the second axis is (as is, mirrored), or as is alone where flips are off; `NAME.json` lists the
content hash of each row and is written after it. A row is found by its content hash, so changed pixels, another
autoencoder or another transform miss, only what is new is encoded, and runs share what they have in common. A shard
without its list does not exist: a killed build loses one shard at most.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ldmcli.core import files

SHARD_ROWS = 1024


def cache_root(setting: str) -> Path:
    """data.cache_dir, else $LDM_CACHE, else ~/.cache/ldm."""
    return Path(setting or os.environ.get("LDM_CACHE") or Path.home() / ".cache" / "ldm")


def cache_key(*facts: str) -> str:
    """Folder name for everything but the image that a latent depends on."""
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]


class LatentCache:
    """The store in `folder`. `keys` are content hashes, one a data row; duplicates share an entry."""

    def __init__(self, folder: Path, keys: Sequence[str], shape: tuple[int, int, int], dtype: str, views: int):
        self.folder, self.keys, self.shape, self.dtype = folder, list(keys), tuple(shape), np.dtype(dtype)
        self.views = views
        self._shards: list[np.ndarray] = []
        self._where: dict[str, tuple[int, int]] = {}
        self._index = np.empty((0, 2), np.int64)
        self._known: set[str] = set()

    def refresh(self) -> None:
        """Reads the lists of all finished shards (also those of other processes and earlier runs)."""
        for listing in sorted(self.folder.glob("*.json")):
            array = listing.with_suffix(".npy")
            if listing.name in self._known or not array.exists():
                continue
            try:
                names = json.loads(listing.read_text())
                shard = np.load(array, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError):
                continue  # damaged: its rows count as missing and are encoded again
            if shard.shape != (len(names), self.views, *self.shape) or shard.dtype != self.dtype:
                continue
            self._known.add(listing.name)
            self._shards.append(shard)
            for row, name in enumerate(names):
                self._where.setdefault(name, (len(self._shards) - 1, row))

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """Indices of rows that still have to be encoded, one for each distinct content: of the share of one process.

        Shares are cut before asking what is there: processes that looked at different moments leave no row out.
        """
        first = {key: index for index, key in reversed(list(enumerate(self.keys)))}
        return [index for index in sorted(first.values())[rank::world] if self.keys[index] not in self._where]

    def build(
        self,
        encode: Callable[[list[int]], np.ndarray],
        *,
        rank: int = 0,
        world: int = 1,
        batch: int = 64,
        advance: Callable[[int], None] = lambda n: None,
        check: Callable[[], None] = lambda: None,
    ) -> int:
        """Encodes this process's share of what is missing; returns how many rows that was.

        `encode(indices)` gives moments (n, views, c, h, w). `check()` may raise to stop between batches (signals).
        """
        self.refresh()
        todo = self.missing(rank, world)
        files.require_space(self.folder, len(todo) * self.views * int(np.prod(self.shape)) * self.dtype.itemsize)
        for start in range(0, len(todo), SHARD_ROWS):
            part = todo[start : start + SHARD_ROWS]
            pieces: list[np.ndarray] = []
            try:
                for offset in range(0, len(part), batch):
                    check()
                    pieces.append(encode(part[offset : offset + batch]).astype(self.dtype))
                    advance(len(pieces[-1]))
            finally:  # what is encoded is kept when a signal or an error ends this
                if pieces:
                    self._write(np.concatenate(pieces), [self.keys[index] for index in part[: sum(map(len, pieces))]])
        return len(todo)

    def _write(self, moments: np.ndarray, names: list[str]) -> None:
        name = hashlib.sha256("".join(names).encode()).hexdigest()[:20]
        with files.atomic_path(self.folder / f"{name}.npy", moments.nbytes) as temporary:
            with open(temporary, "wb") as handle:
                np.save(handle, moments, allow_pickle=False)
        files.write_text(self.folder / f"{name}.json", json.dumps(names))

    def seal(self) -> None:
        """Call when all processes have built: resolves each row to its place. Raises KeyError if one is missing."""
        self.refresh()
        self._index = np.array([self._where[key] for key in self.keys], np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.keys)

    def moments(self, rows: Sequence[int], mirrored: Sequence[bool] | None = None) -> np.ndarray:
        """Moments (n, c, h, w) float32 of data rows, as they are or mirrored."""
        flags = [False] * len(rows) if mirrored is None else mirrored
        out = np.empty((len(rows), *self.shape), np.float32)
        for position, (row, flag) in enumerate(zip(rows, flags)):
            shard, place = self._index[row]
            out[position] = self._shards[shard][place, int(flag)]
        return out

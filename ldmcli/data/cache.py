"""Latents encoded once: a content-addressed store of posterior moments, of each image in all its views.

The store of one (autoencoder, transform, precision) is a folder of immutable shards: `NAME.npy` holds moments
(N, v, c, h, w), where the second axis are views: crops, each as it is and, where flips are on, mirrored; `NAME.json`
lists the content hash of each row and is written after it. A row is found by its content hash, so changed pixels,
another autoencoder or another transform miss, only what is new is encoded, and runs share what they have in common. A
shard without its list does not exist: a killed build loses one shard at most.

A large set has more shards than a process may have open files or maps: rows are read by their place in a file, and
only the files that were read last stay open.
"""

import errno
import hashlib
import json
import os
import resource
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldmcli.core import console, files
from ldmcli.core.errors import ResourceError, UsageError

SHARD_ROWS = 1024
LONGEST_PAUSE = 5.0  # seconds between two looks for what other machines wrote
MOST_OPEN = 256  # files; fewer where the limit of the process is lower


def cache_root(setting: str) -> Path | None:
    """data.cache_dir, else $LDM_CACHE, else ~/.cache/ldm. None, with a warning, where nothing can be written there;
    UsageError where the setting says so.
    """
    named, home = setting or os.environ.get("LDM_CACHE"), files.home()
    if named:
        root = Path(named)
    elif home is not None:
        root = home / ".cache" / "ldm"
    else:
        console.warn_once(
            "cache",
            "this user has no home folder, so nothing is cached; name a folder for caches in "
            "LDM_CACHE or data.cache_dir",
        )
        return None
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return root
    except OSError as error:
        if setting:
            raise UsageError(
                f"data.cache_dir {root}: cannot be written ({error.strerror}); name another folder, or "
                "turn caching off with --no-cache"
            ) from error
        console.warn_once(
            "cache",
            f"{root}: cannot be written ({error.strerror}), so nothing is cached; name another "
            "folder for caches in LDM_CACHE or data.cache_dir",
        )
        return None


def cache_key(*parts: str) -> str:
    """Folder name for everything but the image that a latent depends on."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def dealt(missing: Sequence[np.ndarray], rank: int) -> list[int]:
    """The rows that process `rank` encodes: an equal part of what no process found. missing: `LatentCache.missing` of
    each process, which on a network's file system may have looked too early for some."""
    return np.flatnonzero(np.logical_and.reduce(missing))[rank :: len(missing)].tolist()


class _File:
    """A file that is open as long as somebody has this object, a reader in another thread included."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


class _OpenFiles:
    """The files that were read last, from any thread."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, _File] = OrderedDict()
        self._lock = threading.Lock()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(1, min(MOST_OPEN, soft // 4 if soft != resource.RLIM_INFINITY else MOST_OPEN))

    def read(self, path: Path, start: int, size: int) -> bytes:
        """`size` bytes from place `start` on; fewer where the file ends before. Raises OSError."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._opened(path)
            self._files.move_to_end(path)
        return os.pread(file.number, size, start)

    def _opened(self, path: Path) -> _File:
        while len(self._files) >= self._most:
            self._files.popitem(last=False)
        try:
            file = _File(path)
        except OSError as error:
            if not _none_left(error):
                raise
            self._files.clear()  # others took what there was
            file = _File(path)
        self._files[path] = file
        return file


def _none_left(error: OSError) -> bool:
    """Whether an error speaks of the process or the machine, and not of the file."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclass(frozen=True)
class _Shard:
    """An array in a file of NumPy: the place of its first number, and its shape."""

    path: Path
    start: int
    shape: tuple[int, ...]


def _read_shard(path: Path, dtype: np.dtype) -> _Shard:
    """Raises ValueError where the file is no whole array of `dtype`, OSError where it can't be opened."""
    with open(path, "rb") as handle:
        version = np.lib.format.read_magic(handle)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{path}: an array of version {version}")
        shape, by_columns, found = read(handle)
        start = handle.tell()
        size = os.fstat(handle.fileno()).st_size
    if by_columns or found != dtype or size < start + int(np.prod(shape)) * dtype.itemsize:
        raise ValueError(f"{path}: another array, or cut")
    return _Shard(path, start, shape)


class LatentCache:
    """The store in `folder`. `keys` are content hashes, one a data row; duplicates share an entry."""

    def __init__(self, folder: Path, keys: Sequence[str], shape: tuple[int, int, int], dtype: str, views: int):
        self.folder, self.keys, self.shape, self.dtype = folder, list(keys), tuple(shape), np.dtype(dtype)
        self.views = views
        self._shards: list[_Shard] = []
        self._files = _OpenFiles()
        self._where: dict[str, tuple[int, int]] = {}
        self._index = np.empty((0, 2), np.int64)
        self._known: set[str] = set()

    def refresh(self) -> None:
        """Reads the lists of all finished shards (also those of other processes and earlier runs).

        Raises ResourceError where no more files can be opened: nothing is damaged then.
        """
        try:
            self._refresh()
        except OSError as error:
            if _none_left(error):
                raise self._refused(error) from error
            raise

    def _refresh(self) -> None:
        for listing in sorted(self.folder.glob("*.json")):
            array = listing.with_suffix(".npy")
            if listing.name in self._known or not array.exists():
                continue
            try:
                names = json.loads(listing.read_text())
                shard = _read_shard(array, self.dtype)
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and _none_left(error):
                    raise
                continue  # damaged: its rows count as missing and are encoded again
            if shard.shape != (len(names), self.views, *self.shape):
                continue
            self._known.add(listing.name)
            self._shards.append(shard)
            for row, name in enumerate(names):
                self._where.setdefault(name, (len(self._shards) - 1, row))

    def missing(self) -> np.ndarray:
        """bool, one a row: not there, and the first row of its content."""
        firsts = {key: index for index, key in reversed(list(enumerate(self.keys)))}
        found = np.zeros(len(self.keys), bool)
        found[[index for key, index in firsts.items() if key not in self._where]] = True
        return found

    def build(self, count: int, encoded: Iterable[tuple[list[int], np.ndarray]]) -> None:
        """Writes what `encoded` gives: rows, and their moments (n, views, c, h, w); of `count` rows at most. What was
        given is kept when `encoded` raises. Raises ResourceError where there is no space for so many."""
        files.require_space(self.folder, count * self.views * int(np.prod(self.shape)) * self.dtype.itemsize)
        waiting = np.empty((0, self.views, *self.shape), self.dtype)
        names: list[str] = []
        try:
            for rows, moments in encoded:
                waiting = np.concatenate([waiting, moments.astype(self.dtype)])
                names += [self.keys[row] for row in rows]
                while len(names) >= SHARD_ROWS:
                    self._write(waiting[:SHARD_ROWS], names[:SHARD_ROWS])
                    waiting, names = waiting[SHARD_ROWS:], names[SHARD_ROWS:]
        finally:  # what is encoded is kept when a signal or an error ends this
            if names:
                self._write(waiting, names)

    def _write(self, moments: np.ndarray, names: list[str]) -> None:
        name = hashlib.sha256("".join(names).encode()).hexdigest()[:20]
        with files.atomic_path(self.folder / f"{name}.npy", moments.nbytes) as temporary:
            with open(temporary, "wb") as handle:
                np.save(handle, moments, allow_pickle=False)
        files.write_text(self.folder / f"{name}.json", json.dumps(names))

    def _refused(self, error: OSError) -> ResourceError:
        return ResourceError(
            f"{self.folder}: no shard can be opened ({error.strerror}); raise the limit of open files "
            "(`ulimit -n`), or end what else holds so many"
        )

    def seal(self, patience: float = 0) -> None:
        """Call when all processes have built: resolves each row to its place. Raises ResourceError if one is missing:
        what was encoded is gone, or another process wrote it elsewhere. patience: seconds to wait for files of other
        machines, which a network's file system may list late."""
        end, pause = time.monotonic() + patience, 0.1
        while gone := self._gone():
            if time.monotonic() >= end:
                raise ResourceError(
                    f"{self.folder}: {gone:,} of {len(self.keys):,} latents that were encoded can't be "
                    "found; all processes must see one cache (data.cache_dir or LDM_CACHE) that nothing "
                    "clears meanwhile; the same command encodes what is missing"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        self._index = np.array([self._where[key] for key in self.keys], np.int64).reshape(-1, 2)

    def _gone(self) -> int:
        """How many rows are not there, after a new look."""
        self.refresh()
        return sum(key not in self._where for key in self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def moments(self, rows: Sequence[int], views: Sequence[int] | None = None) -> np.ndarray:
        """Moments (n, c, h, w) float32 of data rows, each in one of its views (the first where none is named). Raises
        ResourceError where a shard is gone or cut."""
        wanted = [0] * len(rows) if views is None else views
        out = np.empty((len(rows), *self.shape), np.float32)
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        for position, (row, view) in enumerate(zip(rows, wanted)):
            number, place = self._index[row]
            shard = self._shards[number]
            try:
                found = self._files.read(shard.path, shard.start + (int(place) * self.views + int(view)) * size, size)
            except OSError as error:
                if _none_left(error):
                    raise self._refused(error) from error
                found = b""
            if len(found) < size:
                raise ResourceError(
                    f"{shard.path}: gone or cut while it was in use; the same command encodes anew what it held"
                )
            out[position] = np.frombuffer(found, self.dtype).reshape(self.shape)
        return out

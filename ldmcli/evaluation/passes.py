"""One pass over the images of an evaluation: each image once, through everything that looks at it.

All processes share a pass in blocks whose size does not depend on their number; what they find is put together in the
order of the images, so that the numbers do not depend on it, either. Of finished blocks everything is kept in the cache
until the result is complete (`kept_parts.py`): a second start goes on where the first one was killed.
"""

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from ldmcli import __version__
from ldmcli.core import console
from ldmcli.core.errors import InputError
from ldmcli.core.world import World
from ldmcli.data.cache import cache_key
from ldmcli.evaluation.extractors import Extractor
from ldmcli.evaluation.features import FeatureSet, content_hash
from ldmcli.evaluation.image_streams import ImageStream
from ldmcli.evaluation.kept_parts import Part, PartStore, Side, open_store

BLOCK = 32  # images of a block at least; a stream that makes more at a time has larger ones
IN_MEMORY = 2**23  # bytes of an array above which it lies in a temporary file


SAME = ("weights_sha256", "layer", "resize")  # what two extractors must share for their numbers to compare


def same_numbers(extractor: Extractor) -> list[str]:
    """What the numbers of an extractor depend on."""
    return [str(extractor.protocol[key]) for key in SAME]


def nothing(*sides: list[np.ndarray]) -> dict[str, Any]:
    """Nothing beside features."""
    return {}


@dataclass
class Tally:
    """How many images each stage has seen, in how many seconds: {stage: [images, seconds]}."""

    stages: dict[str, list[float]] = field(default_factory=dict)
    known: int = 0  # images whose features were kept by an earlier start

    def add(self, stage: str, images: float, seconds: float) -> None:
        """Counts a stage of some images; seconds of several processes that work at once count once."""
        found = self.stages.setdefault(stage, [0, 0.0])
        found[0] += images
        found[1] += seconds

    def document(self, processes: int) -> dict[str, Any]:
        """What a result states of it: images, seconds and images_per_s of each stage (None where nothing took time)."""
        stages = {
            name: {
                "images": int(images),
                "seconds": round(seconds, 3),
                "images_per_s": round(images / seconds, 3) if images and seconds else None,
            }
            for name, (images, seconds) in self.stages.items()
        }
        return {"processes": processes, "known_images": self.known, "stages": stages}


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What is looked at, and by what.

    label: what the images are, for people. streams: one, or two that are read side by side. extractors: the networks
    of each stream's images. logits: whether those are kept, too. values, arrays, sums: functions of a block's images
    (a list for each stream) that give {name: a value an image}, {name: an array whose first axis is the images'} and
    {name: an array that is summed over blocks}. identity: what these depend on beside the images.
    """

    label: str
    streams: tuple[ImageStream, ...]
    extractors: tuple[tuple[Extractor, ...], ...]
    logits: bool = False
    values: Callable[..., Mapping[str, list[float]]] = nothing
    arrays: Callable[..., Mapping[str, np.ndarray]] = nothing
    sums: Callable[..., Mapping[str, np.ndarray]] = nothing
    identity: tuple[str, ...] = ()

    def store(self, world: World) -> PartStore:
        """Where the parts are kept: on rank 0, of images whose content can be named."""
        named = all(stream.key or stream.place for stream in self.streams)

        def name(block: range) -> str:
            contents = [stream.content(block) for stream in self.streams if stream.content is not None]
            return cache_key(f"{block.start}:{block.stop}", *contents)

        networks = [(*same_numbers(one), one.device.type) for side in self.extractors for one in side]
        numbers = sum(one.dim + 1000 * self.logits for side in self.extractors for one in side)
        of = [(stream.name, stream.key, stream.place) for stream in self.streams]
        identity = [__version__, torch.__version__, self.label, of, networks, self.logits, *self.identity]
        return open_store(identity if named and world.is_rank_0 else (), name, 4 * numbers * self.count)

    @property
    def count(self) -> int:
        """Images of each stream; of streams that differ the fewer."""
        return min(stream.count for stream in self.streams)

    @property
    def blocks(self) -> list[range]:
        """Positions of the images of each block."""
        size = max(-(-BLOCK // stream.batch) * stream.batch for stream in self.streams)
        return [range(start, min(start + size, self.count)) for start in range(0, self.count, size)]

    def parts(self, blocks: Sequence[range]) -> Iterator[Part]:
        """What is found in these blocks, one after the other. Raises InputError where a stream ends too soon."""
        reading = [stream.read(blocks) for stream in self.streams]
        for block in blocks:
            started = time.perf_counter()
            images = [list(islice(stream, len(block))) for stream in reading]
            for stream, found in zip(self.streams, images):
                if len(found) < len(block):
                    raise InputError(f"{stream.name}: ends after {block.start + len(found)} of {stream.count} images")
            read = time.perf_counter()
            part = Part(
                sides=[self._side(networks, found) for networks, found in zip(self.extractors, images)],
                values={name: list(found) for name, found in self.values(*images).items()},
                arrays=dict(self.arrays(*images)),
                sums=dict(self.sums(*images)),
            )
            part.seconds = {self.streams[0].action: read - started, "features": time.perf_counter() - read}
            yield part

    def _side(self, networks: Sequence[Extractor], images: list[np.ndarray]) -> Side:
        found = [network.features_and_logits(images) for network in networks]
        return Side(
            hashes=[content_hash(image) for image in images],
            sizes=[(int(image.shape[0]), int(image.shape[1])) for image in images],
            found=[(features, logits if self.logits else logits[:, :0]) for features, logits in found],
        )


def parts_in_order(
    run: Pass, store: PartStore, world: World, tally: Tally, advance: Callable[[int], None]
) -> Iterator[tuple[range, Part]]:
    """Every block with what was found in it, ascending, on rank 0; the other processes work and get none. Collective:
    each process goes through to the end."""
    blocks = run.blocks
    known: list[int] = world.on_rank_0(lambda: store.known(blocks))
    images = sum(len(blocks[k]) for k in known)
    if images:
        console.say(f"{run.label}: {images:,} of {run.count:,} images are known from an earlier start")
        tally.known += images
    waiting = iter(known if world.is_rank_0 else ())
    todo = sorted(set(range(len(blocks))) - set(known))
    making = run.parts([blocks[k] for k in todo[world.rank :: world.world_size]])
    following = next(waiting, len(blocks))
    for first in range(0, len(todo), world.world_size):
        made = world.gather(world.on_all_ranks(lambda: next(making, None)))  # fewer at the end than there are processes
        for k, part in zip(todo[first:], made if world.is_rank_0 else ()):
            while following < k:
                yield blocks[following], _read(run, store, blocks[following], advance)
                following = next(waiting, len(blocks))
            store.write(blocks[k], part)
            for stage, seconds in part.seconds.items():
                tally.add(stage, len(blocks[k]), seconds / min(world.world_size, len(todo)))
            advance(len(blocks[k]))
            yield blocks[k], part
    while following < len(blocks):
        yield blocks[following], _read(run, store, blocks[following], advance)
        following = next(waiting, len(blocks))


def _read(run: Pass, store: PartStore, block: range, advance: Callable[[int], None]) -> Part:
    """A part that is kept; where another command removed it meanwhile, it is made again."""
    part = store.read(block)
    advance(len(block))
    return next(run.parts([block])) if part is None else part


# --- everything of a pass ----------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a pass found, in the order of the images: on rank 0; nothing of any image elsewhere.

    sides: of each stream a FeatureSet for each of its networks; where it has none, one of hashes and sizes alone.
    """

    sides: list[tuple[FeatureSet, ...]]
    values: dict[str, list[float]]
    arrays: dict[str, np.ndarray]
    sums: dict[str, np.ndarray]


def run_pass(run: Pass, store: PartStore, world: World, tally: Tally, advance: Callable[[int], None]) -> Found:
    """Everything that a pass finds. Collective."""
    rows: dict[Any, np.ndarray] = {}  # (side, network, "features" or "logits"), or the name of an array
    hashes: list[list[str]] = [[] for _ in run.streams]
    sizes: list[set[tuple[int, int]]] = [set() for _ in run.streams]
    found = Found([], {}, {}, {})
    for block, part in parts_in_order(run, store, world, tally, advance):
        for s, side in enumerate(part.sides):
            hashes[s] += side.hashes
            sizes[s] |= set(side.sizes)
            for k, (features, logits) in enumerate(side.found):
                _put(rows, (s, k, "features"), run.count, block, features)
                _put(rows, (s, k, "logits"), run.count, block, logits)
        for name, values in part.values.items():
            found.values.setdefault(name, []).extend(values)
        for name, array in part.arrays.items():
            _put(rows, name, run.count, block, array)
        for name, array in part.sums.items():
            found.sums[name] = found.sums[name] + array if name in found.sums else array
    empty = np.zeros((0, 0), np.float32)
    for s, networks in enumerate(run.extractors):
        arrays = [
            (rows.pop((s, k, "features"), empty), rows.pop((s, k, "logits"), empty)) for k in range(len(networks))
        ]
        found.sides.append(tuple(FeatureSet(*pair, hashes[s], sizes[s]) for pair in arrays or [(empty, empty)]))
    found.arrays = rows
    return found


def _put(rows: dict[Any, np.ndarray], name: Any, count: int, block: range, array: np.ndarray) -> None:
    if name not in rows:
        rows[name] = allocated((count, *array.shape[1:]), array.dtype)
    rows[name][block.start : block.stop] = array
    release(rows[name])


def allocated(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array to be filled: in memory where it is small, else in a temporary file that goes with it. Raises OSError
    where the disk has no room for it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="ldm-features-") as file:
        if hasattr(os, "posix_fallocate"):  # a page without room on the disk would end the process when it is written
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, dtype, "w+", shape=shape)


def release(array: np.ndarray) -> None:
    """Pages of an array in a temporary file leave the memory of this process; the next look reads them again."""
    mapped = getattr(array, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def in_order_of_content(found: FeatureSet) -> FeatureSet:
    """The same images in the order of their content hashes: metrics that draw rows then give the same numbers for files
    of other names, or in another order."""
    order = np.argsort(np.array(found.hashes), kind="stable")
    arrays = []
    for array in (found.features, found.logits):
        sorted_rows = allocated(array.shape, array.dtype)
        for start in range(0, len(array), 1024):
            sorted_rows[start : start + 1024] = array[order[start : start + 1024]]
        release(array)
        arrays.append(sorted_rows)
    return FeatureSet(arrays[0], arrays[1], [found.hashes[i] for i in order], found.sizes)

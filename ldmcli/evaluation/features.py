"""A set of images through an extractor: features, content hashes and sizes, block by block."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ldmcli.evaluation.extractors import Extractor

T = TypeVar("T")


@dataclass
class FeatureSet:
    """What is kept of a set of images: a row of features and a content hash each, and their sizes."""

    features: np.ndarray  # (N, D) float32
    logits: np.ndarray  # (N, classes) float32
    hashes: list[str]
    sizes: set[tuple[int, int]]  # height, width

    def __len__(self) -> int:
        return len(self.hashes)

    def of(self, ids: Sequence[int]) -> "FeatureSet":
        """Images `ids` of the set alone."""
        features, logits = ((x[np.asarray(ids, np.int64)] if len(x) else x) for x in (self.features, self.logits))
        return FeatureSet(features, logits, [self.hashes[i] for i in ids], self.sizes)


def digest_of(hashes: Sequence[str]) -> str:
    """One hash of those of several images, in their order."""
    return hashlib.blake2b("\n".join(hashes).encode(), digest_size=16).hexdigest()


def content_hash(image: np.ndarray) -> str:
    """Hash of an image's pixels and shape."""
    shape = "x".join(map(str, image.shape)).encode()
    return hashlib.blake2b(shape + np.ascontiguousarray(image).tobytes(), digest_size=16).hexdigest()


def in_blocks(stream: Iterable[T], size: int) -> Iterator[list[T]]:
    """A stream of images, or of pairs of them, in lists of `size`; the last one may be shorter."""
    block: list[T] = []
    for image in stream:
        block.append(image)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


class Collector:
    """Builds the FeatureSets of several networks block by block, from pictures that are read once."""

    def __init__(self, extractors: Sequence[Extractor]):
        self.extractors = tuple(extractors)
        self.parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in extractors]
        self.hashes: list[str] = []
        self.sizes: set[tuple[int, int]] = set()

    def add(self, block: list[np.ndarray]) -> None:
        """Takes uint8 (H, W, 3) images, of any sizes."""
        self.hashes += [content_hash(image) for image in block]
        self.sizes |= {(int(image.shape[0]), int(image.shape[1])) for image in block}
        for extractor, parts in zip(self.extractors, self.parts):
            parts.append(extractor.features_and_logits(block))

    def result(self) -> tuple[FeatureSet, ...]:
        """Everything that was added: a set for each network; without one a set of hashes and sizes alone."""
        return tuple(joined(parts, self.hashes, self.sizes) for parts in self.parts or [[]])


def joined(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], hashes: list[str], sizes: set[tuple[int, int]]
) -> FeatureSet:
    """The FeatureSet of (features, logits) in parts."""
    empty = np.zeros((0, 0), np.float32)
    features, logits = zip(*parts) if parts else ((empty,), (empty,))
    return FeatureSet(np.concatenate(features), np.concatenate(logits), hashes, sizes)


def concatenated(sets: Sequence[FeatureSet]) -> FeatureSet:
    """Sets of one network, one behind the other."""
    hashes, sizes = (
        [name for one in sets for name in one.hashes],
        set[tuple[int, int]]().union(*(s.sizes for s in sets)),
    )
    return joined([(one.features, one.logits) for one in sets], hashes, sizes)


def extract(
    images: Iterable[np.ndarray], extractor: Extractor, advance: Callable[[int], None] = lambda count: None
) -> FeatureSet:
    """The FeatureSet of a stream of uint8 (H, W, 3) images."""
    return extract_all(images, (extractor,), advance)[0]


def extract_all(
    images: Iterable[np.ndarray], extractors: Sequence[Extractor], advance: Callable[[int], None] = lambda count: None
) -> tuple[FeatureSet, ...]:
    """A FeatureSet for each network of a stream of uint8 (H, W, 3) images, which is read once; without a network one
    set of hashes and sizes alone."""
    collector = Collector(extractors)
    for block in in_blocks(images, max([extractor.block for extractor in extractors], default=16)):
        collector.add(block)
        advance(len(block))
    return collector.result()

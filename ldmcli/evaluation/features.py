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
    """Builds a FeatureSet block by block. Without an extractor it keeps hashes and sizes only."""

    def __init__(self, extractor: Extractor | None):
        self.extractor = extractor
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []
        self.hashes: list[str] = []
        self.sizes: set[tuple[int, int]] = set()

    def add(self, block: list[np.ndarray]) -> None:
        """Takes uint8 (H, W, 3) images, of any sizes."""
        self.hashes += [content_hash(image) for image in block]
        self.sizes |= {(int(image.shape[0]), int(image.shape[1])) for image in block}
        if self.extractor is not None:
            self.parts.append(self.extractor.features_and_logits(block))

    def add_known(self, found: FeatureSet, ids: list[int]) -> None:
        """Takes images `ids` of a set whose features are known."""
        self.hashes += [found.hashes[i] for i in ids]
        self.sizes |= found.sizes
        self.parts.append((found.features[ids], found.logits[ids]))

    def result(self) -> FeatureSet:
        """Everything that was added."""
        empty = np.zeros((0, 0), np.float32)
        features, logits = zip(*self.parts) if self.parts else ((empty,), (empty,))
        return FeatureSet(np.concatenate(features), np.concatenate(logits), self.hashes, self.sizes)


def extract(
    images: Iterable[np.ndarray], extractor: Extractor | None, advance: Callable[[int], None] = lambda count: None
) -> FeatureSet:
    """The FeatureSet of a stream of uint8 (H, W, 3) images."""
    collector = Collector(extractor)
    for block in in_blocks(images, extractor.block if extractor else 16):
        collector.add(block)
        advance(len(block))
    return collector.result()

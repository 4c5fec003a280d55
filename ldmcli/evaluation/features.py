"""A set of images as an extractor sees it: features, content hashes and sizes."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
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


def concatenated(sets: Sequence[FeatureSet]) -> FeatureSet:
    """Sets of one network, one or more, one behind the other."""
    features, logits = (np.concatenate([getattr(one, name) for one in sets]) for name in ("features", "logits"))
    sizes = set[tuple[int, int]]().union(*(one.sizes for one in sets))
    return FeatureSet(features, logits, [name for one in sets for name in one.hashes], sizes)


def extract(images: Sequence[np.ndarray] | np.ndarray, extractor: Extractor) -> FeatureSet:
    """The FeatureSet of uint8 (H, W, 3) images."""
    hashes, sizes = [content_hash(image) for image in images], {(int(x.shape[0]), int(x.shape[1])) for x in images}
    return FeatureSet(*extractor.features_and_logits(list(images)), hashes, sizes)

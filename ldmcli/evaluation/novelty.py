"""Does a model copy? The share of samples that are nearer to a training picture than held-out pictures are.

For each sample a few training pictures are candidates, by coarse pixels of it and of its mirror image; of these the
one that comes nearest by `maths.copies.copy_distance` decides. What counts as a copy is calibrated by held-out pictures
alone, nothing by samples. Beside stand two controls, read the same way: training pictures as they are, mirrored, as
JPEG files and shifted, planted among held-out ones, and held-out pictures themselves. Training pictures are read in
blocks, and no more is kept than 192 bytes of each, of at most `HELD_ROWS`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from ldmcli.core.errors import InputError
from ldmcli.core.settings import DataSettings
from ldmcli.data.rows import evenly_spaced
from ldmcli.evaluation.extractors import Extractor
from ldmcli.evaluation.features import FeatureSet, content_hash, in_blocks
from ldmcli.evaluation.image_streams import rows_source
from ldmcli.evaluation.reference_statistics import KEPT, reference_features
from ldmcli.evaluation.result import Scores
from ldmcli.maths.copies import (
    COARSE,
    QUALITIES,
    REACH,
    THUMBNAIL,
    as_jpeg,
    coarse,
    copied_share,
    copy_distance,
    mirrored,
    moved,
    reduced,
    shifted_errors,
    threshold,
    working,
)
from ldmcli.maths.nearest import Nearest

BLOCK = 256  # training pictures looked up at a time
CANDIDATES = 8  # training pictures by the coarse pixels of a sample, and as many by those of its mirror image
FINALISTS = 2  # of these, by their thumbnails
HELD_OUT = 300  # held-out pictures that are looked at, at most
LEAST_HELD_OUT = 20
HELD_ROWS = 100_000  # training pictures whose coarse pixels are kept between two searches
PLANTED = 8  # training pictures that are planted in each form
FOUND = 0.9  # share of the planted copies that must be found
SEEN_BY_NETWORKS = ("as they are", "mirrored")  # forms of copies that features must find; others they may miss
CLEAN = 0.05  # share of copies that held-out pictures may have, by the low end of its interval
PAIRS = 8  # nearest pairs that are shown

Size = tuple[int, int]


# --- the nearest training picture ------------------------------------------------------------------------------


class TrainingPictures:
    """Training rows as uint8 pictures of one size, and what is kept of them. Row i is a picture `at(i)`."""

    def __init__(self, rows: Any, size: Size):
        self.rows, self.size = rows, size
        self.hashes: set[str] = set()
        self._coarse: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, i: int) -> np.ndarray:
        """uint8 (H, W, 3), cropped at the centre."""
        return self.rows.pixels(i, self.size, "center", (0.5, 0.5))

    def coarse_blocks(self, advance: Callable[[int], None]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers (m,), coarse pixels (m, 192)) of all rows; the first time they are read, and hashed."""
        if self._coarse:
            for first, known in enumerate(self._coarse):
                advance(len(known))
                yield np.arange(first * BLOCK, first * BLOCK + len(known)), known.astype(np.float32)
            return
        kept: list[np.ndarray] = []
        for first, block in enumerate(in_blocks((self.at(i) for i in range(len(self))), BLOCK)):
            self.hashes |= {content_hash(image) for image in block}
            found = np.stack([coarse(image) for image in block])
            kept.append(found.astype(np.uint8))
            advance(len(block))
            yield np.arange(first * BLOCK, first * BLOCK + len(block)), found
        self._coarse = kept if len(self) <= HELD_ROWS else []


def nearest_pictures(
    training: TrainingPictures, pictures: Sequence[np.ndarray], advance: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """(row (n,), distance (n,) by `copy_distance`) of the training picture that each picture is nearest to being a copy
    of. pictures: uint8, of the size of the training pictures."""
    finalists = _finalists(training, pictures, _candidates(training, pictures, advance))
    rows, distances = np.full(len(pictures), -1), np.full(len(pictures), np.inf)
    for row, of in _by_row(finalists).items():
        seen = working(training.at(row))
        for k in of:
            found = copy_distance(working(pictures[k]), seen)
            if found < distances[k]:
                rows[k], distances[k] = row, found
    return rows, distances


def _candidates(
    training: TrainingPictures, pictures: Sequence[np.ndarray], advance: Callable[[int], None]
) -> list[list[int]]:
    """Rows that each picture may be a copy of."""
    own = np.stack([coarse(image) for image in pictures])
    flipped = own.reshape(-1, COARSE, COARSE, 3)[:, :, ::-1].reshape(own.shape)
    nearest = Nearest(np.concatenate([own, flipped]), CANDIDATES)
    for numbers, block in training.coarse_blocks(advance):
        nearest.add(numbers, block)
    both = np.concatenate(np.split(nearest.numbers, 2), 1)
    return [sorted(set(row.tolist()) - {-1}) for row in both]


def _finalists(
    training: TrainingPictures, pictures: Sequence[np.ndarray], candidates: list[list[int]]
) -> list[list[int]]:
    """Of the candidates of each picture the few whose thumbnails come nearest, mirrored or not, shifted a little."""
    thumbnails = np.stack([reduced(image, THUMBNAIL) for image in pictures])
    errors: list[list[tuple[float, int]]] = [[] for _ in pictures]
    for row, of in _by_row(candidates).items():
        found = shifted_errors(reduced(training.at(row), THUMBNAIL), thumbnails[of], REACH - 1)
        for k, error in zip(of, found.reshape(len(of), -1).min(1)):
            errors[k].append((float(error), row))
    return [[row for _, row in sorted(one)[:FINALISTS]] for one in errors]


def _by_row(rows_of: list[list[int]]) -> dict[int, list[int]]:
    """{row: pictures that name it}, in order of rows, so that rows are read in order."""
    found: dict[int, list[int]] = {}
    for k, rows in enumerate(rows_of):
        for row in rows:
            found.setdefault(row, []).append(k)
    return dict(sorted(found.items()))


# --- reading shares --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """The share of copies among pictures, [0, 1], with its 95 % interval. below: of the n pictures, those nearer than
    the threshold."""

    share: float
    interval: tuple[float, float]
    below: int
    n: int


def read(distances: np.ndarray, held_out: np.ndarray) -> Reading:
    """The share of copies among pictures by their distances and those of held-out ones."""
    limit = threshold(held_out)
    share, interval = copied_share(distances, limit)
    return Reading(share, interval, int((distances < limit.value).sum()), len(distances))


def planted(training: TrainingPictures) -> dict[str, list[np.ndarray]]:
    """A few training pictures in each form that a copy is to be found in."""
    rows = evenly_spaced(len(training), min(PLANTED, len(training)))
    sides, qualities = ((2, 0), (0, 2), (-2, 0), (0, -2)), QUALITIES[::10]
    return {
        "as they are": [training.at(row) for row in rows],
        "mirrored": [mirrored(training.at(row)) for row in rows],
        "JPEG": [as_jpeg(training.at(row), qualities[k % len(qualities)]) for k, row in enumerate(rows)],
        "shifted": [moved(training.at(row), False, *sides[k % len(sides)]) for k, row in enumerate(rows)],
    }


@dataclass(frozen=True)
class Controls:
    """What the reading makes of pictures whose share of copies is known.

    found: {form: share found} of the planted copies. mixed: the reading of these among every second held-out picture,
    of which they are the share `truth`; held_out: that of every second held-out picture alone. Both by the others.
    """

    found: dict[str, float]
    truth: float
    mixed: Reading
    held_out: Reading

    @property
    def missed(self) -> str:
        """The forms of which too few planted copies are found, with the share that is; "" without any."""
        return ", ".join(f"{form} {100 * one:.0f} %" for form, one in self.found.items() if one < FOUND)

    @property
    def failure(self) -> str:
        """Why the reading can't be trusted; "" where it can."""
        if float(np.mean(list(self.found.values()))) < FOUND:
            return (
                f"too few planted copies of training pictures are found ({self.missed}): held-out pictures are as near "
                "to training pictures"
            )
        if self.held_out.interval[0] > CLEAN:
            return f"held-out pictures are read as {100 * self.held_out.share:.0f} % copies"
        return ""

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "planted": {"share": self.truth, "read": self.mixed.share, "found": self.found},
            "held_out": {"n": self.held_out.n, "read": self.held_out.share, "interval": list(self.held_out.interval)},
        }


def controls(by_form: dict[str, np.ndarray], held_out: np.ndarray) -> Controls:
    """The controls by the distances of planted copies in each form and of held-out pictures (at least 2)."""
    limit, calibrating, rest = threshold(held_out), held_out[::2], held_out[1::2]
    copies = np.concatenate(list(by_form.values()))
    return Controls(
        found={form: float((one < limit.value).mean()) for form, one in by_form.items()},
        truth=len(copies) / (len(copies) + len(rest)),
        mixed=read(np.concatenate([copies, rest]), calibrating),
        held_out=read(rest, calibrating),
    )


class CopyMeter:
    """Reads the share of copies by pixels. Held-out pictures and planted copies are looked at once, when it is made.

    held_out: rows that were not trained on; those that equal a training picture are left out.
    Raises InputError where fewer than 20 are left, or there are no training rows.
    """

    def __init__(self, training: Any, held_out: Any, size: Size, advance: Callable[[int], None] = lambda n: None):
        self.training = TrainingPictures(training, size)
        other = TrainingPictures(held_out, size)
        if not len(training):
            raise InputError("novelty: there are no training pictures to compare with")
        need_held_out(len(other))
        self.held_out = [other.at(i) for i in evenly_spaced(len(other), min(HELD_OUT, len(other)))]
        self.planted = planted(self.training)
        copies = [image for images in self.planted.values() for image in images]
        distances = nearest_pictures(self.training, [*self.held_out, *copies], advance)[1]
        unseen = [k for k, image in enumerate(self.held_out) if content_hash(image) not in self.training.hashes]
        self.left_out = len(self.held_out) - len(unseen)
        need_held_out(len(unseen))
        by_form = np.split(distances[len(self.held_out) :], len(self.planted))
        self.held_out = [self.held_out[k] for k in unseen]
        self.distances = distances[unseen]
        self.controls = controls(dict(zip(self.planted, by_form)), self.distances)

    @cached_property
    def limit(self) -> float:
        """The distance below which a picture counts as a copy."""
        return threshold(self.distances).value

    def read(self, pictures: Sequence[np.ndarray]) -> tuple[Reading, np.ndarray, np.ndarray]:
        """(share of copies, row of the nearest training picture (n,), distance to it (n,)) of uint8 pictures."""
        rows, distances = nearest_pictures(self.training, pictures, lambda n: None)
        return read(distances, self.distances), rows, distances


def shows_copies(metrics: Mapping[str, float]) -> bool:
    """Whether an evaluation of a training reads more copies than chance gives: the low end of its interval is above
    what held-out pictures are read as. False where nobody looked."""
    return "copied_low" in metrics and metrics["copied_low"] > metrics.get("copied_held_out", 0.0)


def need_held_out(count: int) -> None:
    """Raises InputError for fewer than 20 held-out pictures."""
    if count < LEAST_HELD_OUT:
        raise InputError(
            f"novelty: {count} held-out pictures that are no training pictures; at least {LEAST_HELD_OUT} say how near "
            "a picture comes that no model has seen: hold more rows out with --val-fraction, or name a data set that "
            "has them"
        )


# --- by features -----------------------------------------------------------------------------------------------


def feature_distances(
    extractor: Extractor, training: TrainingPictures, settings: DataSettings, features: Sequence[np.ndarray]
) -> np.ndarray:
    """(n,) distances of pictures to the nearest training picture in the features of a network, over that to the 50th
    (Carlini et al. 2023, Eq. 3). features: (n, D) of the pictures, and of their mirror images; the nearer one counts.
    """
    queries = np.concatenate(features)
    nearest = Nearest(queries, min(50, len(training)))
    source = rows_source(training.rows, replace(settings, size=training.size), list(range(len(training))))
    if len(training) <= KEPT:
        known = reference_features([extractor], source, lambda n: None, KEPT)[0].features
        blocks: Iterator[np.ndarray] = (known[start : start + BLOCK] for start in range(0, len(known), BLOCK))
    else:
        blocks = (extractor.features(block) for block in in_blocks(source.stream(), BLOCK))
    for first, block in enumerate(blocks):
        nearest.add(np.arange(first * BLOCK, first * BLOCK + len(block)), block)
    least, usual = nearest.distances[:, 0], np.maximum(nearest.distances[:, -1], 1e-12)
    return np.minimum(*np.split(least / usual, len(features)))


# --- the metric ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NoveltySets:
    """Samples, uint8 (H, W, 3) each, with their features by each of the extractors, and the rows that they are compared
    with: those that were trained on, and held-out ones, as `settings` say, at `size` (height, width)."""

    images: Sequence[np.ndarray]
    features: Sequence[FeatureSet]
    extractors: Sequence[Extractor]
    training: Any
    held_out: Any
    settings: DataSettings
    size: Size
    progress: Callable[[int, str], Any]
    names: Sequence[str] = ()  # of the samples, where they are files


@dataclass(frozen=True)
class Novelty:
    """What is found: numbers by pixels, numbers by the features of each network, and the nearest pairs (sample,
    training picture, distance), uint8 of one size."""

    by_pixels: Scores
    by_network: list[Scores]
    pairs: list[tuple[np.ndarray, np.ndarray, float]]


def measure_novelty(sets: NoveltySets) -> Novelty:
    """The share of copies among samples, by pixels and by the features of each network, with controls; None where a
    control fails, and why. Raises InputError where there are too few rows to compare with."""
    with sets.progress(len(sets.training), "training pictures") as bar:
        meter = CopyMeter(sets.training, sets.held_out, sets.size, bar.advance)
    pictures = [fitted(image, sets.size) for image in sets.images]
    reading, rows, distances = meter.read(pictures)
    failure = meter.controls.failure
    found = None if failure else reading
    order = np.argsort(distances, kind="stable")[:PAIRS].tolist()
    document = {
        **_document(found, meter.controls, meter.limit),
        "n": len(pictures),
        "n_training": len(meter.training),
        "n_held_out": len(meter.held_out),
        "held_out_copies": meter.left_out,
        "exact": sum(content_hash(image) in meter.training.hashes for image in pictures),
        "training": {name: getattr(sets.training, name) for name in ("source", "split", "fingerprint")},
        "pairs": [
            {
                "sample": k,
                **({"file": sets.names[k]} if sets.names else {}),
                "row": int(rows[k]),
                "name": sets.training.name(int(rows[k])),
                "distance": float(distances[k]),
                "copy": bool(distances[k] < meter.limit),
            }
            for k in order
        ],
    }
    by_network = [_by_features(sets, meter, pictures, k, document) for k in range(len(sets.extractors))]
    scores = _scores("copied", found, [f"no share of copies: {failure}"] if failure else [])
    scores.protocol["novelty"] = document
    pairs = [(pictures[k], meter.training.at(int(rows[k])), float(distances[k])) for k in order]
    return Novelty(scores, by_network, pairs)


def _document(found: Reading | None, checked: Controls, limit: float) -> dict[str, Any]:
    """A reading as JSON; without its share where a control fails."""
    return {
        "copied": None if found is None else found.share,
        "interval": None if found is None else list(found.interval),
        "below": None if found is None else found.below,
        "threshold": limit,
        "controls": checked.document,
    }


def _by_features(
    sets: NoveltySets, meter: CopyMeter, pictures: list[np.ndarray], k: int, document: dict[str, Any]
) -> Scores:
    """The reading by the features of network k, which is put into the document, too."""
    extractor, copies = sets.extractors[k], [image for images in meter.planted.values() for image in images]
    others = [*meter.held_out, *copies]
    mirror_images = [mirrored(image) for image in [*pictures, *others]]
    own = np.concatenate([sets.features[k].features, extractor.features(others)])
    distances = feature_distances(extractor, meter.training, sets.settings, [own, extractor.features(mirror_images)])
    n, known = len(pictures), len(pictures) + len(meter.held_out)
    unseen, by_form = distances[n:known], np.split(distances[known:], len(meter.planted))
    checked = controls(dict(zip(meter.planted, by_form)), unseen)
    plain = all(checked.found[form] >= FOUND for form in SEEN_BY_NETWORKS)
    found = read(distances[:n], unseen) if plain else None
    document.setdefault("by_features", {})[extractor.suffix] = _document(found, checked, threshold(unseen).value)
    what = "copies that are missed are not in its share" if plain else "so it reads no share"
    warnings = [f"{extractor.title} misses planted copies ({checked.missed} found): {what}"] if checked.missed else []
    return _scores("copied_features", found, warnings, f"{extractor.name}@{extractor.sha256[:12]}")


def _scores(name: str, found: Reading | None, warnings: list[str], network: str | None = None) -> Scores:
    """A reading, or that there is none, under its name, with what it is worth."""
    if found is None:
        return Scores({name: None}, warnings=warnings)
    return Scores({name: found.share}, warnings=warnings, estimates={name: _estimate(found, network)})


def _estimate(found: Reading, network: str | None) -> dict[str, Any]:
    """What a share is worth, as the estimates of other numbers."""
    return {
        "interval": list(found.interval),
        "method": "exact (binomial and order statistic)",
        "error_generated": None,
        "error_reference": None,
        "floor": None,
        "network": network,
    }


def fitted(image: np.ndarray, size: Size) -> np.ndarray:
    """A uint8 picture at (height, width): pictures of a folder may have sizes of their own."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1]))

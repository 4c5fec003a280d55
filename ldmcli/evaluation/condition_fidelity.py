"""Condition fidelity: whether samples show the layout, or the semantic map, that they are conditioned on.

Pictures of the embedded shapes are read exactly, by templates. For any other data a segmenter reads them that is
trained on the data's own training rows (`segmenter.py`) and kept in the cache. Its numbers on real pictures are the
ceiling of what it can find in samples, so they are reported beside, as are those against the condition of the next
picture (shuffled).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import ndimage

from ldmcli.conditions import CONDITIONS
from ldmcli.conditions.dataset import ConditionDataset
from ldmcli.conditions.layout import BoxLayout, validate_boxes
from ldmcli.conditions.semantic_map import SemanticMap, map_names
from ldmcli.core.errors import InputError
from ldmcli.core.settings import DiffusionConfig
from ldmcli.data import shape_reading
from ldmcli.data.cache import cache_key, cache_root
from ldmcli.data.shape_rows import is_shapes
from ldmcli.evaluation.result import Scores
from ldmcli.evaluation.segmenter import NO_CLASS, TRAIN_STEPS, load_segmenter, save_segmenter, train_segmenter

LAYOUT, MAP = BoxLayout.name, SemanticMap.name
SEGMENTER_ROWS = 800  # training rows that a segmenter learns from, evenly spread
SEGMENTER_VERSION = 1  # a segmenter of another version is trained again
MIN_REGION = 0.0015  # share of the picture below which a region of one class is no object
FOUND = 0.5  # intersection over union from which a box counts as found
NOTHING = 0  # class between the boxes, where boxes stand for a map

Box = tuple[float, float, float, float]  # x, y, width, height as shares of the picture


# --- scores ----------------------------------------------------------------------------------------------------


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x, y, width, height), in [0, 1]."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    return float(both / max(a[2] * a[3] + b[2] * b[3] - both, 1e-12))


def layout_scores(seen: Sequence[Sequence[tuple[int, Box]]], layouts: Sequence[dict]) -> dict[str, float]:
    """{"iou", "found"}, in [0, 1], over all boxes of the layouts: the mean of the greatest IoU with an object of the
    same category that was seen in the picture (0 where there is none), and the share of boxes for which that is at
    least 0.5.

    seen: (category, box) of each object in each picture; layouts: {"bbox": (n, 4), "category": (n,)} a picture.
    """
    best = [
        max([box_iou(box, other) for found, other in objects if found == category], default=0.0)
        for objects, layout in zip(seen, layouts, strict=True)
        for category, box in zip(layout["category"], layout["bbox"])
    ]
    best = best or [0.0]
    return {"iou": float(np.mean(best)), "found": float(np.mean(np.array(best) >= FOUND))}


def map_scores(seen: Sequence[np.ndarray], maps: Sequence[np.ndarray]) -> dict[str, float]:
    """{"accuracy", "miou"}, in [0, 1], of class maps (H, W): the share of pixels that agree, and the mean over the
    classes of `maps` of intersection over union, over all pictures together. Pixels of no class (255) do not count."""
    known = [wanted != NO_CLASS for wanted in maps]
    a = np.concatenate([one[where] for one, where in zip(seen, known, strict=True)]).astype(np.int64)
    b = np.concatenate([one[where] for one, where in zip(maps, known)]).astype(np.int64)
    both, of_a, of_b = (np.bincount(classes, minlength=256) for classes in (b[a == b], a, b))
    there = of_b > 0
    ious = both[there] / (of_a + of_b - both)[there]
    return {"accuracy": float((a == b).mean()) if len(b) else 0.0, "miou": float(ious.mean()) if len(ious) else 0.0}


# --- readers ---------------------------------------------------------------------------------------------------


@dataclass
class ConditionReader:
    """What reads pictures, uint8 (H, W, 3) each: `maps` to class maps (H, W), `objects` to (category, box) lists.

    protocol: what a result states of it.
    """

    maps: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
    objects: Callable[[Sequence[np.ndarray]], list[list[tuple[int, Box]]]]
    protocol: dict[str, Any] = field(default_factory=dict)


def _shapes_reader() -> ConditionReader:
    def objects(images: Sequence[np.ndarray]) -> list[list[tuple[int, Box]]]:
        return [
            [
                (shape, (x / image.shape[1], y / image.shape[0], w / image.shape[1], h / image.shape[0]))
                for shape, _, (x, y, w, h) in shape_reading.find(image)
            ]
            for image in images
        ]

    return ConditionReader(
        lambda images: [shape_reading.classes_of(image) for image in images],
        objects,
        {"reader": "templates of the shapes"},
    )


def regions(classes: np.ndarray, category_of: dict[int, int]) -> list[tuple[int, Box]]:
    """(category, box) of each connected region of a class map (H, W) whose class is one of a category, without those
    below `MIN_REGION`."""
    height, width = classes.shape
    found: list[tuple[int, Box]] = []
    for index in np.unique(classes):
        if int(index) not in category_of:
            continue
        labels, n = ndimage.label(classes == index)
        areas = np.bincount(labels.ravel(), minlength=n + 1)
        for k, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
            if areas[k] >= MIN_REGION * classes.size:
                box = (
                    columns.start / width,
                    rows.start / height,
                    (columns.stop - columns.start) / width,
                    (rows.stop - rows.start) / height,
                )
                found.append((category_of[int(index)], box))
    return found


# --- readers of other data -------------------------------------------------------------------------------------


def rasterise_boxes(layout: dict, size: tuple[int, int]) -> np.ndarray:
    """A layout as a class map, uint8 (H, W), the smallest box on top: 0 between them, 1 + category inside."""
    classes = np.full(size, NOTHING, np.uint8)
    for k in np.argsort([-w * h for _, _, w, h in layout["bbox"]], kind="stable"):
        x, y, w, h = layout["bbox"][k] * np.array([*size[::-1]] * 2)
        classes[round(y) : max(round(y + h), round(y) + 1), round(x) : max(round(x + w), round(x) + 1)] = (
            1 + layout["category"][k]
        )
    return classes


@dataclass
class SegmentationDataset:
    """Training rows as pictures and class maps of one size: of a semantic map, where the data have one that knows
    the categories, else of boxes.

    `category_of`: category of each class that is one.
    """

    rows: Any
    size: tuple[int, int]
    source: ConditionDataset
    of: str  # "map" or "boxes"
    category_of: dict[int, int]
    ids: list[int]
    classes: int

    def image(self, k: int) -> np.ndarray:
        """uint8 (H, W, 3)."""
        return self.rows.pixels(self.ids[k], self.size, "center", (0.5, 0.5))

    def classes_of(self, k: int) -> np.ndarray:
        """uint8 (H, W), 255 = no class."""
        if self.of == MAP:
            return self.source.values(MAP, [self.ids[k]], [0])[0]
        return rasterise_boxes(self.source.values(LAYOUT, [self.ids[k]], [0])[0], self.size)


def segmentation_dataset(condition: str, training, config, size: tuple[int, int]) -> SegmentationDataset:
    """What a segmenter learns, to read pictures for "layout" or "map". Raises InputError where the data lack it."""
    column = CONDITIONS[condition].column
    if not training.has(column):
        raise InputError(
            f"{training.source}: --metrics {condition} needs a {column} column, to train what judges pictures"
        )
    mapped = training.has(SemanticMap.column)
    names = map_names(training) if mapped else []
    categories = list(training.category_names) if condition == LAYOUT else []
    source = ConditionDataset(training, config, size, training=False)
    ids = [k * len(training) // min(len(training), SEGMENTER_ROWS) for k in range(min(len(training), SEGMENTER_ROWS))]
    if mapped and set(categories) <= set(names):
        category_of = {names.index(name): k for k, name in enumerate(categories)}
        data = SegmentationDataset(training, size, source, MAP, category_of, ids, max(len(names), 1))
        for k in range(len(ids)):  # maps may hold classes without a name
            known = data.classes_of(k)
            data.classes = max(data.classes, int(known[known != NO_CLASS].max(initial=0)) + 1)
        return data
    validate_boxes(training)
    category_of = {1 + k: k for k in range(len(categories))}
    return SegmentationDataset(training, size, source, "boxes", category_of, ids, 1 + len(categories))


def open_reader(condition: str, rows, training, config, size: tuple[int, int], progress) -> ConditionReader:
    """What reads pictures of this data for "layout" or "map": templates for shapes, else a segmenter from the cache,
    trained where there is none. rows: those that are measured; training: those that a segmenter learns from.

    Raises InputError where the data lack what the segmenter is to learn.
    """
    if is_shapes(rows.source):
        return _shapes_reader()
    data = segmentation_dataset(condition, training, config, size)
    count, classes = len(data.ids), data.classes
    key = cache_key(training.fingerprint, data.of, f"{size}", f"{classes}", f"{count}", f"{SEGMENTER_VERSION}")
    root = cache_root(config.data.cache_dir)
    path = None if root is None else root / "judges" / f"{key}.safetensors"
    segmenter = load_segmenter(path, classes)
    if segmenter is None:
        with progress(count + TRAIN_STEPS, f"training a judge of {data.of}") as bar:
            segmenter = train_segmenter(data.image, data.classes_of, count, classes, advance=bar.advance)
        if path is not None:
            metadata = {"classes": str(classes), "of": data.of, "rows": str(count), "source": str(training.source)}
            save_segmenter(path, segmenter, metadata)
    protocol = {
        "reader": f"a judge of {data.of}: EfficientNet-lite0 and a head trained on {count:,} training rows, "
        f"{TRAIN_STEPS} steps",
        "judge": key,
        "classes": classes,
    }
    maps = segmenter.maps
    return ConditionReader(maps, lambda images: [regions(one, data.category_of) for one in maps(images)], protocol)


# --- the measure -----------------------------------------------------------------------------------------------

LABELS = {
    "layout_iou": "layout: mean IoU of boxes",
    "layout_found": f"layout: share of boxes with IoU ≥ {FOUND}",
    "map_accuracy": "map: pixel accuracy",
    "map_miou": "map: mean IoU of classes",
}


def condition_fidelity(
    condition: str, images: Sequence[np.ndarray], conditions: Sequence[Any], reader: ConditionReader
) -> dict[str, float]:
    """Scores of pictures (uint8 (H, W, 3)) against their own conditions, and, under names that end in _shuffled, each
    against the next one's. All in [0, 1].

    "layout": conditions are layouts with categories as the reader numbers them; gives layout_iou and layout_found.
    "map": conditions are class maps (H, W); gives map_accuracy and map_miou.
    """
    if condition == LAYOUT:
        seen: list[Any] = reader.objects(images)
        scores: Callable[..., dict[str, float]] = layout_scores
    else:
        seen, scores = reader.maps(images), map_scores
    others = [*conditions[1:], *conditions[:1]]
    own, shuffled = scores(seen, conditions), scores(seen, others)
    return {f"{condition}_{name}": value for name, value in own.items()} | {
        f"{condition}_{name}_shuffled": value for name, value in shuffled.items()
    }


@dataclass(frozen=True, kw_only=True)
class ConditionedSamples:
    """Samples, uint8 (H, W, 3) each, and the rows whose values they are conditioned on: sample k on row ids[k].

    training: rows that a segmenter learns from. size: (height, width) of the samples in pixels.
    """

    images: Sequence[np.ndarray]
    rows: Any
    training: Any
    ids: Sequence[int]
    config: DiffusionConfig
    size: tuple[int, int]
    progress: Callable[[int, str], Any]


def measure(condition: str, samples: ConditionedSamples) -> Scores:
    """Scores of samples against the conditions of their rows, against the next row's (_shuffled), and those of the
    rows' own pictures (_real)."""
    rows, ids, config, size = samples.rows, samples.ids, samples.config, samples.size
    CONDITIONS[condition].validate(rows)
    reader = open_reader(condition, rows, samples.training, config, size, samples.progress)
    conditions = ConditionDataset(rows, config, size, training=False).values(condition, ids, ids)
    scores = condition_fidelity(condition, samples.images, conditions, reader)
    images = [rows.pixels(i, size, "center", (0.5, 0.5)) for i in ids]
    real = condition_fidelity(condition, images, conditions, reader)
    values: dict[str, float | None] = {}
    for key in LABELS:
        if key in scores:
            values |= {key: scores[key], f"{key}_shuffled": scores[f"{key}_shuffled"], f"{key}_real": real[key]}
    return Scores(values, {f"{condition}_obedience": {**reader.protocol, "n": len(samples.images)}})

"""Whether pictures show what they were told: the boxes of a layout, the classes of a map.

Pictures of the embedded shapes are read exactly, by templates. For any other data a judge reads them: frozen features
of EfficientNet-lite0 at four strides under a small head (`SegmentationHead`) that is trained on the data's own
training rows and kept in the cache. Its numbers on real pictures are the ceiling of what it can find in drawn ones, so
they are reported beside, as are those against the condition of the next picture (shuffled).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from ldmcli.conditions.dataset import ConditionSource, look_at_boxes, map_names
from ldmcli.core import files
from ldmcli.core.errors import InputError, ModelError
from ldmcli.data import shapes
from ldmcli.data.cache import cache_key, cache_root
from ldmcli.data.rows import is_shapes
from ldmcli.evaluation.features import FEATURES
from ldmcli.maths import rng
from ldmcli.networks.feature_nets import EfficientNetLite0, load_frozen

KINDS = ("layout", "map")
JUDGE_ROWS = 800  # training rows that a judge learns from, evenly spread
JUDGE_STEPS, JUDGE_BATCH, JUDGE_RATE = 500, 8, 2e-3
JUDGE_VERSION = 1  # a judge of another version is trained again
TAPS = {2: 24, 4: 40, 10: 112, 15: 320}  # block of EfficientNet-lite0 -> channels; strides 4, 8, 16, 32
SHORT_SIDE = 224  # pixels to which a picture is brought for the features
WIDTH = 48
SPECK = 0.0015  # share of the picture below which a region of one class is no thing
FOUND = 0.5  # intersection over union from which a box counts as found
NO_CLASS = 255
NOTHING = 0  # class between the boxes, where boxes stand for a map

Box = tuple[float, float, float, float]  # x, y, width, height as shares of the picture


# --- scores ----------------------------------------------------------------------------------------------------


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x, y, width, height)."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    return float(both / max(a[2] * a[3] + b[2] * b[3] - both, 1e-12))


def layout_scores(seen: Sequence[Sequence[tuple[int, Box]]], asked: Sequence[dict]) -> dict[str, float]:
    """{"iou", "found"} over all boxes asked for: the mean of the greatest IoU with a thing of the same category that
    was seen in the picture (0 where there is none), and the share of boxes for which that is at least 0.5.

    seen: (category, box) of each thing in each picture; asked: {"bbox": (n, 4), "category": (n,)} a picture.
    """
    best = [
        max([box_iou(box, other) for kind, other in things if kind == category], default=0.0)
        for things, one in zip(seen, asked, strict=True)
        for category, box in zip(one["category"], one["bbox"])
    ]
    best = best or [0.0]
    return {"iou": float(np.mean(best)), "found": float(np.mean(np.array(best) >= FOUND))}


def map_scores(seen: Sequence[np.ndarray], asked: Sequence[np.ndarray]) -> dict[str, float]:
    """{"accuracy", "miou"} of class maps (H, W): the share of pixels that agree, and the mean over the classes asked
    for of intersection over union, over all pictures together. Pixels asked to be of no class (255) do not count."""
    known = [one != NO_CLASS for one in asked]
    a = np.concatenate([one[where] for one, where in zip(seen, known, strict=True)]).astype(np.int64)
    b = np.concatenate([one[where] for one, where in zip(asked, known)]).astype(np.int64)
    both, of_a, of_b = (np.bincount(found, minlength=256) for found in (b[a == b], a, b))
    there = of_b > 0
    ious = both[there] / (of_a + of_b - both)[there]
    return {"accuracy": float((a == b).mean()) if len(b) else 0.0, "miou": float(ious.mean()) if len(ious) else 0.0}


# --- readers ---------------------------------------------------------------------------------------------------


@dataclass
class Reader:
    """What reads pictures, uint8 (H, W, 3) each: `maps` to class maps (H, W), `things` to (category, box) lists."""

    maps: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
    things: Callable[[Sequence[np.ndarray]], list[list[tuple[int, Box]]]]
    facts: dict[str, Any] = field(default_factory=dict)


def _shapes_reader() -> Reader:
    def things(images: Sequence[np.ndarray]) -> list[list[tuple[int, Box]]]:
        return [
            [
                (shape, (x / image.shape[1], y / image.shape[0], w / image.shape[1], h / image.shape[0]))
                for shape, _, (x, y, w, h) in shapes.find(image)
            ]
            for image in images
        ]

    return Reader(
        lambda images: [shapes.classes_of(image) for image in images], things, {"reader": "templates of the shapes"}
    )


def regions(classes: np.ndarray, category_of: dict[int, int]) -> list[tuple[int, Box]]:
    """(category, box) of each connected region of a class map (H, W) whose class is one of a category, specks left
    out."""
    height, width = classes.shape
    found: list[tuple[int, Box]] = []
    for index in np.unique(classes):
        if int(index) not in category_of:
            continue
        labels, n = ndimage.label(classes == index)
        areas = np.bincount(labels.ravel(), minlength=n + 1)
        for k, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
            if areas[k] >= SPECK * classes.size:
                box = (
                    columns.start / width,
                    rows.start / height,
                    (columns.stop - columns.start) / width,
                    (rows.stop - rows.start) / height,
                )
                found.append((category_of[int(index)], box))
    return found


# --- the judge -------------------------------------------------------------------------------------------------


class SegmentationHead(nn.Module):
    """Features of `TAPS`, (B, channels, h, w) each -> logits (B, classes, h, w) at the finest stride."""

    def __init__(self, classes: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, WIDTH, 1) for channels in TAPS.values())
        self.norm = nn.GroupNorm(8, WIDTH)
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.out = nn.Conv2d(WIDTH, classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        size = features[0].shape[-2:]
        h = sum(
            F.interpolate(conv(x), size=size, mode="bilinear", align_corners=False)
            for conv, x in zip(self.lateral, features)
        )
        return self.out(F.relu(self.mix(F.relu(self.norm(h)))))


class Judge:
    """Class maps of pictures, by frozen features and a trained head."""

    def __init__(self, classes: int):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.key(0, "judge"))
            self.head = SegmentationHead(classes)
        self.trunk = load_frozen(EfficientNetLite0, FEATURES["effnet-lite0"]())

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> list[Tensor]:
        """uint8 (n, H, W, 3) -> the features of `TAPS`, half precision."""
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
        factor = SHORT_SIDE / min(x.shape[-2:])
        size = [max(32, round(side * factor / 32) * 32) for side in x.shape[-2:]]
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        trunk, found = self.trunk, []
        h = F.relu6(trunk._bn0(trunk._conv_stem((x - 127) / 128)))
        for k, block in enumerate(trunk._blocks):
            h = block(h)
            if k in TAPS:
                found.append(h.half().contiguous())
        return found

    @torch.inference_mode()
    def maps(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Class maps, uint8 (H, W), of uint8 (H, W, 3) pictures of one size."""
        out: list[np.ndarray] = []
        for start in range(0, len(images), JUDGE_BATCH):
            block = np.stack(images[start : start + JUDGE_BATCH])
            logits = self.head([one.float() for one in self.features(block)])
            logits = F.interpolate(logits, size=block.shape[1:3], mode="bilinear", align_corners=False)
            out += list(logits.argmax(1).to(torch.uint8).numpy())
        return out


def train_judge(
    images: Callable[[int], np.ndarray],
    truth: Callable[[int], np.ndarray],
    count: int,
    classes: int,
    *,
    steps: int = JUDGE_STEPS,
    seed: int = 0,
    advance: Callable[[int], Any] = lambda n: None,
) -> Judge:
    """A judge of class maps from `count` rows: images(i) uint8 (H, W, 3) and truth(i) uint8 (H, W), 255 = no class,
    all of one size. Advances once a row and once a step."""
    judge, parts, maps = Judge(classes), [], []
    for start in range(0, count, JUDGE_BATCH):
        ids = range(start, min(start + JUDGE_BATCH, count))
        parts.append(judge.features(np.stack([images(i) for i in ids])))
        maps += [truth(i) for i in ids]
        advance(len(ids))
    features, targets = [torch.cat(level) for level in zip(*parts)], torch.from_numpy(np.stack(maps))
    optimizer = torch.optim.AdamW(judge.head.parameters(), lr=JUDGE_RATE, weight_decay=0.02)
    batch = min(JUDGE_BATCH, count)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = JUDGE_RATE * min(1.0, (steps - step) / (0.6 * steps))
        epoch, place = divmod(step * batch, count - count % batch)
        ids = torch.from_numpy(rng.permutation(seed, epoch, count)[place : place + batch])
        logits = judge.head([level[ids].float() for level in features])
        logits = F.interpolate(logits, size=targets.shape[1:], mode="bilinear", align_corners=False)
        optimizer.zero_grad()
        F.cross_entropy(logits, targets[ids].long(), ignore_index=NO_CLASS).backward()
        optimizer.step()
        advance(1)
    judge.head.eval().requires_grad_(False)
    return judge


def _painted(layout: dict, size: tuple[int, int]) -> np.ndarray:
    """A class map of boxes, the smallest on top: 0 between them, 1 + category inside."""
    classes = np.full(size, NOTHING, np.uint8)
    for k in np.argsort([-w * h for _, _, w, h in layout["bbox"]], kind="stable"):
        x, y, w, h = layout["bbox"][k] * np.array([*size[::-1]] * 2)
        classes[round(y) : max(round(y + h), round(y) + 1), round(x) : max(round(x + w), round(x) + 1)] = (
            1 + layout["category"][k]
        )
    return classes


def open_reader(kind: str, rows, training, config, size: tuple[int, int], progress) -> Reader:
    """What reads pictures of this data for conditions of a kind: templates for shapes, else a judge from the cache,
    trained where there is none. rows: those that are measured; training: those that a judge learns from.

    Raises InputError where the data lack what the judge is to learn.
    """
    if is_shapes(rows.source):
        return _shapes_reader()
    column = {"layout": "objects", "map": "map"}[kind]
    if not training.has(column):
        raise InputError(f"{training.source}: --metrics {kind} needs a {column} column, to train what judges pictures")
    names = map_names(training) if training.has("map") else []
    categories = list(training.category_names) if kind == "layout" else []
    mapped = set(categories) <= set(names) and training.has("map")  # things are classes of the map
    source = ConditionSource(training, config, size, training=False)
    if mapped:
        category_of = {names.index(name): k for k, name in enumerate(categories)}
        what, classes = "map", max(len(names), 1)
    else:
        look_at_boxes(training)
        category_of = {1 + k: k for k in range(len(categories))}
        what, classes = "boxes", 1 + len(categories)
    picked = [k * len(training) // min(len(training), JUDGE_ROWS) for k in range(min(len(training), JUDGE_ROWS))]

    def truth(k: int) -> np.ndarray:
        if mapped:
            return source.values("map", [picked[k]], [0])[0]
        return _painted(source.layout(picked[k]), size)

    if mapped:
        known = [int(one[one != NO_CLASS].max(initial=0)) for one in map(truth, range(len(picked)))]
        classes = max(classes, *(index + 1 for index in known))
    key = cache_key(training.fingerprint, what, f"{size}", f"{classes}", f"{len(picked)}", f"{JUDGE_VERSION}")
    root = cache_root(config.data.cache_dir)
    path = None if root is None else root / "judges" / f"{key}.safetensors"
    judge = None if path is None else _stored(path, classes)
    if judge is None:
        with progress(len(picked) + JUDGE_STEPS, f"training a judge of {what}") as bar:
            judge = train_judge(
                lambda k: training.pixels(picked[k], size, "center", (0.5, 0.5)),
                truth,
                len(picked),
                classes,
                advance=bar.advance,
            )
        told = {"classes": str(classes), "of": what, "rows": str(len(picked)), "source": str(training.source)}
        if path is not None:
            files.save_tensors(path, judge.head.state_dict(), told)
    facts = {
        "reader": f"a judge of {what}: EfficientNet-lite0 and a head trained on {len(picked):,} training rows, "
        f"{JUDGE_STEPS} steps",
        "judge": key,
        "classes": classes,
    }
    return Reader(judge.maps, lambda images: [regions(one, category_of) for one in judge.maps(images)], facts)


def _stored(path: Path, classes: int) -> Judge | None:
    if not path.is_file():
        return None
    try:
        tensors, _ = files.load_tensors(path)
        judge = Judge(classes)
        judge.head.load_state_dict(tensors)
    except (ModelError, RuntimeError):
        return None  # damaged: it is trained again
    judge.head.eval().requires_grad_(False)
    return judge


# --- the measure -----------------------------------------------------------------------------------------------


def obedience(kind: str, images: Sequence[np.ndarray], asked: Sequence[Any], reader: Reader) -> dict[str, float]:
    """Scores of pictures (uint8 (H, W, 3)) against their own conditions, and, under names that end in _shuffled, each
    against the next one's.

    kind "layout": asked are layouts with categories as the reader numbers them; gives layout_iou and layout_found.
    kind "map": asked are class maps (H, W); gives map_accuracy and map_miou.
    """
    if kind == "layout":
        seen: list[Any] = reader.things(images)
        scores: Callable[..., dict[str, float]] = layout_scores
    else:
        seen, scores = reader.maps(images), map_scores
    others = [*asked[1:], *asked[:1]]
    own, shuffled = scores(seen, asked), scores(seen, others)
    return {f"{kind}_{name}": value for name, value in own.items()} | {
        f"{kind}_{name}_shuffled": value for name, value in shuffled.items()
    }


LABELS = {
    "layout_iou": "layout: mean IoU of boxes",
    "layout_found": f"layout: share of boxes with IoU ≥ {FOUND}",
    "map_accuracy": "map: pixel accuracy",
    "map_miou": "map: mean IoU of classes",
}


def measure(
    kind: str, images: Sequence[np.ndarray], rows, training, ids: Sequence[int], config, size: tuple[int, int], progress
) -> tuple[dict[str, tuple[str, float]], dict[str, Any]]:
    """({key: (label, value)}, facts) of pictures drawn for the conditions of rows `ids`: their scores, those against
    the next row's condition (_shuffled), and those of the rows' own pictures (_real)."""
    if kind == "layout":
        look_at_boxes(rows)
    reader = open_reader(kind, rows, training, config, size, progress)
    asked = ConditionSource(rows, config, size, training=False).values(kind, ids, ids)
    drawn = obedience(kind, images, asked, reader)
    real = obedience(kind, [rows.pixels(i, size, "center", (0.5, 0.5)) for i in ids], asked, reader)
    found: dict[str, tuple[str, float]] = {}
    for key, label in LABELS.items():
        if key in drawn:
            found[key] = (label, drawn[key])
            found[f"{key}_shuffled"] = (f"{label}, against the next condition", drawn[f"{key}_shuffled"])
            found[f"{key}_real"] = (f"{label}, of real pictures", real[key])
    return found, {**reader.facts, "n": len(images)}

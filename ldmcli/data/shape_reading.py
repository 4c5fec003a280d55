"""The embedded shapes read back from pixels: background, colours, shapes and places, by comparing with templates; no
network is trained for it. `check` compares a picture with a prompt, `score` many."""

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from scipy import ndimage

from ldmcli.data.shape_sdf import SHAPES, coverage, template
from ldmcli.data.shapes import (
    BACKGROUND_RGB,
    COLOUR_RGB,
    PLACE_NAMES,
    RELATION_NAMES,
    RELATIONS,
    Expectation,
    ShapeObject,
    Spec,
    box,
    parse,
    pixel_window,
)


@dataclass(frozen=True)
class Reading:
    """One object found in a picture: colour and shape indices, centre as shares of width and height, how well the
    shape's template covers it (intersection over union, 0 … 1), and the template's half extent as a share of the
    short side."""

    colour: int
    shape: int
    x: float
    y: float
    iou: float
    radius: float


MIN_AREA = 0.008  # share of the picture's (short side)² below which a blob is a speck; the smallest star has 0.018


MIN_IOU = 0.5  # a blob that no template covers so well has no shape


CENTER_REACH = 0.115  # objects nearer to the middle than this, in both directions, are in the center


def read(image: np.ndarray) -> tuple[int, list[Reading]]:
    """Background index and the objects in a picture, largest first. image: uint8 (h, w, 3)."""
    background, found = _blobs(image)
    return background, [reading for reading, _ in found]


def find(image: np.ndarray) -> list[tuple[int, int, tuple[float, float, float, float]]]:
    """(shape, colour, box) of each object in a picture (uint8 (h, w, 3)), largest first: indices into SHAPES and
    COLOURS, and x, y, width, height in pixels of the template that fits it. What fits none is left out."""
    size, found = image.shape[:2], []
    for one in read(image)[1]:
        if one.iou >= MIN_IOU:
            thing = ShapeObject(one.shape, one.colour, one.x, one.y, one.radius)
            found.append((one.shape, one.colour, box(thing, size)))
    return found


def classes_of(image: np.ndarray) -> np.ndarray:
    """The class map that a picture (uint8 (h, w, 3)) shows, as `segment` makes it: 0 background, 1 + shape where an
    object's colour outweighs the background's."""
    classes = np.zeros(image.shape[:2], np.uint8)
    for reading, alpha in _blobs(image)[1]:
        classes[alpha >= 0.5] = 1 + reading.shape
    return classes


def _blobs(image: np.ndarray) -> tuple[int, list[tuple[Reading, np.ndarray]]]:
    """Background index, and what each object reads as with its coverage (h, w)."""
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = _nearest(np.median(border, axis=0), BACKGROUND_RGB)
    ground = np.median(border, axis=0)
    difference = np.sqrt(((pixels - ground) ** 2).sum(-1))
    labels, n = ndimage.label(difference > _threshold(background))
    smallest = MIN_AREA * min(image.shape[:2]) ** 2
    areas = np.bincount(labels.ravel(), minlength=n + 1)
    kept = [k for k in np.argsort(-areas[1:], kind="stable") + 1 if areas[k] >= smallest]
    return background, [_read_blob(pixels, ground, difference, labels, k) for k in kept]


@cache
def _threshold(background: int) -> float:
    """Half the distance from a background to the colour nearest to it."""
    return float(np.sqrt(((COLOUR_RGB - BACKGROUND_RGB[background]) ** 2).sum(-1)).min() / 2)


def _nearest(rgb: np.ndarray, palette: np.ndarray) -> int:
    return int(((palette - rgb) ** 2).sum(-1).argmin())


def _read_blob(pixels, ground, difference, labels, label: int) -> tuple[Reading, np.ndarray]:
    inside = labels == label
    strong = inside & (difference >= np.quantile(difference[inside], 0.6))
    core = np.median(pixels[strong], axis=0)
    axis = core - ground
    alpha = np.clip((pixels - ground) @ axis / max(float(axis @ axis), 1e-6), 0.0, 1.0)
    alpha *= ndimage.binary_dilation(inside, iterations=2) & ((labels == 0) | inside)
    alpha[alpha < 0.08] = 0.0  # noise of the background
    fits = [_fit(alpha, shape) for shape in range(len(SHAPES))]
    shape = max(range(len(SHAPES)), key=lambda k: fits[k][0])
    _, iou, x, y, radius = fits[shape]
    place = (x / pixels.shape[1], y / pixels.shape[0])
    return Reading(_nearest(core, COLOUR_RGB), shape, *place, iou, radius / min(pixels.shape[:2])), alpha


def _fit(alpha: np.ndarray, shape: int) -> tuple[float, float, float, float, float]:
    """How well coverage `alpha` fits the template of equal area and centroid: soft IoU with the best of a sharp and
    two blurred templates, soft IoU with the sharp one, and the template's centre x, y and half extent in pixels."""
    area, centroid_x, centroid_y = template(shape)
    total = float(alpha.sum())
    radius = max((total / area) ** 0.5, 1.0)
    x = float((alpha.sum(0) * (np.arange(alpha.shape[1]) + 0.5)).sum() / total) - radius * centroid_x
    y = float((alpha.sum(1) * (np.arange(alpha.shape[0]) + 0.5)).sum() / total) - radius * centroid_y
    window = pixel_window(x, y, radius + 4, alpha.shape)
    near, sharp = alpha[window], coverage(shape, x, y, radius, window)
    ious = [_soft_iou(near, ndimage.uniform_filter(sharp, k) if k > 1 else sharp) for k in (1, 3, 5)]
    return max(ious), ious[0], x, y, radius


def _soft_iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def place_of(x: float, y: float) -> int:
    """Index into PLACES of a centre given as shares of width and height."""
    dx, dy = x - 0.5, y - 0.5
    if max(abs(dx), abs(dy)) < CENTER_REACH:
        return PLACE_NAMES.index("center")
    name = ("left" if dx < 0 else "right") if abs(dx) >= abs(dy) else ("top" if dy < 0 else "bottom")
    return PLACE_NAMES.index(name)


def check(image: np.ndarray, expectation: Expectation | Spec | str) -> dict[str, bool | float | None]:
    """What of a prompt a picture (uint8 (h, w, 3)) shows.

    `colour`, `shape`: of all objects, each at the place where the best assignment of found to wanted objects puts it;
    `position`: place or relations; `background`; `count`: as many objects as wanted; `all`: everything in the prompt;
    `iou`: mean overlap of the wanted objects with their shape's template. None where the prompt does not say.
    """
    wanted = _expectation(expectation)
    background, found = read(image)
    n = len(wanted.things)
    padded = [*found, *[None] * max(n - len(found), 0)][: max(n, 4)]
    found_for = max(permutations(padded, n), key=lambda chosen: sum(map(_weight, _verdicts(wanted, chosen))))
    colours, shapes, positions = _verdicts(wanted, found_for)
    result: dict[str, bool | float | None] = {
        "colour": _every(colours),
        "shape": _every(shapes),
        "position": _every(positions),
        "background": None if wanted.background is None else wanted.background == background,
        "count": len(found) == n,
    }
    result["all"] = all(value is not False for value in result.values())
    result["iou"] = sum(one.iou for one in found_for if one) / max(n, 1)
    return result


def _expectation(given: Expectation | Spec | str) -> Expectation:
    if isinstance(given, str):
        return parse(given)
    if isinstance(given, Expectation):
        return given
    place = given.place if given.says_place else None
    return Expectation(tuple((t.colour, t.shape) for t in given.things), given.relations, place, given.background)


def _verdicts(wanted: Expectation, found) -> tuple[list, list, list]:
    """Verdicts (True, False, None = not in the prompt) on colours, shapes and positions of things matched in order."""
    colours = [None if c is None else bool(f and f.colour == c) for f, (c, _) in zip(found, wanted.things)]
    shapes = [
        None if s is None else bool(f and f.shape == s and f.iou >= MIN_IOU) for f, (_, s) in zip(found, wanted.things)
    ]
    positions = [
        None if r is None else bool(found[0] and f and _related(found[0], f, r))
        for f, r in zip(found[1:], wanted.relations)
    ]
    if wanted.place is not None and found:
        positions.append(bool(found[0] and place_of(found[0].x, found[0].y) == wanted.place))
    return colours, shapes, positions


def _related(first: Reading, second: Reading, relation: int) -> bool:
    """Whether `first` lies in the relation's direction from `second`, more so than across it."""
    dx, dy = RELATIONS[RELATION_NAMES[relation]]
    along = (first.x - second.x) * dx + (first.y - second.y) * dy
    across = abs((first.x - second.x) * dy) + abs((first.y - second.y) * dx)
    return along > across


def _weight(verdicts: list) -> int:
    return sum(value is True for value in verdicts)


def _every(verdicts: list) -> bool | None:
    given = [value for value in verdicts if value is not None]
    return all(given) if given else None


def score(images, prompts) -> dict[str, float]:
    """Means of `check` over pairs of uint8 (h, w, 3) images and prompts, and `n`. A value that no prompt has
    is NaN; each mean is over the prompts that have it."""
    rows = [check(np.asarray(image), prompt) for image, prompt in zip(images, prompts, strict=True)]
    means: dict[str, float] = {"n": len(rows)}
    for key in ("colour", "shape", "position", "background", "count", "all", "iou"):
        given = [float(value) for row in rows if (value := row[key]) is not None]
        means[key] = sum(given) / len(given) if given else float("nan")
    return means

"""The embedded data set: coloured shapes with captions, boxes and class maps, drawn on the fly.

Three levels: one object at a place (1,680 combinations, 128 of them held out), two objects with a relation, three
objects with two relations. Everything is a pure function of (seed, index, level, split); the size only says how many
pixels are drawn. `check` reads colour, shape, place and background back from pixels by comparing with templates; no
network is trained for it.
"""

import re
from dataclasses import dataclass
from functools import cache
from itertools import count, permutations

import numpy as np
from scipy import ndimage

from ldmcli.core.errors import UsageError
from ldmcli.data.shape_sdf import EXTENTS, SHAPES, coverage, template

COLOURS = {
    "red": (225, 30, 35),
    "green": (20, 165, 60),
    "blue": (40, 80, 240),
    "yellow": (250, 230, 40),
    "orange": (250, 125, 10),
    "purple": (130, 30, 170),
    "cyan": (40, 215, 235),
    "pink": (250, 130, 185),
}
BACKGROUNDS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "navy": (10, 20, 80),
    "brown": (90, 50, 25),
    "cream": (255, 245, 205),
}
PLACES = {  # phrase of the caption, centre as a share of width and height
    "left": ("on the left of", 0.27, 0.5),
    "right": ("on the right of", 0.73, 0.5),
    "top": ("at the top of", 0.5, 0.27),
    "bottom": ("at the bottom of", 0.5, 0.73),
    "center": ("in the center of", 0.5, 0.5),
}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # where the first one lies
LEVELS = (1, 2, 3)
TRAIN_ROWS = 12_000
VALIDATION_ROWS = 512
N_HELD_OUT = 128
NO_PLACE_SHARE = 0.1  # share of training captions of level 1 that do not say the place
RADIUS = {1: 0.172, 2: 0.160, 3: 0.150}  # half extent as a share of the short side: 22, 20.5 and 19 px at 64
SCALE_JITTER = 0.1  # relative, either way
PLACE_JITTER = {1: 0.04, 2: 0.035, 3: 0.03}  # share of the side, either way
SIDEWAYS_JITTER = 0.12  # level 2: across the relation's axis
CORNER = 0.255  # level 2 and 3: distance of object centres from the border

_COLOUR_NAMES, _BACKGROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)
_PLACE_NAMES, _RELATION_NAMES = tuple(PLACES), tuple(RELATIONS)
_COLOUR_RGB = np.array(list(COLOURS.values()), np.float32)
_BACKGROUND_RGB = np.array(list(BACKGROUNDS.values()), np.float32)
COMBINATIONS = len(SHAPES) * len(COLOURS) * len(BACKGROUNDS) * len(PLACES)


@dataclass(frozen=True, repr=False)
class ShapeObject:
    """One object: indices into SHAPES and COLOURS; centre as shares of width and height; half extent as a share."""

    shape: int
    colour: int
    x: float
    y: float
    radius: float  # share of the image's short side

    def __repr__(self) -> str:
        # rows are hashed by it: caches and runs already on disk know an object as Thing
        numbers = (f"{name}={getattr(self, name)!r}" for name in self.__dataclass_fields__)
        return f"Thing({', '.join(numbers)})"


@dataclass(frozen=True)
class Spec:
    """One picture. `place` is an index into PLACES (level 1), `relations` indices into RELATIONS (levels 2 and 3):
    relation k holds between thing 0 and thing k + 1."""

    level: int
    background: int
    things: tuple[ShapeObject, ...]
    place: int | None = None
    says_place: bool = True
    relations: tuple[int, ...] = ()


@dataclass(frozen=True)
class Expectation:
    """What a prompt asks for; None = the prompt does not say. `things` are (colour, shape) index pairs."""

    things: tuple[tuple[int | None, int | None], ...]
    relations: tuple[int | None, ...] = ()
    place: int | None = None
    background: int | None = None


# --- drawing lots ----------------------------------------------------------------------------------------

_MASK = (1 << 64) - 1


def _mix(*numbers: int) -> int:
    """A 64-bit hash of integers (splitmix64 finaliser): the only source of chance here, the same on every machine."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state = (state ^ state >> 31) + 0x9E3779B97F4A7C15 & _MASK
    return state ^ state >> 29


class _KeyedDraws:
    """A short row of draws for one picture."""

    def __init__(self, *key: int):
        self.key, self.count = _mix(*key), 0

    def unit(self) -> float:
        self.count += 1
        return (_mix(self.key, self.count) >> 11) / (1 << 53)

    def below(self, n: int) -> int:
        return int(self.unit() * n)

    def around(self, width: float) -> float:
        return (2 * self.unit() - 1) * width


def combination(number: int) -> tuple[int, int, int, int]:
    """(shape, colour, background, place) of combination `number`, 0 … 1,679."""
    number, place = divmod(number, len(PLACES))
    number, background = divmod(number, len(BACKGROUNDS))
    shape, colour = divmod(number, len(COLOURS))
    return shape, colour, background, place


def _held_out_rule() -> tuple[int, ...]:
    """128 combinations, spread evenly: in hash order, each taken while none of its four values has too many."""
    counts = [[0] * len(names) for names in (SHAPES, COLOURS, BACKGROUNDS, PLACES)]
    caps = [-(-N_HELD_OUT // len(row)) for row in counts]
    chosen: list[int] = []
    for number in sorted(range(COMBINATIONS), key=lambda n: _mix(1680, n)):
        values = combination(number)
        if len(chosen) < N_HELD_OUT and all(row[v] < cap for row, v, cap in zip(counts, values, caps)):
            chosen.append(number)
            for row, value in zip(counts, values):
                row[value] += 1
    return tuple(chosen)


HELD_OUT = _held_out_rule()
_TRAIN_COMBINATIONS = tuple(sorted(set(range(COMBINATIONS)) - set(HELD_OUT)))


def spec(index: int, *, seed: int = 0, level: int = 1, split: str = "train") -> Spec:
    """The picture at `index`: a pure function of its arguments. Training rows never show a held-out combination;
    level 1 validation rows are HELD_OUT in order, over and over with new jitter."""
    if level not in LEVELS:
        raise UsageError(f"shapes:{level}: the levels are 1, 2 and 3")
    if split not in ("train", "validation"):
        raise UsageError(f"shapes have no split {split!r}: choose train or validation")
    draw = _single if level == 1 else _several
    return draw(index, seed, level, split)


def _single(index: int, seed: int, level: int, split: str) -> Spec:
    held_out = split == "validation"
    lots = _KeyedDraws(seed, level, held_out, index)
    number = HELD_OUT[index % N_HELD_OUT] if held_out else _TRAIN_COMBINATIONS[lots.below(len(_TRAIN_COMBINATIONS))]
    shape, colour, background, place = combination(number)
    _, x, y = PLACES[_PLACE_NAMES[place]]
    says_place = held_out or lots.unit() >= NO_PLACE_SHARE
    thing = _shape_object(lots, level, shape, colour, (x, y), (0.0, 0.0))
    return Spec(level, background, (thing,), place, says_place)


def _shape_object(lots: _KeyedDraws, level: int, shape: int, colour: int, centre, sideways) -> ShapeObject:
    jitter = PLACE_JITTER[level]
    radius = RADIUS[level] * (1 + lots.around(SCALE_JITTER))
    x = centre[0] + lots.around(jitter + sideways[0])
    y = centre[1] + lots.around(jitter + sideways[1])
    return ShapeObject(shape, colour, x, y, radius)


def _several(index: int, seed: int, level: int, split: str) -> Spec:
    """Levels 2 and 3: attempts are numbered, and the first on the right side of the held-out rule is taken."""
    attempt = 0
    while True:
        lots = _KeyedDraws(seed, level, split == "validation", index, attempt)
        content = _content(lots, level)
        if (_mix(16, level, *content) % 16 == 0) == (split == "validation"):
            return _arrange(lots, level, content)
        attempt += 1


def _content(lots: _KeyedDraws, level: int) -> tuple[int, ...]:
    """(background, relations…, colours…, shapes…); colours differ, the relations of level 3 have different axes."""
    relations = [lots.below(4)]
    if level == 3:
        relations.append((relations[0] // 2 * 2 + 2 + lots.below(2)) % 4)
    colours: list[int] = []
    while len(colours) < level:
        colour = lots.below(len(COLOURS))
        if colour not in colours:
            colours.append(colour)
    shapes = [lots.below(len(SHAPES)) for _ in range(level)]
    return (lots.below(len(BACKGROUNDS)), *relations, *colours, *shapes)


def _arrange(lots: _KeyedDraws, level: int, content: tuple[int, ...]) -> Spec:
    background, relations = content[0], content[1:level]
    colours, shapes = content[level : 2 * level], content[2 * level :]
    directions = [RELATIONS[_RELATION_NAMES[r]] for r in relations]
    reach = 0.5 - CORNER
    first = (0.5 + reach * sum(d[0] for d in directions), 0.5 + reach * sum(d[1] for d in directions))
    centres = [first] + [(first[0] - 2 * reach * dx, first[1] - 2 * reach * dy) for dx, dy in directions]
    sideways = (0.0, 0.0)
    if level == 2:
        sideways = tuple(0.0 if d else SIDEWAYS_JITTER for d in directions[0])
    things = tuple(_shape_object(lots, level, s, c, at, sideways) for s, c, at in zip(shapes, colours, centres))
    return Spec(level, background, things, relations=tuple(relations))


# --- words -----------------------------------------------------------------------------------------------


def caption(spec: Spec) -> str:
    """The picture in words, e.g. "a red circle on the left of a navy background"."""
    words = [f"{_article(_COLOUR_NAMES[t.colour])} {SHAPES[t.shape]}" for t in spec.things]
    background = f"{_article(_BACKGROUND_NAMES[spec.background])} background"
    if spec.level == 1:
        said = spec.place is not None and spec.says_place
        return f"{words[0]} {PLACES[_PLACE_NAMES[spec.place]][0] if said else 'on'} {background}"
    parts = [f"{_RELATION_NAMES[r]} {word}" for r, word in zip(spec.relations, words[1:])]
    return f"{words[0]} {' and '.join(parts)} on {background}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def held_out_prompts(level: int = 1, n: int = N_HELD_OUT, *, seed: int = 0) -> list[tuple[str, Spec]]:
    """The first n distinct prompts that no training row shows, each with a picture of it. Level 1 has 128 and gives
    no more."""
    if level == 1:
        n = min(n, N_HELD_OUT)
    found: dict[str, Spec] = {}
    for index in count():
        if len(found) >= n:
            return list(found.items())
        one = spec(index, seed=seed, level=level, split="validation")
        found.setdefault(caption(one), one)


def _either(names) -> str:
    return "|".join(sorted(names, key=len, reverse=True))


_THING = re.compile(rf"\b(?:({_either(COLOURS)})\s+)?({_either(SHAPES)})s?\b")
_GROUND = re.compile(rf"\b({_either(BACKGROUNDS)})\s+background\b")
_PLACE = re.compile(rf"\b({_either(PLACES)})\b")
_RELATION = re.compile(rf"\b({_either(RELATIONS)})\b")


def parse(prompt: str) -> Expectation:
    """What a prompt in the captions' words asks for. Anything it does not say is None; no objects = no `things`."""
    text = re.sub(r"\s+", " ", prompt.lower()).replace("grey", "gray").replace("centre", "center")
    text = text.replace("middle", "center")
    found = list(_THING.finditer(text))
    things = tuple((_index(_COLOUR_NAMES, m[1]), SHAPES.index(m[2])) for m in found)
    relations = tuple(_first(_RELATION, text[a.end() : b.start()], _RELATION_NAMES) for a, b in zip(found, found[1:]))
    tail = text[found[-1].end() :] if found else text
    place = _first(_PLACE, tail, _PLACE_NAMES) if len(found) == 1 else None
    return Expectation(things, relations, place, _first(_GROUND, text, _BACKGROUND_NAMES))


def _index(names: tuple[str, ...], word: str | None) -> int | None:
    return None if word is None else names.index(word)


def _first(pattern: re.Pattern, text: str, names: tuple[str, ...]) -> int | None:
    match = pattern.search(text)
    return _index(names, match[1] if match else None)


# --- pixels ----------------------------------------------------------------------------------------------


def _place_pixels(thing: ShapeObject, size: tuple[int, int]) -> tuple[float, float, float]:
    """Centre x, y and half extent of a thing in pixels."""
    return thing.x * size[1], thing.y * size[0], thing.radius * min(size)


def _window(x: float, y: float, reach: float, size: tuple[int, int]) -> tuple[slice, slice]:
    """The pixels within `reach` of (x, y) that lie in the picture, as (rows, columns)."""
    rows = slice(max(int(y - reach), 0), min(int(y + reach) + 2, size[0]))
    return rows, slice(max(int(x - reach), 0), min(int(x + reach) + 2, size[1]))


def render(spec: Spec, size: tuple[int, int]) -> np.ndarray:
    """The picture as uint8 (h, w, 3), antialiased. `size` is (height, width) in pixels, at least 16 each."""
    image = np.empty((*size, 3), np.uint8)
    image[:] = BACKGROUNDS[_BACKGROUND_NAMES[spec.background]]
    for thing in spec.things:
        x, y, radius = _place_pixels(thing, size)
        window = _window(x, y, radius + 1, size)
        alpha = coverage(thing.shape, x, y, radius, window)[..., None]
        ground = _BACKGROUND_RGB[spec.background]
        image[window] = (ground + alpha * (_COLOUR_RGB[thing.colour] - ground) + 0.5).astype(np.uint8)
    return image


def segment(spec: Spec, size: tuple[int, int]) -> np.ndarray:
    """Class map, uint8 (h, w): 0 background, 1 + shape index where a shape covers at least half of the pixel."""
    classes = np.zeros(size, np.uint8)
    for thing in spec.things:
        x, y, radius = _place_pixels(thing, size)
        window = _window(x, y, radius + 1, size)
        classes[window][coverage(thing.shape, x, y, radius, window) >= 0.5] = 1 + thing.shape
    return classes


def boxes(spec: Spec, size: tuple[int, int]) -> list[tuple[float, float, float, float]]:
    """Tight boxes (x, y, width, height) in pixels, one a thing."""
    return [_box(thing, size) for thing in spec.things]


def _box(thing: ShapeObject, size: tuple[int, int]) -> tuple[float, float, float, float]:
    x, y, radius = _place_pixels(thing, size)
    left, top, right, bottom = EXTENTS[SHAPES[thing.shape]]
    return x + left * radius, y + top * radius, (right - left) * radius, (bottom - top) * radius


# --- reading pictures back -------------------------------------------------------------------------------


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
            found.append((one.shape, one.colour, _box(thing, size)))
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
    background = _nearest(np.median(border, axis=0), _BACKGROUND_RGB)
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
    return float(np.sqrt(((_COLOUR_RGB - _BACKGROUND_RGB[background]) ** 2).sum(-1)).min() / 2)


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
    return Reading(_nearest(core, _COLOUR_RGB), shape, *place, iou, radius / min(pixels.shape[:2])), alpha


def _fit(alpha: np.ndarray, shape: int) -> tuple[float, float, float, float, float]:
    """How well coverage `alpha` fits the template of equal area and centroid: soft IoU with the best of a sharp and
    two blurred templates, soft IoU with the sharp one, and the template's centre x, y and half extent in pixels."""
    area, centroid_x, centroid_y = template(shape)
    total = float(alpha.sum())
    radius = max((total / area) ** 0.5, 1.0)
    x = float((alpha.sum(0) * (np.arange(alpha.shape[1]) + 0.5)).sum() / total) - radius * centroid_x
    y = float((alpha.sum(1) * (np.arange(alpha.shape[0]) + 0.5)).sum() / total) - radius * centroid_y
    window = _window(x, y, radius + 4, alpha.shape)
    near, sharp = alpha[window], coverage(shape, x, y, radius, window)
    ious = [_soft_iou(near, ndimage.uniform_filter(sharp, k) if k > 1 else sharp) for k in (1, 3, 5)]
    return max(ious), ious[0], x, y, radius


def _soft_iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def place_of(x: float, y: float) -> int:
    """Index into PLACES of a centre given as shares of width and height."""
    dx, dy = x - 0.5, y - 0.5
    if max(abs(dx), abs(dy)) < CENTER_REACH:
        return _PLACE_NAMES.index("center")
    name = ("left" if dx < 0 else "right") if abs(dx) >= abs(dy) else ("top" if dy < 0 else "bottom")
    return _PLACE_NAMES.index(name)


def check(image: np.ndarray, expectation: Expectation | Spec | str) -> dict[str, bool | float | None]:
    """What of a prompt a picture (uint8 (h, w, 3)) shows.

    `colour`, `shape`: of all objects, each at the place where the best assignment of found to wanted objects puts it;
    `position`: place or relations; `background`; `count`: as many objects as wanted; `all`: everything asked for;
    `iou`: mean overlap of the wanted objects with their shape's template. None where the prompt does not say.
    """
    wanted = _expectation(expectation)
    background, found = read(image)
    n = len(wanted.things)
    padded = [*found, *[None] * max(n - len(found), 0)][: max(n, 4)]
    found_for = max(permutations(padded, n), key=lambda chosen: sum(map(_weight, _judge(wanted, chosen))))
    colours, shapes, positions = _judge(wanted, found_for)
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


def _judge(wanted: Expectation, found) -> tuple[list, list, list]:
    """Verdicts (True, False, None = not asked) on colours, shapes and positions of things matched in order."""
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
    dx, dy = RELATIONS[_RELATION_NAMES[relation]]
    along = (first.x - second.x) * dx + (first.y - second.y) * dy
    across = abs((first.x - second.x) * dy) + abs((first.y - second.y) * dx)
    return along > across


def _weight(verdicts: list) -> int:
    return sum(value is True for value in verdicts)


def _every(verdicts: list) -> bool | None:
    asked = [value for value in verdicts if value is not None]
    return all(asked) if asked else None


def score(images, prompts) -> dict[str, float]:
    """Means of `check` over pairs of uint8 (h, w, 3) images and prompts, and `n`. A value that no prompt asks for
    is NaN; each mean is over the prompts that ask for it."""
    rows = [check(np.asarray(image), prompt) for image, prompt in zip(images, prompts, strict=True)]
    means: dict[str, float] = {"n": len(rows)}
    for key in ("colour", "shape", "position", "background", "count", "all", "iou"):
        asked = [float(row[key]) for row in rows if row[key] is not None]
        means[key] = sum(asked) / len(asked) if asked else float("nan")
    return means

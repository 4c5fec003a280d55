"""The embedded data set: coloured shapes with captions, boxes and class maps, drawn on the fly.

Three levels: one object at a place (1,680 combinations, 128 of them held out), two objects with a relation, three
objects with two relations. Everything is a pure function of (seed, index, level, split); the size only says how many
pixels are drawn. `shape_reading` reads pictures back.
"""

import re
from dataclasses import dataclass, replace

import numpy as np

from ldmcli.core.errors import UsageError
from ldmcli.data.shape_sdf import EXTENTS, SHAPES, coverage

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

COLOUR_NAMES, BACKGROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)
PLACE_NAMES, RELATION_NAMES = tuple(PLACES), tuple(RELATIONS)
COLOUR_RGB = np.array(list(COLOURS.values()), np.float32)
BACKGROUND_RGB = np.array(list(BACKGROUNDS.values()), np.float32)
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
    """What a prompt describes; None = the prompt does not say. `things` are (colour, shape) index pairs."""

    things: tuple[tuple[int | None, int | None], ...]
    relations: tuple[int | None, ...] = ()
    place: int | None = None
    background: int | None = None


# --- keyed draws -----------------------------------------------------------------------------------------

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
    draws = _KeyedDraws(seed, level, held_out, index)
    number = HELD_OUT[index % N_HELD_OUT] if held_out else _TRAIN_COMBINATIONS[draws.below(len(_TRAIN_COMBINATIONS))]
    shape, colour, background, place = combination(number)
    _, x, y = PLACES[PLACE_NAMES[place]]
    says_place = held_out or draws.unit() >= NO_PLACE_SHARE
    thing = _shape_object(draws, level, shape, colour, (x, y), (0.0, 0.0))
    return Spec(level, background, (thing,), place, says_place)


def _shape_object(draws: _KeyedDraws, level: int, shape: int, colour: int, centre, sideways) -> ShapeObject:
    jitter = PLACE_JITTER[level]
    radius = RADIUS[level] * (1 + draws.around(SCALE_JITTER))
    x = centre[0] + draws.around(jitter + sideways[0])
    y = centre[1] + draws.around(jitter + sideways[1])
    return ShapeObject(shape, colour, x, y, radius)


def _several(index: int, seed: int, level: int, split: str) -> Spec:
    """Levels 2 and 3: attempts are numbered, and the first on the right side of the held-out rule is taken."""
    attempt = 0
    while True:
        draws = _KeyedDraws(seed, level, split == "validation", index, attempt)
        content = _content(draws, level)
        if _is_held_out(level, content) == (split == "validation"):
            return _arrange(draws, level, content)
        attempt += 1


def _is_held_out(level: int, content: tuple[int, ...]) -> bool:
    """Whether what a picture of level 2 or 3 shows, in the order of its words, belongs to validation."""
    return _mix(16, level, *content) % 16 == 0


def _content(draws: _KeyedDraws, level: int) -> tuple[int, ...]:
    """(background, relations…, colours…, shapes…); colours differ, the relations of level 3 have different axes."""
    relations = [draws.below(4)]
    if level == 3:
        relations.append((relations[0] // 2 * 2 + 2 + draws.below(2)) % 4)
    colours: list[int] = []
    while len(colours) < level:
        colour = draws.below(len(COLOURS))
        if colour not in colours:
            colours.append(colour)
    shapes = [draws.below(len(SHAPES)) for _ in range(level)]
    return (draws.below(len(BACKGROUNDS)), *relations, *colours, *shapes)


def _arrange(draws: _KeyedDraws, level: int, content: tuple[int, ...]) -> Spec:
    background, relations = content[0], content[1:level]
    colours, shapes = content[level : 2 * level], content[2 * level :]
    directions = [RELATIONS[RELATION_NAMES[r]] for r in relations]
    reach = 0.5 - CORNER
    first = (0.5 + reach * sum(d[0] for d in directions), 0.5 + reach * sum(d[1] for d in directions))
    centres = [first] + [(first[0] - 2 * reach * dx, first[1] - 2 * reach * dy) for dx, dy in directions]
    across = [0.0 if d or level != 2 else SIDEWAYS_JITTER for d in directions[0]]
    things = tuple(_shape_object(draws, level, s, c, at, across) for s, c, at in zip(shapes, colours, centres))
    return Spec(level, background, things, relations=tuple(relations))


# --- words -----------------------------------------------------------------------------------------------


def caption(spec: Spec) -> str:
    """The picture in words, e.g. "a red circle on the left of a navy background"."""
    words = [f"{_article(COLOUR_NAMES[t.colour])} {SHAPES[t.shape]}" for t in spec.things]
    background = f"{_article(BACKGROUND_NAMES[spec.background])} background"
    if spec.level == 1:
        where = "on" if spec.place is None or not spec.says_place else PLACES[PLACE_NAMES[spec.place]][0]
        return f"{words[0]} {where} {background}"
    parts = [f"{RELATION_NAMES[r]} {word}" for r, word in zip(spec.relations, words[1:])]
    return f"{words[0]} {' and '.join(parts)} on {background}"


def paraphrase(spec: Spec) -> str:
    """The picture in the other order: the second object first, with the opposite relation (level 2), or the second
    relation first (level 3). "" where that is a sentence of the other split, and at level 1, which has one order."""
    if spec.level == 1:
        return ""
    first, *rest = spec.things
    if spec.level == 2:
        turned = replace(spec, things=(rest[0], first), relations=(spec.relations[0] ^ 1,))
    else:
        turned = replace(spec, things=(first, *rest[::-1]), relations=spec.relations[::-1])
    held_out = [_is_held_out(one.level, _content_of(one)) for one in (spec, turned)]
    return caption(turned) if held_out[0] == held_out[1] else ""


def _content_of(spec: Spec) -> tuple[int, ...]:
    """As `_content` draws it."""
    return (spec.background, *spec.relations, *(t.colour for t in spec.things), *(t.shape for t in spec.things))


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _either(names) -> str:
    return "|".join(sorted(names, key=len, reverse=True))


_THING = re.compile(rf"\b(?:({_either(COLOURS)})\s+)?({_either(SHAPES)})s?\b")
_GROUND = re.compile(rf"\b({_either(BACKGROUNDS)})\s+background\b")
_PLACE = re.compile(rf"\b({_either(PLACES)})\b")
_RELATION = re.compile(rf"\b({_either(RELATIONS)})\b")


def parse(prompt: str) -> Expectation:
    """What a prompt in the captions' words describes. Anything it does not say is None; no objects = no `things`."""
    text = re.sub(r"\s+", " ", prompt.lower()).replace("grey", "gray").replace("centre", "center")
    text = text.replace("middle", "center")
    found = list(_THING.finditer(text))
    things = tuple((_index(COLOUR_NAMES, m[1]), SHAPES.index(m[2])) for m in found)
    relations = tuple(_first(_RELATION, text[a.end() : b.start()], RELATION_NAMES) for a, b in zip(found, found[1:]))
    tail = text[found[-1].end() :] if found else text
    place = _first(_PLACE, tail, PLACE_NAMES) if len(found) == 1 else None
    return Expectation(things, relations, place, _first(_GROUND, text, BACKGROUND_NAMES))


def _index(names: tuple[str, ...], word: str | None) -> int | None:
    return None if word is None else names.index(word)


def _first(pattern: re.Pattern, text: str, names: tuple[str, ...]) -> int | None:
    match = pattern.search(text)
    return _index(names, match[1] if match else None)


# --- pixels ----------------------------------------------------------------------------------------------


def _place_pixels(thing: ShapeObject, size: tuple[int, int]) -> tuple[float, float, float]:
    """Centre x, y and half extent of a thing in pixels."""
    return thing.x * size[1], thing.y * size[0], thing.radius * min(size)


def pixel_window(x: float, y: float, reach: float, size: tuple[int, int]) -> tuple[slice, slice]:
    """The pixels within `reach` of (x, y) that lie in the picture, as (rows, columns)."""
    rows = slice(max(int(y - reach), 0), min(int(y + reach) + 2, size[0]))
    return rows, slice(max(int(x - reach), 0), min(int(x + reach) + 2, size[1]))


def render(spec: Spec, size: tuple[int, int]) -> np.ndarray:
    """The picture as uint8 (h, w, 3), antialiased. `size` is (height, width) in pixels, at least 16 each."""
    image = np.empty((*size, 3), np.uint8)
    image[:] = BACKGROUNDS[BACKGROUND_NAMES[spec.background]]
    for thing in spec.things:
        x, y, radius = _place_pixels(thing, size)
        window = pixel_window(x, y, radius + 1, size)
        alpha = coverage(thing.shape, x, y, radius, window)[..., None]
        ground = BACKGROUND_RGB[spec.background]
        image[window] = (ground + alpha * (COLOUR_RGB[thing.colour] - ground) + 0.5).astype(np.uint8)
    return image


def segment(spec: Spec, size: tuple[int, int]) -> np.ndarray:
    """Class map, uint8 (h, w): 0 background, 1 + shape index where a shape covers at least half of the pixel."""
    classes = np.zeros(size, np.uint8)
    for thing in spec.things:
        x, y, radius = _place_pixels(thing, size)
        window = pixel_window(x, y, radius + 1, size)
        classes[window][coverage(thing.shape, x, y, radius, window) >= 0.5] = 1 + thing.shape
    return classes


def boxes(spec: Spec, size: tuple[int, int]) -> list[tuple[float, float, float, float]]:
    """Tight boxes (x, y, width, height) in pixels, one a thing."""
    return [box(thing, size) for thing in spec.things]


def box(thing: ShapeObject, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Tight box (x, y, width, height) of one object in pixels of a picture of `size` = (height, width)."""
    x, y, radius = _place_pixels(thing, size)
    left, top, right, bottom = EXTENTS[SHAPES[thing.shape]]
    return x + left * radius, y + top * radius, (right - left) * radius, (bottom - top) * radius

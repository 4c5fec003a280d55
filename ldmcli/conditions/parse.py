"""What people tell a model, as values of its conditions: layouts and class maps from files or Python, small images."""

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldmcli.core.console import warn, warn_once
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DataSettings
from ldmcli.data.arrays import numeric_rows
from ldmcli.data.decode import BadImage, decode_alpha, sanitise
from ldmcli.data.rows import class_map
from ldmcli.networks.conditioners import TextCondition
from ldmcli.networks.layout import LayoutCondition
from ldmcli.networks.spatial_conditioners import MapCondition

SLACK = 0.005  # share of the picture by which a box may reach beyond it: rounded corners are no mistake
ASPECT_SLACK = 0.02
LIMIT = DataSettings().max_pixels
HOLE_LUMINANCE = 128
OPAQUE = 250  # of 255: lossy formats round
FORM = '{"size": [width, height], "objects": [{"bbox": [x, y, w, h], "category": "name"}]}'


def read_layouts(path: Path) -> list[dict]:
    """The layouts of a JSON file: one, or a list of them, as they stand there. Raises InputError."""
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"--layout {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--layout {path}: not UTF-8 text (byte {error.start})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        where = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"--layout {path}: not JSON{where}; a layout is {FORM}") from None
    layouts = found if isinstance(found, list) else [found]
    if not layouts or not all(isinstance(one, dict) for one in layouts):
        raise InputError(f"--layout {path}: a layout is {FORM}, or a list of such")
    return layouts


def layout_value(given: Any, entry: LayoutCondition, name: str = "layout") -> dict[str, np.ndarray]:
    """{"bbox": (n, 4) x, y, w, h as shares of the picture, "category": (n,) indices} of a layout.

    given: {"size": [w, h], "objects": [{"bbox", "category"}, …]} with boxes in pixels of that size, or as shares
    (0 … 1) without size; or {"bbox": …, "category": …} of two lists. Raises InputError, which begins with `name`.
    """
    if not isinstance(given, dict) or not ("objects" in given or {"bbox", "category"} <= given.keys()):
        raise InputError(f"{name}: a layout is {FORM}")
    objects = given["objects"] if "objects" in given else _objects(given["bbox"], given["category"], name)
    if not isinstance(objects, (list, tuple)) or not all(
        isinstance(one, dict) and {"bbox", "category"} <= one.keys() for one in objects
    ):
        raise InputError(f'{name}: "objects" is a list of {{"bbox": [x, y, w, h], "category": "name"}}')
    if not objects:
        raise InputError(f"{name}: no objects in it; name at least one")
    size = _size(given.get("size"), name)
    boxes = np.stack([_box(one["bbox"], size, f"{name}, object {k + 1}") for k, one in enumerate(objects)])
    try:
        kinds = [entry.index(_category(one["category"])) for one in objects]
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    slots = entry.layout.slots
    if len(kinds) > slots:
        warn(f"{name}: {len(kinds)} objects; this model has room for {slots}, the others are left out")
    return {"bbox": boxes[:slots], "category": np.array(kinds[:slots], np.int64)}


def _objects(boxes: Any, kinds: Any, name: str) -> list[dict[str, Any]]:
    """Objects of two lists, arrays or tensors."""
    boxes, kinds = (part.tolist() if hasattr(part, "tolist") else part for part in (boxes, kinds))
    if not isinstance(boxes, (list, tuple)) or not isinstance(kinds, (list, tuple)) or len(boxes) != len(kinds):
        raise InputError(f'{name}: "bbox" and "category" are two lists, equally long')
    return [{"bbox": box, "category": kind} for box, kind in zip(boxes, kinds)]


def _category(value: Any) -> str:
    """A category as people write it: a number is read as text, since categories may be called by numbers."""
    if isinstance(value, (str, int, np.integer)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    raise InputError(f"category {value!r}: a category is a name")


def _size(size: Any, name: str) -> tuple[float, float] | None:
    if size is None:
        return None
    numbers = _numbers(size, 2)
    if numbers is None or min(numbers) <= 0:
        raise InputError(f'{name}: "size" is {size!r}; it must be [width, height] in pixels')
    return numbers[0], numbers[1]


def _box(bbox: Any, size: tuple[float, float] | None, name: str) -> np.ndarray:
    numbers = _numbers(bbox, 4)
    if numbers is None:
        raise InputError(f"{name}: bbox is {bbox!r}; it must be four numbers x, y, w, h")
    box = np.array(numbers) / np.array((size or (1, 1)) * 2)
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise InputError(f"{name}: bbox {bbox} has no area; w and h must be above 0")
    if x < -SLACK or y < -SLACK or x + w > 1 + SLACK or y + h > 1 + SLACK:
        where = (
            f"the picture of {size[0]:g}x{size[1]:g}"
            if size
            else ('the picture: without "size", boxes are shares 0 … 1')
        )
        raise InputError(f"{name}: bbox {bbox} reaches outside {where}")
    corners = np.clip([x, y, x + w, y + h], 0, 1)
    return np.array([*corners[:2], *(corners[2:] - corners[:2])])


def _numbers(value: Any, count: int) -> list[float] | None:
    try:
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, (str, bytes)) or len(value) != count or any(isinstance(one, bool) for one in value):
            return None
        numbers = [float(one) for one in value]
    except (TypeError, ValueError):
        return None
    return numbers if np.isfinite(numbers).all() else None


def as_list(given: Any) -> list:
    """Several things as a list; one thing (a dict, a text, a picture, an array or rows of numbers) as a list of it."""
    if given is None:
        return []
    if numeric_rows(given):
        given = np.asarray(given)
    if isinstance(given, np.ndarray) or hasattr(given, "detach"):
        return list(np.asarray(given)) if given.ndim > 2 else [np.asarray(given)]
    return list(given) if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) else [given]


def words_of(given: Any) -> list[str]:
    """Prompts from Python: one, or several. Raises UsageError for what is no text."""
    found = [given] if isinstance(given, str) else [] if given is None else list(given)
    wrong = next((one for one in found if not isinstance(one, str)), None)
    if wrong is not None:
        raise UsageError(f"prompt: {wrong!r} is no text")
    return [str(one) for one in found]


def warn_of_cut(entry: TextCondition, texts: Sequence[str], what: str, remedy: str = "", total: int = 0) -> None:
    """Says once how many prompts or captions are longer than a model reads, and the first of them. `remedy` ends the
    line; total: how many there are, where `texts` are those that may be too long."""
    if cut := entry.cut(texts):
        are = "are" if len(cut) > 1 else "is"
        warn_once(
            f"cut {what}",
            f"{len(cut)} of {total or len(texts)} {what} {are} longer than the {entry.length} "
            f"tokens that the model reads, and cut; the first: “{sanitise(cut[0], 80)}”{remedy}",
        )


def labels_of(given: Any) -> list[int | str]:
    """Classes from Python: a name or index, or several: a list, an array, a tensor of whole numbers. Raises
    UsageError."""
    found = given.tolist() if hasattr(given, "tolist") else given
    found = [] if found is None else [found] if isinstance(found, (str, int, float)) else list(found)
    return [_label(one.item() if hasattr(one, "item") else one) for one in found]


def _label(one: Any) -> int | str:
    if isinstance(one, bool) or not isinstance(one, (int, str)):
        raise UsageError(f"classes: {one!r} is neither the name of a class nor a whole number")
    return one


def layouts_of(given: Any, entry: LayoutCondition) -> list[dict]:
    """Values of layouts from Python: a layout, a path, or a list of these."""
    found: list[dict] = []
    for one in as_list(given):
        if isinstance(one, (str, Path)):
            layouts = read_layouts(Path(one))
            names = [f"{one}" if len(layouts) == 1 else f"{one}, layout {k + 1}" for k in range(len(layouts))]
        else:
            layouts, names = [one], [f"layout {len(found) + 1}"]
        found += [layout_value(layout, entry, name) for layout, name in zip(layouts, names)]
    return found


def maps_of(given: Any, entry: MapCondition, size: tuple[int, int] | None = None) -> list[np.ndarray]:
    """Class maps from Python: files, PIL pictures of mode L or P, or arrays (H, W); one or several.

    size: (height, width) to bring them to (nearest pixel); None leaves them. Raises InputError for colours, an index
    that the model does not know, or another aspect.
    """
    found = [_map(one, f"map {k + 1}") for k, one in enumerate(as_list(given))]
    return [_fitting(index, name, entry, size) for index, name in found]


def _map(one: Any, name: str) -> tuple[np.ndarray, str]:
    if isinstance(one, (str, Path)):
        try:
            return class_map(Path(one).read_bytes(), str(one), LIMIT), f"--map {one}"
        except BadImage as error:
            raise InputError(f"--map {error}") from None
        except OSError as error:
            raise InputError(f"--map {one}: {error.strerror or error}") from None
    if hasattr(one, "mode"):
        buffer = BytesIO()
        one.save(buffer, "PNG")
        return class_map(buffer.getvalue(), name, LIMIT), name
    try:
        index = np.asarray(one)
    except (TypeError, ValueError):
        index = np.asarray(None)
    if index.ndim != 2 or not np.issubdtype(index.dtype, np.integer) or not index.size or index.min() < 0:
        raise InputError(
            f"{name}: a map is an array (height, width) of class indices from 0 on, not {index.dtype} {index.shape}"
        )
    return index, name


def _fitting(index: np.ndarray, name: str, entry: MapCondition, size: tuple[int, int] | None) -> np.ndarray:
    void = 255 if entry.void else -1
    wrong = np.unique(index[(index >= entry.classes) & (index != void)])
    if len(wrong):
        raise InputError(
            f"{name}: class index {', '.join(map(str, wrong[:5]))}; this model knows 0 … "
            f"{entry.classes - 1} ({', '.join(entry.names[:6])}{' …' if entry.classes > 6 else ''})"
        )
    if size is None or index.shape == tuple(size):
        return index.astype(np.uint8)
    ratio = index.shape[1] / index.shape[0] * size[0] / size[1]
    if abs(ratio - 1) > ASPECT_SLACK:
        raise InputError(
            f"{name}: {index.shape[1]}x{index.shape[0]} px (width x height) has another aspect than the "
            f"picture, {size[1]}x{size[0]}; cut the map, or give --size {index.shape[0]}x{index.shape[1]}"
        )
    rows, columns = ((np.arange(b) + 0.5) * a / b for a, b in zip(index.shape, size))
    return index[rows.astype(int)][:, columns.astype(int)].astype(np.uint8)


def masks_of(given: Any) -> list[np.ndarray]:
    """Masks from Python as bool (H, W), True = hole: bool arrays, or pictures as `hole_in` reads them."""
    found = []
    for k, one in enumerate(as_list(given)):
        array = np.asarray(one) if isinstance(one, np.ndarray) or hasattr(one, "detach") else None
        if array is not None and array.dtype == bool and array.ndim == 2:
            found.append(array)
        elif array is None or array.dtype == np.uint8:
            found.append(hole_in(one if array is None else array, f"mask {k + 1}"))
        else:
            raise InputError(
                f"mask {k + 1}: {array.dtype} {array.shape}; a mask is bool (H, W), True in holes, "
                "or a uint8 picture that is white there"
            )
    return found


def hole_in(mask: Any, name: str) -> np.ndarray:
    """bool (H, W), True = hole, of a mask: a file, a PIL picture, or uint8 (H, W) or (H, W, 3 or 4).

    A hole has a luminance of at least 128. What is transparent was not painted, so it is no hole. Raises InputError
    where nothing is a hole, and for a picture with a transparent part whose colours are no mask.
    """
    colours, alpha = decode_alpha(_opened(mask), name=name)
    luminance = np.asarray(Image.fromarray(colours).convert("L"))
    if alpha is not None:
        _check_painted(luminance, alpha, name)
        luminance = (luminance * (alpha / 255.0) + 0.5).astype(np.uint8)
    found = luminance >= HOLE_LUMINANCE
    if not found.any():
        least, most = int(luminance.min()), int(luminance.max())
        dim = f"; its values are {least} … {most} of 255, so brighten it" if 0 < most and least != most else ""
        raise InputError(
            f"{name}: nothing in it is white (luminance {HOLE_LUMINANCE} or more), so there is nothing to "
            f"repaint; white marks the hole{dim}"
        )
    return found


def _check_painted(luminance: np.ndarray, alpha: np.ndarray, name: str) -> None:
    """Raises InputError for a mask with alpha that says nothing by its colours, or that is a photograph."""
    painted = luminance[alpha >= HOLE_LUMINANCE]
    if not painted.size:
        raise InputError(f"{name}: all of it is transparent; paint white what is to be repainted")
    if painted.max() < HOLE_LUMINANCE:
        raise InputError(
            f"{name}: a mask in its alpha channel alone, and nothing in it is white: it may mean what is "
            "painted or what is transparent; save it without transparency, white where to repaint"
        )
    between = (painted > 32) & (painted < 224)
    if between.mean() > 0.2 and painted.min() != painted.max():
        raise InputError(
            f"{name}: a picture with a transparent part, not a mask; to repaint that part, give it as the "
            "image, without a mask"
        )
    if painted.min() >= HOLE_LUMINANCE:
        warn_once(
            f"painted {name}",
            f"{name}: white on transparent: what is painted is repainted, "
            f"{(alpha >= HOLE_LUMINANCE).mean():.0%} of the picture",
        )


def transparent_hole(alpha: np.ndarray | None, name: str) -> np.ndarray:
    """bool (H, W), True where a picture's alpha is not opaque. Raises UsageError where it has no such part, InputError
    where nothing is opaque."""
    if alpha is None or alpha.min() >= HOLE_LUMINANCE:
        raise UsageError(
            f"MASK or --box: give one of them, to say what to repaint ({name} has no transparent part, "
            "which would say it, too)"
        )
    hole = alpha < OPAQUE
    if hole.all():
        raise InputError(f"{name}: all of it is transparent, so nothing would be kept")
    return hole


def _opened(one: Any) -> Any:
    """What `decode` takes, of a path, a PIL picture or a uint8 array."""
    if isinstance(one, np.ndarray):
        return Image.fromarray(one)
    return Path(one) if isinstance(one, str) else one

"""Layouts, boxes with categories: layout to image (Sec. 4.3.1, App. D.3)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ldmcli.conditions.condition import CheckedRows, Condition, FitData, Ranks, Size, Spec, View, as_list
from ldmcli.conditions.pictures import boxed
from ldmcli.conditions.text import checked_ids
from ldmcli.core.console import say, warn
from ldmcli.core.errors import InputError
from ldmcli.core.settings import DataSettings, DiffusionConfig
from ldmcli.data.boxes import are_shares
from ldmcli.data.pictures import first_few
from ldmcli.maths import rng
from ldmcli.maths.tiles import center_corner, reframe_boxes
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.layout import MAX_OBJECTS, LayoutConditioner

if TYPE_CHECKING:
    from ldmcli.conditions.dataset import ConditionDataset

ASSUMED_CATEGORIES = 300  # OpenImages

SLACK = 0.005  # share of the picture by which a box may reach beyond it: rounded corners are no mistake
FORM = '{"size": [width, height], "objects": [{"bbox": [x, y, w, h], "category": "name"}]}'


class BoxLayout(Condition):
    """Boxes with categories. τ_θ is the transformer of text over three tokens a box, and planes of the boxes beside
    z_t; the null is an empty layout."""

    name, conditioner = "layout", LayoutConditioner
    option, argument = "--layout", "layout"
    takes_ids = True
    whole = True
    spatial = True
    example_call, example_option = 'layout="layout.json", ', " --layout layout.json"
    streamable = False
    column = "objects"
    missing = "this model draws what boxes say; give them with --layout FILE.json"

    def validate(self, rows: Any) -> None:
        """As `validate_boxes`."""
        validate_boxes(rows)

    def check_rows(self, rows: Any, data: DataSettings, ranks: Ranks) -> CheckedRows:
        """All rows, their boxes validated."""
        ranks.on_all_ranks(lambda: validate_boxes(rows))
        return CheckedRows(rows)

    def from_row(self, dataset: "ConditionDataset", view: View) -> dict[str, Any]:
        """{"bbox": (n, 4) shares of the crop, "category": (n,) indices of the model's names}.

        With condition.crop_tokens beside them "whole" (n, 4), shares of the whole picture, and "crop" (4,), where the
        crop lies in it. In training the order is random by position: the original shuffles objects, too.
        """
        found = dict(dataset.kept(self.name, view, lambda: self._cut(dataset, view)))
        if view.mirrored:
            found |= {name: _mirrored(found[name]) for name in ("bbox", "whole", "crop") if name in found}
        if dataset.training and len(found["category"]) > 1:
            key = rng.key(dataset.config.train.seed, view.position, "objects")
            order = rng.permutation(key, 0, len(found["category"]))
            found |= {name: found[name][order] for name in ("bbox", "whole", "category") if name in found}
        return found

    def _cut(self, dataset: "ConditionDataset", view: View) -> dict[str, Any]:
        found = dataset.rows.boxes(view.row, dataset.size, dataset.crop, view.crop)
        own = dataset.categories(self.name)
        if own is not None:
            category = own[found["category"]]
            known = category >= 0
            found |= {"bbox": found["bbox"][known], "whole": found["whole"][known], "category": category[known]}
        if not dataset.config.condition.crop_tokens:
            found = {"bbox": found["bbox"], "category": found["category"]}
        return found

    def align_categories(self, rows: Any, conditioner: LayoutConditioner) -> np.ndarray:
        """The model's categories: those that it does not have are left out, and counted."""
        own, names = rows.category_names, conditioner.names
        found = np.array([names.index(name) if name in names else -1 for name in own], np.int64)
        unknown = [name for name, k in zip(own, found) if k < 0]
        if unknown:
            warn(
                f"{rows.source}, {rows.split}: objects of {len(unknown)} categories that the model "
                f"does not know are left out ({first_few(unknown)})"
            )
        return found

    def fit(self, data: FitData) -> Spec:
        """Categories, and places for as many objects as rows have; as in the run begun with where its categories cover
        those of the data."""
        count = [len(data.rows.boxes(i, data.size, "center", (0.5, 0.5))["category"]) for i in range(len(data.rows))]
        learned = LayoutConditioner.learn(data.config.condition, max(count, default=0), data.rows.category_names)
        earlier = data.earlier(self.name)
        if earlier and set(learned["categories"]) <= set(earlier["categories"]):
            return earlier
        return learned

    def assumed_spec(self, config: DiffusionConfig, stage: Autoencoder) -> tuple[Spec, str]:
        """As many categories as OpenImages has, and places as there can be."""
        names = [str(k) for k in range(ASSUMED_CATEGORIES)]
        spec = LayoutConditioner.learn(config.condition, MAX_OBJECTS, names)
        return spec, f"layout: up to {MAX_OBJECTS} objects assumed; the data may need fewer"

    def as_list(self, given: Any) -> list:
        """One, or several."""
        return as_list(given)

    def parse(self, values: list, conditioner: LayoutConditioner, size: Size | None = None) -> list[dict]:
        """Layouts, files of them, or both as {"bbox", "category"}."""
        return parse_layouts(values, conditioner)

    def parse_one(self, value: Any, conditioner: LayoutConditioner, size: Size) -> dict[str, np.ndarray]:
        """The one layout of a file. Raises InputError where it holds several."""
        found = parse_layouts(value, conditioner)
        if len(found) != 1:
            raise InputError(
                f"--layout {value}: {len(found)} layouts for one picture; for several pictures give a folder "
                "of files with their names"
            )
        return found[0]

    def names_of(self, spec: Spec) -> list[str]:
        """Names of the categories."""
        return list(spec.get("categories") or [])

    def picture(self, value: dict, size: Size, names: Sequence[str]) -> np.ndarray:
        """The boxes on white."""
        return boxed(np.full((*size, 3), 255, np.uint8), value, names)

    def beside(self, sample: np.ndarray, value: dict, names: Sequence[str]) -> np.ndarray:
        """The boxes on the sample."""
        return boxed(sample, value, names)

    def metadata(self, value: dict) -> dict[str, list]:
        """{"bbox", "category"} as lists."""
        return {name: part.tolist() for name, part in value.items()}

    def arrays(self, value: dict) -> list[np.ndarray]:
        """Boxes and categories."""
        return list(value.values())

    def inputs_of_ids(self, ids: Any, conditioner: LayoutConditioner) -> dict[str, Tensor]:
        """{"ids"} (n, L)."""
        return {"ids": checked_ids(ids, conditioner.encoder, conditioner.layout.length)}

    def centred(self, value: dict, size: Size, inside: Size | None) -> dict:
        """Boxes as shares of the larger picture."""
        if inside is None:
            return value
        return value | {"bbox": reframe_boxes(value["bbox"], inside, size, center_corner(size, inside))}

    def padded(self, value: dict, size: Size, unit: int) -> dict:
        """Boxes as shares of the padded picture."""
        whole = (-(-size[0] // unit) * unit, -(-size[1] // unit) * unit)
        return value | {"bbox": reframe_boxes(np.asarray(value["bbox"]), size, whole)}


def parse_layouts(given: Any, entry: LayoutConditioner) -> list[dict]:
    """Values of layouts from Python: a layout, a path, or a list of these."""
    found: list[dict] = []
    for one in as_list(given):
        if isinstance(one, (str, Path)):
            layouts = read_layouts(Path(one))
            names = [f"{one}" if len(layouts) == 1 else f"{one}, layout {k + 1}" for k in range(len(layouts))]
        else:
            layouts, names = [one], [f"layout {len(found) + 1}"]
        found += [parse_layout(layout, entry, name) for layout, name in zip(layouts, names)]
    return found


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


def parse_layout(given: Any, entry: LayoutConditioner, name: str = "layout") -> dict[str, np.ndarray]:
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


def _objects(boxes: Any, categories: Any, name: str) -> list[dict[str, Any]]:
    """Objects of two lists, arrays or tensors."""
    boxes, categories = (part.tolist() if hasattr(part, "tolist") else part for part in (boxes, categories))
    if (
        not isinstance(boxes, (list, tuple))
        or not isinstance(categories, (list, tuple))
        or len(boxes) != len(categories)
    ):
        raise InputError(f'{name}: "bbox" and "category" are two lists, equally long')
    return [{"bbox": box, "category": category} for box, category in zip(boxes, categories)]


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


def validate_boxes(rows) -> None:
    """Reads all boxes, says what is odd about them (outside of the picture, none at all), and finds out whether they
    are pixels or shares of the picture."""
    rows.boxes_are_shares = are_shares([rows.all_objects(i)["bbox"] for i in range(len(rows))])
    if rows.boxes_are_shares:
        say(f"{rows.source}, {rows.split}: boxes are taken as shares of the picture, none being above 1")
    found = [rows.objects(i) for i in range(len(rows))]
    empty = sum(not len(one["bbox"]) for one in found)
    if empty == len(found):
        raise InputError(f"{rows.source}, {rows.split}: no row has a box in {rows.columns.get('objects', 'objects')}")
    if empty:
        say(f"{rows.source}, {rows.split}: {empty} of {len(found)} rows have no objects; they stand for an empty scene")
    outside = sum(
        _outside(one["bbox"], (1, 1) if rows.boxes_are_shares else rows.shape(i)) for i, one in enumerate(found)
    )
    if outside:
        warn(
            f"{rows.source}, {rows.split}: {outside} boxes reach beyond their picture or have no area; they "
            "are clipped, and left out where nothing remains"
        )


def _outside(bbox: np.ndarray, shape: tuple[int, int]) -> int:
    x, y, w, h = bbox.reshape(-1, 4).T
    slack = 0.01 * max(shape) if max(shape) > 1 else 0.01  # rounded corners are no news
    inside = (x >= -slack) & (y >= -slack) & (x + w <= shape[1] + slack) & (y + h <= shape[0] + slack)
    return int((~(inside & (w > 0) & (h > 0))).sum())


def _mirrored(boxes: np.ndarray) -> np.ndarray:
    """Boxes (…, 4) x, y, w, h as shares, left and right exchanged."""
    return np.stack([1 - boxes[..., 0] - boxes[..., 2], *np.moveaxis(boxes[..., 1:], -1, 0)], axis=-1)

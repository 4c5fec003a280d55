"""Semantic maps, a class for each pixel: semantic image synthesis (Sec. 4.3.2)."""

import hashlib
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldmcli.conditions.condition import CheckedRows, Condition, FitData, Ranks, Size, Spec, View, as_list
from ldmcli.conditions.pictures import coloured, enlarged, with_legend
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DataSettings, DiffusionConfig
from ldmcli.data.decode import BadImage
from ldmcli.data.pictures import first_few
from ldmcli.data.rows import class_map, parallel_map
from ldmcli.maths.tiles import pad_edge, pad_reflect
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.spatial_conditioners import SemanticMapConditioner

if TYPE_CHECKING:
    from ldmcli.conditions.dataset import ConditionDataset

ASSUMED_MAP_CLASSES = 182  # COCO stuff

ASPECT_SLACK = 0.02
LIMIT = DataSettings().max_pixels


class SemanticMap(Condition):
    """A class for each pixel. τ_θ brings one plane a class to the size of z_t, beside which they stand; the null is a
    map without classes."""

    name, conditioner = "map", SemanticMapConditioner
    option, argument = "--map", "map"
    sized = True
    spatial = True
    pipeline_tag = "image-to-image"
    example_call, example_option = 'map="map.png", ', " --map map.png"
    streamable = False
    image_sized = True
    column = "map"
    missing = "this model draws what a class map says; give one with --map FILE.png"

    def check_rows(self, rows: Any, data: DataSettings, ranks: Ranks) -> CheckedRows:
        """Those rows whose map fits their picture, and the class indices in them."""
        found = ranks.gather(validate_maps(rows, range(ranks.rank, len(rows), ranks.world_size), data.workers))
        bad = sorted(sum((bad for bad, _ in found), []), key=lambda error: error.index)
        return CheckedRows(
            ranks.on_all_ranks(lambda: with_fitting_maps(rows, bad, data.skip_bad)), bad, sum(seen for _, seen in found)
        )

    def from_row(self, dataset: "ConditionDataset", view: View) -> np.ndarray:
        """uint8 (H, W), cut and mirrored."""

        def cut() -> np.ndarray:
            return dataset.rows.map_pixels(view.row, dataset.size, dataset.crop, view.crop)

        found = dataset.kept(self.name, view, cut, room=True)
        return found[:, ::-1] if view.mirrored else found

    def fit(self, data: FitData) -> Spec:
        """Classes, by the indices that occur and the names that there are; as in the run begun with where its classes
        cover those of the data."""
        seen = np.flatnonzero(sum(data.found[self.name])).tolist()
        learned = SemanticMapConditioner.learn(seen, map_names(data.rows), data.stage.f)
        earlier = data.earlier(self.name)
        if (
            earlier
            and earlier["names"][: learned["classes"]] == learned["names"]
            and all(earlier[name] == learned[name] for name in ("stages", "out_channels"))
        ):
            return earlier | {"void": earlier.get("void", False) or learned["void"]}
        return learned

    def assumed_spec(self, config: DiffusionConfig, stage: Autoencoder) -> tuple[Spec, str]:
        """As many classes as COCO stuff has."""
        spec = SemanticMapConditioner.learn([ASSUMED_MAP_CLASSES - 1], [], stage.f)
        return spec, f"map: {ASSUMED_MAP_CLASSES} classes assumed; the data say how many there are"

    def as_list(self, given: Any) -> list:
        """One, or several."""
        return as_list(given)

    def parse(self, values: list, conditioner: SemanticMapConditioner, size: Size | None = None) -> list[np.ndarray]:
        """Maps (H, W) of files, pictures or arrays, at `size`."""
        return parse_maps(values, conditioner, size)

    def picture(self, value: np.ndarray, size: Size, names: Sequence[str]) -> np.ndarray:
        """A colour a class."""
        return enlarged(coloured(value), size)

    def beside(self, sample: np.ndarray, value: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """The map above a legend of the classes in it."""
        there = [(int(k), names[k] if k < len(names) else "no class") for k in np.unique(value)]
        return with_legend(super().beside(sample, value, names), there)

    def metadata(self, value: np.ndarray) -> str:
        """The map's hash."""
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()

    def check_left_out(self, conditioner: SemanticMapConditioner) -> None:
        """Raises UsageError: nobody wants an image of none of the classes."""
        raise UsageError(f"{self.option}: {self.missing}")

    def centred(self, value: np.ndarray, size: Size, inside: Size | None) -> np.ndarray:
        """The map with its border repeated."""
        return pad_edge(value, size)

    def padded(self, value: np.ndarray, size: Size, unit: int) -> np.ndarray:
        """The map padded as the picture is."""
        return pad_reflect(value, unit)

    def window(self, value: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
        """The map in the window."""
        return value[window]

    def input_size(self, inputs: dict[str, Any]) -> Size | None:
        """The size of the maps."""
        height, width = inputs["index"].shape[1:]
        return height, width


def parse_maps(given: Any, entry: SemanticMapConditioner, size: tuple[int, int] | None = None) -> list[np.ndarray]:
    """Class maps from Python: files, PIL pictures of mode L or P, or arrays (H, W); one or several.

    size: (height, width) to bring them to (nearest pixel); None leaves them. Raises InputError for colours, an index
    that the model does not know, or another aspect.
    """
    found = [_map(one, f"map {k + 1}") for k, one in enumerate(as_list(given))]
    return [validate_map(index, name, entry, size) for index, name in found]


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


def validate_map(
    index: np.ndarray, name: str, entry: SemanticMapConditioner, size: tuple[int, int] | None
) -> np.ndarray:
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


def validate_maps(rows, indices: Sequence[int], workers: int) -> tuple[list[BadImage], np.ndarray]:
    """(maps among those of `indices` that are not as large as their picture, how often each class index occurs)."""
    bad: list[BadImage] = []
    seen = np.zeros(256, np.int64)
    for i, found in zip(indices, parallel_map(lambda i: _class_counts(rows, i), indices, workers or 1)):
        if isinstance(found, BadImage):
            found.index = i
            bad.append(found)
        else:
            seen += found
    return bad, seen


def with_fitting_maps(rows, bad: list[BadImage], skip_bad: bool):
    """The rows without those whose map was found `bad`. Raises InputError where they are not to be skipped."""
    if bad and (not skip_bad or len(bad) == len(rows)):
        raise InputError(
            f"{len(bad)} of {len(rows)} maps do not fit their picture: {first_few(bad)}; "
            "mend them, or leave such rows out with --skip-bad"
        )
    if bad:
        left_out = {error.index for error in bad}
        rows = rows.select([i for i in range(len(rows)) if i not in left_out])
        rows.notes.append(f"{len(bad)} rows whose map does not fit left out")
    return rows


def _class_counts(rows, i: int) -> np.ndarray | BadImage:
    try:
        found, shape = rows.map(i), rows.shape(i)
    except BadImage as error:
        return error
    if found.shape != tuple(shape):
        return BadImage(
            rows.name(i), f"its map is {found.shape[1]}x{found.shape[0]} px, the picture {shape[1]}x{shape[0]}"
        )
    return np.bincount(found.reshape(-1), minlength=256)


def map_names(rows) -> list[str]:
    """Names of a map's classes: the rows' own, or from id2label.json or classes.json beside the data; else none."""
    if own := getattr(rows, "map_names", None):
        return list(own)
    for name in ("id2label.json", "classes.json"):
        path = Path(rows.source) / name
        if path.is_file():
            try:
                return _names_in(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError):
                return []
    return []


def _names_in(found: Any) -> list[str]:
    if isinstance(found, dict) and isinstance(found.get("segmentation_classes"), list):
        found = found["segmentation_classes"]
    if isinstance(found, dict) and all(str(k).isdecimal() for k in found):
        numbers = {int(k): str(v) for k, v in found.items()}
        return [numbers.get(k, str(k)) for k in range(max(numbers, default=-1) + 1)]
    return [str(name) for name in found] if isinstance(found, list) else []

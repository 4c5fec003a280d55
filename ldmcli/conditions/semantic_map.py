"""Semantic maps, a class for each pixel: semantic image synthesis (Sec. 4.3.2)."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ldmcli.conditions.condition import Condition, Size, as_list
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DataSettings
from ldmcli.data.decode import BadImage
from ldmcli.data.rows import class_map
from ldmcli.maths.tiles import pad_edge, pad_reflect
from ldmcli.networks.spatial_conditioners import MapCondition

ASPECT_SLACK = 0.02
LIMIT = DataSettings().max_pixels


class SemanticMap(Condition):
    """A class for each pixel. τ_θ brings one plane a class to the size of z_t, beside which they stand; the null is a
    map without classes."""

    name, conditioner = "map", MapCondition
    option, argument = "--map", "map"
    sized = True
    column = "map"
    missing = "this model draws what a class map says; give one with --map FILE.png"

    def parse(self, values: list, conditioner: MapCondition, size: Size | None = None) -> list[np.ndarray]:
        """Maps (H, W) of files, pictures or arrays, at `size`."""
        return parse_maps(values, conditioner, size)

    def check_left_out(self, conditioner: MapCondition) -> None:
        """Raises UsageError: nobody asks for what none of the classes is drawn like."""
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


def parse_maps(given: Any, entry: MapCondition, size: tuple[int, int] | None = None) -> list[np.ndarray]:
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


def validate_map(index: np.ndarray, name: str, entry: MapCondition, size: tuple[int, int] | None) -> np.ndarray:
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

"""What `ldm inpaint` and `ldm upscale` work on: images, and the masks, maps and layouts that belong to each."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldmcli.conditions.layout import BoxLayout
from ldmcli.conditions.masked import hole_in, transparent_hole
from ldmcli.conditions.parse import list_values, option_values, parse_each
from ldmcli.conditions.semantic_map import SemanticMap
from ldmcli.core import console
from ldmcli.core.errors import InputError, UsageError
from ldmcli.data.decode import decode_alpha
from ldmcli.data.pictures import by_pair_name, image_files
from ldmcli.sampling.api import LoadedDiffusion
from ldmcli.sampling.request import EditRequest


@dataclass(frozen=True)
class EditSource:
    """A picture to work on. mask: a file, or None where a box says where the hole is; without both the hole is what is
    transparent. map, layout: files that speak of the whole picture."""

    image: Path
    mask: Path | None = None
    box: tuple[int, int, int, int] | None = None
    map: Path | None = None
    layout: Path | None = None

    @property
    def files(self) -> list[Path]:
        """All files that the results depend on."""
        return [file for file in (self.image, self.mask, self.map, self.layout) if file is not None]

    def pixels(self) -> np.ndarray:
        """uint8 (H, W, 3): colours as they are in the file. Raises InputError."""
        return decode_alpha(self.image)[0]

    def alpha(self) -> np.ndarray | None:
        """uint8 (H, W), 255 = opaque; None where all of the picture is. Raises InputError."""
        return decode_alpha(self.image)[1]

    def hole(self, size: tuple[int, int]) -> np.ndarray:
        """bool (H, W), True = hole. Raises InputError or, for a box, UsageError for what cannot be used."""
        if self.box is not None:
            return _box_hole(self.box, size, self.image)
        if self.mask is None:
            return transparent_hole(self.alpha(), str(self.image))
        found = hole_in(self.mask, str(self.mask))
        if found.shape != size:
            raise InputError(
                f"{self.mask}: a mask of {found.shape[1]}x{found.shape[0]} px for a picture of "
                f"{size[1]}x{size[0]} px ({self.image}); they must be of one size"
            )
        if found.all():
            raise InputError(
                f"{self.mask}: all of it is white, so nothing of the picture would be kept; black marks "
                "what is known (`ldm sample` draws whole pictures)"
            )
        return found

    def values(self, loaded: LoadedDiffusion, request: EditRequest, size: tuple[int, int]) -> dict[str, Any]:
        """Values by condition, for a result of `size` = (height, width) px. Raises UsageError for a condition that
        the model does not take, InputError for a layout or map that is wrong."""
        given = list_values(
            option_values(request.given),
            prompt=list(request.prompts[:1]),
            classes=list(request.classes[:1]),
            layout=self.layout,
            map=self.map,
        )
        return parse_each(loaded.conditions, given, size)


def _box_hole(box: tuple[int, int, int, int] | None, size: tuple[int, int], image: Path) -> np.ndarray:
    assert box is not None
    x, y, width, height = box
    name, whole = f"--box {','.join(map(str, box))}", f"{size[1]}x{size[0]} px ({image})"
    if width < 1 or height < 1:
        raise UsageError(f"{name}: x,y,width,height with a width and height of at least 1")
    if x < 0 or y < 0 or x + width > size[1] or y + height > size[0]:
        raise UsageError(f"{name}: reaches outside the picture of {whole}")
    hole = np.zeros(size, bool)
    hole[y : y + height, x : x + width] = True
    if hole.all():
        raise UsageError(f"{name}: is the whole picture of {whole}, so nothing would be kept")
    return hole


def edit_sources(request: EditRequest) -> list[EditSource]:
    """Pictures with what belongs to each: masks, maps and layouts from folders pair up with pictures by relative path
    without ending (or by name, where names are unique); a single file, or box, is for all. Raises UsageError, or
    InputError for a picture without a partner."""
    root, beside = request.images[0], [*request.masks, *request.maps, *request.layouts]
    inside = [path for path in beside if path.is_dir() and path != root and path.is_relative_to(root)]
    images = image_files(request.images, besides=inside)
    if request.masks and root.is_dir() != request.masks[0].is_dir():
        raise UsageError("IMAGE and MASK: two files, or two folders whose files pair up by name")
    sources = [EditSource(image, box=request.box) for image in images]
    for what, given in (("mask", request.masks), (SemanticMap.name, request.maps), (BoxLayout.name, request.layouts)):
        if given:
            partners = _partners(images, root, given[0], what)
            sources = [replace(source, **{what: partner}) for source, partner in zip(sources, partners)]  # type: ignore[arg-type]
    return sources


def _partners(images: list[Path], root: Path, given: Path, what: str) -> list[Path]:
    """What belongs to each picture: a file for all, or the one of its name in a folder."""
    if not given.is_dir():
        return [given] * len(images)
    found = sorted(given.rglob("*.json")) if what == BoxLayout.name else image_files([given])
    folder = root if root.is_dir() else root.parent
    pictures, partners = by_pair_name(folder, images), by_pair_name(given, found)
    lost = [image for name, image in pictures.items() if name not in partners]
    if lost and len({image.stem for image in images}) == len(images) and len({one.stem for one in found}) == len(found):
        pictures, partners = ({path.stem: path for path in paths} for paths in (images, found))  # one folder, flat
        lost = [image for name, image in pictures.items() if name not in partners]
    if lost:
        raise InputError(
            f"{lost[0]}: no {what} of that name in {given} ({len(lost)} of {len(images)} pictures have "
            "none); pairs share path and name"
        )
    left = [path for name, path in partners.items() if name not in pictures]
    if left:
        console.warn(f"{left[0]}: no picture of that name in {root} ({len(left)} of {len(found)} {what}s are not used)")
    return [partners[name] for name in pictures]

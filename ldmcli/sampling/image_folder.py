"""A folder of results while it is written: numbered images with their settings inside, a sheet, request.json.

The same request again makes only what is missing; a signal leaves whole files only.
"""

import hashlib
import io
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldmcli.core import console, files
from ldmcli.core.errors import Interrupted, UsageError
from ldmcli.core.outputs import SHEET, Results, beside
from ldmcli.core.signals import StopRequest
from ldmcli.sampling.contact_sheets import grid, png_bytes

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
Images = Iterable[tuple[Image.Image, dict[str, np.ndarray]]]


class ImageFolder:
    """The folder `out` of a request. todo: numbers of the images that are missing.

    request: what is sampled, as request.json keeps it, with "total", the number of images, and "format". conditions:
    those that are shown beside each image. inputs: files that the command reads. Raises UsageError, before anything is
    touched, where the folder holds what would be lost.
    """

    def __init__(
        self,
        out: Path,
        request: dict[str, Any],
        *,
        conditions: Sequence[str] = (),
        inputs: Sequence[Path] = (),
        sheets: Sequence[str] = (SHEET,),
        overwrite: bool = False,
    ):
        self.out, self.fmt, self.seconds = out, request["format"], 0.0
        self.names = numbered(out, request["total"], self.fmt)
        self._results = Results(
            out, self.names, request, conditions=conditions, inputs=inputs, sheets=sheets, overwrite=overwrite
        )
        self.todo = self._results.todo

    def write(
        self,
        batches: Sequence[list[int]],
        make: Callable[[list[int]], Images],
        metadata: Callable[[int], dict[str, Any]] | None,
        sheet: Callable[[], list[list[np.ndarray]]],
        *,
        action: str,
        more: Callable[[], Mapping[str, bytes]] = dict,
    ) -> None:
        """Makes and writes the images of `batches`, then the sheet. make: images of a batch, each with pictures of its
        conditions by name; metadata: what an image carries, by number; sheet: its rows; more: further `sheets`
        by name. Raises Interrupted after a signal."""
        started = time.perf_counter()
        with self._results as results, StopRequest() as stop, console.progress(len(self.todo), action) as bar:
            for batch in batches:
                for k, (image, conditions) in zip(batch, make(batch)):
                    for name, picture in conditions.items():  # before the image, whose presence says that all are there
                        results.write(beside(self.names[k], name), png_bytes(picture))
                    results.write(self.names[k], image_bytes(image, self.fmt, metadata(k) if metadata else None))
                bar.advance(len(batch))
                self._end_if_stopped(stop)
            self.seconds = time.perf_counter() - started
            results.write(self.out / SHEET, png_bytes(grid(sheet())))
            for name, data in more().items():
                results.write(self.out / name, data)

    def document(self) -> dict[str, Any]:
        """What --json prints of the folder."""
        return {"out": str(self.out), "images": [str(name) for name in self.names], "grid": str(self.out / SHEET)}

    def _end_if_stopped(self, stop: StopRequest) -> None:
        if stop.stop:
            left = sum(not name.exists() for name in self.names)
            raise Interrupted(
                f"{self.out}: stopped with {left} of {len(self.names)} images missing; the same command draws them",
                stop.stop,
            )


def numbered(out: Path, total: int, fmt: str) -> list[Path]:
    """Paths of the images of a request, in a folder that is made for them. Raises UsageError for another format."""
    if fmt not in FORMATS:
        raise UsageError(f"--format {fmt}: choose one of {', '.join(FORMATS)}")
    with files.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return [out / f"{k:06d}.{fmt}" for k in range(total)]


def image_bytes(image, fmt: str, metadata: dict[str, Any] | None) -> bytes:
    """A PIL image as png, jpg or webp, with `metadata` as JSON inside (PNG text "ldm", EXIF description otherwise)."""
    buffer, text = io.BytesIO(), files.json_text(metadata) if metadata else ""
    if fmt == "png":
        info = PngInfo()
        if text:
            info.add_itxt("ldm", text)
        image.save(buffer, "PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        if text:
            exif[0x010E] = text.encode("ascii", "backslashreplace").decode()
        image.save(buffer, FORMATS[fmt], quality=95, exif=exif)
    return buffer.getvalue()


def contents(paths: Iterable[Path]) -> str:
    """Hash of the files that a request stands for: they may change under the same names."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(files.sha256_file(path)))
    return digest.hexdigest()


def in_batches(ids: Sequence[int], size: int) -> list[list[int]]:
    """Parts of at most `size` ids, in order."""
    return [list(ids[i : i + size]) for i in range(0, len(ids), size)]

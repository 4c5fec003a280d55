"""A folder of results while it is written: numbered images with their settings inside, a sheet, request.json.

The same request again makes only what is missing; a signal leaves whole files only. Several processes share a request:
rank 0 looks at the folder and keeps its record, each draws its batches of a round, and all end together.
"""

import hashlib
import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldmcli.core import console, files
from ldmcli.core.background import BackgroundWriter
from ldmcli.core.errors import Interrupted, LdmError, UsageError
from ldmcli.core.outputs import SHEET, Results, beside
from ldmcli.core.signals import StopRequest
from ldmcli.core.world import World
from ldmcli.sampling.contact_sheets import grid, png_bytes

MOST = 1_000_000  # images of a folder: their names have six digits
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
Images = Iterable[tuple[Image.Image, dict[str, np.ndarray]]]


class ImageFolder:
    """The folder `out` of a request. todo: numbers of the images that are missing.

    request: what is sampled, as request.json keeps it, with "total", the number of images, and "format". conditions:
    those that are shown beside each image. inputs: files that the command reads. world: the processes that write it
    together, all of which make one of these. Raises UsageError, before anything is touched, where the folder holds what
    would be lost. Collective.
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
        world: World | None = None,
    ):
        self.out, self.fmt, self.seconds = out, request["format"], 0.0
        self.world = world or World()
        self._results: Results | None = None  # of rank 0

        def look() -> tuple[list[Path], list[int]]:
            names = numbered(out, request["total"], self.fmt)
            self._results = Results(
                out, names, request, conditions=conditions, inputs=inputs, sheets=sheets, overwrite=overwrite
            )
            return names, self._results.todo

        self.names, self.todo = self.world.on_rank_0(look)

    def in_batches(self, most: int) -> list[list[int]]:
        """What is to be made, in order, in parts of at most `most` that give every process work."""
        return in_batches(self.todo, self.largest_batch(most))

    def largest_batch(self, most: int) -> int:
        """At most `most` images, or fewer where a process would be left without work."""
        return max(1, min(most, -(-len(self.todo) // self.world.world_size)))

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
        by name. Raises Interrupted after a signal to any of the processes. Collective."""
        started, world = time.perf_counter(), self.world
        with self._recorded() as writer, StopRequest() as stop, console.progress(len(self.todo), action) as bar:
            for start in range(0, len(batches), world.world_size):
                of_round = batches[start : start + world.world_size]
                mine = next(iter(world.share(of_round)), [])
                world.on_all_ranks(partial(self._write, writer, mine, make, metadata))
                bar.advance(sum(map(len, of_round)))
                self._end_if_stopped(stop, writer)
            world.on_all_ranks(writer.wait)
            self.seconds = time.perf_counter() - started
            world.on_rank_0(lambda: self._write_sheets({SHEET: png_bytes(grid(sheet())), **more()}))

    def _write(
        self,
        writer: BackgroundWriter,
        ids: list[int],
        make: Callable[[list[int]], Images],
        metadata: Callable[[int], dict[str, Any]] | None,
    ) -> None:
        for k, (image, conditions) in zip(ids, make(ids) if ids else ()):
            writer.submit(partial(self._files, k, image, conditions, metadata(k) if metadata else None))

    def _files(
        self, k: int, image: Image.Image, conditions: dict[str, np.ndarray], metadata: dict[str, Any] | None
    ) -> Iterator[tuple[Path, bytes]]:
        """The files of an image, itself last: its presence says that all are there."""
        for name, picture in conditions.items():
            yield beside(self.names[k], name), png_bytes(picture)
        yield self.names[k], image_bytes(image, self.fmt, metadata)

    def _write_sheets(self, sheets: Mapping[str, bytes]) -> None:
        assert self._results is not None
        for name, data in sheets.items():
            self._results.write(self.out / name, data)

    @contextmanager
    def _recorded(self) -> Iterator[BackgroundWriter]:
        """A writer whose files are in request.json afterwards, and those of the others where they end, too."""
        writer = BackgroundWriter(self.out)
        together = False
        with ExitStack() as stack:
            if self._results is not None:
                stack.enter_context(self._results)
            try:
                yield writer
                together = True
            except LdmError:  # is raised in all processes
                together = True
                raise
            finally:
                writer.close()
                hashes = self.world.gather(writer.hashes) if together else [writer.hashes]
                if self._results is not None:
                    for one in hashes:
                        self._results.add(one)

    def document(self) -> dict[str, Any]:
        """What --json prints of the folder."""
        return {"out": str(self.out), "images": [str(name) for name in self.names], "grid": str(self.out / SHEET)}

    def _end_if_stopped(self, stop: StopRequest, writer: BackgroundWriter) -> None:
        number = int(self.world.all_reduce_max([stop.stop])[0])
        if not number:
            return
        self.world.on_all_ranks(writer.wait)
        left = self.world.on_rank_0(lambda: sum(not name.exists() for name in self.names))
        raise self.world.agreed(
            Interrupted(
                f"{self.out}: stopped with {left} of {len(self.names)} images missing; the same command draws them",
                number,
            )
        )


def numbered(out: Path, total: int, fmt: str) -> list[Path]:
    """Paths of the images of a request, in a folder that is made for them. Raises UsageError for another format, and
    for more images than `MOST`."""
    if fmt not in FORMATS:
        raise UsageError(f"--format {fmt}: choose one of {', '.join(FORMATS)}")
    if total > MOST:
        raise UsageError(f"{total:,} images: a folder holds {MOST:,} at most, since names have six digits")
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

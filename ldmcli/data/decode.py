"""Encoded pictures of any kind to upright, opaque 8-bit RGB, or one line that says why not.

Fixed rules: EXIF orientation is applied; transparency is laid over a background colour; 16-bit grey is scaled by 1/257;
the first frame of an animation is taken; colour profiles are ignored (pixels count as sRGB); pixels without a range
(32-bit float or integer) are refused. Only raster formats are opened, so no file starts another program.
"""

import struct
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from ldmcli.core.console import clean, warn_once
from ldmcli.core.errors import InputError, UsageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI")
EXTENSIONS = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .pjpeg .pjp .mpo .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .avif "
    ".avifs .jp2 .j2k .j2c .jpc .jpf .jpx .qoi".split()
)
MAX_PIXELS = 89_478_485  # Pillow's own limit, a quarter of a gigabyte in RGB
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's readers raise on damaged files. MemoryError is not among them: that is about the machine.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    AttributeError,
    NotImplementedError,
    ZeroDivisionError,
    Image.DecompressionBombError,
)


class BadImage(InputError):
    """A picture that cannot be used. `name` says which, `reason` why: one line each, no control characters."""

    def __init__(self, name: str, reason: str):
        self.name, self.reason = sanitise(name, end=True), sanitise(reason)
        super().__init__(f"{self.name}: {self.reason}")
        self.index = -1  # of the row, where a whole set is looked at

    def __reduce__(self):
        return _bad_image, (self.name, self.reason, self.index)


def _bad_image(name: str, reason: str, index: int) -> BadImage:
    error = BadImage(name, reason)
    error.index = index
    return error


def sanitise(text: object, limit: int = 200, *, end: bool = False) -> str:
    """Text from data as it may be shown: one line, no control characters, bytes that are not UTF-8 as \\xNN.

    What is longer than `limit` loses its end, or with `end` its beginning: a file is known by the end of its path.
    """
    try:
        line = str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a pair of UTF-16, as JSON can hold
        line = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    line = " ".join(clean(line).split())
    if len(line) <= limit:
        return line
    return f"…{line[1 - limit :]}" if end else f"{line[: limit - 1]}…"


def decode(
    data: bytes | Path | Image.Image, *, name: str = "", max_pixels: int = MAX_PIXELS, background: str = "white"
) -> Image.Image:
    """An RGB picture, upright, opaque, 8 bit. `name` is what errors call it; `background` a colour name or #rrggbb.

    Raises BadImage: no picture, damaged, larger than `max_pixels` (judged by the header), empty, or without a range.
    """
    return _flat(_upright_8bit(data, name, max_pixels), colour(background))


def decode_alpha(
    data: bytes | Path | Image.Image, *, name: str = "", max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, np.ndarray | None]:
    """(colours uint8 (H, W, 3) as they are in the file, alpha uint8 (H, W) with 255 = opaque, or None where all of the
    picture is). Upright, 8 bit; raises as `decode`."""
    image = _upright_8bit(data, name, max_pixels)
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB")), None
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    pixels = np.asarray(image.convert("RGBA"))
    alpha = pixels[..., 3]
    return np.ascontiguousarray(pixels[..., :3]), None if alpha.min() == 255 else alpha


def _upright_8bit(data: bytes | Path | Image.Image, name: str, max_pixels: int) -> Image.Image:
    name = name or (str(data) if isinstance(data, Path) else "image")
    try:
        content = b"" if isinstance(data, Image.Image) else _bytes(data, name)
        image = data if isinstance(data, Image.Image) else _open(content, name, max_pixels)
        _check_size(name, image.size, max_pixels)
        _warn_of_frames(image, content, name)
        image.load()
        return _eight_bit(_upright(image), name)
    except _DAMAGE as error:
        raise BadImage(name, f"damaged ({_cause(error)})") from None


def probe(data: bytes | Path, *, name: str = "", max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) in pixels of the upright picture, from the header alone. Raises BadImage."""
    name = name or (str(data) if isinstance(data, Path) else "image")
    try:
        image = _open(_bytes(data, name), name, max_pixels)
        _check_size(name, image.size, max_pixels)
        width, height = image.size
        lies = image.format != "TIFF" and _orientation(image) >= 5  # Pillow's TIFF reader has turned the size already
        return (width, height) if lies else (height, width)
    except _DAMAGE as error:
        raise BadImage(name, f"damaged ({_cause(error)})") from None


def to_size(
    image: Image.Image,
    size: tuple[int, int],
    crop: str = "center",
    resize: str = "bicubic",
    u: Sequence[float] = (0.5, 0.5),
) -> np.ndarray:
    """uint8 (h, w, 3): the picture scaled, antialiased, until it just covers `size` = (h, w), then cropped.

    The crop lies at share `u` = (down, right) in [0, 1] of what is left over; crop = "center" means u = (0.5, 0.5).
    A third number in `u` is the zoom, at least 1: the picture is scaled so much further before.
    Only the pixels of the crop are computed, so extreme shapes cost nothing.
    """
    if crop == "center":
        u = (0.5, 0.5)
    height, width = scaled_size((image.height, image.width), size, *u[2:])
    top, left = (int(share * (whole - part) + 0.5) for share, whole, part in zip(u, (height, width), size))
    if (height, width) == (image.height, image.width):
        return np.array(image.crop((left, top, left + size[1], top + size[0])))
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, min((left + size[1]) * x, image.width), min((top + size[0]) * y, image.height))
    return np.array(image.resize((size[1], size[0]), FILTERS[resize], box=box))


def scaled_size(shape: tuple[int, int], size: tuple[int, int], zoom: float = 1.0) -> tuple[int, int]:
    """(h, w) of a picture of `shape` scaled until it just covers `size`, times `zoom`; sides are rounded."""
    scale = max(size[0] / shape[0], size[1] / shape[1]) * zoom
    return max(round(shape[0] * scale), size[0]), max(round(shape[1] * scale), size[1])


def _bytes(data: bytes | Path, name: str) -> bytes:
    if not isinstance(data, Path):
        content = bytes(data)
    else:
        try:
            content = data.read_bytes()
        except IsADirectoryError:
            raise BadImage(name, "a folder, not a picture") from None
        except OSError as error:
            raise BadImage(name, f"cannot be read ({error.strerror or error})") from None
    if not content:
        raise BadImage(name, "an empty file")
    return content


def _open(content: bytes, name: str, max_pixels: int) -> Image.Image:
    """The readers tried in turn, without Image.open: its limit on pixels is a process-wide number, and it warns."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # each time: other code may have reset the filters
    Image.init()
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        _check_size(name, _webp_size(content), max_pixels)
    cause = ""
    for kind in FORMATS:
        factory, accepts = Image.OPEN.get(kind, (None, None))
        if factory is None or (accepts and accepts(content[:16]) is not True):
            continue
        try:
            return factory(BytesIO(content), "")
        except _DAMAGE as error:
            cause = f"damaged {kind} ({_cause(error)})"
    raise BadImage(name, cause or f"not a picture of a known format ({_looks_like(content)})")


def _webp_size(content: bytes) -> tuple[int, int]:
    """Canvas of an extended WebP file, whose reader would take memory for it; (1, 1) for the other kinds."""
    if content[12:16] != b"VP8X" or len(content) < 30:
        return 1, 1
    return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")


def _looks_like(content: bytes) -> str:
    head = content[:256].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return "text"
    return "unknown first bytes"


def _check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise BadImage(name, f"no pixels ({width}x{height})")
    if width * height > max_pixels:
        raise BadImage(name, f"{width}x{height} pixels, over the limit of {max_pixels:,} (data.max_pixels)")


def _cause(error: BaseException) -> str:
    return sanitise(str(error) or type(error).__name__, 100)


def _warn_of_frames(image: Image.Image, content: bytes, name: str) -> None:
    """Says once a command that an animation, or a TIFF of several pages, gives its first picture only."""
    if image.format not in ("GIF", "TIFF", "PNG", "WEBP", "AVIF"):
        return
    try:
        if image.format in ("GIF", "TIFF") and content:  # counting moves these readers on
            image = Image.OPEN[image.format][0](BytesIO(content), "")
        several = getattr(image, "is_animated", False)
    except _DAMAGE:  # in a later frame, perhaps: the first one decides
        several = False
    if several:
        warn_once("frames", f"{sanitise(name)}: holds several frames; of such files the first is taken")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 … 8; 1 where there is none or the block is broken."""
    try:
        value = int(image.getexif().get(_ORIENTATION, 1))
    except _DAMAGE:
        return 1
    return value if value in _TURNS else 1


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = dict(image.info)  # the transparent colour lives there
    return turned


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """16-bit grey to 8 bits; a transparent grey level becomes alpha. Other modes pass."""
    if image.mode == "F":
        raise BadImage(name, "float pixels without a stated range; save as 8 or 16 bit")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535 or (image.mode == "I" and image.format == "TIFF"):
        raise BadImage(name, "32-bit integer pixels without a stated range; save as 8 or 16 bit")
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        return Image.merge("LA", (grey, alpha))
    return grey


def _flat(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """RGB with transparency laid over the background; info["transparent"] says whether there was any."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    picture = image.convert("RGBA")
    flat, alpha = Image.new("RGB", picture.size, background), picture.getchannel("A")
    flat.paste(picture, mask=alpha)
    least, _ = alpha.getextrema()
    flat.info["transparent"] = int(least) < 255  # type: ignore[arg-type]  # a tuple only of several bands
    return flat


def colour(background: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour's name or #rrggbb. Raises UsageError."""
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError:
        raise UsageError(f"data.background = {background!r}: not a colour; use a name or #rrggbb") from None

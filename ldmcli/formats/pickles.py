"""Tensors of a torch checkpoint (.ckpt, .pt, .bin), read without executing any of it.

Here are the containers: a zip archive, or the older format of one pickle after the other; `pickle_machine` reads the
pickles in them. Sizes are compared with the file before anything is made of them, and tensors are views of the mapped
file until somebody copies them.
"""

import io
import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmcli.core.errors import ModelError
from ldmcli.formats.pickle_machine import Lazy, Machine, Refused, Storage

MAX_PICKLE = 256 * 2**20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's "state_dict", or of the checkpoint itself where it is one; mapped from the file.

    Raises ModelError for files that are damaged, unsafe or something else.
    """
    try:
        with open(path, "rb") as file:
            if path.stat().st_size == 0:
                raise Refused("is empty")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        content, storages = _read_zip(path, data) if data[:4] == b"PK\3\4" else _read_legacy(data)
        return _tensors(_state_dict(content), storages, data)
    except Refused as error:
        raise ModelError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise ModelError(f"{path}: missing") from None
    except (
        zipfile.BadZipFile,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        OverflowError,
        struct.error,
        UnicodeError,
        RecursionError,
        NotImplementedError,
    ) as error:
        raise ModelError(f"{path}: damaged or not a checkpoint of torch ({_line(error)})") from None


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


def _state_dict(content: Any) -> dict[str, Lazy]:
    """The mapping from names to tensors in what was unpickled."""
    for _ in range(2):
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    if not isinstance(content, dict) or not any(isinstance(value, Lazy) for value in content.values()):
        raise Refused("holds no weights (neither a state_dict nor tensors by name)")
    found = {}
    for name, value in content.items():
        if isinstance(value, Lazy) and isinstance(name, str):
            found[name] = value
    return found


# ---------------------------------------------------------------- containers


Region = tuple[int, int, int | None]  # offset in the file, bytes, checksum where one is recorded


def _read_zip(path: Path, data: mmap.mmap) -> tuple[Any, dict[str, Region]]:
    """What data.pkl holds, and where the storages lie. Entries must be stored as they are, as torch writes them."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        programs = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(programs) != 1:
            raise Refused("is a zip archive, but no checkpoint of torch (one data.pkl is expected)")
        root = programs[0].removesuffix("data.pkl")
        order = entries.get(f"{root}byteorder")
        if order is not None and _bytes_of(data, _region(order, data)) != b"little":
            raise Refused("was written on a machine of another byte order")
        region = _region(entries[programs[0]], data)
        if region[1] > MAX_PICKLE:
            raise Refused(f"has a pickle of {region[1]:,} bytes; at most {MAX_PICKLE:,} are read")
        storages = {
            name.removeprefix(f"{root}data/"): _region(info, data)
            for name, info in entries.items()
            if name.startswith(f"{root}data/")
        }
    return Machine(io.BytesIO(_bytes_of(data, region))).run(), storages


def _region(info: zipfile.ZipInfo, data: mmap.mmap) -> Region:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise Refused(f"has a packed entry ({info.filename}); torch writes none")
    if info.header_offset + 30 > len(data):
        raise Refused(f"is cut short ({info.filename})")
    name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
    start = info.header_offset + 30 + name + extra
    if start + info.file_size > len(data):
        raise Refused(f"is cut short ({info.filename})")
    return start, info.file_size, info.CRC


def _bytes_of(data: mmap.mmap, region: Region) -> bytes:
    return bytes(data[region[0] : region[0] + region[1]])


def _read_legacy(data: mmap.mmap) -> tuple[Any, dict[str, Region]]:
    """The format before zip: pickles of magic number, protocol, system, content and keys, then the storages."""
    data.seek(0)
    try:
        magic = Machine(data).run()
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, Refused) as error:
        if isinstance(error, Refused) and "refused" in str(error):
            raise
        raise Refused("is neither a zip archive nor a pickle of torch") from None
    if magic != _LEGACY_MAGIC:
        raise Refused("is a pickle, but no checkpoint of torch")
    Machine(data).run(), Machine(data).run()
    machine = Machine(data)
    content, keys = machine.run(), Machine(data).run()
    storages: dict[str, Region] = {}
    position = data.tell()
    for key in keys:
        storage = machine.storages[key]
        (count,) = struct.unpack_from("<q", data, position)
        size = count * storage.dtype.itemsize
        if count < 0 or position + 8 + size > len(data):
            raise Refused("is cut short")
        storages[key] = (position + 8, size, None)
        position += 8 + size
    return content, storages


# ---------------------------------------------------------------- tensors


def _tensors(found: dict[str, Lazy], storages: dict[str, Region], data: mmap.mmap) -> dict[str, Tensor]:
    """Tensors as views of the mapped file; sizes and checksums of their storages are compared first."""
    whole: dict[str, Tensor] = {}
    for lazy in found.values():
        key, storage = lazy.storage.key, lazy.storage
        if key in whole:
            continue
        if key not in storages:
            raise Refused(f"lacks storage {key}")
        start, size, checksum = storages[key]
        if size != storage.count * storage.dtype.itemsize:
            raise Refused(f"has storage {key} of {size:,} bytes where {storage.count:,} numbers are promised")
        if checksum is not None and size and zlib.crc32(memoryview(data)[start : start + size]) != checksum:
            raise Refused(f"is damaged (checksum of storage {key})")
        whole[key] = _view(data, start, storage)
    return {
        name: whole[lazy.storage.key].as_strided(lazy.size, lazy.stride, lazy.offset) for name, lazy in found.items()
    }


def _view(data: mmap.mmap, start: int, storage: Storage) -> Tensor:
    if storage.count == 0:
        return torch.empty(0, dtype=storage.dtype)
    if start % storage.dtype.itemsize:
        part = bytearray(data[start : start + storage.count * storage.dtype.itemsize])
        return torch.frombuffer(part, dtype=storage.dtype)
    return torch.frombuffer(data, dtype=storage.dtype, count=storage.count, offset=start)

"""The safetensors format, written as a stream: no second copy of the tensors, and each byte is hashed once, as it goes
by. The bytes are those of the safetensors library."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

# by torch's name, in the order in which the library lays tensors out
_DTYPES = {
    "torch.uint64": "U64",
    "torch.int64": "I64",
    "torch.float64": "F64",
    "torch.complex64": "C64",
    "torch.float32": "F32",
    "torch.uint32": "U32",
    "torch.int32": "I32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.uint16": "U16",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
_ORDER = {name: place for place, name in enumerate(_DTYPES)}
_CHUNK = 4 << 20  # bytes that are hashed and then written: they still lie in the processor's cache


class Place(NamedTuple):
    """Where a tensor's bytes lie behind the header."""

    start: int
    end: int


def places(tensors: Mapping[str, Any]) -> dict[str, Place]:
    """The place of each tensor, in the order of the file: wide types first, then by name."""
    found, start = {}, 0
    for name in sorted(tensors, key=lambda name: (_ORDER[str(tensors[name].dtype)], name)):
        end = start + tensors[name].numel() * tensors[name].element_size()
        found[name] = Place(start, end)
        start = end
    return found


def header(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """All that stands before the tensors' bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, place in places(tensors).items():
        tensor = tensors[name]
        entries[name] = {
            "dtype": _DTYPES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [place.start, place.end],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def tensor_bytes(tensor: Any) -> Iterator[memoryview]:
    """The bytes of a tensor of any device, row by row, in pieces."""
    import torch

    if not tensor.numel():
        return
    whole = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for start in range(0, len(whole), _CHUNK):
        yield whole[start : start + _CHUNK]


def write_named(file: BinaryIO, tensors: Mapping[str, Any], metadata: Callable[[str], Mapping[str, str]]) -> str:
    """Writes a file that says its content's hash itself: `metadata(hash)` stands in its header. Returns the hash.

    The hash (hexadecimal SHA-256) goes over names, dtypes, shapes and bytes in order of name, so it does not depend on
    the format.
    """
    begin = len(header(tensors, metadata("0" * 64)))  # a hash is as long as any other
    laid, digest = places(tensors), hashlib.sha256()
    for name in sorted(tensors):
        file.seek(begin + laid[name].start)
        for piece in hashed_pieces(name, tensors[name], digest):
            file.write(piece)
    found = digest.hexdigest()
    file.seek(0)
    file.write(header(tensors, metadata(found)))
    return found


def hashed_pieces(name: str, tensor: Any, digest: Any) -> Iterator[memoryview]:
    """The bytes of a tensor in pieces; `digest` has taken them with the tensor's name, dtype and shape."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    for piece in tensor_bytes(tensor):
        digest.update(piece)
        yield piece


def write_plain(file: BinaryIO, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """Writes a file; returns the hexadecimal SHA-256 of its bytes."""
    digest = hashlib.sha256()

    def put(piece: bytes | memoryview) -> None:
        digest.update(piece)
        file.write(piece)

    put(header(tensors, metadata))
    for name in places(tensors):
        for piece in tensor_bytes(tensors[name]):
            put(piece)
    return digest.hexdigest()

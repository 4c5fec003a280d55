"""The safetensors files that are written as a stream: the library's bytes, hashed once."""

import hashlib
import json

import pytest
import safetensors.torch
import torch

from ldmcli.core import files, tensor_stream
from ldmcli.core.errors import ModelError

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor([3, -1]),
    'ü"x': torch.zeros(0, 3, dtype=torch.bfloat16),
    "mask": torch.tensor([True, False, True]),
    "half": torch.tensor(1.5, dtype=torch.float16),
    "across": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "b.wide": torch.tensor([0.1], dtype=torch.float64),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


def header(path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@pytest.mark.parametrize("chunk", [4 << 20, 3])
def test_a_stream_is_what_the_library_writes(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_stream, "_CHUNK", chunk)
    path = tmp_path / "x.safetensors"
    found = files.save_listed_tensors(path, TENSORS)
    whole = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    assert path.read_bytes() == safetensors.torch.save(whole, {"format": "pt"})
    assert found == files.sha256_file(path)
    content = files.save_tensors(path, TENSORS, {"step": "3"})
    assert content == files.tensors_hash(TENSORS) == header(path)["__metadata__"]["content_sha256"]
    loaded, metadata = files.load_tensors(path)
    assert metadata == {"format": "pt", "content_sha256": content, "step": "3"}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items()) and len(loaded) == len(TENSORS)


def test_every_type_has_the_librarys_place(tmp_path):
    tensors = {
        f"{place}": torch.zeros(2).to(getattr(torch, name.removeprefix("torch.")))
        for place, name in enumerate(tensor_stream._DTYPES)
    }
    files.save_listed_tensors(tmp_path / "x", tensors)
    assert (tmp_path / "x").read_bytes() == safetensors.torch.save(tensors, {"format": "pt"})


def test_each_byte_is_hashed_once(tmp_path, monkeypatch):
    hashed, sha256 = [], hashlib.sha256

    class Counted:
        def __init__(self):
            self.inner = sha256()

        def update(self, data):
            hashed.append(len(data))
            self.inner.update(data)

        def hexdigest(self):
            return self.inner.hexdigest()

    monkeypatch.setattr(hashlib, "sha256", Counted)
    monkeypatch.setattr(hashlib, "file_digest", None)
    tensors = {str(number): torch.ones(10_000) for number in range(4)}
    for save in (files.save_tensors, files.save_listed_tensors):
        hashed.clear()
        save(tmp_path / "x", tensors)
        assert 160_000 <= sum(hashed) < 162_000


@pytest.mark.parametrize("place", [3, 40, -1])
def test_a_flipped_byte_is_found_by_the_hash_of_the_list(place, tmp_path):
    path = tmp_path / "x.safetensors"
    found = files.save_listed_tensors(path, {"a": torch.ones(4)})
    files.load_tensors(path, sha256=found)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="damaged"):
        files.load_tensors(path, sha256=found)
